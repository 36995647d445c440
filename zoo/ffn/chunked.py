"""Channel mixers in pieces of the sequence (Kitaev et al. 2020, arXiv:2001.04451, section 3).

A channel mixer works on each position alone, so it can work on a few of them at a time: its inner activations, which
are several times as wide as the model, then exist for one piece only. In training each piece is computed again in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(function: Callable[[Tensor], Tensor], x_BLD: Tensor, chunk: int | None) -> Tensor:
    """`function(x_BLD)`, computed for `chunk` positions at a time; all at once with None."""
    if chunk is None or torch.compiler.is_exporting() or x_BLD.shape[1] <= chunk:  # a graph may be of any length
        return function(x_BLD)
    pieces = x_BLD.split(chunk, 1)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return torch.cat([checkpoint(function, piece, use_reentrant=False) for piece in pieces], 1)
    return torch.cat([function(piece) for piece in pieces], 1)
