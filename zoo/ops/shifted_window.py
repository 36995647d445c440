"""Attention inside the windows of a grid, which may be shifted, with a bias for each relative place (Swin).

    y_i = sum_j softmax_j(scale * q_i . k_j + bias[r_i - r_j, c_i - c_j]) v_j,    j in the window of i

Token i stands in row r_i and column c_i of the grid. It shares a window with those whose floor((r - s) / w) and
floor((c - s) / w) are its own, for windows of w x w tokens that are shifted by s (Liu et al. 2021, arXiv 2103.14030,
section 3.2 and equation 4). Along a side that is not longer than w there is one window and no shift. Special tokens in
front of the grid see all tokens, and all see them, without a bias.

As in the paper the grid is rolled by s, so that there are as many windows as without a shift; a window at the border
then holds parts of several, between which a mask stands. Grids that windows do not divide are padded, with cells that
nobody sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops.attention import attention, check_heads


def shifted_window_attention(
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
    """Attention in shifted windows; y_BHLV in the dtype of q, 0 at masked positions.

    Args:
        q_BHLK, k_BGLK, v_BGLV: H = R*G query heads; query head h reads key/value head h // R. What the grid does not
            hold are special tokens, and stand in front of it.
        bias_PH: added to the scores; ((2 * window - 1) ** 2, H). The row of a pair that is dr rows and dc columns apart
            is (dr + window - 1) * (2 * window - 1) + dc + window - 1.
        window, shift: in tokens along a side, 0 <= shift < window.
        grid: rows and columns; tokens stand row by row. None: one row without an end, shifted however short it is.
        scale: of the products; K ** -0.5 by default.
        mask_BL: True at real tokens.

    Raises ConfigError where the shapes do not fit.
    """
    check_heads(q_BHLK, k_BGLK, v_BGLV, mask_BS=mask_BL)
    (_, H, L, K), device = q_BHLK.shape, q_BHLK.device
    if (grid is not None and grid[0] * grid[1] > L) or bias_PH.shape != ((2 * window - 1) ** 2, H):
        raise ConfigError(f"grid {grid} and biases {tuple(bias_PH.shape)} do not fit {L} tokens of {H} heads")
    if grid is None:
        sides = _Side.of(1, 1, 0, device), _Side.of(L, window, shift, device)
    else:
        sides = (
            _Side.of(grid[0], *_fitting(grid[0], window, shift), device),
            _Side.of(grid[1], *_fitting(grid[1], window, shift), device),
        )
    special = L - sides[0].length * sides[1].length
    repeat = H // k_BGLK.shape[1]
    k_BHLK, v_BHLV = (x if repeat == 1 else x.repeat_interleave(repeat, 1) for x in (k_BGLK, v_BGLV))
    if mask_BL is not None:
        k_BHLK, v_BHLV = (x.masked_fill(~mask_BL[:, None, :, None], 0) for x in (k_BHLK, v_BHLV))
    scale = K**-0.5 if scale is None else scale
    bias_HCC = _bias(bias_PH, window, sides)
    y_BHLV = _in_windows(q_BHLK, k_BHLK, v_BHLV, bias_HCC, sides, special, scale, mask_BL)
    if special:  # their queries; all of them where there is a mask, for a mask is one of the queries too
        n = special if mask_BL is None else L
        own = attention(q_BHLK[:, :, :n], k_BGLK, v_BGLV, causal=False, scale=scale, mask_BS=mask_BL)
        y_BHLV = torch.cat([own[:, :, :special].to(y_BHLV.dtype), y_BHLV], 2)
    return y_BHLV if mask_BL is None else y_BHLV.masked_fill(~mask_BL[:, None, :, None], 0)


@dataclass(frozen=True)
class _Side:
    """One side of the grid, rolled and padded to whole windows.

    place_P: for each place there the row (or column) of the grid, `length` or more in the padding. part_P: the number
    of the window that it belongs to. slot_R: for each row of the grid its place. plain: nothing is rolled or padded.
    """

    length: int
    window: int
    plain: bool
    place_P: Tensor
    part_P: Tensor
    slot_R: Tensor

    @classmethod
    def of(cls, length: int, window: int, shift: int, device: torch.device) -> _Side:
        rolled = -(-length // window) * window
        place_P = (torch.arange(rolled, device=device) + shift) % rolled
        part_P = (place_P - shift).div(window, rounding_mode="floor")
        slot_R = (torch.arange(length, device=device) - shift) % rolled
        return cls(length, window, not shift and rolled == length, place_P, part_P, slot_R)


Sides = tuple[_Side, _Side]


def _fitting(length: int, window: int, shift: int) -> tuple[int, int]:
    """Window and shift along a side: one window where it holds the whole side."""
    return (length, 0) if length <= window else (window, shift)


def _by_window(rows_P: Tensor, columns_P: Tensor, sides: Sides) -> tuple[Tensor, Tensor]:
    """Numbers of all rows and of all columns, for each window and each of its cells: (N, C) both."""
    rows, columns = rows_P.view(-1, sides[0].window), columns_P.view(-1, sides[1].window)
    shape = (len(rows), len(columns), sides[0].window, sides[1].window)
    cells = rows[:, None, :, None].expand(shape), columns[None, :, None, :].expand(shape)
    return cells[0].flatten(2).flatten(0, 1), cells[1].flatten(2).flatten(0, 1)


def _bias(bias_PH: Tensor, window: int, sides: Sides) -> Tensor:
    """The bias of every pair of cells in a window: (H, C, C)."""
    row_a, column_b = (torch.arange(side.window, device=bias_PH.device) for side in sides)
    row_C, column_C = row_a.repeat_interleave(len(column_b)), column_b.repeat(len(row_a))
    down_CC, right_CC = row_C[:, None] - row_C, column_C[:, None] - column_C
    index_CC = (down_CC + window - 1) * (2 * window - 1) + right_CC + window - 1
    return bias_PH[index_CC.flatten()].T.unflatten(1, index_CC.shape)


def _in_windows(
    q_BHLK: Tensor,
    k_BHLK: Tensor,
    v_BHLV: Tensor,
    bias_HCC: Tensor,
    sides: Sides,
    special: int,
    scale: float,
    mask_BL: Tensor | None,
) -> Tensor:
    """The outputs of the grid's tokens, (B, H, rows * columns, V)."""
    rows, columns = sides
    row_NC, column_NC = _by_window(rows.place_P, columns.place_P, sides)
    real_NC = (row_NC < rows.length) & (column_NC < columns.length)
    index_NC = torch.where(real_NC, special + row_NC * columns.length + column_NC, special)
    N, C = index_NC.shape

    def cut(x_BHLK: Tensor) -> Tensor:
        """Windows as rows of a batch (B*N, H, C, K), the special tokens in front where they are keys."""
        return x_BHLK.index_select(2, index_NC.flatten()).unflatten(2, (N, C)).transpose(1, 2).flatten(0, 1)

    q, k, v = cut(q_BHLK), cut(k_BHLK), cut(v_BHLV)
    bias = bias_HCC[None].to(q.dtype)
    if not (rows.plain and columns.plain and mask_BL is None):
        real_BNC = real_NC if mask_BL is None else real_NC & mask_BL[:, index_NC]
        seen_BNCC = _seen(_by_window(rows.part_P, columns.part_P, sides), real_BNC)
        bias = bias.masked_fill(~seen_BNCC.expand(q_BHLK.shape[0], N, C, C).flatten(0, 1)[:, None], -torch.inf)
    if special:
        k, v = (torch.cat([x[:, :, :special].repeat_interleave(N, 0), y], 2) for x, y in ((k_BHLK, k), (v_BHLV, v)))
        bias = F.pad(bias, (special, 0))
        if mask_BL is not None:
            hidden = ~mask_BL[:, :special].repeat_interleave(N, 0)
            bias = bias.masked_fill(F.pad(hidden, (0, C))[:, None, None], -torch.inf)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    slot_RC = rows.slot_R[:, None] // rows.window * (columns.place_P.numel() // columns.window)
    slot_RC = (slot_RC + columns.slot_R // columns.window) * C
    slot_RC = slot_RC + rows.slot_R[:, None] % rows.window * columns.window + columns.slot_R % columns.window
    return y.unflatten(0, (-1, N)).transpose(1, 2).flatten(2, 3).index_select(2, slot_RC.flatten())


def _seen(part_NC: tuple[Tensor, Tensor], real_BNC: Tensor) -> Tensor:
    """Which cell of a window sees which: those of one part, and every cell itself, so that no softmax is empty."""
    same_NCC = (part_NC[0][:, :, None] == part_NC[0][:, None]) & (part_NC[1][:, :, None] == part_NC[1][:, None])
    eye_CC = torch.eye(real_BNC.shape[-1], dtype=torch.bool, device=real_BNC.device)
    return (same_NCC & real_BNC[..., None, :]) | eye_CC
