"""RWKV-6: against the authors' package and flash-linear-attention, its initialisation, its sizes, conversions."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import align, convert, corners, largest_error, parameters, relative_error, teacher
from rwkv_models import IDS, compare_with_authors, converted_from_attention, formula_model
from test_parity import file_of

import zoo
from zoo.errors import ConfigError
from zoo.mixers.rwkv6 import RWKV6, RWKV6Config
from zoo.ops.bonus import bonus_recurrence
from zoo.ops.rotary import RotaryConfig
from zoo.registry import list_models
from zoo.testing import check_mixer


def test_logits_are_those_of_the_authors_package(tmp_path, monkeypatch):
    compare_with_authors("rwkv6-tiny", 6, tmp_path, monkeypatch)


# Computed with the authors' package, rwkv 0.8.32, in float32 (see `rwkv_models`).
LOGITS = [0.91668, -1.71642, -0.33608, 0.41121, 0.71398, 1.21972]


@torch.no_grad()
def test_logits_are_the_recorded_ones():
    logits = formula_model("rwkv6-tiny")(IDS).logits
    assert largest_error(torch.tensor(corners(logits)), torch.tensor(LOGITS)) < 2e-5


def test_the_recurrence_and_its_gradients_are_flas():
    peer = file_of("fla/ops/rwkv6/recurrent_naive.py")
    B, H, L, K, V = 2, 3, 29, 6, 5
    shapes = [(B, H, L, K), (B, H, L, K), (B, H, L, V), (B, H, L, K), (H, K)]
    leaves = [torch.randn(s).requires_grad_() for s in shapes]
    r, k, v, w, u = leaves
    y, _ = bonus_recurrence(r, k, v, -w.exp(), u)
    expected, _ = peer.naive_recurrent_rwkv6(r, k, v, -w.exp(), u, scale=1.0)
    assert largest_error(y, expected) < 1e-5
    weights = torch.randn_like(y)
    grads = [torch.autograd.grad((weights * out).sum(), leaves) for out in (y, expected)]
    for a, b in zip(*grads, strict=True):
        assert largest_error(a, b) < 1e-4


@pytest.mark.parametrize(
    "options", [{"value_head_dim": 6, "feature_map": "softmax", "rotary": {"theta": 100.0}, "qk_norm": True}]
)
def test_laws_with_other_options(options):
    check_mixer("rwkv6", config=options, seed=1, laws=["split", "mask", "packing"])


# Peng et al. 2024 give 1.60 and 3.10 billion; the larger ones count what the released files hold: 13 D^2 + (912) D a
# layer at D = 4096, two matrices of the vocabulary, four vectors.
PARAMETERS = {
    "rwkv6-1.6b": 1_599_873_024, "rwkv6-3b": 3_099_863_040, "rwkv6-7.6b": 7_635_746_816, "rwkv6-14b": 14_069_088_256,
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in list_models("rwkv6-*") if not n.endswith("-tiny")])
def test_sizes_are_those_of_the_released_models(name):
    backbone, inner = parameters(name)
    assert 2 * backbone - inner == PARAMETERS[name]  # the head is as large as the embedding


def test_initialisation_is_that_of_the_authors():
    layers = {"num_hidden_layers": 3, "defaults": {"num_heads": 2, "head_dim": 64}}
    model = zoo.create_model("rwkv6-tiny", hidden_size=128, layers=layers)
    first, last = model.model.layers[0].mixer, model.model.layers[2].mixer
    n = torch.arange(128)
    torch.testing.assert_close(first.shift_x, 1 - n / 128)
    for row, power in zip(first.shift_MD, (1.0, 1.0, 1.0, 0.5, 0.5), strict=True):
        torch.testing.assert_close(row, 1 - (n / 128) ** power)
    torch.testing.assert_close(last.shift_MD[2], 1 - (n / 128) ** (1 / 3) - 0.3)  # of the values
    torch.testing.assert_close(first.decay_bias, -6 + 5 * (n / 127) ** 0.7)
    torch.testing.assert_close(last.decay_bias, -6 + 5 * (n / 127) ** 2.0)
    torch.testing.assert_close(last.bonus_GK.flatten(), 1 - n / 127 + 0.1 * ((n + 1) % 3 - 1))
    torch.testing.assert_close(last.norm.weight, torch.ones(128))
    torch.testing.assert_close(first.norm.weight, torch.full((128,), (1 / 3) ** 0.7))
    for mixer in (first, last):
        for linear, gain in ((mixer.q_proj, 1.0), (mixer.k_proj, 0.1), (mixer.v_proj, 1.0), (mixer.g_proj, 0.1)):
            square = linear.weight @ linear.weight.T
            torch.testing.assert_close(square, gain**2 * torch.eye(128), atol=1e-5, rtol=0)
        for zero in (mixer.o_proj.weight, mixer.shift_down.weight, mixer.decay_proj.down.weight):
            assert not zero.any()
        for small in (mixer.shift_up_MRD, mixer.decay_proj.up.weight):
            assert small.abs().max() <= 0.01
            assert small.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.05)
    ffn = model.model.layers[1].ffn
    torch.testing.assert_close(ffn.shift_k, 1 - (n / 128) ** ((2 / 3) ** 3))
    torch.testing.assert_close(ffn.key.weight.T @ ffn.key.weight, torch.eye(128), atol=1e-5, rtol=0)
    assert ffn.key.out_features == 448


def test_options_out_of_bounds_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'decay_rank'"):
        RWKV6Config.parse({"num_heads": 2, "head_dim": 4, "decay_rnk": 2})
    with pytest.raises(ConfigError, match="conv"):
        RWKV6Config.parse({"num_heads": 2, "head_dim": 4, "conv": 4})
    with pytest.raises(ConfigError, match="no recurrence to stand beside a window"):
        zoo.registry.parse_mixer(
            {"name": "windowed_linear", "num_heads": 2, "head_dim": 4, "linear": {"name": "rwkv6"}}
        )


# --- From attention -------------------------------------------------------------------------------------------------


def converted(**options):
    return converted_from_attention(RWKV6, **options)


@torch.no_grad()
def test_projections_decays_gates_and_gains_of_a_conversion():
    attention, student = converted()
    x_BLD = torch.randn(1, 5, 32)
    torch.testing.assert_close(student.q_proj(x_BLD), attention.q_proj(x_BLD))
    torch.testing.assert_close(student.k_proj.bias, attention.k_proj.bias)
    half_life = (math.log(2) / student.decay_bias.exp()).view(4, 8)
    expected = torch.tensor([1.0, 3.0, 20.0, 60.0])[:, None].expand(4, 8)
    torch.testing.assert_close(half_life, expected, rtol=1e-5, atol=0)
    assert not student.decay_proj(x_BLD).any()
    gate = torch.nn.functional.silu(student.g_proj(x_BLD))
    torch.testing.assert_close(gate, torch.ones_like(gate))
    gains = (student.o_proj.weight / attention.o_proj.weight)[0].view(4, 8)
    torch.testing.assert_close(gains, torch.tensor([0.5, 0.4, 0.3, 0.2])[:, None].expand(4, 8), rtol=1e-4, atol=0)


@torch.no_grad()
def test_a_conversion_without_norm_is_fading_linear_attention():
    """No shift, no gate and a bonus of one are left: a plain formula."""
    attention, student = converted(norm=False, feature_map=None, scale=0.3)
    x_BLD = torch.randn(1, 12, 32)
    q, k, v = (getattr(attention, f"{n}_proj")(x_BLD).view(1, 12, 4, 8).transpose(1, 2) for n in "qkv")
    decay_H = 2 ** (-1 / torch.tensor([1.0, 3.0, 20.0, 60.0]))
    distance = (torch.arange(12)[:, None] - torch.arange(12) - 1).clamp(min=0)  # the step before has not faded
    weights = (0.3 * q @ k.mT * decay_H[:, None, None] ** distance).tril()
    expected = attention.o_proj((weights @ v).transpose(1, 2).flatten(-2))
    assert largest_error(student(x_BLD)[0], expected) < 1e-5


def test_rotary_positions_and_grouped_heads_are_kept():
    weights = zoo.mixers.attention.Attention(
        zoo.mixers.attention.AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rotary=RotaryConfig()), 32
    ).attention_weights()
    config = RWKV6.config_from_attention(weights)
    assert (config.num_kv_heads, config.rotary) == (2, RotaryConfig())
    student = RWKV6.from_attention(config, weights)
    assert student.init_state(3)["kv"].shape == (3, 2, 8, 8)
    check_mixer("rwkv6", config=config, laws=["split"], width=32)


def test_a_conversion_starts_near_and_comes_nearer():
    attention = teacher(causal=True)
    student = convert(attention, "rwkv6")
    start = relative_error(student, attention)
    assert start < 0.8
    align(student, attention, steps=30)
    assert relative_error(student, attention) < 0.87 * start
