"""The mixing of FNet: the real part of a Fourier transform along the sequence and along the channels.

    y_kj = Re sum_t sum_d exp(-2 pi i (k t / L + j d / D)) x_td          (Lee-Thorp et al. 2021, arXiv 2105.03824)

L is the number of real tokens of a sequence, so padding changes nothing and packed sequences are as alone. Rows of
different lengths are transformed together: with n t = (n^2 + t^2 - (n - t)^2) / 2 a transform of any length is a
convolution with a chirp exp(i pi n^2 / L) between two products with it (Bluestein 1970), and those of all rows have one
size. Phases are reduced as integers, so the chirps are exact at every length.

Where all rows are whole, half of the transform is enough: x is real, so what channel D - j holds at frequency L - k is
the conjugate of what channel j holds at k. The mixing is a symmetric map, so its gradient is the gradient's mixing.

Shapes: B batch, L positions, D channels, R sequences of at most T tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops.backends import no_autocast
from zoo.ops.long_conv import fast_length
from zoo.ops.sequences import find_sequences

OP = "fourier_mixing"


def fourier_mixing(x_BLD: Tensor, *, mask_BL: Tensor | None = None, segments_BL: Tensor | None = None) -> Tensor:
    """Re F_L x F_D for every sequence, not normalised; (B, L, D) in the dtype of x, zeros at padding.

    Args:
        x_BLD: inputs, real.
        mask_BL: bool, True = real token, any pattern; padding is passed over, whatever it holds.
        segments_BL: contiguous runs of one id are independent sequences.

    Sums are kept in float32 (float64 for float64). Raises ConfigError for shapes that do not fit.
    """
    B, L, _ = x_BLD.shape
    for name, given in (("mask_BL", mask_BL), ("segments_BL", segments_BL)):
        if given is not None and given.shape != (B, L):
            raise ConfigError(f"{OP}: {name} has shape {tuple(given.shape)}, but there are {(B, L)} positions")
    with no_autocast(x_BLD):
        x = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
        if torch.compiler.is_exporting() and segments_BL is None:
            return _by_products(x, mask_BL).to(x_BLD.dtype)
        sequences = find_sequences((B, L), mask_BL, segments_BL)
        if sequences is None:
            return _Whole.apply(x).to(x_BLD.dtype)
        channels_RTD = torch.fft.fft(sequences.split(x))
        return sequences.join(ragged_fourier(channels_RTD, sequences.length_R)).to(x_BLD.dtype)


def _by_products(x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """The same as two products with matrices of cosines and sines, for graphs that leave torch: real, of any length."""
    B, L, D = x_BLD.shape
    real_BL = x_BLD.new_ones(B, L) if mask_BL is None else mask_BL.to(x_BLD.dtype)
    count_B11 = real_BL.sum(1).long().clamp(min=1)[:, None, None]
    place_BL = real_BL.long().cumsum(1) - 1
    turns_BLL = (place_BL[:, :, None] * place_BL[:, None]) % count_B11 / count_B11
    n_D = torch.arange(D, device=x_BLD.device)
    turns_DD = n_D[:, None] * n_D % D / D

    def waves(wave: Callable[[Tensor], Tensor], turns: Tensor) -> Tensor:
        return wave(2 * math.pi * turns).to(x_BLD.dtype)

    x_BLD = x_BLD * real_BL[..., None]
    even_BLD = waves(torch.cos, turns_BLL) @ (x_BLD @ waves(torch.cos, turns_DD))
    odd_BLD = waves(torch.sin, turns_BLL) @ (x_BLD @ waves(torch.sin, turns_DD))
    return (even_BLD - odd_BLD) * real_BL[..., None]


class _Whole(torch.autograd.Function):
    """Rows without padding; see the module docstring."""

    @staticmethod
    def forward(ctx, x_BLD: Tensor) -> Tensor:
        D = x_BLD.shape[-1]
        near = torch.fft.rfft2(x_BLD).real
        return torch.cat([near, near[..., 1 : (D + 1) // 2].flip(1, 2).roll(1, 1)], -1)

    @staticmethod
    def backward(ctx, dy_BLD: Tensor) -> Tensor:
        return _Whole.apply(dy_BLD)


def ragged_fourier(x_RTD: Tensor, length_R: Tensor) -> Tensor:
    """The real part of the Fourier transform along T of rows of different lengths, complex and zero behind their ends.

    What stands behind a row's end in the result means nothing.
    """
    T, size = x_RTD.shape[1], fast_length(2 * x_RTD.shape[1] - 1)
    n_T = torch.arange(T, device=x_RTD.device)
    length_R1 = length_R[:, None].clamp(min=1)
    phase_RT = math.pi * (n_T * n_T % (2 * length_R1)).double() / length_R1
    chirp_RT1 = torch.polar(torch.ones_like(phase_RT), phase_RT).to(x_RTD.dtype)[..., None]
    # On a circle the distances -(T - 1) .. -1 stand before its end.
    gap = chirp_RT1.new_zeros(x_RTD.shape[0], size - 2 * T + 1, 1)
    around = torch.fft.fft(torch.cat([chirp_RT1, gap, chirp_RT1[:, 1:].flip(1)], 1), dim=1)
    spectrum = torch.fft.fft(x_RTD * chirp_RT1.conj(), n=size, dim=1) * around
    return (torch.fft.ifft(spectrum, dim=1)[:, :T] * chirp_RT1.conj()).real


def fourier_mixing_reference(x_BLD: Tensor, mask_BL: Tensor, segments_BL: Tensor) -> Tensor:
    """The double sum for each sequence alone, as it is written in the module docstring."""
    y_BLD = torch.zeros_like(x_BLD)

    def waves(size: int) -> Tensor:
        n = torch.arange(size, dtype=torch.double, device=x_BLD.device)
        return torch.exp(-2j * math.pi * torch.outer(n, n) / size)

    for b in range(len(x_BLD)):
        places = mask_BL[b].nonzero()[:, 0]
        ids = segments_BL[b, places]
        ends = [0, *(1 + (ids[1:] != ids[:-1]).nonzero()[:, 0]).tolist(), len(places)]
        for first, last in itertools.pairwise(ends):
            if first < last:
                own = places[first:last]
                x_TD = x_BLD[b, own].to(torch.complex128)
                y_BLD[b, own] = (waves(last - first) @ x_TD @ waves(x_BLD.shape[2])).real.to(y_BLD.dtype)
    return y_BLD
