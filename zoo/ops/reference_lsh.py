"""LSH attention and chunked local attention position by position: who meets whom is written out, then one softmax.

Slow and obvious; `lsh.py` and `local_attention.py` are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.lsh import unit_rms
from zoo.ops.reference_sparse import counted_attention_reference


def lsh_attention_reference(
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
) -> Tensor:
    """See `zoo.ops.lsh.lsh_attention`; rows without padding."""
    (b, h, length, k), rounds = x_BHLK.shape, buckets_BHLR.shape[-1]
    count = x_BHLK.new_zeros(b, h, length, length)
    for row in range(b):
        for head in range(h):
            buckets_RL = buckets_BHLR[row, head].T.tolist()
            ring = []  # (round, positions) of all chunks of all rounds
            for r in range(rounds):
                order = _sorted(buckets_RL[r])
                ring += [(r, order[i : i + chunk]) for i in range(0, length, chunk)]
            for place, (r, queries) in enumerate(ring):
                for offset in range(-before, after + 1):
                    other, keys = ring[(place + offset) % len(ring)]
                    for i in queries:
                        for j in keys:
                            same = across_buckets or (r == other and buckets_RL[r][i] == buckets_RL[r][j])
                            count[row, head, i, j] += same and (j <= i or not causal)
    scale = k**-0.5 if scale is None else scale
    if keys_BHLK is not None:
        return counted_attention_reference(x_BHLK, keys_BHLK, v_BHLV, count, scale)
    return _without_itself(x_BHLK, unit_rms(x_BHLK), v_BHLV, count, scale)


def lsh_step_reference(
    x_BH1K: Tensor,
    k_BHSK: Tensor,
    v_BHSV: Tensor,
    buckets_BHSR: Tensor,
    *,
    chunk: int,
    before: int = 1,
    scale: float | None = None,
    meets_itself: bool = False,
) -> Tensor:
    """See `zoo.ops.lsh.lsh_decode`; one position, rows without padding."""
    (b, h, s, k), rounds = k_BHSK.shape, buckets_BHSR.shape[-1]
    count = k_BHSK.new_zeros(b, h, s, s)
    for row in range(b):
        for head in range(h):
            for r in range(rounds):
                buckets_S = buckets_BHSR[row, head, :, r].tolist()
                order = _sorted(buckets_S)
                start = (order.index(s - 1) // chunk - before) * chunk
                places = range(s) if s <= chunk else range(start, start + (before + 1) * chunk)
                for place in places:
                    count[row, head, s - 1, order[place % s]] += 1
    queries = k_BHSK.new_zeros(k_BHSK.shape)
    queries[:, :, -1:] = x_BH1K
    attend = counted_attention_reference if meets_itself else _without_itself
    y = attend(queries, k_BHSK, v_BHSV, count, k**-0.5 if scale is None else scale)
    return y[:, :, -1:]


def _sorted(buckets: list[int]) -> list[int]:
    """Places by bucket, then by place."""
    return [place for _, place in sorted(zip(buckets, range(len(buckets)), strict=True))]


def _without_itself(q: Tensor, k: Tensor, v: Tensor, count: Tensor, scale: float) -> Tensor:
    """No position meets itself, unless it meets nobody else."""
    eye = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    others = count.masked_fill(eye, 0)
    alone = (others.sum(-1, keepdim=True) == 0) & eye
    return counted_attention_reference(q, k, v, torch.where(alone, torch.ones_like(count), others), scale)


def local_attention_reference(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    *,
    chunk: int,
    before: int = 1,
    after: int = 0,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """See `zoo.ops.local_attention.local_attention`; rows without padding."""
    length, k = q_BHLK.shape[2:]
    chunks = -(-length // chunk)
    count = q_BHLK.new_zeros(length, length)
    for i, met in enumerate(count):
        for offset in range(-before, after + 1):
            other = i // chunk + offset
            if not causal:
                other %= chunks
            for j in range(max(other, 0) * chunk, min((other + 1) * chunk, length)):
                met[j] += j <= i or not causal
    return counted_attention_reference(q_BHLK, k_BGLK, v_BGLV, count, k**-0.5 if scale is None else scale)
