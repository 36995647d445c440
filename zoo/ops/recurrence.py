"""The gated linear recurrence: linear attention, RetNet, Mamba-2, GLA and RWKV-6 are this one op.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T          y_t = scale * S_t^T q_t

with a_t = 1, a constant per head, a scalar per head and step, or a vector per channel. The portable implementation
works in chunks (Sun et al. 2023, RetNet, eq. 7; Yang et al. 2024, Gated Linear Attention, section 4; Dao and Gu 2024,
Mamba-2, section 6): inside a chunk the outputs are a decayed, masked (Q K^T) V, from chunk to chunk a state is carried.
The backward pass is written by hand: it is the same recurrence with the roles of q, k, v exchanged, so it needs no
stored C x C maps; the gradient of log a_t collects what is read from step t on of what was written before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops import chunks, fla
from zoo.ops.backends import dispatch, no_autocast, register_backend
from zoo.ops.stepwise import leaves_torch, repeat_step

OP = "linear_recurrence"


def linear_recurrence(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-6,
    initial: Tensor | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = scale * S_t^T q_t (the step itself included).

    Args:
        q_BHLK, k_BGLK, v_BGLV: H = R*G query heads; query head h reads key/value head h // R.
        log_decay: log a_t <= 0. None (no decay), (G,) a constant per head, (B, G, L) per step, (B, G, L, K) per
            channel. However strong (-1e4, -inf), nothing overflows.
        scale: factor of the output (without effect under `normalize`).
        normalize: divide y_t by max(q_t . z_t, eps), with z the same recurrence over k alone.
        initial: the state S (B, G, K, V) to start from; under `normalize` (B, G, K, V + 1), z being its last column.
        final: also return the state behind the last step.
        mask_BL: bool, True for real tokens. A masked position is an identity step whatever it holds; its output is 0.
        segments_BL: int; every run of equal ids is an independent sequence. `initial` belongs to a row's first run and
            the final state is that of its last.
        chunk: steps per chunk, a power of two. backend: a name from `zoo.backends()`; None takes the best.

    Returns:
        y_BHLV in the dtype of v, and the final state or None. Sums are kept in float32 (float64 for float64).

    Raises:
        ConfigError: shapes that do not fit together.
    """
    R = chunks.check_heads(OP, q_BHLK, k_BGLK, v_BGLV)
    _check_decay(log_decay, k_BGLK)
    _check_state(initial, k_BGLK, v_BGLV, normalize)
    dtype = chunks.sum_dtype(q_BHLK, k_BGLK, v_BGLV)
    state = None if initial is None else initial.to(dtype)
    q, k, v, log_decay = _apply_mask(q_BHLK, k_BGLK, v_BGLV, log_decay, mask_BL)
    log_decay = None if log_decay is None else log_decay.to(dtype)
    starts_BL = None if segments_BL is None else chunks.run_starts(segments_BL, mask_BL)
    with no_autocast(q):
        least = eps if normalize else None
        if q.shape[2] == 1 and backend is None:
            y, state = _step(q.to(dtype), k.to(dtype), v.to(dtype), log_decay, state, R, scale, least)
        else:
            y, state = dispatch(OP, backend, q, k, v, log_decay, state, scale, least, chunk, starts_BL)
        y = y.to(v_BGLV.dtype)
    return y, state if final else None


def _check_state(initial: Tensor | None, k_BGLK: Tensor, v_BGLV: Tensor, normalize: bool) -> None:
    wanted = (*k_BGLK.shape[:2], k_BGLK.shape[3], v_BGLV.shape[3] + normalize)
    if initial is not None and initial.shape != wanted:
        z = " (the last column is the normaliser z)" if normalize else ""
        raise ConfigError(f"{OP}: the initial state must be {wanted}{z}; got {tuple(initial.shape)}")


def _check_decay(log_decay: Tensor | None, k_BGLK: Tensor) -> None:
    B, G, L, K = k_BGLK.shape
    shapes = {1: (G,), 3: (B, G, L), 4: (B, G, L, K)}
    if log_decay is not None and tuple(log_decay.shape) != shapes.get(log_decay.ndim):
        wanted = f"({G},), ({B}, {G}, {L}) or ({B}, {G}, {L}, {K})"
        raise ConfigError(f"{OP}: log_decay must be None, {wanted}; got {tuple(log_decay.shape)}")


def _apply_mask(q, k, v, log_decay, mask_BL):
    """Write the mask (no input, decay 1) into the tensors themselves."""
    if mask_BL is None:
        return q, k, v, log_decay
    hidden_B1L1 = ~mask_BL[:, None, :, None]
    q, k, v = (x.masked_fill(hidden_B1L1, 0.0) for x in (q, k, v))
    if log_decay is not None:
        log_decay = _per_step(log_decay, k)
        log_decay = log_decay.masked_fill(hidden_B1L1 if log_decay.ndim == 4 else hidden_B1L1[..., 0], 0.0)
    return q, k, v, log_decay


def _per_step(log_decay: Tensor | None, k_BGLK: Tensor) -> Tensor:
    """No decay and constant ones as (B, G, L); others as they are."""
    if log_decay is None:
        return torch.zeros(k_BGLK.shape[:3], device=k_BGLK.device)
    return log_decay[:, None].expand(k_BGLK.shape[:3]) if log_decay.ndim == 1 else log_decay


def _step(q_BH1K, k_BG1K, v_BG1V, log_decay, state_BGKV, R: int, scale: float, eps: float | None):
    """One step: decay the state, add k v^T, read with q."""
    V = v_BG1V.shape[-1]
    if eps is not None:
        v_BG1V = F.pad(v_BG1V, (0, 1), value=1.0)
    if state_BGKV is None:
        state_BGKV = k_BG1K.mT * v_BG1V
    elif log_decay is None:
        state_BGKV = torch.addcmul(state_BGKV, k_BG1K.mT, v_BG1V)
    else:
        a = log_decay.exp()
        a = a[:, None, None] if a.ndim == 1 else a[..., None] if a.ndim == 3 else a.mT
        state_BGKV = torch.addcmul(k_BG1K.mT * v_BG1V, a, state_BGKV)
    B, H, _, K = q_BH1K.shape
    y_BH1V = (q_BH1K.reshape(B, H // R, R, K) @ state_BGKV).view(B, H, 1, -1)
    if eps is not None:
        return y_BH1V[..., :V] / y_BH1V[..., V:].clamp(min=eps), state_BGKV
    return y_BH1V if scale == 1.0 else y_BH1V * scale, state_BGKV


def _kernel_serves(q, k, v, log_decay, *_) -> bool:
    per_step = log_decay is not None and (log_decay.ndim == 3 or (log_decay.ndim == 1 and log_decay.requires_grad))
    return fla.serves(q, k, v, decay_per_step=per_step)


@register_backend(OP, "fla", **fla.OPTIONS, usable=_kernel_serves)
def _kernel(q_BHLK, k_BGLK, v_BGLV, log_decay, initial, scale: float, eps: float | None, chunk, starts_BL):
    """flash-linear-attention: chunk_gla for a decay per channel, chunk_simple_gla for the others."""
    V = v_BGLV.shape[-1]
    if eps is not None:  # as in `chunks`, z is one more column; the kernels want sixteen
        scale, v_BGLV = 1.0, torch.cat([v_BGLV, F.pad(torch.ones_like(v_BGLV[..., :1]), (0, 15))], -1)
        initial = None if initial is None else F.pad(initial, (0, 15))
    name, options = "simple_gla.chunk_simple_gla", dict[str, Any](scale=scale)
    gates: dict[str, Tensor] = {}
    if log_decay is not None and log_decay.ndim == 1 and not log_decay.requires_grad:
        options["g_gamma"] = fla.bounded(log_decay).float().repeat_interleave(q_BHLK.shape[1] // k_BGLK.shape[1])
    elif log_decay is not None:
        gates["g"] = fla.bounded(_per_step(log_decay, k_BGLK))
        name = "gla.chunk_gla" if log_decay.ndim == 4 else name
    y, state = fla.run(name, q_BHLK, {"k": k_BGLK, "v": v_BGLV}, gates, initial, starts_BL, **options)
    if eps is None:
        return y, state
    return y[..., :V] / y[..., V : V + 1].float().clamp(min=eps), state[..., : V + 1]


@register_backend(OP, "scan", usable=leaves_torch)
def _by_steps(q_BHLK, k_BGLK, v_BGLV, log_decay, initial, scale: float, eps: float | None, chunk, starts_BL):
    """Step by step, for graphs that leave torch."""
    (B, G, _, K), dtype = k_BGLK.shape, chunks.sum_dtype(q_BHLK, k_BGLK, v_BGLV)
    state = k_BGLK.new_zeros(B, G, K, v_BGLV.shape[-1] + (eps is not None), dtype=dtype) if initial is None else initial
    decays, R = () if log_decay is None else (log_decay,), q_BHLK.shape[1] // G
    inputs = tuple(x.to(dtype) for x in (q_BHLK, k_BGLK, v_BGLV))

    def step(state, q, k, v, *decay):
        return _step(q, k, v, decay[0] if decay else None, state, R, scale, eps)

    if log_decay is not None and log_decay.ndim == 1:
        return repeat_step(step, state, inputs, 2, decays)
    return repeat_step(step, state, (*inputs, *decays), 2)


@register_backend(OP, "torch")
def _chunked(q_BHLK, k_BGLK, v_BGLV, log_decay, initial, scale: float, eps: float | None, chunk, starts_BL):
    """The portable implementation: y (B, H, L, V) and the final state, with the normaliser as its last column."""
    if starts_BL is not None:  # a decay of 0 starts a new sequence
        log_decay = _per_step(log_decay, k_BGLK)
        starts_B1L = starts_BL[:, None]
        log_decay = log_decay.masked_fill(starts_B1L if log_decay.ndim == 3 else starts_B1L[..., None], -torch.inf)
        log_decay = log_decay.to(chunks.sum_dtype(q_BHLK, k_BGLK, v_BGLV))
    rule = (
        "no_decay"
        if log_decay is None
        else {1: "constant_decay", 3: "scalar_decay"}.get(log_decay.ndim, "vector_decay")
    )
    gates = () if log_decay is None else (log_decay,)
    C = chunks.chunk_length(OP, k_BGLK, chunk)
    return chunks.ChunkedScan.apply(rule, C, scale, eps, q_BHLK, k_BGLK, v_BGLV, initial, *gates)


class MapDecay(chunks.Rule):
    """Decays that are one C x C map per head and chunk."""

    def factors(self, span: chunks.Span):
        """The decays of a chunk: between pairs (C, C), from its start and to its end (C, 1), and over all of it."""
        return None, None, None, None

    def forward(self, span, state):
        q, k, v = span[:3]
        C, low = k.shape[3], q.dtype
        pair, prefix, suffix, total = self.factors(span)
        update = (chunks.times(k, suffix, low).mT @ v).to(state.dtype)
        before, last = chunks.carry(update, total, state)
        y = chunks.times(q @ before.to(low), prefix, state.dtype)
        y = chunks.add_product(y, chunks.decayed(q @ k.mT, pair, C), v)
        return y, (before,), last

    def backward(self, span, saved, dy, dlast, gate_grads):
        q, k, v = span[:3]
        C, low, dtype = k.shape[3], q.dtype, dlast.dtype
        (before,) = saved
        pair, prefix, suffix, total = self.factors(span)
        dy_start = chunks.times(dy, prefix, low)
        after, dstate = chunks.carry_back((q.mT @ dy_start).to(dtype), total, dlast)
        after_low = after.to(low)
        dq = (dy_start @ before.to(low).mT).to(dtype)
        dk = chunks.times(v @ after_low.mT, suffix, dtype)
        dv = chunks.times(k @ after_low, suffix, dtype)
        scores, dscores = chunks.decayed(q @ k.mT, pair, C), dy @ v.mT
        dgates = [None] * len(span.gates)
        if any(gate_grads):
            since = chunks.rows(q * dq, C).sum((-1, -2))[..., None] + chunks.pair_balance(dscores.to(dtype), scores)
            through = (before * after).sum((-1, -2), keepdim=True) * total
            dgates = [chunks.log_decay_grad(since, (k * dk).sum(-1, keepdim=True), through)[..., 0]]
        dscores = chunks.decayed(dscores, pair, C)
        dq = chunks.add_product(dq, dscores, k)
        dk = chunks.add_product(dk, dscores.mT, q)
        dv = chunks.add_product(dv, scores.mT, dy)
        return dq, dk, dv, dgates, dstate


class ConstantDecay(MapDecay):
    """log_decay (G,): one map per head for all chunks."""

    def prepare(self, gates, L, C):
        log_G = gates[0]
        steps_C = torch.arange(C, device=log_G.device)
        lengths_N1 = (L - torch.arange(0, L, C, device=log_G.device)).clamp(max=C)[:, None]
        pair_GCC = _power(log_G, steps_C[:, None] - steps_C).tril()
        prefix_GC = _power(log_G, steps_C + 1)
        suffix_GNC = _power(log_G, lengths_N1 - 1 - steps_C)  # the filling behind the last step has no decay
        total_GN = _power(log_G, lengths_N1[:, 0])
        return pair_GCC[:, None], prefix_GC[:, None, :, None], suffix_GNC[..., None], total_GN[None, :, :, None, None]

    def factors(self, span):
        pair, prefix, suffix, total = span.shared
        here = slice(span.first, span.first + span.k.shape[2])
        return pair, prefix, suffix[:, here], total[:, :, here]


class ScalarDecay(MapDecay):
    """log_decay (B, G, n, C): one map per head and chunk."""

    def factors(self, span):
        return chunks.scalar_factors(span.gates[0])


def _power(log_G: Tensor, exponents: Tensor) -> Tensor:
    """a ** max(exponent, 0) for every head, with a ** 0 = 1 also for a = 0 (log a = -inf)."""
    log_G = log_G.view(-1, *[1] * exponents.ndim)
    return torch.where(exponents > 0, (log_G * exponents.clamp(min=1)).exp(), 1.0)


class VectorDecay(chunks.Rule):
    """log_decay (B, G, n, C, K): one decay per channel, so the scores are built level by level of the decay tree."""

    # The pairs' share of d log a is q dq - k dk here, a difference of what may be large: it needs exact products.
    low_precision = False

    def forward(self, span, state):
        q, k, v, (log_decay,) = span[:4]
        scores, prefix, suffix = _vector_scores(q, k, log_decay.exp())
        before, last = chunks.carry((k * suffix).mT @ v, prefix[..., -1, :, None], state)
        y = chunks.times(q, prefix, q.dtype) @ before
        return chunks.add_product(y, scores, v), (before, scores), last

    def backward(self, span, saved, dy, dlast, gate_grads):
        q, k, v, (log_decay,) = span[:4]
        C, dtype = k.shape[3], dlast.dtype
        before, scores = saved
        dscores = dy @ v.mT
        dq, dk, prefix, suffix = _vector_scores_grad(q, k, log_decay.exp(), dscores)
        after, dstate = chunks.carry_back(chunks.times(q, prefix, dtype).mT @ dy, prefix[..., -1, :, None], dlast)
        dv = chunks.add_product((k * suffix) @ after, scores.mT, dy)
        dq_start, dk_end = chunks.times(dy @ before.mT, prefix, dtype), (v @ after.mT).mul_(suffix)
        dgates = [None]
        if any(gate_grads):
            since = chunks.rows(q * (dq + dq_start), C).sum(-2) - k * dk
            through = (before * after).sum(-1)[..., None, :] * prefix[..., -1:, :]
            dgates = [chunks.log_decay_grad(since, k * dk_end, through)]
        own_CR1 = chunks.rows(dscores, C).diagonal(dim1=-3, dim2=-1).mT[..., None]  # of every step with itself
        chunks.rows(dq.add_(dq_start), C).addcmul_(own_CR1, k[..., None, :])
        dk = dk.add_(dk_end).add_((own_CR1 * chunks.rows(q, C)).sum(-2))
        return dq, dk, dv, dgates, dstate


chunks.RULES.update(
    no_decay=MapDecay(), constant_decay=ConstantDecay(), scalar_decay=ScalarDecay(), vector_decay=VectorDecay()
)


def _vector_scores(q, k, a):
    """q_i . (prod a[j+1..i] * k_j) for j <= i, and the factors from the chunk's start and to its end."""
    C = k.shape[3]
    own = (chunks.rows(q, C) * k[..., None, :]).sum(-1)  # (..., C, R), every step with itself
    scores = q.new_zeros(*q.shape[:-1], C)
    chunks.rows(scores, C).diagonal(dim1=-3, dim2=-1).copy_(own.mT)
    prefix, suffix = a.clone(), torch.ones_like(a)
    m = 1
    while m < C:
        q_upper, k_lower = _halves(q, k, prefix, suffix, m)
        chunks.lower_left(scores, m).copy_(q_upper @ k_lower.mT)
        chunks.double(prefix, suffix, m)
        m *= 2
    return scores, prefix, suffix


def _vector_scores_grad(q, k, a, dscores):
    """Gradients for q and k of the scores of different steps, and the factors from the chunk's start and to its end."""
    C = k.shape[3]
    dq, dk = torch.zeros_like(q), torch.zeros_like(k)
    prefix, suffix = a.clone(), torch.ones_like(a)
    m = 1
    while m < C:
        q_upper, k_lower = _halves(q, k, prefix, suffix, m)
        block = chunks.lower_left(dscores, m)
        upper = chunks.rows(dq, C).unflatten(-3, (-1, 2, m))[..., 1, :, :, :]
        upper.addcmul_(chunks.rows(block @ k_lower, m), chunks.upper_half(prefix, m)[..., None, :])
        chunks.lower_half(dk, m).addcmul_(block.mT @ q_upper, chunks.lower_half(suffix, m))
        chunks.double(prefix, suffix, m)
        m *= 2
    return dq, dk, prefix, suffix


def _halves(q, k, prefix, suffix, m: int):
    """The queries of all upper and the keys of all lower halves of blocks of 2m steps, decayed to the middle."""
    q_upper = chunks.rows(q, k.shape[3]).unflatten(-3, (-1, 2, m))[..., 1, :, :, :].flatten(-3, -2)
    q_upper = chunks.times(q_upper, chunks.upper_half(prefix, m), q.dtype)
    return q_upper, chunks.lower_half(k, m) * chunks.lower_half(suffix, m)
