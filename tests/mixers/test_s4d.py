"""S4D: against the authors' minimal code, its initialisation, its two forms, its start from attention."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import align, convert, distance, fading_average, measured, relative_error, teacher, text_like

from zoo.errors import ConfigError, TraitError
from zoo.mixers.s4d import S4D, S4DConfig, initial_rates

# Computed in float64 with models/s4/s4d.py of github.com/state-spaces/s4 at commit e757cef, from `formula` alone.
OUTPUT = [0.8554811, 0.2129088, 0.2267644, 1.0260774, 0.0944008, 0.4309087, 0.7626029, 0.374989]
INPUT_GRADIENT = [-0.2400425, 1.1193568, 0.5550252, 0.1026913, 0.5090483, 2.4027411, -0.04775, -0.2079785]
STEP_GRADIENT = [33.335374, 0.061421, 0.190457, 7.216747]
RATE_GRADIENT = [3.225972, -0.319971, 0.577023]


def formula(shape, k):
    return (torch.arange(math.prod(shape)).double() * k + k).sin().view(shape)


@pytest.fixture
def by_formula():
    """A layer whose every weight is a formula."""
    D, N = 4, 6
    mixer = S4D(S4DConfig(state_dim=N), D).double()
    values = {
        "D": formula((D,), 0.7),
        "C": formula((D, N // 2, 2), 1.3),
        "log_dt": -3 + formula((D,), 2.1),
        "log_A_real": -0.7 + 0.3 * formula((D, N // 2), 0.9),
        "A_imag": 9 * formula((D, N // 2), 1.7),
        "out_proj.weight": formula((2 * D, D), 1.1),
        "out_proj.bias": formula((2 * D,), 0.4),
    }
    mixer.load_state_dict(values)
    return mixer


def test_is_the_code_of_the_authors(by_formula):
    x_BLD = formula((1, 50, 4), 0.37).requires_grad_()
    y_BLD, _ = by_formula(x_BLD)
    y_BLD.square().sum().backward()
    for got, wanted in (
        (y_BLD[0, -2:].flatten(), OUTPUT),
        (x_BLD.grad[0, :2].flatten(), INPUT_GRADIENT),
        (by_formula.log_dt.grad, STEP_GRADIENT),
        (by_formula.A_imag.grad[0], RATE_GRADIENT),
    ):
        torch.testing.assert_close(got.detach(), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_steps_are_those_of_the_differential_equation(by_formula, discretization):
    """Both discretisations approach h' = A h + x as dt goes to 0, and are what their names say."""
    mixer = S4D(S4DConfig(state_dim=6, discretization=discretization), 4).double()
    mixer.load_state_dict(by_formula.state_dict())
    log_z, taken = (t.detach() for t in mixer.discrete())
    A = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag).detach()
    dt = mixer.log_dt.exp()[:, None].detach()
    if discretization == "zoh":
        wanted, taken_wanted = (dt * A).exp(), ((dt * A).exp() - 1) / A
    else:
        wanted, taken_wanted = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    torch.testing.assert_close(log_z.exp(), wanted)
    torch.testing.assert_close(taken, taken_wanted)
    assert (log_z.real < 0).all()


def test_initial_rates_are_those_of_the_paper():
    """Equation 8 (inv), equation 9 (lin), and LegS, whose frequencies inv approaches."""
    assert torch.equal(initial_rates("lin", 8).imag, math.pi * torch.arange(4).double())
    torch.testing.assert_close(initial_rates("inv", 8).imag[0].item(), 8 / math.pi * 7)
    torch.testing.assert_close(initial_rates("inv", 8).imag[1].item(), 8 / math.pi * (8 / 3 - 1))
    legs = initial_rates("legs", 64)
    assert len(legs) == 32
    torch.testing.assert_close(legs.real, torch.full((32,), -0.5).double())
    torch.testing.assert_close(legs.imag.max(), initial_rates("inv", 64).imag.max(), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["lin", "inv", "legs"])
def test_initialisation_by_its_statistics(name):
    mixer = S4D(S4DConfig(state_dim=64, init=name), 256)
    assert torch.allclose(mixer.log_A_real.exp(), torch.tensor(0.5))
    assert torch.allclose(mixer.A_imag, initial_rates(name, 64).imag.float().expand(256, 32))
    assert abs(mixer.C.square().sum(-1).mean() - 1) < 0.05
    assert abs(mixer.D.std() - 1) < 0.15
    assert math.log(0.001) <= mixer.log_dt.min() < mixer.log_dt.max() <= math.log(0.1)
    assert abs(mixer.log_dt.mean() - math.log(0.01)) < 0.3


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="their number is even; 7 is not"):
        S4DConfig.parse({"state_dim": 7})
    with pytest.raises(ConfigError, match="init"):
        S4DConfig.parse({"init": "legt"})
    mixer = S4D(S4DConfig(state_dim=4, causal=False), 8)
    with pytest.raises(TraitError, match="two-sided"):
        mixer(torch.zeros(1, 3, 8), state=mixer.init_state(1))


# --- From attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_starts_as_a_fading_average_of_the_values(causal, glu):
    attention = teacher(causal=causal, kv_heads=2)
    student = convert(attention, "s4d", measured(5.0), glu=glu, discretization="zoh" if glu else "bilinear")
    x_BLD = torch.randn(2, 48, 32)
    assert distance(student(x_BLD)[0], fading_average(attention, x_BLD, 5.0)) < 0.05  # gelu is not quite linear


@pytest.mark.parametrize("causal", [True, False])
def test_alignment_improves_the_start(causal):
    attention = teacher(causal=causal, kv_heads=2)
    student = convert(attention, "s4d", measured(16.0))
    held_out = text_like(16)
    start = relative_error(student, attention, x_BLD=held_out)
    assert start < 0.8
    align(student, attention, steps=25, rate=2e-3, inputs=lambda: text_like(16))
    assert relative_error(student, attention, x_BLD=held_out) < 0.97 * start
