"""Kimi Linear of transformers: Kimi Delta Attention, every fourth layer latent attention without positions, experts.

Published configs count layers from 1 (`linear_attn_config`); the class writes `layer_types` and `mlp_layer_types`. Both
are read, and both written. Other models with this `model_type` (full-rank gates, experts in a latent) are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from zoo.config import ZooConfig
from zoo.convert.layouts.deepseek import DeepseekV3, LatentDecoder
from zoo.convert.layouts.family import register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, depthwise, flat, pairs, same
from zoo.errors import CheckpointError, ExportError

_KINDS = {"mla": "full_attention", "kimi_delta_attention": "linear_attention"}
_NAMES = {  # theirs -> those of DeepSeek-V3, whose experts are the same
    "moe_renormalize": "norm_topk_prob", "num_expert_group": "n_group", "num_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok", "num_shared_experts": "n_shared_experts",
    "model_max_length": "max_position_embeddings",
}  # fmt: skip
_WHOLE = {"kda_layers", "full_attn_layers", "head_dim", "num_heads", "short_conv_kernel_size"}


@register_family
class KimiLinear(LatentDecoder):
    """arXiv:2510.26692; moonshotai/Kimi-Linear-48B-A3B-Base."""

    name = "kimi_linear"
    mixers: ClassVar[tuple[str, ...]] = ("kimi_delta_attention", "mla")
    architecture = "KimiLinearForCausalLM"
    older = ((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),)  # as the class writes dense MLPs
    place = "block_sparse_moe."
    experts: ClassVar = {"w1": "gate", "w3": "up", "w2": "down"}
    only: ClassVar = {
        "hidden_act": "silu", "mla_use_nope": True, "moe_router_activation_func": "sigmoid", "moe_layer_freq": 1,
        "mla_use_output_gate": False, "routed_expert_hidden_size": None, "attn_res_block_size": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    defaults: ClassVar = {
        **only, "vocab_size": 163840, "hidden_size": 2304, "intermediate_size": 9216, "moe_intermediate_size": 1024,
        "num_hidden_layers": 27, "num_attention_heads": 32, "num_key_value_heads": 32, "num_shared_experts": 1,
        "routed_scaling_factor": 2.446, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "qk_nope_head_dim": 128, "num_expert_group": 1, "topk_group": 1,
        "num_experts_per_token": 8, "moe_renormalize": True, "model_max_length": 1048576, "rms_norm_eps": 1e-5,
        "num_experts": 256, "mlp_layer_types": None, "layer_types": None, "linear_head_dim": 128,
        "linear_num_heads": 32, "linear_conv_kernel_dim": 4, "first_k_dense_replace": 1, "linear_attn_config": None,
        "pad_token_id": 163839, "bos_token_id": 163584, "eos_token_id": 163586,
    }  # fmt: skip

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = {**self.defaults, **checkpoint.config}
        told = c["linear_attn_config"] or {}
        if others := sorted(told.keys() - _WHOLE):
            where = f"linear_attn_config.{others[0]}"
            raise CheckpointError(f"{checkpoint.path}: {where} is {told[others[0]]!r}, which cannot be expressed")
        theirs = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"}
        theirs["short_conv_kernel_size"] = "linear_conv_kernel_dim"
        c |= {name: told[key] for key, name in theirs.items() if key in told}
        count = c["num_hidden_layers"]
        if c["layer_types"] is None:
            whole = told.get("full_attn_layers", range(5, count + 1, 4))
            c["layer_types"] = [f"{'full' if i + 1 in whole else 'linear'}_attention" for i in range(count)]
        if c["mlp_layer_types"] is None:
            c["mlp_layer_types"] = ["dense" if i < c["first_k_dense_replace"] else "sparse" for i in range(count)]
        for key, known in (("layer_types", _KINDS.values()), ("mlp_layer_types", ("dense", "sparse"))):
            if len(c[key]) != count or set(c[key]) - set(known):
                raise CheckpointError(f"{checkpoint.path}: {key} is {c[key]!r}, of {count} layers")
        c |= {ours: c[name] for name, ours in _NAMES.items()}
        return super().fields(Checkpoint(checkpoint.path, c, checkpoint.shapes))

    def mixer(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        if c["layer_types"][i] == "full_attention":
            return self.latent_attention(c)
        return {
            "name": "kimi_delta_attention",
            "num_heads": c["linear_num_heads"],
            "head_dim": c["linear_head_dim"],
            "conv": c["linear_conv_kernel_dim"],
            "head_norm_eps": c["rms_norm_eps"],
        }

    def ffn(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        dense = c["mlp_layer_types"][i] == "dense"
        return _V3.ffn({**c, "first_k_dense_replace": len(c["mlp_layer_types"]) if dense else 0}, i)

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layers, moe = config.spec.layers, self.experts_config(config)
        kinds = [layer.mixer.name for layer in layers]
        if set(kinds) != set(_KINDS):
            raise ExportError("needs layers of kimi_delta_attention and layers of mla")
        latent: Any = layers[kinds.index("mla")].mixer
        delta: Any = layers[kinds.index("kimi_delta_attention")].mixer
        if config.tie_word_embeddings:
            raise ExportError("tie_word_embeddings: the class never ties them, whatever its config says")
        if latent.rotary is not None:
            raise ExportError(f"layers.{kinds.index('mla')}.mixer.rotary: its latent attention has no positions")
        if delta.conv is None:
            i = kinds.index("kimi_delta_attention")
            raise ExportError(f"layers.{i}.mixer.conv is None; its layers have a convolution: conv 4")
        dense = [i for i, layer in enumerate(layers) if layer.ffn.name == "gated_mlp"]
        values = {
            **self.common(config),
            **self.latent_options(latent),
            "hidden_act": "silu",
            "mla_use_nope": True,
            "linear_attn_config": {
                "kda_layers": [i + 1 for i, kind in enumerate(kinds) if kind == "kimi_delta_attention"],
                "full_attn_layers": [i + 1 for i, kind in enumerate(kinds) if kind == "mla"],
                "num_heads": delta.num_heads,
                "head_dim": delta.head_dim,
                "short_conv_kernel_size": delta.conv,
            },
            "layer_types": [_KINDS[kind] for kind in kinds],
            "mlp_layer_types": ["dense" if i in dense else "sparse" for i in range(len(layers))],
            "first_k_dense_replace": next((i for i in range(len(layers)) if i not in dense), len(layers)),
            "moe_layer_freq": 1,
            "moe_router_activation_func": "sigmoid",
            "intermediate_size": layers[dense[0]].ffn.hidden_size if dense else moe.hidden_size,
        }
        values["model_max_length"] = values.pop("max_position_embeddings")
        if moe is None:
            return values
        return {
            **values,
            "moe_intermediate_size": moe.hidden_size,
            "num_experts": moe.num_experts,
            "num_experts_per_token": moe.top_k,
            "num_shared_experts": moe.shared_size // moe.hidden_size,
            "routed_scaling_factor": moe.scale,
            "moe_renormalize": moe.normalize,
            "num_expert_group": moe.groups,
            "topk_group": moe.top_groups,
        }

    def mixer_entries(self, mixer: Any, theirs: str, ours: str) -> Iterator[Entry]:
        if mixer.name == "mla":
            yield from super().mixer_entries(mixer, theirs, ours)
        else:
            yield from delta_attention_entries(mixer, f"{theirs}self_attn.", ours)

    def fillers(self, config: ZooConfig) -> dict[str, tuple[int, ...]]:
        return {
            f"model.layers.{i}.{self.place}gate.e_score_correction_bias": (layer.ffn.num_experts,)
            for i, layer in enumerate(config.spec.layers)
            if layer.ffn.name == "moe" and not layer.ffn.bias_rate
        }


def delta_attention_entries(mixer: Any, theirs: str, ours: str) -> Iterator[Entry]:
    """Those of a layer of Kimi Delta Attention; the names begin with `theirs` and `ours`."""
    yield from pairs(theirs, ours, {f"{n}_proj": f"{n}_proj" for n in "qkvbo"})
    yield from (depthwise(f"{theirs}{n}_conv1d.weight", f"{ours}{n}_conv.weight") for n in "qkv")
    low_rank = {"f_a_proj": "a_proj.down", "f_b_proj": "a_proj.up", "g_a_proj": "g_proj.down", "g_b_proj": "g_proj.up"}
    yield from pairs(theirs, ours, {**low_rank, "o_norm": "head_norm"})
    yield flat(f"{theirs}A_log", f"{ours}A_log", (1, 1, mixer.num_heads, 1))
    yield same(f"{theirs}dt_bias", f"{ours}dt_bias")


_V3 = DeepseekV3()
