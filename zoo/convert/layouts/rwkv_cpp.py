"""RWKV-4 in the files of rwkv.cpp (https://github.com/RWKV/rwkv.cpp, docs/FILE_FORMAT.md).

A header of six little-endian int32 (magic, version 100 or 101, vocabulary, width, layers, type), then parameters until
the end of the file: int32 number of dimensions, length of the name, type (0 float32, 1 float16); the dimensions, the
fastest first; the name; the numbers. Names are those of the authors' checkpoints; `time_decay` holds -exp of theirs.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import register_family
from zoo.convert.layouts.files import Checkpoint, Slot, SlotFile
from zoo.convert.layouts.mapping import Entry, mapped, same
from zoo.convert.layouts.rwkv import RWKV4File
from zoo.errors import CheckpointError, ExportError

MAGIC, VERSIONS = 0x67676D66, (100, 101)
_TYPES = {0: torch.float32, 1: torch.float16}
_MOST = {"vocabulary": 1 << 22, "width": 1 << 17, "layers": 1024}  # as in `ModelSpec`


class RWKVCppFile(SlotFile):
    """The parameters of a file, where they lie. Raises CheckpointError, with the path, for what is not a whole file."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            _, _, *sizes, _ = _ints(path, file, 6)
            self.header = dict(zip(_MOST, sizes, strict=True))
            for name, most in _MOST.items():
                if not 1 <= self.header[name] <= most:
                    raise CheckpointError(f"{path}: {name} is {self.header[name]}, expected 1 to {most}")
            slots: dict[str, Slot] = {}
            while file.tell() < size:
                name, slot = _parameter(path, file, size)
                if name in slots:
                    raise CheckpointError(f"{path}: {name} is there twice")
                slots[name] = slot
                file.seek(slot.end)
        super().__init__(path, slots)


def _parameter(path: Path, file: BinaryIO, size: int) -> tuple[str, Slot]:
    at = file.tell()
    dims, length, kind = _ints(path, file, 3)
    if not (1 <= dims <= 3 and 1 <= length <= 256):
        raise CheckpointError(f"{path}: at byte {at} stands no parameter ({dims} dimensions, a name of {length})")
    shape = tuple(_ints(path, file, dims)[::-1])
    name = file.read(length).decode("utf-8", "replace")
    if kind not in _TYPES:
        raise CheckpointError(f"{path}: {name} is quantised (type {kind}); only float32 and float16 can be read")
    start = file.tell()
    end = start + math.prod(shape) * _TYPES[kind].itemsize
    if min(shape) < 1 or end > size:
        raise CheckpointError(f"{path}: {name} of shape {shape} goes beyond the end of the file")
    return name, Slot(_TYPES[kind], shape, start, end)


def _ints(path: Path, file: BinaryIO, count: int) -> tuple[int, ...]:
    data = file.read(4 * count)
    if len(data) < 4 * count:
        raise CheckpointError(f"{path}: ends in the middle (at byte {file.tell()})")
    return struct.unpack(f"<{count}i", data)


@register_family
class RWKVCpp(RWKV4File):
    """`rwkv-4-*.bin` of rwkv.cpp, in float32 or float16; quantised ones are refused."""

    layout = "rwkv_cpp"
    own_format = "a file of rwkv.cpp"
    about = "files of rwkv.cpp, float32 or float16"

    @classmethod
    def opens(cls, path: Path) -> Checkpoint | None:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            start = file.read(8)
        if len(start) < 8 or struct.unpack("<2i", start)[0] != MAGIC or struct.unpack("<2i", start)[1] not in VERSIONS:
            return None
        header = RWKVCppFile(path).header
        return Checkpoint.of_file(path, RWKVCppFile, metadata={"format": cls.layout, **header})

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.metadata.get("format") == self.layout

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        signs = ("att.ln_x.weight", "att.time_maa_x", "att.k_k")
        if newer := [name for name in checkpoint.shapes if name.endswith(signs)]:
            raise CheckpointError(f"{checkpoint.path}: {newer[0]} shows a version of RWKV above 4; only 4 can be read")
        fields = super().fields(checkpoint)
        if "layers" in checkpoint.metadata:  # a file says how many; tensors of more or fewer are named one by one
            fields["layers"] = fields["layers"][:1] * checkpoint.metadata["layers"]
        return fields

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        for entry in super().entries(config):
            theirs, ours = entry.theirs[0], entry.ours[0]
            if theirs.endswith(".time_decay"):
                yield mapped(theirs, ours, lambda t: (-t.float()).log(), lambda t: -t.exp())
            elif ".time_mix_" in theirs:
                yield same(theirs, ours)
            else:
                yield entry

    def config(self, config: ZooConfig) -> dict[str, Any]:
        if config.dtype not in (None, torch.float32, torch.float16, "float32", "float16"):
            raise ExportError(f"dtype: {config.dtype}, where the format has float32 and float16")
        super().config(config)
        return {"vocabulary": config.vocab_size, "width": config.hidden_size, "layers": config.num_hidden_layers}

    def save(self, folder: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Tensor]]) -> None:
        half = 0
        with (folder / "model.bin").open("wb") as file:
            file.write(struct.pack("<6i", MAGIC, VERSIONS[-1], *config.values(), half))
            for name, tensor in tensors:
                raw, kind = name.encode(), {dtype: kind for kind, dtype in _TYPES.items()}[tensor.dtype]
                if tensor.dim() == 2 and kind == 1:
                    half = 1
                file.write(struct.pack("<3i", tensor.dim(), len(raw), kind))
                file.write(struct.pack(f"<{tensor.dim()}i", *reversed(tensor.shape)) + raw)
                file.write(tensor.contiguous().numpy().tobytes())
            file.seek(20)
            file.write(struct.pack("<i", half))
