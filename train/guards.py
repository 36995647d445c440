"""What stops a run in good order: Ctrl-C, a loss that is not finite, a loss that grows."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C after its state was saved; the message says how to go on."""


class StopFlag:
    """Becomes true at the first Ctrl-C; the second one stops at once."""

    def __init__(self) -> None:
        self.set = False

    def __call__(self, *_: Any) -> None:
        if self.set:
            raise KeyboardInterrupt
        self.set = True


@contextmanager
def catching_interrupts() -> Iterator[StopFlag]:
    """A flag that Ctrl-C sets while the block runs (in the main thread; elsewhere signals are not ours)."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.signal(signal.SIGINT, flag)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class LossWatch:
    """A running mean of the loss, and whether it has left its best value for good.

    The loss diverges when it was above `factor` times the best running mean for `patience` steps in a row.
    """

    mean: float | None = None
    best: float | None = None
    above: int = 0
    steps: int = 0
    factor: float = 3.0
    patience: int = 20
    memory: float = 0.9

    def update(self, loss: float) -> bool:
        """Take in a loss; True where it diverges."""
        self.steps += 1
        if self.best is not None and (not math.isfinite(loss) or loss > self.factor * self.best):
            self.above += 1
        else:
            self.above = 0
        self.mean = loss if self.mean is None else self.memory * self.mean + (1 - self.memory) * loss
        if self.steps >= 10:  # the first losses are too few to be a mean
            self.best = self.mean if self.best is None else min(self.best, self.mean)
        return self.above >= self.patience
