"""Decisions without a gradient (hash buckets, routes) that must fall the same way when activations are recomputed.

A reversible stack computes every block a second time in the backward pass, from inputs that it has reconstructed and
that differ in the last bit. A decision taken anew from them could fall otherwise, and the gradient would be that of
another function. `decided` keeps what was decided in the first pass: it is small, and has no gradient.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_now = threading.local()  # backward runs in threads of its own


def decided(decide: Callable[[], Tensor]) -> Tensor:
    """`decide()`, or what it returned in the forward pass that is being recomputed.

    `decide` must draw no random numbers: draw them outside, where a recomputation draws the same ones.
    """
    if torch.compiler.is_compiling():
        return decide()
    replay: deque[Tensor] | None = getattr(_now, "replay", None)
    if replay is not None:
        return replay.popleft()
    value = decide()
    record: deque[Tensor] | None = getattr(_now, "record", None)
    if record is not None:
        record.append(value)
    return value


def recomputing() -> bool:
    """Whether a forward pass is being computed again: what it counts has been counted."""
    return getattr(_now, "replay", None) is not None


@contextmanager
def recording() -> Iterator[deque[Tensor]]:
    """Keeps every decision taken inside, in order."""
    before = getattr(_now, "record", None)
    _now.record = deque()
    try:
        yield _now.record
    finally:
        _now.record = before


@contextmanager
def replaying(decisions: deque[Tensor]) -> Iterator[None]:
    """Takes the decisions again, in the order in which they were recorded."""
    before = getattr(_now, "replay", None)
    _now.replay = deque(decisions)
    try:
        yield
    finally:
        _now.replay = before
