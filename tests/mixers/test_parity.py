"""Mixers against other people's implementations, from the same weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from zoo.convert.layouts.qwen3_next import delta_net_entries
from zoo.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from zoo.mixers.gated_linear_attention import GatedLinearAttention, GatedLinearAttentionConfig
from zoo.mixers.linear_attention import LinearAttention, LinearAttentionConfig
from zoo.mixers.mamba2 import Mamba2, Mamba2Config

L, D = 70, 32


def close(got, expected, tolerance=1e-5):
    assert ((got - expected).abs().max() / expected.abs().max()).item() < tolerance


def file_of(path: str) -> ModuleType:
    """A file of an installed package, without importing the package (flash-linear-attention needs a GPU for that)."""
    found = next((p for entry in sys.path if (p := Path(entry) / path).is_file()), None)
    if found is None:
        pytest.skip(f"{path} is not on the Python path: pip install --no-deps fla-core")
    spec = importlib.util.spec_from_file_location(path.replace("/", "_")[:-3], found)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def load(mixer, **weights):
    """Copy tensors into a mixer by name; every parameter must be named."""
    state = mixer.state_dict()
    assert weights.keys() == state.keys(), weights.keys() ^ state.keys()
    for name, weight in weights.items():
        state[name].copy_(weight)
    return mixer


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_transformers_mamba2(groups):
    from transformers import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    H, N, P = 8, 16, 8
    theirs = Mamba2Mixer(
        TheirConfig(
            hidden_size=D, num_heads=H, head_dim=P, state_size=N, n_groups=groups, expand=2, conv_kernel=4,
            num_hidden_layers=1, use_bias=True, chunk_size=16,
        ),
        0,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    z, x, B, C, dt = theirs.in_proj.weight.split([H * P, H * P, groups * N, groups * N, H])
    zb, xb, Bb, Cb, dtb = theirs.in_proj.bias.split([H * P, H * P, groups * N, groups * N, H])
    xc, Bc, Cc = theirs.conv1d.weight[:, 0].split([H * P, groups * N, groups * N])
    xcb, Bcb, Ccb = theirs.conv1d.bias.split([H * P, groups * N, groups * N])
    config = Mamba2Config(
        num_heads=H, head_dim=N, value_head_dim=P, num_groups=groups, qkv_bias=True, out_bias=True, gate_bias=True
    )
    ours = load(
        Mamba2(config, D),
        **{"q_proj.weight": C, "k_proj.weight": B, "v_proj.weight": x, "g_proj.weight": z, "dt_proj.weight": dt},
        **{"q_proj.bias": Cb, "k_proj.bias": Bb, "v_proj.bias": xb, "g_proj.bias": zb},
        **{"q_conv.weight": Cc, "k_conv.weight": Bc, "v_conv.weight": xc},
        **{"q_conv.bias": Ccb, "k_conv.bias": Bcb, "v_conv.bias": xcb},
        **{"A_log": theirs.A_log, "D": theirs.D, "dt_bias": theirs.dt_bias + dtb, "norm.weight": theirs.norm.weight},
        **{"o_proj.weight": theirs.out_proj.weight, "o_proj.bias": theirs.out_proj.bias},
    )
    x_BLD = torch.randn(2, L, D)
    with torch.no_grad():
        close(ours(x_BLD)[0], theirs(x_BLD))


def test_gated_delta_net_is_qwen3_next():
    if importlib.util.find_spec("fla") is not None:
        pytest.skip("with flash-linear-attention on the path transformers takes its GPU kernels")
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    G, H, K, V = 2, 4, 8, 12
    config = Qwen3NextConfig(
        hidden_size=D, linear_num_value_heads=H, linear_num_key_heads=G, linear_key_head_dim=K, linear_value_head_dim=V,
        linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, 0).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    options = GatedDeltaNetConfig(num_heads=H, num_groups=G, head_dim=K, value_head_dim=V)
    weights = theirs.state_dict()
    entries = [(e.ours, e.read([weights[name] for name in e.theirs])) for e in delta_net_entries(options, "", "")]
    ours = load(GatedDeltaNet(options, D), **{n: t for names, ts in entries for n, t in zip(names, ts, strict=True)})
    x_BLD = torch.randn(2, L, D)
    with torch.no_grad():
        close(ours(x_BLD)[0], theirs(x_BLD))


def test_gated_linear_attention_is_flas():
    peer = file_of("fla/ops/gla/naive.py")
    H, K, V = 4, 4, 8
    ours = GatedLinearAttention(GatedLinearAttentionConfig(num_heads=H, head_dim=K, value_head_dim=V), D)
    x_BLD = torch.randn(2, L, D)
    with torch.no_grad():
        ours.head_norm.weight.uniform_(0.5, 1.5)
        heads = lambda y: y.unflatten(-1, (H, -1))  # noqa: E731
        decay = heads(F.logsigmoid(ours.decay_up(ours.decay_down(x_BLD))) / 16)
        q, k, v = (heads(getattr(ours, f"{n}_proj")(x_BLD)) for n in "qkv")
        y, _ = peer.naive_recurrent_gla(q, k, v, decay)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.head_norm.weight
        close(ours(x_BLD)[0], ours.o_proj(y.flatten(-2) * F.silu(ours.g_proj(x_BLD))))


def test_delta_net_is_flas():
    peer = file_of("fla/ops/gated_delta_rule/naive.py")
    H, K = 4, 8
    config = GatedDeltaNetConfig(num_heads=H, head_dim=K, use_decay=False, conv=None, gate=False, head_norm=False)
    ours = GatedDeltaNet(config, D)
    x_BLD = torch.randn(2, L, D)
    with torch.no_grad():
        q, k, v = (getattr(ours, f"{n}_proj")(x_BLD).unflatten(-1, (H, K)) for n in "qkv")
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y, _ = peer.naive_recurrent_gated_delta_rule(q, k, v, ours.b_proj(x_BLD).sigmoid(), torch.zeros(2, L, H))
        close(ours(x_BLD)[0], ours.o_proj(y.flatten(-2)), 1e-4)


@pytest.mark.parametrize("name", ["elu", "relu", "softmax", "hedgehog"])
@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention_is_its_formula(name, causal):
    H, G, K = 4, 2, 8
    config = LinearAttentionConfig(num_heads=H, num_kv_heads=G, head_dim=K, feature_map=name, causal=causal)
    ours = LinearAttention(config, D).double()
    x_BLD = torch.randn(2, L, D, dtype=torch.double)

    def phi(x, weights):
        if name == "hedgehog":
            x = torch.einsum("bhlk,hjk->bhlj", x, weights)
            return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
        return {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "softmax": lambda x: x.softmax(-1)}[name](x)

    with torch.no_grad():
        maps = [torch.randn(n, K, K, dtype=torch.double) for n in (H, G)]
        if name == "hedgehog":
            ours.q_map.weight_HKK.copy_(maps[0])
            ours.k_map.weight_HKK.copy_(maps[1])
        q, k, v = (getattr(ours, f"{n}_proj")(x_BLD).unflatten(-1, (-1, K)).transpose(1, 2) for n in "qkv")
        k, v = phi(k, maps[1]).repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        weights = phi(q, maps[0]) @ k.mT
        weights = weights.tril() if causal else weights
        y = weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        close(ours(x_BLD)[0], ours.o_proj(y.transpose(1, 2).flatten(-2)), 1e-10)
