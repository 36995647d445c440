"""What a run is and where it stands: shared by its stages, and written into every checkpoint."""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.train.checkpoint import CheckpointFolder
from zoo.train.guards import StopFlag
from zoo.train.progress import RunLog
from zoo.train.recipe import Checkpoints, Stage
from zoo.train.sources import TrainingData


@dataclass
class RunState:
    """Where a run is; all of it is in `state.json` of a checkpoint. `done` has one record for each finished stage."""

    stage: int = 0
    step: int = 0  # of the run
    stage_steps: int = 0
    tokens: int = 0
    stage_tokens: int = 0
    cpu_seconds: float = 0.0
    stage_cpu_seconds: float = 0.0
    stage_seconds: float = 0.0
    first_loss: float | None = None
    watch: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    done: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """What all stages of a run share."""

    student: Any
    teacher: Any
    data: TrainingData
    stages: list[Stage]
    seed: int = 0
    eval_tokens: int = 0
    out: Path | None = None
    checkpoints: CheckpointFolder | None = None
    when: Checkpoints = field(default_factory=Checkpoints)
    log: RunLog = field(default_factory=lambda: RunLog(None))
    stop: StopFlag = field(default_factory=StopFlag)
    show: bool = True
    command: str | None = None
    state: RunState = field(default_factory=RunState)
    touched: list[str] = field(default_factory=list)  # parameters that some stage has trained so far


def random_states() -> dict[str, Any]:
    """The states of all random generators, as JSON types."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    states = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _to_text(torch.cuda.get_rng_state())
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set all random generators to states from `random_states`."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_text(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(states["cuda"]))


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
