"""The folder of a run.

What a run leaves in its folder `out`:
    config.json, model.safetensors, tokenizer files    the trained model: `zoo.create_model("out")`
    train.json       the stages with their tokens and CPU-seconds, and versions; written last: the run is complete
    run.json         what the run was made of; a folder of another run is refused
    log.jsonl        one row a step
    checkpoints/     the newest ones and the best
    initial/         the student before training, where the recipe made it
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor

from zoo.errors import CheckpointError, TrainingError
from zoo.models.create import load_folder
from zoo.text import Documents, Source, find_files
from zoo.train.checkpoint import is_full_disk, write_atomically

OURS = ("run.json", "train.json", "log.jsonl", "checkpoints", "teacher_cache", "initial", "tensorboard")
TEMPORARY = "tmp-"


def processes() -> PartialState:
    """The processes of this run: one, or those that a launcher started. Without an accelerator they talk over gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def claim(out: Path, identity: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Make `out` this run's folder. Raises CheckpointError where it is something else's, and `overwrite` is off."""
    state = processes()
    if state.is_main_process:
        path = out / "run.json"
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out}: is a file, not a folder for a run")
        known = read_json(path)
        if overwrite:
            _empty(out)
            known = {}
        elif known and not resume:
            raise CheckpointError(f"{out}: holds a run already; resume it, choose another folder, or overwrite it")
        elif not known and out.is_dir() and any(not p.name.startswith((TEMPORARY, ".")) for p in out.iterdir()):
            raise CheckpointError(f"{out}: holds something that is not a run; choose another folder, or overwrite it")
        identity = json.loads(json.dumps(identity))
        for key, value in identity.items():
            if key in known and known[key] != value:
                raise CheckpointError(
                    f"{out}: holds another run (its {key} {_difference(known[key], value)}); "
                    "choose another folder, or overwrite it"
                )
        with full_disk_is_said(out):
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({**known, **identity}, indent=1) + "\n")
    state.wait_for_everyone()


def _difference(old: Any, new: Any, path: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        key = next(k for k in old if old[k] != new[k])
        return _difference(old[key], new[key], f"{path}.{key}" if path else str(key))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        i = next(i for i in range(len(old)) if old[i] != new[i])
        return _difference(old[i], new[i], f"{path}.{i}" if path else str(i))
    short = [text if len(text := json.dumps(value)) <= 60 else f"{text[:57]}..." for value in (old, new)]
    return f"differs{f' at {path}' if path else ''}: {short[0]} there, {short[1]} here"


def _empty(out: Path) -> None:
    """Remove what runs and models leave in a folder, and nothing else that may be in it."""
    if not out.is_dir():
        return
    card = ["score.json", "card.json", "tradeoff.json", "by_position.png", "by_length.png", "tradeoff.png"]
    model = ["config.json", "generation_config.json", "conversion.json", *card, *_tokenizer_files(out)]
    names = [*OURS, *model, *(p.name for p in out.glob("model*.safetensors*"))]
    left = [p.name for p in out.iterdir() if p.name not in names and not p.name.startswith((TEMPORARY, "."))]
    if left:
        raise CheckpointError(f"{out}: holds {min(left)!r}, which no run has written; choose another folder")
    for name in names:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _tokenizer_files(out: Path) -> list[str]:
    patterns = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json", "chat_template*")
    return [p.name for pattern in patterns for p in out.glob(pattern)] + ["README.md"]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping; {} where there is no file. Raises CheckpointError where it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return values if isinstance(values, dict) else {}


def save_result(student: Any, data: Any, out: Path, summary: dict[str, Any]) -> None:
    """The trained model as a loadable folder; `train.json` comes last and says that the rest is whole."""
    with full_disk_is_said(out):
        temporary = out / f"{TEMPORARY}model"
        shutil.rmtree(temporary, ignore_errors=True)
        save_quietly(student, temporary)
        data.save(temporary)
        for file in temporary.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            os.replace(file, out / file.name)
        temporary.rmdir()
        write_atomically(out / "train.json", json.dumps(summary, indent=1) + "\n")


def finished(student: Any, out: Path) -> dict[str, Any] | None:
    """`train.json` of a run that is complete, with its weights put into `student`; None where it is not complete."""
    if not (out / "train.json").is_file():
        return None
    student.load_state_dict(load_folder(out).state_dict())
    return read_json(out / "train.json")


@contextmanager
def full_disk_is_said(path: Path) -> Iterator[None]:
    """Turn the many errors of a full disk into one TrainingError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        raise TrainingError(f"{path}: no space left on the disk; make room and start the same command again") from None


def save_quietly(model: Any, folder: str | Path) -> None:
    """`save_pretrained` without a progress bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def weights_digest(model: Any) -> str:
    """SHA-256 over the config and every tensor of a model."""
    digest = hashlib.sha256(json.dumps({**model.config.spec.plain(), "origin": {}}, sort_keys=True).encode())
    for name, t in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(t))
    return digest.hexdigest()


def _bytes(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def fingerprint(data: Source) -> Any:
    """What tells one source from another without reading it: names and sizes of files, or a hash of documents."""
    if isinstance(data, Documents):
        return fingerprint(data.source)
    if isinstance(data, str | Path):
        name = str(data)
        return name if name.startswith("hf:") else [[str(p), p.stat().st_size] for p in find_files(name)]
    digest = hashlib.sha256()
    for item in data:
        digest.update(json.dumps(fingerprint(item) if isinstance(item, Path) else item).encode())
    return digest.hexdigest()
