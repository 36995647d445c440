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
from zoo.ops.backends import dispatch, register_backend
from zoo.ops.padding import invert, right_align, segment_runs, take


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

    Raises ConfigError where shapes do not fit or arguments exclude each other.
    """
    check_heads(q_BHLK, k_BGSK, v_BGSV, window=window, mask_BS=mask_BS, segments_BS=segments_BS, globals_BS=globals_BS)
    if sinks < 0:
        raise ConfigError(f"sinks is {sinks}, but must be at least 0")
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
    return flash_attention(q, k, v, causal=causal, scale=scale, mask_BS=None, segments_BS=None, window=window)


@register_backend("window_attention", "blocks")
def _blocks(q, k, v, *, mask_BS, segments_BS, globals_BS, positions_BL, **options) -> Tensor:
    """Take padding out of the way, then compute; see `_aligned`."""
    s, length, window = k.shape[2], q.shape[2], options["window"]
    if window >= s and options["sink_kv"] is None:  # all is near: sinks and global tokens add nothing
        return attention(
            q, k, v, causal=options["causal"], scale=options["scale"], mask_BS=mask_BS, segments_BS=segments_BS
        )
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    runs_BS = None if segments_BS is None else segment_runs(segments_BS, mask_BS)
    with torch.autocast(q.device.type, enabled=False):
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


class _Row(NamedTuple):
    """What is known of each row, once padding stands first and index distance is token distance."""

    k: Tensor
    v: Tensor
    length: int
    window: int
    causal: bool
    pads_B: Tensor | None  # the number of padded positions, all at the front
    runs_BS: Tensor | None  # the number of the packed sequence of each position
    globals_BS: Tensor | None

    def far(self, distance: Tensor) -> Tensor:
        """Out of the window, and not in the future where that is hidden."""
        return (distance if self.causal else distance.abs()) >= self.window

    def queries_L(self) -> Tensor:
        s = self.k.shape[2]
        return torch.arange(s - self.length, s, device=self.k.device)


class _Extra(NamedTuple):
    """Keys beside the window: the same E for all queries (k_BGEK), or E for each query (k_BGLEK)."""

    k: Tensor
    v: Tensor
    visible: Tensor  # (B or 1, L, E)


def _aligned(
    q, k, v, *, window, sinks, sink_kv, positions_BL, causal, scale, pads_B, runs_BS, globals_BS, max_globals
) -> Tensor:
    shared, own, global_index_BM = [], [], None
    if globals_BS is not None:
        global_index_BM, globals_BS = _bounded_globals(globals_BS, max_globals)
    row = _Row(k, v, q.shape[2], window, causal, pads_B, runs_BS, globals_BS)
    if global_index_BM is not None:
        shared.append(_global_keys(row, global_index_BM))
    if sink_kv is not None:
        shared.append(_given_sinks(row, sink_kv, positions_BL))
    if sinks and runs_BS is not None:
        own.append(_segment_sinks(row, sinks, first_given=sink_kv is not None))
    elif sinks and sink_kv is None:
        shared.append(_first_tokens(row, min(sinks, k.shape[2])))

    size, before, after = _block_geometry(q.shape[2], k.shape[2], window, causal)
    y = _attend(q * scale, *_window_keys(row, size, before, after), size, shared, own)
    if global_index_BM is not None:
        y = _answer_globals(y, q, row, global_index_BM, scale)
    return y


def _block_geometry(length: int, s: int, window: int, causal: bool) -> tuple[int, int, int]:
    """Queries a block, and how many keys a block meets before its first and after its last query."""
    size = min(max(16, 1 << (max(window - 1, 1).bit_length() - 1)), 128)
    if length <= size:  # one block: all new keys, and what the window reaches of the old ones
        return length, min(window - 1, s - length), 0
    before = -(-(window - 1) // size) * size
    return size, before, 0 if causal else before


def _window_keys(row: _Row, size: int, before: int, after: int) -> tuple[Tensor, Tensor, Tensor]:
    """k_BGNJK, v_BGNJV and who sees them, (B or 1, N, C, J), for blocks of `size` queries."""
    s, device = row.k.shape[2], row.k.device
    n = -(-row.length // size)
    first = s - row.length - before  # the index in k of the first key of block 0
    span = before + size + after
    ends = (-first, first + (n - 1) * size + span - s)  # zeros to add, or keys to drop, at both ends

    def blocks(x: Tensor, value: float = 0) -> Tensor:
        """(B, ..., S, K) -> (B, ..., N, J, K): pieces of `size` beside each other, as the windows overlap."""
        x = F.pad(x, (0, 0, *ends), value=value)
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
        mine_BNC = F.pad(row.runs_BS[:, s - row.length :], (0, n * size - row.length)).unflatten(1, (n, size))
        visible = visible & (blocks(row.runs_BS[..., None])[:, :, None, :, 0] == mine_BNC[..., None])
    if row.globals_BS is not None:
        visible = visible & ~blocks(row.globals_BS[..., None])[:, :, None, :, 0]
    return blocks(row.k), blocks(row.v), visible


def _first_tokens(row: _Row, sinks: int) -> _Extra:
    """The first real tokens of each row, for the queries whose window does not reach them."""
    if row.pads_B is None:
        index = torch.arange(sinks, device=row.k.device)[None]
        k, v = row.k[:, :, :sinks], row.v[:, :, :sinks]
    else:
        index = row.pads_B[:, None] + torch.arange(sinks, device=row.k.device)
        inside = index.clamp(max=row.k.shape[2] - 1)
        k, v = take(row.k, inside, 2), take(row.v, inside, 2)
    visible = row.far(row.queries_L()[:, None] - index[:, None]) & (index < row.k.shape[2])[:, None]
    if row.globals_BS is not None:
        inside = index.clamp(max=row.k.shape[2] - 1).expand(row.k.shape[0], -1)
        visible = visible & ~row.globals_BS.gather(1, inside)[:, None]
    return _Extra(k, v, visible)


def _given_sinks(row: _Row, sink_kv: tuple[Tensor, Tensor], positions_BL: Tensor | None) -> _Extra:
    k, v = (x.to(row.k.dtype) for x in sink_kv)
    if positions_BL is None:
        positions_BL = row.queries_L()[None] if row.pads_B is None else row.queries_L() - row.pads_B[:, None]
    visible = row.far(positions_BL[..., None] - torch.arange(k.shape[2], device=k.device))
    if row.runs_BS is not None:
        visible = visible & (row.runs_BS[:, -row.length :] == _first_run(row))[..., None]
    return _Extra(k, v, visible)


def _first_run(row: _Row) -> Tensor:
    """The number of the sequence that each row begins with, (B, 1)."""
    if row.pads_B is None:
        return row.runs_BS[:, :1]
    return row.runs_BS.gather(1, row.pads_B[:, None].clamp(max=row.k.shape[2] - 1))


def _segment_sinks(row: _Row, sinks: int, first_given: bool) -> _Extra:
    """The first tokens of each query's own sequence: a gather for each query, for sequences may end in any block."""
    s = row.k.shape[2]
    index_S = torch.arange(s, device=row.k.device)
    begins_BS = F.pad(row.runs_BS[:, 1:] != row.runs_BS[:, :-1], (1, 0), value=True)
    if row.pads_B is not None:
        begins_BS = begins_BS | (index_S == row.pads_B[:, None])
    start_BS = torch.where(begins_BS, index_S, 0).cummax(-1).values
    index_BLE = start_BS[:, -row.length :, None] + torch.arange(sinks, device=row.k.device)
    inside = index_BLE.clamp(max=s - 1).flatten(1)
    mine_BL1 = row.runs_BS[:, -row.length :, None]
    visible = row.far(row.queries_L()[:, None] - index_BLE) & (index_BLE < s)
    visible = visible & (row.runs_BS.gather(1, inside).view_as(index_BLE) == mine_BL1)
    if row.globals_BS is not None:
        visible = visible & ~row.globals_BS.gather(1, inside).view_as(index_BLE)
    if first_given:
        visible = visible & (mine_BL1 != _first_run(row)[..., None])
    shape = (row.length, sinks)
    return _Extra(take(row.k, inside, 2).unflatten(2, shape), take(row.v, inside, 2).unflatten(2, shape), visible)


def _bounded_globals(globals_BS: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """Indices of the first `most` global tokens of each row (padded with others), and the mask of just these."""
    if most is None:
        most = int(globals_BS.sum(-1).max())
    index_BM = torch.argsort((~globals_BS).to(torch.uint8), dim=-1, stable=True)[:, :most]
    kept = torch.zeros_like(globals_BS).scatter(1, index_BM, globals_BS.gather(1, index_BM))
    return index_BM, kept


def _global_keys(row: _Row, index_BM: Tensor) -> _Extra:
    visible = row.globals_BS.gather(1, index_BM)[:, None]
    if row.causal:
        visible = visible & (index_BM[:, None] <= row.queries_L()[:, None])
    if row.runs_BS is not None:
        visible = visible & (row.runs_BS.gather(1, index_BM)[:, None] == row.runs_BS[:, -row.length :, None])
    return _Extra(take(row.k, index_BM, 2), take(row.v, index_BM, 2), visible.expand(-1, row.length, -1))


def _answer_globals(y: Tensor, q: Tensor, row: _Row, index_BM: Tensor, scale: float) -> Tensor:
    """Replace the outputs of queries at global tokens by attention over all keys."""
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


def _attend(q, k_BGNJK, v_BGNJV, visible, size: int, shared: list[_Extra], own: list[_Extra]) -> Tensor:
    """One softmax over the window of each block and the extra keys. Queries come scaled."""
    (b, h, length, _), (g, n) = q.shape, k_BGNJK.shape[1:3]
    r, tail = h // g, n * size - length

    def cut(x: Tensor) -> Tensor:  # (B, L, E) -> (B, N, C, E), the rows added at the end seeing nothing
        return F.pad(x, (0, 0, 0, tail)).unflatten(1, (n, size))

    for extra in shared:
        k_BGNJK = torch.cat([extra.k[:, :, None].expand(-1, -1, n, -1, -1), k_BGNJK], 3)
        v_BGNJV = torch.cat([extra.v[:, :, None].expand(-1, -1, n, -1, -1), v_BGNJV], 3)
        seen = cut(extra.visible)
        rows = max(seen.shape[0], visible.shape[0])
        visible = torch.cat([seen.expand(rows, -1, -1, -1), visible.expand(rows, -1, -1, -1)], -1)

    # The R query heads of a key head are rows beside each other: one product, nothing repeated.
    q_BGNRCK = F.pad(q, (0, 0, 0, tail)).view(b, g, r, n, size, -1).transpose(2, 3)
    scores = q_BGNRCK.reshape(b * g * n, r * size, -1) @ k_BGNJK.flatten(0, 2).transpose(1, 2)
    scores = scores.view(b, g, n, r, size, -1)
    scores += _bias(visible, scores.dtype)  # in place: a product does not need its result for backward
    columns = [scores]
    for extra in own:
        k_BGNCEK = F.pad(extra.k, (0, 0, 0, 0, 0, tail)).unflatten(2, (n, size))
        theirs = (q_BGNRCK.transpose(3, 4) @ k_BGNCEK.transpose(-1, -2)).transpose(3, 4)
        columns.append(theirs + _bias(cut(extra.visible), scores.dtype))
    weights = torch.cat(columns, -1).softmax(-1) if own else scores.softmax(-1)
    parts = weights.split([c.shape[-1] for c in columns], -1) if own else (weights,)
    y = (parts[0].reshape(b * g * n, r * size, -1) @ v_BGNJV.flatten(0, 2)).view(b, g, n, r, size, -1)
    for extra, part in zip(own, parts[1:], strict=True):
        v_BGNCEV = F.pad(extra.v, (0, 0, 0, 0, 0, tail)).unflatten(2, (n, size))
        y = y + (part.transpose(3, 4) @ v_BGNCEV).transpose(3, 4)
    return y.transpose(2, 3).reshape(b, h, n * size, -1)[:, :, :length]


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, else so low that the weight is exactly 0: (B, N, C, J) -> (B, 1, N, 1, C, J)."""
    # Finite, so that a row which sees nothing (padding) has a finite softmax and gradient.
    low = torch.finfo(dtype).min / 2
    return torch.zeros((), dtype=dtype, device=visible.device).masked_fill(~visible, low)[:, None, :, None]
