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
from zoo.ops.backends import dispatch, no_autocast, register_backend
from zoo.ops.padding import invert, right_align, segment_runs, take

ACTIVATIONS = ("silu",)
_ONEDNN = torch.backends.mkldnn.is_available()  # whose depthwise convolution is many times faster than torch's own


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
    if length == 1:
        return _step(x, weight, bias, initial, final, mask_BL, activation)
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
    with no_autocast(x):
        y = _convolve(x, weight, bias, runs)
    if activation == "silu":
        y = F.silu(y)
    tail = _tail(x, carried, runs) if final else None
    if order is not None:
        # Position l stood at carried + l before the alignment; of the aligned row the last L were computed.
        back = (invert(order)[:, carried:] - carried).clamp(min=0)
        y = take(y, back, 1).masked_fill(~mask_BL[..., None], 0)
    return y, tail


def _step(x, weight, bias, initial, final: bool, mask_BL, activation) -> tuple[Tensor, Tensor | None]:
    """One token. Its sequence is the carried one, so segments say nothing here."""
    if mask_BL is not None:
        x = x.masked_fill(~mask_BL[..., None], 0)
    taps_BKD = _prepend(x, initial, weight.shape[1] - 1)
    y = (taps_BKD * weight.t().to(x.dtype)).sum(1, keepdim=True)
    if bias is not None:
        y = y + bias.to(x.dtype)
    if activation == "silu":
        y = F.silu(y)
    tail = taps_BKD[:, 1:] if final else None
    if mask_BL is not None:
        y = y.masked_fill(~mask_BL[..., None], 0)
        tail = tail if tail is None else torch.where(mask_BL[..., None], tail, taps_BKD[:, :-1])
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


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, runs: Tensor | None) -> Tensor:
    """x has the K - 1 earlier inputs in front; taps reach no other sequence than that of `runs`. Not under autocast."""
    if runs is None:
        return _Convolution.apply(x, weight, bias)
    carried = weight.shape[1] - 1
    if not carried:
        return _Convolution.apply(x, weight, bias)
    length = x.shape[1] - carried
    same = torch.stack([runs[:, i : i + length] == runs[:, carried:] for i in range(carried)])
    return _PackedConvolution.apply(x, weight, bias, same)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of x (B, K - 1 + L, D), all in the dtype of x."""
    taps = weight.shape[1]
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.is_cuda or (x.dtype in (torch.float32, torch.bfloat16) and _ONEDNN):
        # As an image of one line whose channels lie innermost, which is how x lies in memory.
        image_BD1L = x.transpose(1, 2).unsqueeze(2)
        return F.conv2d(image_BD1L, weight[:, None, None], bias, groups=x.shape[2]).squeeze(2).transpose(1, 2)
    length = x.shape[1] - taps + 1
    y = x[:, :length] * weight[:, 0]
    for i in range(1, taps):
        y = torch.addcmul(y, x[:, i : i + length], weight[:, i])
    return y if bias is None else y + bias


class _Convolution(torch.autograd.Function):
    """`_plain` with a backward that is the same convolution of the gradient, and K sums for the weight.

    That of the library costs a multiple, for it moves the channels outward and back.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _plain(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, g_BLD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        taps, length = weight.shape[1], g_BLD.shape[1]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _plain(F.pad(g_BLD, (0, 0, taps - 1, taps - 1)), weight.flip(1), None)
        if ctx.needs_input_grad[1]:
            sums = [(x[:, i : i + length] * g_BLD).sum((0, 1), dtype=weight.dtype) for i in range(taps)]
            dw = torch.stack(sums, 1)
        if ctx.needs_input_grad[2]:
            db = g_BLD.sum((0, 1), dtype=ctx.bias_dtype)
        return dx, dw, db


class _PackedConvolution(torch.autograd.Function):
    """The convolution of packed sequences: tap i counts where `same[i]` (K - 1, B, L) says that it stays in its own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, same: Tensor) -> Tensor:
        taps, length = weight.shape[1], x.shape[1] - weight.shape[1] + 1
        # Sums of a few terms in bfloat16 would round each of them.
        weight = weight.to(torch.promote_types(x.dtype, torch.float32))
        y = x[:, taps - 1 :] * weight[:, -1]
        if bias is not None:
            y += bias
        for i in range(taps - 1):
            y.addcmul_(x[:, i : i + length] * same[i, :, :, None].to(x.dtype), weight[:, i])
        return y.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, same = inputs
        ctx.save_for_backward(x, weight, same)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, g_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, same = ctx.saved_tensors
        taps, length = weight.shape[1], g_BLD.shape[1]
        wide = weight.to(torch.promote_types(x.dtype, torch.float32))
        dx = F.pad(g_BLD * wide[:, -1], (0, 0, taps - 1, 0))
        sums = []
        for i in range(taps - 1):
            kept_BLD = g_BLD * same[i, :, :, None].to(g_BLD.dtype)
            dx[:, i : i + length].addcmul_(kept_BLD, wide[:, i])
            sums.append((x[:, i : i + length] * kept_BLD).sum((0, 1), dtype=weight.dtype))
        sums.append((x[:, taps - 1 :] * g_BLD).sum((0, 1), dtype=weight.dtype))
        db = g_BLD.sum((0, 1), dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx.to(x.dtype), torch.stack(sums, 1), db, None
