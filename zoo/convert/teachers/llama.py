"""Llama and the models that differ from it by an option: Mistral, Qwen2, Qwen3, SmolLM2 (which is a Llama), SmolLM3."""

from __future__ import annotations

from typing import Any

from zoo.convert.teachers.adapter import Packed, TeacherAdapter, register_teacher, rotary_of
from zoo.errors import ConversionError


@register_teacher
class Llama(TeacherAdapter):
    """Pre-norm, RMSNorm, rotary positions, gated MLP, grouped keys and values.

    Mistral adds a window to every layer, Qwen2 biases on queries, keys and values and a window on some layers, Qwen3
    a norm on the heads of queries and keys, SmolLM3 layers without positions.
    """

    family = "llama"
    model_types = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
    architectures = {  # noqa: RUF012
        "LlamaForCausalLM": "causal-lm",
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
