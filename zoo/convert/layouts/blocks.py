"""Weights in fp8 with a scale for each block of rows and columns, as DeepSeek-V3 is published, to plain ones.

    weight_ij = fp8_ij * weight_scale_inv_[i/128][j/128]

Multiplied out in float32, tensor by tensor as they are read. Inputs of the layers stay as precise as they are, where
the authors' kernels round them to fp8 too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry
from zoo.errors import CheckpointError

_SCALE = "_scale_inv"


def block_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Rows and columns of a block; None: the weights are plain. Raises CheckpointError for another quantisation."""
    told = checkpoint.config.get("quantization_config")
    if told is None:
        return None
    size = told.get("weight_block_size")
    fits = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    if told.get("quant_method") != "fp8" or not fits:
        raise CheckpointError(
            f"{checkpoint.path}: quantization_config is {told!r}; only null and fp8 with a weight_block_size are known"
        )
    return size[0], size[1]


def with_scales(entries: Iterator[Entry], checkpoint: Checkpoint) -> Iterator[Entry]:
    """The entries, those of scaled weights with their scales beside them."""
    block = block_size(checkpoint)
    for entry in entries:
        scaled = [name for name in entry.theirs if name + _SCALE in checkpoint.shapes]
        yield entry if block is None or not scaled else _with_scales(entry, scaled, block)


def _with_scales(entry: Entry, scaled: list[str], block: tuple[int, int]) -> Entry:
    count = len(entry.theirs)
    place = {entry.theirs.index(name): count + i for i, name in enumerate(scaled)}

    def read(tensors: Any) -> list[Tensor]:
        return entry.read(_Scaled(tensors, count, place, block))  # type: ignore[arg-type]

    def write(tensors: list[Tensor]) -> list[Tensor]:  # of which only the shapes are asked for
        found = entry.write(tensors)
        scales = [torch.empty([-(-n // b) for n, b in zip(found[i].shape, block, strict=True)]) for i in place]
        return [*found, *scales]

    return Entry((*entry.theirs, *(name + _SCALE for name in scaled)), entry.ours, read, write, entry.optional)


class _Scaled(Sequence[Tensor]):
    """Weights of which some have a scale at another place, each read and multiplied when it is asked for."""

    def __init__(self, tensors: Any, size: int, place: dict[int, int], block: tuple[int, int]) -> None:
        self.tensors, self.size, self.place, self.block = tensors, size, place, block

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.size:
            raise IndexError(i)
        if i not in self.place:
            return self.tensors[i]
        return multiplied(self.tensors[i], self.tensors[self.place[i]], self.block)


def multiplied(weight_OI: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The plain weight in float32; the last blocks may be cut off by the edges."""
    O, I = weight_OI.shape  # noqa: E741
    scale = scale.float().repeat_interleave(block[0], 0)[:O].repeat_interleave(block[1], 1)[:, :I]
    return weight_OI.float() * scale
