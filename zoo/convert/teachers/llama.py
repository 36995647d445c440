"""Llama and what differs from it by an option: Mistral, Ministral, Qwen2, Qwen3, SmolLM2 (a Llama), SmolLM3."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.convert.teachers.adapter import (
    Packed,
    TeacherAdapter,
    common_values,
    described,
    register_teacher,
    rotary_of,
)
from zoo.errors import ConversionError, ExportError


@register_teacher
class Llama(TeacherAdapter):
    """Pre-norm, RMSNorm, rotary positions, gated MLP, grouped keys and values.

    Mistral adds a window to every layer, Ministral to some, Qwen2 biases on queries, keys and values and a window on
    some layers, Qwen3 a norm on the heads of queries and keys, SmolLM3 layers without positions.
    """

    family = "llama"
    model_types = ("llama", "ministral", "mistral", "qwen2", "qwen3", "smollm3")
    architectures = {  # noqa: RUF012
        "LlamaForCausalLM": "causal-lm",
        "MinistralForCausalLM": "causal-lm",
        "MistralForCausalLM": "causal-lm",
        "Qwen2ForCausalLM": "causal-lm",
        "Qwen3ForCausalLM": "causal-lm",
        "SmolLM3ForCausalLM": "causal-lm",
    }

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        kind = config.model_type
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bias = bool(getattr(config, "attention_bias", False)) and kind != "mistral"
        rotary = rotary_of(config, head_dim)
        heads = {
            "name": "attention",
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
            "head_dim": head_dim,
            "qkv_bias": bias or kind == "qwen2",
            "out_bias": bias and kind != "qwen2",
            "qk_norm": kind == "qwen3",
            "qk_norm_eps": config.rms_norm_eps,
        }
        ffn = {
            "name": "gated_mlp",
            "hidden_size": config.intermediate_size,
            "activation": config.hidden_act,
            "bias": bool(getattr(config, "mlp_bias", False)) and kind in ("llama", "smollm3"),
        }
        positioned = config.no_rope_layers if kind == "smollm3" else [1] * config.num_hidden_layers
        layers = [
            {"mixer": {**heads, "rotary": rotary if positioned[i] else None, "window": window}, "ffn": ffn}
            for i, window in enumerate(windows(config))
        ]
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "max_position_embeddings": config.max_position_embeddings,
            "layers": layers,
            "block": "pre_norm",
            "norm": "rms_norm",
            "norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": bool(config.tie_word_embeddings),
            "initializer_range": config.initializer_range,
        }

    def describe(self, config: ZooConfig) -> dict[str, Any]:
        """The class of these that has what the layers have; one without windows or biases where none is needed."""
        mixers, ffns = described(config, ("attention",), ("gated_mlp",))
        first, kind = mixers[0], _class_of(mixers, ffns[0], config.hidden_size)
        if any(m.rotary is not None and m.rotary.dim is not None for m in mixers):
            raise ExportError("layers.0.mixer.rotary.dim: these classes turn whole heads")
        values = {
            **common_values(config, kind.lower(), f"{kind}ForCausalLM"),
            "hidden_size": config.hidden_size,
            "intermediate_size": ffns[0].hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": first.num_heads,
            "num_key_value_heads": first.kv_heads,
            "head_dim": first.head_dim,
            "hidden_act": ffns[0].activation,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.norm_eps,
        }
        turned = next((m.rotary for m in mixers if m.rotary is not None), None)
        if turned is not None:
            values["rope_parameters"] = turned.to_transformers(first.head_dim)
        if kind in ("Llama", "SmolLM3"):
            values |= {"attention_bias": first.qkv_bias, "mlp_bias": ffns[0].bias}
        if kind == "SmolLM3":
            values["no_rope_layers"] = [int(m.rotary is not None) for m in mixers]
        if kind != "Llama":
            values |= _window_values(kind, [m.window for m in mixers])
        return values

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        layer = {
            "input_layernorm": "mixer_norm",
            "post_attention_layernorm": "ffn_norm",
            **{f"self_attn.{n}": f"mixer.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
            **{f"mlp.{n}": f"ffn.{n}" for n in ("gate_proj", "up_proj", "down_proj")},
        }
        return {
            "model.embed_tokens": "model.embed_tokens",
            **{f"model.layers.{{i}}.{theirs}": f"model.layers.{{i}}.{ours}" for theirs, ours in layer.items()},
            "model.norm": "model.norm",
            "lm_head": "lm_head",
        }


def _class_of(mixers: list[Any], ffn: Any, width: int) -> str:
    first, windows = mixers[0], {m.window for m in mixers}
    if len(windows - {None}) > 1:
        raise ExportError(f"layers have windows of {sorted(windows - {None})}; these classes have one size")
    if first.qk_norm:
        return "Qwen3"
    if first.qkv_bias and not first.out_bias:
        return "Qwen2"
    if any(m.rotary is None for m in mixers) or (windows != {None} and (first.qkv_bias or ffn.bias)):
        return "SmolLM3"
    if windows == {None}:
        # Llama's config wants heads that divide the width, whatever their size; Mistral's does not.
        return "Llama" if first.qkv_bias or ffn.bias or width % first.num_heads == 0 else "Mistral"
    return "Ministral" if None in windows else "Mistral"


def _window_values(kind: str, windows: list[int | None]) -> dict[str, Any]:
    size = next((w for w in windows if w is not None), None)
    if kind == "Mistral":
        return {"sliding_window": size}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
    use = {} if kind == "Ministral" else {"use_sliding_window": size is not None}
    more = {"max_window_layers": 0} if kind in ("Qwen2", "Qwen3") else {}
    return {"sliding_window": size, "layer_types": kinds, **use, **more}


def windows(config: Any) -> list[int | None]:
    """The window of each layer; None where a layer sees everything."""
    n, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if config.model_type == "mistral":
        return [window] * n
    kinds = getattr(config, "layer_types", None)
    if kinds is None or config.model_type == "llama":
        return [None] * n
    for i, kind in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention"):
            raise ConversionError(
                f"layer_types.{i}={kind!r} is not known; only full_attention and sliding_attention are"
            )
    if len(kinds) != n:
        raise ConversionError(f"layer_types has {len(kinds)} entries, but num_hidden_layers is {n}")
    return [window if kind == "sliding_attention" else None for kind in kinds]
