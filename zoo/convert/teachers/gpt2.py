"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, one transposed matrix for queries, keys and values."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.convert.teachers.adapter import Packed, TeacherAdapter, common_values, described, register_teacher


@register_teacher
class GPT2(TeacherAdapter):
    """Pre-norm with biases everywhere; scores scaled as `scale_attn_weights` and `..._by_inverse_layer_idx` say.

    `reorder_and_upcast_attn` is an order of evaluation, not another function: it is ignored.
    """

    family = "gpt2"
    model_types = ("gpt2",)
    architectures = {"GPT2LMHeadModel": "causal-lm"}  # noqa: RUF012

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        head_dim = config.n_embd // config.n_head
        base = head_dim**-0.5 if config.scale_attn_weights else 1.0
        ffn = {
            "name": "mlp",
            "hidden_size": 4 * config.n_embd if config.n_inner is None else config.n_inner,
            "activation": config.activation_function,
        }

        def mixer(i: int) -> dict[str, Any]:
            scale = base / (i + 1) if config.scale_attn_by_inverse_layer_idx else base
            return {
                "name": "attention",
                "num_heads": config.n_head,
                "head_dim": head_dim,
                "qkv_bias": True,
                "out_bias": True,
                "scale": None if scale == head_dim**-0.5 else scale,
            }

        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.n_embd,
            "max_position_embeddings": config.n_positions,
            "positions": "learned",
            "layers": [{"mixer": mixer(i), "ffn": ffn} for i in range(config.n_layer)],
            "block": "pre_norm",
            "norm": "layer_norm",
            "norm_eps": config.layer_norm_epsilon,
            "embedding_dropout": config.embd_pdrop,
            "tie_word_embeddings": bool(config.tie_word_embeddings),
            "initializer_range": config.initializer_range,
        }

    def describe(self, config: ZooConfig) -> dict[str, Any]:
        mixers, ffns = described(config, ("attention",), ("mlp",))
        return {
            **common_values(config, "gpt2", "GPT2LMHeadModel"),
            "n_embd": config.hidden_size,
            "n_layer": config.num_hidden_layers,
            "n_head": mixers[0].num_heads,
            "n_positions": config.max_position_embeddings,
            "n_inner": ffns[0].hidden_size,
            "activation_function": ffns[0].activation,
            "layer_norm_epsilon": config.norm_eps,
            "embd_pdrop": config.embedding_dropout,
        }

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        theirs, ours = "transformer.h.{i}.", "model.layers.{i}."
        return {
            "transformer.wte": "model.embed_tokens",
            "transformer.wpe": "model.embed_positions",
            theirs + "ln_1": ours + "mixer_norm",
            theirs + "attn.c_attn": Packed(tuple(f"{ours}mixer.{n}_proj" for n in "qkv"), transposed=True),
            theirs + "attn.c_proj": Packed((ours + "mixer.o_proj",), transposed=True),
            theirs + "ln_2": ours + "ffn_norm",
            theirs + "mlp.c_fc": Packed((ours + "ffn.up_proj",), transposed=True),
            theirs + "mlp.c_proj": Packed((ours + "ffn.down_proj",), transposed=True),
            "transformer.ln_f": "model.norm",
            "lm_head": "lm_head",
        }
