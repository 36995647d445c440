"""OPT (Zhang et al. 2022, arXiv:2205.01068): learned positions from row 2 on, biases, a ReLU MLP.

All sizes are pre-norm but 350m, which is post-norm without a final norm, and whose word vectors are half as wide as the
model: linear maps without bias lead from them to the blocks, and from the last block back to them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from zoo.convert.teachers.adapter import Packed, TeacherAdapter, register_teacher


@register_teacher
class OPT(TeacherAdapter):
    """Positions count the real tokens of the attention mask, as ours do. `layerdrop` and dropout are left out."""

    family = "opt"
    model_types = ("opt",)
    architectures = {"OPTForCausalLM": "causal-lm"}  # noqa: RUF012
    only: ClassVar = {"layer_norm_elementwise_affine": (True,)}

    def spec(self, config: Any, task: str) -> dict[str, Any]:
        mixer = {
            "name": "attention",
            "num_heads": config.num_attention_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "qkv_bias": config.enable_bias,
            "out_bias": config.enable_bias,
        }
        ffn = {
            "name": "mlp",
            "hidden_size": config.ffn_dim,
            "activation": config.activation_function,
            "bias": config.enable_bias,
        }
        values: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "max_position_embeddings": config.max_position_embeddings,
            "positions": "learned",
            "position_offset": 2,
            "layers": [{"mixer": mixer, "ffn": ffn}] * config.num_hidden_layers,
            "block": "pre_norm" if config.do_layer_norm_before else "post_norm",
            "norm": "layer_norm",
            "norm_eps": 1e-5,
            # Checkpoints tuned before transformers 4.20.1 have none.
            "final_norm": bool(config.do_layer_norm_before and not config._remove_final_layer_norm),
            "tie_word_embeddings": bool(config.tie_word_embeddings),
            "initializer_range": config.init_std,
        }
        if config.word_embed_proj_dim != config.hidden_size:
            values |= {
                "embedding_size": config.word_embed_proj_dim,
                "embedding_projection_bias": False,
                "embedding_output": "project",
            }
        return values

    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        root, ours = "model.decoder.", "model.layers.{i}."
        theirs = root + "layers.{i}."
        return {
            root + "embed_tokens": "model.embed_tokens",
            root + "embed_positions": "model.embed_positions",
            root + "project_in": "model.project_in",
            theirs + "self_attn_layer_norm": ours + "mixer_norm",
            **{f"{theirs}self_attn.{n}_proj": f"{ours}mixer.{n}_proj" for n in "qkv"},
            theirs + "self_attn.out_proj": ours + "mixer.o_proj",
            theirs + "final_layer_norm": ours + "ffn_norm",
            theirs + "fc1": ours + "ffn.up_proj",
            theirs + "fc2": ours + "ffn.down_proj",
            root + "final_layer_norm": "model.norm",
            root + "project_out": "model.project_out",
            "lm_head": "lm_head",
        }
