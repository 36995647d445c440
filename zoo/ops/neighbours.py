"""The vectors of a token and of those beside it, side by side: what a convolution of so many taps reads.

    y_t = [x_(t+r), ..., x_(t+1), x_t, x_(t-1), ..., x_(t-r)]        zeros where the sequence ends

The later ones come first, as in MobileBERT (Sun et al. 2020, arXiv 2004.02984), whose embeddings are trigrams. Beside
a token are the next *real* tokens of its own sequence: padding is passed over, packed sequences do not see each other.

Shapes: B batch, L positions, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from zoo.ops.padding import invert, right_align, segment_runs, take


def neighbours(x_BLD: Tensor, count: int, mask_BL: Tensor | None = None, segments_BL: Tensor | None = None) -> Tensor:
    """(B, L, D) -> (B, L, count * D); `count` is odd. What stands at masked positions (False) does not matter.

    Raises ValueError for a count that is not odd.
    """
    if count < 1 or count % 2 == 0:
        raise ValueError(f"count must be odd, got {count}")
    if count == 1:
        return x_BLD
    back_BL = None
    if mask_BL is not None:
        # Padding to the front, as zeros: then neighbours in the tensor are neighbours in the text.
        index_BL = right_align(mask_BL)
        back_BL = invert(index_BL)
        x_BLD = take(x_BLD.masked_fill(~mask_BL[..., None], 0), index_BL, 1)
        segments_BL = None if segments_BL is None else take(segments_BL, index_BL, 1)
    runs_BL = None if segments_BL is None else segment_runs(segments_BL)
    radius = count // 2
    y_BLE = torch.cat([_shifted(x_BLD, -o, runs_BL) for o in range(-radius, radius + 1)], -1)
    return y_BLE if back_BL is None else take(y_BLE, back_BL, 1)


def _shifted(x_BLD: Tensor, offset: int, runs_BL: Tensor | None) -> Tensor:
    """x_(t + offset) at t; zero where that is outside, or in another run."""
    if offset == 0:
        return x_BLD
    sides = (max(-offset, 0), max(offset, 0))  # zeros before, zeros behind
    y_BLD = pad(x_BLD, (0, 0, *sides))
    L = x_BLD.shape[1]
    y_BLD = y_BLD[:, sides[1] : sides[1] + L]
    if runs_BL is None:
        return y_BLD
    other_BL = pad(runs_BL, sides, value=-1)[:, sides[1] : sides[1] + L]
    return y_BLD.masked_fill((other_BL != runs_BL)[..., None], 0)
