"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745) and Pythia: parallel residual, rotary positions on part of a head."""

from __future__ import annotations

from typing import Any

from zoo.convert.teachers.adapter import Packed, TeacherAdapter, register_teacher, rotary_of


@register_teacher
class GPTNeoX(TeacherAdapter):
    """LayerNorm, biases, untied output; `use_parallel_residual=False` is the usual pre-norm block."""

    family = "gpt_neox"
    model_types = ("gpt_neox",)
    architectures = {"GPTNeoXForCausalLM": "causal-lm"}  # noqa: RUF012
    published = ((r"^lm_head\.", "embed_out."),)

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        head_dim = config.hidden_size // config.num_attention_heads
        mixer = {
            "name": "attention",
            "num_heads": config.num_attention_heads,
            "head_dim": head_dim,
            "qkv_bias": config.attention_bias,
            "out_bias": config.attention_bias,
            "rotary": rotary_of(config, head_dim),
        }
        ffn = {"name": "mlp", "hidden_size": config.intermediate_size, "activation": config.hidden_act}
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "max_position_embeddings": config.max_position_embeddings,
            "layers": [{"mixer": mixer, "ffn": ffn}] * config.num_hidden_layers,
            "block": "parallel" if config.use_parallel_residual else "pre_norm",
            "norm": "layer_norm",
            "norm_eps": config.layer_norm_eps,
            "embedding_dropout": config.hidden_dropout,
            "tie_word_embeddings": bool(config.tie_word_embeddings),
            "initializer_range": config.initializer_range,
        }

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        theirs, ours = "gpt_neox.layers.{i}.", "model.layers.{i}."
        return {
            "gpt_neox.embed_in": "model.embed_tokens",
            theirs + "input_layernorm": ours + "mixer_norm",
            theirs + "attention.query_key_value": Packed(
                tuple(f"{ours}mixer.{n}_proj" for n in "qkv"), by_head=config.num_attention_heads
            ),
            theirs + "attention.dense": ours + "mixer.o_proj",
            theirs + "post_attention_layernorm": ours + "ffn_norm",
            theirs + "mlp.dense_h_to_4h": ours + "ffn.up_proj",
            theirs + "mlp.dense_4h_to_h": ours + "ffn.down_proj",
            "gpt_neox.final_layer_norm": "model.norm",
            "lm_head": "lm_head",
        }
