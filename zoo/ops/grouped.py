"""One linear map per group of rows: the work of the experts in a mixture (MegaBlocks, Gale et al. 2022, 2211.15841).

    y_p = x_p W_e      for every row p of group e; rows are sorted by group

One matrix product a group and none a row, nothing is padded and no row is dropped. On a GPU torch's grouped product
does all groups in one kernel. Rows behind the last group belong to nobody: they are not read and their result is zero.

Shapes: P rows, E groups (experts), I and O sizes of input and output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops.backends import dispatch, register_backend

OP = "grouped_linear"
PAIR = "grouped_pair"


def grouped_linear(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor, *, backend: str | None = None) -> Tensor:
    """`x @ weight[e]` for the rows of each group e; returns y_PO.

    ends_E: int32, where each group ends; group e is the rows `ends[e - 1]` to `ends[e]`. Groups may be empty.

    Under autocast both factors are cast. Raises ConfigError where shapes do not fit.
    """
    _check(x_PI, weight_EIO, ends_E)
    return dispatch(OP, backend, _cast(x_PI), _cast(weight_EIO), ends_E)


def grouped_pair(
    x_PI: Tensor, first_EIO: Tensor, second_EIO: Tensor, ends_E: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`grouped_linear` of the same rows with two weights, whose gradient of the rows is made at once."""
    _check(x_PI, first_EIO, ends_E)
    _check(x_PI, second_EIO, ends_E)
    factors = [_cast(t) for t in (x_PI, first_EIO, second_EIO)]
    return dispatch(PAIR, backend, *factors, ends_E)


def _check(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> None:
    if x_PI.dim() != 2 or weight_EIO.dim() != 3 or x_PI.shape[1] != weight_EIO.shape[1]:
        raise ConfigError(
            f"rows {tuple(x_PI.shape)} do not fit weights {tuple(weight_EIO.shape)}; wanted (P, I), (E, I, O)"
        )
    if ends_E.shape != weight_EIO.shape[:1] or ends_E.dtype != torch.int32:
        raise ConfigError(f"ends_E must be int32 ({weight_EIO.shape[0]},), got {ends_E.dtype} {tuple(ends_E.shape)}")


def _cast(t: Tensor) -> Tensor:
    kind = t.device.type
    return t.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else t


def grouped_linear_reference(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Every row through every map, and the group's own picked out of it."""
    starts_E = F.pad(ends_E, (1, 0))[:-1]
    row_P1 = torch.arange(len(x_PI), device=x_PI.device)[:, None]
    mine_PE = (starts_E <= row_P1) & (row_P1 < ends_E)
    return torch.einsum("pe,pi,eio->po", mine_PE.to(x_PI.dtype), x_PI, weight_EIO)


def _kernel_serves(x_PI: Tensor, *weights_and_ends: Tensor) -> bool:
    weights = weights_and_ends[:-1]
    aligned = not any(w.shape[1] % 8 or w.shape[2] % 8 for w in weights)  # rows of 16 bytes
    return (
        hasattr(F, "grouped_mm")
        and aligned
        and all(t.dtype == torch.bfloat16 for t in (x_PI, *weights))
        and torch.cuda.get_device_capability(x_PI.device) >= (8, 0)
    )


@register_backend(OP, "grouped_mm", needs_gpu=True, usable=_kernel_serves)
def _kernel(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    # What the kernel writes into rows of nobody, there and in the gradient, is not said; both fills undo it.
    nobody_P1 = (torch.arange(len(x_PI), device=x_PI.device) >= ends_E[-1])[:, None]
    return F.grouped_mm(x_PI.masked_fill(nobody_P1, 0), weight_EIO, offs=ends_E).masked_fill(nobody_P1, 0)


@register_backend(PAIR, "grouped_mm", needs_gpu=True, usable=_kernel_serves)
def _kernel_pair(x_PI: Tensor, first_EIO: Tensor, second_EIO: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    return _kernel(x_PI, first_EIO, ends_E), _kernel(x_PI, second_EIO, ends_E)


@register_backend(PAIR, "torch")
def _loop_pair(x_PI: Tensor, first_EIO: Tensor, second_EIO: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_exporting():
        return _gathered(x_PI, first_EIO, ends_E), _gathered(x_PI, second_EIO, ends_E)
    return _pair(x_PI, first_EIO, second_EIO, ends_E)


@register_backend(OP, "torch")
def _loop(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        return _gathered(x_PI, weight_EIO, ends_E)
    return _product(x_PI, weight_EIO, ends_E)


def _gathered(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Each row with its own copy of the weight, for graphs that leave torch: good for the few rows of a step."""
    row_P1 = torch.arange(x_PI.shape[0], device=x_PI.device)[:, None]
    group_P = (row_P1 >= ends_E).sum(1).clamp(max=weight_EIO.shape[0] - 1)
    y_PO = torch.bmm(x_PI[:, None], weight_EIO[group_P])[:, 0]
    return y_PO.masked_fill(row_P1 >= ends_E[-1], 0)


def _groups(ends_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """(group, first row, end) of the groups that have rows."""
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        if end > start:
            yield e, start, end
        start = end


# Operators of their own, so that the sizes of the groups stay out of the graph: a compiled model has no break here. A
# gated MLP reads its rows twice, hence the pair: the gradient of the rows is made in one place, without a tensor for
# each part. Gradients are made of the same operators, so that they are grouped as well. (Registered by hand:
# `torch.library.custom_op` would import the whole compiler, four seconds, at the first call.)
_library = torch.library.Library("zoo", "FRAGMENT")
_library.define("grouped_linear(Tensor x, Tensor weight, Tensor ends) -> Tensor")
_library.define("grouped_pair(Tensor x, Tensor first, Tensor second, Tensor ends) -> (Tensor, Tensor)")
_library.define("grouped_sum(Tensor x, Tensor y, Tensor first, Tensor second, Tensor ends) -> Tensor")
_library.define("grouped_outer(Tensor x, Tensor y, Tensor ends) -> Tensor")


def _product(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return torch.ops.zoo.grouped_linear(x_PI, weight_EIO, ends_E)


def _pair(x_PI: Tensor, first_EIO: Tensor, second_EIO: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows through two maps of their group."""
    return torch.ops.zoo.grouped_pair(x_PI, first_EIO, second_EIO, ends_E)


def _sum(x_PI: Tensor, y_PI: Tensor, first_EIO: Tensor, second_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """x first_e + y second_e."""
    return torch.ops.zoo.grouped_sum(x_PI, y_PI, first_EIO, second_EIO, ends_E)


def _outer(x_PI: Tensor, y_PO: Tensor, ends_E: Tensor) -> Tensor:
    """The sum over each group's rows of x^T y: (E, I, O)."""
    return torch.ops.zoo.grouped_outer(x_PI, y_PO, ends_E)


@torch.library.impl(_library, "grouped_linear", "CompositeExplicitAutograd")
def _(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    y_PO = x_PI.new_empty(x_PI.shape[0], weight_EIO.shape[2])
    last = 0
    for e, start, end in _groups(ends_E):
        torch.mm(x_PI[start:end], weight_EIO[e], out=y_PO[start:end])
        last = end
    y_PO[last:] = 0
    return y_PO


@torch.library.impl(_library, "grouped_pair", "CompositeExplicitAutograd")
def _(x_PI: Tensor, first_EIO: Tensor, second_EIO: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    pair = [x_PI.new_empty(x_PI.shape[0], weight.shape[2]) for weight in (first_EIO, second_EIO)]
    last = 0
    for e, start, end in _groups(ends_E):
        for weight_EIO, y_PO in zip((first_EIO, second_EIO), pair, strict=True):
            torch.mm(x_PI[start:end], weight_EIO[e], out=y_PO[start:end])
        last = end
    for y_PO in pair:
        y_PO[last:] = 0
    return pair[0], pair[1]


@torch.library.impl(_library, "grouped_sum", "CompositeExplicitAutograd")
def _(x_PI: Tensor, y_PI: Tensor, first_EIO: Tensor, second_EIO: Tensor, ends_E: Tensor) -> Tensor:
    z_PO = x_PI.new_empty(x_PI.shape[0], first_EIO.shape[2])
    last = 0
    for e, start, end in _groups(ends_E):
        torch.mm(x_PI[start:end], first_EIO[e], out=z_PO[start:end])
        z_PO[start:end].addmm_(y_PI[start:end], second_EIO[e])
        last = end
    z_PO[last:] = 0
    return z_PO


@torch.library.impl(_library, "grouped_outer", "CompositeExplicitAutograd")
def _(x_PI: Tensor, y_PO: Tensor, ends_E: Tensor) -> Tensor:
    out_EIO = x_PI.new_empty(ends_E.shape[0], x_PI.shape[1], y_PO.shape[1])
    empty = set(range(len(out_EIO)))
    for e, start, end in _groups(ends_E):
        torch.mm(x_PI[start:end].T, y_PO[start:end], out=out_EIO[e])
        empty.remove(e)
    for e in empty:
        out_EIO[e].zero_()
    return out_EIO


@torch.library.register_fake("zoo::grouped_linear", lib=_library)
def _(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return x_PI.new_empty(x_PI.shape[0], weight_EIO.shape[2])


@torch.library.register_fake("zoo::grouped_pair", lib=_library)
def _(x_PI: Tensor, first_EIO: Tensor, second_EIO: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    return x_PI.new_empty(x_PI.shape[0], first_EIO.shape[2]), x_PI.new_empty(x_PI.shape[0], second_EIO.shape[2])


@torch.library.register_fake("zoo::grouped_sum", lib=_library)
def _(x_PI: Tensor, y_PI: Tensor, first_EIO: Tensor, second_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return x_PI.new_empty(x_PI.shape[0], first_EIO.shape[2])


@torch.library.register_fake("zoo::grouped_outer", lib=_library)
def _(x_PI: Tensor, y_PO: Tensor, ends_E: Tensor) -> Tensor:
    return x_PI.new_empty(ends_E.shape[0], x_PI.shape[1], y_PO.shape[1])


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_grad(ctx, grad_PO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_PI, weight_EIO, ends_E = ctx.saved_tensors
    wants_x, wants_weight, _ = ctx.needs_input_grad
    return (
        _product(grad_PO, weight_EIO.transpose(1, 2), ends_E) if wants_x else None,
        _outer(x_PI, grad_PO, ends_E) if wants_weight else None,
        None,
    )


def _pair_grad(ctx, first_PO: Tensor, second_PO: Tensor) -> tuple[Tensor | None, ...]:
    x_PI, first_EIO, second_EIO, ends_E = ctx.saved_tensors
    wants_x, wants_first, wants_second, _ = ctx.needs_input_grad
    maps = (first_EIO.transpose(1, 2), second_EIO.transpose(1, 2))
    return (
        _sum(first_PO, second_PO, *maps, ends_E) if wants_x else None,
        _outer(x_PI, first_PO, ends_E) if wants_first else None,
        _outer(x_PI, second_PO, ends_E) if wants_second else None,
        None,
    )


def _sum_grad(ctx, grad_PO: Tensor) -> tuple[Tensor | None, ...]:
    x_PI, y_PI, first_EIO, second_EIO, ends_E = ctx.saved_tensors
    wants_x, wants_y, wants_first, wants_second, _ = ctx.needs_input_grad
    return (
        _product(grad_PO, first_EIO.transpose(1, 2), ends_E) if wants_x else None,
        _product(grad_PO, second_EIO.transpose(1, 2), ends_E) if wants_y else None,
        _outer(x_PI, grad_PO, ends_E) if wants_first else None,
        _outer(y_PI, grad_PO, ends_E) if wants_second else None,
        None,
    )


def _outer_grad(ctx, grad_EIO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_PI, y_PO, ends_E = ctx.saved_tensors
    wants_x, wants_y, _ = ctx.needs_input_grad
    return (
        _product(y_PO, grad_EIO.transpose(1, 2), ends_E) if wants_x else None,
        _product(x_PI, grad_EIO, ends_E) if wants_y else None,
        None,
    )


_GRADIENTS: dict[str, Any] = {
    "grouped_linear": _product_grad, "grouped_pair": _pair_grad, "grouped_sum": _sum_grad, "grouped_outer": _outer_grad,
}  # fmt: skip
for _name, _grad in _GRADIENTS.items():
    torch.library.register_autograd(f"zoo::{_name}", _grad, setup_context=_keep, lib=_library)
