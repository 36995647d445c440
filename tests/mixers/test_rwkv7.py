"""RWKV-7: against the authors' package and flash-linear-attention, its first values, initialisation, conversions."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import align, convert, corners, largest_error, parameters, relative_error, teacher
from rwkv_models import IDS, compare_with_authors, converted_from_attention, formula_model
from test_parity import file_of

import zoo
from zoo.errors import ConfigError
from zoo.mixers.rwkv7 import RWKV7, RWKV7Config
from zoo.ops.generalized_delta import generalized_delta_rule
from zoo.testing import check_mixer


def test_logits_are_those_of_the_authors_package(tmp_path, monkeypatch):
    compare_with_authors("rwkv7-tiny", 7, tmp_path, monkeypatch)


# Computed with the authors' package, rwkv 0.8.32, in float32 (see `rwkv_models`).
LOGITS = [0.64195, -1.22132, 0.5056, -1.22428, -0.29748, 1.32205]


@torch.no_grad()
def test_logits_are_the_recorded_ones():
    logits = formula_model("rwkv7-tiny")(IDS).logits
    assert largest_error(torch.tensor(corners(logits)), torch.tensor(LOGITS)) < 2e-5


def test_the_recurrence_and_its_gradients_are_flas():
    pytest.importorskip("einops", reason="fla's naive code needs einops")
    peer = file_of("fla/ops/generalized_delta_rule/dplr/naive.py")
    B, H, L, K, V = 2, 3, 29, 4, 5
    shapes = [(B, H, L, K), (B, H, L, K), (B, H, L, V), (B, H, L, K), (B, H, L, K), (B, H, L, K)]
    leaves = [torch.randn(s).requires_grad_() for s in shapes]

    q, k, v, c, rate, w = leaves
    c, log_decay = torch.nn.functional.normalize(c, dim=-1), -0.6065 * w.sigmoid()
    along = c * rate.sigmoid()
    y = generalized_delta_rule(q, k, v, c, along, log_decay, scale=K**-0.5)[0]
    expected = peer.dplr_recurrence(q, k, v, -c, along, log_decay)[0]
    assert largest_error(y, expected) < 1e-5
    weights = torch.randn_like(y)
    grads = [torch.autograd.grad((weights * out).sum(), leaves, retain_graph=True) for out in (y, expected)]
    for a, b in zip(*grads, strict=True):
        assert largest_error(a, b) < 1e-4


@torch.no_grad()
def test_later_layers_read_the_values_of_the_first():
    model = formula_model("rwkv7-tiny")
    expected = model(IDS).logits
    for block in model.model.layers:
        block.mixer.shares = False  # every layer takes itself for the first
    assert largest_error(model(IDS).logits, expected) > 1e-3
    for block in model.model.layers:
        block.mixer.shares = True
        block.mixer.residual_bias.fill_(-60.0)
        block.mixer.residual_proj.up.weight.zero_()
    silent = model(IDS).logits
    model.model.layers[0].mixer.residual_bias.fill_(3.0)
    assert torch.equal(model(IDS).logits, silent)  # in the first layer it says nothing
    model.model.layers[1].mixer.residual_bias.fill_(3.0)
    assert largest_error(model(IDS).logits, silent) > 1e-3


@pytest.mark.parametrize(
    "options", [{"value_head_dim": 6, "feature_map": "softmax", "rotary": {"theta": 100.0}, "decay_rank": 3}]
)
def test_laws_with_other_options(options):
    check_mixer("rwkv7", config=options, seed=1, laws=["split", "mask", "packing"])


# BlinkDL/RWKV-LM, README.md: 450,767,872 for 0.4B, "blocks.0.v0/v1/v2 is unused", that is the bottleneck of the first
# values in the first layer, which the files hold; the others by the same count (191 M, 1.53 B, 2.95 B in the paper).
PARAMETERS = {
    "rwkv7-191m": 191_034_624, "rwkv7-450m": 450_767_872, "rwkv7-1.5b": 1_527_404_544, "rwkv7-2.9b": 2_947_735_040,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_those_of_the_released_models(name):
    backbone, inner = parameters(name)
    config = zoo.registry.model_config(name)
    unused = config.hidden_size * (2 * config.layers[0]["mixer"]["value_rank"] + 1)
    assert 2 * backbone - inner - unused == PARAMETERS[name]  # the head is as large as the embedding


def test_initialisation_is_that_of_the_authors():
    layers = {"num_hidden_layers": 3, "defaults": {"num_heads": 2, "head_dim": 64}}
    model = zoo.create_model("rwkv7-tiny", hidden_size=128, layers=layers)
    first, last = model.model.layers[0].mixer, model.model.layers[2].mixer
    n, inside = torch.arange(128), torch.arange(128) % 64
    for row, power in zip(last.shift_MD, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
        torch.testing.assert_close(row, 1 - (n / 128) ** (power / 3))
    bend = (inside - 31.5) / 31.5
    bend, line = bend * bend.abs(), n / 127 - 0.5
    torch.testing.assert_close(first.decay_bias, -5.5 + 6 * (n / 127) + 2.5 * bend, atol=1e-5, rtol=0)
    torch.testing.assert_close(last.decay_bias, -5.5 + 6 * (n / 127) ** 2 + 2.5 * bend, atol=1e-5, rtol=0)
    torch.testing.assert_close(last.a_bias, -0.19 + 0.3 * bend + 0.4 * line, atol=1e-6, rtol=0)
    torch.testing.assert_close(last.residual_bias, 0.73 - 0.4 * line)
    torch.testing.assert_close(last.removal_GK.flatten(), 0.71 - 0.1 * line)
    assert (last.rate_share_GK == 1.02).all()
    assert (last.bonus_HK == -0.04).all()
    torch.testing.assert_close(first.norm.weight, torch.full((128,), (1 / 3) ** 0.7))
    for linear, gain in ((last.q_proj, 1.0), (last.k_proj, 0.1), (last.v_proj, 1.0)):
        torch.testing.assert_close(linear.weight @ linear.weight.T, gain**2 * torch.eye(128), atol=1e-5, rtol=0)
    assert not last.o_proj.weight.any()
    for low in (last.decay_proj, last.a_proj, last.residual_proj, last.g_proj):
        assert not low.down.weight.any()
        square = low.up.weight.T @ low.up.weight
        torch.testing.assert_close(square, 0.01 * torch.eye(len(square)), atol=1e-6, rtol=0)
    ffn = model.model.layers[1].ffn
    torch.testing.assert_close(ffn.shift_k, 1 - (n / 128) ** ((2 / 3) ** 4))
    torch.testing.assert_close(ffn.key.weight.T @ ffn.key.weight, torch.eye(128), atol=1e-5, rtol=0)
    assert not ffn.value.weight.any()


def test_bottlenecks_follow_the_authors_rule():
    mixer = RWKV7(RWKV7Config(num_heads=16, head_dim=64), 1024)
    ranks = [p.down.out_features for p in (mixer.decay_proj, mixer.a_proj, mixer.residual_proj, mixer.g_proj)]
    assert ranks == [64, 64, 64, 160]


def test_options_out_of_bounds_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'gate_rank'"):
        RWKV7Config.parse({"num_heads": 2, "head_dim": 4, "gate_rnk": 2})
    with pytest.raises(ConfigError, match="decay_rank: input should be greater"):
        RWKV7Config.parse({"num_heads": 2, "head_dim": 4, "decay_rank": 0})


# --- From attention -------------------------------------------------------------------------------------------------


def converted(**options):
    return converted_from_attention(RWKV7, **options)


@torch.no_grad()
def test_projections_decays_gates_and_gains_of_a_conversion():
    attention, student = converted()
    x_BLD = torch.randn(1, 5, 32)
    torch.testing.assert_close(student.q_proj(x_BLD), attention.q_proj(x_BLD))
    torch.testing.assert_close(student.k_proj.bias, attention.k_proj.bias)
    half_life = (math.log(2) / (math.exp(-0.5) * student.decay_bias.sigmoid())).view(4, 8)
    expected = torch.tensor([1.2, 3.0, 20.0, 60.0])[:, None].expand(4, 8)  # the least that a decay can be is 1.14
    torch.testing.assert_close(half_life, expected, rtol=1e-4, atol=0)
    for low in (student.decay_proj, student.a_proj):
        assert not low(x_BLD).any()
    rates = student.a_bias.sigmoid().view(4, 8)  # a quarter of what fades, or 0.02
    expected = torch.tensor([0.02, 0.02, (1 - 2 ** (-1 / 20)) / 4, (1 - 2 ** (-1 / 60)) / 4])
    torch.testing.assert_close(rates, expected[:, None].expand(4, 8), rtol=1e-4, atol=0)
    gate = student.g_proj(x_BLD)
    torch.testing.assert_close(gate, torch.ones_like(gate))
    gains = (student.o_proj.weight / attention.o_proj.weight)[0].view(4, 8)
    torch.testing.assert_close(gains, torch.tensor([0.5, 0.4, 0.3, 0.2])[:, None].expand(4, 8), rtol=1e-4, atol=0)
    assert not hasattr(student, "residual_proj")


@torch.no_grad()
def test_a_conversion_without_norm_and_removal_is_fading_linear_attention():
    attention, student = converted(norm=False, feature_map=None, scale=0.3)
    x_BLD = torch.randn(1, 12, 32)
    q, k, v = (getattr(attention, f"{n}_proj")(x_BLD).view(1, 12, 4, 8).transpose(1, 2) for n in "qkv")
    decay_H = 2 ** (-1 / torch.tensor([1.2, 3.0, 20.0, 60.0]))
    weights = (
        0.3 * q @ k.mT * decay_H[:, None, None] ** (torch.arange(12)[:, None] - torch.arange(12)).clamp(0)
    ).tril()
    expected = attention.o_proj((weights @ v).transpose(1, 2).flatten(-2))
    assert 1e-4 < largest_error(student(x_BLD)[0], expected) < 0.2  # little is removed at the start
    student.a_bias.fill_(-60.0)
    assert largest_error(student(x_BLD)[0], expected) < 1e-5


def test_a_conversion_starts_near_and_comes_nearer():
    attention = teacher(causal=True)
    student = convert(attention, "rwkv7")
    start = relative_error(student, attention)
    assert start < 0.8
    align(student, attention, steps=30)
    assert relative_error(student, attention) < 0.87 * start
