"""torchscale's RetNet, evaluated token by token from its tensors. The package's own layer is compared with ours in
tests/mixers/test_retention.py, its model in tests/peers/official. Names are those of torchscale 0.3.0
(torchscale/architecture/retnet.py)."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F

from peers import Peer, fla, peer, tokens

D, H, V, E, LAYERS, VALUES = 32, 4, 61, 48, 2, 48


def save(folder):
    shapes = {"embed_tokens.weight": (V, D), "output_projection.weight": (V, D), "layer_norm.weight": (D,)}
    for i in range(LAYERS):
        b = f"layers.{i}."
        shapes |= {f"{b}retention.{n}_proj.weight": (D, D) for n in "qk"}
        shapes |= {f"{b}retention.{n}_proj.weight": (VALUES, D) for n in "vg"}
        shapes |= {f"{b}retention.out_proj.weight": (D, VALUES), f"{b}ffn.fc1.weight": (E, D)}
        shapes |= {f"{b}ffn.gate.weight": (E, D), f"{b}ffn.fc2.weight": (D, E)}
        shapes |= {f"{b}{norm}_layer_norm.weight": (D,) for norm in ("retention", "final")}
    w = fla.draw(shapes)
    angle = 1 / 10000 ** torch.linspace(0, 1, D // H // 2)
    w["retnet_rel_pos.angle"] = angle[:, None].repeat(1, 2).flatten()
    w["retnet_rel_pos.decay"] = torch.log(1 - 2 ** (-5 - torch.arange(H, dtype=torch.float)))
    torch.save(w, folder / "pytorch_model.bin")
    told = {"decoder_embed_dim": D, "decoder_value_embed_dim": VALUES, "decoder_retention_heads": H, "vocab_size": V}
    told |= {"decoder_ffn_embed_dim": E, "decoder_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(told))
    return w


def turned(x, angle):
    """Neighbours of a head are pairs."""
    turn = torch.arange(len(x))[:, None, None] * angle
    crossed = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * turn.cos() + crossed * turn.sin()


def logits(w, given):
    out = []
    for ids in given["input_ids"]:
        x = w["embed_tokens.weight"][ids]
        for i in range(LAYERS):
            part = {name.removeprefix(f"layers.{i}."): t for name, t in w.items() if name.startswith(f"layers.{i}.")}
            u = fla.rms(x, part["retention_layer_norm.weight"])
            q, k, v, g = (
                (u @ part[f"retention.{n}_proj.weight"].T).unflatten(-1, (H, -1)) for n in "qkvg"
            )  # fmt: skip
            q, k = (turned(y, w["retnet_rel_pos.angle"]) for y in (q, k))
            fade = w["retnet_rel_pos.decay"].exp()[None, :, None].expand(len(x), H, q.shape[-1])
            sums = fla.recurrence(*[torch.ones_like(q)[..., :1]] * 3, fade[..., :1])  # of the decays of what is seen
            y = fla.rms(fla.recurrence(q, k, v, fade) / sums.sqrt(), 1.0) * F.silu(g)
            x = x + y.flatten(-2) @ part["retention.out_proj.weight"].T
            u = fla.rms(x, part["final_layer_norm.weight"])
            x = x + (F.gelu(u @ part["ffn.fc1.weight"].T) * (u @ part["ffn.gate.weight"].T)) @ part["ffn.fc2.weight"].T
        out.append(fla.rms(x, w["layer_norm.weight"]) @ w["output_projection.weight"].T)
    return torch.stack(out)


peer(Peer("torchscale", "retnet", save, logits, tokens(V, 12)))
