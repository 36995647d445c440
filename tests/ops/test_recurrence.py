"""The gated linear recurrence: against the loop over time, against other people's code, and where it could break.

`FLA_VALUES` were printed by this file run as a script with fla-core 0.6.0 and einops importable:
    python tests/ops/test_recurrence.py
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from recurrent_cases import assert_near

from zoo.errors import ConfigError
from zoo.ops import chunks
from zoo.ops.recurrence import linear_recurrence
from zoo.ops.reference import linear_recurrence_reference

KINDS = ("none", "constant", "scalar", "vector", "strong scalar", "strong vector")
FLA_VALUES = {
    "gla": [-0.510147, -0.559634, -0.345916, 0.149379, 0.614246, 0.790224],
    "simple_gla": [-0.519915, -0.577524, -0.363515, 0.125423, 0.568288, 0.743878],
    "retention": [-0.09919, 0.432295, 0.760466, 0.057181, 0.075098, 0.057695],
    "linear_attn": [0.011332, 0.57317, 0.865438, -0.025839, -0.05023, -0.050998],
}


def make(kind: str, B=2, G=2, R=1, L=37, K=4, V=3, dtype=torch.float64):
    """q and k positive (so that the normaliser is too), v of both signs, and decays of a kind."""
    q, k = torch.rand(B, G * R, L, K, dtype=dtype), torch.rand(B, G, L, K, dtype=dtype)
    v, u = torch.randn(B, G, L, V, dtype=dtype), torch.rand(B, G, L, K, dtype=dtype)
    log_decay = {
        "none": None,
        "constant": -u[0, :, 0, 0],
        "scalar": -5 * u[..., 0] ** 4,
        "vector": -5 * u**4,
        "strong scalar": -1e4 * u[..., 0] ** 8,
        "strong vector": -1e4 * u**8,
    }[kind]
    return q, k, v, log_decay


def make_case(case: str, B=2, G=2, L=37, K=4, V=3):
    """An initial state (with a normaliser), left, right and interior padding, packed runs: none of them, or all."""
    if case == "plain":
        return {}
    state = torch.rand(B, G, K, V + 1).double()
    if case == "state":
        return {"initial": state}
    mask_BL = torch.rand(B, L) > 0.2
    mask_BL[0, :3], mask_BL[1, -4:] = False, False
    return {"initial": state, "mask_BL": mask_BL, "segments_BL": (torch.rand(B, L) > 0.85).cumsum(1)}


def evaluate(function, tensors, case, dtype, **options):
    """The output, the final state, and the gradients of a random function of both for everything that goes in."""
    initial = fitting_state(case, options.get("normalize", False))
    leaves = [t.detach().to(dtype).requires_grad_() for t in (*tensors, initial) if t is not None]
    fed = iter(leaves)
    inputs = [next(fed) if t is not None else None for t in tensors]
    case = dict(case, initial=next(fed)) if initial is not None else case
    outputs = function(*inputs, final=True, **case, **options)
    generator = torch.Generator().manual_seed(3)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in (*outputs, *grads)]


def fitting_state(case, normalize):
    """The initial state of a case, less the normaliser's column where nothing is normalised."""
    initial = case.get("initial")
    return initial if initial is None or normalize else initial[..., :-1]


@pytest.fixture
def _short_spans(monkeypatch):
    """Spans of three chunks of four steps, so that short sequences cross every kind of border."""
    monkeypatch.setattr(chunks, "SPAN_SIZE", 2 * 2 * 4 * 4 * 3)


@pytest.mark.usefixtures("_short_spans")
@pytest.mark.parametrize("case", ["plain", "state", "mask, runs, state"])
@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference_with_all_gradients(kind, normalize, R, case):
    tensors, case = make(kind, R=R), make_case(case)
    options = {"scale": 0.5, "normalize": normalize}
    expected = evaluate(linear_recurrence_reference, tensors, case, torch.float64, **options)
    assert_near(evaluate(linear_recurrence, tensors, case, torch.float64, chunk=4, **options), expected, 1e-10)
    assert_near(evaluate(linear_recurrence, tensors, case, torch.float32, chunk=4, **options), expected, 1e-5)
    assert_near(evaluate(linear_recurrence, tensors, case, torch.float64, **options), expected, 1e-10)


@pytest.mark.parametrize("L", [1, 2, 5, 64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_every_length_and_chunk(kind, L):
    tensors, case = make(kind, L=L), make_case("state", L=L)
    expected = evaluate(linear_recurrence_reference, tensors, case, torch.float64)
    for chunk in (1, 16, None):
        assert_near(evaluate(linear_recurrence, tensors, case, torch.float64, chunk=chunk), expected, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_with_the_state_carried_gives_the_same(kind):
    q, k, v, log_decay = make(kind, R=2)
    whole, last = linear_recurrence(q, k, v, log_decay, normalize=True, final=True, chunk=8)
    for cuts in ([0, 1, 37], [0, 8, 9, 10, 30, 37], list(range(38))):
        parts, state = [], None
        for start, stop in itertools.pairwise(cuts):
            here = slice(start, stop)
            log_here = log_decay if kind in ("none", "constant") else log_decay[:, :, here]
            y, state = linear_recurrence(
                q[:, :, here], k[:, :, here], v[:, :, here], log_here,
                normalize=True, initial=state, final=True, chunk=8,
            )  # fmt: skip
            parts.append(y)
        assert_near([torch.cat(parts, 2), *state], [whole, *last], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_runs_give_what_the_separate_sequences_give(kind):
    lengths, (q, k, v, log_decay) = [5, 1, 20, 11], make(kind, B=1)
    segments_BL = torch.repeat_interleave(torch.tensor([4, 2, 4, 9]), torch.tensor(lengths))[None]
    initial = make_case("state", B=1)["initial"][..., :-1]
    packed, last = linear_recurrence(q, k, v, log_decay, segments_BL=segments_BL, initial=initial, final=True, chunk=8)
    start = 0
    for i, length in enumerate(lengths):
        here = slice(start, start + length)
        log_here = log_decay if kind in ("none", "constant") else log_decay[:, :, here]
        y, state = linear_recurrence(
            q[:, :, here], k[:, :, here], v[:, :, here], log_here, initial=initial if i == 0 else None, final=True
        )
        assert_near([packed[:, :, here]], [y], 1e-12)
        start += length
    assert_near([last], [state], 1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_even_if_it_is_poison(kind, normalize):
    """Left, interior and right padding, filled with NaN: outputs, state and gradients are those without it."""
    tensors, case = make(kind, B=1, L=20, R=2), make_case("state", B=1)
    expected = evaluate(linear_recurrence, tensors, case, torch.float64, normalize=normalize, chunk=8)
    real = torch.ones(33, dtype=torch.bool)
    real[:5], real[12:16], real[-4:] = False, False, False
    padded = [t if t is None or t.ndim == 1 else spread(t, real) for t in tensors]
    # a foreign id at masked positions is not a run of its own
    case |= {"mask_BL": real[None], "segments_BL": torch.where(real, 7, 0)[None]}
    actual = evaluate_masked(padded, case, real, normalize)
    assert_near(actual, expected, 1e-10)
    with_segments = dict(case, segments_BL=None)
    assert_near(evaluate_masked(padded, with_segments, real, normalize), expected, 1e-10)


def spread(x_BGLX, real_L):
    """Put the steps of x at the real positions of a longer sequence of NaN."""
    out = torch.full((*x_BGLX.shape[:2], len(real_L), *x_BGLX.shape[3:]), math.nan, dtype=x_BGLX.dtype)
    out[:, :, real_L] = x_BGLX
    return out


def evaluate_masked(padded, case, real_L, normalize):
    """As `evaluate`, with the loss on real positions only; masked outputs and gradients must be exactly zero."""
    leaves = [t.clone().requires_grad_() for t in (*padded, fitting_state(case, normalize)) if t is not None]
    fed = iter(leaves)
    inputs = [next(fed) if t is not None else None for t in padded]
    y, state = linear_recurrence(*inputs, final=True, normalize=normalize, chunk=8, **dict(case, initial=next(fed)))
    assert (y[:, :, ~real_L] == 0).all()
    outputs = [y[:, :, real_L], state]
    generator = torch.Generator().manual_seed(3)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outputs)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    cut = []
    for grad, leaf in zip(grads, leaves, strict=True):
        if leaf.ndim > 2 and leaf.shape[2] == len(real_L):
            assert (grad[:, :, ~real_L] == 0).all()
            grad = grad[:, :, real_L]
        cut.append(grad)
    return [o.detach() for o in (*outputs, *cut)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["none", "constant", "scalar", "vector"])
def test_gradients_match_finite_differences(kind, normalize):
    q, k, v, log_decay = (None if t is None else t.requires_grad_() for t in make(kind, L=7, R=2, K=2, V=2))
    initial = torch.rand(2, 2, 2, 2 + normalize).double().requires_grad_()

    def function(q, k, v, initial, log_decay=None):
        return linear_recurrence(q, k, v, log_decay, normalize=normalize, initial=initial, final=True, chunk=4)

    inputs = (q, k, v, initial) if log_decay is None else (q, k, v, initial, log_decay)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", ["scalar", "vector"])
@pytest.mark.parametrize("jump", [-20.0, -1e4, -math.inf])
def test_a_strong_decay_leaves_the_steps_behind_it_exact(jump, shape):
    """One step forgets everything. A float32 cumulated sum would have lost what the steps behind it decay by."""
    q, k, v, log_decay = make(shape, L=64)
    log_decay = log_decay * 1e-3
    log_decay[:, :, 9] = jump
    log_decay[:, :, 40:] = -20.0
    expected = evaluate(linear_recurrence_reference, (q, k, v, log_decay), {}, torch.float64)
    actual = evaluate(linear_recurrence, (q, k, v, log_decay), {}, torch.float32)
    assert_near(actual, expected, 2e-6)
    if jump < -100:  # nothing of the first ten steps is left: changing them changes nothing behind
        v[:, :, :9] += 1e3
        again, _ = linear_recurrence(q.float(), k.float(), v.float(), log_decay.float())
        assert torch.equal(again[:, :, 9:], actual[0][:, :, 9:])


def test_the_denominator_is_clamped_with_its_gradient():
    q, k, v, log_decay = make("scalar")
    options = {"normalize": True, "eps": 1.0}
    expected = evaluate(linear_recurrence_reference, (q - 0.4, k, v, log_decay), {}, torch.float64, **options)
    assert_near(evaluate(linear_recurrence, (q - 0.4, k, v, log_decay), {}, torch.float64, **options), expected, 1e-10)


@pytest.mark.parametrize("log_a", [0.0, -1e-8, -1e4, -math.inf])
def test_extreme_constants(log_a):
    q, k, v, _ = make("none")
    log_G = torch.tensor([log_a, -0.1], dtype=torch.float64)
    expected = evaluate(linear_recurrence_reference, (q, k, v, log_G), {}, torch.float64)
    actual = evaluate(linear_recurrence, (q, k, v, log_G), {}, torch.float64)
    if log_a == -math.inf:  # the loop's own gradient is 0 * inf there; ours is the limit, zero
        expected[-1][0] = 0.0
    assert_near(actual, expected, 1e-10)


def plain(q, k, v, log_decay):
    """The recurrence as one masked matrix product in the dtype of q: what a plain evaluation costs in precision."""
    L, R = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(R, 1), v.repeat_interleave(R, 1)
    scores = q @ k.mT
    if log_decay is None:
        return scores.tril() @ v
    log_decay = log_decay.repeat_interleave(R, 0 if log_decay.ndim == 1 else 1)
    if log_decay.ndim == 1:
        log_decay = log_decay[:, None].expand(-1, L)
    total = log_decay.cumsum(2 if log_decay.ndim == 4 else -1)
    if log_decay.ndim == 4:
        factor = (total[:, :, :, None] - total[:, :, None]).clamp(max=0).exp().to(q.dtype)
        scores = (q[:, :, :, None] * factor * k[:, :, None]).sum(-1)
    else:
        scores = scores * (total[..., :, None] - total[..., None, :]).clamp(max=0).exp().to(q.dtype)
    return scores.tril() @ v


@pytest.mark.parametrize("kind", ["none", "constant", "scalar", "vector"])
def test_bfloat16_errs_at_most_twice_as_much_as_plain_torch(kind):
    q, k, v, log_decay = make(kind, L=160, K=16, V=16, R=2)
    q, k, v = (t.bfloat16() for t in (q - 0.5, k - 0.5, v))
    dy = torch.randn(q.shape[:3] + v.shape[3:]).bfloat16()

    def run(function, dtype, sums):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        leaves += [] if log_decay is None else [log_decay.detach().to(sums).requires_grad_()]
        y = function(*leaves, *([None] if log_decay is None else []))
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    exact = run(lambda *t: linear_recurrence_reference(*t)[0], torch.float64, torch.float64)
    ours = run(lambda *t: linear_recurrence(*t)[0], torch.bfloat16, torch.float32)
    theirs = run(plain, torch.bfloat16, torch.float32)
    for i, (o, p, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert o.dtype == p.dtype
        assert (o - e).norm() <= 2 * (p - e).norm(), f"output {i}: {(o - e).norm():.3e} against {(p - e).norm():.3e}"


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_both_carries_agree(n):
    update, state = torch.randn(2, 3, n, 4, 5), torch.randn(2, 3, 4, 5)
    shapes = (None, (1, 3, n, 1, 1), (2, 3, n, 1, 1), (2, 3, n, 4, 1))
    for decay in (None if s is None else torch.rand(s) * (torch.rand(s) > 0.2) for s in shapes):
        assert_near(chunks.carry_by_doubling(update, decay, state), chunks.carry(update, decay, state), 1e-6)


def test_dtypes_and_autocast():
    q, k, v, log_decay = make("scalar", dtype=torch.float32)
    for half in (torch.bfloat16, torch.float16):
        y, state = linear_recurrence(q.to(half), k.to(half), v.to(half), log_decay, final=True, normalize=True)
        assert y.dtype == half
        assert state.dtype == torch.float32
    y, state = linear_recurrence(q.double(), k.double(), v.double(), log_decay, final=True)
    assert {y.dtype, state.dtype} == {torch.float64}
    # under autocast float32 tensors are still summed, and differentiated, in float32
    leaf = q.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear_recurrence(leaf, k, v, log_decay)[0]
        inside = torch.autograd.grad(y.sum(), leaf)[0]
    expected = linear_recurrence(leaf, k, v, log_decay)[0]
    assert torch.equal(y, expected)
    assert torch.equal(inside, torch.autograd.grad(expected.sum(), leaf)[0])


def test_sums_in_half_precision_inputs_do_not_leave_the_range():
    ones = torch.ones(1, 1, 70_000, 1, dtype=torch.float16)
    y, state = linear_recurrence(ones, ones, ones, normalize=True, final=True)
    assert state[..., 0].item() == state[..., 1].item() == 70_000  # float16 ends at 65504
    assert (y == 1).all()


def test_frozen_inputs_and_expanded_keys():
    """Gradients only where asked for; keys shared by all heads (Mamba-2) as an expanded view."""
    q, k, v, log_decay = make("scalar", dtype=torch.float32)
    k1 = k[:, :1].clone().requires_grad_()
    y, _ = linear_recurrence(q, k1.expand_as(k), v, log_decay)
    grad = torch.autograd.grad(y.sum(), k1)[0]
    k2 = k[:, :1].repeat(1, 2, 1, 1).requires_grad_()
    expected = torch.autograd.grad(linear_recurrence(q, k2, v, log_decay)[0].sum(), k2)[0].sum(1, keepdim=True)
    assert_near([grad], [expected], 1e-6)
    assert not linear_recurrence(q, k, v, log_decay)[0].requires_grad


def test_second_derivatives_are_refused():
    q, k, v, _ = make("none")
    q.requires_grad_()
    grad = torch.autograd.grad(linear_recurrence(q, k, v)[0].square().sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_misfits_are_named():
    q, k, v, log_decay = make("scalar")
    for call, message in (
        (lambda: linear_recurrence(q[:, :1].expand(-1, 3, -1, -1), k, v), "3 query heads cannot share 2"),
        (lambda: linear_recurrence(q, k[..., :2], v), "key size"),
        (lambda: linear_recurrence(q[0], k, v), r"\(B, H, L, K\)"),
        (lambda: linear_recurrence(q, k, v, log_decay[:, :, :5]), "log_decay must be None"),
        (lambda: linear_recurrence(q, k, v, chunk=24), "power of two, got 24"),
        (lambda: linear_recurrence(q[:, :, :0], k[:, :, :0], v[:, :, :0]), "empty"),
        (lambda: linear_recurrence(q, k, v, normalize=True, initial=torch.zeros(2, 2, 4, 3)), "normaliser z"),
        (lambda: linear_recurrence(q, k, v, backend="trch"), "did you mean 'torch'"),
    ):
        with pytest.raises((ConfigError, KeyError), match=message):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_compiles_without_graph_breaks(kind):
    tensors, case = make(kind, L=5, R=2), make_case("mask, runs, state", L=5)

    def function(*tensors, **options):
        return linear_recurrence(*tensors, chunk=2, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = evaluate(function, tensors, case, torch.float64, normalize=True)
    assert_near(evaluate(compiled, tensors, case, torch.float64, normalize=True), expected, 1e-12)


def test_parity_with_mamba2_in_transformers():
    scan = pytest.importorskip("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan
    B, L, H, P, N = 2, 50, 4, 6, 5
    x, dt, A = torch.randn(B, L, H, P), torch.rand(B, L, H), -torch.rand(H)
    Bm, Cm, initial = torch.randn(B, L, 2, N), torch.randn(B, L, 2, N), torch.randn(B, H, P, N)
    expected, last = scan(x, dt, A, Bm, Cm, chunk_size=16, initial_states=initial, return_final_states=True)
    q, k = (t.repeat_interleave(2, 2).transpose(1, 2) for t in (Cm, Bm))
    v, log_decay = (x * dt[..., None]).transpose(1, 2), (A * dt).transpose(1, 2)
    y, state = linear_recurrence(q, k, v, log_decay, initial=initial.mT, final=True)
    assert_near([y.transpose(1, 2), state.mT], [expected, last], 1e-5)


def waves(*shape, phase=0.0):
    """Numbers that need no generator."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + phase).view(shape)


def fla_inputs():
    q, k, v = waves(1, 2, 9, 4), waves(1, 2, 9, 4, phase=1.0), waves(1, 2, 9, 3, phase=2.0)
    return q, k, v, waves(1, 2, 9, 4, phase=3.0) - 1.0


def ours_as_fla():
    """The last outputs of head 1 under the four settings, with fla's scale of K^-1/2."""
    q, k, v, g = fla_inputs()
    retention = torch.log1p(-(2.0 ** (-5.0 - torch.arange(2.0, dtype=torch.float64))))
    decays = {"gla": g, "simple_gla": g[..., 0], "retention": retention, "linear_attn": None}
    return {name: linear_recurrence(q, k, v, decay, scale=0.5)[0] for name, decay in decays.items()}


def theirs_by_fla():
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.retention.naive import naive_retention
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    q, k, v, g = (t.transpose(1, 2).float() for t in fla_inputs())  # (B, T, H, D) ...
    return {
        "gla": naive_recurrent_gla(q, k, v, g)[0].transpose(1, 2),
        "simple_gla": naive_recurrent_simple_gla(q, k, v, g[..., 0])[0].transpose(1, 2),
        "retention": naive_retention(*(t.float() for t in fla_inputs()[:3])),  # ... but (B, H, T, D) here
        "linear_attn": naive_recurrent_linear_attn(q, k, v)[0].transpose(1, 2),
    }


@pytest.mark.parametrize("name", FLA_VALUES)
def test_stored_values_of_flash_linear_attention(name):
    assert_near([ours_as_fla()[name][0, 1, -2:].flatten()], [torch.tensor(FLA_VALUES[name])], 1e-5)


def test_parity_with_flash_linear_attention():
    pytest.importorskip("fla.ops.gla.naive", reason="flash-linear-attention (fla-core, einops) is not installed")
    theirs, ours = theirs_by_fla(), ours_as_fla()
    assert_near([ours[n] for n in theirs], [theirs[n] for n in theirs], 1e-5)


if __name__ == "__main__":
    for name, y in theirs_by_fla().items():
        print(f'    "{name}": {[round(x, 6) for x in y[0, 1, -2:].flatten().tolist()]},')
