"""Writing checkpoints: safetensors in shards with an index, or one file of torch; whole files or none.

safetensors are written tensor by tensor as they are made: sizes are known beforehand, so the header comes first, and no
more than one entry of a model is in memory beside it. The files get their names when all of them are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.layouts.files import DTYPES
from zoo.errors import ExportError

MAX_SHARD = 5 * 10**9  # bytes, as in huggingface_hub
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorStream(Iterator[tuple[str, Tensor]]):
    """Tensors by name, made one after the other; `described` holds the same on the meta device."""

    def __init__(self, described: dict[str, Tensor], source: Iterator[tuple[str, Tensor]]) -> None:
        self.described, self._source = described, source

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._source)


def save_safetensors(
    folder: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Tensor]], *, max_shard: int | None = None
) -> None:
    """`model.safetensors`, in shards with an index where it is larger than `max_shard` bytes, and then `config.json`.

    tensors: a `TensorStream`, of which one tensor at a time is in memory, or any others, which are collected.
    """
    if not isinstance(tensors, TensorStream):
        held = dict(tensors)
        tensors = TensorStream({name: t.to("meta") for name, t in held.items()}, iter(held.items()))
    shards = _shards(tensors.described, MAX_SHARD if max_shard is None else max_shard)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    parts = [_write_shard(folder / f"{file}.part", shard, tensors) for file, shard in zip(names, shards, strict=True)]
    for old in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
        old.unlink(missing_ok=True)  # an index of before would lead to files of before
    for part, file in zip(parts, names, strict=True):
        os.replace(part, folder / file)
    if len(shards) > 1:
        total = sum(_bytes(t) for t in tensors.described.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    write_json(folder / "config.json", config)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shards(described: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in described.items():
        if shards[-1] and size + _bytes(tensor) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += _bytes(tensor)
    return shards


def _write_shard(path: Path, shard: dict[str, Tensor], source: Iterator[tuple[str, Tensor]]) -> Path:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in shard.items():
        end = at + _bytes(tensor)
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for wanted, expected in shard.items():
            name, tensor = next(source)
            if (name, tensor.shape, tensor.dtype) != (wanted, expected.shape, expected.dtype):
                raise ExportError(f"{path.parent}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not as described")
            if tensor.numel():
                raw_bytes: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(raw_bytes)
            del tensor
    return path


def save_torch(path: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """One file of `torch.save` that holds nothing but tensors by name."""
    part = path.with_name(f"{path.name}.part")
    torch.save(dict(tensors), part)
    os.replace(part, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file with sorted indentation as the libraries write it."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
