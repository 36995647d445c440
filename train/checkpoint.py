"""Checkpoints that are either complete or not there.

A checkpoint is a folder `step-000000123` with tensors (safetensors), `state.json`, `manifest.json` (size and SHA-256 of
each file) and `COMPLETE` (the SHA-256 of the manifest). It is written under a temporary name, every file and the folder
are flushed to the disk, and only then it gets its name. A process that is killed leaves the older ones as they were.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.errors import CheckpointError, TrainingError

Tensors = dict[str, Tensor]
_NAME = re.compile(r"step-(\d{9})")
_TEMPORARY = "tmp-"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its state, and its tensors on demand."""

    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> Tensors:
        """The tensors of one file; {} where it was not written."""
        file = self.path / f"{name}.safetensors"
        return load_file(file) if file.is_file() else {}


class CheckpointFolder:
    """The checkpoints of one run. `identity` names the run; those of another one are not touched but refused."""

    def __init__(self, folder: Path, identity: str, keep: int = 2) -> None:
        self.folder, self.identity, self.keep = folder, identity, keep

    def save(
        self, step: int, tensors: dict[str, Tensors], state: dict[str, Any], score: tuple[int, float] | None = None
    ) -> Path:
        """Write a checkpoint and remove those that are no longer kept.

        Args:
            step: steps of the whole run.
            tensors: by file name, then by tensor name.
            state: JSON types.
            score: (stage, loss): the lowest of the newest stage is kept beside the last `keep`.

        Raises TrainingError on a full disk; what was there before stays.
        """
        final = self.folder / f"step-{step:09d}"
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        try:
            self._write(temporary, tensors, {**state, "step_of_run": step, "identity": self.identity, "score": score})
            if final.exists():
                self._remove(final)
            os.rename(temporary, final)
            _fsync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not is_full_disk(error):
                raise
            raise TrainingError(
                f"{self.folder}: no space left on the disk; nothing is lost but the steps since the last checkpoint. "
                "Make room and start the same command again"
            ) from None
        self._prune()
        return final

    def _write(self, folder: Path, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, values in tensors.items():
            if values:
                save_file({n: t.contiguous() for n, t in values.items()}, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
        manifest = folder / "manifest.json"
        manifest.write_text(json.dumps(files, indent=1), encoding="utf-8")
        for file in folder.iterdir():
            _fsync(file)
        (folder / "COMPLETE").write_text(_sha256(manifest), encoding="ascii")
        _fsync(folder / "COMPLETE")
        _fsync(folder)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None where there is none.

        A damaged one is passed over with a warning. Raises CheckpointError where all are damaged, or belong to another
        run.
        """
        self._sweep()
        problems = []
        for path in reversed(self._all()):
            try:
                checkpoint = load_checkpoint(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if checkpoint.state["identity"] != self.identity:
                raise CheckpointError(f"{path}: belongs to another run; choose another folder, or overwrite this one")
            if problems:
                warnings.warn(f"{problems[0]}; going on from {path.name}", stacklevel=2)
            return checkpoint
        if problems:
            raise CheckpointError(f"{problems[0]}, and there is no older one; start again with overwrite")
        return None

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name))

    def _sweep(self) -> None:
        for path in self.folder.glob(f"{_TEMPORARY}*") if self.folder.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        """Take the name away first: a half-removed checkpoint must not look like a damaged one."""
        gone = self.folder / f"{_TEMPORARY}gone-{path.name}"
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _prune(self) -> None:
        paths = self._all()
        scored = [(path, _score(path)) for path in paths]
        stage = max((s[0] for _, s in scored if s), default=None)
        ranked = [(s[1], path) for path, s in scored if s and s[0] == stage]
        kept = set(paths[-self.keep :]) | ({min(ranked)[1]} if ranked else set())
        for path in paths:
            if path not in kept:
                self._remove(path)


def _score(path: Path) -> tuple[int, float] | None:
    try:
        score = json.loads((path / "state.json").read_text(encoding="utf-8"))["score"]
        return None if score is None else (int(score[0]), float(score[1]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest. Raises CheckpointError naming the first wrong one."""
    path = Path(path)
    marker, manifest = path / "COMPLETE", path / "manifest.json"
    if not marker.is_file() or not manifest.is_file():
        raise CheckpointError(f"{path}: this checkpoint was not written to its end")
    if marker.read_text(encoding="ascii", errors="replace") != _sha256(manifest):
        raise CheckpointError(f"{manifest}: damaged")
    for name, entry in json.loads(manifest.read_text(encoding="utf-8")).items():
        file = path / name
        size = file.stat().st_size if file.is_file() else -1
        if size != entry["bytes"]:
            raise CheckpointError(f"{file}: truncated, {max(size, 0)} of {entry['bytes']} bytes")
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: damaged")
    return Checkpoint(path, json.loads((path / "state.json").read_text(encoding="utf-8")))


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that the disk (or the user's share of it) is full."""
    return getattr(error, "errno", None) in _NO_SPACE or "os error 28" in str(error) or "No space left" in str(error)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that either the old or the new one is there, whatever happens."""
    temporary = path.with_name(f".{_TEMPORARY}{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if not is_full_disk(error):
            raise
        raise TrainingError(f"{path}: no space left on the disk; make room and start the same command again") from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
