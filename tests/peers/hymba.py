"""Hymba, evaluated token by token from tensors under the names of nvidia/Hymba-1.5B-Base, whose code needs CUDA.

Written down from that code (`modeling_hymba.py`): one fused projection a layer (queries, keys, values, Mamba's input
and gate), loops over time. Its config has the options of `configuration_hymba.py`.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from peers import Peer, peer, tokens

V, D, H, G, K, N, R, M, FF, W = 61, 24, 4, 2, 6, 3, 2, 3, 20, 5
E = 2 * D  # channels of Mamba, and H heads of values
WINDOWS, BACK = [None, W, W, W, None], [None, None, 1, 2, None]
DOUBLE = {"dtype": torch.double}


def theirs() -> dict[str, torch.Tensor]:
    """Random tensors under the names of the released checkpoints."""
    generator, out = torch.Generator().manual_seed(0), {}

    def add(name: str, *shape: int, norm: bool = False) -> None:
        out[name] = (0.3 * torch.randn(*shape, generator=generator, **DOUBLE) + norm).requires_grad_()

    add("model.embed_tokens.weight", V, D)
    add("model.memory_tokens", M, D)
    add("model.final_layernorm.weight", D, norm=True)
    for i in range(5):
        a, m = f"model.layers.{i}", f"model.layers.{i}.mamba"
        own = 0 if BACK[i] else G * K + G * (E // H)
        add(f"{m}.in_proj.weight", H * K + own + 2 * E, D)
        add(f"{m}.out_proj.weight", D, E)
        add(f"{m}.conv1d.weight", E, 1, 4)
        add(f"{m}.conv1d.bias", E)
        add(f"{m}.x_proj.0.weight", R + 2 * N, E)
        add(f"{m}.dt_proj.0.weight", E, R)
        add(f"{m}.dt_proj.0.bias", E)
        add(f"{m}.A_log.0", E, N)
        add(f"{m}.D.0", E)
        for name, size in (("dt", R), ("B", N), ("C", N)):
            add(f"{m}.{name}_layernorm.weight", size, norm=True)
        for name, size in (("mamba.pre_avg_layernorm1", E), ("mamba.pre_avg_layernorm2", E)):
            add(f"{a}.{name}.weight", size, norm=True)
        add(f"{a}.input_layernorm.weight", D, norm=True)
        add(f"{a}.pre_moe_layernorm.weight", D, norm=True)
        for name, shape in (("gate", (FF, D)), ("up", (FF, D)), ("down", (D, FF))):
            add(f"{a}.moe.experts.0.{name}_proj.weight", *shape)
    return out


def rms(x, weight):
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def rotate(x_HLK):
    inverse = 10000 ** (-torch.arange(0, K, 2, **DOUBLE) / K)
    angle = torch.cat([torch.arange(x_HLK.shape[1], **DOUBLE)[:, None] * inverse] * 2, -1)
    half = torch.cat([-x_HLK[..., K // 2 :], x_HLK[..., : K // 2]], -1)
    return x_HLK * angle.cos() + half * angle.sin()


def scan(get, m, x_LE, z_LE):
    padded = F.pad(x_LE.T[None], (3, 0))
    x_LE = F.silu(F.conv1d(padded, get(f"{m}.conv1d.weight"), get(f"{m}.conv1d.bias"), groups=E))[0].T
    dt, B, C = (x_LE @ get(f"{m}.x_proj.0.weight").T).split([R, N, N], -1)
    dt, B, C = (rms(t, get(f"{m}.{n}_layernorm.weight")) for n, t in (("dt", dt), ("B", B), ("C", C)))
    dt = F.softplus(dt @ get(f"{m}.dt_proj.0.weight").T + get(f"{m}.dt_proj.0.bias"))
    A, h, out = -get(f"{m}.A_log.0").exp(), torch.zeros(E, N, **DOUBLE), []
    for t in range(len(x_LE)):
        h = h * (dt[t, :, None] * A).exp() + dt[t, :, None] * B[t] * x_LE[t, :, None]
        out.append(h @ C[t] + get(f"{m}.D.0") * x_LE[t])
    return torch.stack(out) * F.silu(z_LE)


def reference(get, ids_L):
    """Logits (L, V) of one row."""
    x_LD = torch.cat([get("model.memory_tokens"), get("model.embed_tokens.weight")[ids_L]])
    L, kept = len(x_LD), {}
    t, s = torch.arange(L)[:, None], torch.arange(L)
    for i in range(5):
        a, m = f"model.layers.{i}", f"model.layers.{i}.mamba"
        u = rms(x_LD, get(f"{a}.input_layernorm.weight")) @ get(f"{m}.in_proj.weight").T
        q, rest = rotate(u[:, : H * K].unflatten(-1, (H, K)).transpose(0, 1)), u[:, H * K : -2 * E]
        if BACK[i]:
            k, v = kept[i - BACK[i]]
        else:
            k = rotate(rest[:, : G * K].unflatten(-1, (G, K)).transpose(0, 1)).repeat_interleave(H // G, 0)
            v = rest[:, G * K :].unflatten(-1, (G, -1)).transpose(0, 1).repeat_interleave(H // G, 0)
        kept[i] = k, v
        near = (s <= t) if WINDOWS[i] is None else (s <= t) & ((t - s < WINDOWS[i]) | (s < M))
        weight = (q @ k.transpose(1, 2) * K**-0.5).masked_fill(~near, -torch.inf).softmax(-1)
        y = (weight @ v).transpose(0, 1).flatten(1)
        y = rms(y, get(f"{m}.pre_avg_layernorm1.weight"))
        y = (y + rms(scan(get, m, *u[:, -2 * E :].chunk(2, -1)), get(f"{m}.pre_avg_layernorm2.weight"))) / 2
        x_LD = x_LD + y @ get(f"{m}.out_proj.weight").T
        u = rms(x_LD, get(f"{a}.pre_moe_layernorm.weight"))
        gate, up, down = (get(f"{a}.moe.experts.0.{n}_proj.weight") for n in ("gate", "up", "down"))
        x_LD = x_LD + (F.silu(u @ gate.T) * (u @ up.T)) @ down.T
    return rms(x_LD[M:], get("model.final_layernorm.weight")) @ get("model.embed_tokens.weight").T


# The theta of these positions is 10000 after the scaling, as in `rotate`.
CONFIG = {
    "model_type": "hymba", "vocab_size": V, "hidden_size": D, "intermediate_size": FF, "num_hidden_layers": 5,
    "num_attention_heads": H, "num_key_value_heads": G, "kq_head_dim": K, "v_head_dim": E // H, "kq_norm": "none",
    "num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": N, "mamba_dt_rank": R, "sliding_window": W,
    "global_attn_idx": [0, 4], "kv_reuse_group": [[1, 2, 3]], "num_memory_tokens": M, "rope": True, "rope_type": "ntk",
    "rope_theta": 10000 / 7 ** (K / (K - 2)), "max_position_embeddings": 8192, "orig_max_position_embeddings": 2048,
    "tie_word_embeddings": True, "layer_type": ["h"] * 5, "mlp_hidden_act": "silu",
}  # fmt: skip


def save(folder):
    weights = {name: t.detach().float() for name, t in theirs().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return weights


@torch.no_grad()
def logits(weights, given):
    found = {name: t.double() for name, t in weights.items()}
    return torch.stack([reference(found.__getitem__, ids_L) for ids_L in given["input_ids"]]).float()


peer(Peer("transformers", "hymba", save, logits, tokens(V)))
