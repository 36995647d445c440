"""Convolution with kernels as long as the sequence, by FFT: S4, H3 and Hyena in training.

    y_t = sum_{s <= t} k_{t-s} x_s  (+ sum_{s > t} k'_{s-t-1} x_s in the two-sided form)          per channel

(Gu et al. 2022, S4, arXiv 2111.00396, section 2.4; Goel et al. 2022, SaShiMi, arXiv 2202.09729, for two sides.)
Padding is taken out before, packed sequences become rows of their own, so neither changes any distance.

Shapes: B batch, L positions, E channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import ConfigError
from zoo.ops.backends import dispatch, no_autocast, register_backend
from zoo.ops.padding import invert, right_align, segment_runs, take

OP = "long_conv"
_ROOM = 1 << 17  # numbers at a time on a CPU: half a megabyte in float32


def long_conv(
    x_BLE: Tensor,
    kernel_EL: Tensor,
    back_EL: Tensor | None = None,
    *,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal convolution of each channel with its kernel; (B, L, E) in the dtype of x.

    Args:
        x_BLE: inputs. kernel_EL: kernel[:, j] multiplies the input of j steps ago; what lies beyond its end is zero.
        back_EL: the two-sided form: back[:, j] multiplies the input j + 1 steps ahead.
        mask_BL: bool, True = real token, any pattern. Padding is passed over, whatever it holds, and gets output 0.
        segments_BL: contiguous runs of one id are independent sequences.

    Sums are kept in float32 (float64 for float64). Raises ConfigError for shapes that do not fit.
    """
    (B, L, E), dtype = x_BLE.shape, torch.promote_types(x_BLE.dtype, torch.float32)
    for name, kernel in (("kernel", kernel_EL), ("back", back_EL)):
        if kernel is not None and (kernel.ndim != 2 or len(kernel) != E):
            raise ConfigError(f"{OP}: {name} must be ({E}, taps) for {E} channels; got {tuple(kernel.shape)}")
    for name, given in (("mask_BL", mask_BL), ("segments_BL", segments_BL)):
        if given is not None and given.shape != (B, L):
            raise ConfigError(f"{OP}: {name} has shape {tuple(given.shape)}, but there are {(B, L)} positions")
    with no_autocast(x_BLE):
        x, kernel = x_BLE.to(dtype), kernel_EL.to(dtype)
        back = None if back_EL is None else back_EL.to(dtype)
        if not torch.compiler.is_exporting():  # where the length is open, taps that reach too far read zeros
            kernel, back = kernel[:, :L], None if back is None else back[:, : L - 1]
        if mask_BL is not None:
            x = x.masked_fill(~mask_BL[..., None], 0)
        if segments_BL is not None:
            y = _by_segment(x, kernel, back, mask_BL, segments_BL, backend)
        elif mask_BL is not None:
            order_BL = right_align(mask_BL)
            y = take(dispatch(OP, backend, take(x, order_BL, 1), kernel, back), invert(order_BL), 1)
        else:
            y = dispatch(OP, backend, x, kernel, back)
        if mask_BL is not None:
            y = y.masked_fill(~mask_BL[..., None], 0)
    return y.to(x_BLE.dtype)


def long_conv_step(x_BSE: Tensor, kernel_EL: Tensor) -> Tensor:
    """The last position (B, 1, E) of the causal convolution of x, whose padding stands in front and is zero.

    Sums are kept in float32 (float64 for float64); the result is in the dtype of x.
    """
    near_BSE = x_BSE[:, max(x_BSE.shape[1] - kernel_EL.shape[1], 0) :]
    dtype = torch.promote_types(x_BSE.dtype, torch.float32)
    with no_autocast(x_BSE):
        taps_ES = kernel_EL[:, : near_BSE.shape[1]].flip(1).to(dtype)
        return torch.einsum("bse,es->be", near_BSE.to(dtype), taps_ES)[:, None].to(x_BSE.dtype)


def _by_segment(x_BLE, kernel, back, mask_BL, segments_BL, backend) -> Tensor:
    """Every packed sequence in a row of its own, as long as the longest."""
    real_BL = torch.ones_like(segments_BL, dtype=torch.bool) if mask_BL is None else mask_BL
    runs_BL = segment_runs(segments_BL, mask_BL)
    offset_B1 = torch.arange(len(x_BLE), device=x_BLE.device)[:, None] * runs_BL.shape[1]
    _, row_T, count_R = (runs_BL + offset_B1)[real_BL].unique(return_inverse=True, return_counts=True)
    if not len(row_T):
        return torch.zeros_like(x_BLE)
    first_R = count_R.cumsum(0) - count_R  # tokens of a sequence stand together among the real ones
    place_T = torch.arange(len(row_T), device=x_BLE.device) - first_R[row_T]
    rows_RLE = x_BLE.new_zeros(len(count_R), int(count_R.max()), x_BLE.shape[2])
    rows_RLE = rows_RLE.index_put((row_T, place_T), x_BLE[real_BL])
    longest = rows_RLE.shape[1]
    back = None if back is None else back[:, : longest - 1]
    y_RLE = dispatch(OP, backend, rows_RLE, kernel[:, :longest], back)
    return torch.zeros_like(x_BLE).index_put((real_BL,), y_RLE[row_T, place_T])


@register_backend(OP, "direct", usable=lambda *_: torch.compiler.is_exporting())
def _direct(x_BLE: Tensor, kernel_ET: Tensor, back_ET: Tensor | None) -> Tensor:
    """Without a transform, whose size is chosen by the length: for graphs that leave torch."""
    taps_EX = kernel_ET.flip(1) if back_ET is None else torch.cat([kernel_ET.flip(1), back_ET], 1)
    ahead = 0 if back_ET is None else back_ET.shape[1]
    x_BEL = F.pad(x_BLE.mT, (kernel_ET.shape[1] - 1, ahead))
    return F.conv1d(x_BEL, taps_EX[:, None], groups=x_BLE.shape[2]).mT


@register_backend(OP, "torch")
def _torch(x_BLE: Tensor, kernel_ET: Tensor, back_ET: Tensor | None) -> Tensor:
    return _Convolution.apply(x_BLE, kernel_ET, back_ET)


class _Convolution(torch.autograd.Function):
    """Some channels at a time, so that on a CPU their spectra stay in the cache; the gradient makes them again.

    The transform of what is real is half as long in either direction, which autograd's own gradients do not use.
    """

    @staticmethod
    def forward(ctx, x_BLE: Tensor, kernel_ET: Tensor, back_ET: Tensor | None) -> Tensor:
        B, L, E = x_BLE.shape
        size, y_BEL = fast_length(2 * L - 1), x_BLE.new_empty(B, E, L)
        for part in _parts(x_BLE, size):
            spectrum = torch.fft.rfft(x_BLE[..., part].mT, n=size) * _kernel_spectrum(kernel_ET, back_ET, part, size)
            y_BEL[:, part] = torch.fft.irfft(spectrum, n=size)[..., :L]
        ctx.save_for_backward(x_BLE, kernel_ET, back_ET)
        return y_BEL.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x_BLE, kernel_ET, back_ET = ctx.saved_tensors
        (B, L, E), size = x_BLE.shape, fast_length(2 * x_BLE.shape[1] - 1)
        dx_BEL, dkernel_ET = x_BLE.new_empty(B, E, L), torch.empty_like(kernel_ET)
        dback_ET = None if back_ET is None else torch.empty_like(back_ET)
        with no_autocast(x_BLE):
            for part in _parts(x_BLE, size):
                dy = torch.fft.rfft(dy_BLE[..., part].mT, n=size)
                spectrum = dy * _kernel_spectrum(kernel_ET, back_ET, part, size).conj()
                dx_BEL[:, part] = torch.fft.irfft(spectrum, n=size)[..., :L]
                spectrum = (dy * torch.fft.rfft(x_BLE[..., part].mT, n=size).conj()).sum(0)
                around = torch.fft.irfft(spectrum, n=size)
                dkernel_ET[part] = around[:, : kernel_ET.shape[1]]
                if back_ET is not None and dback_ET is not None:
                    dback_ET[part] = around[:, size - back_ET.shape[1] :].flip(1)
        return dx_BEL.mT, dkernel_ET, dback_ET


def _kernel_spectrum(kernel_ET: Tensor, back_ET: Tensor | None, part: slice, size: int) -> Tensor:
    kernel = kernel_ET[part]
    if back_ET is not None:  # what lies ahead is at negative distances, which on a circle are those before its end
        back = back_ET[part]
        kernel = F.pad(kernel, (0, size - kernel.shape[1])) + F.pad(back.flip(1), (size - back.shape[1], 0))
    return torch.fft.rfft(kernel, n=size)


def _parts(x_BLE: Tensor, size: int) -> list[slice]:
    """The channels in parts; all at once on a GPU and in one graph."""
    B, _, E = x_BLE.shape
    if x_BLE.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, E)]
    step = max(16, _ROOM // (B * size))
    return [slice(start, min(start + step, E)) for start in range(0, E, step)]


def fast_length(size: int) -> int:
    """The least even number >= size whose prime factors are 2, 3 and 5."""
    n = size + size % 2
    while True:
        rest = n
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += 2
