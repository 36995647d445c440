"""Softmax attention over all keys.

`y_i = sum_j softmax_j(scale * q_i . k_j) v_j` over the keys j that query i may see (Vaswani et al. 2017,
arXiv:1706.03762), with grouped keys and values (Ainslie et al. 2023, arXiv:2305.13245).

Shapes: B batch, L queries, S keys (the queries are the last L of the S positions), H query heads, G key/value
heads (query head h reads key head h // (H // G)), K key head size, V value head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops.backends import autocast_dtype, dispatch, register_backend
from zoo.ops.padding import segment_runs

SHORT = 128  # keys, see `_short_on_cpu`


def attention(
    q_BHLK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    mask_BS: Tensor | None = None,
    segments_BS: Tensor | None = None,
    window: int | None = None,
    finite_padding: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention; returns y_BHLV in the dtype of `q` (that of autocast where it is on).

    causal: query i sees keys up to its own position. The last query stands at the last key, also where S > L
        (keys carried from earlier calls).
    scale: of the scores; K ** -0.5 by default.
    mask_BS: bool, True = real token, for all S positions. Padded keys are seen by no one, whatever they hold, and
        padded queries return 0.
    segments_BS: ids of all S positions; contiguous runs of one id are sequences that do not see each other.
    window: only keys closer than `window` tokens (`0 <= i - j < window`, or `|i - j| < window` where not causal).
        The mask is dense here; `window_attention` computes the same in blocks.
    finite_padding: the caller vouches that what `mask_BS` hides is finite (no NaN, no infinity). It is then hidden
        without being cleared first, which saves a copy of all keys and values: most of a decoding step.
    backend: "flash_attn" or "sdpa"; by default the first that can.

    Raises ConfigError where the shapes do not fit.
    """
    check_heads(q_BHLK, k_BGSK, v_BGSV, mask_BS=mask_BS, segments_BS=segments_BS, window=window)
    return dispatch(
        "attention",
        backend,
        q_BHLK,
        k_BGSK,
        v_BGSV,
        causal=causal,
        scale=q_BHLK.shape[-1] ** -0.5 if scale is None else scale,
        mask_BS=mask_BS,
        segments_BS=segments_BS,
        window=window,
        finite_padding=finite_padding,
    )


def check_heads(q_BHLK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, *, window: int | None = None, **per_position) -> None:
    """Raise ConfigError unless the shapes of queries, keys, values and per-position tensors fit together."""
    (b, h, length, k), (bk, g, s, kk) = q_BHLK.shape, k_BGSK.shape
    if (b, k) != (bk, kk) or v_BGSV.shape[:3] != k_BGSK.shape[:3]:
        raise ConfigError(
            f"q {tuple(q_BHLK.shape)}, k {tuple(k_BGSK.shape)} and v {tuple(v_BGSV.shape)} do not fit together; "
            "they are (B, H, L, K), (B, G, S, K) and (B, G, S, V)"
        )
    if h % g:
        raise ConfigError(f"{h} query heads cannot share {g} key/value heads; they must be a multiple of them")
    if s < length:
        raise ConfigError(f"{length} queries but {s} keys: the queries are the last positions of the keys, so S >= L")
    if window is not None and window < 1:
        raise ConfigError(f"window is {window}, but must be at least 1 (the token itself)")
    for name, tensor in per_position.items():
        if tensor is not None and tuple(tensor.shape) != (b, s):
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}, but there are {(b, s)} (batch, key) positions")


def _flash_serves(q: Tensor, k: Tensor, v: Tensor, *, causal, scale, mask_BS, segments_BS, window, **_) -> bool:
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] == v.shape[-1] <= 256
        and mask_BS is None
        and segments_BS is None
    )


@register_backend("attention", "flash_attn", package="flash_attn", needs_gpu=True, usable=_flash_serves)
def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal, scale, window, **_) -> Tensor:
    """The kernels of the flash-attn package, which keep time before heads. No masks, no segments."""
    from flash_attn import flash_attn_func

    reach = -1 if window is None else window - 1
    y_BLHV = flash_attn_func(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        softmax_scale=scale,
        causal=causal,
        window_size=(reach, 0 if causal and window is not None else reach),
    )
    return y_BLHV.transpose(1, 2)


def _short_on_cpu(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether float32 is faster than bf16: PyTorch's backward pass on a CPU is slow where rows are short.

    Forward and backward of 64 rows of 50, 3 heads of 32: 6.6 ms instead of 23.6 ms; of 16 rows of 128, 4 heads: 8.8
    instead of 18.7; from about 200 on they are equal (torch 2.14, EPYC with AVX512-BF16, one thread).
    """
    low = torch.bfloat16 in (q.dtype, autocast_dtype(q))
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return q.device.type == "cpu" and low and trains and k.shape[2] <= SHORT


@register_backend("attention", "sdpa")
def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal, scale, mask_BS, segments_BS, window, finite_padding) -> Tensor:
    if _short_on_cpu(q, k, v):
        options = {"mask_BS": mask_BS, "segments_BS": segments_BS, "window": window, "finite_padding": finite_padding}
        with torch.autocast("cpu", enabled=False):
            y = _sdpa(q.float(), k.float(), v.float(), causal=causal, scale=scale, **options)
        return y.to(autocast_dtype(q) or q.dtype)
    b, h, length, _ = q.shape
    g, s = k.shape[1], k.shape[2]
    pad_BS11 = None if mask_BS is None else ~mask_BS[:, None, :, None]
    if pad_BS11 is not None and not finite_padding:
        # Zeros instead of whatever padding holds: a weight of 0 does not silence a NaN.
        q = q.masked_fill(pad_BS11[:, :, s - length :], 0)
        k, v = k.masked_fill(pad_BS11, 0), v.masked_fill(pad_BS11, 0)
    plain_causal = causal and length == s and window is None and mask_BS is None and segments_BS is None
    visible = None
    if not plain_causal:
        visible = visible_keys(length, s, q.device, causal, mask_BS, segments_BS, window)
    if length == 1 and h != g:
        # One token: the query heads of a group are queries of one head, and nothing is repeated.
        mask = None if visible is None else visible[:, None]
        y = F.scaled_dot_product_attention(q.reshape(b, g, h // g, -1), k, v, attn_mask=mask, scale=scale)
        y = y.reshape(b, h, 1, -1)
    else:
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if visible is None else visible[:, None],
            is_causal=bool(plain_causal and length > 1),
            scale=scale,
            enable_gqa=h != g,
        )
    if pad_BS11 is not None:
        y = y.masked_fill(pad_BS11[:, :, s - length :], 0)
    return y


def visible_keys(
    length: int,
    s: int,
    device: torch.device,
    causal: bool,
    mask_BS: Tensor | None,
    segments_BS: Tensor | None,
    window: int | None,
) -> Tensor | None:
    """Which of the S keys each of the last `length` queries may see: bool, (B or 1, L, S); None means all.

    Distances are counted in real tokens. A padded query is shown everything, so that its softmax is finite.
    """
    visible: Tensor | None = None
    if mask_BS is not None:
        visible = mask_BS[:, None, :].expand(-1, length, -1)
    if (causal and length > 1) or window is not None:
        rank_1S = torch.arange(s, device=device)[None] if mask_BS is None else mask_BS.cumsum(-1)
        ahead_BLS = rank_1S[:, s - length :, None] - rank_1S[:, None, :]
        if window is None:
            near = ahead_BLS >= 0
        else:
            near = (ahead_BLS if causal else ahead_BLS.abs()) < window
            near = near & (ahead_BLS >= 0) if causal else near
        visible = near if visible is None else visible & near
    if segments_BS is not None:
        runs_BS = segment_runs(segments_BS, mask_BS)
        same = runs_BS[:, s - length :, None] == runs_BS[:, None, :]
        visible = same if visible is None else visible & same
    if mask_BS is not None and visible is not None:
        visible = visible | ~mask_BS[:, s - length :, None]
    return visible


def _all_pairs_serve(*_: Tensor, segments_BS, globals_BS, **__) -> bool:
    return torch.compiler.is_exporting() and segments_BS is None and globals_BS is None


@register_backend("window_attention", "all_pairs", usable=_all_pairs_serve)
def _all_pairs(q, k, v, *, window, sinks, sink_kv, positions_BL, causal, scale, mask_BS, **_) -> Tensor:
    """A window, hidden keys and all: for graphs that leave torch, into which blocks would build a length."""
    (b, h, length, _), s = q.shape, k.shape[2]
    visible = visible_keys(length, s, q.device, causal, mask_BS, None, window)
    assert visible is not None
    place_BS = torch.arange(s, device=q.device)[None] if mask_BS is None else mask_BS.cumsum(1) - 1
    if mask_BS is not None:
        k, v = (x.masked_fill(~mask_BS[:, None, :, None], 0) for x in (k, v))
    if sinks and sink_kv is None:
        reachable = visible_keys(length, s, q.device, causal, mask_BS, None, s)
        visible = visible | (reachable & (place_BS < sinks)[:, None])
    if sink_kv is not None:
        at_BL = place_BS[:, s - length :] if positions_BL is None else positions_BL
        distance_BLN = at_BL[..., None] - torch.arange(sink_kv[0].shape[2], device=q.device)
        far_BLN = (distance_BLN if causal else distance_BLN.abs()) >= window
        visible = torch.cat([far_BLN.expand(b, -1, -1), visible.expand(b, -1, -1)], -1)
        k, v = (torch.cat([given.to(x.dtype), x], 2) for given, x in zip(sink_kv, (k, v), strict=True))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], scale=scale, enable_gqa=h != k.shape[1])
    return y if mask_BS is None else y.masked_fill(~mask_BS[:, None, s - length :, None], 0)
