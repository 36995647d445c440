"""Linear maps, y = W x + b, of few rows at a time: what one step of decoding is made of.

On a CPU a step takes as long as reading the weights, yet for one to four rows the library reads them at a fraction of
the memory's speed (15 of 38 GB/s where this was measured, `benchmarks/decode.py`). The same matrix as a batch of a few
shorter ones goes through another kernel (27 GB/s).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

FEW_ROWS = 4  # from five on the usual product is as fast
PIECES = 4
LARGE = 1 << 15  # parameters; smaller matrices stay in the cache


class Linear(nn.Linear):
    """`nn.Linear`, faster for one to four rows in float32 on a CPU without gradients; the same parameters."""

    def forward(self, input: Tensor) -> Tensor:
        return matvec(input, self.weight, self.bias) if _serves(input, self.weight) else super().forward(input)


def _serves(x: Tensor, weight_ED: Tensor) -> bool:
    return (
        x.numel() <= FEW_ROWS * weight_ED.shape[1]
        and not torch.is_grad_enabled()
        and x.dtype == weight_ED.dtype == torch.float32
        and x.is_cpu
        and weight_ED.numel() >= LARGE
        and weight_ED.shape[0] % PIECES == 0
        and weight_ED.is_contiguous()
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkl.is_available()
    )


def matvec(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """(..., D) -> (..., E), the rows of W in `PIECES` equal pieces."""
    (E, D), rows_MD = weight_ED.shape, x.reshape(-1, x.shape[-1])
    y_PEM = torch.bmm(weight_ED.view(PIECES, E // PIECES, D), rows_MD.T.expand(PIECES, D, len(rows_MD)))
    y = y_PEM.view(E, -1).T.reshape(*x.shape[:-1], E)
    return y if bias_E is None else y + bias_E


class ZeroCenteredRMSNorm(nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight, so that weight decay draws it to the plain norm (Qwen3-Next, 2025).

    Computed in at least float32: a small weight beside the 1 would be lost in less. The input's dtype comes back.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, 1 + self.weight.to(wide), self.eps).to(x.dtype)

    def reset_parameters(self, std: float = 0.0) -> None:
        """The plain norm."""
        init.zeros_(self.weight)


class NoNorm(nn.Module):
    """A scale and a shift a channel in place of a norm (MobileBERT, Sun et al. 2020); (..., D) -> (..., D).

    `eps` is taken as the norms take it, and means nothing here.
    """

    def __init__(self, size: int, eps: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias

    def reset_parameters(self, std: float) -> None:
        """The identity."""
        init.ones_(self.weight)
        init.zeros_(self.bias)
