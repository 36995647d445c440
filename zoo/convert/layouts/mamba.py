"""Mamba (arXiv:2312.00752) as transformers keeps it, also Falcon's, and as state-spaces/mamba published it.

All have the same modules under nearly the same names: `backbone.embeddings` there is `backbone.embedding` in
mamba_ssm, which also keeps the tied head a second time and pads the vocabulary up to a multiple.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, one_layer, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, depthwise, same
from zoo.errors import CheckpointError, ExportError
from zoo.mixers.mamba import MambaConfig
from zoo.transformers_keys import TOKEN_IDS, present

_INERT = ("out_init", "dt_min", "dt_max")


class _Mamba(Family):
    name = "mamba"
    mixers = ("mamba",)
    inert = _INERT
    embedding: ClassVar[str]

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        yield same(f"backbone.{self.embedding}.weight", "model.embed_tokens.weight")
        for i, layer in enumerate(config.spec.layers):
            theirs, ours = f"backbone.layers.{i}.mixer.", f"model.layers.{i}.mixer."
            yield same(f"backbone.layers.{i}.norm.weight", f"model.layers.{i}.mixer_norm.weight")
            for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
                yield same(f"{theirs}{name}.weight", f"{ours}{name}.weight")
            if layer.mixer.bias:
                yield same(f"{theirs}in_proj.bias", f"{ours}in_proj.bias")
                yield same(f"{theirs}out_proj.bias", f"{ours}out_proj.bias")
            yield depthwise(f"{theirs}conv1d.weight", f"{ours}conv.weight")
            if layer.mixer.conv_bias:
                yield same(f"{theirs}conv1d.bias", f"{ours}conv.bias")
            yield same(f"{theirs}dt_proj.bias", f"{ours}dt_bias")
            yield same(f"{theirs}A_log", f"{ours}A_log")
            yield same(f"{theirs}D", f"{ours}D")
        yield same("backbone.norm_f.weight", "model.norm.weight")
        if not config.tie_word_embeddings:
            yield same("lm_head.weight", "lm_head.weight")

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        return {"lm_head.weight": f"backbone.{self.embedding}.weight"} if config.tie_word_embeddings else {}


def one_mixer(config: ZooConfig) -> Any:
    """The options of the mixers of a model whose layers are all alike, with all sizes. Raises ExportError."""
    return one_layer(config).mixer.resolved(config.hidden_size)


def _expand(mixer: MambaConfig, config: ZooConfig) -> int | float:
    assert mixer.inner_dim is not None  # resolved
    whole, rest = divmod(mixer.inner_dim, config.hidden_size)
    return whole if not rest else mixer.inner_dim / config.hidden_size


@register_family
class TransformersMamba(_Mamba):
    """`MambaForCausalLM` of transformers, as in state-spaces/mamba-*-hf."""

    layout = "transformers"
    about = "MambaForCausalLM"
    embedding = "embeddings"
    model_type = "mamba"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        c = checkpoint.config
        return c.get("model_type") == self.model_type and "state_size" in c and "fuse_norm" not in c  # which fla has

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = checkpoint.config
        if c.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{checkpoint.path}: hidden_act is {c['hidden_act']!r}; Mamba has silu here")
        hidden, expand = c["hidden_size"], c.get("expand", 2)
        rank = c.get("time_step_rank", "auto")
        mixer = {
            "name": "mamba",
            "inner_dim": c.get("intermediate_size") or int(expand * hidden),
            "state_dim": c.get("state_size", 16),
            "dt_rank": math.ceil(hidden / 16) if rank == "auto" else rank,
            "conv": c.get("conv_kernel", 4),
            "conv_bias": c.get("use_conv_bias", True),
            "bias": c.get("use_bias", False),
        }
        return {
            "vocab_size": c["vocab_size"],
            "hidden_size": hidden,
            "layers": [{"mixer": mixer}] * c["num_hidden_layers"],
            "norm_eps": c.get("layer_norm_epsilon", 1e-5),
            "tie_word_embeddings": c.get("tie_word_embeddings", True),
            "initializer_range": c.get("initializer_range", 0.1),
            **present(c, *TOKEN_IDS),
        }

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixer = one_mixer(config)
        return {
            "architectures": [self.about],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": mixer.inner_dim,
            "expand": _expand(mixer, config),
            "num_hidden_layers": config.num_hidden_layers,
            "state_size": mixer.state_dim,
            "time_step_rank": mixer.dt_rank,
            "conv_kernel": mixer.conv,
            "use_conv_bias": mixer.conv_bias,
            "use_bias": mixer.bias,
            "hidden_act": "silu",
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tie_word_embeddings,
            **{key: getattr(config, key) for key in TOKEN_IDS},
        }


@register_family
class FalconMamba(TransformersMamba):
    """`FalconMambaForCausalLM` of transformers: steps, B and C are divided by their root mean square."""

    name = "falcon_mamba"
    about = "FalconMambaForCausalLM"
    model_type = "falcon_mamba"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        found = super().fields(checkpoint)
        for layer in found["layers"]:
            layer["mixer"]["bcdt_norm_eps"] = checkpoint.config.get("mixer_rms_eps", 1e-6)
        return found

    def config(self, config: ZooConfig) -> dict[str, Any]:
        eps = one_mixer(config).bcdt_norm_eps
        if eps is None:
            raise ExportError("norms steps, B and C, which this model does not")
        return {**super().config(config), "mixer_rms_eps": eps}


@register_family
class MambaSSM(_Mamba):
    """`config.json` and `pytorch_model.bin` of state-spaces/mamba-*, without "-hf"."""

    layout = "mamba_ssm"
    about = "MambaLMHeadModel of the package mamba_ssm"
    embedding = "embedding"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        c = checkpoint.config
        return "d_model" in c and "n_layer" in c and (c.get("ssm_cfg") or {}).get("layer", "Mamba1") == "Mamba1"

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        c = checkpoint.config
        allowed = {"rms_norm": (True,), "d_intermediate": (0,), "attn_layer_idx": ([],)}
        for key, values in allowed.items():
            if c.get(key, values[0]) not in values:
                raise CheckpointError(f"{checkpoint.path}: {key} is {c[key]!r}; only {values[0]!r} can be expressed")
        ssm, width = {k: v for k, v in (c.get("ssm_cfg") or {}).items() if k != "layer"}, c["d_model"]
        known = {"d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias"}
        if unknown := sorted(set(ssm) - known - {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"}):
            raise CheckpointError(f"{checkpoint.path}: ssm_cfg.{unknown[0]} is not known")
        rank = ssm.get("dt_rank", "auto")
        mixer = {
            "name": "mamba",
            "inner_dim": int(ssm.get("expand", 2) * width),
            "state_dim": ssm.get("d_state", 16),
            "dt_rank": math.ceil(width / 16) if rank == "auto" else rank,
            "conv": ssm.get("d_conv", 4),
            "conv_bias": ssm.get("conv_bias", True),
            "bias": ssm.get("bias", False),
        }
        multiple = c.get("pad_vocab_size_multiple", 8)
        return {
            "vocab_size": -(-c["vocab_size"] // multiple) * multiple,
            "hidden_size": width,
            "layers": [{"mixer": mixer}] * c["n_layer"],
            "tie_word_embeddings": c.get("tie_embeddings", True),
        }

    def config(self, config: ZooConfig) -> dict[str, Any]:
        mixer = one_mixer(config)
        ssm = {"d_state": mixer.state_dim, "d_conv": mixer.conv, "expand": _expand(mixer, config)}
        return {
            "d_model": config.hidden_size,
            "d_intermediate": 0,
            "n_layer": config.num_hidden_layers,
            "vocab_size": config.vocab_size,
            "ssm_cfg": {
                "layer": "Mamba1",
                **ssm,
                "dt_rank": mixer.dt_rank,
                "conv_bias": mixer.conv_bias,
                "bias": mixer.bias,
            },
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 1,
            "tie_embeddings": config.tie_word_embeddings,
        }

    def save(self, folder: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Tensor]]) -> None:
        save_mamba_ssm(folder, config, tensors, self.embedding)


def save_mamba_ssm(folder: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Tensor]], embedding: str) -> None:
    """The files of the package mamba_ssm: a tied head is in them a second time."""
    from zoo.convert.layouts.writing import save_torch, write_json

    found = dict(tensors)
    found.setdefault("lm_head.weight", found[f"backbone.{embedding}.weight"])
    write_json(folder / "config.json", config)
    save_torch(folder / "pytorch_model.bin", iter(found.items()))
