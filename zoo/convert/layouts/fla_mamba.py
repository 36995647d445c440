"""Mamba and Mamba-2 of flash-linear-attention: the tensors of transformers' classes, other names in the config."""

from __future__ import annotations

from typing import Any

from zoo.config import ZooConfig
from zoo.convert.layouts.family import register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mamba import TransformersMamba
from zoo.convert.layouts.mamba2 import TransformersMamba2
from zoo.errors import CheckpointError

_TO_TRANSFORMERS = {"norm_eps": "layer_norm_epsilon", "dt_rank": "time_step_rank", "dt_limit": "time_step_limit"}
_NEEDS = {"rmsnorm": True, "D_has_hdim": False, "norm_before_gate": False}


def _translated(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with transformers' names in its config, and fla's defaults where those differ."""
    c = checkpoint.config
    for key, value in _NEEDS.items():
        if c.get(key, value) != value:
            raise CheckpointError(f"{checkpoint.path}: {key} is {c[key]!r}; only {value!r} can be expressed")
    renamed = {_TO_TRANSFORMERS.get(key, key): value for key, value in c.items()}
    return Checkpoint(checkpoint.path, {"tie_word_embeddings": False, "n_groups": 1, **renamed}, checkpoint.shapes)


def _back(values: dict[str, Any]) -> dict[str, Any]:
    names = {theirs: fla for fla, theirs in _TO_TRANSFORMERS.items()}
    return {**{names.get(key, key): value for key, value in values.items()}, "fuse_norm": True}


@register_family
class FlaMamba(TransformersMamba):
    """`MambaForCausalLM` of fla."""

    layout = "fla"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config["model_type"] == "mamba" and "fuse_norm" in checkpoint.config

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return super().fields(_translated(checkpoint))

    def config(self, config: ZooConfig) -> dict[str, Any]:
        return _back(super().config(config))


@register_family
class FlaMamba2(TransformersMamba2):
    """`Mamba2ForCausalLM` of fla."""

    layout = "fla"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config["model_type"] == "mamba2" and "fuse_norm" in checkpoint.config

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return super().fields(_translated(checkpoint))

    def config(self, config: ZooConfig) -> dict[str, Any]:
        return _back(super().config(config))
