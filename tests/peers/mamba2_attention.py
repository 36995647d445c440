"""Mamba-2 with layers of attention as mamba_ssm publishes them: transformers' Mamba-2 with an attention of this file.

Names, shapes and what they compute are those of `MHA` in mamba_ssm/modules/mha.py (state-spaces/mamba); the config is
that of state-spaces/mamba2attn-2.7b. Positions turn as complex numbers here.
"""

from __future__ import annotations

import json

import torch
from torch import nn

from peers import Peer, peer, random_weights, tokens

WIDTH = 32
SIZES = {
    "vocab_size": 96, "hidden_size": WIDTH, "num_hidden_layers": 4, "num_heads": 8, "head_dim": 8, "state_size": 16,
    "n_groups": 2,
}  # fmt: skip


class Attention(nn.Module):
    """(B, L, D) -> the same; the options are those of `attn_cfg`."""

    def __init__(self, num_heads, head_dim, rotary_emb_dim, d_conv, qkv_proj_bias, out_proj_bias, num_heads_kv=None):
        super().__init__()
        self.heads = num_heads, num_heads_kv or num_heads
        self.size, self.turned = head_dim, rotary_emb_dim
        total = head_dim * (self.heads[0] + 2 * self.heads[1])
        self.in_proj = nn.Linear(WIDTH, total, bias=qkv_proj_bias)
        self.conv1d = nn.Conv1d(total, total, d_conv, padding=d_conv - 1, groups=total) if d_conv else None
        self.out_proj = nn.Linear(num_heads * head_dim, WIDTH, bias=out_proj_bias)

    def forward(self, x, **unused):
        y = self.in_proj(x)
        if self.conv1d is not None:
            y = self.conv1d(y.mT)[..., : x.shape[1]].mT
        (H, G), K = self.heads, self.size
        q, k, v = (part.unflatten(-1, (-1, K)).transpose(1, 2) for part in y.split([H * K, G * K, G * K], -1))
        k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
        scores = self.turn(q) @ self.turn(k).mT / K**0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def turn(self, x):
        """The first channels, each one of their first half with that of the second."""
        half = self.turned // 2
        if not half:
            return x
        wave = 10000.0 ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[2])[:, None] * wave
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)


def saves(places, **attention):
    """A function that writes the files of a model with attention in some places."""

    def save(folder):
        from transformers import Mamba2Config, Mamba2ForCausalLM

        model = Mamba2ForCausalLM(Mamba2Config(**SIZES, tie_word_embeddings=True))
        for i in places:
            model.backbone.layers[i].mixer = Attention(**attention)
        random_weights(model)
        old, new = "backbone.embeddings", "backbone.embedding"
        state = {name.replace(old, new): tensor.clone() for name, tensor in model.state_dict().items()}
        state["lm_head.weight"] = state[f"{new}.weight"]
        torch.save(state, folder / "pytorch_model.bin")
        config = {
            "d_model": WIDTH, "d_intermediate": 0, "n_layer": 4, "vocab_size": 90, "attn_layer_idx": places,
            "attn_cfg": {"causal": True, **attention}, "rms_norm": True, "residual_in_fp32": True,
            "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 16, "ngroups": 2}, "fused_add_norm": True,
            "pad_vocab_size_multiple": 16, "tie_embeddings": True,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        return model

    return save


def logits(model, given):
    return model(**given, use_cache=False).logits


PUBLISHED = {"num_heads": 3, "head_dim": 16, "rotary_emb_dim": 8, "d_conv": 4}
OTHERS = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 8, "rotary_emb_dim": 0, "d_conv": 0}
peer(
    Peer(
        "mamba_ssm", "mamba2_attention", saves([1, 3], **PUBLISHED, qkv_proj_bias=False, out_proj_bias=False), logits,
        tokens(90),
    )
)  # fmt: skip
peer(
    Peer(
        "mamba_ssm", "mamba2_attention", saves([0], **OTHERS, qkv_proj_bias=True, out_proj_bias=True), logits,
        tokens(90), label="shared-heads",
    )
)  # fmt: skip
