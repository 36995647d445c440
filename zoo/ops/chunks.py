"""What the chunked recurrences share: cutting a sequence into chunks, decays inside a chunk, the carry between chunks.

A sequence of L steps is cut into N chunks of C steps (C a power of two; the last one is filled with zeros). Inside a
chunk everything is a matrix product; between chunks a state (K, V) is carried by a loop of N cheap steps.

Decays are kept as *products of factors in [0, 1]* and never as differences of cumulated logarithms: after one step of
log a = -1e4 a float32 sum has lost the third decimal of every later step, while the product is exactly zero before
that step and untouched after it. The products come from a binary tree: the pair (i, j) of a chunk is split at the one
level where i lies in the upper and j in the lower half of a block, so that
prod(a[j+1..i]) = prod(a[middle..i]) * prod(a[j+1..middle-1]), two factors that are shared by the whole block. No
exponent is ever positive, so nothing overflows however strong the decay, and a factor of exactly 0 starts a new
sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError


def check_heads(op: str, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor) -> int:
    """The number R of query heads per key/value head. Raises ConfigError where the shapes do not fit together."""
    q, k, v = tuple(q_BHLK.shape), tuple(k_BGLK.shape), tuple(v_BGLV.shape)
    if not len(q) == len(k) == len(v) == 4:
        raise ConfigError(f"{op}: q, k, v must be (B, H, L, K), (B, G, L, K), (B, G, L, V); got {q}, {k}, {v}")
    if (q[0], q[2], q[3]) != (k[0], k[2], k[3]) or k[:3] != v[:3]:
        raise ConfigError(f"{op}: q {q}, k {k} and v {v} differ in batch, length, key size or key/value heads")
    if q[1] % k[1]:
        raise ConfigError(f"{op}: {q[1]} query heads cannot share {k[1]} key/value heads evenly")
    if q[2] == 0:
        raise ConfigError(f"{op}: the sequence is empty (L = 0)")
    return q[1] // k[1]


def chunk_length(op: str, L: int, chunk: int | None, default: int) -> int:
    """The chunk to use: what the caller asks for, or the default, and no longer than the sequence needs."""
    C = default if chunk is None else chunk
    if C < 1 or C & (C - 1):
        raise ConfigError(f"{op}: chunk must be a power of two, got {chunk}")
    while C >= 2 * L:
        C //= 2
    return C


def run_starts(segments_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
    """True at the first real token of every packed run but a row's first (that one continues the carried state)."""
    if mask_BL is None:
        return F.pad(segments_BL[:, 1:] != segments_BL[:, :-1], (1, 0))
    # A masked position has no say, whatever id it carries: look back to the last real token before each position.
    positions_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    last_real_BL = torch.where(mask_BL, positions_L, -1).cummax(dim=1).values
    before_BL = F.pad(last_real_BL[:, :-1], (1, 0), value=-1)
    segment_before_BL = segments_BL.gather(1, before_BL.clamp(min=0))
    return mask_BL & (before_BL >= 0) & (segments_BL != segment_before_BL)


def to_chunks(x_BGLX: Tensor, C: int) -> Tensor:
    """(B, G, L, X) -> (B, G, N, C, X), contiguous, filled with zeros at the end."""
    L = x_BGLX.shape[2]
    if L % C:
        x_BGLX = F.pad(x_BGLX, (0, 0, 0, -L % C))
    return x_BGLX.unflatten(2, (-1, C)).contiguous()


def queries_to_chunks(q_BHLX: Tensor, G: int, C: int) -> Tensor:
    """(B, H, L, X) -> (B, G, N, C*R, X): the R query heads of one key head become further rows of its products."""
    L, R = q_BHLX.shape[2], q_BHLX.shape[1] // G
    if R == 1:
        return to_chunks(q_BHLX, C)
    if L % C:
        q_BHLX = F.pad(q_BHLX, (0, 0, 0, -L % C))
    return q_BHLX.unflatten(1, (G, R)).transpose(2, 3).unflatten(2, (-1, C)).flatten(3, 4).contiguous()


def queries_from_chunks(y_BGNQX: Tensor, R: int, L: int) -> Tensor:
    """The inverse of `queries_to_chunks`: (B, G, N, C*R, X) -> (B, H, L, X)."""
    y_BGLRX = y_BGNQX.unflatten(3, (-1, R)).flatten(2, 3)[:, :, :L]
    return y_BGLRX.squeeze(3) if R == 1 else y_BGLRX.transpose(2, 3).flatten(1, 2)


def double(prefix: Tensor, suffix: Tensor, m: int) -> None:
    """One level up the tree, in place: products over blocks of m steps (dim -2) become products over blocks of 2m.

    prefix[i] is the product from the start of i's block to i, suffix[j] the product behind j to the end of j's block.
    """
    prefix, suffix = prefix.unflatten(-2, (-1, 2, m)), suffix.unflatten(-2, (-1, 2, m))
    suffix[..., 0, :, :] *= prefix[..., 1, -1:, :]
    prefix[..., 1, :, :] *= prefix[..., 0, -1:, :]


def scalar_decays(a_BGNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decay factors inside a chunk for one factor a step: between pairs, from the chunk's start, to the chunk's end.

    Returns pair_BGNCC (prod a[j+1..i] for j <= i, else 0), prefix_BGNC (prod a[0..i]) and suffix_BGNC (prod a[j+1..]).
    """
    C = a_BGNC.shape[-1]
    prefix, suffix = a_BGNC.clone()[..., None], torch.ones_like(a_BGNC)[..., None]
    pair = torch.eye(C, dtype=a_BGNC.dtype, device=a_BGNC.device).expand(*a_BGNC.shape, C).contiguous()
    m = 1
    while m < C:
        upper = prefix.unflatten(-2, (-1, 2, m))[..., 1, :, 0]
        lower = suffix.unflatten(-2, (-1, 2, m))[..., 0, :, 0]
        lower_left(pair, m).copy_(upper[..., :, None] * lower[..., None, :])
        double(prefix, suffix, m)
        m *= 2
    return pair, prefix[..., 0], suffix[..., 0]


def lower_left(map_QC: Tensor, m: int) -> Tensor:
    """A view of the lower left quarters of the diagonal blocks of 2m steps: (..., C*R, C) -> (..., C/2m, m*R, m)."""
    rows, C = map_QC.shape[-2:]
    J, R = C // (2 * m), rows // C
    blocks = map_QC.unflatten(-1, (J, 2, m)).unflatten(-4, (J, 2, m * R))[..., :, 1, :, :, 0, :]
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def lower_half(x_CX: Tensor, m: int) -> Tensor:
    """A view of the first halves of the blocks of 2m rows: (..., C, X) -> (..., C/2m, m, X)."""
    return x_CX.unflatten(-2, (-1, 2, m))[..., 0, :, :]


def upper_half(x_CX: Tensor, m: int) -> Tensor:
    """A view of the second halves of the blocks of 2m rows."""
    return x_CX.unflatten(-2, (-1, 2, m))[..., 1, :, :]


def carry(update_BGNKV: Tensor, decay: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_n = decay_n * S_{n-1} + update_n over the chunks: the states *before* each chunk, and the last one.

    `decay` broadcasts against the updates with its chunk dimension at 2 (size N); None is no decay.
    """
    first = torch.zeros_like(update_BGNKV[:, :, :1]) if initial is None else initial[:, :, None]
    before = torch.cat([first, update_BGNKV[:, :, :-1]], dim=2)
    N = before.shape[2]
    if decay is None:
        for n in range(1, N):
            before[:, :, n] += before[:, :, n - 1]
        return before, before[:, :, -1] + update_BGNKV[:, :, -1]
    for n in range(1, N):
        before[:, :, n].addcmul_(decay[:, :, n - 1], before[:, :, n - 1])
    return before, torch.addcmul(update_BGNKV[:, :, -1], decay[:, :, -1], before[:, :, -1])


def carry_back(grad_BGNKV: Tensor, decay: Tensor | None, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """The carry of gradients, from the last chunk to the first: those of the states *after* each chunk, and of the
    initial state. `grad_BGNKV` is what each chunk's outputs say about the state before it."""
    behind = torch.zeros_like(grad_BGNKV[:, :, :1]) if last is None else last[:, :, None]
    after = torch.cat([grad_BGNKV[:, :, 1:], behind], dim=2)
    N = after.shape[2]
    if decay is None:
        for n in range(N - 1, 0, -1):
            after[:, :, n - 1] += after[:, :, n]
        return after, after[:, :, 0] + grad_BGNKV[:, :, 0]
    for n in range(N - 1, 0, -1):
        after[:, :, n - 1].addcmul_(decay[:, :, n], after[:, :, n])
    return after, torch.addcmul(grad_BGNKV[:, :, 0], decay[:, :, 0], after[:, :, 0])


def rows(x_QX: Tensor, C: int) -> Tensor:
    """(..., C*R, X) seen as (..., C, R, X)."""
    return x_QX.unflatten(-2, (C, -1))


def decayed(scores_QC: Tensor, pair: Tensor | None, C: int) -> Tensor:
    """Scores times the decay between the two steps, in place; zero above the diagonal."""
    if pair is not None:
        rows(scores_QC, C).mul_(pair.unsqueeze(-2))
    elif scores_QC.shape[-2] == C:
        scores_QC.tril_()
    else:
        rows(scores_QC, C).mul_(torch.ones(C, C, dtype=scores_QC.dtype, device=scores_QC.device).tril_()[:, None])
    return scores_QC


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a @ b over any number of batch dimensions, in place."""
    x.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return x


def log_decay_grad(change, before, last, after, dlast, over) -> Tensor:
    """d log a_t: what the steps from t to the chunk's end change (q dq - k dk), and what lies behind the chunk.

    All that lies behind a chunk it sees through the state at its end, so that part is the product of this state with
    its gradient; sums never run over more than one chunk, which keeps rounding errors small.
    """
    C = change.shape[3]
    inside = torch.ones(C, C, dtype=change.dtype, device=change.device).triu_() @ change
    ends = (before[:, :, 1:] * after[:, :, :-1]).sum(over)
    end = torch.zeros_like(before[:, :, :1]) if dlast is None else last[:, :, None] * dlast[:, :, None]
    return inside + torch.cat([ends, end.sum(over)], dim=2).unsqueeze(3).view(*change.shape[:3], 1, -1)
