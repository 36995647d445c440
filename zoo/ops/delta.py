"""The delta rule: DeltaNet without a decay, Gated DeltaNet with one.

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T          y_t = scale * S_t^T q_t

Read it as: what the decayed state answers to the key is replaced, by the share beta, by the value (Schlag et al. 2021).
With e_t = v_t - (what a_t S_{t-1} answers to k_t) the step is S_t = a_t S_{t-1} + k_t (beta_t e_t)^T, a gated linear
recurrence whose values are the errors. Inside a chunk the errors depend on each other through a unit lower triangular
system, (I + A) E = V - (decayed K) S, A_ij = decay_ij (k_i . k_j) beta_j for j < i, which is solved once for all chunks
(the WY / UT transform; Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
section 3; with gate Yang et al. 2025, "Gated Delta Networks", section 3.3). The backward pass is written by hand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops import chunks
from zoo.ops.backends import dispatch, register_backend

OP = "delta_rule"


def delta_rule(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    beta_BGL: Tensor,
    log_decay_BGL: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial: Tensor | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, y_t = scale * S_t^T q_t (the step itself included).

    Args:
        q_BHLK, k_BGLK, v_BGLV: H = R*G query heads; query head h reads key/value head h // R. The state stays bounded
            for |k|^2 beta <= 2, so keys are usually L2-normalised by the caller.
        beta_BGL: the share of the old answer that is replaced, 0 to 1 (to 2 with negative eigenvalues).
        log_decay_BGL: log a_t <= 0, or None for a_t = 1. However strong (-1e4, -inf), nothing overflows.
        scale: factor of the output.
        initial: the state (B, G, K, V) to start from. final: also return the state behind the last step.
        mask_BL: bool, True for real tokens. A masked position is an identity step whatever it holds; its output is 0.
        segments_BL: int; every run of equal ids is an independent sequence. `initial` belongs to a row's first run and
            the final state is that of its last.
        chunk: steps per chunk, a power of two. backend: a name from `zoo.backends()`; None takes the best.

    Returns:
        y_BHLV in the dtype of v, and the final state S_BGKV or None. Sums are kept in float32 (float64 for float64).

    Raises:
        ConfigError: shapes that do not fit together.
    """
    R = chunks.check_heads(OP, q_BHLK, k_BGLK, v_BGLV)
    for name, x in (("beta", beta_BGL), ("log_decay", log_decay_BGL)):
        if x is not None and x.shape != k_BGLK.shape[:3]:
            raise ConfigError(f"{OP}: {name} must be {tuple(k_BGLK.shape[:3])}, got {tuple(x.shape)}")
    dtype = torch.promote_types(torch.float32, torch.promote_types(q_BHLK.dtype, v_BGLV.dtype))
    q, k, v, beta, log_decay = q_BHLK, k_BGLK, v_BGLV, beta_BGL, log_decay_BGL
    if mask_BL is not None:
        hidden_B1L = ~mask_BL[:, None]
        q, k, v = (x.masked_fill(hidden_B1L[..., None], 0.0) for x in (q, k, v))
        beta = beta.masked_fill(hidden_B1L, 0.0)
        log_decay = None if log_decay is None else log_decay.masked_fill(hidden_B1L, 0.0)
    if segments_BL is not None:
        log_decay = torch.zeros_like(beta, dtype=dtype) if log_decay is None else log_decay
        log_decay = log_decay.masked_fill(chunks.run_starts(segments_BL, mask_BL)[:, None], -torch.inf)
    beta, initial = beta.to(dtype), None if initial is None else initial.to(dtype)
    log_decay = None if log_decay is None else log_decay.to(dtype)
    with torch.autocast(q.device.type, enabled=False):
        if q.shape[2] == 1 and backend is None:
            y, state = _step(q.to(dtype), k.to(dtype), v.to(dtype), beta, log_decay, initial, R)
        else:
            y, state = dispatch(OP, backend, q, k, v, beta, log_decay, initial, dtype, chunk)
        y = (y * scale if scale != 1.0 else y).to(v_BGLV.dtype)
    return y, state if final else None


def _step(q_BH1K, k_BG1K, v_BG1V, beta_BG1, log_decay_BG1, state_BGKV, R: int):
    """One step: decay the state, move its answer to the key towards the value, read with q."""
    if state_BGKV is None:
        state_BGKV = k_BG1K.mT * (beta_BG1[..., None] * v_BG1V)
    else:
        if log_decay_BG1 is not None:
            state_BGKV = state_BGKV * log_decay_BG1.exp()[..., None]
        write_BG1V = beta_BG1[..., None] * (v_BG1V - k_BG1K @ state_BGKV)
        state_BGKV = torch.addcmul(state_BGKV, k_BG1K.mT, write_BG1V)
    y_BGRV = q_BH1K.view(*k_BG1K.shape[:2], R, -1) @ state_BGKV
    return y_BGRV.flatten(1, 2)[:, :, None], state_BGKV


@register_backend(OP, "torch")
def _chunked(q_BHLK, k_BGLK, v_BGLV, beta_BGL, log_decay_BGL, initial, dtype, chunk):
    """The portable implementation: y (B, H, L, V) and the final state, both in `dtype`."""
    G, L = k_BGLK.shape[1:3]
    C = chunks.chunk_length(OP, L, chunk, default=64)
    q = chunks.queries_to_chunks(q_BHLK.to(dtype), G, C)
    k, v = chunks.to_chunks(k_BGLK.to(dtype), C), chunks.to_chunks(v_BGLV.to(dtype), C)
    beta = F.pad(beta_BGL, (0, -L % C)).unflatten(2, (-1, C))
    log_decay = None if log_decay_BGL is None else F.pad(log_decay_BGL, (0, -L % C)).unflatten(2, (-1, C))
    y, state = DeltaRule.apply(q, k, v, beta, log_decay, initial)
    return chunks.queries_from_chunks(y, q.shape[3] // C, L), state


class DeltaRule(torch.autograd.Function):
    """q (B, G, N, C*R, K), k, v (B, G, N, C, .), beta and log_decay (B, G, N, C) -> y (B, G, N, C*R, V), last state.

    Names: E the errors, beta * E what is written, `before` the state before each chunk; for row i of a chunk, prefix_i
    is the decay since the chunk's start and suffix_i that to its end.
    """

    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, initial):
        C = k.shape[3]
        pair, prefix, suffix, total = _factors(log_decay)
        inverse = unit_inverse(_coupling(k, pair) * beta[..., None, :])
        k_start, k_end = _times(k, prefix), _times(k, suffix)
        W, E = inverse @ k_start, inverse @ v
        before, last = _carry(k_end * beta[..., None], W, E, total, initial)
        y = _times_rows(q @ before, prefix, C)
        y = chunks.add_product(y, chunks.decayed(q @ k.mT, pair, C), E * beta[..., None])
        ctx.save_for_backward(q, k, beta, log_decay, inverse, W, E, before, last)
        ctx.has_initial = initial is not None
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        q, k, beta, log_decay, inverse, W, E, before, last = ctx.saved_tensors
        C, written = k.shape[3], E * beta[..., None]
        pair, prefix, suffix, total = _factors(log_decay)
        dy = torch.zeros_like(q[..., :1]).expand(*q.shape[:-1], E.shape[-1]) if dy is None else dy.contiguous()
        dy_start = _times_rows(dy, prefix, C)
        dwritten = chunks.decayed(q @ k.mT, pair, C).mT @ dy
        after, dinitial = _carry_back(_times(k, suffix), W * beta[..., None], dwritten, q.mT @ dy_start, total, dlast)

        dscores = chunks.decayed(dy @ written.mT, pair, C)
        dq = chunks.add_product(dy_start @ before.mT, dscores, k)
        dk_column = chunks.add_product(_times(written @ after.mT, suffix), dscores.mT, q)
        dv = inverse.mT @ (dwritten * beta[..., None])
        dA = -(dv @ E.mT)
        coupling = _coupling(k, pair)
        dbeta = (dwritten * E).sum(-1) + (dA * coupling).sum(-2)
        dgram = dA * beta[..., None, :]
        dgram = dgram.tril_(-1) if pair is None else dgram * pair.tril(-1)
        dk_row = chunks.add_product(_times(-(dv @ before.mT), prefix), dgram, k)
        dk_column = chunks.add_product(dk_column, dgram.mT, k)
        dlog = None
        if ctx.needs_input_grad[4]:
            change = (q * dq).unflatten(3, (C, -1)).sum((-1, -2)) + (k * (dk_row - dk_column)).sum(-1)
            dlog = chunks.log_decay_grad(change[..., None], before, last, after, dlast, (-1, -2))[..., 0]
        return dq, dk_row + dk_column, dv, dbeta, dlog, dinitial if ctx.has_initial else None


def _factors(log_decay_BGNC):
    """Decays between pairs of steps (C, C), from the chunk's start, to its end (both (C, 1)), and over all of it."""
    if log_decay_BGNC is None:
        return None, None, None, None
    pair, prefix, suffix = chunks.scalar_decays(log_decay_BGNC.exp())
    return pair, prefix[..., None], suffix[..., None], prefix[..., -1, None, None]


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _times_rows(x_QX: Tensor, factor: Tensor | None, C: int) -> Tensor:
    """Scale the R rows of each of the C steps."""
    return x_QX if factor is None else (x_QX.unflatten(3, (C, -1)) * factor[..., None]).flatten(3, 4)


def _coupling(k: Tensor, pair: Tensor | None) -> Tensor:
    """decay_ij (k_i . k_j) for j < i, zero elsewhere."""
    gram = k @ k.mT
    return gram.tril_(-1) if pair is None else gram.mul_(pair).tril_(-1)


def unit_inverse(A_CC: Tensor) -> Tensor:
    """(I + A)^-1 for strictly lower triangular A, by blocks of 1, 2, 4, ... rows:
    [[P, 0], [A, Q]]^-1 = [[P^-1, 0], [-Q^-1 A P^-1, Q^-1]]."""
    C = A_CC.shape[-1]
    inverse = torch.eye(C, dtype=A_CC.dtype, device=A_CC.device).expand_as(A_CC).contiguous()
    m = 1
    while m < C:
        corner = chunks.lower_left(A_CC, m)
        if m > 1:
            blocks = inverse.unflatten(-1, (-1, 2, m)).unflatten(-4, (-1, 2, m)).diagonal(dim1=-6, dim2=-3)
            blocks = blocks.movedim(-1, -5)  # (..., C/2m, 2, m, 2, m)
            corner = blocks[..., 1, :, 1, :] @ corner @ blocks[..., 0, :, 0, :]
        chunks.lower_left(inverse, m).copy_(-corner)
        m *= 2
    return inverse


def _carry(k_end, W, E, total, initial):
    """Through the chunks: E_n -= W_n S (in place), S <- total_n S + k_end_n^T E_n. The states before each, the last."""
    B, G, N, _, K = k_end.shape
    S = k_end.new_zeros(B * G, K, E.shape[-1]) if initial is None else initial.flatten(0, 1)
    before = []
    for n in range(N):
        before.append(S)
        E_n = E[:, :, n].flatten(0, 1)
        E_n.baddbmm_(W[:, :, n].flatten(0, 1), S, alpha=-1)
        S = S if total is None else S * total[:, :, n].flatten(0, 1)
        S = torch.baddbmm(S, k_end[:, :, n].flatten(0, 1).mT, E_n)
    return torch.stack(before, dim=1).unflatten(0, (B, G)), S.unflatten(0, (B, G))


def _carry_back(k_end, W, dwritten, dbefore, total, dlast):
    """The same way back: dwritten_n += k_end_n dS (in place), dS <- total_n dS + dbefore_n - W_n^T dwritten_n."""
    B, G, N, _, _ = k_end.shape
    dS = torch.zeros_like(dbefore[:, :, 0]).flatten(0, 1) if dlast is None else dlast.flatten(0, 1)
    after = []
    for n in range(N - 1, -1, -1):
        after.append(dS)
        d_n = dwritten[:, :, n].flatten(0, 1)
        d_n.baddbmm_(k_end[:, :, n].flatten(0, 1), dS)
        dS = dS if total is None else dS * total[:, :, n].flatten(0, 1)
        dS = torch.baddbmm(dS + dbefore[:, :, n].flatten(0, 1), W[:, :, n].flatten(0, 1).mT, d_n, alpha=-1)
    return torch.stack(after[::-1], dim=1).unflatten(0, (B, G)), dS.unflatten(0, (B, G))
