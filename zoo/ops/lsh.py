"""Attention among positions with similar vectors, found by locality-sensitive hashing (Kitaev et al. 2020,
arXiv:2001.04451, sections 2 and A).

Queries and keys are one vector per position; keys are normalised to root mean square 1. A hash round sends every
vector to a bucket by its angle (Andoni et al. 2015, arXiv:1509.02897): argmax of [x R; -x R] for a random R. Positions
are sorted by bucket, then by place, and cut into chunks of C; a chunk sees itself and its neighbours. All rounds stand
in one ring of chunks: the first chunk of a round looks back at the last of the round before, as in the authors' code.
A query meets itself only where it meets nobody else; keys of their own may be given instead of the normalised vectors,
and then a position is met by itself as by any other. Rounds are combined by the log-sum-exp of their scores, so a key
that is met in several rounds counts several times, as in the published models (the paper's formula divides by that).

Shapes: B batch, H heads, L positions, K and V head sizes, R hash rounds, N chunks of C positions a round, X = B * H
heads of the whole batch, J positions that a chunk sees, Q chunks of all heads and rounds, P positions of all heads, S
positions so far (decoding).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import ConfigError
from zoo.ops.backends import no_autocast
from zoo.ops.padding import invert, take

ITSELF = -1e5  # the score of a position with itself: of no weight as soon as there is another one
_BEHIND = 1 << 62  # sorts behind every bucket
_HASHED_AT_ONCE = 1 << 20  # numbers of rotations times positions in one go on a CPU
_ROOM = 1 << 18  # scores in one go on a CPU
_SORTED_AT_ONCE = 1 << 22  # numbers that `lsh_decode` sorts in one go


def unit_rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x` with root mean square 1 along the last dimension: the keys of shared query-key vectors."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def hash_buckets(x_BHLK: Tensor, rotations_HKRM: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Buckets of the vectors in each round: int64 (B, H, L, R), from 0 up to the product of `sizes`.

    sizes: even numbers whose halves add up to M. With several, the bucket is a number with these digits, the first one
    the lowest; so many buckets take few random directions.
    """
    rotations = rotations_HKRM.to(torch.promote_types(x_BHLK.dtype, torch.float32))
    whole = x_BHLK.device.type != "cpu" or torch.compiler.is_compiling()
    with no_autocast(x_BHLK):
        x = x_BHLK.detach().to(rotations.dtype)
        at_once = max(1, _HASHED_AT_ONCE // (len(x) * rotations[0].numel())) if not whole else 0
        pieces = (x,) if whole else x.split(at_once, 2)
        return torch.cat([_buckets(x, rotations, sizes) for x in pieces], 2)


def _buckets(x_BHLK: Tensor, rotations_HKRM: Tensor, sizes: tuple[int, ...]) -> Tensor:
    turned_BHLRM = torch.einsum("bhlk,hkrm->bhlrm", x_BHLK, rotations_HKRM)
    bucket, base = torch.zeros_like(turned_BHLRM[..., 0], dtype=torch.long), 1
    for part in turned_BHLRM.split([size // 2 for size in sizes], -1):
        bucket = bucket + base * torch.cat([part, -part], -1).argmax(-1)
        base *= 2 * part.shape[-1]
    return bucket


def lsh_attention(
    x_BHLK: Tensor,
    v_BHLV: Tensor,
    buckets_BHLR: Tensor,
    *,
    keys_BHLK: Tensor | None = None,
    chunk: int,
    before: int = 1,
    after: int = 0,
    causal: bool = True,
    scale: float | None = None,
    across_buckets: bool = True,
    length_B: Tensor | None = None,
) -> Tensor:
    """Attention in sorted chunks; returns y_BHLV.

    x_BHLK: the shared query-key vectors, or the queries.
    buckets_BHLR: from `hash_buckets`.
    keys_BHLK: keys of their own, taken as they are; None: the normalised `x_BHLK`, which do not meet themselves.
    chunk, before, after: C, and how many chunks a chunk sees to either side.
    causal: a query sees nothing later. Which earlier positions it meets still depends on later ones, for they shift
        the borders of chunks.
    scale: of the scores; K ** -0.5 by default.
    across_buckets: positions in one chunk see each other whatever their buckets (the published models).
    length_B: real tokens of each row, which stand first; what is behind them must be finite and returns 0. A row gives
        what it gives alone.

    Sums are in float32 at least. Raises ConfigError where shapes do not fit.
    """
    given = (x_BHLK, v_BHLV) if keys_BHLK is None else (x_BHLK, v_BHLV, keys_BHLK)
    _check(x_BHLK, keys_BHLK, v_BHLV, buckets_BHLR)
    (b, h, length, k), r, dtype = x_BHLK.shape, buckets_BHLR.shape[-1], v_BHLV.dtype
    n = -(-length // chunk)
    T = n * chunk
    high = torch.promote_types(x_BHLK.dtype, torch.float32)
    x, v, *keys = (F.pad(y.flatten(0, 1).to(high), (0, 0, 0, T - length)) for y in given)
    ends_X = torch.full((b * h,), length, device=x.device) if length_B is None else length_B.repeat_interleave(h)
    buckets_XRT = F.pad(buckets_BHLR.flatten(0, 1).long().mT, (0, T - length))
    order_XRT = _sort(buckets_XRT, torch.arange(T, device=x.device) < ends_X[:, None, None])
    own_XNC = order_XRT.flatten(1).unflatten(1, (r * n, chunk))
    look_XNJ = _ring(ends_X, n, r, chunk, before, after)
    seen_XNJ = take(own_XNC, look_XNJ.flatten(1), 1).view(b * h, r * n, -1)
    ids: tuple[Tensor, ...] = ()
    if not across_buckets:
        numbered_XRT = buckets_XRT.gather(2, order_XRT) * r + torch.arange(r, device=x.device)[:, None]
        sorted_XNC = numbered_XRT.view(b * h, r * n, chunk)
        ids = sorted_XNC.flatten(0, 1), take(sorted_XNC, look_XNJ.flatten(1), 1).view(b * h * r * n, -1)
    with no_autocast(x):
        sequence_Q1 = torch.arange(b * h, device=x.device).repeat_interleave(r * n)[:, None]
        own, seen, ends_Q1 = own_XNC.flatten(0, 1), seen_XNJ.flatten(0, 1), ends_X[sequence_Q1]
        pairs = Pairs(own, seen, T * sequence_Q1, ends_Q1, causal, bool(keys), ids)
        rows = (y.flatten(0, 1) for y in (x, keys[0] if keys else unit_rms(x), v))
        y_QCV, total_QC = _Chunks.apply(*rows, pairs, k**-0.5 if scale is None else scale)
        y_XNCV, total_XNC = (y.unflatten(0, (b * h, r * n)) for y in (y_QCV, total_QC))
        back_XT = (invert(order_XRT) + T * torch.arange(r, device=x.device)[:, None]).flatten(1)
        y_XRTV = take(y_XNCV.flatten(1, 2), back_XT, 1).unflatten(1, (r, T))
        if r > 1:
            total_XRT = total_XNC.flatten(1).gather(1, back_XT).unflatten(1, (r, T))
            y_XRTV = y_XRTV * total_XRT.softmax(1)[..., None]
        y_XLV = y_XRTV.sum(1)[:, :length]
        if length_B is not None:
            y_XLV = y_XLV.masked_fill((torch.arange(length, device=x.device) >= ends_X[:, None])[..., None], 0)
    return y_XLV.unflatten(0, (b, h)).to(dtype)


def lsh_decode(
    x_BHLK: Tensor,
    k_BHSK: Tensor,
    v_BHSV: Tensor,
    buckets_BHSR: Tensor,
    *,
    chunk: int,
    before: int = 1,
    scale: float | None = None,
    across_buckets: bool = True,
    meets_itself: bool = False,
    mask_BS: Tensor | None = None,
) -> Tensor:
    """The last L of S positions, each as if it came alone after those before it; returns y_BHLV.

    For a new position all positions so far are sorted; it sees the chunk in which it comes to stand, and `before`
    chunks before it, in a ring of the sequence so far and with whole chunks, as transformers decodes: near the ends of
    the ring a key may come twice. Up to `chunk` positions it sees every one, once.

    x_BHLK: the shared vectors, or queries, of the new positions. k_BHSK, v_BHSV, buckets_BHSR: keys, values and buckets
        of all positions. meets_itself: for keys that are not the normalised shared vectors. mask_BS: False positions
        are not there, whatever they hold as long as it is finite.
    """
    B, H, L = x_BHLK.shape[:3]
    S, R = buckets_BHSR.shape[2:]
    _check(k_BHSK, None, v_BHSV, buckets_BHSR)
    if S < L:
        raise ConfigError(f"{L} new positions but {S} in all: the new ones are the last of them")
    step = max(1, _SORTED_AT_ONCE // (B * H * R * S))
    scale = x_BHLK.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for start in range(0, L, step):
        at_L = torch.arange(S - L + start, S - L + min(start + step, L), device=x_BHLK.device)
        seen, exists = _seen_in_decoding(buckets_BHSR, at_L, mask_BS, chunk, before, across_buckets)
        x = x_BHLK[:, :, start : start + step]
        parts.append(_decode_part(x, k_BHSK, v_BHSV, seen, exists, None if meets_itself else at_L, scale))
    y_BHLV = torch.cat(parts, 2)
    return y_BHLV if mask_BS is None else y_BHLV.masked_fill(~mask_BS[:, None, S - L :, None], 0)


def _seen_in_decoding(
    buckets_BHSR: Tensor, at_L: Tensor, mask_BS: Tensor | None, chunk: int, before: int, across_buckets: bool
) -> tuple[Tensor, Tensor]:
    """The positions that position `at` meets when it comes, and which of them count: (B, H, L, R, J)."""
    S, R = buckets_BHSR.shape[2:]
    there_BLS = (torch.arange(S, device=at_L.device) <= at_L[:, None])[None]
    if mask_BS is not None:
        there_BLS = there_BLS & mask_BS[:, None]
    buckets_BHLRS = buckets_BHSR.long().mT[:, :, None].expand(-1, -1, len(at_L), -1, -1)
    order = _sort(buckets_BHLRS, there_BLS[:, None, :, None])
    rank = (order == at_L[:, None, None]).to(torch.uint8).argmax(-1)
    count = there_BLS.sum(-1).clamp(min=1)[:, None, :, None, None]
    places_J = torch.arange((before + 1) * chunk if chunk < S else S, device=at_L.device)
    ring = ((rank // chunk - before) * chunk)[..., None] + places_J
    few = count <= chunk
    seen = order.gather(-1, torch.where(few, places_J.clamp(max=S - 1), ring % count).expand(*order.shape[:-1], -1))
    exists = ~few | (places_J < count)
    if not across_buckets:
        own = buckets_BHLRS.gather(-1, at_L[:, None, None].expand(*order.shape[:2], -1, R, 1))
        exists = exists & (buckets_BHLRS.gather(-1, seen) == own)
    return seen, exists.expand_as(seen)


def _decode_part(x_BHLK, k_BHSK, v_BHSV, seen: Tensor, exists: Tensor, at_L: Tensor | None, scale: float) -> Tensor:
    """The positions `at_L` do not meet themselves."""
    (b, h, length, _), dtype = x_BHLK.shape, v_BHSV.dtype
    high = torch.promote_types(x_BHLK.dtype, torch.float32)
    index_XJ, visible = seen.flatten(0, 1).flatten(1), exists.flatten(0, 1).flatten(2)[:, :, None]
    with no_autocast(x_BHLK):
        keys, values = (
            take(y.flatten(0, 1), index_XJ, 1).unflatten(1, (length, -1)).to(high) for y in (k_BHSK, v_BHSV)
        )
        itself = None if at_L is None else seen.flatten(0, 1).flatten(2)[:, :, None] == at_L[:, None, None]
        y, _ = _attend(x_BHLK.flatten(0, 1)[:, :, None].to(high), keys, values, scale, visible, itself)
    return y[:, :, 0].unflatten(0, (b, h)).to(dtype)


class Pairs(NamedTuple):
    """Who may meet whom: for each of Q chunks the places of its C queries and of the J keys it looks at.

    first_Q1: the row of the chunk's sequence among all rows; ends_Q1: how many of its places are real.
    meets_itself: whether a position meets itself like any other.
    ids: queries and keys meet if these are equal, (Q, C) and (Q, J); () for no such rule.
    """

    own_QC: Tensor
    seen_QJ: Tensor
    first_Q1: Tensor
    ends_Q1: Tensor
    causal: bool
    meets_itself: bool
    ids: tuple[Tensor, ...]

    def part(self, chosen: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Rows of queries and keys, and which pairs are visible and which are to be no pair unless alone (.., C, J)."""
        own_QC, seen_QJ, first_Q1 = self.own_QC[chosen], self.seen_QJ[chosen], self.first_Q1[chosen]
        visible = (seen_QJ < self.ends_Q1[chosen])[:, None]
        if self.causal:
            visible = visible & (seen_QJ[:, None] <= own_QC[..., None])
        if self.ids:
            visible = visible & (self.ids[0][chosen, :, None] == self.ids[1][chosen, None])
        itself = None if self.meets_itself else own_QC[..., None] == seen_QJ[:, None]
        return own_QC + first_Q1, seen_QJ + first_Q1, visible, itself


class _Chunks(torch.autograd.Function):
    """Attention of chunks to chunks, some at a time, so that on a CPU their scores stay in the cache; the gradient
    makes them again. x, k and v are rows of all sequences; values (Q, C, V) and log-sum-exp of the scores (Q, C)."""

    @staticmethod
    def forward(ctx, x_PK: Tensor, k_PK: Tensor, v_PV: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_PK, k_PK, v_PV)
        ctx.pairs, ctx.scale = pairs, scale
        y_QCV, total_QC = v_PV.new_empty(*pairs.own_QC.shape, v_PV.shape[1]), v_PV.new_empty(pairs.own_QC.shape)
        for part in _parts(pairs):
            own, seen, visible, itself = pairs.part(part)
            y_QCV[part], total_QC[part] = _attend(x_PK[own], k_PK[seen], v_PV[seen], scale, visible, itself)
        return y_QCV, total_QC

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_QCV: Tensor, dtotal_QC: Tensor) -> tuple[Tensor | None, ...]:
        x_PK, k_PK, v_PV = ctx.saved_tensors
        dx_PK, dk_PK, dv_PV = (torch.zeros_like(t) for t in (x_PK, k_PK, v_PV))
        with no_autocast(x_PK):
            for part in _parts(ctx.pairs):
                own, seen, visible, itself = ctx.pairs.part(part)
                q, k, v, dy = ctx.scale * x_PK[own], k_PK[seen], v_PV[seen], dy_QCV[part]
                weights = _scores(q, k, visible, itself).softmax(-1)
                dv_PV.index_add_(0, seen.flatten(), (weights.mT @ dy).flatten(0, 1))
                dscores = dy @ v.mT
                mean = torch.linalg.vecdot(weights, dscores)
                dscores = dscores.sub_((mean - dtotal_QC[part])[..., None]).mul_(weights)
                constant = ~visible if itself is None else itself | ~visible  # scores that are set
                dscores = dscores.masked_fill_(constant, 0)
                dx_PK.index_add_(0, own.flatten(), (dscores @ (ctx.scale * k)).flatten(0, 1))
                dk_PK.index_add_(0, seen.flatten(), (dscores.mT @ q).flatten(0, 1))
        return dx_PK, dk_PK, dv_PV, None, None


def _parts(pairs: Pairs) -> list[slice]:
    """The chunks in parts; all at once on a GPU and in one graph."""
    Q, C, J = len(pairs.own_QC), pairs.own_QC.shape[1], pairs.seen_QJ.shape[1]
    if pairs.own_QC.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, Q)]
    step = max(1, _ROOM // (C * J))
    return [slice(start, min(start + step, Q)) for start in range(0, Q, step)]


def _attend(q, k, v, scale: float, visible: Tensor, itself: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weighted values (..., C, V) and the log-sum-exp of the scores (..., C); finite also where nothing is visible."""
    scores = _scores(scale * q, k, visible, itself)
    weights = scores.softmax(-1)  # not exp(scores - total): beside ITSELF a float32 total has but two decimals
    return weights @ v, scores.amax(-1) - weights.amax(-1).log()


def _scores(q, k, visible: Tensor, itself: Tensor | None) -> Tensor:
    scores = q @ k.mT
    if itself is not None:
        scores = scores.masked_fill_(itself, ITSELF)
    return scores.masked_fill_(~visible, torch.finfo(q.dtype).min / 2)


def _sort(buckets: Tensor, real: Tensor) -> Tensor:
    """Places along the last dimension by bucket, then by place; what is not real comes last."""
    T = buckets.shape[-1]
    places_T = torch.arange(T, device=buckets.device)
    return torch.where(real, buckets * T + places_T, _BEHIND + places_T).argsort(-1)


def _ring(ends_X: Tensor, n: int, rounds: int, chunk: int, before: int, after: int) -> Tensor:
    """For each of the R * N chunks those that it looks at, (X, R * N, J); a row has only as many as it needs."""
    own_X11 = (-(-ends_X // chunk)).clamp(min=1)[:, None, None]
    round_N1 = torch.arange(rounds, device=ends_X.device).repeat_interleave(n)[:, None]
    chunk_N1 = torch.arange(n, device=ends_X.device).repeat(rounds)[:, None]
    place = round_N1 * own_X11 + chunk_N1 + torch.arange(-before, after + 1, device=ends_X.device)
    place = place % (rounds * own_X11)
    return place // own_X11 * n + place % own_X11


def _check(x_BHLK: Tensor, k_BHLK: Tensor | None, v_BHLV: Tensor, buckets_BHLR: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (x_BHLK, v_BHLV, buckets_BHLR)]
    if k_BHLK is not None and k_BHLK.shape != x_BHLK.shape:
        raise ConfigError(f"keys {tuple(k_BHLK.shape)} are not of the shape of the queries {shapes[0]}")
    if any(len(shape) != 4 or shape[:3] != shapes[0][:3] for shape in shapes):
        raise ConfigError(
            f"vectors {shapes[0]}, values {shapes[1]} and buckets {shapes[2]} do not fit together; "
            "they are (B, H, L, K), (B, H, L, V) and (B, H, L, R)"
        )
