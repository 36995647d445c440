"""Weights in files of bounded size, without ever holding more than one of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from zoo.errors import ConfigError
from zoo.hub.weights import INDEX, open_weights, weight_files


def size_in_bytes(size: int | str) -> int:
    """``"5GB"`` or a number as bytes. Raises ConfigError for anything else."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B?)", str(size).upper())
    found = 0 if text is None or text[2] not in units else int(float(text[1]) * units[text[2]])
    if found < 1:
        raise ConfigError(f"max_shard_size: expected a size such as '5GB' or '200MB', got {size!r}")
    return found


def reshard(folder: Path, out: Path, max_shard_size: int | str) -> list[Path]:
    """Write the weights of `folder` into `out` in files of at most `max_shard_size`, with their index; those files.

    A tensor that is larger has a file of its own. Nothing is written, and [] comes back, where the files are small
    enough as they are.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    files, limit = weight_files(folder), size_in_bytes(max_shard_size)
    sizes: dict[str, int] = {}
    place = {}
    for file in files:
        with open_weights(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                tensor = opened.get_tensor(name)
                sizes[name], place[name] = tensor.numel() * tensor.element_size(), file
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    if all(file.stat().st_size <= limit for file in files) or len(plan.filename_to_tensors) <= len(files):
        return []
    written = []
    for shard, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            with open_weights(place[name]) as opened:
                tensors[name] = opened.get_tensor(name)
        save_file(tensors, out / shard, metadata={"format": "pt"})
        written.append(out / shard)
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*written, out / INDEX]
