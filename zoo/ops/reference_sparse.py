"""Sparse attention as a dense matrix: who sees whom is written out pair by pair, then one softmax.

Slow and obvious; `dilated_window.py`, `block_sparse.py` and `shifted_window.py` are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.padding import segment_runs
from zoo.ops.positions import token_positions


def counted_attention_reference(q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, count: Tensor, scale: float) -> Tensor:
    """Attention in which query i meets key j `count[..., i, j]` times (0: not at all); (B or 1, H or 1, L, L).

    A query that meets no key returns 0.
    """
    k_BHLK, v_BHLV = (x.repeat_interleave(q_BHLK.shape[1] // x.shape[1], 1) for x in (k_BGLK, v_BGLV))
    scores_BHLL = (scale * q_BHLK @ k_BHLK.mT).masked_fill(count == 0, -torch.inf)
    weights_BHLL = count * (scores_BHLL - scores_BHLL.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
    return weights_BHLL @ v_BHLV / weights_BHLL.sum(-1, keepdim=True).clamp(min=1e-30)


def dilated_window_attention_reference(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    *,
    window: int,
    dilation: int = 1,
    global_tokens: int = 0,
    causal: bool = True,
    scale: float | None = None,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
) -> Tensor:
    """See `zoo.ops.dilated_window.dilated_window_attention`; without a state, and masked inputs must be finite."""
    b, length = len(q_BHLK), q_BHLK.shape[2]
    mask_BL = torch.ones(b, length, dtype=torch.bool, device=q_BHLK.device) if mask_BL is None else mask_BL
    segments_BL = torch.zeros_like(mask_BL, dtype=torch.long) if segments_BL is None else segments_BL
    runs_BL = segment_runs(segments_BL, mask_BL)
    positions_BL = token_positions(k_BGLK[:, 0], mask_BL, segments_BL)
    distance_BLL = positions_BL[:, :, None] - positions_BL[:, None]
    near_BLL = (distance_BLL % dilation == 0) & (distance_BLL.abs() < window * dilation)
    visible_BLL = near_BLL | (positions_BL < global_tokens)[:, None]
    if causal:
        visible_BLL = visible_BLL & (distance_BLL >= 0)
    visible_BLL = visible_BLL & (runs_BL[:, :, None] == runs_BL[:, None]) & mask_BL[:, None]
    visible_BLL = visible_BLL & (mask_BL & (positions_BL >= global_tokens))[:, :, None]
    scale = q_BHLK.shape[-1] ** -0.5 if scale is None else scale
    return counted_attention_reference(q_BHLK, k_BGLK, v_BGLV, visible_BLL[:, None].to(q_BHLK.dtype), scale)


def block_sparse_attention_reference(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    *,
    block: int,
    random_BHNR: Tensor,
    full_up_to: int = 0,
    scale: float | None = None,
    mask_BL: Tensor | None = None,
) -> Tensor:
    """See `zoo.ops.block_sparse.block_sparse_attention`; masked inputs must be finite."""
    b, h, length, k = q_BHLK.shape
    mask_BL = torch.ones(b, length, dtype=torch.bool, device=q_BHLK.device) if mask_BL is None else mask_BL
    random_BHNR = random_BHNR.expand(b, -1, -1, -1)
    count = q_BHLK.new_zeros(b, h, length, length)
    for row in range(b):
        places = mask_BL[row].nonzero()[:, 0]
        blocks = list(places.split(block)) if len(places) else []
        last = len(blocks) - 1
        for i, queries in enumerate(blocks):
            for head in range(h):
                seen = sorted({0, i - 1, i, i + 1, last}) + random_BHNR[row, head, i].tolist()
                if i in (0, last) or len(places) <= full_up_to:
                    seen = list(range(last + 1))
                for j in seen:
                    count[row, head, queries[:, None], blocks[j]] += 1
    return counted_attention_reference(q_BHLK, k_BGLK, v_BGLV, count, k**-0.5 if scale is None else scale)


def shifted_window_attention_reference(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    bias_PH: Tensor,
    *,
    window: int,
    shift: int = 0,
    grid: tuple[int, int] | None = None,
    scale: float | None = None,
    mask_BL: Tensor | None = None,
) -> Tensor:
    """See `zoo.ops.shifted_window.shifted_window_attention`; masked inputs must be finite."""
    L, K = q_BHLK.shape[2:]
    rows, columns = (1, L) if grid is None else grid
    special = L - rows * columns
    place_L = torch.arange(L, device=q_BHLK.device) - special
    near_LL = torch.ones(L, L, dtype=torch.bool, device=q_BHLK.device)
    index_LL = torch.zeros_like(near_LL, dtype=torch.long)
    for place, side, factor in ((place_L // columns, rows, 2 * window - 1), (place_L % columns, columns, 1)):
        whole = factor > 1 if grid is None else side <= window  # a sequence is one row
        part_L = torch.zeros_like(place) if whole else torch.div(place - shift, window, rounding_mode="floor")
        near_LL = near_LL & (part_L[:, None] == part_L)
        index_LL = index_LL + factor * (place[:, None] - place + window - 1)
    other_LL = (place_L[:, None] < 0) | (place_L < 0)
    bias_HLL = bias_PH[index_LL.masked_fill(other_LL | ~near_LL, 0)].permute(2, 0, 1).masked_fill(other_LL, 0)
    seen = (near_LL | other_LL)[None, None]
    if mask_BL is not None:
        seen = seen & mask_BL[:, None, None] & mask_BL[:, None, :, None]
    k_BHLK, v_BHLV = (x.repeat_interleave(q_BHLK.shape[1] // x.shape[1], 1) for x in (k_BGLK, v_BGLV))
    scores_BHLL = (K**-0.5 if scale is None else scale) * q_BHLK @ k_BHLK.mT + bias_HLL
    weights_BHLL = scores_BHLL.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights_BHLL @ v_BHLV
