"""Token shift: every position sees the token before it (RWKV, Peng et al. 2023, arXiv 2305.13048, section 3.1).

A convolution with two taps, (1, 0), in the one case that is worth its own code: nothing is computed, tokens only move.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops.chunks import run_starts
from zoo.ops.padding import take


def token_shift(
    x_BLD: Tensor,
    *,
    initial: Tensor | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The token before each token (B, L, D), and the last token (B, D) where `final`, else None.

    Args:
        initial: (B, D), what stood before the first token; zeros by default.
        mask_BL: True at real tokens; padding is passed over, and what comes out at its places means nothing.
        segments_BL: contiguous runs of one id are independent sequences, each with zeros before its first token.

    Raises ConfigError for an `initial` that does not fit.
    """
    B, _, D = x_BLD.shape
    if initial is not None and initial.shape != (B, D):
        raise ConfigError(f"token_shift: initial must be {(B, D)}, got {tuple(initial.shape)}")
    first_B1D = x_BLD.new_zeros(B, 1, D) if initial is None else initial[:, None].to(x_BLD.dtype)
    if mask_BL is None:
        shifted_BLD, last_BD = torch.cat([first_B1D, x_BLD[:, :-1]], 1), x_BLD[:, -1]
    else:
        place_L = torch.arange(1, x_BLD.shape[1] + 1, device=x_BLD.device)
        latest_BL = torch.where(mask_BL, place_L, 0).cummax(1).values  # in what follows; 0 is what stood before
        tokens = torch.cat([first_B1D, x_BLD], 1)
        shifted_BLD = take(tokens, F.pad(latest_BL[:, :-1], (1, 0)), 1)
        last_BD = take(tokens, latest_BL[:, -1:], 1)[:, 0]
    if segments_BL is not None:
        shifted_BLD = shifted_BLD.masked_fill(run_starts(segments_BL, mask_BL)[..., None], 0)
    return shifted_BLD, last_BD if final else None
