"""Tensors in other people's files, read one at a time; nothing in a file is trusted.

safetensors are read by this module itself, because a mapped file counts as memory and because the usual reader accepts
two entries of one name. torch's files are unpickled with `weights_only=True`, never otherwise.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.errors import CheckpointError
from zoo.hub.weights import once

MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)


class Slot(NamedTuple):
    """Where a tensor lies: bytes from `start` to `end` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile(ABC):
    """The tensors of one file by name."""

    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""

    def close(self) -> None:  # noqa: B027
        """Let go of what is held open or in memory; nothing, by default."""


class SlotFile(TensorFile):
    """A file that says where each tensor lies; numbers are read from there when they are asked for."""

    def __init__(self, path: Path, slots: dict[str, Slot]) -> None:
        self.path, self.slots = path, slots
        self.shapes = {name: slot.shape for name, slot in slots.items()}

    def get(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        slot = self.slots[name]
        tensor = torch.empty(slot.shape, dtype=slot.dtype)
        if tensor.numel():
            with self.path.open("rb") as file:
                file.seek(slot.start)
                room: Any = tensor.reshape(-1).view(torch.uint8).numpy()
                got = file.readinto(room)
            if got != slot.end - slot.start:
                raise CheckpointError(f"{self.path}: {name} ends in the middle; the file is truncated")
        return tensor


class SafetensorsFile(SlotFile):
    """A safetensors file. Raises CheckpointError unless its header is whole, consistent and fills the file exactly."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, read_header(path))


def read_header(path: Path) -> dict[str, Slot]:
    """The header of a safetensors file, checked: no name twice, no overlap, no hole, no byte beyond the end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{path}: the header says it has {length:,} bytes, in a file of {size:,}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON: {error}") from None
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is there twice") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a mapping of names to tensors")
    header.pop("__metadata__", None)
    slots = {name: _slot(path, name, value, 8 + length) for name, value in header.items()}
    at = 8 + length
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].end)):
        if slot.start != at:
            what = "overlaps the tensor before it" if slot.start < at else "leaves a hole before it"
            raise CheckpointError(f"{path}: {name} {what}")
        at = slot.end
    if at != size:
        raise CheckpointError(f"{path}: truncated or too long: its tensors end at byte {at:,}, the file at {size:,}")
    return slots


def _slot(path: Path, name: str, value: Any, base: int) -> Slot:
    try:
        dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
        start, end = value["data_offsets"]
        whole = all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: {name} has no readable entry in the header: {str(value)[:120]}")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path}: {name} of shape {shape} does not fit its {end - start:,} bytes")
    return Slot(dtype, shape, base + start, base + end)


class TorchFile(TensorFile):
    """A file of `torch.save` with a state dict, perhaps under the key `state_dict` or `model`; never run as a program.

    Raises CheckpointError for a file that needs more than `weights_only=True` to be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _unpickle(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self._tensors[name].clone()

    def close(self) -> None:
        """Let go of the mapped file."""
        self._tensors = {}


def _unpickle(path: Path) -> dict[str, Tensor]:
    import pickle
    import zipfile

    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: is no file of weights, or holds more than tensors, which could run a program; it is refused "
            "(safetensors cannot)"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as weights: {str(error).splitlines()[0]}") from None
    for key in ("state_dict", "model", "module"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict) or not values:
        raise CheckpointError(f"{path}: holds no tensors by name")
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise CheckpointError(f"{path}: {name!r} is not a plain tensor")
    return dict(values)


@dataclass
class Checkpoint:
    """A checkpoint that was opened: the config beside the weights ({} where there is none), and the tensors.

    `metadata` holds what a format says beside both, such as the header of a file.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    _files: dict[str, Path] = field(default_factory=dict)
    _reader: Callable[[Path], TensorFile] | None = None  # None: by the ending of a file
    _stored: dict[str, str] = field(default_factory=dict)  # what the file calls a tensor that was renamed
    _open: tuple[Path, TensorFile] | None = None

    @classmethod
    def of_file(cls, path: Path, reader: Callable[[Path], TensorFile], metadata: dict[str, Any]) -> Checkpoint:
        """A single file in a format of its own."""
        shapes = reader(path).shapes
        return cls(path, {}, shapes, metadata, dict.fromkeys(shapes, path), _reader=reader)

    def get(self, name: str) -> Tensor:
        """One tensor. Raises CheckpointError where there is none of this name."""
        if name not in self._files:
            raise CheckpointError(f"{self.path}: {name} is missing")
        path = self._files[name]
        if self._open is None or self._open[0] != path:  # one shard at a time
            self.close()
            self._open = path, (self._reader or tensor_file)(path)
        return self._open[1].get(self.stored_name(name))

    def stored_name(self, name: str) -> str:
        """What the file itself calls a tensor."""
        return self._stored.get(name, name)

    def renamed(self, names: dict[str, str]) -> Checkpoint:
        """The same files with some tensors under other names. Raises CheckpointError where two would have one name."""
        found = Checkpoint(self.path, self.config, metadata=self.metadata, _reader=self._reader)
        for old in self.shapes:
            new, stored = names.get(old, old), self.stored_name(old)
            if new in found.shapes:
                raise CheckpointError(f"{self.path}: {stored} and {found.stored_name(new)} are both {new}")
            found.shapes[new], found._files[new] = self.shapes[old], self._files[old]
            if new != stored:
                found._stored[new] = stored
        return found

    def close(self) -> None:
        """Close the shard that was read last."""
        if self._open is not None:
            self._open[1].close()
        self._open = None

    def in_file_order(self, names: Iterator[str]) -> list[str]:
        """The names sorted by the file that they are in, so that each shard is opened once."""
        return sorted(names, key=lambda name: str(self._files.get(name, "")))


def tensor_file(path: Path) -> TensorFile:
    """A file of weights, opened by its ending."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A folder with `config.json` and weights, or a single file of weights.

    Raises CheckpointError for a place without weights, an index that leads out of the folder or names a tensor that
    its file does not have, a name that is in two files, and damaged files.
    """
    path = Path(path)
    if path.is_file():
        opened = Checkpoint(path, _read_config(path.parent / "config.json"))
        _add(opened, path, tensor_file(path))
        return opened
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    opened = Checkpoint(path, _read_config(path / "config.json"))
    for file in weight_files(path):
        _add(opened, file, tensor_file(file))
    return opened


def _add(opened: Checkpoint, path: Path, file: TensorFile) -> None:
    for name, shape in file.shapes.items():
        if name in opened.shapes:
            raise CheckpointError(f"{opened.path}: {name} is in {opened._files[name].name} and in {path.name}")
        opened.shapes[name], opened._files[name] = shape, path
    file.close()


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a mapping, found {type(values).__name__}")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder: what its index names, the usual names, or the only such file there."""
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return [_inside(folder, folder / name, file) for file in _shards(folder / name)]
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [_inside(folder, folder / name, name)]
    endings = (".safetensors", ".pth", ".pt", ".bin")
    found = sorted(p for p in folder.iterdir() if p.suffix in endings and p.is_file())
    if len(found) != 1:
        what = "no weights in it" if not found else f"several files of weights ({found[0].name}, ...) and no index"
        raise CheckpointError(f"{folder}: {what}; expected {', '.join(WEIGHT_FILES)} or one of them with an index")
    return [_inside(folder, found[0], found[0].name)]


def _shards(index: Path) -> list[str]:
    values = _read_config(index).get("weight_map")
    if not isinstance(values, dict) or not all(isinstance(file, str) for file in values.values()) or not values:
        raise CheckpointError(f"{index}: has no weight_map of names to files")
    return sorted(set(values.values()))


def _inside(folder: Path, named_by: Path, file: str) -> Path:
    """A file of the folder itself. Caches keep their files as links to one store, which is theirs to do: a link is
    followed where the folder is such a cache's, and refused where it leads out of any other folder."""
    path = folder / file
    if Path(file).name != file or file in ("", ".", ".."):
        raise CheckpointError(f"{named_by}: weight file {file!r} lies outside the folder")
    if not path.is_file():
        raise CheckpointError(f"{named_by}: weight file {file!r} is missing")
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":
        # In huggingface_hub's cache REPO/snapshots/<sha>/file links to REPO/blobs/<hash>, and that, where it came by
        # Xet, to blobs/<hash>, which all repositories share.
        repo = homes[0].parent.parent
        homes = [repo, repo.parent / "blobs"]
    if not any(Path(os.path.realpath(path)).is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path}: is a link that leads out of the folder")
    return path
