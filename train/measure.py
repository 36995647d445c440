"""What a model costs: bytes of state, tokens a second, and the machine it was measured on.

Times of several models are taken in turns, one step of each after the other, so that other work on the machine falls on
all of them alike; the ratio of two models is then worth more than the numbers themselves.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.models.costs import state_bytes
from zoo.train.evaluation import autocast, evaluating

WARM_UP = 3  # decoding steps before the clock starts; the first makes room in growing buffers


def position_limit(model: Any) -> int | None:
    """The longest sequence a model takes, or None: learned positions end somewhere."""
    return model.config.max_position_embeddings if model.config.positions == "learned" else None


def fits(model: Any, length: int) -> bool:
    """Whether a model takes sequences of `length`."""
    limit = position_limit(model)
    return limit is None or length <= limit


def state_bytes_at(model: Any, length: int) -> int | None:
    """Bytes of the state of one sequence after `length` tokens; None where the model has none or is not so long."""
    with evaluating(model):
        return state_bytes(model, length)


@dataclass
class Times:
    """Seconds by length: of all prefill pieces up to it, and of single decoding steps there; wall and CPU."""

    prefilled: int = 0
    prefill: tuple[float, float] = (0.0, 0.0)
    prefill_at: dict[int, tuple[int, float, float]] = field(default_factory=dict)
    steps_at: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def prefill_tokens_per_s(self, cpu: bool = False) -> dict[int, float]:
        """Tokens a second (or a CPU-second) of reading a prompt of each length."""
        return {length: count / max(times[cpu], 1e-9) for length, (count, *times) in self.prefill_at.items()}

    def decode_tokens_per_s(self, cpu: bool = False) -> dict[int, float]:
        """Tokens a second (or a CPU-second) of writing after each length, from the median step."""
        return {length: 1 / max(self.median_step(length, cpu), 1e-9) for length in self.steps_at}

    def decode_speedup(self, other: Times) -> dict[int, float]:
        """How many times as fast as `other` a step is: the median over pairs of steps taken one after the other."""
        return {
            length: statistics.median(
                b[0] / max(a[0], 1e-9) for a, b in zip(steps, other.steps_at[length], strict=True)
            )
            for length, steps in self.steps_at.items()
            if length in other.steps_at
        }

    def median_step(self, length: int, cpu: bool = False) -> float:
        """Median seconds of one decoding step."""
        return statistics.median(step[cpu] for step in self.steps_at[length])


def measure_speed(
    models: Mapping[str, Any],
    lengths: tuple[int, ...] = (512, 2048, 8192),
    *,
    steps: int = 32,
    piece: int = 512,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    on_tokens: Callable[[int], None] | None = None,
) -> dict[str, Times]:
    """Prefill and decoding times of causal models, batch 1, in turns.

    Every model reads random tokens in pieces of `piece` with its carried state (memory stays small), and at each length
    writes WARM_UP + `steps` tokens, of which the last `steps` are timed one by one. A model that does not take a length
    has no entry for it.
    """
    for length in lengths:
        if length < 1:
            raise DataError(f"speed is measured at lengths of at least 1 token, got {length}")
    vocabulary = min(model.config.vocab_size for model in models.values())
    room = WARM_UP + steps
    ids_1L = torch.randint(vocabulary, (1, max(lengths) + room), generator=torch.Generator().manual_seed(seed))
    runs = {name: _Run(model, dtype) for name, model in models.items()}
    with evaluating(*models.values()):
        for run in runs.values():  # untimed: kernels are chosen, weights are touched
            run.read(ids_1L[:, : min(piece, min(lengths))])
            run.read(ids_1L[:, :1])
            run.start()
        for length in sorted(set(lengths)):
            able = [run for run in runs.values() if fits(run.model, length + room)]
            while waiting := [run for run in able if run.seen < length]:
                for run in waiting:
                    new = min(piece, length - run.seen)
                    run.prefill(ids_1L[:, run.seen : run.seen + new])
                    if on_tokens is not None:
                        on_tokens(new)
            for run in able:
                run.times.prefill_at[length] = (run.times.prefilled, *run.times.prefill)
                run.times.steps_at[length] = []
            for i in range(room):
                for run in able:
                    seconds = run.read(ids_1L[:, length + i : length + i + 1])
                    if i >= WARM_UP:
                        run.times.steps_at[length].append(seconds)
    return {name: run.times for name, run in runs.items()}


class _Run:
    """One model reading along, with its state."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.start()

    def start(self) -> None:
        """Forget everything."""
        self.cache: Any = None
        self.seen = 0
        self.times = Times()

    def read(self, ids_1L: Tensor) -> tuple[float, float]:
        """Take in tokens; wall and CPU seconds."""
        ids_1L = ids_1L.to(self.model.device)
        _wait(self.model)
        wall, cpu = time.perf_counter(), time.process_time()
        with autocast(self.model, self.dtype):
            out = self.model(ids_1L, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        _wait(self.model)
        self.cache = out.past_key_values
        self.seen += ids_1L.shape[1]
        return time.perf_counter() - wall, time.process_time() - cpu

    def prefill(self, ids_1L: Tensor) -> None:
        """Take in tokens and add up the time."""
        wall, cpu = self.read(ids_1L)
        self.times.prefill = (self.times.prefill[0] + wall, self.times.prefill[1] + cpu)
        self.times.prefilled += ids_1L.shape[1]


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def parameters(model: Any) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def machine(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the numbers were measured on."""
    device = torch.device(device)
    out: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if hasattr(os, "getloadavg"):
        out["load_average"] = round(os.getloadavg()[0], 2)
    return out


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the commit of this package where it is known."""
    import transformers

    import zoo

    commit = package_commit()
    return {
        "zoo": zoo.__version__,
        **({} if commit is None else {"commit": commit}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def package_commit() -> str | None:
    """The commit of the checkout that this package runs from, with " + changes" where files differ; else None."""
    import zoo

    def git(*words: str) -> str:
        command = ["git", "-C", os.path.dirname(zoo.__file__), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not some other repository around an installed package
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" + changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
