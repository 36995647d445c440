"""Mamba-2 (arXiv:2405.21060) as transformers keeps it, and as state-spaces/mamba published it.

Both project gate, x, B, C and the steps by one matrix and run one convolution over x, B and C; here each has its own.
`mamba2_entries` takes such a layer apart for the hybrids too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mamba import one_mixer, save_mamba_ssm
from zoo.convert.layouts.mapping import Entry, Way, same, split
from zoo.errors import CheckpointError, ExportError
from zoo.mixers.mamba2 import Mamba2Config
from zoo.transformers_keys import TOKEN_IDS, present

INERT = ("dt_min", "dt_max")
_PARTS = ("g", "v", "k", "q", "dt")  # gate, x, B, C and steps, in the order of their projection

Scales = Callable[[str], float]


def mamba2_entries(
    theirs: str, ours: str, options: Mamba2Config, width: int, scales: Scales | None = None
) -> Iterator[Entry]:
    """A Mamba-2 layer at `theirs`, with its fused projection and convolution, and the mixer at `ours`.

    scales: constants that stand beside their weights, by part: g, v, k, q, dt of the projection, o of the output. They
    are multiplied into ours; what is written has constants of one.
    """
    o = options.resolved(width)
    groups = o.num_groups or o.num_heads
    sizes = [o.num_heads * o.value_dim, o.num_heads * o.value_dim, groups * o.head_dim, groups * o.head_dim]
    numbers = [scales(part) for part in _PARTS] if scales else None
    for parameter in ("weight", "bias") if o.qkv_bias else ("weight",):
        yield _projection(theirs, ours, parameter, [*sizes, o.num_heads], numbers)
        yield scaled(f"{theirs}out_proj.{parameter}", f"{ours}o_proj.{parameter}", scales("o") if scales else 1.0)
    for parameter in ("weight", "bias") if o.conv_bias else ("weight",):
        yield _convolution(theirs, ours, parameter, sizes[1:])
    for name in ("A_log", "D", "dt_bias", *(["norm.weight"] if o.norm else [])):
        yield same(f"{theirs}{name}", f"{ours}{name}")


def _projection(theirs: str, ours: str, parameter: str, sizes: list[int], numbers: list[float] | None) -> Entry:
    names = tuple(f"{ours}{part}_proj.{parameter}" for part in _PARTS)
    entry = split(f"{theirs}in_proj.{parameter}", names, sizes)
    if numbers is None or all(number == 1 for number in numbers):
        return entry
    return Entry(entry.theirs, names, _times(entry.read, numbers), entry.write)


def _times(read: Way, numbers: list[float]) -> Way:
    return lambda tensors: [t * number for t, number in zip(read(tensors), numbers, strict=True)]


def scaled(theirs: str, ours: str, number: float) -> Entry:
    """A tensor that has a constant beside it there, which is multiplied into ours; what is written has none."""
    return Entry((theirs,), (ours,), list if number == 1 else (lambda t: [t[0] * number]), list)


def _convolution(theirs: str, ours: str, parameter: str, sizes: list[int]) -> Entry:
    names = tuple(f"{ours}{part}_conv.{parameter}" for part in ("v", "k", "q"))
    if parameter == "bias":
        return split(f"{theirs}conv1d.bias", names, sizes)

    def read(tensors: list[Tensor]) -> list[Tensor]:
        return [piece.squeeze(1).contiguous() for piece in tensors[0].split(sizes)]

    def write(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(tensors).unsqueeze(1)]

    return Entry((f"{theirs}conv1d.weight",), names, read, write)


def mamba2_options(
    heads: int, head_size: int, state: int, groups: int, *, conv: int, conv_bias: bool, bias: bool, eps: float,
    norm: bool = True, floor: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Options of `mamba2` from the sizes that the published configs name."""
    return {
        "name": "mamba2",
        "num_heads": heads,
        "head_dim": state,
        "value_head_dim": head_size,
        "num_groups": groups,
        "conv": conv,
        "conv_bias": conv_bias,
        "norm": norm,
        "norm_groups": groups if norm else None,
        "norm_eps": eps,
        "dt_floor": floor,
        **dict.fromkeys(("qkv_bias", "out_bias", "gate_bias", "step_bias"), bias),
    }


def as_converted(eps: float) -> dict[str, Any]:
    """Options of a layer that starts from attention, so that it has the published form: heads that share no state, a
    convolution, biases everywhere, a norm of the model's `eps`, and B and C without positions, norm or features.
    """
    return {
        "num_kv_heads": None,
        "conv": 4,
        "conv_bias": True,
        "rotary": None,
        "qk_norm": False,
        "feature_map": None,
        "scale": 1.0,
        "norm_eps": eps,
        **dict.fromkeys(("qkv_bias", "out_bias", "gate_bias", "step_bias"), True),
    }


def step_floor(checkpoint: Checkpoint, limit: Any) -> float:
    """The least step of a range (least, largest) or None. Raises CheckpointError for a range that ends."""
    low, high = (0.0, math.inf) if limit is None else limit
    if high not in (math.inf, {"__float__": "Infinity"}):  # the second as transformers writes it
        raise CheckpointError(f"{checkpoint.path}: steps are limited to {limit!r}; only a lower limit can be expressed")
    return float(low)


def step_limit(options: Mamba2Config) -> dict[str, Any]:
    """The range of the steps in a config of transformers, where they have a least one."""
    return {"time_step_limit": [options.dt_floor, {"__float__": "Infinity"}]} if options.dt_floor else {}


class _Mamba2(Family):
    name = "mamba2"
    mixers: ClassVar[tuple[str, ...]] = ("mamba2",)
    inert = (*INERT, "max_position_embeddings")
    embedding: ClassVar[str]

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield same(f"backbone.{self.embedding}.weight", "model.embed_tokens.weight")
        for i, layer in enumerate(config.spec.layers):
            theirs, ours = f"backbone.layers.{i}.", f"model.layers.{i}."
            yield same(f"{theirs}norm.weight", f"{ours}mixer_norm.weight")
            yield from self.mixer_entries(f"{theirs}mixer.", f"{ours}mixer.", layer.mixer, config.hidden_size)
        yield same("backbone.norm_f.weight", "model.norm.weight")
        if not config.tie_word_embeddings:
            yield same("lm_head.weight", "lm_head.weight")

    def mixer_entries(self, theirs: str, ours: str, mixer: Any, width: int) -> Iterator[Entry]:
        """Those of the mixer of a layer."""
        return mamba2_entries(theirs, ours, mixer, width)

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        return {"lm_head.weight": f"backbone.{self.embedding}.weight"} if config.tie_word_embeddings else {}


def bare_mixer(config: ZooConfig) -> Mamba2Config:
    """As `one_mixer`, of blocks without a channel mixer and in the published form. Raises ExportError."""
    mixer = one_mixer(config)
    if config.spec.layers[0].ffn is not None:
        raise ExportError("its blocks have no channel mixer, those of this model do")
    check_convolved(mixer)
    return mixer


def check_convolved(mixer: Mamba2Config) -> None:
    """Raise ExportError for a mixer without a convolution, or with shared states, of which no class there knows."""
    if mixer.conv is None:
        raise ExportError("layers.0.mixer.conv is None; its layers have a convolution: conv 4 and conv_bias true")
    if mixer.num_groups is None:
        raise ExportError(f"layers.0.mixer.num_kv_heads is {mixer.kv_heads}; its heads have a state each")


def expansion(mixer: Mamba2Config, width: int) -> int:
    """How many times the model's width the inner width is. Raises ExportError where it is no whole number."""
    whole, rest = divmod(mixer.num_heads * mixer.value_dim, width)
    if rest:
        raise ExportError(
            f"mixer.value_head_dim: {mixer.num_heads} heads of {mixer.value_dim} are no multiple of the width {width}"
        )
    return whole


@register_family
class TransformersMamba2(_Mamba2):
    """`Mamba2ForCausalLM` of transformers, as in mistralai/Mamba-Codestral-7B-v0.1."""

    layout = "transformers"
    about = "Mamba2ForCausalLM"
    embedding = "embeddings"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") == "mamba2" and "fuse_norm" not in checkpoint.config  # which fla has

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = checkpoint.config
        if c.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{checkpoint.path}: hidden_act is {c['hidden_act']!r}; Mamba-2 has silu here")
        heads, size, eps = c.get("num_heads", 128), c.get("head_dim", 64), c.get("layer_norm_epsilon", 1e-5)
        if heads * size != c["hidden_size"] * c.get("expand", 2):
            raise CheckpointError(f"{checkpoint.path}: {heads} heads of {size} are not expand times hidden_size")
        mixer = mamba2_options(
            heads, size, c.get("state_size", 128), c.get("n_groups", 8), conv=c.get("conv_kernel", 4),
            conv_bias=c.get("use_conv_bias", True), bias=c.get("use_bias", False), eps=eps,
            floor=step_floor(checkpoint, c.get("time_step_limit")),
        )  # fmt: skip
        return {
            "vocab_size": c["vocab_size"],
            "hidden_size": c["hidden_size"],
            "layers": [{"mixer": mixer}] * c["num_hidden_layers"],
            "norm_eps": eps,
            "tie_word_embeddings": c.get("tie_word_embeddings", False),
            "initializer_range": c.get("initializer_range", 0.1),
            **present(c, *TOKEN_IDS),
        }

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixer = bare_mixer(config)
        return {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "expand": expansion(mixer, config.hidden_size),
            "num_hidden_layers": config.num_hidden_layers,
            "num_heads": mixer.num_heads,
            "head_dim": mixer.value_dim,
            "state_size": mixer.head_dim,
            "n_groups": mixer.num_groups,
            "conv_kernel": mixer.conv,
            "use_conv_bias": mixer.conv_bias,
            "use_bias": mixer.qkv_bias,
            **step_limit(mixer),
            "hidden_act": "silu",
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tie_word_embeddings,
            **{key: getattr(config, key) for key in TOKEN_IDS},
        }


@register_family
class Mamba2SSM(_Mamba2):
    """`config.json` and `pytorch_model.bin` of state-spaces/mamba2-*."""

    layout = "mamba_ssm"
    about = "MambaLMHeadModel of the package mamba_ssm, ssm_cfg.layer Mamba2"
    embedding = "embedding"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        c = checkpoint.config
        named = "d_model" in c and "n_layer" in c and (c.get("ssm_cfg") or {}).get("layer") == "Mamba2"
        return named and bool(c.get("attn_layer_idx")) == ("attention" in self.mixers)

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = checkpoint.config
        allowed = {"rms_norm": (True,), "d_intermediate": (0,), "attn_layer_idx": ([],)}
        for key, values in allowed.items():
            if c.get(key, values[0]) not in values:
                raise CheckpointError(f"{checkpoint.path}: {key} is {c[key]!r}; only {values[0]!r} can be expressed")
        ssm, width = {k: v for k, v in c["ssm_cfg"].items() if k not in _SSM_INERT}, c["d_model"]
        for key, value in ssm.items():
            if key not in _SSM and (key not in _SSM_FIXED or value != _SSM_FIXED[key]):
                raise CheckpointError(f"{checkpoint.path}: ssm_cfg.{key} is {value!r}, which cannot be expressed")
        ssm = {**_SSM, **ssm}
        inner = ssm["expand"] * width
        if inner % ssm["headdim"]:
            raise CheckpointError(f"{checkpoint.path}: ssm_cfg.headdim is {ssm['headdim']}, of an inner width {inner}")
        mixer = mamba2_options(
            inner // ssm["headdim"], ssm["headdim"], ssm["d_state"], ssm["ngroups"], conv=ssm["d_conv"],
            conv_bias=ssm["conv_bias"], bias=ssm["bias"], eps=1e-5, norm=ssm["rmsnorm"],
            floor=step_floor(checkpoint, ssm["dt_limit"]),
        )  # fmt: skip
        multiple = c.get("pad_vocab_size_multiple", 8)
        return {
            "vocab_size": -(-c["vocab_size"] // multiple) * multiple,
            "hidden_size": width,
            "layers": [{"mixer": mixer}] * c["n_layer"],
            "tie_word_embeddings": c.get("tie_embeddings", True),
        }

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixer = bare_mixer(config)
        return {
            "d_model": config.hidden_size,
            "d_intermediate": 0,
            "n_layer": config.num_hidden_layers,
            "vocab_size": config.vocab_size,
            "ssm_cfg": {
                "layer": "Mamba2",
                "d_state": mixer.head_dim,
                "d_conv": mixer.conv,
                "expand": expansion(mixer, config.hidden_size),
                "headdim": mixer.value_dim,
                "ngroups": mixer.num_groups,
                "rmsnorm": mixer.norm,
                "conv_bias": mixer.conv_bias,
                "bias": mixer.qkv_bias,
                **({"dt_limit": [mixer.dt_floor, math.inf]} if mixer.dt_floor else {}),
            },
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 1,
            "tie_embeddings": config.tie_word_embeddings,
        }

    def save(self, folder: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Any]]) -> None:
        save_mamba_ssm(folder, config, tensors, self.embedding)


# Of the module Mamba2 of mamba_ssm: what a config may say, what it must, and what changes nothing in a trained model.
_SSM = {
    "d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "rmsnorm": True, "conv_bias": True,
    "bias": False, "dt_limit": None,
}  # fmt: skip
_SSM_FIXED = {"d_ssm": None, "D_has_hdim": False, "norm_before_gate": False}
_SSM_INERT = {
    "layer", "conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "chunk_size", "use_mem_eff_path",
}  # fmt: skip
