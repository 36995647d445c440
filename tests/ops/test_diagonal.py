"""The selective scan against its loop over time, against other people's code, and where it could break."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import ConfigError
from zoo.ops.diagonal import selective_scan
from zoo.ops.state_space_reference import selective_scan_reference

CASES = ("plain", "state", "all")


def make(B=2, L=37, E=5, N=3, strength=1.0, dtype=torch.float64):
    x, b, c = torch.randn(B, L, E), torch.randn(B, L, N), torch.randn(B, L, N)
    return [t.to(dtype) for t in (x, torch.rand(B, L, E), -strength * torch.rand(E, N), b, c)]


def make_case(case, B=2, L=37, E=5, N=3):
    if case == "plain":
        return {}
    if case == "state":
        return {"initial": torch.randn(B, E, N).double()}
    mask_BL = torch.rand(B, L) > 0.2
    mask_BL[0, :3], mask_BL[1, -4:] = False, False
    segments_BL = (torch.rand(B, L) > 0.85).cumsum(1)
    return {"initial": torch.randn(B, E, N).double(), "mask_BL": mask_BL, "segments_BL": segments_BL}


def evaluate(function, tensors, case, **options):
    """Output, final state, and the gradients of a function of both for all that goes in."""
    case = dict(case)
    leaves = [t.clone().requires_grad_() for t in tensors]
    if "initial" in case:
        case["initial"] = case["initial"].to(tensors[0].dtype).clone().requires_grad_()
        leaves.append(case["initial"])
    y, state = function(*leaves[:5], final=True, **case, **options)
    loss = (y * torch.arange(y.numel(), device=y.device).view_as(y).cos()).sum() + state.square().sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def agree(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all()
        assert ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() < tolerance


@pytest.mark.parametrize("chunk", [None, 1, 4, 16, 64])
@pytest.mark.parametrize("case", CASES)
def test_is_the_loop_over_time(case, chunk):
    tensors, given = make(), make_case(case)
    agree(
        evaluate(selective_scan, tensors, given, chunk=chunk), evaluate(selective_scan_reference, tensors, given), 1e-10
    )


@pytest.mark.parametrize("strength", [0.0, 30.0, 1e6])
def test_no_decay_is_too_strong_or_too_weak(strength):
    tensors = make(L=130, strength=strength, dtype=torch.float32)
    exact = evaluate(selective_scan_reference, [t.double() for t in tensors], {})
    agree(evaluate(selective_scan, tensors, {}), exact, 2e-5)


def test_one_step_and_one_step_through_chunks():
    tensors, given = make(L=1), {"initial": torch.randn(2, 5, 3).double()}
    expected = evaluate(selective_scan_reference, tensors, given)
    agree(evaluate(selective_scan, tensors, given), expected, 1e-12)
    agree(evaluate(selective_scan, tensors, given, backend="torch"), expected, 1e-12)


def test_gradients_match_finite_differences():
    tensors = [t.requires_grad_() for t in make(B=1, L=6, E=2, N=2)]
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, final=True, chunk=2), tensors)


def test_padding_may_hold_anything_and_gets_nothing():
    tensors, case = make(), make_case("all")
    hidden = ~case["mask_BL"][..., None]
    poisoned = [t if t.ndim == 2 else t.masked_fill(hidden, torch.nan) for t in tensors]
    got = evaluate(selective_scan, poisoned, case)
    agree(got, evaluate(selective_scan_reference, tensors, case), 1e-10)
    assert not got[0].masked_select(hidden).any()
    assert not got[2].masked_select(hidden).any()


def test_sums_are_kept_in_float32():
    tensors = make(L=200, dtype=torch.float32)
    x, dt, A, B, C = tensors
    y, state = selective_scan(x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), final=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    exact, _ = selective_scan_reference(x.bfloat16().double(), dt.double(), A.double(), B.bfloat16(), C.bfloat16())
    assert (y.double() - exact).abs().max() < 2**-8 * exact.abs().max()


def test_states_of_a_long_sequence_are_not_all_kept():
    """What the backward pass holds grows with the number of chunks, not with L E N."""
    x, dt, A, B, C = (t.requires_grad_() for t in make(B=1, L=512, E=8, N=16, dtype=torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(x, dt, A, B, C, chunk=64)
    assert sum(kept) < 512 * 8 * 16 / 2


@pytest.mark.parametrize("E", [6])
def test_parity_with_transformers(E):
    module = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    tensors, z = make(E=E), torch.randn(2, 37, E).double()
    x, dt, A, B, C = tensors
    D = torch.randn(E).double()
    theirs = torch_scan(module)(
        *(t.mT for t in (x, dt.log())), A, B.mT, C.mT, D=D, z=z.mT, delta_bias=None, delta_softplus=True,
        return_last_state=True,
    )  # fmt: skip
    ours, state = selective_scan(x, F.softplus(dt.log()), A, B, C, final=True)
    agree([((ours + D * x) * F.silu(z)).mT, state], theirs, 1e-5)


def torch_scan(module):
    """The pure torch selective scan of transformers, whatever it is called in this version."""
    for name in ("mamba_selective_scan", "torch_selective_scan"):
        if hasattr(module, name):
            return getattr(module, name)
    pytest.skip("this version of transformers has no scan of its own as a function")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"A": torch.zeros(4, 3)}, r"A must be \(5, N\) for the 5 channels of x; got \(4, 3\)"),
        ({"B": torch.zeros(2, 37, 4)}, r"B must be \(2, 37, 3\); got \(2, 37, 4\)"),
        ({"initial": torch.zeros(2, 3, 5)}, r"initial must be \(2, 5, 3\); got \(2, 3, 5\)"),
        ({"x": torch.zeros(2, 0, 5)}, r"x must be \(B, L, E\) with L >= 1"),
        ({"chunk": 3}, "chunk must be a power of two, got 3"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    given = dict(zip(("x", "dt", "A", "B", "C"), make(), strict=True)) | wrong
    options = {k: given.pop(k) for k in ("initial", "chunk") if k in given}
    with pytest.raises(ConfigError, match=message):
        selective_scan(*given.values(), **options)
