"""Padding anywhere in a row, made harmless.

Windows, convolutions and carried states count tokens, while tensors count positions. The two agree once every
row is *right-aligned*: its padding first, its real tokens last and in order. The permutation costs nothing when
there is no mask, and has static shapes, so it compiles.

Shapes: B batch, S positions. A mask is bool, True = real token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def right_align(mask_BS: Tensor) -> Tensor:
    """The permutation that moves padding to the front of each row and keeps the order of all else.

    Returns index_BS (int64) with `aligned[b, s] = x[b, index[b, s]]`; use it with `take`. Undo it with
    `take(aligned, invert(index_BS), dim)`.
    """
    return invert(_destination(mask_BS))


def invert(index_BS: Tensor) -> Tensor:
    """The inverse of a permutation of each row."""
    places = torch.arange(index_BS.shape[-1], device=index_BS.device).expand_as(index_BS)
    return torch.empty_like(index_BS).scatter_(-1, index_BS, places)


def take(x: Tensor, index_BS: Tensor, dim: int) -> Tensor:
    """`x[b, ..., index[b, s], ...]` along `dim`, where x has the batch first. The index may repeat or drop places."""
    dim = dim % x.dim()
    b, s, rest = x.shape[0], x.shape[dim], x.shape[dim + 1 :]
    copies = math.prod(x.shape[1:dim])
    if not rest:
        return x.gather(dim, index_BS.view(b, *[1] * (dim - 1), -1).expand(*x.shape[:dim], -1))
    # Whole rows, in one flat list: several times as fast as a gather of single numbers, and so is its backward.
    first = s * torch.arange(b * copies, device=x.device).view(b, copies, 1)
    rows = (index_BS[:, None] + first).flatten()
    taken = x.reshape(b * copies * s, math.prod(rest)).index_select(0, rows)
    return taken.view(*x.shape[:dim], index_BS.shape[1], *rest)


def segment_runs(segments_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """Number the packed sequences of each row 0, 1, 2, ... (int64, shape (B, S)).

    A new sequence starts where the id differs from that of the token before, so an id may come again later in
    the row. With `mask_BS` the token before is the last real one; what padded positions get means nothing.
    """
    if mask_BS is None:
        runs = torch.zeros_like(segments_BS, dtype=torch.int64)
        runs[:, 1:] = (segments_BS[:, 1:] != segments_BS[:, :-1]).cumsum(-1)
        return runs
    to = _destination(mask_BS)
    runs = segment_runs(take(segments_BS, invert(to), 1))
    return take(runs, to, 1)


def _destination(mask_BS: Tensor) -> Tensor:
    """Where each position goes when the row is right-aligned: the inverse of `right_align`."""
    real = mask_BS.cumsum(-1)
    place = torch.arange(mask_BS.shape[-1], device=mask_BS.device)
    # A real token has `total - its rank` real ones behind it; padding goes to the front in order.
    last = mask_BS.shape[-1] - 1
    return torch.where(mask_BS, last - (real[:, -1:] - real), place - real)
