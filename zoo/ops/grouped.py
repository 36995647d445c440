"""One linear map per group of rows: the work of the experts in a mixture (MegaBlocks, Gale et al. 2022, 2211.15841).

    y_p = x_p W_e      for every row p of group e; rows are sorted by group

One matrix product a group and none a row, nothing is padded and no row is dropped. On a GPU torch's grouped product
does all groups in one kernel. Rows behind the last group belong to nobody: they are not read and their result is zero.

Shapes: P rows, E groups (experts), I and O sizes of input and output.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops.backends import dispatch, register_backend

OP = "grouped_linear"


def grouped_linear(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor, *, backend: str | None = None) -> Tensor:
    """`x @ weight[e]` for the rows of each group e; returns y_PO.

    ends_E: int32, where each group ends; group e is the rows `ends[e - 1]` to `ends[e]`. Groups may be empty.

    Under autocast both factors are cast. Raises ConfigError where shapes do not fit.
    """
    if x_PI.dim() != 2 or weight_EIO.dim() != 3 or x_PI.shape[1] != weight_EIO.shape[1]:
        raise ConfigError(
            f"rows {tuple(x_PI.shape)} do not fit weights {tuple(weight_EIO.shape)}; wanted (P, I), (E, I, O)"
        )
    if ends_E.shape != weight_EIO.shape[:1] or ends_E.dtype != torch.int32:
        raise ConfigError(f"ends_E must be int32 ({weight_EIO.shape[0]},), got {ends_E.dtype} {tuple(ends_E.shape)}")
    kind = x_PI.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_PI, weight_EIO = x_PI.to(dtype), weight_EIO.to(dtype)
    return dispatch(OP, backend, x_PI, weight_EIO, ends_E)


def grouped_linear_reference(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Every row through every map, and the group's own picked out of it."""
    starts_E = F.pad(ends_E, (1, 0))[:-1]
    row_P1 = torch.arange(len(x_PI), device=x_PI.device)[:, None]
    mine_PE = (starts_E <= row_P1) & (row_P1 < ends_E)
    return torch.einsum("pe,pi,eio->po", mine_PE.to(x_PI.dtype), x_PI, weight_EIO)


def _kernel_serves(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> bool:
    aligned = not (weight_EIO.shape[1] % 8 or weight_EIO.shape[2] % 8)  # rows of 16 bytes
    return (
        hasattr(F, "grouped_mm")
        and aligned
        and x_PI.dtype == weight_EIO.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x_PI.device) >= (8, 0)
    )


@register_backend(OP, "grouped_mm", needs_gpu=True, usable=_kernel_serves)
def _kernel(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    # What the kernel writes into rows of nobody, there and in the gradient, is not said; both fills undo it.
    nobody_P1 = (torch.arange(len(x_PI), device=x_PI.device) >= ends_E[-1])[:, None]
    return F.grouped_mm(x_PI.masked_fill(nobody_P1, 0), weight_EIO, offs=ends_E).masked_fill(nobody_P1, 0)


@register_backend(OP, "torch")
def _loop(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return _product(x_PI, weight_EIO, ends_E)


def _groups(ends_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """(group, first row, end) of the groups that have rows."""
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        if end > start:
            yield e, start, end
        start = end


# Operators of their own, so that the sizes of the groups stay out of the graph: a compiled model has no break here. The
# gradient of each is made of the other, so that the products of the backward are grouped as well. (Registered by hand:
# `torch.library.custom_op` would import the whole compiler, four seconds, at the first call.)
_library = torch.library.Library("zoo", "FRAGMENT")
_library.define("grouped_linear(Tensor x, Tensor weight, Tensor ends) -> Tensor")
_library.define("grouped_outer(Tensor x, Tensor y, Tensor ends) -> Tensor")


def _product(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return torch.ops.zoo.grouped_linear(x_PI, weight_EIO, ends_E)


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


@torch.library.impl(_library, "grouped_outer", "CompositeExplicitAutograd")
def _(x_PI: Tensor, y_PO: Tensor, ends_E: Tensor) -> Tensor:
    out_EIO = x_PI.new_zeros(ends_E.shape[0], x_PI.shape[1], y_PO.shape[1])
    for e, start, end in _groups(ends_E):
        torch.mm(x_PI[start:end].T, y_PO[start:end], out=out_EIO[e])
    return out_EIO


@torch.library.register_fake("zoo::grouped_linear", lib=_library)
def _(x_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return x_PI.new_empty(x_PI.shape[0], weight_EIO.shape[2])


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


def _outer_grad(ctx, grad_EIO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_PI, y_PO, ends_E = ctx.saved_tensors
    wants_x, wants_y, _ = ctx.needs_input_grad
    return (
        _product(y_PO, grad_EIO.transpose(1, 2), ends_E) if wants_x else None,
        _product(x_PI, grad_EIO, ends_E) if wants_y else None,
        None,
    )


for _name, _grad in (("grouped_linear", _product_grad), ("grouped_outer", _outer_grad)):
    torch.library.register_autograd(f"zoo::{_name}", _grad, setup_context=_keep, lib=_library)
