"""The ops of RWKV against their loops over time, forward and backward, with masks, packed runs and states."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import ConfigError
from zoo.ops.bonus import bonus_recurrence
from zoo.ops.generalized_delta import generalized_delta_rule
from zoo.ops.rwkv_reference import bonus_recurrence_reference, generalized_delta_rule_reference, wkv_reference
from zoo.ops.shift import token_shift
from zoo.ops.wkv import EMPTY, empty_state, wkv

B, L, E, G, H, K, V = 2, 37, 5, 2, 4, 6, 3
OPTIONS = [
    pytest.param(masked, packed, id=f"{'masked' if masked else 'whole'}, {'packed' if packed else 'one'}")
    for masked, packed in itertools.product([False, True], repeat=2)
]


def normal(*shape, dtype=torch.double):
    return torch.randn(*shape, dtype=dtype)


def where(masked, packed):
    mask_BL = torch.rand(B, L) > 0.3 if masked else None
    if masked:
        mask_BL[0, :4] = False
    return {"mask_BL": mask_BL, "segments_BL": (torch.arange(L) // 7 % 3).expand(B, L) if packed else None}


def same(got, expected, leaves, tolerance=1e-10):
    """Outputs and the gradients of all leaves agree."""
    weights = [torch.randn_like(x) for x in expected]
    sums = [sum((w * x).sum() for w, x in zip(weights, parts, strict=True)) for parts in (got, expected)]
    pairs = [*zip(got, expected, strict=True), *zip(*(torch.autograd.grad(s, leaves) for s in sums), strict=True)]
    for i, (a, b) in enumerate(pairs):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), i


# --- RWKV-4 --------------------------------------------------------------------------------------------------------


def wkv_inputs():
    inputs = [3 * normal(B, L, E), normal(B, L, E), 2 * torch.rand(E, dtype=torch.double), normal(E)]
    return [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize(("masked", "packed"), OPTIONS)
@pytest.mark.parametrize("chunk", [1, 8, None])
def test_wkv_is_its_formula(masked, packed, chunk):
    inputs, options = wkv_inputs(), where(masked, packed)
    same([wkv(*inputs, **options, chunk=chunk)[0]], [wkv_reference(*inputs, **options)], inputs)


def test_wkv_goes_on_from_a_state():
    inputs, mask_BL = wkv_inputs(), where(True, False)["mask_BL"]
    mask_BL[0, :12] = False  # the first piece of the first row holds nothing
    k, v, *channel = inputs
    state, parts = None, []
    for n, at in ((10, 0), (1, 10), (1, 11), (L - 12, 12)):
        here = slice(at, at + n)
        y, state = wkv(k[:, here], v[:, here], *channel, initial=state, final=True, mask_BL=mask_BL[:, here])
        parts.append(y)
    same([torch.cat(parts, 1)], [wkv_reference(*inputs, mask_BL=mask_BL)], inputs)
    nothing = wkv(k[:, :1], v[:, :1], *channel, final=True, mask_BL=torch.zeros(B, 1, dtype=torch.bool))[1]
    assert torch.equal(nothing, empty_state(B, E, k.device, torch.double))
    assert nothing[0, 2, 0] == EMPTY


def test_wkv_bears_large_exponents():
    """Float32, keys of +-200 and rates from none to e^8: no overflow, and the same as in float64."""
    generator = torch.Generator().manual_seed(0)
    k = 200 * torch.randn(1, 300, 4, generator=generator, dtype=torch.double)
    v, rate = torch.randn(1, 300, 4, generator=generator, dtype=torch.double), torch.tensor([0.0, 0.01, 20.0, 3000.0])
    exact, _ = wkv(k, v, rate.double(), torch.zeros(4, dtype=torch.double))
    k32 = k.float().requires_grad_()
    y, _ = wkv(k32, v.float(), rate, torch.zeros(4))
    assert (y - exact).abs().max() < 1e-3  # keys of 200 are known to 1e-5 in float32
    assert y.abs().max() <= v.abs().max()
    y.sum().backward()
    assert k32.grad.isfinite().all()


def test_wkv_refuses_what_does_not_fit():
    k, v, rate, bonus = wkv_inputs()
    with pytest.raises(ConfigError, match=r"rate must be \(5,\), got \(4,\)"):
        wkv(k, v, rate[:4], bonus)
    with pytest.raises(ConfigError, match="no state to carry"):
        wkv(k, v, rate, bonus, segments_BL=torch.zeros(B, L, dtype=torch.long), final=True)
    with pytest.raises(ConfigError, match="power of two, got 3"):
        wkv(k, v, rate, bonus, chunk=3)


# --- RWKV-6 and RWKV-7 ---------------------------------------------------------------------------------------------


def bonus_inputs():
    log_decay = -3 * torch.rand(B, G, L, K, dtype=torch.double)
    return [normal(B, H, L, K), normal(B, G, L, K), normal(B, G, L, V), log_decay, normal(G, K)]


def delta_inputs():
    removal = F.normalize(normal(B, G, L, K), dim=-1)
    along, log_decay = removal * torch.rand(B, G, L, K), -0.6 * torch.rand(B, G, L, K, dtype=torch.double)
    return [normal(B, H, L, K), normal(B, G, L, K), normal(B, G, L, V), removal, along, log_decay]


OPS = {
    "bonus_recurrence": (bonus_recurrence, bonus_recurrence_reference, bonus_inputs, 4),
    "generalized_delta_rule": (generalized_delta_rule, generalized_delta_rule_reference, delta_inputs, 6),
}


@pytest.mark.parametrize(("masked", "packed"), OPTIONS)
@pytest.mark.parametrize("name", OPS)
def test_chunks_are_the_loop(name, masked, packed):
    op, reference, make, _ = OPS[name]
    leaves = [x.requires_grad_() for x in [*make(), normal(B, G, K, V)]]
    options = {**where(masked, packed), "scale": 0.7, "initial": leaves[-1]}
    same(op(*leaves[:-1], **options, chunk=8, final=True), reference(*leaves[:-1], **options), leaves)


@pytest.mark.parametrize("name", OPS)
def test_single_steps_are_the_loop(name):
    op, reference, make, steps = OPS[name]
    inputs, mask_BL = [x.requires_grad_() for x in make()], where(True, False)["mask_BL"]
    state, parts = None, []
    for t in range(L):
        here = [x[:, :, t : t + 1] if i < steps else x for i, x in enumerate(inputs)]
        y, state = op(*here, initial=state, final=True, mask_BL=mask_BL[:, t : t + 1])
        parts.append(y)
    same([torch.cat(parts, 2), state], reference(*inputs, mask_BL=mask_BL), inputs)


@pytest.mark.parametrize("name", OPS)
def test_float32_and_bfloat16(name):
    op, reference, make, _ = OPS[name]
    inputs = make()
    exact = reference(*inputs)[0]
    assert (op(*(x.float() for x in inputs))[0] - exact).abs().max() < 2e-5 * exact.abs().max()
    half = [x.bfloat16() for x in inputs[:3]] + [x.float() for x in inputs[3:]]
    rounded = reference(*(x.double() for x in half))[0]
    y = op(*half)[0]
    assert y.dtype == torch.bfloat16
    assert (y - rounded).abs().max() < 0.02 * rounded.abs().max()


@pytest.mark.parametrize("name", OPS)
def test_shapes_that_do_not_fit_are_named(name):
    op, _, make, _ = OPS[name]
    inputs = make()
    with pytest.raises(ConfigError, match="log_decay must be"):
        op(*(x[..., :1] if i == (3 if name.startswith("bonus") else 5) else x for i, x in enumerate(inputs)))


# --- Token shift ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("masked", "packed"), OPTIONS)
def test_shift_gives_the_token_before(masked, packed):
    x_BLD, options = normal(B, L, 3), where(masked, packed)
    first_BD = None if packed else normal(B, 3)
    shifted, last = token_shift(x_BLD, initial=first_BD, final=True, **options)
    mask_BL, segments_BL = options["mask_BL"], options["segments_BL"]
    for b in range(B):
        before = torch.zeros(3, dtype=torch.double) if first_BD is None else first_BD[b]
        run = None
        for t in range(L):
            if mask_BL is not None and not mask_BL[b, t]:
                continue
            if packed and run is not None and segments_BL[b, t] != run:
                before = torch.zeros(3, dtype=torch.double)
            run = None if segments_BL is None else segments_BL[b, t]
            assert torch.equal(shifted[b, t], before)
            before = x_BLD[b, t]
        assert torch.equal(last[b], before)


def test_shift_of_a_row_without_tokens_keeps_what_was():
    first_BD = normal(1, 3)
    options = {"initial": first_BD, "final": True, "mask_BL": torch.zeros(1, 4, dtype=torch.bool)}
    assert torch.equal(token_shift(normal(1, 4, 3), **options)[1], first_BD)
    with pytest.raises(ConfigError, match=r"initial must be \(1, 3\)"):
        token_shift(normal(1, 4, 3), initial=normal(1, 2))
