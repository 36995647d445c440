"""Short causal depthwise convolution, the local mixing in front of many recurrences.

`y_t = sum_j w[K-1-j] * x_{t-j}` for each channel, with an optional bias and SiLU (Poli et al. 2023,
arXiv:2302.10866; Gu & Dao 2023, arXiv:2312.00752).

Shapes: B batch, L new positions, D channels, K taps, T = K - 1 positions that are carried.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, did_you_mean
from zoo.ops.backends import dispatch, register_backend
from zoo.ops.padding import invert, right_align, segment_runs, take

ACTIVATIONS = ("silu",)


def short_conv(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution with K taps; returns (y_BLD in the dtype of x, tail_BTD where `final`, else None).

    weight_DK: `weight[:, -1]` multiplies the current token.
    initial: the last T = K - 1 real inputs before these, (B, T, D), zeros where the sequence is younger; zeros by
        default.
    final: also return the same for the call to come.
    mask_BL: bool, True = real token, any pattern. Padding is passed over, whatever it holds, and gets output 0.
    segments_BL: contiguous runs of one id are independent sequences; `initial` belongs to the first, the tail to
        the last.
    activation: None or "silu", applied to the output.
    backend: "causal_conv1d" (CUDA) or "torch"; by default the first that can.

    Raises ConfigError for shapes that do not fit or an unknown activation.
    """
    (b, length, d), (dw, taps) = x_BLD.shape, weight_DK.shape
    if d != dw or (bias_D is not None and bias_D.shape != (d,)):
        bias = "" if bias_D is None else f" and bias {tuple(bias_D.shape)}"
        raise ConfigError(f"weight {tuple(weight_DK.shape)}{bias} do not fit an input of {d} channels")
    if initial is not None and initial.shape != (b, taps - 1, d):
        raise ConfigError(f"initial has shape {tuple(initial.shape)}, but {taps} taps need {(b, taps - 1, d)}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {activation!r}{did_you_mean(activation, ACTIVATIONS)}")
    for name, given in (("mask_BL", mask_BL), ("segments_BL", segments_BL)):
        if given is not None and given.shape != (b, length):
            raise ConfigError(f"{name} has shape {tuple(given.shape)}, but there are {(b, length)} positions")
    return dispatch(
        "short_conv",
        backend,
        x_BLD,
        weight_DK,
        bias_D,
        initial=initial,
        final=final,
        mask_BL=mask_BL,
        segments_BL=segments_BL,
        activation=activation,
    )


def _package_serves(x: Tensor, weight: Tensor, bias, *, initial, mask_BL, segments_BL, **_) -> bool:
    # Its kernels know 2 to 4 taps and channels in eights, and either packed sequences or a carried state.
    taps_fit = 2 <= weight.shape[1] <= 4 and x.shape[2] % 8 == 0
    return taps_fit and mask_BL is None and (segments_BL is None or initial is None)


@register_backend("short_conv", "causal_conv1d", package="causal_conv1d", needs_gpu=True, usable=_package_serves)
def _package(x, weight, bias, *, initial, final, mask_BL, segments_BL, activation) -> tuple[Tensor, Tensor | None]:
    from causal_conv1d import causal_conv1d_fn

    runs = None if segments_BL is None else segment_runs(segments_BL).to(torch.int32)
    y_BDL = causal_conv1d_fn(
        x.contiguous().transpose(1, 2),  # channels last, as a carried state and packing require
        weight,
        bias,
        seq_idx=runs,
        initial_states=None if initial is None else initial.to(x.dtype).contiguous().transpose(1, 2),
        activation=activation,
    )
    tail = _tail(_prepend(x, initial, weight.shape[1] - 1), weight.shape[1] - 1, runs) if final else None
    return y_BDL.transpose(1, 2), tail


@register_backend("short_conv", "torch")
def _torch(x, weight, bias, *, initial, final, mask_BL, segments_BL, activation) -> tuple[Tensor, Tensor | None]:
    length, carried = x.shape[1], weight.shape[1] - 1
    runs = None if segments_BL is None else segment_runs(segments_BL, mask_BL)
    order = None
    if mask_BL is not None:
        # Carried inputs are real; padding goes in front of them, so that neighbours in index are neighbours in time.
        x = x.masked_fill(~mask_BL[..., None], 0)
        order = right_align(F.pad(mask_BL, (carried, 0), value=True))
    x = _prepend(x, initial, carried)
    if order is not None:
        x = take(x, order, 1)
        if runs is not None:
            first = runs.gather(1, mask_BL.to(torch.uint8).argmax(-1, keepdim=True))
            runs = take(torch.cat([first.expand(-1, carried), runs], 1), order, 1)
    elif runs is not None:
        runs = F.pad(runs, (carried, 0))
    y = _shifted_sum(x, weight, bias, length, runs)
    if activation == "silu":
        y = F.silu(y)
    tail = _tail(x, carried, runs) if final else None
    if order is not None:
        # Position l stood at carried + l before the alignment; of the aligned row the last L were computed.
        back = (invert(order)[:, carried:] - carried).clamp(min=0)
        y = take(y, back, 1).masked_fill(~mask_BL[..., None], 0)
    return y, tail


def _prepend(x: Tensor, initial: Tensor | None, carried: int) -> Tensor:
    if initial is None:
        return F.pad(x, (0, 0, carried, 0))
    return torch.cat([initial.to(x.dtype), x], 1)


def _tail(x: Tensor, carried: int, runs: Tensor | None) -> Tensor:
    """The last inputs, those of the last sequence only."""
    tail = x[:, x.shape[1] - carried :]
    if runs is not None and carried:
        tail = tail.masked_fill((runs[:, -carried:] != runs[:, -1:])[..., None], 0)
    return tail


def _shifted_sum(x: Tensor, weight: Tensor, bias: Tensor | None, length: int, runs: Tensor | None) -> Tensor:
    """The convolution as a sum of K shifted products; x has the K - 1 earlier inputs in front."""
    taps = weight.shape[1]
    total = None
    for i in range(taps):
        term = x[:, i : i + length] * weight[:, i]
        if runs is not None and i < taps - 1:
            term = term.masked_fill((runs[:, i : i + length] != runs[:, taps - 1 :])[..., None], 0)
        total = term if total is None else total + term
    if bias is not None:
        total = total + bias
    return total.to(x.dtype)
