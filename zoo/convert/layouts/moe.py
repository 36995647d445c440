"""Decoders with experts, of transformers: Mixtral, OLMoE, Qwen2-MoE; and what others have in common with them.

Published files have a tensor for each matrix of each expert. transformers 5 stacks them when it loads and takes them
apart again when it saves; a state dict saved from memory has the stacks (`experts.gate_up_proj`). Both are read, the
published form is written. The loss that balances the experts is added here in training, there where
`output_router_logits` asks for it. An upcycled student goes out as one of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, pairs, same
from zoo.convert.layouts.rope import read_rope, write_rope
from zoo.errors import CheckpointError, ExportError
from zoo.transformers_keys import TOKEN_IDS, present

_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    "num_key_value_heads": None, "head_dim": None, "sliding_window": None, "attention_bias": False,
    "quantization_config": None,
}  # fmt: skip


class ExpertDecoder(Family):
    """What they have in common: Llama's layers, with experts in place of some or all MLPs.

    place: of the experts in a layer. experts: theirs -> ours, of the three matrices of an expert. shared: the name of
    the shared ones. defaults, only: of their config's options. norm: ours.
    """

    layout = "transformers"
    mixers: ClassVar[tuple[str, ...]] = ("attention",)
    # a loss of training that the classes have not, and how weights are drawn
    inert: ClassVar[tuple[str, ...]] = ("z_loss", "init_scale")
    root = "model."
    architecture: ClassVar[str]
    place: ClassVar[str] = "mlp."
    experts: ClassVar[dict[str, str]] = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    shared: ClassVar[str] = "shared_expert"
    norm: ClassVar[str] = "rms_norm"
    defaults: ClassVar[dict[str, Any]]
    only: ClassVar[dict[str, Any]] = {}

    @property
    def about(self) -> str:  # type: ignore[override]
        """The class, for the list of layouts."""
        return self.architecture

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == self.name

    def ignored(self, config: ZooConfig) -> tuple[str, ...]:
        return (".rotary_emb.inv_freq",)

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}

    # --- their config ---------------------------------------------------------------------------------------------

    def attention(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        """What the attention of layer i has beside heads and positions."""
        raise NotImplementedError

    def mixer(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        """The sequence mixer of layer i."""
        head_dim = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
        return {
            "name": "attention",
            "num_heads": c["num_attention_heads"],
            "num_kv_heads": c["num_key_value_heads"] or c["num_attention_heads"],
            "head_dim": head_dim,
            "rotary": read_rope(c, head_dim, theta=self.defaults.get("rope_theta", 10000.0)),
            **self.attention(c, i),
        }

    def ffn(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        """The channel mixer of layer i."""
        raise NotImplementedError

    def options(self, config: ZooConfig, moe: Any) -> dict[str, Any]:
        """Their options that only this family has, of a model whose experts are `moe`."""
        raise NotImplementedError

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = {**_DEFAULTS, **self.defaults, **checkpoint.config}
        for key, value in {"quantization_config": None, **self.only}.items():
            if c[key] != value:
                raise CheckpointError(f"{checkpoint.path}: {key} is {c[key]!r}; only {value!r} can be expressed")
        named = (c.get("architectures") or [self.architecture])[0]
        if named != self.architecture:
            raise CheckpointError(f"{checkpoint.path}: architectures.0 is {named!r}; supported: {self.architecture}")
        return {
            "vocab_size": c["vocab_size"],
            "hidden_size": c["hidden_size"],
            "max_position_embeddings": c["max_position_embeddings"],
            "layers": [{"mixer": self.mixer(c, i), "ffn": self.ffn(c, i)} for i in range(c["num_hidden_layers"])],
            "norm": self.norm,
            "norm_eps": c["rms_norm_eps"],
            "tie_word_embeddings": c["tie_word_embeddings"],
            "initializer_range": c["initializer_range"],
            **present(c, *TOKEN_IDS),
        }

    def config(self, config: ZooConfig) -> dict[str, Any]:
        spec = config.spec
        moe = next((layer.ffn for layer in spec.layers if layer.ffn is not None and layer.ffn.name == "moe"), None)
        if moe is None:
            raise ExportError("has no layer without experts only: the model has none")
        return {
            **self.common(config),
            "hidden_act": moe.activation,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.balance_loss,
            **self.heads(config),
            **self.options(config, moe),
        }

    def heads(self, config: ZooConfig) -> dict[str, Any]:
        """Their options of heads and positions."""
        mixer = config.spec.layers[0].mixer
        return {
            "num_attention_heads": mixer.num_heads,
            "num_key_value_heads": mixer.num_kv_heads or mixer.num_heads,
            "head_dim": mixer.head_dim,
            "rope_parameters": write_rope(mixer.rotary, mixer.head_dim),
        }

    def common(self, config: ZooConfig) -> dict[str, Any]:
        """Their options that say nothing of mixers."""
        spec = config.spec
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "num_hidden_layers": len(spec.layers),
            "max_position_embeddings": spec.max_position_embeddings,
            "rms_norm_eps": spec.norm_eps,
            "initializer_range": spec.initializer_range,
            "tie_word_embeddings": spec.tie_word_embeddings,
            **{key: getattr(config, key) for key in TOKEN_IDS},
        }

    # --- tensors --------------------------------------------------------------------------------------------------

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        return self._entries(config, fused=False)

    def entries_of(self, config: ZooConfig, checkpoint: Checkpoint) -> Iterator[Entry]:
        return self._entries(config, fused=any(n.endswith(".experts.gate_up_proj") for n in checkpoint.shapes))

    def _entries(self, config: ZooConfig, fused: bool) -> Iterator[Entry]:
        yield same("model.embed_tokens.weight", "model.embed_tokens.weight")
        yield from self.norms(config, "model.", {"norm": "norm"})
        for i, layer in enumerate(config.spec.layers):
            theirs = ours = f"model.layers.{i}."
            norms = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "ffn_norm"}
            yield from self.norms(config, theirs, norms)
            yield from self.mixer_entries(layer.mixer, theirs, f"{ours}mixer.")
            if layer.ffn.name == "moe":
                yield from self._experts(layer.ffn, theirs + self.place, f"{ours}ffn.", fused)
            else:
                dense = {f"mlp.{name}": f"ffn.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
                yield from pairs(theirs, ours, dense)
        if not config.tie_word_embeddings:
            yield same("lm_head.weight", "lm_head.weight")

    def norms(self, config: ZooConfig, place: str, names: dict[str, str]) -> Iterator[Entry]:
        """Those of norms at a place that has the same name there and here."""
        return pairs(place, place, names)

    def mixer_entries(self, mixer: Any, theirs: str, ours: str) -> Iterator[Entry]:
        """Those of the sequence mixer of a layer."""
        theirs += "self_attn."
        for letter in "qkvo":
            biased = mixer.out_bias if letter == "o" else mixer.qkv_bias
            name = f"{letter}_proj"
            yield from pairs(theirs, ours, {name: name}, ("weight", "bias") if biased else ("weight",))
        if mixer.qk_norm:
            yield from pairs(theirs, ours, {"q_norm": "q_norm", "k_norm": "k_norm"})

    def _experts(self, moe: Any, theirs: str, ours: str, fused: bool) -> Iterator[Entry]:
        yield same(f"{theirs}gate.weight", f"{ours}router.weight")
        if fused:
            yield fused_pair(f"{theirs}experts.gate_up_proj", f"{ours}experts.gate_EIO", f"{ours}experts.up_EIO")
            yield stack_of(f"{theirs}experts.down_proj", f"{ours}experts.down_EIO")
        else:
            for name, mine in self.experts.items():
                each = [f"{theirs}experts.{e}.{name}.weight" for e in range(moe.num_experts)]
                yield each_transposed(each, f"{ours}experts.{mine}_EIO")
        if moe.shared_size is not None:
            names = {f"{self.shared}.{n}": f"shared.{n}" for n in ("gate_proj", "up_proj", "down_proj")}
            yield from pairs(theirs, ours, names)
        if moe.shared_gate:
            yield same(f"{theirs}shared_expert_gate.weight", f"{ours}shared_gate.weight")


def each_transposed(theirs: list[str], ours: str) -> Entry:
    """A matrix (out, in) of each expert there, one stack (expert, in, out) here, written into it one by one."""

    def read(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        stack = None
        for e, tensor in enumerate(tensors):  # read one by one
            if stack is None:
                stack = torch.empty(len(tensors), *reversed(tensor.shape), dtype=tensor.dtype)
            stack[e].copy_(tensor.T)
        assert stack is not None
        return [stack]

    return Entry(tuple(theirs), (ours,), read, lambda t: [one.T.contiguous() for one in t[0].unbind()])


def stack_of(theirs: str, ours: str) -> Entry:
    """A stack (expert, out, in) there, (expert, in, out) here."""

    def turn(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensors[0].transpose(1, 2).contiguous()]

    return Entry((theirs,), (ours,), turn, turn)


def fused_pair(theirs: str, first: str, second: str) -> Entry:
    """Two stacks (expert, in, out) here, one behind the other as (expert, 2 out, in) there."""
    return Entry(
        (theirs,),
        (first, second),
        lambda t: [part.transpose(1, 2).contiguous() for part in t[0].chunk(2, 1)],
        lambda t: [torch.cat([part.transpose(1, 2) for part in t], 1)],
    )


def _all_experts(config: ZooConfig) -> None:
    if any(layer.ffn is None or layer.ffn.name != "moe" for layer in config.spec.layers):
        raise ExportError("a layer has no experts, which all layers of the class have")


@register_family
class Mixtral(ExpertDecoder):
    """arXiv:2401.04088; mistralai/Mixtral-8x7B-v0.1."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    place = "block_sparse_moe."
    experts: ClassVar = {"w1": "gate", "w3": "up", "w2": "down"}
    older = ((r"\.mlp\.", ".block_sparse_moe."),)
    defaults: ClassVar = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2, "num_local_experts": 8, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
        "rope_theta": 1e6, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip

    def attention(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        return {"window": c["sliding_window"]}

    def ffn(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        return {
            "name": "moe",
            "num_experts": c["num_local_experts"],
            "hidden_size": c["intermediate_size"],
            "top_k": c["num_experts_per_tok"],
            "activation": c["hidden_act"],
            "jitter": c["router_jitter_noise"],
            "balance_loss": c["router_aux_loss_coef"],
        }

    def options(self, config: ZooConfig, moe: Any) -> dict[str, Any]:
        _all_experts(config)
        return {
            "intermediate_size": moe.hidden_size,
            "num_local_experts": moe.num_experts,
            "router_jitter_noise": moe.jitter,
            "sliding_window": config.spec.layers[0].mixer.window,
        }


@register_family
class Olmoe(ExpertDecoder):
    """arXiv:2409.02060; allenai/OLMoE-1B-7B-0924."""

    name = "olmoe"
    architecture = "OlmoeForCausalLM"
    defaults: ClassVar = {
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8,
        "num_experts": 64, "router_aux_loss_coef": 0.01, "norm_topk_prob": False, "clip_qkv": None, "pad_token_id": 1,
        "eos_token_id": 50279,
    }  # fmt: skip
    only: ClassVar = {"clip_qkv": None}

    def attention(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        bias = c["attention_bias"]
        norm = {"qk_norm": True, "qk_norm_span": "all", "qk_norm_eps": c["rms_norm_eps"]}
        return {"qkv_bias": bias, "out_bias": bias, **norm}

    def ffn(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        return {
            "name": "moe",
            "num_experts": c["num_experts"],
            "hidden_size": c["intermediate_size"],
            "top_k": c["num_experts_per_tok"],
            "activation": c["hidden_act"],
            "normalize": c["norm_topk_prob"],
            "balance_loss": c["router_aux_loss_coef"],
        }

    def options(self, config: ZooConfig, moe: Any) -> dict[str, Any]:
        _all_experts(config)
        return {
            "intermediate_size": moe.hidden_size,
            "num_experts": moe.num_experts,
            "norm_topk_prob": moe.normalize,
            "attention_bias": config.spec.layers[0].mixer.out_bias,
            "clip_qkv": None,
        }


@register_family
class Qwen2Moe(ExpertDecoder):
    """Qwen2-MoE, arXiv:2407.10671; Qwen/Qwen1.5-MoE-A2.7B. A model without a shared expert has one of width 0 there."""

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    defaults: ClassVar = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 32768,
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4,
        "num_experts": 60, "norm_topk_prob": False, "router_aux_loss_coef": 0.001, "mlp_only_layers": None,
        "qkv_bias": True, "layer_types": None,
    }  # fmt: skip

    def attention(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        slides = c["use_sliding_window"] and i % 2 == 0 and i < c["max_window_layers"]
        if c["layer_types"] is not None:
            slides = c["layer_types"][i] == "sliding_attention"
        return {"qkv_bias": c["qkv_bias"], "window": c["sliding_window"] if slides else None}

    def ffn(self, c: dict[str, Any], i: int) -> dict[str, Any]:
        dense = i in (c["mlp_only_layers"] or []) or not c["num_experts"] or (i + 1) % c["decoder_sparse_step"]
        if dense:
            return {"name": "gated_mlp", "hidden_size": c["intermediate_size"], "activation": c["hidden_act"]}
        shared = c["shared_expert_intermediate_size"] or None
        return {
            "name": "moe",
            "num_experts": c["num_experts"],
            "hidden_size": c["moe_intermediate_size"],
            "top_k": c["num_experts_per_tok"],
            "activation": c["hidden_act"],
            "normalize": c["norm_topk_prob"],
            "shared_size": shared,
            "shared_gate": shared is not None,
            "balance_loss": c["router_aux_loss_coef"],
        }

    def options(self, config: ZooConfig, moe: Any) -> dict[str, Any]:
        layers = config.spec.layers
        dense = [i for i, layer in enumerate(layers) if layer.ffn is not None and layer.ffn.name == "gated_mlp"]
        windows = [layer.mixer.window for layer in layers]
        window = next((w for w in windows if w is not None), None)
        return {
            "intermediate_size": layers[dense[0]].ffn.hidden_size if dense else moe.hidden_size,
            "moe_intermediate_size": moe.hidden_size,
            "shared_expert_intermediate_size": moe.shared_size or 0,
            "num_experts": moe.num_experts,
            "norm_topk_prob": moe.normalize,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
            "qkv_bias": layers[0].mixer.qkv_bias,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
        }

    def is_dropped(self, name: str) -> bool:
        return ".mlp.shared_expert" in name  # of width 0; any other is read

    def fillers(self, config: ZooConfig) -> dict[str, tuple[int, ...]]:
        D = config.hidden_size
        found: dict[str, tuple[int, ...]] = {}
        for i, layer in enumerate(config.spec.layers):
            if layer.ffn.name == "moe" and layer.ffn.shared_size is None:
                place = f"model.layers.{i}.mlp.shared_expert"
                found |= {f"{place}.{name}_proj.weight": (0, D) for name in ("gate", "up")}
                found |= {f"{place}.down_proj.weight": (D, 0), f"{place}_gate.weight": (1, D)}
        return found
