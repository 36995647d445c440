"""A recurrence as one loop over its steps in a graph that leaves torch (`torch.export`, ONNX).

The implementations in chunks unroll a number of products that depends on the length, so a graph of them has a length
built in. In an exported graph the step itself is what is repeated, as torch's scan: projections and channel mixers are
still products over all positions at once, and only the state goes from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def leaves_torch(*arguments: Any) -> bool:
    """Whether a graph is being made for other programs, of rows that are not packed (no argument is bool)."""
    return torch.compiler.is_exporting() and not any(
        isinstance(x, Tensor) and x.dtype == torch.bool and x.dim() == 2 for x in arguments
    )


def repeat_step(
    step: Callable[..., tuple[Tensor, Tensor]],
    state: Tensor,
    inputs: tuple[Tensor, ...],
    dim: int,
    constants: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    """All outputs, and the last state, of `step(state, *inputs of one position, *constants)` along `dim`.

    A step sees its inputs with one position and gives its output so. It may read no other tensors. It must compute
    something: what it returns may not be a view of what it was given.
    """
    from torch._higher_order_ops.scan import scan_op  # a prototype: nothing but exported graphs may depend on it

    def body(carried: Tensor, *parts: Tensor) -> list[Tensor]:
        here = tuple(part.unsqueeze(dim) for part in parts[: len(inputs)])
        y, carried = step(carried, *here, *parts[len(inputs) :])
        return [carried, y.squeeze(dim).clone()]

    state, y = scan_op(body, [state], [x.movedim(dim, 0) for x in inputs], constants)
    return y.movedim(0, dim), state
