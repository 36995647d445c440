"""Dilated sliding-window attention beside global tokens (Longformer, Beltagy et al. 2020, arXiv:2004.05150, sec. 3.1).

A query at position p of its sequence sees the keys at distances that are multiples of `dilation` and closer than
`window * dilation`, and the first `global_tokens` tokens of its sequence, each once. Tokens whose positions agree
modulo the dilation form sequences of their own, in which the window has no gaps. So each row is folded into
`dilation` rows, the global tokens in front of every one of them, and `window_attention` does the rest in blocks.

Shapes: B batch, L queries, S keys (the queries are the last L of the S positions), H = R * G query heads, G key/value
heads, K and V head sizes, T = dilation, J keys and I queries in a folded row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops.attention import check_heads
from zoo.ops.padding import invert, right_align, segment_runs, take
from zoo.ops.positions import token_positions
from zoo.ops.window import window_attention


def dilated_window_attention(
    q_BHLK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    *,
    window: int,
    dilation: int = 1,
    global_tokens: int = 0,
    global_kv: tuple[Tensor, Tensor] | None = None,
    positions_BS: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    mask_BS: Tensor | None = None,
    segments_BS: Tensor | None = None,
) -> Tensor:
    """Softmax attention over a dilated window and the first tokens of the sequence; returns y_BHLV.

    window: keys on one side, the query itself included: distances 0, d, ..., (window - 1) * d for dilation d, to both
        sides where not causal.
    global_tokens: the first so many tokens of each sequence are seen by every query (by later ones, where causal).
        They ask nothing here: their own queries return 0, for they have projections of their own in Longformer.
    global_kv: (k_BGNK, v_BGNV), N = global_tokens: gives them explicitly where `k` does not begin with the sequence.
    positions_BS: position of each token in its own sequence, (B or 1, S); by default counted from the first key.
    S > L: the first S - L keys come from earlier calls; only the last (window - 1) * dilation of them are needed.
    mask_BS: bool, True = real token, any pattern. Padding does not count and returns 0.
    segments_BS: ids of packed sequences in contiguous runs; not with `global_kv`.

    Raises ConfigError where shapes do not fit or arguments exclude each other.
    """
    check_heads(q_BHLK, k_BGSK, v_BGSV, window=window, mask_BS=mask_BS, segments_BS=segments_BS)
    if dilation < 1 or global_tokens < 0:
        raise ConfigError(f"dilation is {dilation} and global_tokens {global_tokens}; at least 1 and 0 are needed")
    if global_kv is not None and (segments_BS is not None or global_kv[0].shape[2] != global_tokens):
        raise ConfigError(
            f"global_kv holds {global_kv[0].shape[2]} tokens where global_tokens is {global_tokens}; "
            "the two must agree, and global_kv excludes segments"
        )
    b, s, length = q_BHLK.shape[0], k_BGSK.shape[2], q_BHLK.shape[2]
    if positions_BS is None:
        positions_BS = token_positions(k_BGSK[:, 0], mask_BS, segments_BS)
    positions_BS = positions_BS.expand(b, s)
    runs_BS = None if segments_BS is None else segment_runs(segments_BS, mask_BS)
    options = {"window": window, "causal": causal, "scale": scale}
    arguments = (q_BHLK, k_BGSK, v_BGSV, positions_BS, mask_BS, runs_BS, global_tokens, global_kv, options)
    y_BHLV = _near(*arguments) if dilation == 1 else _folded(dilation, *arguments)
    silent_BL = positions_BS[:, s - length :] < global_tokens
    if mask_BS is not None:
        silent_BL = silent_BL | ~mask_BS[:, s - length :]
    return y_BHLV.masked_fill(silent_BL[:, None, :, None], 0)


def _near(q, k, v, positions_BS, mask_BS, runs_BS, global_tokens, global_kv, options) -> Tensor:
    """No gaps: global tokens are sinks to the window, whatever their own queries see is thrown away."""
    kind: dict = {"sinks": global_tokens}
    if global_kv is not None:
        kind = {"sink_kv": global_kv, "positions_BL": positions_BS[:, k.shape[2] - q.shape[2] :]}
    elif runs_BS is not None and not options["causal"] and global_tokens > options["window"]:
        kind = {"globals_BS": positions_BS < global_tokens}
    return window_attention(q, k, v, mask_BS=mask_BS, segments_BS=runs_BS, **kind, **options)


def _folded(dilation: int, q, k, v, positions_BS, mask_BS, runs_BS, global_tokens, global_kv, options) -> Tensor:
    b, s, length = q.shape[0], k.shape[2], q.shape[2]
    remainders_T1 = torch.arange(dilation, device=q.device)[:, None]
    member_BTS = (positions_BS[:, None] % dilation == remainders_T1) | (positions_BS[:, None] < global_tokens)
    if mask_BS is not None:
        member_BTS = member_BTS & mask_BS[:, None]
    if runs_BS is None:  # positions follow one another, which bounds how many have one remainder
        keys = min(s, -(-s // dilation) + global_tokens)
        queries = min(length, -(-length // dilation) + global_tokens)
    else:
        keys = max(int(member_BTS.sum(-1).max()), 1)
        queries = max(int(member_BTS[..., s - length :].sum(-1).max()), 1)
    member = member_BTS.flatten(0, 1)
    order = right_align(member)
    at_keys, at_queries = order[:, s - keys :], order[:, s - queries :]

    def fold(x: Tensor, index: Tensor) -> Tensor:
        """(B, G, S, K) -> (B * T, G, J, K)."""
        pieces = take(x, index.reshape(b, -1), 2).unflatten(2, (dilation, -1))
        return pieces.transpose(1, 2).flatten(0, 1)

    def per_position(x_BS: Tensor, index: Tensor) -> Tensor:
        return x_BS.repeat_interleave(dilation, 0).gather(1, index)

    if global_kv is not None:
        global_kv = tuple(x.repeat_interleave(dilation, 0) for x in global_kv)  # type: ignore[assignment]
    # Where a token stands in its folded row: behind the global tokens, one in `dilation` of the others.
    places_BS = torch.where(
        positions_BS < global_tokens, positions_BS, global_tokens + (positions_BS - global_tokens) // dilation
    )
    y = _near(
        fold(q, (at_queries - (s - length)).clamp(min=0)),
        fold(k, at_keys),
        fold(v, at_keys),
        per_position(places_BS, at_keys),
        member.gather(1, at_keys),
        None if runs_BS is None else per_position(runs_BS, at_keys),
        global_tokens,
        global_kv,
        options,
    )
    # Each query's answer stands in the row of its remainder.
    row_BL = positions_BS[:, s - length :] % dilation
    slot_BTL = invert(order).view(b, dilation, s)[:, :, s - length :] - (s - queries)
    slot_BL = slot_BTL.gather(1, row_BL[:, None])[:, 0].clamp(0, queries - 1)
    y = y.unflatten(0, (b, dilation)).transpose(1, 2).flatten(2, 3)
    return take(y, row_BL * queries + slot_BL, 2)
