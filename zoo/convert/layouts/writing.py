"""Writing checkpoints: safetensors in shards with an index, or one file of torch; whole files or none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_SHARD = "5GB"


def save_safetensors(
    folder: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Tensor]], *, max_shard: str = MAX_SHARD
) -> None:
    """`config.json` and `model.safetensors`, in shards with an index where it is larger than `max_shard`."""
    from huggingface_hub import save_torch_state_dict

    write_json(folder / "config.json", config)
    state = {name: tensor.contiguous() for name, tensor in tensors}
    save_torch_state_dict(state, folder, max_shard_size=max_shard, metadata={"format": "pt"})


def save_torch(path: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """One file of `torch.save` that holds nothing but tensors by name."""
    part = path.with_name(f"{path.name}.part")
    torch.save(dict(tensors), part)
    os.replace(part, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file with sorted indentation as the libraries write it."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
