"""flash-linear-attention's folders on the Hub: what its models have in common, and its RetNet, GLA and DeltaNets.

Names and defaults are those of flash-linear-attention 0.6.0 (fla/models/*/configuration_*.py, fla/layers/*.py). All its
models are pre-norm: `attn_norm`, `attn`, `mlp_norm`, `mlp`; a config may put attention into some layers (`attn`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, one_layer, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, depthwise, initial, same
from zoo.errors import CheckpointError, ExportError
from zoo.transformers_keys import TOKEN_IDS, present

# What changes how fla computes, and not what.
_HOW = {
    "attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp",
    "use_cache",
    "initializer_range", "max_position_embeddings", "vocab_size", "hidden_size", "num_hidden_layers", "model_type",
    "architectures", "tie_word_embeddings", "norm_eps", "hidden_ratio", "intermediate_size", "dtype", "torch_dtype",
    "transformers_version", "auto_map", "_name_or_path", *TOKEN_IDS,
}  # fmt: skip


class FlaFamily(Family):
    """Base: the parts around the mixer.

    model_type: fla's. defaults: its options beside the common ones, with their values where a config is silent.
    needs: options with the only value that can be expressed. ratio: of the MLP where a config names no size.
    """

    layout = "fla"
    model_type: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]
    needs: ClassVar[dict[str, Any]] = {}
    ratio: ClassVar[float] = 4
    norm: ClassVar[str] = "rms_norm"
    eps: ClassVar[float] = 1e-6
    activation: ClassVar[str] = "swish"
    first_norm = False

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config["model_type"] == self.model_type and _any_block(checkpoint)

    def options(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The config with fla's defaults. Raises CheckpointError for an option that cannot be expressed."""
        c = checkpoint.config
        needs = {"attn": None, "attnres_block_size": None, "hidden_act": self.activation, **self.needs}
        for key, value in needs.items():
            if c.get(key, value) != value:
                raise CheckpointError(f"{checkpoint.path}: {key} is {c[key]!r}; only {value!r} can be expressed")
        if unknown := sorted(c.keys() - _HOW - needs.keys() - self.defaults.keys()):
            raise CheckpointError(f"{checkpoint.path}: {unknown[0]} is not an option of fla's {self.model_type}")
        common = {
            "norm_eps": self.eps,
            "hidden_ratio": self.ratio,
            "intermediate_size": None,
            "initializer_range": 0.02,
        }
        return {**common, "tie_word_embeddings": False, **self.defaults, **c}

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = self.options(checkpoint)
        layer = {"mixer": self.mixer(c), "ffn": self.ffn(c)}
        return {
            "vocab_size": c["vocab_size"],
            "hidden_size": c["hidden_size"],
            "max_position_embeddings": c.get("max_position_embeddings", 2048),
            "layers": [layer] * c["num_hidden_layers"],
            "norm": self.norm,
            "norm_eps": c["norm_eps"],
            "embedding_norm": self.first_norm,
            "tie_word_embeddings": c["tie_word_embeddings"],
            "initializer_range": c["initializer_range"],
            **present(c, *TOKEN_IDS),
        }

    @abstractmethod
    def mixer(self, c: dict[str, Any]) -> dict[str, Any]:
        """Options of our mixer."""

    @abstractmethod
    def mixer_entries(self, theirs: str, ours: str, options: Any, i: int, width: int) -> Iterator[Entry]:
        """The tensors of layer i's mixer."""

    @abstractmethod
    def mixer_config(self, options: Any, width: int) -> dict[str, Any]:
        """Their options of a mixer of ours."""

    def ffn(self, c: dict[str, Any]) -> dict[str, Any]:
        """Options of our channel mixer."""
        size = c["intermediate_size"]
        if size is None:  # two thirds of the ratio, rounded up to 256
            size = -(-int(c["hidden_size"] * c["hidden_ratio"] * 2 / 3) // 256) * 256
        return {"name": "gated_mlp", "hidden_size": size}

    def ffn_entries(self, theirs: str, ours: str, options: Any) -> Iterator[Entry]:
        """The tensors of a channel mixer."""
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield same(f"{theirs}{name}.weight", f"{ours}{name}.weight")

    def norms(self, theirs: str, ours: str) -> Iterator[Entry]:
        """A norm of the residual stream."""
        for parameter in ("weight", "bias") if self.norm == "layer_norm" else ("weight",):
            yield same(f"{theirs}.{parameter}", f"{ours}.{parameter}")

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield same("model.embeddings.weight", "model.embed_tokens.weight")
        if self.first_norm:
            yield from self.norms("model.layers.0.pre_norm", "model.embed_norm")
        for i, layer in enumerate(config.spec.layers):
            block = f"model.layers.{i}."
            yield from self.norms(f"{block}attn_norm", f"{block}mixer_norm")
            yield from self.mixer_entries(f"{block}attn.", f"{block}mixer.", layer.mixer, i, config.hidden_size)
            yield from self.norms(f"{block}{self.ffn_name}_norm", f"{block}ffn_norm")
            yield from self.ffn_entries(f"{block}{self.ffn_name}.", f"{block}ffn.", layer.ffn)
        yield from self.norms("model.norm", "model.norm")
        if not config.tie_word_embeddings:
            yield same("lm_head.weight", "lm_head.weight")

    ffn_name: ClassVar[str] = "mlp"

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        return {"lm_head.weight": "model.embeddings.weight"} if config.tie_word_embeddings else {}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        layer = one_layer(config)
        size = None if layer.ffn is None else getattr(layer.ffn.resolved(config.hidden_size), "hidden_size", None)
        if size is None:
            raise ExportError(f"layers.0.ffn: {layer.ffn and layer.ffn.name!r}, where the layout has one hidden size")
        return {
            "architectures": [self.about],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": size,
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_act": self.activation,
            "max_position_embeddings": config.max_position_embeddings,
            "norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_word_embeddings,
            **{key: getattr(config, key) for key in TOKEN_IDS},
            **self.mixer_config(layer.mixer.resolved(config.hidden_size), config.hidden_size),
        }


def _any_block(checkpoint: Checkpoint) -> bool:
    return "model.embeddings.weight" in checkpoint.shapes


def ratio(size: int, width: int) -> float:
    """fla's expand_k and expand_v: size over width."""
    return size / width


def projections(theirs: str, ours: str, options: Any, norm: str) -> Iterator[Entry]:
    """Queries, keys, values, output, and what of convolutions, gate and norm the options have."""
    for name in ("q", "k", "v", "o", *(["g"] if options.gate else [])):
        yield same(f"{theirs}{name}_proj.weight", f"{ours}{name}_proj.weight")
    if options.conv:
        for name in "qkv":
            yield depthwise(f"{theirs}{name}_conv1d.weight", f"{ours}{name}_conv.weight")
    if options.head_norm and options.head_norm_affine:
        yield same(f"{theirs}{norm}.weight", f"{ours}head_norm.weight")


@register_family
class FlaRetNet(FlaFamily):
    """`RetNetForCausalLM`."""

    name = model_type = "retnet"
    about = "RetNetForCausalLM"
    mixers = ("retention",)
    ratio = 2
    defaults: ClassVar = {
        "expand_k": 1.0, "expand_v": 2.0, "num_heads": 8, "num_kv_heads": None, "use_short_conv": False,
        "use_output_gate": True, "elementwise_affine": True, "conv_size": 4,
    }  # fmt: skip
    needs: ClassVar = {"feature_map": None, "use_short_conv": False}

    def mixer(self, c: dict[str, Any]) -> dict[str, Any]:
        heads, width = c["num_heads"], c["hidden_size"]
        if (c["num_kv_heads"] or heads) != heads:  # its query heads have decays of their own, ours those of their keys
            raise CheckpointError(
                f"num_kv_heads is {c['num_kv_heads']}, num_heads {heads}; only equal ones are known here"
            )
        return {
            "name": "retention",
            "num_heads": heads,
            "head_dim": round(c["expand_k"] * width) // heads,
            "value_head_dim": round(c["expand_v"] * width) // heads,
            "rotary": {"theta": 10000.0},
            "head_norm_affine": bool(c["elementwise_affine"]),
            "head_norm_eps": c["norm_eps"],
            "gate": c["use_output_gate"],
        }

    def mixer_entries(self, theirs: str, ours: str, options: Any, i: int, width: int) -> Iterator[Entry]:
        yield from projections(theirs, ours, options, "g_norm_swish_gate" if options.gate else "g_norm")
        yield initial(f"{ours}decay_logit_G")  # a constant there

    def mixer_config(self, options: Any, width: int) -> dict[str, Any]:
        return {
            "expand_k": ratio(options.num_heads * options.head_dim, width),
            "expand_v": ratio(options.num_heads * options.value_dim, width),
            "num_heads": options.num_heads,
            "use_output_gate": options.gate,
            "elementwise_affine": options.head_norm_affine,
        }

    def ignored(self, config: ZooConfig) -> tuple[str, ...]:
        return (".rotary.inv_freq",)


@register_family
class FlaGLA(FlaFamily):
    """`GLAForCausalLM`."""

    name = model_type = "gla"
    about = "GLAForCausalLM"
    mixers = ("gated_linear_attention",)
    defaults: ClassVar = {
        "expand_k": 0.5, "expand_v": 1.0, "num_heads": 4, "num_kv_heads": None, "use_short_conv": False, "conv_size": 4,
        "use_output_gate": True, "elementwise_affine": True,
    }  # fmt: skip
    needs: ClassVar = {"feature_map": None, "clamp_min": None, "use_gk": True, "use_gv": False}

    def mixer(self, c: dict[str, Any]) -> dict[str, Any]:
        heads, width = c["num_heads"], c["hidden_size"]
        return {
            "name": "gated_linear_attention",
            "num_heads": heads,
            "num_kv_heads": c["num_kv_heads"] or heads,
            "head_dim": round(c["expand_k"] * width) // heads,
            "value_head_dim": round(c["expand_v"] * width) // heads,
            "conv": c["conv_size"] if c["use_short_conv"] else None,
            "head_norm_affine": bool(c["elementwise_affine"]),
            "head_norm_eps": c["norm_eps"],
            "gate": c["use_output_gate"],
        }

    def mixer_entries(self, theirs: str, ours: str, options: Any, i: int, width: int) -> Iterator[Entry]:
        yield from projections(theirs, ours, options, "g_norm_swish_gate" if options.gate else "g_norm")
        yield same(f"{theirs}gk_proj.0.weight", f"{ours}decay_down.weight")
        yield same(f"{theirs}gk_proj.1.weight", f"{ours}decay_up.weight")
        yield same(f"{theirs}gk_proj.1.bias", f"{ours}decay_up.bias")

    def mixer_config(self, options: Any, width: int) -> dict[str, Any]:
        if options.decay_rank != 16:
            raise ExportError(f"decay_rank: {options.decay_rank}, where the layout has 16")
        return {
            "expand_k": ratio(options.num_heads * options.head_dim, width),
            "expand_v": ratio(options.num_heads * options.value_dim, width),
            "num_heads": options.num_heads,
            "num_kv_heads": None if options.kv_heads == options.num_heads else options.kv_heads,
            "use_short_conv": options.conv is not None,
            "conv_size": options.conv or 4,
            "use_output_gate": options.gate,
            "elementwise_affine": options.head_norm_affine,
        }


@register_family
class FlaGatedDeltaNet(FlaFamily):
    """`GatedDeltaNetForCausalLM`."""

    name = model_type = "gated_deltanet"
    about = "GatedDeltaNetForCausalLM"
    mixers = ("gated_delta_net",)
    defaults: ClassVar = {
        "expand_v": 2.0, "use_gate": True, "conv_size": 4, "head_dim": 256, "num_heads": 6, "num_v_heads": None,
        "allow_neg_eigval": False,
    }  # fmt: skip
    needs: ClassVar = {"use_short_conv": True, "output_gate_activation": "swish"}

    def mixer(self, c: dict[str, Any]) -> dict[str, Any]:
        keys, values = c["num_heads"], c["num_v_heads"] or c["num_heads"]
        if values < keys:
            raise CheckpointError(f"num_v_heads is {values}, num_heads {keys}; fewer value heads cannot be expressed")
        return {
            "name": "gated_delta_net",
            "num_heads": values,
            "num_groups": keys if keys != values else None,
            "head_dim": c["head_dim"],
            "value_head_dim": int(c["head_dim"] * c["expand_v"]),
            "conv": c["conv_size"],
            "gate": c["use_gate"],
            "head_norm_eps": c["norm_eps"],
            "allow_neg_eigval": c["allow_neg_eigval"],
        }

    def mixer_entries(self, theirs: str, ours: str, options: Any, i: int, width: int) -> Iterator[Entry]:
        yield from projections(theirs, ours, options, "o_norm")
        yield same(f"{theirs}b_proj.weight", f"{ours}b_proj.weight")
        if options.use_decay:
            yield same(f"{theirs}a_proj.weight", f"{ours}a_proj.weight")
            yield same(f"{theirs}A_log", f"{ours}A_log")
            yield same(f"{theirs}dt_bias", f"{ours}dt_bias")

    def mixer_config(self, options: Any, width: int) -> dict[str, Any]:
        return {
            "head_dim": options.head_dim,
            "expand_v": ratio(options.value_dim, options.head_dim),
            "num_heads": options.num_groups or options.num_heads,
            **({"num_v_heads": options.num_heads} if options.num_groups else {}),
            "conv_size": options.conv or 4,
            "use_gate": options.gate,
            "allow_neg_eigval": options.allow_neg_eigval,
        }


@register_family
class FlaDeltaNet(FlaGatedDeltaNet):
    """`DeltaNetForCausalLM`: no decay, heads from the width, and no gate by default."""

    name = model_type = "delta_net"
    about = "DeltaNetForCausalLM"
    defaults: ClassVar = {
        "expand_k": 1.0, "expand_v": 1.0, "use_gate": False, "conv_size": 4, "num_heads": 16, "allow_neg_eigval": False,
    }  # fmt: skip
    needs: ClassVar = {
        "use_short_conv": True, "use_beta": True, "use_output_norm": True, "qk_norm": "l2", "qk_activation": "silu",
    }  # fmt: skip

    def mixer(self, c: dict[str, Any]) -> dict[str, Any]:
        heads = c["num_heads"]
        sizes = {key: round(c[key] * c["hidden_size"]) // heads for key in ("expand_k", "expand_v")}
        values = {"head_dim": sizes["expand_k"], "expand_v": sizes["expand_v"] / sizes["expand_k"], "num_v_heads": None}
        return {**super().mixer({**c, **values}), "use_decay": False}

    def mixer_config(self, options: Any, width: int) -> dict[str, Any]:
        if options.num_groups:
            raise ExportError(f"num_groups: {options.num_groups}, where all heads have keys of their own")
        told = super().mixer_config(options, width)
        del told["head_dim"]
        told["expand_k"] = ratio(options.num_heads * options.head_dim, width)
        told["expand_v"] = ratio(options.num_heads * options.value_dim, width)
        return told
