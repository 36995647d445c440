"""Qwen3-Next of transformers: gated DeltaNet, every fourth layer attention with an output gate, experts beside a shared
one.

Its projections are packed head by head: queries with the gate of attention, and of each group of value heads in
DeltaNet queries, keys, values and gate, or beta and decay. All norms but that of DeltaNet's heads multiply by
1 + weight; they stay so here, for 1 + weight does not hold all the bits of the weight. What predicts further tokens
(`mtp.`) is not read, nor does the class. A model without experts is one whose layers all have the dense MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, pairs, same
from zoo.convert.layouts.moe import Qwen2Moe
from zoo.convert.layouts.rope import write_rope
from zoo.errors import CheckpointError, ExportError

_KINDS = {"attention": "full_attention", "gated_delta_net": "linear_attention"}


@register_family
class Qwen3Next(Qwen2Moe):
    """`Qwen3NextForCausalLM`, as in Qwen/Qwen3-Next-80B-A3B-Instruct."""

    name = "qwen3_next"
    mixers = ("attention", "gated_delta_net")
    architecture = "Qwen3NextForCausalLM"
    norm = "zero_centered_rms_norm"
    only: ClassVar = {"hidden_act": "silu"}
    defaults: ClassVar = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 32768, "head_dim": 256,
        "partial_rotary_factor": 0.25, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "decoder_sparse_step": 1, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 10, "num_experts": 512, "norm_topk_prob": True, "router_aux_loss_coef": 0.001,
        "mlp_only_layers": None, "layer_types": None, "full_attention_interval": 4,
    }  # fmt: skip

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = {**self.defaults, **checkpoint.config}
        kinds = c["layer_types"]
        if kinds is not None and (len(kinds) != c["num_hidden_layers"] or set(kinds) - set(_KINDS.values())):
            raise CheckpointError(f"{checkpoint.path}: layer_types is {kinds!r}, of {c['num_hidden_layers']} layers")
        return super().fields(checkpoint)

    def mixer(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        whole = (i + 1) % c["full_attention_interval"] == 0
        if c["layer_types"] is not None:
            whole = c["layer_types"][i] == "full_attention"
        if whole:
            return super().mixer(c, i)
        return {
            "name": "gated_delta_net",
            "num_heads": c["linear_num_value_heads"],
            "num_groups": c["linear_num_key_heads"],
            "head_dim": c["linear_key_head_dim"],
            "value_head_dim": c["linear_value_head_dim"],
            "conv": c["linear_conv_kernel_dim"],
            "head_norm_eps": c["rms_norm_eps"],
        }

    def attention(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        bias = c["attention_bias"]
        return {
            "qkv_bias": bias,
            "out_bias": bias,
            "gate": True,
            "gate_activation": "sigmoid",
            "gate_bias": bias,
            "qk_norm": True,
            "qk_norm_zero_centered": True,
            "qk_norm_eps": c["rms_norm_eps"],
        }

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layers = config.spec.layers
        kinds = [layer.mixer.name for layer in layers]
        if set(kinds) != set(_KINDS):
            raise ExportError("needs layers of attention and layers of gated_delta_net")
        for i, layer in enumerate(layers):
            if layer.ffn is None or layer.ffn.name not in ("gated_mlp", "moe"):
                name = getattr(layer.ffn, "name", None)
                raise ExportError(f"layers.{i}.ffn is {name}; its blocks have gated_mlp or moe")
            if layer.mixer.name == "attention" and not (layer.mixer.gate and layer.mixer.qk_norm):
                raise ExportError(f"layers.{i}.mixer: its attention has qk_norm and gate, a sigmoid")
            if layer.mixer.name == "gated_delta_net" and layer.mixer.conv is None:
                raise ExportError(f"layers.{i}.mixer.conv is None; its layers have a convolution: conv 4")
        delta: Any = layers[kinds.index("gated_delta_net")].mixer.resolved(config.hidden_size)
        return {
            **self._channel_mixers(config),
            **self.heads(config),
            "layer_types": [_KINDS[kind] for kind in kinds],
            "linear_num_key_heads": delta.num_groups or delta.num_heads,
            "linear_num_value_heads": delta.num_heads,
            "linear_key_head_dim": delta.head_dim,
            "linear_value_head_dim": delta.value_head_dim,
            "linear_conv_kernel_dim": delta.conv,
        }

    def heads(self, config: ZooConfig) -> dict[str, Any]:
        mixer: Any = next(layer.mixer for layer in config.spec.layers if layer.mixer.name == "attention")
        return {
            "num_attention_heads": mixer.num_heads,
            "num_key_value_heads": mixer.kv_heads,
            "head_dim": mixer.head_dim,
            "attention_bias": mixer.qkv_bias,
            "rope_parameters": {"partial_rotary_factor": 1.0, **write_rope(mixer.rotary, mixer.head_dim)},
        }

    def _channel_mixers(self, config: ZooConfig) -> dict[str, Any]:
        layers = config.spec.layers
        dense = [i for i, layer in enumerate(layers) if layer.ffn.name == "gated_mlp"]
        values = {**self.common(config), "hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": dense}
        if dense:
            values["intermediate_size"] = layers[dense[0]].ffn.hidden_size
        moe = next((layer.ffn for layer in layers if layer.ffn.name == "moe"), None)
        if moe is None:
            return {**values, "num_experts": 0, "num_experts_per_tok": 0}
        return {
            **values,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.normalize,
            "moe_intermediate_size": moe.hidden_size,
            "shared_expert_intermediate_size": moe.shared_size or 0,
            "router_aux_loss_coef": moe.balance_loss,
        }

    def is_dropped(self, name: str) -> bool:
        return super().is_dropped(name) or name.startswith("mtp.")

    def mixer_entries(self, mixer: Any, theirs: str, ours: str) -> Iterator[Entry]:
        if mixer.name == "gated_delta_net":
            yield from delta_net_entries(mixer, f"{theirs}linear_attn.", ours)
            return
        theirs += "self_attn."
        for parameter in ("weight", "bias") if mixer.qkv_bias else ("weight",):
            names = [f"{ours}q_proj.{parameter}", f"{ours}g_proj.{parameter}"]
            yield packed(f"{theirs}q_proj.{parameter}", names, mixer.num_heads, [mixer.head_dim, mixer.head_dim])
            yield from pairs(theirs, ours, {f"{letter}_proj": f"{letter}_proj" for letter in "kvo"}, (parameter,))
        yield from pairs(theirs, ours, {"q_norm": "q_norm", "k_norm": "k_norm"})


def delta_net_entries(mixer: Any, theirs: str, ours: str) -> Iterator[Entry]:
    """Those of a DeltaNet layer with the options `mixer`; the names begin with `theirs` and `ours`."""
    K, V = mixer.head_dim, mixer.value_dim
    groups = mixer.num_groups or mixer.num_heads
    each = mixer.num_heads // groups
    qkvz = [f"{ours}{letter}_proj.weight" for letter in "qkvg"]
    yield packed(f"{theirs}in_proj_qkvz.weight", qkvz, groups, [K, K, each * V, each * V])
    yield packed(f"{theirs}in_proj_ba.weight", [f"{ours}b_proj.weight", f"{ours}a_proj.weight"], groups, [each, each])
    convs, sizes = [f"{ours}{letter}_conv.weight" for letter in "qkv"], [groups * K, groups * K, mixer.num_heads * V]
    yield Entry(
        (f"{theirs}conv1d.weight",),
        tuple(convs),
        lambda t: [part.squeeze(1).contiguous() for part in t[0].split(sizes)],
        lambda t: [torch.cat(list(t)).unsqueeze(1)],
    )
    yield same(f"{theirs}A_log", f"{ours}A_log")
    yield same(f"{theirs}dt_bias", f"{ours}dt_bias")
    yield from pairs(theirs, ours, {"norm": "head_norm", "out_proj": "o_proj"})


def packed(theirs: str, ours: list[str], heads: int, sizes: list[int]) -> Entry:
    """Rows of several of ours in one of theirs, head by head; `sizes` of each in a head."""

    def read(tensors: list[Tensor]) -> list[Tensor]:
        parts = tensors[0].unflatten(0, (heads, -1)).split(sizes, 1)
        return [part.flatten(0, 1) for part in parts]

    def write(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat([t.unflatten(0, (heads, -1)) for t in tensors], 1).flatten(0, 1)]

    return Entry((theirs,), tuple(ours), read, write)
