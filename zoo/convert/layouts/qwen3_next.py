"""Qwen3-Next of transformers: gated DeltaNet, every fourth layer attention with an output gate, experts beside a shared
one.

Its projections are packed head by head: queries with the gate of attention, and of each group of value heads in
DeltaNet queries, keys, values and gate, or beta and decay. All norms but that of DeltaNet's heads multiply by
1 + weight; they stay so here, for 1 + weight does not hold all the bits of the weight. What predicts further tokens
(`mtp.`) is not read, nor does the class. A model without experts is one whose layers all have the dense MLP.

Students of Qwen3 go out too: their attention gets a gate of sigmoid(0) with twice the output projection, their norms
weights less one. Those of their DeltaNet layers have no bias of the gate, which the class has not, and start closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, mapped, pairs, same
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

    def conversion(self, mixer: str, config: ZooConfig) -> dict[str, Any]:
        heads = next((layer.mixer.num_heads for layer in config.spec.layers if layer.mixer.name == "attention"), None)
        if mixer != "gated_delta_net" or heads is None:
            return {}
        off = dict.fromkeys(("gate_bias", "qk_norm", "qkv_bias", "out_bias"), False)
        eps = config.spec.norm_eps
        return {"conv": 4, "rotary": None, "num_kv_heads": None, "num_groups": heads, "head_norm_eps": eps, **off}

    def written(self, config: ZooConfig) -> ZooConfig:
        fields = config.spec.plain()
        fields["norm"] = self.norm if fields["norm"] == "rms_norm" else fields["norm"]
        for layer in fields["layers"]:
            mixer = layer["mixer"]
            if mixer["name"] == "attention" and mixer["qk_norm"] and mixer["qk_norm_span"] == "head":
                mixer["qk_norm_zero_centered"] = True
            if mixer["name"] == "attention" and not mixer["gate"]:
                mixer |= {"gate": True, "gate_activation": "sigmoid", "gate_bias": mixer["qkv_bias"]}
        return ZooConfig(**fields)

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layers = config.spec.layers
        kinds = [layer.mixer.name for layer in layers]
        if set(kinds) != set(_KINDS):
            raise ExportError("needs layers of attention and layers of gated_delta_net")
        for i, layer in enumerate(layers):
            if layer.ffn is None or layer.ffn.name not in ("gated_mlp", "moe"):
                name = getattr(layer.ffn, "name", None)
                raise ExportError(f"layers.{i}.ffn is {name}; its blocks have gated_mlp or moe")
            if layer.mixer.name == "attention" and not layer.mixer.qk_norm:
                raise ExportError(f"layers.{i}.mixer.qk_norm: its attention has norms of queries and keys")
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
        parameters = ("weight", "bias") if mixer.qkv_bias else ("weight",)
        for parameter in parameters:
            names = [f"{ours}q_proj.{parameter}", f"{ours}g_proj.{parameter}"]
            both = packed(f"{theirs}q_proj.{parameter}", names, mixer.num_heads, [mixer.head_dim, mixer.head_dim])
            yield both if mixer.gate else _with_zero_gate(both)
        yield from pairs(theirs, ours, {"k_proj": "k_proj", "v_proj": "v_proj"}, parameters)
        o_proj = same if mixer.gate else _doubled
        yield o_proj(f"{theirs}o_proj.weight", f"{ours}o_proj.weight")
        if mixer.qkv_bias:
            yield same(f"{theirs}o_proj.bias", f"{ours}o_proj.bias")
        norm = same if mixer.qk_norm_zero_centered else _less_one
        yield from (norm(f"{theirs}{n}_norm.weight", f"{ours}{n}_norm.weight") for n in "qk")

    def norms(self, config: ZooConfig, place: str, names: dict[str, str]) -> Iterator[Entry]:
        norm = same if config.spec.norm == self.norm else _less_one
        return (norm(f"{place}{name}.weight", f"{place}{ours}.weight") for name, ours in names.items())


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


def _with_zero_gate(both: Entry) -> Entry:
    """Queries with a gate that is the same everywhere, of `packed` queries and gate."""
    return Entry(
        both.theirs, both.ours[:1], lambda t: both.read(t)[:1], lambda t: both.write([t[0], torch.zeros_like(t[0])])
    )


def _doubled(theirs: str, ours: str) -> Entry:
    """What goes through a gate of a half."""
    return mapped(theirs, ours, lambda t: t / 2, lambda t: 2 * t)


def _less_one(theirs: str, ours: str) -> Entry:
    """The weight of a plain norm as that of one that adds 1 to it."""

    def write(weight: Tensor) -> Tensor:
        less = weight - 1
        if not weight.is_meta and (far := (less + 1 - weight).abs().max().item()) > 1e-6:
            kind = str(weight.dtype).removeprefix("torch.")
            raise ExportError(f"{ours}: its norm adds 1 to the weights, which changes these by {far:.1e} in {kind}")
        return less

    return mapped(theirs, ours, lambda t: t + 1, write)
