"""Closed-form calibration: the fits themselves, and the guards around them."""

from __future__ import annotations

import pytest
import torch
from conftest import motif_rows

from zoo.convert import calibration
from zoo.convert.calibration import calibrate, fit_candidates, output_features, relative_error, split_rows
from zoo.convert.layerwise import Trace, embed
from zoo.convert.surgery import replace_mixers
from zoo.convert.teachers import load_teacher
from zoo.errors import ConversionError

WINDOW = {"name": "sliding_window", "window": 4, "sinks": 1}


@torch.no_grad()
def held_out_kl(teacher, student, tokens):
    """KL on the rows that calibration holds out, from whole forward passes."""
    rows = tokens[split_rows(len(tokens))[1]]
    a, b = (m(rows).logits.double().log_softmax(-1) for m in (teacher, student))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.fixture
def setting(trained_llama):
    """Teacher model, tokens and their trace in float32."""
    tokens = motif_rows(12, 28, seed=5)
    return trained_llama.model, tokens, Trace(trained_llama.model, tokens, fast=False)


@pytest.mark.parametrize(
    "mixer", [WINDOW, "linear_attention", "retention", "gated_delta_net", "mamba2", "gated_linear_attention"]
)
def test_never_further_away_on_held_out_rows(setting, mixer):
    teacher, tokens, trace = setting
    student = replace_mixers(teacher, dict.fromkeys(range(3), mixer), trace.stats)
    before = held_out_kl(teacher, student, tokens)
    result = calibrate(student, trace, range(3))
    after = held_out_kl(teacher, student, tokens)
    assert result.distance_before == pytest.approx(before, rel=1e-3)
    assert result.distance_after == pytest.approx(after, rel=1e-3)
    assert after <= before * (1 + 1e-6)
    refits = [layer for layer in result.layers.values() if layer.kept != "none"]
    assert bool(refits) == (after < before)
    now = result.distance_before
    for layer in result.layers.values():  # every step starts where the one before ended, and comes closer or stays
        assert layer.distances.get("none", now) == pytest.approx(now, rel=1e-3)
        now = min(layer.distances.get(layer.kept, now), now)
    assert now == pytest.approx(result.distance_after, rel=1e-3)


@pytest.mark.parametrize("broken", [0, 2])
@pytest.mark.parametrize("candidates", [("scale",), ("plain",), ("weighted",), calibration.CANDIDATES])
def test_a_wrong_scale_is_repaired(setting, candidates, broken):
    """Heads multiplied by wrong numbers are exactly what every candidate can undo."""
    teacher, tokens, trace = setting
    student = replace_mixers(teacher, {0: "attention", 2: "attention"})
    with torch.no_grad():
        factors_E = torch.tensor([3.0, 0.3, -1.0, 2.0]).repeat_interleave(8)
        student.model.layers[broken].mixer.o_proj.weight.mul_(factors_E)
    before = held_out_kl(teacher, student, tokens)
    result = calibrate(student, trace, [0, 2], candidates=candidates)
    assert held_out_kl(teacher, student, tokens) < 0.2 * before
    layer = result.layers[broken]
    assert layer.kept in candidates
    assert layer.error_after < 0.1 * layer.error_before
    assert layer.distances[layer.kept] == min(layer.distances.values()) < layer.distances["none"]


def test_a_missing_bias_is_found(gpt2):
    teacher = load_teacher(gpt2).model
    with torch.no_grad():
        teacher.model.layers[1].mixer.o_proj.bias.normal_()
    tokens = torch.randint(0, 40, (8, 32))
    student = replace_mixers(teacher, {1: "attention"})
    with torch.no_grad():
        student.model.layers[1].mixer.o_proj.bias.zero_()
    before = held_out_kl(teacher, student, tokens)
    result = calibrate(student, Trace(teacher, tokens, fast=False), [1], candidates=("plain",))
    assert result.layers[1].kept == "plain"
    assert held_out_kl(teacher, student, tokens) < 0.05 * before


def test_a_perfect_student_is_left_alone(setting):
    teacher, _, trace = setting
    student = replace_mixers(teacher, dict.fromkeys(range(3), "attention"))
    result = calibrate(student, trace, range(3))
    assert [layer.kept for layer in result.layers.values()] == ["none"] * 3
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in student.state_dict().items())
    assert result.distance_after < 1e-6
    assert result.agreement == 1.0


def test_a_ruinous_candidate_is_not_taken(setting, monkeypatch):
    teacher, _, trace = setting
    student = replace_mixers(teacher, {2: WINDOW})

    def ruinous(mixer, *args):
        return {"plain": (torch.randn_like(mixer.o_proj.weight), None)}

    monkeypatch.setattr(calibration, "fit_candidates", ruinous)
    result = calibrate(student, trace, [2])
    assert result.layers[2].kept == "none"
    assert result.layers[2].distances["plain"] > result.layers[2].distances["none"]


def test_errors_are_on_the_students_own_inputs(setting):
    teacher, tokens, trace = setting
    student = replace_mixers(teacher, {0: WINDOW, 2: WINDOW})
    result = calibrate(student, trace, [0, 2], candidates=())
    inputs: dict[tuple[str, int], torch.Tensor] = {}
    for name, model in (("teacher", teacher), ("student", student)):
        for i in (0, 2):
            mixer = model.model.layers[i].mixer
            mixer.register_forward_hook(lambda m, a, out, key=(name, i): inputs.__setitem__(key, out[0]))
        with torch.no_grad():
            model(tokens)
        for i in (0, 2):
            model.model.layers[i].mixer._forward_hooks.clear()
    for i in (0, 2):
        expected = relative_error(inputs["student", i], inputs["teacher", i])
        assert result.layers[i].error_before == pytest.approx(expected, rel=1e-3)
        assert expected > 1e-3


@torch.no_grad()
def features(teacher, tokens):
    block = replace_mixers(teacher, {0: WINDOW}).model.layers[0]
    x_NLD = embed(teacher, tokens)
    e_NLE, y_NLD = output_features(block, x_NLD)
    return block.mixer, x_NLD, e_NLE, y_NLD


def test_plain_fit_is_ridge_regression_towards_the_old_weight(setting, monkeypatch):
    """Against torch's own least squares on the augmented system."""
    teacher, tokens, _ = setting
    mixer, x_NLD, e_NLE, y_NLD = features(teacher, tokens)
    fit, held = split_rows(len(tokens))
    wanted_DE = mixer.o_proj.weight.detach() + 0.3 * torch.randn(32, 32)
    target_NLD = e_NLE @ wanted_DE.T
    monkeypatch.setattr(calibration, "RIDGES", (0.1,))
    for name in ("plain", "weighted"):
        found = fit_candidates(mixer, e_NLE, y_NLD, target_NLD, x_NLD, fit, held, (name,))
        w = torch.ones(len(fit) * 28).double()
        if name == "weighted":
            w = 1 / x_NLD[fit].double().square().mean(-1).flatten()
            w = w / w.mean()
        e_TE = e_NLE[fit].flatten(0, 1).double() * w[:, None].sqrt()
        r_TD = (target_NLD - y_NLD)[fit].flatten(0, 1).double() * w[:, None].sqrt()
        unit = 0.1 * (e_TE.T @ e_TE).diagonal().mean()
        system = torch.cat([e_TE, unit.sqrt() * torch.eye(32).double()])
        solution = torch.linalg.lstsq(system, torch.cat([r_TD, torch.zeros(32, 32).double()])).solution
        expected = mixer.o_proj.weight.detach().double() + solution.T
        torch.testing.assert_close(found[name][0].double(), expected, rtol=1e-4, atol=1e-5)


def test_scale_fit_is_one_number_a_head(setting):
    teacher, tokens, _ = setting
    mixer, x_NLD, e_NLE, y_NLD = features(teacher, tokens)
    fit, held = split_rows(len(tokens))
    factors = torch.tensor([2.0, 0.5, 1.0, -1.0])
    target_NLD = e_NLE @ (mixer.o_proj.weight.detach() * factors.repeat_interleave(8)).T
    found = fit_candidates(mixer, e_NLE, y_NLD, target_NLD, x_NLD, fit, held, ("scale",))
    ratio = (found["scale"][0] / mixer.o_proj.weight.detach()).unflatten(-1, (4, 8))
    torch.testing.assert_close(ratio, ratio[:1, :, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)  # one number a head
    torch.testing.assert_close(ratio[0, :, 0], factors, rtol=0.1, atol=0.1)  # pulled a little towards 1


def test_a_mixer_with_more_behind_its_projection_is_left_alone(setting):
    teacher, _, trace = setting
    student = replace_mixers(teacher, {1: WINDOW})
    mixer = student.model.layers[1].mixer
    finish = mixer.finish
    mixer.finish = lambda y, x: finish(y, x) * 1.5
    result = calibrate(student, trace, [1])
    assert result.layers[1].kept == "none"
    assert result.layers[1].distances == {}
    assert result.layers[1].error_before > 0.01


def test_a_mixer_that_overflows_is_measured_and_left_alone(setting):
    teacher, _, trace = setting
    student = replace_mixers(teacher, {1: WINDOW})
    with torch.no_grad():
        student.model.layers[1].mixer.v_proj.weight.fill_(1e38)
    result = calibrate(student, trace, [1])
    assert result.layers[1].kept == "none"
    assert result.distance_after == float("inf")


def test_rows_are_split_and_too_few_refused():
    assert split_rows(4) == ([0, 1, 2], [3])
    assert split_rows(2) == ([0], [1])
    assert split_rows(16)[1] == [12, 13, 14, 15]
    with pytest.raises(ConversionError, match="at least 2 rows of tokens"):
        split_rows(1)
