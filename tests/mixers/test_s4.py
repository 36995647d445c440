"""S4: initialisation, stability, its start from attention. Its kernel is held to others in tests/ops/test_dplr.py."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.errors import ConfigError
from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.base import AttentionStats
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
    got = torch.linalg.eigvals(mixer.model().transition()[1].detach())
    for values in (wanted, got):
        assert values.imag.abs().max() < 1e-3  # A is triangular: its eigenvalues are -1, -2, ...
    torch.testing.assert_close(got.real.sort().values, wanted.real.sort().values, rtol=1e-4, atol=1e-5)


def test_any_weights_are_stable():
    mixer = S4(S4Config(state_dim=8), 16).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p))
    assert torch.linalg.eigvals(mixer.model().transition()).abs().max() < 1


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="their number is even; 7 is not"):
        S4Config.parse({"state_dim": 7})
    with pytest.raises(ConfigError, match="unknown key"):
        S4Config.parse({"discretization": "zoh"})


# --- From attention ------------------------------------------------------------------------------------------------

H, G, K, D, L = 4, 2, 8, 32, 48


def teacher_of(causal=True):
    torch.manual_seed(1)
    config = AttentionConfig(num_heads=H, num_kv_heads=G, head_dim=K, qkv_bias=True, causal=causal)
    attention = Attention(config, D)
    with torch.no_grad():
        for p in attention.parameters():
            p.copy_(torch.randn_like(p) * D**-0.5)
    return attention


def converted(teacher, lookback, **options):
    ones = torch.ones(H)
    stats = AttentionStats(lookback_H=lookback * ones, q_norm_H=ones, k_norm_H=ones, out_rms_H=ones)
    weights = teacher.attention_weights()
    return S4.from_attention(S4.config_from_attention(weights, **options), weights, stats)


def relative(got, expected):
    return ((got - expected).square().sum() / expected.square().sum()).sqrt()


def text_like(rows):
    """Inputs whose neighbours resemble each other."""
    x_BLD = torch.randn(rows, L, D)
    for t in range(1, len(x_BLD[0])):
        x_BLD[:, t] = 0.9 * x_BLD[:, t - 1] + 0.19**0.5 * x_BLD[:, t]
    return x_BLD


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_starts_as_a_fading_average_of_the_values(causal, glu):
    teacher = teacher_of(causal)
    student = converted(teacher, 5.0, glu=glu)
    x_BLD = torch.randn(2, L, D)
    v_BLHK = teacher.v_proj(x_BLD).unflatten(-1, (G, K)).repeat_interleave(H // G, 2)
    age_LL = torch.arange(L)[:, None] - torch.arange(L)
    a = 2 ** (-1 / 5)
    weights_LL = torch.where(age_LL >= 0, (1 - a) * a ** age_LL.clamp(min=0), 0.0)
    if not causal:
        weights_LL = (weights_LL + torch.where(age_LL < 0, (1 - a) * a ** (-age_LL - 1).clamp(min=0), 0.0)) / 2
    v_LHK = torch.einsum("ts,bshk->bthk", weights_LL, v_BLHK - teacher.v_proj.bias.view(G, K).repeat_interleave(2, 0))
    v_LHK = v_LHK + teacher.v_proj.bias.view(G, K).repeat_interleave(2, 0)  # a constant is its own average
    got = student(x_BLD)[0]
    assert relative(got, teacher.o_proj(v_LHK.flatten(-2))) < 0.05  # gelu is not quite linear
    assert not torch.isnan(got).any()


@pytest.mark.parametrize("causal", [True, False])
def test_alignment_improves_the_start(causal):
    teacher = teacher_of(causal)
    student = converted(teacher, L / 3)
    held_out = text_like(16)
    with torch.no_grad():
        start = relative(student(held_out)[0], teacher(held_out)[0]).item()
    assert start < 0.8
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for _ in range(25):
        optimizer.zero_grad()
        x_BLD = text_like(16)
        relative(student(x_BLD)[0], teacher(x_BLD)[0].detach()).backward()
        optimizer.step()
    with torch.no_grad():
        assert relative(student(held_out)[0], teacher(held_out)[0]).item() < 0.97 * start
