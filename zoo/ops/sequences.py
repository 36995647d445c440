"""Padded and packed rows as plain sequences: what two-sided mixers compute on whose result depends on a length.

A Fourier transform, a projection along the sequence or segment means see every position, so nothing can be hidden from
them afterwards. Here the real tokens of each sequence are moved to the front of a row of their own, zeros behind them;
the mixer works on rows that start at 0 and have a length each; the result goes back to where the tokens stood.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.ops.chunks import run_starts


@dataclass(frozen=True)
class Sequences:
    """How rows (B, L) with padding and packing become R sequences of at most T tokens, and back.

    place_BL: where each position goes in the flat list of R * T places; padding goes to one place more, at its end.
    length_R: real tokens of each sequence, at least 0.
    """

    place_BL: Tensor
    length_R: Tensor
    longest: int

    @property
    def mask_RT(self) -> Tensor:
        """True at the tokens."""
        return torch.arange(self.longest, device=self.length_R.device) < self.length_R[:, None]

    def split(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (R, T, D), zeros behind each sequence's end."""
        rows = x_BLD.new_zeros(self.length_R.shape[0] * self.longest + 1, x_BLD.shape[-1])
        rows = rows.index_copy(0, self.place_BL.flatten(), x_BLD.flatten(0, 1))
        return rows[:-1].view(-1, self.longest, x_BLD.shape[-1]).masked_fill(~self.mask_RT[..., None], 0)

    def join(self, y_RTD: Tensor) -> Tensor:
        """(R, T, D) -> (B, L, D), zeros at padded positions."""
        rows = torch.cat([y_RTD.flatten(0, 1), y_RTD.new_zeros(1, y_RTD.shape[-1])])
        return rows.index_select(0, self.place_BL.flatten()).view(*self.place_BL.shape, -1)

    def split_heads(self, x_BHLK: Tensor) -> Tensor:
        """(B, H, L, K) -> (R, H, T, K), as `split`."""
        return self.split(x_BHLK.transpose(1, 2).flatten(2)).unflatten(2, (x_BHLK.shape[1], -1)).transpose(1, 2)

    def join_heads(self, y_RHTK: Tensor) -> Tensor:
        """(R, H, T, K) -> (B, H, L, K), as `join`."""
        return self.join(y_RHTK.transpose(1, 2).flatten(2)).unflatten(2, (y_RHTK.shape[1], -1)).transpose(1, 2)


def find_sequences(shape: tuple[int, int], mask_BL: Tensor | None, segments_BL: Tensor | None) -> Sequences | None:
    """The sequences in rows of `shape` (B, L), or None where every row is one whole sequence.

    A packed sequence is a run of equal ids among the real tokens. With packing R and T follow from the data (which
    costs a GPU one synchronisation); with a mask alone R = B and T = L.
    """
    if segments_BL is None and mask_BL is None:
        return None
    B, L = shape
    if segments_BL is None:
        assert mask_BL is not None
        sequence_BL, R, T = torch.arange(B, device=mask_BL.device)[:, None].expand(B, L), B, L
    else:
        runs_BL = run_starts(segments_BL, mask_BL).cumsum(1)
        count_B = runs_BL[:, -1] + 1
        sequence_BL, R = runs_BL + (count_B.cumsum(0) - count_B)[:, None], int(count_B.sum())
        T = 0
    real_BL = torch.ones(B, L, dtype=torch.bool, device=sequence_BL.device) if mask_BL is None else mask_BL
    length_R = torch.zeros(R, dtype=torch.long, device=sequence_BL.device)
    length_R = length_R.scatter_add(0, sequence_BL.flatten(), real_BL.long().flatten())
    T = T or max(1, int(length_R.max()))
    # The rank of a token in its sequence: real tokens of the whole batch before it, less those of earlier sequences.
    before_BL = (real_BL.flatten().long().cumsum(0) - real_BL.flatten().long()).view(B, L)
    rank_BL = before_BL - (length_R.cumsum(0) - length_R)[sequence_BL]
    return Sequences(torch.where(real_BL, sequence_BL * T + rank_BL, R * T), length_R, T)
