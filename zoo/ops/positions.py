"""Positions of tokens within their own sequence, whatever the padding and packing."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.chunks import run_starts


def token_positions(
    x_BLD: Tensor, mask_BL: Tensor | None = None, segments_BL: Tensor | None = None, seen_B: Tensor | None = None
) -> Tensor:
    """Position of each token among the real tokens of its sequence, from 0: int64 (B, L), or (1, L) if all rows agree.

    mask_BL: False positions do not count (they get the position of the last real token before them, at least 0).
    segments_BL: the count starts again where the id changes (that of a masked position means nothing).
    seen_B: real tokens of the row in earlier calls.
    """
    B, L = x_BLD.shape[:2]
    if mask_BL is None:
        positions_BL = torch.arange(L, device=x_BLD.device)[None]
    else:
        positions_BL = mask_BL.long().cumsum(1).sub(1).clamp(min=0)
    if segments_BL is not None:
        before_BL = positions_BL.expand(B, L) if mask_BL is None else mask_BL.long().cumsum(1) - mask_BL.long()
        origin_BL = torch.where(run_starts(segments_BL, mask_BL), before_BL, 0).cummax(1).values
        positions_BL = (positions_BL - origin_BL).clamp(min=0)
    return positions_BL if seen_B is None else positions_BL + seen_B[:, None]
