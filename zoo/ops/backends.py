"""Which implementation of an op runs: one table, one rule.

Every op registers its implementations here in order of preference; a call takes the first one that is present
and accepts the tensors at hand (`usable`). What is missing is reported with its reason by `zoo.backends()`, and
a call on a GPU that falls back to a slower implementation says so once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from zoo.errors import ZooError, unknown_name

logger = logging.getLogger("zoo")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of one op.

    `package` is what must be importable; `needs_gpu` restricts it to CUDA tensors; `usable(*args, **kwargs)` looks
    at a call's arguments (head size, masks, ...) and says whether this implementation can serve it.
    """

    op: str
    name: str
    function: Callable
    package: str | None = None
    needs_gpu: bool = False
    usable: Callable[..., bool] | None = None

    def missing(self) -> str | None:
        """Why this backend cannot run on this machine, or None."""
        if self.package and not _importable(self.package):
            return f"package {self.package!r} is not installed"
        if self.needs_gpu and not torch.cuda.is_available():
            return "no CUDA device"
        return None


_TABLE: dict[str, list[Backend]] = {}
_SAID: set[tuple[str, str]] = set()
_AVOIDED: set[str] = set()


@functools.cache
def _importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def register_backend(op: str, name: str, **options) -> Callable[[Callable], Callable]:
    """Decorator: add a function as backend `name` of `op`. The first registered is the most preferred."""

    def add(function: Callable) -> Callable:
        _TABLE.setdefault(op, []).append(Backend(op=op, name=name, function=function, **options))
        return function

    return add


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Calls inside do not choose backends of these names: `with without("fla"): model(...)`.

    For comparisons, and for `torch.compile(fullgraph=True)`, which kernels of other packages interrupt.
    """
    before = set(_AVOIDED)
    _AVOIDED.update(names)
    try:
        yield
    finally:
        _AVOIDED.intersection_update(before)


def dispatch(op: str, backend: str | None, *args, **kwargs):
    """Run `op` on the named `backend`, or on the most preferred one that is present and accepts the arguments.

    Raises ZooError where a backend is named that does not exist or cannot run here.
    """
    candidates = _TABLE[op]
    if backend is not None:
        chosen = next((b for b in candidates if b.name == backend), None)
        if chosen is None:
            raise unknown_name(f"backend of {op}", backend, [b.name for b in candidates])
        if why := chosen.missing():
            raise ZooError(f"backend {backend!r} of {op} cannot run here: {why}")
        return chosen.function(*args, **kwargs)
    on_gpu = args[0].is_cuda
    for candidate in candidates:
        if candidate.name in _AVOIDED or (candidate.needs_gpu and not on_gpu):
            continue
        if why := candidate.missing():
            if on_gpu:
                _say_once(op, candidate.name, why)
            continue
        if candidate.usable is None or candidate.usable(*args, **kwargs):
            return candidate.function(*args, **kwargs)
    raise ZooError(f"no backend of {op} accepts these arguments")


def _say_once(op: str, name: str, why: str) -> None:
    if (op, name) not in _SAID:
        _SAID.add((op, name))
        logger.warning(
            "%s: not using %s (%s); a portable backend runs instead. `zoo backends` lists all.", op, name, why
        )


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives products on the device of `x`; None where it is off."""
    kind = x.device.type  # "meta" (sizes without numbers) is a device that autocast does not know
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """A `with` in which autocast leaves products on the device of `x` alone; costs nothing where it is off anyway."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def backends() -> list[dict]:
    """One row per op and implementation: `op`, `backend`, `present` (bool), `why` (the reason it is absent)."""
    import zoo.ops  # noqa: F401  (registers all)

    rows = []
    for op, candidates in sorted(_TABLE.items()):
        for b in candidates:
            why = b.missing()
            rows.append({"op": op, "backend": b.name, "present": why is None, "why": why or ""})
    return rows
