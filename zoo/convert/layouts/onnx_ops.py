"""Operators that torch's exporter to ONNX does not know."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Any, Callable]:
    """The operators, each as a function that writes it in ONNX."""
    aten = torch.ops.aten
    return {
        aten.cummax.default: _cummax, aten.sort.stable: _stable_sort, aten.searchsorted.Tensor: _searchsorted,
    }  # fmt: skip


def _searchsorted(line: Any, values: Any, out_int32: bool = False, right: bool = False, **unused: Any) -> Any:
    """How many numbers of a sorted line are below each value, or not above it."""
    op = _opset()
    last = op.Constant(value_ints=[-1])
    compare = op.LessOrEqual if right else op.Less
    below = op.Cast(compare(line, op.Unsqueeze(values, last)), to=6 if out_int32 else 7)  # int32, int64
    return op.ReduceSum(below, last, keepdims=0)


def _opset() -> Any:
    import onnxscript

    return onnxscript.opset18


def _cummax(x: Any, dim: int) -> Any:
    """The largest so far along an axis, and where it stood: all pairs, of which the later ones count as the lowest."""
    op = _opset()
    rank, whole = len(x.shape), not x.dtype.is_floating_point()
    order = [d for d in range(rank) if d != dim % rank] + [dim % rank]
    back = [order.index(d) for d in range(rank)]
    x = op.Transpose(x, perm=order)
    n = op.Squeeze(op.Shape(x, start=rank - 1, end=rank), op.Constant(value_ints=[0]))
    index = op.Range(op.Constant(value_int=0), n, op.Constant(value_int=1))
    one, two = op.Constant(value_ints=[-1]), op.Constant(value_ints=[-2])
    seen = op.LessOrEqual(op.Unsqueeze(index, op.Constant(value_ints=[0])), op.Unsqueeze(index, one))
    lowest = op.CastLike(op.Constant(value_int=-(2**31)) if whole else op.Constant(value_float=-math.inf), x)
    pairs = op.Where(seen, op.Unsqueeze(x, two), lowest)
    values = op.Transpose(op.ReduceMax(pairs, one, keepdims=0), perm=back)
    places = op.Transpose(op.ArgMax(pairs, axis=-1, keepdims=0, select_last_index=1), perm=back)
    return values, places


def _stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """TopK of all, whose ties keep their order."""
    op = _opset()
    rank = len(x.shape)
    n = op.Shape(x, start=dim % rank, end=dim % rank + 1)
    return op.TopK(x, n, axis=dim % rank, largest=int(descending), sorted=1)
