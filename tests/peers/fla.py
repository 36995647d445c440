"""flash-linear-attention's folders. Its kernels need a GPU, so each model is evaluated here, token by token, from the
tensors by their names; RWKV by the functions of tests/peers/rwkv.py, Mamba by transformers' classes. What the package
itself computes, in Triton's interpreter, is held in tests/peers/official.

Names and shapes are those that the classes of flash-linear-attention 0.6.0 have (they can be built on a CPU, not run);
with the package on the path, `test_names_are_those_of_the_package` of tests/convert/layouts/test_fla_names.py compares.
"""

from __future__ import annotations

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from peers import Peer, peer, rwkv, tokens
from peers.mamba import SIZES as MAMBA

D, H, V, LAYERS, E = 32, 4, 61, 2, 48


def whole(mixer, *, norm=("weight",), first=False, ffn="mlp", ffn_shapes=None):
    """Names and shapes of a model around its mixer's."""
    shapes = {"model.embeddings.weight": (V, D), "lm_head.weight": (V, D)}
    ffn_shapes = ffn_shapes or {"gate_proj.weight": (E, D), "up_proj.weight": (E, D), "down_proj.weight": (D, E)}
    norms = ["model.norm"] + ["model.layers.0.pre_norm"] * first
    for i in range(LAYERS):
        b = f"model.layers.{i}."
        norms += [f"{b}attn_norm", f"{b}{ffn}_norm"]
        shapes |= {f"{b}attn.{name}": shape for name, shape in mixer(i).items()}
        shapes |= {f"{b}{ffn}.{name}": shape for name, shape in ffn_shapes.items()}
    return shapes | {f"{name}.{parameter}": (D,) for name in norms for parameter in norm}


def draw(shapes):
    made = {}
    for name, shape in shapes.items():
        made[name] = torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)
        if "norm" in name and name.endswith("weight"):
            made[name] += 1
    return made


def saver(shapes, config):
    def save(folder):
        made = draw(shapes)
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
        common = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "intermediate_size": E}
        (folder / "config.json").write_text(json.dumps({**common, "fuse_norm": True, "num_heads": H, **config}))
        return made

    return save


def rms(x, weight, eps=1e-6):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def run(mixer):
    """Logits; `mixer(w, x_LD)` gets one layer's tensors by the names behind `attn.`."""

    def logits(w, given):
        out = []
        for ids in given["input_ids"]:
            x = w["model.embeddings.weight"][ids]
            for i in range(LAYERS):
                b = f"model.layers.{i}."
                part = {name.removeprefix(f"{b}attn."): t for name, t in w.items() if name.startswith(f"{b}attn.")}
                x = x + mixer(part, rms(x, w[f"{b}attn_norm.weight"]))
                u = rms(x, w[f"{b}mlp_norm.weight"])
                gate, up, down = (w[f"{b}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
                x = x + (F.silu(u @ gate.T) * (u @ up.T)) @ down.T
            out.append(rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T)
        return torch.stack(out)

    return logits


def heads(w, name, x, conv=False):
    y = x @ w[f"{name}_proj.weight"].T
    if conv:
        kernel = w[f"{name}_conv1d.weight"]
        y = F.silu(F.conv1d(F.pad(y.T, (kernel.shape[-1] - 1, 0)), kernel, groups=len(kernel)).T)
    return y.unflatten(-1, (H, -1))


def recurrence(q, k, v, fade):
    """S_t = fade_t S_{t-1} + k_t v_t^T, y_t = S_t^T q_t / sqrt(K); fade is (L, H, K)."""
    S, out = torch.zeros(H, q.shape[-1], v.shape[-1]), []
    for t in range(len(q)):
        S = S * fade[t][..., None] + k[t][..., None] * v[t][:, None]
        out.append(torch.einsum("hk,hkv->hv", q[t] * q.shape[-1] ** -0.5, S))
    return torch.stack(out)


def delta(q, k, v, beta, fade):
    """S_t = fade_t S_{t-1}, then the value under k_t is moved by beta_t towards v_t; q and k of length 1."""
    q, k = (F.normalize(x, dim=-1) for x in (q, k))
    S, out = torch.zeros(H, q.shape[-1], v.shape[-1]), []
    for t in range(len(q)):
        S = S * fade[t][:, None, None]
        seen = torch.einsum("hk,hkv->hv", k[t], S)
        S = S + k[t][..., None] * (beta[t][:, None] * (v[t] - seen))[:, None]
        out.append(torch.einsum("hk,hkv->hv", q[t] * q.shape[-1] ** -0.5, S))
    return torch.stack(out)


def gated_out(w, y, x, norm):
    y = rms(y, w[f"{norm}.weight"])
    if "g_proj.weight" in w:
        y = y * F.silu(heads(w, "g", x))
    return y.flatten(-2) @ w["o_proj.weight"].T


def rotate(x):
    """Llama's rotary positions: halves of a head are pairs."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def retention(w, x):
    q, k, v = rotate(heads(w, "q", x)), rotate(heads(w, "k", x)), heads(w, "v", x)
    fade = (1 - 2.0 ** (-5 - torch.arange(H)))[None, :, None].expand(len(x), H, q.shape[-1])
    return gated_out(w, recurrence(q, k, v, fade), x, "g_norm_swish_gate")


def gla(w, x):
    low = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    q, k, v = (heads(w, name, x) for name in "qkv")
    return gated_out(w, recurrence(q, k, v, low.sigmoid().pow(1 / 16).unflatten(-1, (H, -1))), x, "g_norm_swish_gate")


def gated_delta(w, x):
    q, k, v = (heads(w, name, x, conv=True) for name in "qkv")
    fade = torch.ones(len(x), H)
    if "A_log" in w:
        fade = torch.exp(-w["A_log"].exp() * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"]))
    return gated_out(w, delta(q, k, v, (x @ w["b_proj.weight"].T).sigmoid(), fade), x, "o_norm")


def projected(keys, values, gate=True):
    shapes = {"q_proj.weight": (keys, D), "k_proj.weight": (keys, D), "v_proj.weight": (values, D)}
    return shapes | {"o_proj.weight": (D, values)} | ({"g_proj.weight": (values, D)} if gate else {})


def convolved(keys, values):
    return {f"{name}_conv1d.weight": (size, 1, 4) for name, size in zip("qkv", (keys, keys, values), strict=True)}


def low(name, rank, bias=True):
    lora = f"{name}_lora.lora"
    shapes = {f"{lora}.0.weight": (rank, D), f"{lora}.2.weight": (D, rank)}
    return shapes | ({f"{lora}.2.bias": (D,)} if bias else {})


SHAPES = {
    "retnet": whole(lambda i: {**projected(D, 2 * D), "g_norm_swish_gate.weight": (2 * D // H,)}),
    "gla": whole(
        lambda i: {
            **projected(D // 2, D), "gk_proj.0.weight": (16, D), "gk_proj.1.weight": (D // 2, 16),
            "gk_proj.1.bias": (D // 2,), "g_norm_swish_gate.weight": (D // H,),
        }
    ),
    "gated_deltanet": whole(
        lambda i: {
            **projected(24, 48), **convolved(24, 48), "a_proj.weight": (H, D), "b_proj.weight": (H, D), "A_log": (H,),
            "dt_bias": (H,), "o_norm.weight": (12,),
        }
    ),
    "delta_net": whole(
        lambda i: {**projected(D, D, False), **convolved(D, D), "b_proj.weight": (H, D), "o_norm.weight": (D // H,)}
    ),
    "rwkv6": whole(
        lambda i: {
            "x_bias": (5, D), "bonus": (H, 8), "x_proj.0.mu": (D,), "x_proj.0.linear.weight": (30, D),
            "x_proj.2.weight": (D, 30), **{f"{n}_proj.linear.weight": (D, D) for n in "rkvg"},
            "w_proj.linear.lora.0.weight": (7, D), "w_proj.linear.lora.2.weight": (D, 7),
            "w_proj.linear.lora.2.bias": (D,), "g_norm.weight": (D,), "g_norm.bias": (D,), "o_proj.weight": (D, D),
        },
        norm=("weight", "bias"), first=True, ffn="ffn",
        ffn_shapes={
            "key.mu": (D,), "key.linear.weight": (E, D), "value.weight": (D, E), "receptance.mu": (D,),
            "receptance.linear.weight": (D, D),
        },
    ),
    "rwkv7": whole(
        lambda i: {
            **{f"x_{n}": (1, 1, D) for n in "rwkvag"}, "k_k": (D,), "k_a": (D,), "r_k": (H, 8),
            **{f"{n}_proj.weight": (D, D) for n in "rkvo"}, "g_norm.weight": (D,), "g_norm.bias": (D,),
            **low("w", 6), **low("a", 7), **low("g", 9, bias=False), **(low("v", 5) if i else {}),
        },
        norm=("weight", "bias"), first=True, ffn="ffn",
        ffn_shapes={"x_k": (D,), "key.weight": (E, D), "value.weight": (D, E)},
    ),
}  # fmt: skip


def as_authors(w, version):
    """fla's tensors under the names of the authors' files."""
    found = {"emb.weight": w["model.embeddings.weight"], "head.weight": w["lm_head.weight"]}
    norms = {"ln_out": "model.norm", "blocks.0.ln0": "model.layers.0.pre_norm"}
    for i in range(LAYERS):
        b, theirs = f"blocks.{i}.", f"model.layers.{i}."
        norms |= {f"{b}ln1": f"{theirs}attn_norm", f"{b}ln2": f"{theirs}ffn_norm"}
        norms[f"{b}att.ln_x"] = f"{theirs}attn.g_norm"
        found[f"{b}att.eps"] = torch.tensor(1e-5 if version == 6 else 8 * 1e-5)
        part = {name.removeprefix(theirs): t for name, t in w.items() if name.startswith(theirs)}
        found |= {b + name: t for name, t in (authors_6 if version == 6 else authors_7)(part).items()}
    return found | {f"{a}.{p}": w[f"{b}.{p}"] for a, b in norms.items() for p in ("weight", "bias")}


def authors_6(w):
    order = "rwkvg"
    names = {"receptance": "r", "key": "k", "value": "v", "gate": "g"}
    found = {f"att.{a}.weight": w[f"attn.{b}_proj.linear.weight"] for a, b in names.items()}
    move = [order.index(n) for n in "wkvrg"]
    found |= {f"att.time_maa_{n}": w["attn.x_bias"][order.index(n)] for n in order}
    return found | {
        "att.output.weight": w["attn.o_proj.weight"], "att.time_maa_x": w["attn.x_proj.0.mu"],
        "att.time_maa_w1": w["attn.x_proj.0.linear.weight"].view(5, -1, D)[move].flatten(0, 1).T,
        "att.time_maa_w2": w["attn.x_proj.2.weight"].view(D, 5, -1)[:, move].permute(1, 2, 0),
        "att.time_decay": w["attn.w_proj.linear.lora.2.bias"], "att.time_faaaa": w["attn.bonus"],
        "att.time_decay_w1": w["attn.w_proj.linear.lora.0.weight"].T,
        "att.time_decay_w2": w["attn.w_proj.linear.lora.2.weight"].T,
        "ffn.time_maa_k": w["ffn.key.mu"], "ffn.time_maa_r": w["ffn.receptance.mu"],
        "ffn.key.weight": w["ffn.key.linear.weight"], "ffn.value.weight": w["ffn.value.weight"],
        "ffn.receptance.weight": w["ffn.receptance.linear.weight"],
    }  # fmt: skip


def authors_7(w):
    names = {"receptance": "r", "key": "k", "value": "v", "output": "o"}
    found = {f"att.{a}.weight": w[f"attn.{b}_proj.weight"] for a, b in names.items()}
    found |= {f"att.{n}": w[f"attn.{n}"] for n in ("k_k", "k_a", "r_k", *(f"x_{x}" for x in "rwkvag"))}
    for letter in "wagv":
        lora = f"attn.{letter}_lora.lora"
        if f"{lora}.0.weight" in w:
            found |= {f"att.{letter}1": w[f"{lora}.0.weight"].T, f"att.{letter}2": w[f"{lora}.2.weight"].T}
        if f"{lora}.2.bias" in w:
            found[f"att.{letter}0"] = w[f"{lora}.2.bias"]
    return found | {f"ffn.{n}": w[f"ffn.{n}"] for n in ("x_k", "key.weight", "value.weight")}


def authors_run(version):
    mixes = {6: (rwkv.time_mix_6, rwkv.channel_mix_6), 7: (rwkv.time_mix_7, rwkv.channel_mix_7)}[version]
    logits = rwkv.run(*mixes)
    return lambda w, given: logits(as_authors(w, version), given)


CONFIGS = {
    "retnet": {"hidden_act": "swish"},
    "gla": {},
    "gated_deltanet": {"head_dim": 6},
    "delta_net": {},
    "rwkv6": {"expand_k": 1.0, "proj_low_rank_dim": 6, "gate_low_rank_dim": 7},
    "rwkv7": {
        "head_dim": 8, "decay_low_rank_dim": 6, "a_low_rank_dim": 7, "v_low_rank_dim": 5, "gate_low_rank_dim": 9,
    },
}  # fmt: skip
RUNS = {"retnet": run(retention), "gla": run(gla), "gated_deltanet": run(gated_delta), "delta_net": run(gated_delta)}

for _name, _shapes in SHAPES.items():
    _logits = RUNS.get(_name) or authors_run(int(_name[-1]))
    peer(Peer("fla", _name, saver(_shapes, {"model_type": _name, **CONFIGS[_name]}), _logits, tokens(V, 12)))


def mamba_saver(kind, sizes):
    def save(folder):
        import transformers

        from peers import random_weights

        config = getattr(transformers, f"{kind}Config")(**sizes, tie_word_embeddings=False)
        model = random_weights(getattr(transformers, f"{kind}ForCausalLM")(config))
        model.save_pretrained(folder)
        told = json.loads((folder / "config.json").read_text())
        for theirs, fla in (("layer_norm_epsilon", "norm_eps"), ("time_step_rank", "dt_rank")):
            if theirs in told:
                told[fla] = told.pop(theirs)
        told.pop("time_step_limit", None)
        (folder / "config.json").write_text(json.dumps({**told, "fuse_norm": True, "dt_limit": [0.0, math.inf]}))
        return model

    return save


MAMBA2 = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8,
    "n_groups": 1, "chunk_size": 8,
}  # fmt: skip
for _name, _kind, _sizes in (("mamba", "Mamba", MAMBA), ("mamba2", "Mamba2", MAMBA2)):
    peer(
        Peer("fla", _name, mamba_saver(_kind, _sizes), lambda m, given: m(**given).logits, tokens(_sizes["vocab_size"]))
    )
