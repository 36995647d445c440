"""What the chunked recurrences share: cutting a sequence into chunks, decays inside a chunk, the carry between chunks.

A sequence of L steps is cut into N chunks of C steps (C a power of two; the last one is filled with zeros). Inside a
chunk everything is a matrix product; between chunks a state (K, V) is carried by a loop of N cheap steps. An op is a
`Rule`: what one span of chunks makes of the state before it, and the same for gradients. `ChunkedScan` does the rest:
cutting, dtypes, scale and normaliser, saving, and walking over the spans. On a CPU a span is a few chunks, so that its
temporaries stay in the cache (twice as fast as the whole length at once); elsewhere it is the whole length.

Decays are kept as *products of factors in [0, 1]* and never as differences of cumulated logarithms: after one step of
log a = -1e4 a float32 sum has lost the third decimal of every later step, while the product is exactly zero before
that step and untouched after it. The products come from a binary tree: the pair (i, j) of a chunk is split at the one
level where i lies in the upper and j in the lower half of a block, so that
prod(a[j+1..i]) = prod(a[middle..i]) * prod(a[j+1..middle-1]), two factors that are shared by the whole block. No
exponent is ever positive, so nothing overflows however strong the decay, and a factor of exactly 0 starts a new
sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import ConfigError
from zoo.ops.backends import no_autocast


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


def chunk_length(op: str, k_BGLK: Tensor, chunk: int | None) -> int:
    """The chunk to use: what the caller asks for, or the default, and no longer than the sequence needs."""
    L = k_BGLK.shape[2]
    # Short chunks waste less on the masked half of the scores; low-precision units want larger products.
    C = chunk if chunk is not None else 32 if k_BGLK.device.type == "cpu" and k_BGLK.dtype.itemsize > 2 else 64
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


def to_chunks(x_BGLX: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """(B, G, L, ...) -> (B, G, n, C, ...), contiguous, filled with zeros at the end."""
    x_BGLX = x_BGLX.to(dtype)
    fill = -x_BGLX.shape[2] % C
    if fill:
        x_BGLX = F.pad(x_BGLX, (0, fill) if x_BGLX.ndim == 3 else (0, 0, 0, fill))
    return x_BGLX.unflatten(2, (-1, C)).contiguous()


def queries_to_chunks(q_BHLX: Tensor, R: int, C: int, dtype: torch.dtype) -> Tensor:
    """(B, H, L, X) -> (B, G, n, C*R, X): the R query heads of one key head become further rows of its products."""
    if R == 1:
        return to_chunks(q_BHLX, C, dtype)
    fill = -q_BHLX.shape[2] % C
    if fill:
        q_BHLX = F.pad(q_BHLX, (0, 0, 0, fill))
    q_BGLRX = q_BHLX.to(dtype).unflatten(1, (-1, R)).transpose(2, 3)
    return q_BGLRX.unflatten(2, (-1, C)).flatten(3, 4).contiguous()


def queries_from_chunks(y_BGnQX: Tensor, R: int, L: int) -> Tensor:
    """The inverse of `queries_to_chunks`: (B, G, n, C*R, X) -> (B, H, L, X)."""
    y_BGLRX = y_BGnQX.unflatten(3, (-1, R)).flatten(2, 3)[:, :, :L]
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


def scalar_factors(log_decay_BGnC: Tensor | None = None):
    """Decays between pairs of steps (C, C), from the chunk's start, to its end (both (C, 1)), over all of it (1, 1)."""
    if log_decay_BGnC is None:
        return None, None, None, None
    pair, prefix, suffix = scalar_decays(log_decay_BGnC.exp())
    return pair, prefix[..., None], suffix[..., None], prefix[..., -1, None, None]


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


def carry(update_BGnKV: Tensor, decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_n = decay_n * S_{n-1} + update_n over the chunks: the states *before* each chunk, and the last one.

    `decay` broadcasts against the updates with its chunk dimension at 2 (size n); None is no decay.
    """
    if not _stepwise(update_BGnKV):
        return carry_by_doubling(update_BGnKV, decay, state)
    before = torch.cat([state[:, :, None], update_BGnKV[:, :, :-1]], dim=2)
    for i in range(1, before.shape[2]):
        if decay is None:
            before[:, :, i] += before[:, :, i - 1]
        else:
            before[:, :, i].addcmul_(decay[:, :, i - 1], before[:, :, i - 1])
    last = before[:, :, -1] if decay is None else before[:, :, -1] * decay[:, :, -1]
    return before, last + update_BGnKV[:, :, -1]


def carry_back(grad_BGnKV: Tensor, decay: Tensor | None, dlast: Tensor) -> tuple[Tensor, Tensor]:
    """The carry of gradients, from the last chunk to the first: those of the states *after* each chunk, and of the
    state before the first. `grad_BGnKV` is what each chunk's outputs say about the state before it."""
    if not _stepwise(grad_BGnKV):
        after, first = carry_by_doubling(grad_BGnKV.flip(2), None if decay is None else decay.flip(2), dlast)
        return after.flip(2), first
    after = torch.cat([grad_BGnKV[:, :, 1:], dlast[:, :, None]], dim=2)
    for i in range(after.shape[2] - 1, 0, -1):
        if decay is None:
            after[:, :, i - 1] += after[:, :, i]
        else:
            after[:, :, i - 1].addcmul_(decay[:, :, i], after[:, :, i])
    first = after[:, :, 0] if decay is None else after[:, :, 0] * decay[:, :, 0]
    return after, first + grad_BGnKV[:, :, 0]


def _stepwise(x: Tensor) -> bool:
    """On a CPU N cheap steps win; a GPU, and a compiler that would unroll them, want log2(N) large ones."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def carry_by_doubling(update_BGnKV: Tensor, decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `carry`, in log2(n) steps: after step i every sum covers 2^i chunks (Hillis and Steele 1986)."""
    n = update_BGnKV.shape[2]
    first = state if decay is None else state * decay[:, :, 0]
    sums = torch.cat([update_BGnKV[:, :, :1] + first[:, :, None], update_BGnKV[:, :, 1:]], dim=2)
    if decay is None:
        sums = sums.cumsum(2)
    else:
        covered = 1
        while covered < n:
            more = torch.addcmul(sums[:, :, covered:], decay[:, :, covered:], sums[:, :, :-covered])
            sums = torch.cat([sums[:, :, :covered], more], dim=2)
            product = decay[:, :, covered:] * decay[:, :, :-covered]
            decay = torch.cat([decay[:, :, :covered], product], dim=2)
            covered *= 2
    return torch.cat([state[:, :, None], sums[:, :, :-1]], dim=2), sums[:, :, -1]


def rows(x_QX: Tensor, C: int) -> Tensor:
    """(..., C*R, X) seen as (..., C, R, X)."""
    return x_QX.unflatten(-2, (C, -1))


def decayed(scores_QC: Tensor, pair: Tensor | None, C: int) -> Tensor:
    """Scores times the decay between the two steps, in place; zero above the diagonal."""
    if pair is not None:
        rows(scores_QC, C).mul_(pair.to(scores_QC.dtype).unsqueeze(-2))
    elif scores_QC.shape[-2] == C:
        scores_QC.tril_()
    else:
        rows(scores_QC, C).mul_(torch.ones(C, C, dtype=scores_QC.dtype, device=scores_QC.device).tril_()[:, None])
    return scores_QC


def times(x_QX: Tensor, factor_C1: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scale the R rows of each of the C steps by its factor (C, 1) or (C, X), and give the product in `dtype`."""
    if factor_C1 is None:
        return x_QX.to(dtype)
    C = factor_C1.shape[-2]
    if x_QX.shape[-2] == C:
        return (x_QX * factor_C1).to(dtype)
    return (rows(x_QX, C) * factor_C1.unsqueeze(-2)).flatten(-3, -2).to(dtype)


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a @ b over three batch dimensions, in place."""
    if x.dtype != a.dtype:
        return x.add_(a @ b)
    x.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return x


def pair_balance(dscores_QC: Tensor, scores_QC: Tensor) -> Tensor:
    """What the products of pairs of steps say about log decays, (..., C, 1): row sums less column sums of the
    gradient of the (undecayed) scores times the decayed scores. Summed from t on, pairs within cancel exactly."""
    C = scores_QC.shape[-1]
    weight_CC = rows(dscores_QC * scores_QC, C).sum(-2).tril_(-1)
    return (weight_CC.sum(-1) - weight_CC.sum(-2))[..., None]


def log_decay_grad(since: Tensor, until: Tensor, through: Tensor) -> Tensor:
    """d log a_t, (..., C, X): log a_t matters to all that is read from t on of what was written before t.

    `since` (C, X) is summed over the steps from t on (reads of older state and the balance of pairs), `until` over the
    steps before t (what they write for later chunks); `through` (1, X) is what passes the chunk unread. No term is
    the difference of large sums, so a decay that forgets everything has the gradient 0, also in low precision.
    """
    C = since.shape[-2]
    ones = torch.ones(C, C, dtype=since.dtype, device=since.device)
    return (ones.triu() @ since).add_(ones.tril(-1) @ until).add_(through)


class Span(NamedTuple):
    """Some chunks of a sequence: q (B, G, n, C*R, K), k and v (B, G, n, C, .), gates (B, G, n, C, ...) or (G,).

    q, k, v are in the dtype that products are computed in, gates and states in the dtype that sums are kept in.
    `shared` is what the rule has prepared for all spans, `first` the index of the span's first chunk.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor | None, ...]
    shared: tuple[Tensor, ...]
    first: int


class Rule:
    """One recurrence, span by span. Implementations hold no data and are known by name."""

    low_precision = True  # whether products may be computed in bfloat16 where the inputs are

    def prepare(self, gates: tuple[Tensor, ...], L: int, C: int) -> tuple[Tensor, ...]:
        """What all spans share."""
        return ()

    def forward(self, span: Span, state: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """The outputs (B, G, n, C*R, V), what the backward needs, and the state behind the span."""
        raise NotImplementedError

    def backward(self, span: Span, saved: tuple[Tensor, ...], dy: Tensor, dlast: Tensor, gate_grads):
        """Gradients of q, k, v, of the gates (a list, step by step; None where `gate_grads` does not ask) and of the
        state before the span; `dlast` is that of the state behind it.
        """
        raise NotImplementedError


RULES: dict[str, Rule] = {}
SPAN_SIZE = 1 << 17  # numbers per tensor and span on a CPU: 8 heads x 64 channels x 256 steps, half a megabyte
FAST_BF16_CPU = torch.cpu._is_avx512_bf16_supported() if hasattr(torch.cpu, "_is_avx512_bf16_supported") else False


class ChunkedScan(torch.autograd.Function):
    """Run a rule over a sequence: (q, k, v, initial state, gates) -> (y in the dtype of v, final state).

    `eps` is None, or the least denominator: then the last column of the state belongs to the normaliser.
    """

    @staticmethod
    def forward(ctx, name: str, C: int, scale: float, eps: float | None, q, k, v, initial, *gates):
        rule, low, dtype = RULES[name], product_dtype(RULES[name], q, k, v), sum_dtype(q, k, v)
        (B, G, L, K), V, H = k.shape, v.shape[-1], q.shape[1]
        y = v.new_empty(B, L, H, V).transpose(1, 2)
        state = k.new_zeros(B, G, K, V + (eps is not None), dtype=dtype) if initial is None else initial
        keep = any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        weights: list[Tensor] = []
        shared = rule.prepare(gates, L, C)
        for start, stop in spans(k, C):
            span = _cut(q, k, v, gates, shared, start, stop, C, eps, low)
            part, saved, state = rule.forward(span, state)
            if eps is not None:
                weights.append(part[..., V:])
                part = part[..., :V] / weights[-1].clamp(min=eps)
            elif scale != 1.0:
                part = part.mul_(scale)
            y[:, :, start:stop] = queries_from_chunks(part, H // G, stop - start)
            kept += saved if keep else []
        if keep:
            ctx.save_for_backward(q, k, v, *gates, *kept, *([y, *weights] if eps is not None else []))
        ctx.options, ctx.has_initial, ctx.gates = (name, C, scale, eps), initial is not None, len(gates)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        name, C, scale, eps = ctx.options
        q, k, v, *rest = ctx.saved_tensors
        gates, rest, cuts = rest[: ctx.gates], rest[ctx.gates :], spans(k, C)
        y, weights = None, []
        if eps is not None:
            rest, (y, *weights) = rest[: -1 - len(cuts)], rest[-1 - len(cuts) :]
        rule, low, dtype = RULES[name], product_dtype(RULES[name], q, k, v), sum_dtype(q, k, v)
        (B, G, L, K), V, R = k.shape, v.shape[-1], q.shape[1] // k.shape[1]
        dstate = k.new_zeros(B, G, K, V + (eps is not None), dtype=dtype) if dlast is None else dlast
        asked = ctx.needs_input_grad[8:]
        grads = [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)]
        grads += [torch.zeros_like(g) if ask else None for g, ask in zip(gates, asked, strict=True)]
        shared, step = rule.prepare(gates, L, C), len(rest) // len(cuts)
        # The caller may be inside autocast, which would round the sums.
        with no_autocast(q):
            for i in range(len(cuts) - 1, -1, -1):
                start, stop = cuts[i]
                span = _cut(q, k, v, gates, shared, start, stop, C, eps, low)
                part = k.new_zeros(()).expand(B, G * R, L, V) if dy is None else dy
                part = queries_to_chunks(part[:, :, start:stop], R, C, dtype)
                if eps is not None:
                    part = _quotient_grad(part, queries_to_chunks(y[:, :, start:stop], R, C, dtype), weights[i], eps)
                elif scale != 1.0:
                    part = part * scale
                *parts, dgates, dstate = rule.backward(
                    span, rest[step * i : step * i + step], part.to(low), dstate, asked
                )
                _put(grads, [*parts, *dgates], start, stop, R)
        return None, None, None, None, *grads[:3], dstate if ctx.has_initial else None, *grads[3:]


def _quotient_grad(dy: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """From the gradient of y = numerator / max(weight, eps) to those of numerator and weight, side by side."""
    dy = dy / weight.clamp(min=eps)
    dweight = (dy * y).sum(-1, keepdim=True).neg_().masked_fill_(weight < eps, 0.0)
    return torch.cat([dy, dweight], dim=-1)


def _put(grads, parts, start: int, stop: int, R: int) -> None:
    """Write the gradients of a span in chunks into those of the sequence (one of a constant gate is summed)."""
    for i, (whole, part) in enumerate(zip(grads, parts, strict=True)):
        if whole is None:
            continue
        part = queries_from_chunks(part, R, stop - start) if i == 0 else part.flatten(2, 3)[:, :, : stop - start]
        if whole.ndim == 1:
            whole += part.sum((0, 2))
        else:
            whole[:, :, start:stop] = part[..., : whole.shape[-1]] if i == 2 else part


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where one of the tensors is: the dtype that sums and states are kept in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def product_dtype(rule: Rule, *tensors: Tensor) -> torch.dtype:
    """The dtype of the operands of matrix products: bfloat16 where all inputs are, the rule can bear it and the
    device is fast at it.

    float16 is not among them: a sum over a long sequence leaves its range.
    """
    half = rule.low_precision and all(x.dtype == torch.bfloat16 for x in tensors)
    fast = tensors[0].device.type != "cpu" or FAST_BF16_CPU
    return torch.bfloat16 if half and fast else sum_dtype(*tensors)


def spans(k_BGLK: Tensor, C: int) -> list[tuple[int, int]]:
    """The spans of whole chunks in which a sequence is worked through."""
    B, G, L, K = k_BGLK.shape
    if k_BGLK.device.type != "cpu" or torch.compiler.is_compiling():
        return [(0, L)]
    step = max(1, SPAN_SIZE // (B * G * K * C)) * C
    return [(start, min(start + step, L)) for start in range(0, L, step)]


def _cut(q, k, v, gates, shared, start: int, stop: int, C: int, eps: float | None, dtype: torch.dtype) -> Span:
    R = q.shape[1] // k.shape[1]
    v_BGnCV = to_chunks(v[:, :, start:stop], C, dtype)
    if eps is not None:  # z is one more column of the state, written by a value that is always one
        v_BGnCV = F.pad(v_BGnCV, (0, 1), value=1.0)
    return Span(
        queries_to_chunks(q[:, :, start:stop], R, C, dtype),
        to_chunks(k[:, :, start:stop], C, dtype),
        v_BGnCV,
        tuple(g if g is None or g.ndim == 1 else to_chunks(g[:, :, start:stop], C, g.dtype) for g in gates),
        shared,
        start // C,
    )
