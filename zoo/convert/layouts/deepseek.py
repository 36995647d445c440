"""DeepSeek-V2 and DeepSeek-V3 of transformers: latent attention, and many small experts beside shared ones.

The first layers are dense, in a model without experts all of them. V3 chooses among groups of experts by sigmoid scores
and a learned bias, V2 by a softmax. The classes have no loss that balances, and files do not say how fast the bias
moved: it goes on with the paper's 0.001. The module that predicts a further token is a layer behind the last one; it is
not read, nor do the classes. The published weights of V3 are fp8 with scales; they are multiplied out (`blocks.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from zoo.config import ZooConfig
from zoo.convert.layouts.blocks import block_size, with_scales
from zoo.convert.layouts.family import register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, pairs, same
from zoo.convert.layouts.moe import ExpertDecoder
from zoo.convert.layouts.rope import read_rope, write_rope
from zoo.errors import CheckpointError, ExportError

_BIAS_RATE = 0.001
_BEHIND = ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.head", "shared_head.norm")


class LatentDecoder(ExpertDecoder):
    """What DeepSeek's models and Kimi Linear have in common."""

    mixers: ClassVar[tuple[str, ...]] = ("mla",)
    inert: ClassVar[tuple[str, ...]] = (*ExpertDecoder.inert, "balance_loss", "bias_rate")
    shared = "shared_experts"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = {**self.defaults, **checkpoint.config}
        heads = c["num_attention_heads"]
        if c["num_key_value_heads"] not in (None, heads):
            raise CheckpointError(
                f"{checkpoint.path}: num_key_value_heads is {c['num_key_value_heads']}; latent attention has as many "
                f"as num_attention_heads, {heads}"
            )
        block_size(checkpoint)
        plain = {**checkpoint.config, "quantization_config": None}
        return super().fields(Checkpoint(checkpoint.path, plain, checkpoint.shapes))

    def entries_of(self, config: ZooConfig, checkpoint: Checkpoint) -> Iterator[Entry]:
        return with_scales(super().entries_of(config, checkpoint), checkpoint)

    def latent_attention(self, c: dict[str, Any]) -> dict[str, Any]:
        """The options of `mla`, without those of positions. The norms have an epsilon of 1e-6, whatever c says."""
        return {
            "name": "mla",
            "num_heads": c["num_attention_heads"],
            "q_rank": c["q_lora_rank"],
            "kv_rank": c["kv_lora_rank"],
            "nope_dim": c["qk_nope_head_dim"],
            "rope_dim": c["qk_rope_head_dim"],
            "value_head_dim": c["v_head_dim"],
            "norm_eps": 1e-6,
            "bias": c["attention_bias"],
            "out_bias": c["attention_bias"],
        }

    def latent_options(self, mixer: Any) -> dict[str, Any]:
        """Their options of an `mla`."""
        return {
            "num_attention_heads": mixer.num_heads,
            "num_key_value_heads": mixer.num_heads,
            "q_lora_rank": mixer.q_rank,
            "kv_lora_rank": mixer.kv_rank,
            "qk_nope_head_dim": mixer.nope_dim,
            "qk_rope_head_dim": mixer.rope_dim,
            "v_head_dim": mixer.value_head_dim,
            "attention_bias": mixer.bias,
        }

    def experts_config(self, config: ZooConfig) -> Any:
        """The experts of the model, None where it has none. Raises ExportError for a layer with neither."""
        for i, layer in enumerate(config.spec.layers):
            if layer.ffn is None or layer.ffn.name not in ("gated_mlp", "moe"):
                name = getattr(layer.ffn, "name", None)
                raise ExportError(f"layers.{i}.ffn is {name}; its blocks have gated_mlp or moe")
        moe: Any = next((layer.ffn for layer in config.spec.layers if layer.ffn.name == "moe"), None)
        if moe is not None and (moe.shared_size or 0) % moe.hidden_size:
            raise ExportError(f"shared_size {moe.shared_size} is not a multiple of an expert's {moe.hidden_size}")
        if moe is not None and moe.shared_size is None:
            raise ExportError("experts without a shared one (shared_size), which the class always has")
        return moe

    def mixer_entries(self, mixer: Any, theirs: str, ours: str) -> Iterator[Entry]:
        theirs += "self_attn."
        biased = ("weight", "bias") if mixer.bias else ("weight",)
        if mixer.q_rank is None:
            yield from pairs(theirs, ours, {"q_proj": "q_proj"})
        else:
            yield from pairs(theirs, ours, {"q_a_proj": "q_down"}, biased)
            yield from pairs(theirs, ours, {"q_a_layernorm": "q_norm", "q_b_proj": "q_up"})
        yield from pairs(theirs, ours, {"kv_a_proj_with_mqa": "kv_down", "o_proj": "o_proj"}, biased)
        yield from pairs(theirs, ours, {"kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up"})

    def _experts(self, moe: Any, theirs: str, ours: str, fused: bool) -> Iterator[Entry]:
        yield from super()._experts(moe, theirs, ours, fused)
        if moe.bias_rate:
            yield same(f"{theirs}gate.e_score_correction_bias", f"{ours}balance_E")


@register_family
class DeepseekV3(LatentDecoder):
    """arXiv:2412.19437; deepseek-ai/DeepSeek-V3-Base once its weights are bfloat16."""

    name = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    scores: ClassVar[str] = "sigmoid"
    only: ClassVar = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    defaults: ClassVar = {
        **only, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True, "rope_interleave": True,
        "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip

    def mixer(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        rotary = read_rope(c, c["qk_rope_head_dim"], interleaved=c["rope_interleave"])
        return {**self.latent_attention(c), "rotary": rotary}

    def ffn(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        if i < c["first_k_dense_replace"]:
            return {"name": "gated_mlp", "hidden_size": c["intermediate_size"], "activation": c["hidden_act"]}
        return {
            "name": "moe",
            "num_experts": c["n_routed_experts"],
            "hidden_size": c["moe_intermediate_size"],
            "top_k": c["num_experts_per_tok"],
            "activation": c["hidden_act"],
            "shared_size": c["n_shared_experts"] * c["moe_intermediate_size"],
            "scores": self.scores,
            "scale": float(c["routed_scaling_factor"]),
            **self.routing(c),
        }

    def routing(self, c: dict[str, Any]) -> dict[str, Any]:
        """How experts are chosen."""
        return {
            "normalize": c["norm_topk_prob"],
            "groups": c["n_group"] or 1,
            "top_groups": c["topk_group"] or 1,
            "bias_rate": _BIAS_RATE,
        }

    def routing_options(self, moe: Any) -> dict[str, Any]:
        """Their options of the same."""
        return {"norm_topk_prob": moe.normalize, "n_group": moe.groups, "topk_group": moe.top_groups}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layers, moe = config.spec.layers, self.experts_config(config)
        dense = [layer.ffn for layer in layers if layer.ffn.name == "gated_mlp"]
        mixer: Any = layers[0].mixer
        values = {
            **self.common(config),
            **self.latent_options(mixer),
            "hidden_act": layers[0].ffn.activation,
            "rope_parameters": write_rope(mixer.rotary, mixer.rope_dim),
            "rope_interleave": mixer.rotary.interleaved,
            "intermediate_size": dense[0].hidden_size if dense else moe.hidden_size,
            "first_k_dense_replace": next((i for i, x in enumerate(layers) if x.ffn.name == "moe"), len(layers)),
            "num_nextn_predict_layers": 0,
        }
        if moe is None:
            return values
        return {
            **values,
            "moe_intermediate_size": moe.hidden_size,
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "n_shared_experts": moe.shared_size // moe.hidden_size,
            "routed_scaling_factor": moe.scale,
            **self.routing_options(moe),
        }

    def ignored(self, config: ZooConfig) -> tuple[str, ...]:
        count = len(config.spec.layers)
        last = f"model.layers.{count - 1}."
        of_layer = [n.removeprefix(last) for e in self.entries(config) for n in e.theirs if n.startswith(last)]
        of_layer += [f"{name}.weight" for name in _BEHIND]
        of_layer += [f"{name}_scale_inv" for name in of_layer]
        more = (config.origin.get("config") or {}).get("num_nextn_predict_layers") or 0
        behind = [f"model.layers.{i}.{name}" for i in range(count, count + more) for name in of_layer]
        return (*super().ignored(config), *behind)

    def fillers(self, config: ZooConfig) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for i, layer in enumerate(config.spec.layers):
            if layer.ffn.name == "moe" and not layer.ffn.bias_rate:
                found[f"model.layers.{i}.{self.place}gate.e_score_correction_bias"] = (layer.ffn.num_experts,)
        return found


@register_family
class DeepseekV2(DeepseekV3):
    """arXiv:2405.04434; deepseek-ai/DeepSeek-V2-Lite. DeepSeek-V2 itself chooses groups by their best expert."""

    name = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    scores = "softmax"
    only: ClassVar = {
        "moe_layer_freq": 1, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
        "mlp_bias": False,
    }  # fmt: skip
    defaults: ClassVar = {
        **only, "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "first_k_dense_replace": 0, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "n_routed_experts": 64, "n_shared_experts": 2, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "routed_scaling_factor": 1.0, "moe_intermediate_size": 1407,
        "max_position_embeddings": 2048, "rope_interleave": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip

    def routing(self, c: dict[str, Any]) -> dict[str, Any]:
        return {"normalize": False}

    def routing_options(self, moe: Any) -> dict[str, Any]:
        return {"norm_topk_prob": False, "topk_method": "greedy"}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        values = super().config(config)
        if not values.pop("rope_interleave"):
            raise ExportError("rotary.interleaved: the class always turns neighbours")
        del values["num_nextn_predict_layers"]
        return values

    def fillers(self, config: ZooConfig) -> dict[str, tuple[int, ...]]:
        return {}
