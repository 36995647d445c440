"""RWKV in the authors' files, from tensors that are drawn here under their names and shapes.

Version 4 is run by transformers' class. For 6 and 7 no class of somebody else installs here by default: what the
authors' package gives for such files is in tests/mixers/test_rwkv6.py and test_rwkv7.py; here a small evaluation, one
token at a time and straight from the tensors by their names, stands for it.
"""

from __future__ import annotations

import struct

import torch
import torch.nn.functional as F

from peers import Peer, peer, tokens

D, H, K, V, LAYERS = 32, 4, 8, 61, 2


def draw(shapes):
    made = {}
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        made[name] = scale * torch.randn(shape)
        if name.endswith((".weight",)) and len(shape) == 1:  # a norm's
            made[name] += 1
    return made


def around(time_mix, channel_mix):
    """Shapes of a whole file."""
    shapes = {"emb.weight": (V, D), "blocks.0.ln0.weight": (D,), "blocks.0.ln0.bias": (D,)}
    for i in range(LAYERS):
        b = f"blocks.{i}."
        shapes |= {f"{b}{norm}.{p}": (D,) for norm in ("ln1", "ln2") for p in ("weight", "bias")}
        shapes |= {f"{b}att.{name}": shape for name, shape in time_mix(i).items()}
        shapes |= {f"{b}att.{name}.weight": (D, D) for name in ("receptance", "key", "value", "output")}
        shapes |= {f"{b}ffn.{name}": shape for name, shape in channel_mix.items()}
    return shapes | {"ln_out.weight": (D,), "ln_out.bias": (D,), "head.weight": (V, D)}


def saver(shapes, file="model.pth"):
    def save(folder):
        tensors = draw(shapes)
        torch.save(tensors, folder / file)
        return tensors

    return save


def norm(w, name, x, **options):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], **options)


def run(time_mix, channel_mix):
    """Logits of all tokens, one at a time; `w` holds one layer's tensors under the names behind its number."""

    def logits(w, given):
        rows = []
        for ids_L in given["input_ids"]:
            state = [{} for _ in range(LAYERS)]
            out = []
            for token in ids_L:
                x, shared = norm(w, "blocks.0.ln0", w["emb.weight"][token]), {}
                for i in range(LAYERS):
                    b = f"blocks.{i}."
                    part = {name.removeprefix(b): t.squeeze() for name, t in w.items() if name.startswith(b)}
                    h = norm(w, f"{b}ln1", x)
                    x = x + time_mix(part, h, state[i].get("att", torch.zeros(D)), state[i], shared, i)
                    state[i]["att"] = h
                    h = norm(w, f"{b}ln2", x)
                    x = x + channel_mix(part, h, state[i].get("ffn", torch.zeros(D)))
                    state[i]["ffn"] = h
                out.append(w["head.weight"] @ norm(w, "ln_out", x))
            rows.append(torch.stack(out))
        return torch.stack(rows)

    return logits


def lerp(h, before, share):
    return h + (before - h) * share


def time_mix_4(w, h, before, state, shared, i):
    k, v, r = (
        w[f"att.{n}.weight"] @ lerp(before, h, w[f"att.time_mix_{n[0]}"]) for n in ("key", "value", "receptance")
    )
    top, bottom = state.get("top", torch.zeros(D)), state.get("bottom", torch.zeros(D))
    first = torch.exp(w["att.time_first"] + k)
    y = (top + first * v) / (bottom + first)
    fade = torch.exp(-torch.exp(w["att.time_decay"]))
    state["top"], state["bottom"] = fade * top + k.exp() * v, fade * bottom + k.exp()
    return w["att.output.weight"] @ (r.sigmoid() * y)


def channel_mix_4(w, h, before):
    k, r = lerp(before, h, w["ffn.time_mix_k"]), lerp(before, h, w["ffn.time_mix_r"])
    return (w["ffn.receptance.weight"] @ r).sigmoid() * (
        w["ffn.value.weight"] @ (w["ffn.key.weight"] @ k).relu().square()
    )


def time_mix_6(w, h, before, state, shared, i):
    low = (lerp(h, before, w["att.time_maa_x"]) @ w["att.time_maa_w1"]).tanh().view(5, -1)
    moved = [lerp(h, before, w[f"att.time_maa_{n}"] + low[j] @ w["att.time_maa_w2"][j]) for j, n in enumerate("wkvrg")]
    r, k, v = (w[f"att.{n}.weight"] @ moved[j] for n, j in (("receptance", 3), ("key", 1), ("value", 2)))
    decay = w["att.time_decay"] + (moved[0] @ w["att.time_decay_w1"]).tanh() @ w["att.time_decay_w2"]
    r, k, v, fade = (t.view(H, K) for t in (r, k, v, torch.exp(-torch.exp(decay))))
    S = state.get("S", torch.zeros(H, K, K))
    kv = k[:, :, None] * v[:, None]
    y = torch.einsum("hk,hkv->hv", r, S + w["att.time_faaaa"][..., None] * kv)
    state["S"] = S * fade[..., None] + kv
    y = F.group_norm(y.view(1, D), H, w["att.ln_x.weight"], w["att.ln_x.bias"], float(w.get("att.eps", 64e-5))).view(D)
    return w["att.output.weight"] @ (y * F.silu(w["att.gate.weight"] @ moved[4]))


def channel_mix_6(w, h, before):
    k, r = lerp(h, before, w["ffn.time_maa_k"]), lerp(h, before, w["ffn.time_maa_r"])
    return (w["ffn.receptance.weight"] @ r).sigmoid() * (
        w["ffn.value.weight"] @ (w["ffn.key.weight"] @ k).relu().square()
    )


def time_mix_7(w, h, before, state, shared, i):
    m = {n: lerp(h, before, w[f"att.x_{n}"]) for n in "rwkvag"}
    r, k, v = (w[f"att.{n}.weight"] @ m[n[0]] for n in ("receptance", "key", "value"))
    fade = torch.exp(-0.606531 * (w["att.w0"] + (m["w"] @ w["att.w1"]).tanh() @ w["att.w2"]).sigmoid())
    a = (w["att.a0"] + m["a"] @ w["att.a1"] @ w["att.a2"]).sigmoid()
    g = (m["g"] @ w["att.g1"]).sigmoid() @ w["att.g2"]
    if i == 0:
        shared["v"] = v
    else:
        v = v + (shared["v"] - v) * (w["att.v0"] + m["v"] @ w["att.v1"] @ w["att.v2"]).sigmoid()
    kk = F.normalize((k * w["att.k_k"]).view(H, K), dim=-1)
    k = k * (1 + (a - 1) * w["att.k_a"])
    r, k, v, a, fade = (t.view(H, K) for t in (r, k, v, a, fade))
    S = state.get("S", torch.zeros(H, K, K))  # (values, keys)
    S = S * fade[:, None] - (S @ kk[..., None]) * (kk * a)[:, None] + v[..., None] * k[:, None]
    state["S"] = S
    y = (S @ r[..., None]).view(1, D)
    y = F.group_norm(y, H, w["att.ln_x.weight"], w["att.ln_x.bias"], float(w.get("att.eps", 64e-5))).view(D)
    y = y + ((r * k * w["att.r_k"]).sum(-1, keepdim=True) * v).view(D)
    return w["att.output.weight"] @ (y * g)


def channel_mix_7(w, h, before):
    return w["ffn.value.weight"] @ (w["ffn.key.weight"] @ lerp(h, before, w["ffn.x_k"])).relu().square()


ROW = (1, 1, D)
NORM = {"ln_x.weight": (D,), "ln_x.bias": (D,)}
FFN = {"key.weight": (80, D), "value.weight": (D, 80)}
shapes_4 = around(
    lambda i: {**{f"time_mix_{n}": ROW for n in "kvr"}, "time_decay": (D,), "time_first": (D,)},
    {**FFN, "receptance.weight": (D, D), "time_mix_k": ROW, "time_mix_r": ROW},
)
shapes_6 = around(
    lambda i: {
        **{f"time_maa_{n}": ROW for n in "xwkvrg"}, "time_maa_w1": (D, 5 * 6), "time_maa_w2": (5, 6, D),
        "time_decay": ROW, "time_decay_w1": (D, 7), "time_decay_w2": (7, D), "time_faaaa": (H, K),
        "gate.weight": (D, D), **NORM,
    },
    {**FFN, "receptance.weight": (D, D), "time_maa_k": ROW, "time_maa_r": ROW},
)  # fmt: skip
shapes_7 = around(
    lambda i: {
        **{f"x_{n}": ROW for n in "rwkvag"}, "w0": ROW, "a0": ROW, "k_k": ROW, "k_a": ROW, "r_k": (H, K), **NORM,
        "w1": (D, 6), "w2": (6, D), "a1": (D, 7), "a2": (7, D), "g1": (D, 9), "g2": (9, D),
        **({"v0": ROW, "v1": (D, 5), "v2": (5, D)} if i else {}),
    },
    {**FFN, "x_k": ROW},
)  # fmt: skip

for version, shapes, mixes in (
    (4, shapes_4, (time_mix_4, channel_mix_4)),
    (6, shapes_6, (time_mix_6, channel_mix_6)),
    (7, shapes_7, (time_mix_7, channel_mix_7)),
):
    peer(Peer("rwkv", f"rwkv{version}", saver(shapes), run(*mixes), tokens(V, 12), file="model.pth"))


def save_for_cpp(folder):
    """The same tensors in a file of rwkv.cpp, written as its documentation says."""
    tensors = {name: t.squeeze() for name, t in draw(shapes_4).items()}
    data = struct.pack("<6i", 0x67676D66, 101, V, D, LAYERS, 0)
    for name, t in tensors.items():
        t = -t.exp() if name.endswith("time_decay") else t
        data += struct.pack("<3i", t.dim(), len(name), 0) + struct.pack(f"<{t.dim()}i", *reversed(t.shape))
        data += name.encode() + t.numpy().tobytes()
    (folder / "model.bin").write_bytes(data)
    return tensors


peer(Peer("rwkv_cpp", "rwkv4", save_for_cpp, run(time_mix_4, channel_mix_4), tokens(V, 12), file="model.bin"))
