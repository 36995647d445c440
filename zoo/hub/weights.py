"""The weights of a saved model as one hash, by which a score and a card name the model they were measured on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from zoo.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weights_hash(folder: str | Path) -> str:
    """SHA-256, in hex, over the names, dtypes, shapes and bytes of all tensors of a saved model, in order of names.

    How the tensors are spread over files, and what else stands in those files, does not matter: the hash of a model is
    the same in one file and in shards, here and after a pull.

    Raises CheckpointError where the folder has no weights, where a file is damaged or missing, or where a tensor is in
    two files.
    """
    digest = hashlib.sha256()
    files = weight_files(folder)
    for name, file in sorted(tensor_files(files).items()):
        with open_weights(file) as opened:
            tensor = opened.get_tensor(name)
            what = [name, opened.get_slice(name).get_dtype(), list(tensor.shape)]
        digest.update(json.dumps(what).encode() + b"\n")
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that transformers would load from a folder: `model.safetensors`, else what its index names.

    Raises CheckpointError where there are none, one is missing, or the index leads out of the folder.
    """
    folder = Path(folder)
    named = _indexed(folder / INDEX) if (folder / INDEX).is_file() else None
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if named is None:
        raise CheckpointError(f"{folder}: no weights in it: neither {SINGLE} nor {INDEX}")
    if missing := [name for name in named if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: {missing[0]} is missing, which {INDEX} names; the folder is not complete")
    return [folder / name for name in named]


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in named if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of weights: {error!r:.200}") from None
    if outside:
        raise CheckpointError(f"{index}: weight file {outside[0]!r} lies outside the folder")
    return named


def tensor_files(files: list[Path]) -> dict[str, Path]:
    """Which file each tensor is in. Raises CheckpointError where a file is damaged, or a tensor is in two."""
    found: dict[str, Path] = {}
    for file in files:
        with open_weights(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                if name in found:
                    raise CheckpointError(f"{file}: tensor {name!r} is also in {found[name].name}")
                found[name] = file
    return found


def weight_shapes(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type (as "F32") and shape of every tensor of a saved model, read from headers alone. Raises CheckpointError."""
    found = {}
    for name, file in tensor_files(weight_files(folder)).items():
        with open_weights(file) as opened:
            part = opened.get_slice(name)
            found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def open_weights(file: Path) -> Any:
    """A safetensors file, opened for reading. Raises CheckpointError where it is damaged or has a name twice."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="pt")
        with file.open("rb") as raw:
            json.loads(raw.read(int.from_bytes(raw.read(8), "little")), object_pairs_hook=once)
    except KeyError as error:
        raise CheckpointError(f"{file}: {error.args[0]!r} is in the header twice") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: the weights are truncated or damaged ({error})") from None
    return opened


def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON; KeyError for a key that the usual reader would overwrite in silence."""
    found: dict[str, Any] = {}
    for key, value in items:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found
