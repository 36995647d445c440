"""OLMo Hybrid of transformers: gated DeltaNet in most layers, attention with norms behind its outputs in the others.

Names are those that the class writes, for which it has others itself; both are read. The norm of DeltaNet's heads has
an epsilon of 1e-5, whatever the config says. The released model has no positions; with a `rope_theta` it would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.config import LayerSpec, ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, pairs, same
from zoo.convert.layouts.rope import read_rope, write_rope
from zoo.convert.teachers.adapter import common_values
from zoo.errors import CheckpointError, ExportError
from zoo.mixers.gated_delta_net import GatedDeltaNetConfig
from zoo.transformers_keys import TOKEN_IDS, present

_HEAD_NORM_EPS = 1e-5
_NORMS = {
    "attention": {"feedforward_layer_norm": "mixer_norm", "post_feedforward_layernorm": "ffn_norm"},
    "gated_delta_net": {"attention_layer_norm": "mixer_norm", "feedforward_layer_norm": "ffn_norm"},
}


@register_family
class OlmoHybrid(Family):
    """`OlmoHybridForCausalLM`, as in allenai/Olmo-Hybrid-7B."""

    layout = "transformers"
    name = "olmo_hybrid"
    about = "OlmoHybridForCausalLM"
    mixers = ("attention", "gated_delta_net")
    older = ((r"post_attention_layernorm", "feedforward_layer_norm"), (r"input_layernorm", "attention_layer_norm"))

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == "olmo_hybrid"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = checkpoint.config
        if c.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{checkpoint.path}: hidden_act is {c['hidden_act']!r}; only 'silu' can be expressed")
        count, ffn = c["num_hidden_layers"], {"name": "gated_mlp", "hidden_size": c["intermediate_size"]}
        layers = {
            "linear_attention": {"mixer": _delta_net(checkpoint), "ffn": ffn},
            "full_attention": {"mixer": _attention(c), "ffn": ffn, "block": "output_norm"},
        }
        kinds = c.get("layer_types") or [("linear_attention", "full_attention")[i % 4 == 3] for i in range(count)]
        if len(kinds) != count or set(kinds) - set(layers):
            raise CheckpointError(f"{checkpoint.path}: layer_types is {kinds!r}, of {count} layers")
        return {
            "vocab_size": c["vocab_size"],
            "hidden_size": c["hidden_size"],
            "max_position_embeddings": c.get("max_position_embeddings", 65536),
            "layers": [layers[kind] for kind in kinds],
            "norm_eps": c.get("rms_norm_eps", 1e-6),
            "tie_word_embeddings": c.get("tie_word_embeddings", False),
            "initializer_range": c.get("initializer_range", 0.02),
            **present(c, *TOKEN_IDS),
        }

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield same("model.embed_tokens.weight", "model.embed_tokens.weight")
        for i, layer in enumerate(config.spec.layers):
            name, mixer = f"model.layers.{i}.", layer.mixer.resolved(config.hidden_size)
            yield from pairs(name, name, _NORMS[mixer.name])
            yield from pairs(f"{name}mlp.", f"{name}ffn.", {n: n for n in ("gate_proj", "up_proj", "down_proj")})
            if mixer.name == "attention":
                yield from _attention_entries(f"{name}self_attn.", f"{name}mixer.", mixer.qkv_bias)
            else:
                yield from _delta_net_entries(f"{name}linear_attn.", f"{name}mixer.")
        yield same("model.norm.weight", "model.norm.weight")
        if not config.tie_word_embeddings:
            yield same("lm_head.weight", "lm_head.weight")

    def entries_of(self, config: ZooConfig, checkpoint: Checkpoint) -> Iterator[Entry]:
        """As the class writes them, the three convolutions are equal parts of one, whatever their sizes."""
        for entry in self.entries(config):
            first = checkpoint.shapes.get(entry.theirs[0], ())
            if entry.theirs[0].endswith(".q_conv1d.weight") and first:
                sizes = _sizes(next(x.mixer for x in config.spec.layers if x.mixer.name == "gated_delta_net"))
                yield _from_equal_parts(entry, sizes) if first[0] == math.ceil(sum(sizes) / 3) else entry
            else:
                yield entry

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layers = config.spec.layers
        mixers = [layer.mixer.resolved(config.hidden_size) for layer in layers]
        kinds = [m.name for m in mixers]
        if len(set(kinds)) != 2:
            raise ExportError("needs layers of attention and layers of gated_delta_net")
        _check_layers(layers)
        attention: Any = mixers[kinds.index("attention")]
        delta: Any = mixers[kinds.index("gated_delta_net")]
        turned = {} if attention.rotary is None else write_rope(attention.rotary, attention.head_dim)
        if "partial_rotary_factor" in turned:
            raise ExportError(f"layers.{kinds.index('attention')}.mixer.rotary.dim: the class turns whole heads")
        return {
            **common_values(config, "olmo_hybrid", self.about),
            "hidden_size": config.hidden_size,
            "intermediate_size": layers[0].ffn.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "attention_bias": attention.qkv_bias,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": turned or None,
            "layer_types": ["full_attention" if k == "attention" else "linear_attention" for k in kinds],
            "linear_num_key_heads": delta.num_groups,
            "linear_num_value_heads": delta.num_heads,
            "linear_key_head_dim": delta.head_dim,
            "linear_value_head_dim": delta.value_dim,
            "linear_conv_kernel_dim": delta.conv,
            "linear_allow_neg_eigval": delta.allow_neg_eigval,
        }


def _check_layers(layers: list[LayerSpec]) -> None:
    """Raise ExportError for what the class has in every layer and a layer here has not."""
    for i, layer in enumerate(layers):
        if layer.ffn is None or layer.ffn.name != "gated_mlp":
            raise ExportError(f"layers.{i}.ffn is {getattr(layer.ffn, 'name', None)}; its blocks have gated_mlp")
        if layer.mixer.name == "attention" and layer.block != "output_norm":
            raise ExportError(f"layers.{i}.block: its attention has its norm behind its output, and norms of all heads")
        if layer.mixer.name == "gated_delta_net" and layer.mixer.conv is None:
            raise ExportError(f"layers.{i}.mixer.conv is None; its layers have a convolution: conv 4")


def _attention(c: dict[str, Any]) -> dict[str, Any]:
    heads, bias = c.get("num_attention_heads", 30), c.get("attention_bias", False)
    size = c.get("head_dim") or c["hidden_size"] // heads
    theta = (c.get("rope_parameters") or {}).get("rope_theta") or c.get("rope_theta")
    return {
        "name": "attention",
        "num_heads": heads,
        "num_kv_heads": c.get("num_key_value_heads") or heads,
        "head_dim": size,
        "qkv_bias": bias,
        "out_bias": bias,
        "qk_norm": True,
        "qk_norm_span": "all",
        "qk_norm_eps": c.get("rms_norm_eps", 1e-6),
        "rotary": None if theta is None else read_rope({"max_position_embeddings": 65536, **c}, size),
    }


def _delta_net(checkpoint: Checkpoint) -> dict[str, Any]:
    c = checkpoint.config
    heads = c.get("num_attention_heads", 30)
    groups = c.get("linear_num_key_heads") or heads
    size = c.get("linear_key_head_dim") or int(0.75 * c["hidden_size"] / groups)
    return {
        "name": "gated_delta_net",
        "num_heads": c.get("linear_num_value_heads") or heads,
        "num_groups": groups,
        "head_dim": size,
        "value_head_dim": c.get("linear_value_head_dim") or 2 * size,
        "conv": c.get("linear_conv_kernel_dim", 4),
        "head_norm_eps": _HEAD_NORM_EPS,
        "allow_neg_eigval": c.get("linear_allow_neg_eigval", True),
    }


def _attention_entries(theirs: str, ours: str, bias: bool) -> Iterator[Entry]:
    parameters = ("weight", "bias") if bias else ("weight",)
    yield from pairs(theirs, ours, {f"{n}_proj": f"{n}_proj" for n in "qkvo"}, parameters)
    yield from pairs(theirs, ours, {"q_norm": "q_norm", "k_norm": "k_norm"})


def _delta_net_entries(theirs: str, ours: str) -> Iterator[Entry]:
    yield from pairs(theirs, ours, {f"{n}_proj": f"{n}_proj" for n in ("q", "k", "v", "a", "b", "g", "o")})
    yield from pairs(theirs, ours, {"o_norm": "head_norm"})
    yield same(f"{theirs}A_log", f"{ours}A_log")
    yield same(f"{theirs}dt_bias", f"{ours}dt_bias")
    yield Entry(
        tuple(f"{theirs}{n}_conv1d.weight" for n in "qkv"),
        tuple(f"{ours}{n}_conv.weight" for n in "qkv"),
        lambda tensors: [t.squeeze(1) for t in tensors],
        lambda tensors: [t.unsqueeze(1) for t in tensors],
    )


def _sizes(options: GatedDeltaNetConfig) -> list[int]:
    """Channels of queries, keys and values."""
    keys = (options.num_groups or options.num_heads) * options.head_dim
    return [keys, keys, options.num_heads * options.value_dim]


def _from_equal_parts(entry: Entry, sizes: list[int]) -> Entry:
    def read(tensors: list[Tensor]) -> list[Tensor]:
        return [piece.squeeze(1).contiguous() for piece in torch.cat(list(tensors)).split(sizes)]

    def write(tensors: list[Tensor]) -> list[Tensor]:
        return list(torch.cat(list(tensors)).unsqueeze(1).chunk(3))

    return Entry(entry.theirs, entry.ours, read, write)
