"""Complex numbers as pairs of real tensors, for graphs that leave torch: ONNX has no complex numbers.

What computes with complex tensors is written once; there it gets `Pairs`, whose operators are those of a complex
tensor, as far as the recurrence of the state space models needs them. Everywhere else the numbers are complex tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """re + i im. A real number or tensor on the other side of an operator has no imaginary part."""

    re: Tensor
    im: Tensor

    @property
    def real(self) -> Tensor:
        """The real part."""
        return self.re

    @property
    def imag(self) -> Tensor:
        """The imaginary part."""
        return self.im

    @property
    def dtype(self) -> torch.dtype:
        """The complex dtype of such numbers."""
        return self.re.dtype.to_complex()

    @property
    def shape(self) -> torch.Size:
        """The shape as numbers."""
        return self.re.shape

    @property
    def ndim(self) -> int:
        """How many dimensions there are, as numbers."""
        return self.re.ndim

    def _each(self, function: Any) -> Pairs:
        return Pairs(function(self.re), function(self.im))

    def to(self, dtype: torch.dtype) -> Pairs:
        """With numbers of that complex dtype."""
        return self._each(lambda x: x.to(dtype.to_real()))

    def __getitem__(self, index: Any) -> Pairs:
        return self._each(lambda x: x[index])

    def flatten(self, *dims: int) -> Pairs:
        """As torch's."""
        return self._each(lambda x: x.flatten(*dims))

    def unflatten(self, dim: int, sizes: Any) -> Pairs:
        """As torch's."""
        return self._each(lambda x: x.unflatten(dim, sizes))

    def sum(self, dim: int, keepdim: bool = False) -> Pairs:
        """As torch's; `dim` is one of the numbers' dimensions."""
        return self._each(lambda x: x.sum(dim, keepdim=keepdim))

    def conj(self) -> Pairs:
        """re - i im."""
        return Pairs(self.re, -self.im)

    def exp(self) -> Pairs:
        """e to the power of each number."""
        size = self.re.exp()
        return Pairs(size * self.im.cos(), size * self.im.sin())

    def log1p(self) -> Pairs:
        """log(1 + z); |1 + z|^2 - 1 is summed without the one, which would cost the decimals of a small z."""
        grown = 2 * self.re + self.re.square() + self.im.square()
        return Pairs(torch.log1p(grown) / 2, torch.atan2(self.im, 1 + self.re))

    def __neg__(self) -> Pairs:
        return Pairs(-self.re, -self.im)

    def __add__(self, other: Any) -> Pairs:
        if isinstance(other, Pairs):
            return Pairs(self.re + other.re, self.im + other.im)
        return Pairs(self.re + other, self.im)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pairs:
        return self + -other

    def __rsub__(self, other: Any) -> Pairs:
        return -self + other

    def __mul__(self, other: Any) -> Pairs:
        if isinstance(other, Pairs):
            return Pairs(self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re)
        return Pairs(self.re * other, self.im * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Pairs:
        if isinstance(other, Pairs):
            return self * other.conj() / (other.re.square() + other.im.square())
        return Pairs(self.re / other, self.im / other)

    def __rtruediv__(self, other: Any) -> Pairs:
        return Pairs(other, torch.zeros_like(self.im)) / self


def numbers(re: Tensor, im: Tensor, steps: bool) -> Any:
    """re + i im: a complex tensor, or `Pairs` in a graph that leaves torch, where that computes in `steps`."""
    return Pairs(re, im) if steps and torch.compiler.is_exporting() else torch.complex(re, im)


def from_pairs(x: Tensor, steps: bool) -> Any:
    """The `numbers` whose parts stand in the last dimension."""
    return Pairs(x[..., 0], x[..., 1]) if steps and torch.compiler.is_exporting() else torch.view_as_complex(x)


def to_pairs(x: Any) -> Tensor:
    """The parts of numbers, in one more dimension."""
    return torch.stack([x.re, x.im], -1) if isinstance(x, Pairs) else torch.view_as_real(x)


def log1p(x: Any) -> Any:
    """log(1 + x)."""
    return x.log1p() if isinstance(x, Pairs) else torch.log1p(x)


def where(condition: Tensor, x: Any, other: Any) -> Any:
    """`x` where the condition holds, `other` elsewhere."""
    if isinstance(x, Pairs):
        return Pairs(torch.where(condition, x.re, other.re), torch.where(condition, x.im, other.im))
    return torch.where(condition, x, other)
