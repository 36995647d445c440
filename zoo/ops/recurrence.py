"""The gated linear recurrence: linear attention, RetNet, Mamba-2, GLA and RWKV-6 are this one op.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T          y_t = scale * S_t^T q_t

with a_t = 1, a constant per head, a scalar per head and step, or a vector per channel. The portable implementation
works in chunks (Sun et al. 2023, RetNet, eq. 7; Yang et al. 2024, Gated Linear Attention, section 4; Dao and Gu 2024,
Mamba-2, section 6): inside a chunk the outputs are a decayed, masked (Q K^T) V, from chunk to chunk a state is carried.
The backward pass is written by hand: it is the same recurrence with the roles of q, k, v exchanged, so it needs no
stored C x C maps, and the gradient of log a_t is a sum of q * dq - k * dk over the steps from t on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops import chunks
from zoo.ops.backends import dispatch, register_backend

OP = "linear_recurrence"


class LinearState(NamedTuple):
    """What a linear recurrence carries: the matrix S and, with a normaliser, z. float32 (float64 for float64)."""

    kv_BGKV: Tensor
    z_BGK: Tensor | None = None


def linear_recurrence(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-6,
    initial: LinearState | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, LinearState | None]:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = scale * S_t^T q_t (the step itself included).

    Args:
        q_BHLK, k_BGLK, v_BGLV: H = R*G query heads; query head h reads key/value head h // R.
        log_decay: log a_t <= 0. None (no decay), (G,) a constant per head, (B, G, L) per step, (B, G, L, K) per
            channel. However strong (-1e4, -inf), nothing overflows.
        scale: factor of the output (without effect under `normalize`).
        normalize: divide y_t by max(q_t . z_t, eps), with z the same recurrence over k alone.
        initial: the state to start from. final: also return the state behind the last step.
        mask_BL: bool, True for real tokens. A masked position is an identity step whatever it holds; its output is 0.
        segments_BL: int; every run of equal ids is an independent sequence. `initial` belongs to a row's first run and
            the final state is that of its last.
        chunk: steps per chunk, a power of two. backend: a name from `zoo.backends()`; None takes the best.

    Returns:
        y_BHLV in the dtype of v, and the final LinearState or None. Sums are kept in float32 (float64 for float64).

    Raises:
        ConfigError: shapes that do not fit together.
    """
    R = chunks.check_heads(OP, q_BHLK, k_BGLK, v_BGLV)
    _check_decay(log_decay, k_BGLK)
    if initial is not None and normalize and initial.z_BGK is None:
        raise ConfigError(f"{OP}: normalize=True needs an initial state with z; this one was made without a normaliser")
    dtype = torch.promote_types(torch.float32, torch.promote_types(q_BHLK.dtype, v_BGLV.dtype))
    V = v_BGLV.shape[-1]
    value, state = v_BGLV, None if initial is None else initial.kv_BGKV.to(dtype)
    if normalize:  # z is one more column of the state, written by a value that is always one
        value = F.pad(v_BGLV, (0, 1), value=1.0)
        state = None if initial is None else torch.cat([state, initial.z_BGK.to(dtype)[..., None]], dim=-1)
    q_BHLK, k_BGLK, value, log_decay = _mask_and_cut(q_BHLK, k_BGLK, value, log_decay, mask_BL, segments_BL)
    if log_decay is not None:
        log_decay = log_decay.to(dtype)
    with torch.autocast(q_BHLK.device.type, enabled=False):
        if q_BHLK.shape[2] == 1 and backend is None:
            y, state = _step(q_BHLK.to(dtype), k_BGLK.to(dtype), value.to(dtype), log_decay, state, R)
        else:
            y, state = dispatch(OP, backend, q_BHLK, k_BGLK, value, log_decay, state, dtype, chunk)
        if normalize:
            y = y[..., :V] / y[..., V:].clamp(min=eps)
        elif scale != 1.0:
            y = y * scale
    y = y.to(v_BGLV.dtype)
    if not final:
        return y, None
    return y, LinearState(state[..., :V], state[..., V]) if normalize else LinearState(state)


def _check_decay(log_decay: Tensor | None, k_BGLK: Tensor) -> None:
    B, G, L, K = k_BGLK.shape
    if log_decay is not None and tuple(log_decay.shape) not in {(G,), (B, G, L), (B, G, L, K)}:
        wanted = f"({G},), ({B}, {G}, {L}) or ({B}, {G}, {L}, {K})"
        raise ConfigError(f"{OP}: log_decay must be None, {wanted}; got {tuple(log_decay.shape)}")


def _mask_and_cut(q, k, v, log_decay, mask_BL, segments_BL):
    """Write the mask (no input, decay 1) and the starts of packed runs (decay 0) into the tensors themselves."""
    if mask_BL is None and segments_BL is None:
        return q, k, v, log_decay
    B, G, L, _ = k.shape
    if log_decay is None:
        log_decay = torch.zeros(B, G, L, device=k.device)
    elif log_decay.ndim == 1:
        log_decay = log_decay[:, None].expand(B, G, L)
    shape = (B, 1, L) if log_decay.ndim == 3 else (B, 1, L, 1)
    if mask_BL is not None:
        hidden_B1L1 = ~mask_BL[:, None, :, None]
        q, k, v = (x.masked_fill(hidden_B1L1, 0.0) for x in (q, k, v))
        log_decay = log_decay.masked_fill(hidden_B1L1.view(shape), 0.0)
    if segments_BL is not None:
        log_decay = log_decay.masked_fill(chunks.run_starts(segments_BL, mask_BL).view(shape), -torch.inf)
    return q, k, v, log_decay


def _step(q_BH1K, k_BG1K, v_BG1V, log_decay, state_BGKV, R: int):
    """One step: decay the state, add k v^T, read with q."""
    update_BGKV = k_BG1K.mT * v_BG1V
    if state_BGKV is None:
        state_BGKV = update_BGKV
    elif log_decay is None:
        state_BGKV = state_BGKV + update_BGKV
    else:
        a = log_decay.exp()
        a = a[:, None, None] if a.ndim == 1 else a[..., None] if a.ndim == 3 else a.mT
        state_BGKV = torch.addcmul(update_BGKV, a, state_BGKV)
    y_BGRV = q_BH1K.view(*k_BG1K.shape[:2], R, -1) @ state_BGKV
    return y_BGRV.flatten(1, 2)[:, :, None], state_BGKV


@register_backend(OP, "torch")
def _chunked(q_BHLK, k_BGLK, v_BGLV, log_decay, initial, dtype, chunk):
    """The portable implementation: y (B, H, L, V) and the final state, both in `dtype`."""
    G, L = k_BGLK.shape[1:3]
    C = chunks.chunk_length(OP, L, chunk, default=64)
    q = chunks.queries_to_chunks(q_BHLK.to(dtype), G, C)
    k, v = chunks.to_chunks(k_BGLK.to(dtype), C), chunks.to_chunks(v_BGLV.to(dtype), C)
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
        log_decay = F.pad(log_decay, (0, 0, 0, -L % C)).unflatten(2, (-1, C))
    function = VectorDecay if log_decay is not None and log_decay.ndim == 5 and log_decay.shape[-1] > 1 else MapDecay
    y, state = function.apply(q, k, v, log_decay, initial, L)
    return chunks.queries_from_chunks(y, q.shape[3] // C, L), state


class MapDecay(torch.autograd.Function):
    """Decays that are one C x C map per head: none (None), constant (G,) or per step (B, G, N, C, 1)."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial, L):
        C = k.shape[3]
        pair, prefix, suffix, total = _map_factors(log_decay, k.shape, L)
        scores = chunks.decayed(q @ k.mT, pair, C)
        inner = k if suffix is None else k * suffix
        before, last = chunks.carry(inner.mT @ v, total, initial)
        y = q @ before
        if prefix is not None:
            chunks.rows(y, C).mul_(prefix[..., None, :])
        y = chunks.add_product(y, scores, v)
        ctx.save_for_backward(q, k, v, log_decay, before, last)
        ctx.L, ctx.has_initial = L, initial is not None
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        q, k, v, log_decay, before, last = ctx.saved_tensors
        C = k.shape[3]
        pair, prefix, suffix, total = _map_factors(log_decay, k.shape, ctx.L)
        dy = torch.zeros_like(q[..., :1]).expand(*q.shape[:-1], v.shape[-1]) if dy is None else dy.contiguous()
        dy_outer = dy if prefix is None else (chunks.rows(dy, C) * prefix[..., None, :]).view_as(dy)
        after, dinitial = chunks.carry_back(q.mT @ dy_outer, total, dlast)
        scores = chunks.decayed(q @ k.mT, pair, C)
        dscores = chunks.decayed(dy @ v.mT, pair, C)
        dq = chunks.add_product(dy_outer @ before.mT, dscores, k)
        dk, dv = v @ after.mT, k @ after
        if suffix is not None:
            dk, dv = dk.mul_(suffix), dv.mul_(suffix)
        dk = chunks.add_product(dk, dscores.mT, q)
        dv = chunks.add_product(dv, scores.mT, dy)
        dlog = None
        if ctx.needs_input_grad[3]:
            change = chunks.rows(q * dq, C).sum((-1, -2)) - (k * dk).sum(-1)
            dlog = chunks.log_decay_grad(change[..., None], before, last, after, dlast, (-1, -2))
            if log_decay.ndim == 1:  # the filling behind step L does not decay
                dlog = dlog.flatten(2, 4)[:, :, : ctx.L].sum((0, 2))
        return dq, dk, dv, dlog, dinitial if ctx.has_initial else None, None


def _map_factors(log_decay, shape, L: int):
    """The decays of a chunk: between pairs (C, C), from its start, to its end, and over all of it."""
    N, C = shape[2:4]
    if log_decay is None:
        return None, None, None, None
    if log_decay.ndim == 1:
        steps_C = torch.arange(C, device=log_decay.device)
        distance_CC = steps_C[:, None] - steps_C
        log_G11 = log_decay[:, None, None]
        # 0 * -inf is no number: a decay of zero is exp(-inf) at distances above 0 and 1 at distance 0
        pair_GCC = torch.where(
            distance_CC > 0, (log_G11 * distance_CC.clamp(min=1)).exp(), (distance_CC == 0).to(log_G11)
        )
        lengths_N1 = (L - C * torch.arange(N, device=log_decay.device)).clamp(max=C)[:, None]
        left_NC = (lengths_N1 - 1 - steps_C).clamp(min=0)
        suffix_GNC = torch.where(left_NC > 0, (log_G11 * left_NC.clamp(min=1)).exp(), 1.0)
        prefix_GC = (log_decay[:, None] * (steps_C + 1)).exp()
        total_GN = (log_decay[:, None] * lengths_N1[:, 0]).exp()
        return (
            pair_GCC[:, None],
            prefix_GC[None, :, None, :, None],
            suffix_GNC[None, ..., None],
            total_GN[None, ..., None, None],
        )
    pair, prefix, suffix = chunks.scalar_decays(log_decay[..., 0].exp())
    return pair, prefix[..., None], suffix[..., None], prefix[..., -1, None, None]


class VectorDecay(torch.autograd.Function):
    """One decay per channel and step, (B, G, N, C, K): the scores are built level by level of the decay tree."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial, L):
        scores, prefix, suffix = _vector_scores(q, k, log_decay.exp())
        before, last = chunks.carry((k * suffix).mT @ v, prefix[..., -1, :, None], initial)
        C = k.shape[3]
        y = (chunks.rows(q, C) * prefix[..., None, :]).view_as(q) @ before
        y = chunks.add_product(y, scores, v)
        ctx.save_for_backward(q, k, v, log_decay, before, last, scores)
        ctx.has_initial = initial is not None
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        q, k, v, log_decay, before, last, scores = ctx.saved_tensors
        C = k.shape[3]
        dy = torch.zeros_like(q[..., :1]).expand(*q.shape[:-1], v.shape[-1]) if dy is None else dy.contiguous()
        dq, dk, prefix, suffix = _vector_scores_grad(q, k, log_decay.exp(), dy @ v.mT)
        q_outer = (chunks.rows(q, C) * prefix[..., None, :]).view_as(q)
        after, dinitial = chunks.carry_back(q_outer.mT @ dy, prefix[..., -1, :, None], dlast)
        chunks.rows(dq, C).addcmul_(chunks.rows(dy @ before.mT, C), prefix[..., None, :])
        dk.addcmul_(v @ after.mT, suffix)
        dv = chunks.add_product((k * suffix) @ after, scores.mT, dy)
        dlog = None
        if ctx.needs_input_grad[3]:
            change = chunks.rows(q * dq, C).sum(-2) - k * dk
            dlog = chunks.log_decay_grad(change, before, last, after, dlast, -1)
        return dq, dk, dv, dlog, dinitial if ctx.has_initial else None, None


def _vector_scores(q, k, a):
    """q_i . (prod a[j+1..i] * k_j) for j <= i, and the factors from the chunk's start and to its end."""
    C = k.shape[3]
    scores = _diagonal(q, k)
    prefix, suffix = a.clone(), torch.ones_like(a)
    m = 1
    while m < C:
        q_upper, k_lower = _split(q, k, prefix, suffix, m)
        chunks.lower_left(scores, m).copy_(q_upper @ k_lower.mT)
        chunks.double(prefix, suffix, m)
        m *= 2
    return scores, prefix, suffix


def _vector_scores_grad(q, k, a, dscores):
    """The gradients of `_vector_scores` for q and k (not yet those through the states), and the outer factors."""
    C = k.shape[3]
    diagonal = chunks.rows(dscores, C).diagonal(dim1=-3, dim2=-1).mT[..., None]  # (..., C, R, 1)
    dq = (diagonal * k[..., None, :]).flatten(-3, -2)
    dk = (diagonal * chunks.rows(q, C)).sum(-2)
    prefix, suffix = a.clone(), torch.ones_like(a)
    m = 1
    while m < C:
        q_upper, k_lower = _split(q, k, prefix, suffix, m)
        block = chunks.lower_left(dscores, m)
        decay = chunks.upper_half(prefix, m)[..., None, :]
        upper = chunks.rows(dq, C).unflatten(-3, (-1, 2, m))[..., 1, :, :, :]
        upper.addcmul_(chunks.rows(block @ k_lower, m), decay)
        chunks.lower_half(dk, m).addcmul_(block.mT @ q_upper, chunks.lower_half(suffix, m))
        chunks.double(prefix, suffix, m)
        m *= 2
    return dq, dk, prefix, suffix


def _split(q, k, prefix, suffix, m: int):
    """The queries of all upper and the keys of all lower halves of blocks of 2m steps, decayed to the middle."""
    rows = chunks.rows(q, k.shape[3]).unflatten(-3, (-1, 2, m))[..., 1, :, :, :]
    q_upper = (rows * chunks.upper_half(prefix, m)[..., None, :]).flatten(-3, -2)
    return q_upper, chunks.lower_half(k, m) * chunks.lower_half(suffix, m)


def _diagonal(q, k):
    """The scores (..., C*R, C) of every step with itself, zero elsewhere."""
    C = k.shape[3]
    own = (chunks.rows(q, C) * k[..., None, :]).sum(-1)  # (..., C, R)
    scores = q.new_zeros(*q.shape[:-1], C)
    chunks.rows(scores, C).diagonal(dim1=-3, dim2=-1).copy_(own.mT)
    return scores
