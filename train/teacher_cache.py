"""The teacher's tensors on disk, for stages that go over the same batches more than once.

What is kept is what the losses compare with: final states before the vocabulary (not logits: 1.2 kB a token instead of
98 kB in SmolLM2-135M, and nothing is cut off), and where a loss needs them the states of layers and mixers. Under bf16
what only meets products in bf16 is kept in bf16; the first pass uses the rounded tensors as well, so every pass sees
the same numbers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.errors import TrainingError
from zoo.train.checkpoint import is_full_disk


class TeacherCache:
    """One file a batch in `folder`; `key` names teacher, data and stage, and another key starts from nothing."""

    def __init__(self, folder: Path, key: str, batches: int, bf16: bool) -> None:
        self.root, self.folder, self.batches = folder, folder / key, batches
        self.dtype = torch.bfloat16 if bf16 else None

    def get(self, index: int, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a batch, from disk or made and written. Raises TrainingError where the disk is too small."""
        file = self.folder / f"{index:08d}.safetensors"
        if file.is_file():
            try:
                return load_file(file)
            except SafetensorError:  # cut off by a crash of the machine: make it again
                file.unlink()
        tensors = {n: self._round(n, t).contiguous() for n, t in make().items()}
        self._write(file, index, {n: t.cpu() for n, t in tensors.items()})
        return tensors

    def _round(self, name: str, t: Tensor) -> Tensor:
        return t.to(self.dtype) if self.dtype is not None and name.startswith(("last", "mixer")) else t

    def _write(self, file: Path, index: int, tensors: dict[str, Tensor]) -> None:
        if not self.folder.is_dir():
            shutil.rmtree(self.root, ignore_errors=True)  # of an earlier stage
            self.folder.mkdir(parents=True)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        needed, free = size * (self.batches - index), shutil.disk_usage(self.folder).free
        if needed > free:
            raise TrainingError(
                f"{self.folder}: the teacher's outputs need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                "set cache_teacher=false or fewer tokens"
            )
        temporary = file.with_suffix(".tmp")
        try:
            save_file(tensors, temporary)
            os.replace(temporary, file)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            if not is_full_disk(error):
                raise
            raise TrainingError(f"{self.folder}: no space left on the disk; set cache_teacher=false") from None

    def clear(self) -> None:
        """Remove everything: the stage is over."""
        shutil.rmtree(self.root, ignore_errors=True)
