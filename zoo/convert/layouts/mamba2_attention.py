"""Mamba-2 with some layers of attention, of mamba_ssm: `attn_layer_idx` and `attn_cfg` of its config.

The attention has one projection of queries, keys and values, and behind it a short convolution without an activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from zoo.config import ZooConfig
from zoo.convert.layouts.family import register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mamba2 import Mamba2SSM
from zoo.convert.layouts.mapping import Entry, same, split
from zoo.errors import CheckpointError, ExportError

# Defaults of the module MHA of mamba_ssm.
_ATTENTION: dict[str, Any] = {
    "num_heads": None, "num_heads_kv": None, "head_dim": None, "mlp_dim": 0, "qkv_proj_bias": True,
    "out_proj_bias": True, "softmax_scale": None, "causal": False, "d_conv": 0, "rotary_emb_dim": 0,
    "rotary_emb_base": 10000.0, "rotary_emb_interleaved": False,
}  # fmt: skip


@register_family
class Mamba2AttentionSSM(Mamba2SSM):
    """`config.json` and `pytorch_model.bin` of state-spaces/mamba2attn-2.7b."""

    name = "mamba2_attention"
    mixers: ClassVar[tuple[str, ...]] = ("attention", "mamba2")
    about = "MambaLMHeadModel of the package mamba_ssm, ssm_cfg.layer Mamba2 and layers of attention"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = checkpoint.config
        without = {**c, "attn_layer_idx": [], "attn_cfg": {}}
        fields = super().fields(Checkpoint(checkpoint.path, without, checkpoint.shapes))
        told, places = {**_ATTENTION, **c["attn_cfg"]}, c["attn_layer_idx"]
        if unknown := sorted(told.keys() - _ATTENTION.keys()):
            where = f"attn_cfg.{unknown[0]}"
            raise CheckpointError(f"{checkpoint.path}: {where} is {told[unknown[0]]!r}, which cannot be expressed")
        for key, value in {"causal": True, "mlp_dim": 0}.items():
            if told[key] != value:
                raise CheckpointError(f"{checkpoint.path}: attn_cfg.{key} is {told[key]!r}; only {value!r} is known")
        count = len(fields["layers"])
        if wrong := [i for i in places if type(i) is not int or not 0 <= i < count]:
            raise CheckpointError(f"{checkpoint.path}: attn_layer_idx has {wrong[0]!r}, of {count} layers")
        attention = {"mixer": self.attention(told, c["d_model"])}
        fields["layers"] = [attention if i in places else layer for i, layer in enumerate(fields["layers"])]
        return fields

    def attention(self, told: dict[str, Any], width: int) -> dict[str, Any]:
        """The options of the attention of a config."""
        size, turned = told["head_dim"] or width // told["num_heads"], told["rotary_emb_dim"]
        rotary = {
            "theta": float(told["rotary_emb_base"]),
            "dim": None if turned == size else turned,
            "interleaved": told["rotary_emb_interleaved"],
        }
        return {
            "name": "attention",
            "num_heads": told["num_heads"],
            "num_kv_heads": told["num_heads_kv"],
            "head_dim": size,
            "qkv_bias": told["qkv_proj_bias"],
            "out_bias": told["out_proj_bias"],
            "scale": told["softmax_scale"],
            "conv": told["d_conv"] or None,
            "conv_bias": bool(told["d_conv"]),
            "conv_activation": None if told["d_conv"] else "silu",
            "rotary": rotary if turned else None,
        }

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layers = config.spec.layers
        places = [i for i, layer in enumerate(layers) if layer.mixer.name == "attention"]
        if not places or len(places) == len(layers):
            raise ExportError("needs layers of attention and layers of mamba2")
        others = [layer.plain() for layer in layers if layer.mixer.name != "attention"]
        values = super().config(ZooConfig(**{**config.spec.plain(), "layers": others}))
        mixer: Any = layers[places[0]].mixer
        rotary = mixer.rotary
        if rotary is not None and rotary.scaling is not None:
            raise ExportError(f"layers.{places[0]}.mixer.rotary.scaling: the module scales no positions")
        turned = {} if rotary is None else {
            "rotary_emb_dim": rotary.dim or mixer.head_dim,
            "rotary_emb_base": rotary.theta,
            "rotary_emb_interleaved": rotary.interleaved,
        }  # fmt: skip
        attention = {
            "causal": True,
            "num_heads": mixer.num_heads,
            "num_heads_kv": mixer.kv_heads,
            "head_dim": mixer.head_dim,
            "qkv_proj_bias": mixer.qkv_bias,
            "out_proj_bias": mixer.out_bias,
            "softmax_scale": mixer.scale,
            "d_conv": mixer.conv or 0,
            **turned,
        }
        return {**values, "n_layer": len(layers), "attn_layer_idx": places, "attn_cfg": attention}

    def mixer_entries(self, theirs: str, ours: str, mixer: Any, width: int) -> Iterator[Entry]:
        if mixer.name != "attention":
            yield from super().mixer_entries(theirs, ours, mixer, width)
            return
        sizes = [n * mixer.head_dim for n in (mixer.num_heads, mixer.kv_heads, mixer.kv_heads)]
        for parameter in ("weight", "bias") if mixer.qkv_bias else ("weight",):
            yield split(f"{theirs}in_proj.{parameter}", [f"{ours}{n}_proj.{parameter}" for n in "qkv"], sizes)
        if mixer.conv:
            yield Entry(
                (f"{theirs}conv1d.weight",),
                tuple(f"{ours}{n}_conv.weight" for n in "qkv"),
                lambda t: [part.squeeze(1).contiguous() for part in t[0].split(sizes)],
                lambda t: [torch.cat(list(t)).unsqueeze(1)],
            )
            yield split(f"{theirs}conv1d.bias", [f"{ours}{n}_conv.bias" for n in "qkv"], sizes)
        for parameter in ("weight", "bias") if mixer.out_bias else ("weight",):
            yield same(f"{theirs}out_proj.{parameter}", f"{ours}o_proj.{parameter}")
