"""Where each mixer starts when it is made from a softmax-attention layer."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError, ConversionError
from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.base import AttentionStats
from zoo.mixers.windowed_linear import _can_be_branch
from zoo.ops.rotary import RotaryConfig
from zoo.registry import list_mixers, mixer_class

H, G, K, D, L = 4, 2, 8, 32, 90
BRANCHES = [name for name in list_mixers() if _can_be_branch(mixer_class(name))]
LOOKBACK = torch.tensor([1.0, 3.0, 20.0, 60.0])
HALF_LIFE_G = torch.tensor([2.0, 40.0])
STATS = AttentionStats(
    lookback_H=LOOKBACK, q_norm_H=torch.ones(H), k_norm_H=torch.ones(H), out_rms_H=torch.tensor([0.1, 0.4, 0.2, 0.3])
)


@pytest.fixture
def teacher():
    config = AttentionConfig(
        num_heads=H, num_kv_heads=G, head_dim=K, qkv_bias=True, qk_norm=True, rotary=RotaryConfig(theta=500.0)
    )
    attention = Attention(config, D).double()
    with torch.no_grad():
        for p in attention.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return attention


def convert(teacher, name, stats=STATS, **options):
    cls, weights = mixer_class(name), teacher.attention_weights()
    return cls.from_attention(cls.config_from_attention(weights, **options), weights, stats).double()


def relative_error(student, teacher):
    x_BLD = torch.randn(2, L, D, dtype=torch.double)
    with torch.no_grad():
        y, expected = student(x_BLD)[0], teacher(x_BLD)[0]
    assert y.isfinite().all()
    return ((y - expected).square().sum() / expected.square().sum()).sqrt().item()


def test_window_as_long_as_the_text_is_attention(teacher):
    assert relative_error(convert(teacher, "sliding_window", window=L, sinks=0), teacher) < 1e-6
    assert relative_error(convert(teacher, "sliding_window", window=L // 2, sinks=L), teacher) < 1e-6
    assert relative_error(convert(teacher, "sliding_window", window=8, sinks=2), teacher) > 1e-3


def test_attention_is_copied_exactly(teacher):
    assert relative_error(convert(teacher, "attention"), teacher) < 1e-6


@pytest.mark.parametrize("gate_bias", [True, False])
def test_attention_with_a_sigmoid_gate_starts_as_attention(teacher, gate_bias):
    options = {"gate": True, "gate_activation": "sigmoid", "gate_bias": gate_bias, "qk_norm_zero_centered": True}
    student = convert(teacher, "attention", **options)
    assert relative_error(student, teacher) < 1e-6
    with torch.no_grad():
        student.g_proj.weight.normal_()
    assert relative_error(student, teacher) > 0.1
    with pytest.raises(ConversionError, match="attention with gate: True cannot be converted"):
        student.attention_weights()


def test_a_zero_centered_norm_is_copied_as_what_it_multiplies_with(teacher):
    student = convert(teacher, "attention", qk_norm_zero_centered=True)
    torch.testing.assert_close(student.q_norm.weight, teacher.q_norm.weight - 1)
    assert relative_error(convert(student, "attention"), teacher) < 1e-6
    with pytest.raises(ConfigError, match="qk_norm_span must be 'head'"):
        convert(teacher, "attention", qk_norm_zero_centered=True, qk_norm_span="all")


@pytest.mark.parametrize("stats", [STATS, None], ids=["measured", "no statistics"])
@pytest.mark.parametrize("branch", BRANCHES)
def test_windowed_linear_starts_at_the_window(teacher, branch, stats):
    window = convert(teacher, "sliding_window", window=8, sinks=2)
    student = convert(teacher, "windowed_linear", stats, window=8, sinks=2, linear=branch)
    assert 1e-5 < relative_error(student, window) < 0.06
    student.ablate = "linear"
    assert relative_error(student, window) < 1e-6
    student.ablate = "window"
    assert relative_error(student, window) > 0.2


def test_a_gate_that_sees_the_token_starts_at_the_window_too(teacher):
    window = convert(teacher, "sliding_window", window=8, sinks=2)
    options = {"linear": "gated_delta_net", "mix_gate": "token", "branch_norm": False}
    student = convert(teacher, "windowed_linear", window=8, sinks=2, **options)
    start = relative_error(student, window)
    assert 1e-5 < start < 0.06
    with torch.no_grad():
        student.mix_proj.weight.normal_(std=0.5)  # now every token has gates of its own
    assert relative_error(student, window) > 2 * start


def test_ablating_the_window_leaves_the_linear_mixer(teacher):
    student = convert(teacher, "windowed_linear", linear="linear_attention", older_only=False)
    student.ablate = "window"
    assert relative_error(student, convert(teacher, "linear_attention")) < 1e-6


@pytest.mark.parametrize("branch", BRANCHES)
def test_branch_options_come_from_the_branch(teacher, branch):
    cls, weights = mixer_class("windowed_linear"), teacher.attention_weights()
    linear = cls.config_from_attention(weights, linear=branch).linear_options()
    alone = mixer_class(branch).config_from_attention(weights)
    shared = {"rotary", "conv", "gate", "gate_bias", "head_norm", "qk_norm", "qkv_bias", "norm_groups"}
    shared |= {"conv_bias", "qk_norm_eps", "num_kv_heads", "head_norm_affine"}
    for key in type(alone).model_fields.keys() - shared:
        assert getattr(linear, key) == getattr(alone, key), key
    again = cls.Config.parse(cls.config_from_attention(weights, linear={"name": branch}).plain())
    assert again == cls.config_from_attention(weights, linear=branch)


def test_branch_options_of_the_user_win(teacher):
    cls, weights = mixer_class("windowed_linear"), teacher.attention_weights()
    config = cls.config_from_attention(weights, linear={"name": "linear_attention", "feature_map": "elu"})
    assert config.linear_options().feature_map == "elu"
    assert config.older_only
    assert not cls.config_from_attention(weights, linear="gated_delta_net").older_only
    with pytest.raises(ConfigError, match="name the linear branch"):
        cls.config_from_attention(weights)


def test_branch_gain_is_the_scale_of_the_outputs(teacher):
    student = convert(teacher, "windowed_linear", linear="retention")
    torch.testing.assert_close(student.gain_H.float(), STATS.out_rms_H)


@pytest.mark.parametrize("stats", [STATS, None], ids=["measured", "no statistics"])
@pytest.mark.parametrize("name", BRANCHES)
def test_conversion_is_finite_and_in_scale(teacher, name, stats):
    """Untrained recurrent mixers are far from attention, but of its size."""
    student = convert(teacher, name, stats)
    assert relative_error(student, teacher) < 4
    torch.testing.assert_close(student.q_proj.weight, teacher.q_proj.weight, rtol=1e-6, atol=0)


def half_lives(name, student):
    """Half-life in tokens of each state, from the parameters, by the formula of the mixer's paper."""
    if name == "retention":
        decay = student.decay_logit_G.sigmoid()
    elif name == "gated_linear_attention":
        assert not student.decay_up.weight.any()
        bias = student.decay_up.bias.view(G, K)
        assert (bias == bias[:, :1]).all()
        decay = torch.sigmoid(bias[:, 0]) ** (1 / 16)
    else:
        projection = student.dt_proj if name == "mamba2" else student.a_proj
        assert not projection.weight.any()
        step = torch.nn.functional.softplus(student.dt_bias)
        torch.testing.assert_close(step, torch.ones_like(step))
        decay = torch.exp(-student.A_log.exp() * step)
    return -1 / torch.log2(decay)


@pytest.mark.parametrize("name", ["retention", "gated_linear_attention", "mamba2", "gated_delta_net"])
def test_half_life_is_the_measured_lookback(teacher, name):
    torch.testing.assert_close(half_lives(name, convert(teacher, name)).float(), HALF_LIFE_G, rtol=1e-4, atol=0)
    spread = half_lives(name, convert(teacher, name, None)).float()
    torch.testing.assert_close(spread, torch.tensor([8.0, 1024.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["retention", "gated_linear_attention", "mamba2", "gated_delta_net"])
def test_gates_start_open_and_gains_are_in_the_output_weights(teacher, name):
    student = convert(teacher, name)
    gate = torch.nn.functional.silu(student.g_proj(torch.randn(3, D, dtype=torch.double)))
    torch.testing.assert_close(gate, torch.ones_like(gate))
    gains = student.o_proj.weight / teacher.o_proj.weight
    torch.testing.assert_close(gains[0].float(), STATS.out_rms_H.repeat_interleave(K))


def test_other_parts_start_as_identities(teacher):
    assert not convert(teacher, "gated_delta_net").b_proj.weight.any()  # beta 1/2
    assert not convert(teacher, "mamba2").D.any()
    hedgehog = convert(teacher, "linear_attention")
    assert torch.equal(hedgehog.q_map.weight_HKK[2], torch.eye(K, dtype=torch.double))
    conv = convert(teacher, "gated_linear_attention", conv=4).q_conv.weight
    assert torch.equal(conv[0], torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.double))


def test_heads_that_do_not_fit_are_refused(teacher):
    cls, weights = mixer_class("retention"), teacher.attention_weights()
    config = cls.config_from_attention(weights, num_heads=2)
    with pytest.raises(ConversionError, match=r"2 heads of 8 .* cannot copy attention with 4 heads"):
        cls.from_attention(config, weights, STATS)


@pytest.mark.parametrize("name", BRANCHES)
def test_decoding_a_converted_mixer_keeps_grouped_states(teacher, name):
    """One state per key/value head, not per query head."""
    student = convert(teacher, name)
    assert student.init_state(3)["kv"].shape[:2] == (3, G)
