"""The delta rule: against the loop over time, against other people's code, and where it could break.

`FLA_VALUES` were printed by this file run as a script with fla-core 0.6.0 and einops importable:
    python tests/ops/test_delta.py
"""

from __future__ import annotations

import itertools
import math
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from recurrent_cases import assert_near, evaluate, make_case

from zoo.errors import ConfigError
from zoo.ops import chunks
from zoo.ops.delta import delta_rule, unit_inverse
from zoo.ops.reference import delta_rule_reference

KINDS = ("none", "scalar", "strong")
FLA_VALUES = {
    "delta_rule": [0.046547, -0.298958, -0.503858, -0.506012, 0.000766, 0.507183],
    "gated_delta_rule": [-0.271107, -0.441895, -0.404853, -0.063268, 0.214185, 0.390904],
}


def make(kind: str, B=2, G=2, R=1, L=37, K=4, V=3):
    """q, k of length one, v, beta, log_decay in float64."""
    q, k, v = torch.randn(B, G * R, L, K).double(), torch.randn(B, G, L, K).double(), torch.randn(B, G, L, V).double()
    beta, u = torch.rand(B, G, L).double(), torch.rand(B, G, L).double()
    log_decay = {"none": None, "scalar": -5 * u**4, "strong": -1e4 * u**8}[kind]
    return q, F.normalize(k, dim=-1), v, beta, log_decay


@pytest.fixture
def _short_spans(monkeypatch):
    """Spans of three chunks of four steps, so that short sequences cross every kind of border."""
    monkeypatch.setattr(chunks, "SPAN_SIZE", 2 * 2 * 4 * 4 * 3)


@pytest.mark.usefixtures("_short_spans")
@pytest.mark.parametrize("case", ["plain", "state", "mask, runs, state"])
@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference_with_all_gradients(kind, R, case):
    tensors, case = make(kind, R=R), make_case(case)
    expected = evaluate(delta_rule_reference, tensors, case, torch.float64, scale=0.5)
    assert_near(evaluate(delta_rule, tensors, case, torch.float64, scale=0.5, chunk=4), expected, 1e-10)
    assert_near(evaluate(delta_rule, tensors, case, torch.float32, scale=0.5, chunk=4), expected, 1e-5)
    assert_near(evaluate(delta_rule, tensors, case, torch.float64, scale=0.5), expected, 1e-10)


@pytest.mark.parametrize("L", [1, 2, 5, 64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_every_length_and_chunk(kind, L):
    tensors, case = make(kind, L=L), make_case("state")
    expected = evaluate(delta_rule_reference, tensors, case, torch.float64)
    for chunk in (1, 16, None):
        assert_near(evaluate(delta_rule, tensors, case, torch.float64, chunk=chunk), expected, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_with_the_state_carried_gives_the_same(kind):
    tensors = make(kind, R=2)
    whole = delta_rule(*tensors, final=True, chunk=8)
    for cuts in ([0, 1, 37], [0, 8, 9, 10, 30, 37], list(range(38))):
        parts, state = [], None
        for start, stop in itertools.pairwise(cuts):
            here = [None if t is None else t[:, :, start:stop] for t in tensors]
            y, state = delta_rule(*here, initial=state, final=True, chunk=8)
            parts.append(y)
        assert_near([torch.cat(parts, 2), state], whole, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_runs_give_what_the_separate_sequences_give(kind):
    lengths, tensors, initial = [5, 1, 20, 11], make(kind, B=1), make_case("state", B=1)["initial"]
    segments_BL = torch.repeat_interleave(torch.tensor([4, 2, 4, 9]), torch.tensor(lengths))[None]
    packed, last = delta_rule(*tensors, segments_BL=segments_BL, initial=initial, final=True, chunk=8)
    start = 0
    for i, length in enumerate(lengths):
        here = [None if t is None else t[:, :, start : start + length] for t in tensors]
        y, state = delta_rule(*here, initial=initial if i == 0 else None, final=True)
        assert_near([packed[:, :, start : start + length]], [y], 1e-12)
        start += length
    assert_near([last], [state], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_even_if_it_is_poison(kind):
    tensors, case = make(kind, B=1, L=20, R=2), make_case("state", B=1)
    expected = evaluate(delta_rule, tensors, case, torch.float64, chunk=8)
    real_L = torch.ones(33, dtype=torch.bool)
    real_L[:5], real_L[12:16], real_L[-4:] = False, False, False
    padded = []
    for t in tensors:
        if t is not None:
            wide = torch.full((*t.shape[:2], 33, *t.shape[3:]), math.nan, dtype=t.dtype)
            wide[:, :, real_L] = t
            t = wide
        padded.append(t)
    for segments_BL in (None, torch.where(real_L, 7, 0)[None]):  # a foreign id at masked positions is not a run
        masked = case | {"mask_BL": real_L[None], "segments_BL": segments_BL}
        assert_near(evaluate(delta_rule, padded, masked, torch.float64, real_L, chunk=8), expected, 1e-10)


@pytest.mark.parametrize("kind", ["none", "scalar"])
def test_gradients_match_finite_differences(kind):
    tensors = [t.requires_grad_() for t in make(kind, L=7, R=2, K=2, V=2) if t is not None]
    initial = torch.rand(2, 2, 2, 2).double().requires_grad_()

    def function(initial, *tensors):
        return delta_rule(*tensors, initial=initial, final=True, chunk=4)

    assert torch.autograd.gradcheck(function, (initial, *tensors), fast_mode=True)


@pytest.mark.parametrize("jump", [-20.0, -1e4, -math.inf])
def test_a_strong_decay_leaves_the_steps_behind_it_exact(jump):
    q, k, v, beta, log_decay = make("scalar", L=64)
    log_decay = log_decay * 1e-3
    log_decay[:, :, 9], log_decay[:, :, 40:] = jump, -20.0
    expected = evaluate(delta_rule_reference, (q, k, v, beta, log_decay), {}, torch.float64)
    actual = evaluate(delta_rule, (q, k, v, beta, log_decay), {}, torch.float32)
    assert_near(actual, expected, 5e-6)
    if jump < -100:  # nothing of the first nine steps is left
        v[:, :, :9] += 1e3
        again, _ = delta_rule(q.float(), k.float(), v.float(), beta.float(), log_decay.float())
        assert torch.equal(again[:, :, 9:], actual[0][:, :, 9:])


def test_equal_keys_and_full_betas_stay_exact():
    """The worst case of the triangular system: every step overwrites the one answer; beta 0 and 2 are allowed."""
    q, _, v, beta, _ = make("none", L=128)
    k = F.normalize(torch.ones_like(q), dim=-1)
    for value in (0.0, 1.0, 2.0):
        tensors = (q, k, v, torch.full_like(beta, value), None)
        expected = evaluate(delta_rule_reference, tensors, {}, torch.float64)
        assert_near(evaluate(delta_rule, tensors, {}, torch.float32, chunk=64), expected, 1e-4 if value == 2 else 1e-5)


def test_the_inverse_of_a_unit_triangular_matrix():
    for C in (1, 2, 32):
        A = torch.randn(3, 2, C, C).double().tril(-1)
        eye = torch.eye(C).double().expand_as(A)
        assert_near([unit_inverse(A) @ (eye + A)], [eye], 1e-9)


def plain(q, k, v, beta, log_decay=None):
    """The whole sequence as one chunk in the dtype of q, the system solved in float32: a plain evaluation."""
    R, low = q.shape[1] // k.shape[1], q.dtype
    k, v, beta = (t.repeat_interleave(R, 1) for t in (k, v, beta))
    pair = torch.ones_like(q @ k.mT)
    if log_decay is not None:
        total = log_decay.repeat_interleave(R, 1).cumsum(-1)
        pair = (total[..., :, None] - total[..., None, :]).clamp(max=0).exp().to(low)
    system = torch.eye(q.shape[2]) + ((k @ k.mT) * pair).tril(-1).float() * beta.float()[..., None]
    inverse = torch.linalg.solve_triangular(system, torch.eye(q.shape[2]), upper=False, unitriangular=True)
    written = inverse.to(low) @ (beta.to(low)[..., None] * v)
    return ((q @ k.mT) * pair).tril() @ written


@pytest.mark.parametrize("kind", ["none", "scalar"])
def test_bfloat16_errs_at_most_twice_as_much_as_plain_torch(kind):
    q, k, v, beta, log_decay = make(kind, L=160, K=16, V=16, R=2)
    dy = torch.randn(q.shape).bfloat16()
    given = [t.bfloat16() for t in (q, k, v)] + [t.float() for t in (beta, log_decay) if t is not None]

    def run(function, *dtypes):
        leaves = [t.to(dtypes[i > 2]).requires_grad_() for i, t in enumerate(given)]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    exact = run(lambda *t: delta_rule_reference(*t)[0], torch.float64, torch.float64)
    ours = run(lambda *t: delta_rule(*t)[0], torch.bfloat16, torch.float32)
    theirs = run(plain, torch.bfloat16, torch.float32)
    for i, (o, p, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert o.dtype == p.dtype
        assert (o - e).norm() <= 2 * (p - e).norm(), f"output {i}: {(o - e).norm():.3e} against {(p - e).norm():.3e}"


def test_dtypes_and_autocast():
    tensors = [None if t is None else t.float() for t in make("scalar")]
    for half in (torch.bfloat16, torch.float16):
        y, state = delta_rule(*(t.to(half) for t in tensors), final=True)
        assert (y.dtype, state.dtype) == (half, torch.float32)
    leaf = tensors[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = delta_rule(*tensors)[0]
        inside = torch.autograd.grad(y.sum(), leaf)[0]
    expected = delta_rule(*tensors)[0]
    assert torch.equal(y, expected)
    assert torch.equal(inside, torch.autograd.grad(expected.sum(), leaf)[0])


def test_misfits_are_named():
    q, k, v, beta, _ = make("none")
    for call, message in (
        (lambda: delta_rule(q, k, v, beta[:, :, :5]), "beta must be"),
        (lambda: delta_rule(q, k, v, beta, beta[..., None]), "log_decay must be"),
        (lambda: delta_rule(q, k[..., :2], v, beta), "key size"),
        (lambda: delta_rule(q, k, v, beta, chunk=3), "power of two, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    tensors, case = make("scalar", L=3, R=2), make_case("mask, runs, state", L=3)
    case["initial"] = make_case("state")["initial"]

    def function(*tensors, **options):
        return delta_rule(*tensors, chunk=2, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = evaluate(function, tensors, case, torch.float64)
    assert_near(evaluate(compiled, tensors, case, torch.float64), expected, 1e-12)


@pytest.mark.parametrize("L", [64, 50])
@pytest.mark.skipif(
    find_spec("fla") is not None, reason="with fla installed, transformers calls its GPU kernels instead"
)
def test_parity_with_qwen3_next_in_transformers(L):
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, beta, log_decay = (t.float() for t in make("scalar", L=L))
    initial = torch.randn(2, 2, 4, 3)
    expected, last = qwen.torch_chunk_gated_delta_rule(
        *(t.transpose(1, 2) for t in (q, k, v, log_decay, beta)),
        chunk_size=16, initial_state=initial, output_final_state=True,
    )  # fmt: skip
    y, state = delta_rule(q, k, v, beta, log_decay, scale=0.5, initial=initial, final=True)
    assert_near([y.transpose(1, 2), state], [expected, last], 1e-5)


def waves(*shape, phase=0.0):
    """Numbers that need no generator."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + phase).view(shape)


def fla_inputs():
    q, k, v = waves(1, 2, 9, 4), F.normalize(waves(1, 2, 9, 4, phase=1.0), dim=-1), waves(1, 2, 9, 3, phase=2.0)
    return q, k, v, waves(1, 2, 9, phase=3.0) / 2 + 0.5, waves(1, 2, 9, phase=4.0) - 1.0


def ours_as_fla():
    q, k, v, beta, g = fla_inputs()
    return {
        "delta_rule": delta_rule(q, k, v, beta, scale=0.5)[0],
        "gated_delta_rule": delta_rule(q, k, v, beta, g, scale=0.5)[0],
    }


def theirs_by_fla():
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    q, k, v, beta, g = (t.float() for t in fla_inputs())
    delta = delta_rule_recurrence(q, k, v, beta)[0]  # (B, H, T, D) here, (B, T, H, D) there
    gated = naive_recurrent_gated_delta_rule(*(t.transpose(1, 2) for t in (q, k, v, beta, g)))[0]
    return {"delta_rule": delta, "gated_delta_rule": gated.transpose(1, 2)}


@pytest.mark.parametrize("name", FLA_VALUES)
def test_stored_values_of_flash_linear_attention(name):
    assert_near([ours_as_fla()[name][0, 1, -2:].flatten()], [torch.tensor(FLA_VALUES[name])], 1e-5)


def test_parity_with_flash_linear_attention():
    pytest.importorskip("fla.ops.delta_rule.naive", reason="flash-linear-attention (fla-core, einops) is not installed")
    theirs, ours = theirs_by_fla(), ours_as_fla()
    assert_near([ours[n] for n in theirs], [theirs[n] for n in theirs], 1e-5)


if __name__ == "__main__":
    for name, y in theirs_by_fla().items():
        print(f'    "{name}": {[round(x, 6) for x in y[0, 1, -2:].flatten().tolist()]},')
