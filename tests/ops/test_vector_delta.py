"""The delta rule with a decay per channel: against the loop over time, other people's code, and where it could break.

`FLA_VALUES` were printed by this file run as a script with fla-core 0.6.0 and einops on the path:
    python tests/ops/test_vector_delta.py
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recurrent_cases import assert_near, evaluate, make_case

from zoo.errors import ConfigError
from zoo.ops import chunks
from zoo.ops.delta import delta_rule
from zoo.ops.reference import delta_rule_reference
from zoo.ops.vector_delta import vector_delta_rule

FLA_VALUES = [-0.219435, -0.344762, -0.307941, -0.057121, 0.220705, 0.39473]


def make(kind="mild", B=2, G=2, R=1, L=37, K=4, V=3):
    """q, k of length one, v, beta, log_decay in float64."""
    q, k, v = torch.randn(B, G * R, L, K).double(), torch.randn(B, G, L, K).double(), torch.randn(B, G, L, V).double()
    beta, u = torch.rand(B, G, L).double(), torch.rand(B, G, L, K).double()
    return q, F.normalize(k, dim=-1), v, beta, {"mild": -5 * u**4, "strong": -1e4 * u**8}[kind]


@pytest.mark.parametrize("case", ["plain", "state", "mask, runs, state"])
@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("kind", ["mild", "strong"])
def test_matches_the_reference_with_all_gradients(kind, R, case, monkeypatch):
    monkeypatch.setattr(chunks, "SPAN_SIZE", 2 * 2 * 4 * 4 * 3)  # spans of three chunks of four steps
    tensors, case = make(kind, R=R), make_case(case)
    expected = evaluate(delta_rule_reference, tensors, case, torch.float64, scale=0.5)
    assert_near(evaluate(vector_delta_rule, tensors, case, torch.float64, scale=0.5, chunk=4), expected, 1e-10)
    assert_near(evaluate(vector_delta_rule, tensors, case, torch.float32, scale=0.5, chunk=4), expected, 1e-5)
    assert_near(evaluate(vector_delta_rule, tensors, case, torch.float64, scale=0.5), expected, 1e-10)


@pytest.mark.parametrize("L", [1, 2, 5, 64, 65])
def test_every_length_and_chunk(L):
    tensors, case = make(L=L), make_case("state")
    expected = evaluate(delta_rule_reference, tensors, case, torch.float64)
    for chunk in (1, 16, None):
        assert_near(evaluate(vector_delta_rule, tensors, case, torch.float64, chunk=chunk), expected, 1e-10)


def test_equal_decays_in_all_channels_are_the_delta_rule():
    q, k, v, beta, log_decay = make()
    log_decay = log_decay[..., :1].expand_as(log_decay)
    case = make_case("mask, runs, state")
    expected = delta_rule(q, k, v, beta, log_decay[..., 0], final=True, **case)
    assert_near(vector_delta_rule(q, k, v, beta, log_decay, final=True, **case), expected, 1e-12)


@pytest.mark.parametrize("kind", ["mild", "strong"])
def test_any_split_with_the_state_carried_gives_the_same(kind):
    tensors = make(kind, R=2)
    whole = vector_delta_rule(*tensors, final=True, chunk=8)
    for cuts in ([0, 1, 37], [0, 8, 9, 10, 30, 37], list(range(38))):
        parts, state = [], None
        for start, stop in itertools.pairwise(cuts):
            y, state = vector_delta_rule(*(t[:, :, start:stop] for t in tensors), initial=state, final=True, chunk=8)
            parts.append(y)
        assert_near([torch.cat(parts, 2), state], whole, 1e-12)


def test_packed_runs_give_what_the_separate_sequences_give():
    lengths, tensors, initial = [5, 1, 20, 11], make(B=1), make_case("state", B=1)["initial"]
    segments_BL = torch.repeat_interleave(torch.tensor([4, 2, 4, 9]), torch.tensor(lengths))[None]
    packed, last = vector_delta_rule(*tensors, segments_BL=segments_BL, initial=initial, final=True, chunk=8)
    start = 0
    for i, length in enumerate(lengths):
        here = [t[:, :, start : start + length] for t in tensors]
        y, state = vector_delta_rule(*here, initial=initial if i == 0 else None, final=True)
        assert_near([packed[:, :, start : start + length]], [y], 1e-12)
        start += length
    assert_near([last], [state], 1e-12)


def test_padding_changes_nothing_even_if_it_is_poison():
    tensors, initial = make(B=1, L=20, R=2), make_case("state", B=1)["initial"]
    expected = vector_delta_rule(*tensors, initial=initial, final=True)
    real_L = torch.ones(33, dtype=torch.bool)
    real_L[:5], real_L[12:16], real_L[-4:] = False, False, False
    padded = []
    for t in tensors:
        padded.append(torch.full((*t.shape[:2], 33, *t.shape[3:]), math.nan, dtype=t.dtype))
        padded[-1][:, :, real_L] = t
    for segments_BL in (None, torch.where(real_L, 7, 0)[None]):  # a foreign id at masked positions is not a run
        y, state = vector_delta_rule(
            *padded, initial=initial, final=True, mask_BL=real_L[None], segments_BL=segments_BL, chunk=8
        )
        assert not y[:, :, ~real_L].any()
        assert_near([y[:, :, real_L], state], expected, 1e-12)


def test_gradients_match_finite_differences():
    tensors = [t.requires_grad_() for t in make(L=7, R=2, K=2, V=2)]
    initial = torch.rand(2, 2, 2, 2).double().requires_grad_()

    def function(initial, *tensors):
        return vector_delta_rule(*tensors, initial=initial, final=True, chunk=4)

    assert torch.autograd.gradcheck(function, (initial, *tensors), fast_mode=True)


@pytest.mark.parametrize("jump", [-20.0, -1e4, -math.inf])
def test_a_strong_decay_leaves_the_steps_behind_it_exact(jump):
    q, k, v, beta, log_decay = make(L=64)
    log_decay = log_decay * 1e-3
    log_decay[:, :, 9], log_decay[:, :, 40:, 1:] = jump, -20.0
    expected = evaluate(delta_rule_reference, (q, k, v, beta, log_decay), {}, torch.float64)
    actual = evaluate(vector_delta_rule, (q, k, v, beta, log_decay), {}, torch.float32)
    assert_near(actual, expected, 1e-5)
    if jump < -100:  # nothing of the first nine steps is left
        v[:, :, :9] += 1e3
        again, _ = vector_delta_rule(q.float(), k.float(), v.float(), beta.float(), log_decay.float())
        assert torch.equal(again[:, :, 9:], actual[0][:, :, 9:])


def test_one_channel_forgets_and_the_others_remember():
    q, k, v, beta, log_decay = (t.float() for t in make(L=48))
    log_decay = torch.zeros_like(log_decay)
    log_decay[..., 0] = -math.inf
    y, state = vector_delta_rule(q, k, v, beta, log_decay, final=True)
    last_BGV = state[:, :, 0]
    write_BGV = beta[:, :, -1, None] * (v[:, :, -1] - (k[:, :, -1, 1:, None] * state_before(q, k, v, beta)).sum(-2))
    torch.testing.assert_close(last_BGV, k[:, :, -1, :1] * write_BGV, rtol=1e-4, atol=1e-5)
    assert y.isfinite().all()


def state_before(q, k, v, beta):
    """The other channels' state before the last step, by the loop."""
    log_decay = torch.zeros_like(k)
    log_decay[..., 0] = -math.inf
    inputs = (t[:, :, :-1] for t in (q, k, v, beta, log_decay))
    return delta_rule_reference(*inputs, final=True)[1][:, :, 1:]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(half):
    tensors = [t.float() for t in make()]
    y, state = vector_delta_rule(*(t.to(half) for t in tensors), final=True)
    assert (y.dtype, state.dtype) == (half, torch.float32)
    leaf = tensors[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = vector_delta_rule(*tensors)[0]
        inside = torch.autograd.grad(y.sum(), leaf)[0]
    expected = vector_delta_rule(*tensors)[0]
    assert torch.equal(y, expected)
    assert torch.equal(inside, torch.autograd.grad(expected.sum(), leaf)[0])


def test_misfits_are_named():
    q, k, v, beta, log_decay = make()
    for call, message in (
        (lambda: vector_delta_rule(q, k, v, beta[:, :, :5], log_decay), "beta must be"),
        (lambda: vector_delta_rule(q, k, v, beta, log_decay[..., 0]), "log_decay must be"),
        (lambda: vector_delta_rule(q, k, v, beta, log_decay, initial=v), "initial state must be"),
        (lambda: vector_delta_rule(q, k, v, beta, log_decay, chunk=3), "power of two, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.parametrize("L", [64, 50])
@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="transformers would call fla's GPU kernels")
def test_parity_with_kimi_linear_in_transformers(L):
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    q, k, v, beta, log_decay = (t.float() for t in make(L=L))
    initial = torch.randn(2, 2, 4, 3)
    options = {"initial_state": initial, "output_final_state": True}
    theirs = [t.transpose(1, 2) for t in (q, k, v, log_decay, beta)]
    y, state = vector_delta_rule(q, k, v, beta, log_decay, scale=0.5, initial=initial, final=True)
    for function in (kimi.recurrent_kimi_delta_attention, kimi.chunk_kimi_delta_attention):
        expected, last = function(*theirs, **options)
        assert_near([y.transpose(1, 2), state], [expected, last], 1e-5)


def waves(*shape, phase=0.0):
    """Numbers that need no generator."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + phase).view(shape)


def fla_inputs():
    q, k, v = waves(1, 2, 9, 4), F.normalize(waves(1, 2, 9, 4, phase=1.0), dim=-1), waves(1, 2, 9, 3, phase=2.0)
    return q, k, v, waves(1, 2, 9, phase=3.0) / 2 + 0.5, waves(1, 2, 9, 4, phase=4.0) - 1.0


def theirs_by_fla():
    found = next((p for entry in sys.path if (p := Path(entry) / "fla/ops/kda/naive.py").is_file()), None)
    if found is None or importlib.util.find_spec("einops") is None:
        pytest.skip("fla/ops/kda/naive.py is not on the Python path: pip install --no-deps fla-core einops")
    spec = importlib.util.spec_from_file_location("fla_kda_naive", found)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    q, k, v, beta, g = (t.transpose(1, 2).float() for t in fla_inputs())
    return peer.naive_recurrent_kda(q, k, v, g, beta)[0].transpose(1, 2)


def test_stored_values_of_flash_linear_attention():
    y, _ = vector_delta_rule(*fla_inputs(), scale=0.5)
    assert_near([y[0, 1, -2:].flatten()], [torch.tensor(FLA_VALUES)], 2e-6)


def test_parity_with_flash_linear_attention():
    assert_near([vector_delta_rule(*fla_inputs(), scale=0.5)[0]], [theirs_by_fla()], 1e-6)


if __name__ == "__main__":
    print(f"FLA_VALUES = {[round(x, 6) for x in theirs_by_fla()[0, 1, -2:].flatten().tolist()]}")
