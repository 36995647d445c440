"""Hymba as nvidia/Hymba-1.5B-Base keeps it: attention and Mamba of a layer behind one projection.

The class is NVIDIA's own, beside the weights (`modeling_hymba.py`, `configuration_hymba.py`); a folder that is written
names it by repository. Its `ntk` positions are those of a larger theta.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, depthwise, pairs, same, split
from zoo.convert.teachers.adapter import common_values
from zoo.errors import CheckpointError, ExportError
from zoo.transformers_keys import TOKEN_IDS, present

_DEFAULTS = {
    "vocab_size": 65536, "tie_word_embeddings": False, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "initializer_range": 0.02,
    "rms_norm_eps": 1e-6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None,
    "max_position_embeddings": 262144, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_dt_rank": "auto", "kv_reuse_group": None, "global_attn_idx": None, "kq_head_dim": -1, "v_head_dim": -1,
    "rope": False, "rope_theta": 10000.0, "rope_type": None, "num_memory_tokens": 0,
}  # fmt: skip
# What can be expressed, and where theirs is another when a config is silent, that.
_FIXED = {
    "num_experts": 1, "num_mamba": 1, "mamba_proj_bias": False, "mamba_conv_bias": True, "mamba_inner_layernorms": True,
    "hidden_act": "silu", "mlp_hidden_act": "silu", "kv_weight_reuse": False, "kv_reuse_every_i_layer": -1,
    "memory_tokens_interspersed_every": 0, "attn_hidden_size": -1, "kq_norm": "none",
}  # fmt: skip
_SILENT = {"num_experts": 16}
_CODE = "nvidia/Hymba-1.5B-Base--"


@register_family
class Hymba(Family):
    """`HymbaForCausalLM`, as in nvidia/Hymba-1.5B-Base."""

    layout = "transformers"
    name = "hymba"
    about = "HymbaForCausalLM of nvidia/Hymba-1.5B-Base"
    mixers = ("hymba",)

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == "hymba"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = {**_DEFAULTS, **_FIXED, **_SILENT, **checkpoint.config}
        c["kq_norm"] = c["kq_norm"] or "none"
        for key, value in _FIXED.items():
            if c[key] != value:
                raise CheckpointError(f"{checkpoint.path}: {key} is {c[key]!r}; only {value!r} can be expressed")
        ffn = {"name": "gated_mlp", "hidden_size": c["intermediate_size"]}
        return {
            "vocab_size": c["vocab_size"],
            "hidden_size": c["hidden_size"],
            "max_position_embeddings": c["max_position_embeddings"],
            "meta_tokens": c["num_memory_tokens"],
            "layers": [{"mixer": mixer, "ffn": ffn} for mixer in _mixers(checkpoint, c)],
            "norm_eps": c["rms_norm_eps"],
            "tie_word_embeddings": c["tie_word_embeddings"],
            "initializer_range": c["initializer_range"],
            **present(c, *TOKEN_IDS),
        }

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield same("model.embed_tokens.weight", "model.embed_tokens.weight")
        if config.meta_tokens:
            yield same("model.memory_tokens", "model.meta_tokens.weight")
        for i, layer in enumerate(config.spec.layers):
            name = f"model.layers.{i}."
            norms = {"input_layernorm": "mixer_norm", "pre_moe_layernorm": "ffn_norm"}
            yield from pairs(name, name, norms)
            yield from _mixer_entries(f"{name}mamba.", f"{name}mixer.", layer.mixer.resolved(config.hidden_size))
            parts = {f"{n}_proj": f"{n}_proj" for n in ("gate", "up", "down")}
            yield from pairs(f"{name}moe.experts.0.", f"{name}ffn.", parts)
        yield same("model.final_layernorm.weight", "model.norm.weight")
        if not config.tie_word_embeddings:
            yield same("lm_head.weight", "lm_head.weight")

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layers, width = config.spec.layers, config.hidden_size
        mixers: list[Any] = [layer.mixer.resolved(width) for layer in layers]
        ffn, first = layers[0].ffn, mixers[0]
        if ffn is None or ffn.name != "gated_mlp" or any(layer.ffn != ffn for layer in layers):
            raise ExportError("layers: each has the same gated_mlp there")
        if (first.num_heads * first.value_dim) % width:
            raise ExportError(f"value_head_dim: heads of {first.value_dim} are no multiple of the width {width}")
        windows = {m.window for m in mixers} - {None}
        if len(windows) > 1:
            raise ExportError(f"window: has one size there, and here {sorted(windows)}")
        groups: dict[int, list[int]] = {}
        for i, mixer in enumerate(mixers):
            if mixer.kv_back is not None:
                groups.setdefault(i - mixer.kv_back, []).append(i)
        rotary = first.rotary
        return {
            **common_values(config, self.name, "HymbaForCausalLM"),
            "auto_map": {
                "AutoConfig": f"{_CODE}configuration_hymba.HymbaConfig",
                "AutoModelForCausalLM": f"{_CODE}modeling_hymba.HymbaForCausalLM",
            },
            **_FIXED,
            "num_experts_per_tok": 1,
            "hidden_size": width,
            "intermediate_size": ffn.resolved(width).hidden_size,
            "num_hidden_layers": len(layers),
            "layer_type": ["h"] * len(layers),
            "conv_dim": {str(i): first.num_heads * first.value_dim for i in range(len(layers))},
            "num_attention_heads": first.num_heads,
            "num_key_value_heads": first.kv_heads,
            "kq_head_dim": first.head_dim,
            "v_head_dim": first.value_dim,
            "rms_norm_eps": config.norm_eps,
            "max_position_embeddings": config.max_position_embeddings,
            "sliding_window": next(iter(windows), None),
            "global_attn_idx": [i for i, mixer in enumerate(mixers) if mixer.window is None],
            "kv_reuse_group": [[i, *readers] for i, readers in sorted(groups.items())] or None,
            "num_memory_tokens": config.meta_tokens,
            "mamba_expand": first.num_heads * first.value_dim // width,
            "mamba_d_state": first.state_dim,
            "mamba_d_conv": first.mamba_conv,
            "mamba_dt_rank": first.dt_rank or math.ceil(width / 16),
            "rope": rotary is not None,
            "rope_theta": 10000.0 if rotary is None else rotary.theta,
            "rope_type": None,
        }


def _mixers(checkpoint: Checkpoint, c: dict[str, Any]) -> list[dict[str, Any]]:
    """Options of each layer's mixer. Raises CheckpointError."""
    layers, heads, width = c["num_hidden_layers"], c["num_attention_heads"], c["hidden_size"]
    if set(c.get("layer_type") or ["h"]) != {"h"}:
        raise CheckpointError(f"{checkpoint.path}: layer_type is {c['layer_type']!r}; only 'h' can be expressed")
    keys = c["kq_head_dim"] if c["kq_head_dim"] > 0 else width // heads
    values = c["v_head_dim"] if c["v_head_dim"] > 0 else keys
    if heads * values != c["mamba_expand"] * width:
        raise CheckpointError(f"{checkpoint.path}: {heads} heads of {values} are not mamba_expand times hidden_size")
    rank = c["mamba_dt_rank"]
    mixer = {
        "name": "hymba",
        "num_heads": heads,
        "num_kv_heads": c["num_key_value_heads"] or heads,
        "head_dim": keys,
        "value_head_dim": values,
        "rotary": _rotary(checkpoint, c, keys),
        "window": c["sliding_window"],
        "sinks": c["num_memory_tokens"] if c["sliding_window"] else 0,
        "state_dim": c["mamba_d_state"],
        "dt_rank": math.ceil(width / 16) if rank == "auto" else rank,
        "mamba_conv": c["mamba_d_conv"],
        "norm_eps": c["rms_norm_eps"],
    }
    found = [
        {**mixer, "window": None, "sinks": 0} if i in (c["global_attn_idx"] or []) else mixer for i in range(layers)
    ]
    for producer, *readers in c["kv_reuse_group"] or []:
        for i in readers:
            if not 0 <= producer < i < layers or found[i]["window"] is None or found[producer]["window"] is None:
                group = [producer, *readers]
                raise CheckpointError(f"{checkpoint.path}: kv_reuse_group has {group}, not windows one after another")
            found[i] = {**found[i], "kv_back": i - producer}
    return found


def _rotary(checkpoint: Checkpoint, c: dict[str, Any], head_dim: int) -> dict[str, Any] | None:
    kind, theta = c["rope_type"] or "default", c["rope_theta"]
    if not c["rope"]:
        return None
    if kind == "ntk":  # of factor 2
        longer = c["max_position_embeddings"] / c["orig_max_position_embeddings"]
        theta *= (2 * longer - 1) ** (head_dim / (head_dim - 2))
    elif kind != "default":
        raise CheckpointError(f"{checkpoint.path}: rope_type is {kind!r}; known are default and ntk")
    return {"theta": theta}


def _mixer_entries(theirs: str, ours: str, options: Any) -> Iterator[Entry]:
    values, own = options.num_heads * options.value_dim, options.kv_back is None
    parts = {"q_proj": options.num_heads * options.head_dim}
    if own:
        parts |= {"k_proj": options.kv_heads * options.head_dim, "v_proj": options.kv_heads * options.value_dim}
    parts["mamba.in_proj"] = 2 * values
    yield split(f"{theirs}in_proj.weight", [f"{ours}{n}.weight" for n in parts], list(parts.values()))
    yield same(f"{theirs}out_proj.weight", f"{ours}o_proj.weight")
    yield depthwise(f"{theirs}conv1d.weight", f"{ours}mamba.conv.weight")
    yield same(f"{theirs}conv1d.bias", f"{ours}mamba.conv.bias")
    yield from pairs(theirs, f"{ours}mamba.", {"x_proj.0": "x_proj", "dt_proj.0": "dt_proj"})
    yield same(f"{theirs}dt_proj.0.bias", f"{ours}mamba.dt_bias")
    for name in ("A_log", "D"):
        yield same(f"{theirs}{name}.0", f"{ours}mamba.{name}")
    yield from pairs(theirs, f"{ours}mamba.bcdt_norms.", {f"{n}_layernorm": n for n in ("dt", "B", "C")})
    yield from pairs(theirs, ours, {"pre_avg_layernorm1": "attention_norm", "pre_avg_layernorm2": "mamba_norm"})
