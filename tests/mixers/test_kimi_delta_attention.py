"""Kimi Delta Attention: against transformers' Kimi Linear, its initialisation, where a conversion starts."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from formulas import align, shaken

import zoo
from zoo.errors import ConfigError
from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.base import AttentionStats
from zoo.mixers.kimi_delta_attention import KimiDeltaAttention, KimiDeltaAttentionConfig
from zoo.mixers.mla import MLAConfig, MultiHeadLatentAttention
from zoo.testing import check_mixer

B, L, D, H, K = 2, 70, 32, 4, 8
WITHOUT_FLA = pytest.mark.skipif(
    importlib.util.find_spec("fla") is not None, reason="transformers would call fla's GPU kernels"
)


def their_config(hidden=D, heads=H, size=K):
    from transformers import KimiLinearConfig

    config = KimiLinearConfig(
        hidden_size=hidden, linear_num_heads=heads, linear_head_dim=size, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "dense"],
        num_attention_heads=heads, num_key_value_heads=heads, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4,
        v_head_dim=7,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


def peers():
    """Their layer with random weights, and ours with the same."""
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    theirs = KimiLinearDeltaAttention(their_config(), 0)
    with torch.no_grad():
        theirs.forget_gate.A_log.uniform_(-1, 1)
        theirs.forget_gate.dt_bias.uniform_(-2, 1)
    weights = shaken(theirs, 0.2).state_dict()
    q, k, v = weights["conv1d.weight"][:, 0].chunk(3)
    ours = KimiDeltaAttention(KimiDeltaAttentionConfig(num_heads=H, head_dim=K), D)
    ours.load_state_dict({
        **{f"{n}_proj.weight": weights[f"{n}_proj.weight"] for n in "qkvbo"},
        "q_conv.weight": q, "k_conv.weight": k, "v_conv.weight": v,
        "a_proj.down.weight": weights["forget_gate.f_a_proj.weight"],
        "a_proj.up.weight": weights["forget_gate.f_b_proj.weight"],
        "A_log": weights["forget_gate.A_log"].flatten(), "dt_bias": weights["forget_gate.dt_bias"],
        "g_proj.down.weight": weights["g_a_proj.weight"], "g_proj.up.weight": weights["g_b_proj.weight"],
        "head_norm.weight": weights["o_norm.weight"],
    })  # fmt: skip
    return theirs.eval(), ours


@WITHOUT_FLA
def test_parity_with_kimi_linear():
    theirs, ours = peers()
    x_BLD, weights = torch.randn(B, L, D), torch.randn(B, L, D)
    expected, y = theirs(x_BLD), ours(x_BLD)[0]
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    pairs = {
        "q_proj.weight": "q_proj.weight", "A_log": "forget_gate.A_log", "dt_bias": "forget_gate.dt_bias",
        "a_proj.down.weight": "forget_gate.f_a_proj.weight", "g_proj.up.weight": "g_b_proj.weight",
        "b_proj.weight": "b_proj.weight", "o_proj.weight": "o_proj.weight",
    }  # fmt: skip
    our_grads = torch.autograd.grad((y * weights).sum(), [ours.get_parameter(n) for n in pairs])
    their_grads = torch.autograd.grad((expected * weights).sum(), [theirs.get_parameter(n) for n in pairs.values()])
    for name, a, b in zip(pairs, our_grads, their_grads, strict=True):
        assert (a.flatten() - b.flatten()).abs().max() <= 1e-4 * b.abs().max(), name


def test_the_latent_layers_of_kimi_linear_are_mla_without_positions():
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention

    theirs = shaken(KimiLinearAttention(their_config(), 1), 0.2)
    config = MLAConfig(num_heads=H, kv_rank=10, nope_dim=6, rope_dim=4, value_head_dim=7)
    ours, weights = MultiHeadLatentAttention(config, D), theirs.state_dict()
    ours.load_state_dict({
        "q_proj.weight": weights["q_proj.weight"], "kv_down.weight": weights["kv_a_proj_with_mqa.weight"],
        "kv_norm.weight": weights["kv_a_layernorm.weight"], "kv_up.weight": weights["kv_b_proj.weight"],
        "o_proj.weight": weights["o_proj.weight"],
    })  # fmt: skip
    x_BLD = torch.randn(B, L, D)
    with torch.no_grad():
        expected = theirs(x_BLD, torch.full((L, L), -torch.inf).triu(1)[None, None])[0]
        assert (ours(x_BLD)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_parameters_of_the_published_layer():
    """At the sizes of Kimi-Linear-48B-A3B."""
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    with torch.device("meta"):
        theirs = KimiLinearDeltaAttention(their_config(2304, 32, 128), 0)
        ours = KimiDeltaAttention(KimiDeltaAttentionConfig(num_heads=32, head_dim=128), 2304)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_tiny_model_is_three_to_one():
    model = zoo.create_model("kimi-linear-tiny")
    assert model.config.mixer_names == ["kimi_delta_attention"] * 3 + ["mla"]
    assert all(layer["mixer"]["rotary"] is None for layer in model.config.layers)


@pytest.mark.parametrize(
    "options", [{"num_kv_heads": 1, "value_head_dim": 6, "decay_rank": 3, "gate_rank": 5, "gate_bias": True}]
)
def test_laws_with_other_options(options):
    check_mixer("kimi_delta_attention", config=options, seed=1)


def test_initial_decays_are_those_of_the_paper():
    mixer = KimiDeltaAttention(KimiDeltaAttentionConfig(num_heads=64, head_dim=64), 64)
    rates, steps = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert rates.min() >= 1
    assert rates.max() <= 16
    assert rates.mean().item() == pytest.approx(8.5, abs=1.7)  # four deviations of the mean of 64
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.09)  # log-uniform: the middle is 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [({"decay_rank": 0}, "decay_rank: input should be greater"), ({"gate_rnk": 2}, "did you mean 'gate_rank'")],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        KimiDeltaAttentionConfig.parse({"num_heads": 2, "head_dim": 4, **options})


# --- From attention ------------------------------------------------------------------------------------------------


def converted(**options):
    teacher = shaken(Attention(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), D), 0.2)
    stats = AttentionStats(
        lookback_H=torch.tensor([1.0, 3.0, 20.0, 60.0]), q_norm_H=torch.ones(4), k_norm_H=torch.ones(4),
        out_rms_H=torch.tensor([0.5, 0.4, 0.3, 0.2]),
    )  # fmt: skip
    weights = teacher.attention_weights()
    cls = KimiDeltaAttention
    return teacher, cls.from_attention(cls.config_from_attention(weights, **options), weights, stats)


def test_half_lives_gates_and_gains_of_a_conversion():
    teacher, student = converted()
    x_BLD = torch.randn(1, 3, D)
    step = torch.nn.functional.softplus(student.a_proj(x_BLD) + student.dt_bias).unflatten(-1, (2, 8))
    half_life = math.log(2) / (student.A_log.exp()[:, None] * step)
    torch.testing.assert_close(half_life, torch.tensor([2.0, 40.0])[:, None].expand_as(half_life), rtol=1e-4, atol=0)
    assert not student.b_proj.weight.any()
    assert not student.g_proj(x_BLD).any()
    gains = (student.o_proj.weight / teacher.o_proj.weight)[0].view(4, 8)
    torch.testing.assert_close(gains, torch.tensor([1.0, 0.8, 0.6, 0.4])[:, None].expand(4, 8), rtol=1e-4, atol=0)
    ungated = converted(gate=False)[1]
    assert not hasattr(ungated, "g_proj")


def test_a_few_steps_of_alignment_bring_it_closer():
    teacher, student = converted()
    x_BLD = torch.randn(4, 48, D)
    errors = [e**2 for e in align(student, teacher, steps=31, inputs=lambda: x_BLD)]
    assert errors[0] < 3
    assert errors[-1] < 0.6 * errors[0]
