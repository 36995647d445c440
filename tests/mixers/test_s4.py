"""S4: initialisation, stability, its start from attention. Its kernel is held to others in tests/ops/test_dplr.py."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import align, convert, distance, fading_average, measured, relative_error, teacher, text_like

from zoo.errors import ConfigError
from zoo.mixers.s4 import S4, S4Config
from zoo.ops.state_space import hippo_legs, legs_normal


def test_initialisation_is_hippo_legs():
    mixer = S4(S4Config(state_dim=32), 256).double()
    w, p, b = legs_normal(32)
    model = mixer.model()
    for got, wanted in ((model.w_EN, w), (model.p_EN, p), (model.b_EN, b)):
        torch.testing.assert_close(got[7], wanted, rtol=1e-5, atol=1e-5)
    assert abs(mixer.C.square().sum(-1).mean() - 1) < 0.05
    assert abs(mixer.D.std() - 1) < 0.15
    assert math.log(0.001) <= mixer.log_dt.min() < mixer.log_dt.max() <= math.log(0.1)
    assert abs(mixer.log_dt.mean() - math.log(0.01)) < 0.3


def test_transition_has_the_eigenvalues_of_discretised_hippo():
    mixer = S4(S4Config(state_dim=8), 2).double()
    A, eye = hippo_legs(8)[0], torch.eye(8)
    dt = mixer.log_dt[1].exp().detach()
    wanted = torch.linalg.eigvals(torch.linalg.inv(eye - dt / 2 * A) @ (eye + dt / 2 * A))
    got = torch.linalg.eigvals(torch.eye(mixer.config.state_dim) + mixer.model().change()[1].detach())
    for values in (wanted, got):
        assert values.imag.abs().max() < 1e-3  # A is triangular: its eigenvalues are -1, -2, ...
    torch.testing.assert_close(got.real.sort().values, wanted.real.sort().values, rtol=1e-4, atol=1e-5)


def test_any_weights_are_stable():
    mixer = S4(S4Config(state_dim=8), 16).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p))
    assert torch.linalg.eigvals(torch.eye(mixer.config.state_dim) + mixer.model().change()).abs().max() < 1


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="their number is even; 7 is not"):
        S4Config.parse({"state_dim": 7})
    with pytest.raises(ConfigError, match="unknown key"):
        S4Config.parse({"discretization": "zoh"})


# --- From attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_starts_as_a_fading_average_of_the_values(causal, glu):
    attention = teacher(causal=causal, kv_heads=2)
    student = convert(attention, "s4", measured(5.0), glu=glu)
    x_BLD = torch.randn(2, 48, 32)
    assert distance(student(x_BLD)[0], fading_average(attention, x_BLD, 5.0)) < 0.05  # gelu is not quite linear


@pytest.mark.parametrize("causal", [True, False])
def test_alignment_improves_the_start(causal):
    attention = teacher(causal=causal, kv_heads=2)
    student = convert(attention, "s4", measured(16.0))
    held_out = text_like(16)
    start = relative_error(student, attention, x_BLD=held_out)
    assert start < 0.8
    align(student, attention, steps=25, rate=2e-3, inputs=lambda: text_like(16))
    assert relative_error(student, attention, x_BLD=held_out) < 0.97 * start
