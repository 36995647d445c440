"""Sliding-window attention with sinks and global tokens, computed in blocks.

A query at position p sees the keys of the last `window` tokens, its own included (Child et al. 2019; Beltagy et
al. 2020, arXiv:2004.05150), the first `sinks` tokens of its sequence (Xiao et al. 2023, arXiv:2309.17453), and the
tokens marked global. Queries are cut into blocks of C; a block meets only the keys its window can reach, so cost
and memory grow with L * (window + sinks). The query heads of a key head are rows of one matrix product: keys and
values are never repeated for them.

Shapes: B batch, L queries, S keys (the queries are the last L of the S positions), H = R * G query heads, G
key/value heads, K and V head sizes, N blocks, C queries a block, J keys a block, E extra keys (sinks, globals).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops.attention import attention, check_heads, flash_attention
from zoo.ops.backends import autocast_dtype, dispatch, no_autocast, register_backend
from zoo.ops.padding import invert, right_align, segment_runs, take

LARGEST_BLOCK = {"cpu": 64, "cuda": 256}  # queries


def window_attention(
    q_BHLK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    *,
    window: int,
    sinks: int = 0,
    sink_kv: tuple[Tensor, Tensor] | None = None,
    positions_BL: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    mask_BS: Tensor | None = None,
    segments_BS: Tensor | None = None,
    globals_BS: Tensor | None = None,
    max_globals: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention over a window, sinks and global tokens, each key counted once; returns y_BHLV.

    window: reach in tokens, the query itself included: keys p - window + 1 .. p where causal. Otherwise the reach
        is the same to both sides, `|distance| <= window - 1` (Longformer's `attention_window` w is window w/2 + 1).
    S > L: the first S - L keys come from earlier calls and immediately precede the new ones; all but the last
        window - 1 of them may be missing.
    sinks: the first `sinks` tokens of the sequence (of each segment) stay visible. They are taken from `k` and `v`,
        which then must begin with the sequence, unless
    sink_kv: (k_BGNK, v_BGNV) gives the first N tokens of the sequence explicitly. Sink j is used by a query at
        position p where p - j >= window (`|p - j|` where not causal), so it does not matter whether `k` holds it
        too. With segments they belong to the first sequence of the row; later ones take theirs from `k`.
    positions_BL: positions of the queries in their own sequence, (B or 1, L). Read only with `sink_kv`; by default
        the number of real tokens before each in its row (arange(S - L, S) without a mask).
    mask_BS: bool, True = real token, any pattern. Distances count real tokens, padded keys are seen by no one
        whatever they hold, padded queries return 0.
    segments_BS: ids of all S positions; contiguous runs of one id are sequences that do not see each other.
    globals_BS: bool; every query sees the global tokens of its sequence (the past ones, where causal), and a query
        at a global token sees its whole sequence. Not with `sink_kv`: global tokens need all keys.
    max_globals: an upper bound of global tokens in a row, so that shapes are static; further ones count as
        ordinary. By default the largest number in the batch, which is read from the tensor (one synchronisation).
    backend: "flash_attn" (CUDA, plain windows) or "blocks"; by default the first that can.

    Raises ConfigError where shapes do not fit or arguments exclude each other (also for more sinks than window in
    packed two-sided rows).
    """
    check_heads(q_BHLK, k_BGSK, v_BGSV, window=window, mask_BS=mask_BS, segments_BS=segments_BS, globals_BS=globals_BS)
    if sinks < 0:
        raise ConfigError(f"sinks is {sinks}, but must be at least 0")
    if segments_BS is not None and not causal and sinks > window:
        raise ConfigError(f"{sinks} sinks but a window of {window}: packed two-sided rows need sinks <= window")
    if sink_kv is not None and globals_BS is not None:
        raise ConfigError("sink_kv and globals_BS exclude each other: global tokens need all keys, so sinks are there")
    if sink_kv is not None:
        _check_sinks(q_BHLK, k_BGSK, v_BGSV, sink_kv, positions_BL)
    return dispatch(
        "window_attention",
        backend,
        q_BHLK,
        k_BGSK,
        v_BGSV,
        window=window,
        sinks=sinks,
        sink_kv=sink_kv,
        positions_BL=positions_BL,
        causal=causal,
        scale=q_BHLK.shape[-1] ** -0.5 if scale is None else scale,
        mask_BS=mask_BS,
        segments_BS=segments_BS,
        globals_BS=globals_BS,
        max_globals=max_globals,
    )


def _check_sinks(q, k, v, sink_kv: tuple[Tensor, Tensor], positions_BL: Tensor | None) -> None:
    for given, whole, letter in zip(sink_kv, (k, v), "kv", strict=True):
        if given.dim() != 4 or (*given.shape[:2], given.shape[3]) != (*whole.shape[:2], whole.shape[3]):
            raise ConfigError(
                f"sink_kv: {letter} has shape {tuple(given.shape)}, but must be that of {letter}, "
                f"{tuple(whole.shape)}, except for the number of tokens"
            )
    if positions_BL is not None and (positions_BL.dim() != 2 or positions_BL.shape[1] != q.shape[2]):
        raise ConfigError(
            f"positions_BL has shape {tuple(positions_BL.shape)}, but there are {(q.shape[0], q.shape[2])} queries"
        )


def _flash_serves(q: Tensor, k: Tensor, v: Tensor, *, sinks, sink_kv, mask_BS, segments_BS, globals_BS, **_) -> bool:
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] == v.shape[-1] <= 256
        and not sinks
        and all(given is None for given in (sink_kv, mask_BS, segments_BS, globals_BS))
    )


@register_backend("window_attention", "flash_attn", package="flash_attn", needs_gpu=True, usable=_flash_serves)
def _flash(q: Tensor, k: Tensor, v: Tensor, *, window: int, causal: bool, scale: float, **_) -> Tensor:
    return flash_attention(q, k, v, causal=causal, scale=scale, window=window)


@register_backend("window_attention", "blocks")
def _blocks(q, k, v, *, mask_BS, segments_BS, globals_BS, positions_BL, **options) -> Tensor:
    """Take padding out of the way, then compute; see `_aligned`."""
    s, length, window = k.shape[2], q.shape[2], options["window"]
    if window >= s and options["sink_kv"] is None:  # all is near: sinks and global tokens add nothing
        return attention(
            q, k, v, causal=options["causal"], scale=options["scale"], mask_BS=mask_BS, segments_BS=segments_BS
        )
    plain = mask_BS is None and segments_BS is None and globals_BS is None
    if length == 1 and plain and options["causal"]:
        return _step(q, k, v, positions_BL=positions_BL, **options)
    if (dtype := autocast_dtype(q)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    runs_BS = None if segments_BS is None else segment_runs(segments_BS, mask_BS)
    with no_autocast(q):
        if mask_BS is None:
            return _aligned(
                q, k, v, pads_B=None, runs_BS=runs_BS, globals_BS=globals_BS, positions_BL=positions_BL, **options
            )
        # Zeros instead of whatever padding holds: a weight of 0 does not silence a NaN.
        pad_BS11 = ~mask_BS[:, None, :, None]
        q_pad_BL11 = pad_BS11[:, :, s - length :]
        order_BS, q_order_BL = right_align(mask_BS), right_align(mask_BS[:, s - length :])
        y = _aligned(
            take(q.masked_fill(q_pad_BL11, 0), q_order_BL, 2),
            take(k.masked_fill(pad_BS11, 0), order_BS, 2),
            take(v.masked_fill(pad_BS11, 0), order_BS, 2),
            pads_B=s - mask_BS.sum(-1),
            runs_BS=None if runs_BS is None else take(runs_BS, order_BS, 1),
            globals_BS=None if globals_BS is None else take(globals_BS & mask_BS, order_BS, 1),
            positions_BL=None if positions_BL is None else take(positions_BL.expand(q.shape[0], -1), q_order_BL, 1),
            **options,
        )
        return take(y, invert(q_order_BL), 2).masked_fill(q_pad_BL11, 0)


def _step(q, k, v, *, window, sinks, sink_kv, positions_BL, causal, scale, max_globals) -> Tensor:
    """One query of rows without padding: its keys beside each other, and hardly an operation more."""
    s = k.shape[2]
    near_k, near_v = k[:, :, max(s - window, 0) :], v[:, :, max(s - window, 0) :]
    visible = None
    if sink_kv is None:
        sinks = min(sinks, s - near_k.shape[2])
        first_k, first_v = k[:, :, :sinks], v[:, :, :sinks]
    else:
        first_k, first_v = sink_kv
        sinks = first_k.shape[2]
        if positions_BL is None:
            sinks = min(sinks, s - near_k.shape[2])
            first_k, first_v = first_k[:, :, :sinks], first_v[:, :, :sinks]
        else:
            far = positions_BL - torch.arange(sinks, device=q.device) >= window
            visible = F.pad(far, (0, near_k.shape[2]), value=True).expand(q.shape[0], -1)
    if sinks:
        near_k = torch.cat([first_k.to(near_k.dtype), near_k], 2)
        near_v = torch.cat([first_v.to(near_v.dtype), near_v], 2)
    b, h, g = q.shape[0], q.shape[1], k.shape[1]
    visible = None if visible is None else visible[:, None, None]
    y = F.scaled_dot_product_attention(q.reshape(b, g, h // g, -1), near_k, near_v, attn_mask=visible, scale=scale)
    return y.reshape(b, h, 1, -1)


class _Row(NamedTuple):
    """What is known of the rows once padding stands first in each, so that index distance is token distance."""

    k: Tensor
    v: Tensor
    length: int  # of the queries, which are cut into blocks of `size`
    size: int
    window: int
    causal: bool
    pads_B: Tensor | None  # the number of padded positions, all at the front
    runs_BS: Tensor | None  # the number of the packed sequence of each position
    globals_BS: Tensor | None

    def blocks(self) -> int:
        """N, the number of blocks."""
        return -(-self.length // self.size)

    def index_NC(self) -> Tensor:
        """Index of each query among the keys. The last block may go on behind the end; its rows are cut off."""
        first = self.k.shape[2] - self.length
        places = torch.arange(first, first + self.blocks() * self.size, device=self.k.device)
        return places.view(-1, self.size)

    def by_block(self, x_BL: Tensor) -> Tensor:
        """(B, L) -> (B, N, C)."""
        return F.pad(x_BL, (0, self.blocks() * self.size - self.length)).unflatten(1, (-1, self.size))

    def far(self, distance: Tensor) -> Tensor:
        """Out of the window, and not in the future where that is hidden."""
        return (distance if self.causal else distance.abs()) >= self.window

    def at(self, x_BS: Tensor, index: Tensor) -> Tensor:
        """x at the places `index` (B, ...), which are held within the row."""
        s = x_BS.shape[1]
        return x_BS.gather(1, index.clamp(max=s - 1).flatten(1)).view(index.shape)


class _Extra(NamedTuple):
    """Keys beside the window."""

    k: Tensor  # (B, G, N or 1, E, K)
    v: Tensor
    visible: Tensor  # (B or 1, N, C, E)


def _aligned(
    q, k, v, *, window, sinks, sink_kv, positions_BL, causal, scale, pads_B, runs_BS, globals_BS, max_globals
) -> Tensor:
    index_BM = None
    if globals_BS is not None:
        index_BM, globals_BS = _bounded_globals(globals_BS, max_globals)
    size, before, after = _block_geometry(q, k.shape[2], window, causal, packed=runs_BS is not None)
    row = _Row(k, v, q.shape[2], size, window, causal, pads_B, runs_BS, globals_BS)
    extras = []
    if index_BM is not None:
        extras.append(_global_keys(row, index_BM))
    if sink_kv is not None:
        extras.append(_given_sinks(row, sink_kv, positions_BL))
    if sinks and runs_BS is not None:
        extras.append(_segment_sinks(row, sinks, first_given=sink_kv is not None))
    elif sinks and sink_kv is None:
        extras.append(_first_tokens(row, min(sinks, k.shape[2])))
    y = _attend(q, scale, *_window_keys(row, before, after), extras)
    if index_BM is not None:
        y = _answer_globals(y, q, row, index_BM, scale)
    return y


def _block_geometry(q: Tensor, s: int, window: int, causal: bool, packed: bool) -> tuple[int, int, int]:
    """Queries a block, and how many keys a block meets before its first and after its last query."""
    length = q.shape[2]
    # Half the window in powers of two was fastest; `_segment_sinks` relies on size <= window + 1.
    size = min(max(16, 1 << (max(window - 1, 1).bit_length() - 1)), LARGEST_BLOCK["cuda" if q.is_cuda else "cpu"])
    size = min(size, window + 1) if packed else size
    if length <= size:  # one block: all new keys, and what the window reaches of the old ones
        return length, min(window - 1, s - length), 0
    before = -(-(window - 1) // size) * size
    return size, before, 0 if causal else before


def _window_keys(row: _Row, before: int, after: int) -> tuple[Tensor, Tensor, Tensor]:
    """k_BGNJK, v_BGNJV and who sees them, (B or 1, N, C, J)."""
    s, n, size, device = row.k.shape[2], row.blocks(), row.size, row.k.device
    first = s - row.length - before  # the index in k of the first key of block 0
    span = before + size + after
    ends = (-first, first + (n - 1) * size + span - s)  # zeros to add, or keys to drop, at both ends

    def blocks(x: Tensor) -> Tensor:
        """(B, ..., S, K) -> (B, ..., N, J, K): pieces of `size` beside each other, as the windows overlap."""
        x = F.pad(x, (0, 0, *ends))
        if n == 1:
            return x.unsqueeze(-3)
        pieces = x.unflatten(-2, (-1, size))
        return torch.cat([pieces.narrow(-3, i, n) for i in range(span // size)], -2)

    delta_CJ = before + torch.arange(size, device=device)[:, None] - torch.arange(span, device=device)
    near_CJ = (delta_CJ >= 0) & (delta_CJ < row.window) if row.causal else delta_CJ.abs() < row.window
    index_NJ = first + size * torch.arange(n, device=device)[:, None] + torch.arange(span, device=device)
    visible = (near_CJ & ((index_NJ >= 0) & (index_NJ < s))[:, None])[None]
    if row.pads_B is not None:
        visible = visible & (index_NJ >= row.pads_B[:, None, None])[:, :, None]
    if row.runs_BS is not None:
        mine_BNC = row.by_block(row.runs_BS[:, s - row.length :])
        visible = visible & (blocks(row.runs_BS[..., None])[:, :, None, :, 0] == mine_BNC[..., None])
    if row.globals_BS is not None:
        visible = visible & ~blocks(row.globals_BS[..., None])[:, :, None, :, 0]
    return blocks(row.k), blocks(row.v), visible


def _first_tokens(row: _Row, sinks: int) -> _Extra:
    """The first real tokens of each row, for the queries whose window does not reach them."""
    s = row.k.shape[2]
    index_BE = torch.arange(sinks, device=row.k.device)[None]
    k, v = row.k[:, :, :sinks], row.v[:, :, :sinks]
    if row.pads_B is not None:
        index_BE = row.pads_B[:, None] + index_BE
        inside = index_BE.clamp(max=s - 1)
        k, v = take(row.k, inside, 2), take(row.v, inside, 2)
    visible = row.far(row.index_NC()[..., None] - index_BE[:, None, None]) & (index_BE < s)[:, None, None]
    if row.globals_BS is not None:
        is_global = row.at(row.globals_BS, index_BE.expand(row.k.shape[0], -1))
        visible = visible & ~is_global[:, None, None]
    return _Extra(k[:, :, None], v[:, :, None], visible)


def _given_sinks(row: _Row, sink_kv: tuple[Tensor, Tensor], positions_BL: Tensor | None) -> _Extra:
    k, v = (x.to(row.k.dtype) for x in sink_kv)
    if positions_BL is not None:
        positions_BNC = row.by_block(positions_BL)
    else:
        positions_BNC = row.index_NC()[None]
        if row.pads_B is not None:
            positions_BNC = positions_BNC - row.pads_B[:, None, None]
    visible = row.far(positions_BNC[..., None] - torch.arange(k.shape[2], device=k.device))
    if row.runs_BS is not None:
        mine_BNC = row.by_block(row.runs_BS[:, -row.length :])
        visible = visible & (mine_BNC == _first_run(row)[:, :, None])[..., None]
    return _Extra(k[:, :, None], v[:, :, None], visible)


def _first_run(row: _Row) -> Tensor:
    """The number of the sequence that each row begins with, (B, 1)."""
    assert row.runs_BS is not None
    return row.runs_BS[:, :1] if row.pads_B is None else row.at(row.runs_BS, row.pads_B[:, None])


def _segment_sinks(row: _Row, sinks: int, first_given: bool) -> _Extra:
    """The first tokens of the sequence in which each block begins.

    No other sequence needs sinks there: one that begins inside the block is at most size - 1 <= window long at its
    end, so that all of it is in reach.
    """
    assert row.runs_BS is not None
    s, device = row.k.shape[2], row.k.device
    index_S, index_NC = torch.arange(s, device=device), row.index_NC()
    begins_BS = F.pad(row.runs_BS[:, 1:] != row.runs_BS[:, :-1], (1, 0), value=True)
    if row.pads_B is not None:
        begins_BS = begins_BS | (index_S == row.pads_B[:, None])
    start_BS = torch.where(begins_BS, index_S, 0).cummax(-1).values
    index_BNE = start_BS[:, index_NC[:, 0], None] + torch.arange(sinks, device=device)
    inside = index_BNE.clamp(max=s - 1).flatten(1)
    mine_BNC = row.by_block(row.runs_BS[:, s - row.length :])
    usable_BNE = index_BNE < s
    if row.pads_B is not None:
        usable_BNE = usable_BNE & (index_BNE >= row.pads_B[:, None, None])
    if row.globals_BS is not None:
        usable_BNE = usable_BNE & ~row.at(row.globals_BS, index_BNE)
    if first_given:
        usable_BNE = usable_BNE & (mine_BNC[..., :1] != _first_run(row)[..., None])
    visible = row.far(index_NC[..., None] - index_BNE[:, :, None]) & usable_BNE[:, :, None]
    visible = visible & (row.at(row.runs_BS, index_BNE)[:, :, None] == mine_BNC[..., None])
    shape = (row.blocks(), sinks)
    return _Extra(take(row.k, inside, 2).unflatten(2, shape), take(row.v, inside, 2).unflatten(2, shape), visible)


def _bounded_globals(globals_BS: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """Indices of the first `most` global tokens of each row (padded with others), and the mask of just these."""
    if most is None:
        most = int(globals_BS.sum(-1).max())
    index_BM = torch.argsort((~globals_BS).to(torch.uint8), dim=-1, stable=True)[:, :most]
    kept = torch.zeros_like(globals_BS).scatter(1, index_BM, globals_BS.gather(1, index_BM))
    return index_BM, kept


def _global_keys(row: _Row, index_BM: Tensor) -> _Extra:
    assert row.globals_BS is not None
    visible = row.globals_BS.gather(1, index_BM)[:, None, None]
    if row.causal:
        visible = visible & (index_BM[:, None, None] <= row.index_NC()[..., None])
    if row.runs_BS is not None:
        mine_BNC = row.by_block(row.runs_BS[:, -row.length :])
        visible = visible & (row.runs_BS.gather(1, index_BM)[:, None, None] == mine_BNC[..., None])
    visible = visible.expand(-1, row.blocks(), row.size, -1)
    return _Extra(take(row.k, index_BM, 2)[:, :, None], take(row.v, index_BM, 2)[:, :, None], visible)


def _answer_globals(y: Tensor, q: Tensor, row: _Row, index_BM: Tensor, scale: float) -> Tensor:
    """Replace the outputs of queries at global tokens by attention over all keys."""
    assert row.globals_BS is not None
    s, old = row.k.shape[2], row.k.shape[2] - row.length
    is_query_BM = row.globals_BS.gather(1, index_BM) & (index_BM >= old)
    keys_S = torch.arange(s, device=q.device)
    visible = torch.ones(1, 1, s, dtype=torch.bool, device=q.device)
    if row.causal:
        visible = visible & (keys_S <= index_BM[..., None])
    if row.pads_B is not None:
        visible = visible & (keys_S >= row.pads_B[:, None, None])
    if row.runs_BS is not None:
        visible = visible & (row.runs_BS[:, None] == row.runs_BS.gather(1, index_BM)[..., None])
    visible = visible | ~is_query_BM[..., None]  # keeps the softmax of what is thrown away finite
    answer = F.scaled_dot_product_attention(
        take(q, (index_BM - old).clamp(min=0), 2),
        row.k,
        row.v,
        attn_mask=visible[:, None],
        scale=scale,
        enable_gqa=q.shape[1] != row.k.shape[1],
    )
    # What is not a query goes to a place behind the last, which is cut off again.
    to_BM = torch.where(is_query_BM, index_BM - old, row.length)
    to = to_BM[:, None, :, None].expand(-1, y.shape[1], -1, y.shape[3])
    return F.pad(y, (0, 0, 0, 1)).scatter(2, to, answer)[:, :, :-1]


def _attend(q, scale: float, k_BGNJK, v_BGNJV, visible, extras: list[_Extra]) -> Tensor:
    """One softmax over the extra keys and the window of each block."""
    (b, h, length, _), (g, n), size = q.shape, k_BGNJK.shape[1:3], visible.shape[2]
    r = h // g
    if extras:
        rows = max(x.shape[0] for x in (*(e.visible for e in extras), visible))
        k_BGNJK = torch.cat([*(e.k.expand(-1, -1, n, -1, -1) for e in extras), k_BGNJK], 3)
        v_BGNJV = torch.cat([*(e.v.expand(-1, -1, n, -1, -1) for e in extras), v_BGNJV], 3)
        visible = torch.cat([x.expand(rows, -1, -1, -1) for x in (*(e.visible for e in extras), visible)], -1)
    # Finite, so that a row which sees nothing (padding) has a finite softmax and gradient; its weight is exactly 0
    # beside any visible key.
    low = torch.finfo(q.dtype).min / 2
    bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~visible, low)

    q_BGRNCK = F.pad(q, (0, 0, 0, n * size - length)).view(b, g, r, n, size, -1)
    if q.is_cuda:  # one kernel that keeps the scores to itself
        q_XHCK, k_XHJK, v_XHJV = (
            x.permute(0, 3, 1, 2, 4, 5).expand(-1, -1, -1, r, -1, -1).flatten(2, 3).flatten(0, 1)
            for x in (q_BGRNCK, k_BGNJK[:, :, None], v_BGNJV[:, :, None])
        )
        bias_XHCJ = bias.expand(b, -1, -1, -1).flatten(0, 1)[:, None].expand(-1, h, -1, -1)
        y_XHCV = F.scaled_dot_product_attention(q_XHCK, k_XHJK, v_XHJV, attn_mask=bias_XHCJ, scale=scale)
        return y_XHCV.unflatten(0, (b, n)).transpose(1, 2).reshape(b, h, n * size, -1)[:, :, :length]
    # The R query heads of a key head are rows beside each other: one product, nothing repeated.
    q_BGNRCK = (q_BGRNCK * scale).transpose(2, 3)
    scores = q_BGNRCK.reshape(b * g * n, r * size, -1) @ k_BGNJK.flatten(0, 2).transpose(1, 2)
    scores = scores.view(b, g, n, r, size, -1) + bias[:, None, :, None]
    weights = scores.softmax(-1).view(b * g * n, r * size, -1)
    y_BGNRCV = (weights @ v_BGNJV.flatten(0, 2)).view(b, g, n, r, size, -1)
    return y_BGNRCV.transpose(2, 3).reshape(b, h, n * size, -1)[:, :, :length]
