"""Bamba and Falcon-H1 of transformers: Mamba-2 and attention, one after another or side by side, an MLP in each block.

Both name their blocks alike. Falcon-H1 has constants beside its weights (muP); they are multiplied into ours, and what
is written has constants of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mamba2 import (
    INERT,
    as_converted,
    check_convolved,
    expansion,
    mamba2_entries,
    mamba2_options,
    scaled,
    step_floor,
    step_limit,
)
from zoo.convert.layouts.mapping import Entry, same
from zoo.convert.layouts.rope import read_rope, write_rope
from zoo.convert.teachers.adapter import common_values
from zoo.errors import CheckpointError, ExportError
from zoo.mixers.attention import AttentionConfig
from zoo.mixers.mamba2 import Mamba2Config
from zoo.transformers_keys import TOKEN_IDS, present

Scales = Callable[[str], float]
ONES: Scales = lambda part: 1.0  # noqa: E731


class _Hybrid(Family):
    """What the two have in common; a subclass has the mixers and the config."""

    layout = "transformers"
    inert = INERT
    model_type: str

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == self.model_type

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        m = self.multipliers(config)
        embedding, head = "model.embed_tokens.weight", m("head")
        yield scaled(embedding, embedding, m("embedding"))
        for i, layer in enumerate(config.spec.layers):
            name = f"model.layers.{i}."
            yield same(f"{name}input_layernorm.weight", f"{name}mixer_norm.weight")
            yield from self.mixer_entries(name, layer.mixer, config.hidden_size, m)
            yield same(f"{name}pre_ff_layernorm.weight", f"{name}ffn_norm.weight")
            for part in ("gate", "up", "down"):
                for parameter in ("weight", "bias") if layer.ffn.bias else ("weight",):
                    linear = f"{part}_proj.{parameter}"
                    yield scaled(f"{name}feed_forward.{linear}", f"{name}ffn.{linear}", m(part))
        tied = config.tie_word_embeddings
        yield scaled("model.final_layernorm.weight", "model.norm.weight", head / m("embedding") if tied else head)
        if not tied:
            yield same("lm_head.weight", "lm_head.weight")

    def mixer_entries(self, name: str, options: Any, width: int, m: Scales) -> Iterator[Entry]:
        """The tensors of one layer's mixer."""
        raise NotImplementedError

    def multipliers(self, config: ZooConfig) -> Scales:
        """Constants beside the weights of what is read, by part."""
        return ONES

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}

    def check(self, checkpoint: Checkpoint, fixed: dict[str, Any]) -> None:
        """Raise CheckpointError where an option has another value than the one that can be expressed."""
        for key, value in fixed.items():
            if (found := checkpoint.config.get(key, value)) != value:
                raise CheckpointError(f"{checkpoint.path}: {key} is {found!r}; only {value!r} can be expressed")

    def common_fields(self, c: dict[str, Any], mixers: list[dict[str, Any]], longest: int) -> dict[str, Any]:
        """Fields of `ZooConfig` beside the mixers."""
        ffn = {"name": "gated_mlp", "hidden_size": c.get("intermediate_size", 14336), "bias": c.get("mlp_bias", False)}
        return {
            "vocab_size": c["vocab_size"],
            "hidden_size": c["hidden_size"],
            "max_position_embeddings": c.get("max_position_embeddings", longest),
            "layers": [{"mixer": mixer, "ffn": ffn} for mixer in mixers],
            "norm_eps": c.get("rms_norm_eps", 1e-5),
            "tie_word_embeddings": c.get("tie_word_embeddings", False),
            "initializer_range": c.get("initializer_range", 0.02),
            **present(c, *TOKEN_IDS),
        }

    def values(self, config: ZooConfig, mixer: Mamba2Config, attention: AttentionConfig | None) -> dict[str, Any]:
        """Their config from ours, with one kind of Mamba-2 and one of attention."""
        ffns = [layer.ffn for layer in config.spec.layers]
        for i, ffn in enumerate(ffns):
            if ffn is None or ffn.name != "gated_mlp":
                raise ExportError(f"layers.{i}.ffn is {None if ffn is None else ffn.name}; its blocks have gated_mlp")
        check_convolved(mixer)
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1}  # of no layer
        if attention is not None:
            heads = {"num_attention_heads": attention.num_heads, "num_key_value_heads": attention.kv_heads}
            heads["head_dim"] = attention.head_dim
        positions = {} if attention is None else write_rope(attention.rotary, attention.head_dim)
        return {
            **common_values(config, self.model_type, self.about),
            **heads,
            "hidden_size": config.hidden_size,
            "intermediate_size": ffns[0].hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_act": ffns[0].activation,
            "rms_norm_eps": config.norm_eps,
            "max_position_embeddings": config.max_position_embeddings,
            "attention_bias": attention is not None and attention.qkv_bias,
            "mlp_bias": ffns[0].bias,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **positions},
            "mamba_n_heads": mixer.num_heads,
            "mamba_d_head": mixer.value_dim,
            "mamba_n_groups": mixer.num_groups,
            "mamba_d_state": mixer.head_dim,
            "mamba_d_conv": mixer.conv,
            "mamba_conv_bias": mixer.conv_bias,
            "mamba_proj_bias": mixer.qkv_bias,
            **step_limit(mixer),
        }


def attention_entries(theirs: str, ours: str, options: AttentionConfig, m: Scales = ONES) -> Iterator[Entry]:
    """Queries, keys, values and output under the same names at two places."""
    for part in ("q", "k", "v", "o"):
        bias = options.out_bias if part == "o" else options.qkv_bias
        for parameter in ("weight", "bias") if bias else ("weight",):
            yield scaled(f"{theirs}{part}_proj.{parameter}", f"{ours}{part}_proj.{parameter}", m(f"attention.{part}"))


def attention_options(c: dict[str, Any], partial: float, longest: int) -> dict[str, Any]:
    """Options of `attention` from a config of transformers, which turns a part of each head unless it says another."""
    heads = c.get("num_attention_heads", 32)
    size = c.get("head_dim") or c["hidden_size"] // heads
    return {
        "name": "attention",
        "num_heads": heads,
        "num_kv_heads": c.get("num_key_value_heads", 8) or heads,
        "head_dim": size,
        "qkv_bias": c.get("attention_bias", False),
        "out_bias": c.get("attention_bias", False),
        "rotary": read_rope({"max_position_embeddings": longest, **c, "partial_rotary_factor": partial}, size),
    }


def _mamba2(checkpoint: Checkpoint, inner: int, **more: Any) -> dict[str, Any]:
    c = checkpoint.config
    heads, size = c.get("mamba_n_heads", 128), c.get("mamba_d_head", "auto")
    size = inner // heads if size == "auto" else size
    if heads * size != inner:
        raise CheckpointError(f"{checkpoint.path}: mamba_n_heads is {heads}, of {size} in an inner width of {inner}")
    return mamba2_options(
        heads, size, c.get("mamba_d_state", 256), c.get("mamba_n_groups", 1), conv=c.get("mamba_d_conv", 4),
        conv_bias=c.get("mamba_conv_bias", True), bias=c.get("mamba_proj_bias", False),
        eps=c.get("rms_norm_eps", 1e-5), floor=step_floor(checkpoint, c.get("time_step_limit")), **more,
    )  # fmt: skip


@register_family
class Bamba(_Hybrid):
    """`BambaForCausalLM` of transformers: Mamba-2 in some layers, attention in the others."""

    name = "bamba"
    about = "BambaForCausalLM"
    model_type = "bamba"
    mixers = ("attention", "mamba2")

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = checkpoint.config
        self.check(checkpoint, {"hidden_act": "silu"})
        mamba2 = _mamba2(checkpoint, c.get("mamba_expand", 2) * c["hidden_size"])
        longest = 262144
        attention, places = attention_options(c, 0.5, longest), c.get("attn_layer_indices") or []
        mixers = [attention if i in places else mamba2 for i in range(c.get("num_hidden_layers", 32))]
        return self.common_fields(c, mixers, longest)

    def conversion(self, mixer: str, config: ZooConfig) -> dict[str, Any]:
        return as_converted(config.norm_eps) if mixer == "mamba2" else {}

    def mixer_entries(self, name: str, options: Any, width: int, m: Scales) -> Iterator[Entry]:
        if options.name == "attention":
            yield from attention_entries(f"{name}self_attn.", f"{name}mixer.", options)
        else:
            yield from mamba2_entries(f"{name}mamba.", f"{name}mixer.", options, width)

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixers = [layer.mixer.resolved(config.hidden_size) for layer in config.spec.layers]
        mamba2 = next((m for m in mixers if m.name == "mamba2"), None)
        attention = next((m for m in mixers if m.name == "attention"), None)
        if mamba2 is None:
            raise ExportError("needs a layer of Mamba-2")
        return {
            **self.values(config, mamba2, attention),
            "mamba_expand": expansion(mamba2, config.hidden_size),
            "attn_layer_indices": [i for i, m in enumerate(mixers) if m.name == "attention"],
        }


@register_family
class FalconH1(_Hybrid):
    """`FalconH1ForCausalLM` of transformers: Mamba-2 and attention side by side in every layer."""

    name = "falcon_h1"
    about = "FalconH1ForCausalLM"
    model_type = "falcon_h1"
    mixers = ("parallel",)

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = checkpoint.config
        norm = c.get("mamba_rms_norm", False)
        bias = c.get("mamba_proj_bias", False)
        before = {"mamba_norm_before_gate": False} if norm and c.get("mamba_norm_before_gate", True) else {}
        self.check(checkpoint, {"hidden_act": "silu", "projectors_bias": bias, **before})
        if before and "mamba_norm_before_gate" not in c:
            raise CheckpointError(f"{checkpoint.path}: mamba_norm_before_gate is True; only False can be expressed")
        inner = c.get("mamba_d_ssm", 1024) or c.get("mamba_expand", 2) * c["hidden_size"]
        longest = 8192
        attention, mamba2 = attention_options(c, 1.0, longest), _mamba2(checkpoint, inner, norm=norm)
        if (bias or attention["qkv_bias"] or c.get("mlp_bias")) and _told(c):
            raise CheckpointError(f"{checkpoint.path}: {_told(c)[0]} is {c[_told(c)[0]]!r} beside biases")
        mixer = {"name": "parallel", "branches": {"mamba2": mamba2, "attention": attention}}
        return self.common_fields(c, [mixer] * c.get("num_hidden_layers", 32), longest)

    def mixer_entries(self, name: str, options: Any, width: int, m: Scales) -> Iterator[Entry]:
        branches: Any = options.branch_options()
        ours = f"{name}mixer.branches."
        yield from mamba2_entries(
            f"{name}mamba.", f"{ours}mamba2.", branches["mamba2"], width, lambda part: m(f"mamba2.{part}")
        )
        yield from attention_entries(f"{name}self_attn.", f"{ours}attention.", branches["attention"], m)

    def multipliers(self, config: ZooConfig) -> Scales:
        c = config.origin.get("config") if config.origin.get("family") == self.name else None
        found = _multipliers(c or {})
        return lambda part: found.get(part, 1.0)

    def config(self, config: ZooConfig) -> dict[str, Any]:
        options = config.spec.layers[0].mixer
        branches = {label: o.resolved(config.hidden_size) for label, o in options.branch_options().items()}
        if {label: o.name for label, o in branches.items()} != {"mamba2": "mamba2", "attention": "attention"}:
            raise ExportError(f"layers.0.mixer.branches are {', '.join(branches)}; its are attention and mamba2")
        mamba2: Any = branches["mamba2"]
        return {
            **self.values(config, mamba2, branches["attention"]),  # type: ignore[arg-type]
            "mamba_d_ssm": mamba2.num_heads * mamba2.value_dim,
            "mamba_rms_norm": mamba2.norm,
            "mamba_norm_before_gate": False,
            "projectors_bias": mamba2.out_bias,
        }


_SINGLE = {
    "embedding_multiplier": ("embedding",),
    "lm_head_multiplier": ("head",),
    "key_multiplier": ("attention.k",),
    "attention_in_multiplier": ("attention.q", "attention.k", "attention.v"),
    "attention_out_multiplier": ("attention.o",),
    "ssm_in_multiplier": tuple(f"mamba2.{part}" for part in ("g", "v", "k", "q", "dt")),
    "ssm_out_multiplier": ("mamba2.o",),
}
_SEVERAL = {"mlp_multipliers": ("gate", "down"), "ssm_multipliers": _SINGLE["ssm_in_multiplier"]}


def _multipliers(c: dict[str, Any]) -> dict[str, float]:
    """The product of Falcon-H1's constants at each part of the weights."""
    found: dict[str, float] = {}
    for key, parts in (_SINGLE | _SEVERAL).items():
        value = c.get(key)
        if value is not None:
            numbers = value if key in _SEVERAL else [value] * len(parts)
            for part, number in zip(parts, numbers, strict=True):
                found[part] = found.get(part, 1.0) * float(number)
    return found


def _told(c: dict[str, Any]) -> list[str]:
    """The constants that are not one."""
    return [key for key in _SINGLE | _SEVERAL if c.get(key) not in (None, 1, 1.0, [1.0] * len(_SEVERAL.get(key, ())))]
