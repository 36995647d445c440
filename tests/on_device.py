"""Tests on a GPU as they stand: what they make without saying where is made there.

Only tests and constructors are helped so. What computes (`zoo.ops`, the forward of a module, every backward) gets no
default device, as with a user who moves a model to a GPU: a tensor that is made in the wrong place shows.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

RANDOM = (torch.rand, torch.randn, torch.randint, torch.randperm)


class OnDevice(TorchFunctionMode):
    """Constructors without a device make their tensor on `device`; random numbers are those of the CPU."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.made_here = device, _device_constructors()

    def begin(self) -> None:
        """From now on, without tf32, which would hide small errors behind large ones; "cpu" autocast means there."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        device = self.device

        class Autocast(torch.autocast):
            def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
                super().__init__(device if device_type == "cpu" else device_type, *args, **options)

        torch.autocast = Autocast  # type: ignore[misc]
        self.__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.made_here or kwargs.get("device") is not None or _computes():
            return func(*args, **kwargs)
        if func not in RANDOM:
            return func(*args, **{**kwargs, "device": self.device})
        wants_gradient = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(wants_gradient)


def _computes() -> bool:
    """Whether an op or the forward of a module is being run."""
    frame = sys._getframe(2)
    while frame is not None:
        where, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if (where.startswith("zoo.ops") and name != "<module>") or name == "_call_impl":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
