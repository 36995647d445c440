"""Block-sparse attention: two global blocks, a window of three blocks, random blocks (BigBird, Zaheer et al. 2020,
arXiv:2007.14062, section 2 and appendix D, the ITC form).

Each sequence is cut into blocks of C tokens. The queries of its first and last block see everything; those of a block i
between see the first and the last block, the blocks i - 1, i, i + 1, and those a table lists. Cost grows with
L * (5 + R) * C.

Shapes: B batch, L positions, H = P * G query heads, G key/value heads, K and V head sizes, N blocks, C tokens a block,
R random blocks, J keys that a query meets.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops.attention import attention, check_heads
from zoo.ops.backends import autocast_dtype, no_autocast
from zoo.ops.padding import invert, right_align, segment_runs, take


def block_sparse_attention(
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
    """Two-sided block-sparse attention; returns y_BHLV.

    block: C. Blocks are counted in real tokens of each row; the last may be shorter.
    random_BHNR: int64, (B or 1, H, N, R) with N at least the number of blocks: the key blocks which the queries of a
        block see beside the others. What it says of the first and last block of a row is not read. A block that is
        listed twice, or that is seen anyway, counts as often in the softmax, as in the authors' code.
    full_up_to: rows of at most so many tokens get full attention.
    mask_BL: bool, True = real token, any pattern. Padding is seen by no one, whatever it holds, and returns 0.

    Raises ConfigError where shapes do not fit.
    """
    check_heads(q_BHLK, k_BGLK, v_BGLV, mask_BS=mask_BL)
    (b, h, length, k), blocks = q_BHLK.shape, -(-q_BHLK.shape[2] // block)
    table = tuple(random_BHNR.shape)
    if len(table) != 4 or table[0] not in (1, b) or table[1] != h or table[2] < blocks:
        raise ConfigError(f"random_BHNR has shape {table}, but must be ({b}, {h}, {blocks} or more, R)")
    if length != k_BGLK.shape[2]:
        raise ConfigError(f"{length} queries but {k_BGLK.shape[2]} keys; block-sparse attention carries no state")
    scale = k**-0.5 if scale is None else scale
    full_up_to = max(full_up_to, block)  # one block is a global block: all see all
    # A graph that leaves torch has one form for all lengths; there every row is looked at by itself, below.
    if not (torch.compiler.is_exporting() and mask_BL is not None) and length <= full_up_to:
        return attention(q_BHLK, k_BGLK, v_BGLV, causal=False, scale=scale, mask_BS=mask_BL)
    q, k_, v = q_BHLK, k_BGLK, v_BGLV
    if (dtype := autocast_dtype(q)) is not None:
        q, k_, v = q.to(dtype), k_.to(dtype), v.to(dtype)
    with no_autocast(q):
        if mask_BL is None:
            count_B = torch.full((b,), length, device=q.device)
            return _sparse(q, k_, v, count_B, block, random_BHNR, scale)
        # Zeros instead of whatever padding holds: a weight of 0 does not silence a NaN.
        pad_BL11 = ~mask_BL[:, None, :, None]
        order_BL, count_B = right_align(~mask_BL), mask_BL.sum(1)  # real tokens first
        q, k_, v = (take(x.masked_fill(pad_BL11, 0), order_BL, 2) for x in (q, k_, v))
        y = _sparse(q, k_, v, count_B, block, random_BHNR, scale)
        short_B = count_B <= full_up_to
        if torch.compiler.is_compiling() or bool(short_B.any()):
            real_BT = torch.arange(full_up_to, device=q.device) < count_B[:, None]
            fill: Any = torch.sym_max(full_up_to - length, 0)
            rest: Any = torch.sym_max(length - full_up_to, 0)
            near = (F.pad(x, (0, 0, 0, fill))[:, :, :full_up_to] for x in (q, k_, v))
            full = attention(*near, causal=False, scale=scale, mask_BS=real_BT)
            full = F.pad(full, (0, 0, 0, rest))[:, :, :length]
            y = torch.where(short_B[:, None, None, None], full, y)
        return take(y, invert(order_BL), 2).masked_fill(pad_BL11, 0)


def _sparse(q, k, v, count_B: Tensor, block: int, random_BHNR: Tensor, scale: float) -> Tensor:
    """Rows with `count_B` real tokens first, at least one block and a token of them where the answer is used."""
    (b, h, length, _), g = q.shape, k.shape[1]
    n = -(-length // block)
    q, k, v = (F.pad(x, (0, 0, 0, n * block - length)) for x in (q, k, v))
    last_B = ((count_B - 1) // block).clamp(min=0)
    real_BNC = (torch.arange(n * block, device=q.device) < count_B[:, None]).view(b, n, block)
    random_BHNR = random_BHNR[:, :, :n].expand(b, -1, -1, -1)
    if torch.compiler.is_exporting():  # in rows that are too short for this form, and whose answers come from elsewhere
        random_BHNR = random_BHNR.minimum(torch.arange(n, device=q.device)[-1])
    parts = [_band(k, v, real_BNC, last_B, block), _global_blocks(k, v, real_BNC, last_B, block)]
    if random_BHNR.shape[3]:
        parts.append(_random_blocks(k, v, real_BNC, random_BHNR, h // g))
    q_BGPNCK = (q * scale).view(b, g, h // g, n, block, -1)
    low = torch.finfo(q.dtype).min / 2  # finite, so that a row which sees nothing has a finite softmax and gradient
    scores = []
    for keys, _, visible in parts:
        bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~visible, low)
        scores.append(q_BGPNCK @ keys.mT + bias)
    weights = torch.cat(scores, -1).softmax(-1).split([s.shape[-1] for s in scores], -1)
    y = sum(w @ values for w, (_, values, _) in zip(weights, parts, strict=True))
    return _answer_global_blocks(y.reshape(b, h, n * block, -1), q, k, v, real_BNC, last_B, block, scale)[:, :, :length]


def _band(k, v, real_BNC: Tensor, last_B: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks i - 1, i, i + 1 as (B, G, 1, N, J, K), without the global ones."""
    n = real_BNC.shape[1]
    blocks_N = torch.arange(n, device=k.device)
    inner_BNC = real_BNC & ((blocks_N > 0) & (blocks_N < last_B[:, None]))[..., None]

    def shifted(x: Tensor) -> Tensor:
        """(..., N * C, K) -> (..., N, 3 C, K)."""
        pieces = F.pad(x, (0, 0, block, block)).unflatten(-2, (-1, block))
        return torch.cat([pieces.narrow(-3, i, n) for i in range(3)], -2)

    visible = shifted(inner_BNC.flatten(1)[..., None])[..., 0]
    return shifted(k)[:, :, None], shifted(v)[:, :, None], visible[:, None, None, :, None]


def _global_blocks(k, v, real_BNC: Tensor, last_B: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the last block, as (B, G, 1, 1, 2 C, K)."""
    index_BJ = _global_places(last_B, block)
    visible = real_BNC.flatten(1).gather(1, index_BJ)
    keys, values = (take(x, index_BJ, 2)[:, :, None, None] for x in (k, v))
    return keys, values, visible[:, None, None, None, None]


def _random_blocks(k, v, real_BNC: Tensor, random_BHNR: Tensor, repeats: int) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of the table, as (B, G, P, N, R C, K)."""
    (b, h, n, r), block, device = random_BHNR.shape, real_BNC.shape[2], k.device
    g = h // repeats
    head_BH11 = torch.arange(b, device=device).view(b, 1, 1, 1) * g + torch.arange(h, device=device).view(
        h, 1, 1
    ) // repeats  # fmt: skip
    index = (head_BH11 * n + random_BHNR).flatten()

    def listed(x: Tensor) -> Tensor:
        picked = x.reshape(b * g * n, -1).index_select(0, index)
        return picked.view(b, g, repeats, n, r * block, -1)

    visible = real_BNC[:, None].expand(-1, g, -1, -1).reshape(b * g * n, block).index_select(0, index)
    return listed(k), listed(v), visible.view(b, g, repeats, n, 1, r * block)


def _answer_global_blocks(y, q, k, v, real_BNC: Tensor, last_B: Tensor, block: int, scale: float) -> Tensor:
    """Replace the outputs of the first and the last block of each row by attention over all its keys."""
    index_BJ = _global_places(last_B, block)
    real_BL = real_BNC.flatten(1)
    answer = F.scaled_dot_product_attention(
        take(q, index_BJ, 2),
        k,
        v,
        attn_mask=(real_BL | ~real_BL[:, :1])[:, None, None],  # a row without any token sees all, and is thrown away
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.scatter(2, index_BJ[:, None, :, None].expand(-1, y.shape[1], -1, y.shape[3]), answer)


def _global_places(last_B: Tensor, block: int) -> Tensor:
    """Places of the tokens of the first and the last block, (B, 2 C)."""
    first_C = torch.arange(block, device=last_B.device)
    return torch.cat([first_C.expand(last_B.shape[0], -1), last_B[:, None] * block + first_C], 1)


def separate_segments(segments_BL: Tensor, mask_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """Packed sequences as rows of their own: the place of each token in the flattened batch, and which are real.

    Returns index_QL (int64) and mask_QL for the Q sequences of all rows, real tokens first. Reads the lengths, which
    is one synchronisation.
    """
    b, length = segments_BL.shape
    runs_BL = segment_runs(segments_BL, mask_BL) + length * torch.arange(b, device=segments_BL.device)[:, None]
    real = torch.ones_like(runs_BL, dtype=torch.bool) if mask_BL is None else mask_BL
    places = real.flatten().nonzero()[:, 0]
    count_Q = torch.unique_consecutive(runs_BL.flatten()[places], return_counts=True)[1]
    inside = torch.arange(int(count_Q.max()) if len(count_Q) else 0, device=places.device)
    mask_QL = inside < count_Q[:, None]
    index_QL = torch.zeros_like(mask_QL, dtype=torch.long).masked_scatter(mask_QL, places)
    return index_QL, mask_QL
