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
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops import chunks, fla
from zoo.ops.backends import dispatch, no_autocast, register_backend
from zoo.ops.stepwise import leaves_torch, repeat_step

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
    return run(
        OP, q_BHLK, k_BGLK, v_BGLV, beta_BGL, log_decay_BGL, R, scale=scale, initial=initial, final=final,
        mask_BL=mask_BL, segments_BL=segments_BL, chunk=chunk, backend=backend,
    )  # fmt: skip


def run(op, q, k, v, beta, log_decay, R: int, *, scale, initial, final, mask_BL, segments_BL, chunk, backend):
    """A delta rule without a decay, with one per step (B, G, L) or one per channel (B, G, L, K): a mask is written into
    the tensors, one step is taken directly, more go to a backend of `op`."""
    dtype, out_dtype = chunks.sum_dtype(q, k, v), v.dtype
    if mask_BL is not None:
        hidden_B1L = ~mask_BL[:, None]
        q, k, v = (x.masked_fill(hidden_B1L[..., None], 0.0) for x in (q, k, v))
        beta = beta.masked_fill(hidden_B1L, 0.0)
        if log_decay is not None:
            log_decay = log_decay.masked_fill(hidden_B1L if log_decay.ndim == 3 else hidden_B1L[..., None], 0.0)
    starts_BL = None if segments_BL is None else chunks.run_starts(segments_BL, mask_BL)
    beta, initial = beta.to(dtype), None if initial is None else initial.to(dtype)
    log_decay = None if log_decay is None else log_decay.to(dtype)
    with no_autocast(q):
        if q.shape[2] == 1 and backend is None:
            y, state = _step(q.to(dtype), k.to(dtype), v.to(dtype), beta, log_decay, initial, R)
            y = (y if scale == 1.0 else y * scale).to(out_dtype)
        else:
            y, state = dispatch(op, backend, q, k, v, beta, log_decay, initial, scale, chunk, starts_BL)
    return y, state if final else None


def _step(q_BH1K, k_BG1K, v_BG1V, beta_BG1, log_decay, state_BGKV, R: int):
    """One step: decay the state, move its answer to the key towards the value, read with q."""
    if state_BGKV is None:
        state_BGKV = k_BG1K.mT * (beta_BG1[..., None] * v_BG1V)
    else:
        if log_decay is not None:
            a = log_decay.exp()
            state_BGKV = state_BGKV * (a[..., None] if a.ndim == 3 else a.mT)
        write_BG1V = beta_BG1[..., None] * (v_BG1V - k_BG1K @ state_BGKV)
        state_BGKV = torch.addcmul(state_BGKV, k_BG1K.mT, write_BG1V)
    y_BGRV = q_BH1K.unflatten(1, (-1, R)).squeeze(3) @ state_BGKV
    return y_BGRV.flatten(1, 2)[:, :, None], state_BGKV


def _kernel_serves(q, k, v, beta, log_decay, *_) -> bool:
    return fla.serves(q, k, v, decay_per_step=log_decay is not None)


@register_backend(OP, "fla", **fla.OPTIONS, usable=_kernel_serves)
def _kernel(q_BHLK, k_BGLK, v_BGLV, beta_BGL, log_decay_BGL, initial, scale: float, chunk, starts_BL):
    """flash-linear-attention: chunk_delta_rule or, with a decay, chunk_gated_delta_rule."""
    name, gates = "delta_rule.chunk_delta_rule", {"beta": beta_BGL}
    if log_decay_BGL is not None:
        name, gates["g"] = "gated_delta_rule.chunk_gated_delta_rule", fla.bounded(log_decay_BGL)
    return fla.run(name, q_BHLK, {"k": k_BGLK, "v": v_BGLV}, gates, initial, starts_BL, scale=scale)


@register_backend("vector_delta_rule", "scan", usable=leaves_torch)
@register_backend(OP, "scan", usable=leaves_torch)
def _by_steps(q_BHLK, k_BGLK, v_BGLV, beta_BGL, log_decay, initial, scale: float, chunk, starts_BL):
    """Step by step, for graphs that leave torch."""
    (B, G, _, K), dtype = k_BGLK.shape, beta_BGL.dtype
    state = k_BGLK.new_zeros(B, G, K, v_BGLV.shape[-1], dtype=dtype) if initial is None else initial
    R, decays = q_BHLK.shape[1] // G, () if log_decay is None else (log_decay,)

    def step(state, q, k, v, beta, *decay):
        return _step(q, k, v, beta, decay[0] if decay else None, state, R)

    y, state = repeat_step(step, state, (*(x.to(dtype) for x in (q_BHLK, k_BGLK, v_BGLV)), beta_BGL, *decays), 2)
    return (y if scale == 1.0 else y * scale).to(v_BGLV.dtype), state


@register_backend(OP, "torch")
def _chunked(q_BHLK, k_BGLK, v_BGLV, beta_BGL, log_decay_BGL, initial, scale: float, chunk: int | None, starts_BL):
    """The portable implementation: y (B, H, L, V) and the final state."""
    if starts_BL is not None:  # a decay of 0 starts a new sequence
        log_decay_BGL = torch.zeros_like(beta_BGL) if log_decay_BGL is None else log_decay_BGL
        log_decay_BGL = log_decay_BGL.masked_fill(starts_BL[:, None], -torch.inf)
    C = chunks.chunk_length(OP, k_BGLK, chunk)
    gates = (beta_BGL,) if log_decay_BGL is None else (beta_BGL, log_decay_BGL)
    return chunks.ChunkedScan.apply(OP, C, scale, None, q_BHLK, k_BGLK, v_BGLV, initial, *gates)


class DeltaRule(chunks.Rule):
    """gates: beta and, optionally, log_decay, both (B, G, n, C).

    Names: E the errors, beta * E what is written, `before` the state before each chunk; for row i of a chunk, prefix_i
    is the decay since the chunk's start and suffix_i that to its end.
    """

    def forward(self, span, state):
        q, k, v, (beta, *log_decay) = span[:4]
        C, low, dtype = k.shape[3], q.dtype, state.dtype
        pair, prefix, suffix, total = chunks.scalar_factors(*log_decay)
        inverse = unit_inverse(_coupling(k.to(dtype), pair) * beta[..., None, :]).to(low)
        W, E = inverse @ chunks.times(k, prefix, low), (inverse @ v).to(dtype)
        k_write = chunks.times(k, beta[..., None] if suffix is None else beta[..., None] * suffix, low)
        before, last = _carry(k_write, W, E, total, state)
        y = chunks.times(q @ before.to(low), prefix, dtype)
        written = (E * beta[..., None]).to(low)
        y = chunks.add_product(y, chunks.decayed(q @ k.mT, pair, C), written)
        return y, (inverse, W, E, before), last

    def backward(self, span, saved, dy, dlast, gate_grads):
        q, k, _, (beta, *log_decay) = span[:4]
        inverse, W, E, before = saved
        C, low, dtype, beta_C1 = k.shape[3], q.dtype, dlast.dtype, beta[..., None]
        pair, prefix, suffix, total = chunks.scalar_factors(*log_decay)
        dy_start = chunks.times(dy, prefix, low)
        scores = chunks.decayed(q @ k.mT, pair, C)
        dwritten, dbefore = (scores.mT @ dy).to(dtype), (q.mT @ dy_start).to(dtype)
        after, dstate = _carry_back(
            chunks.times(k, suffix, low), (W * beta_C1).to(low), dwritten, dbefore, total, dlast
        )

        before_low, written = before.to(low), (E * beta_C1).to(low)
        dv = inverse.mT @ (dwritten * beta_C1).to(low)
        dq = (dy_start @ before_low.mT).to(dtype)
        dk = chunks.times(dv @ before_low.mT, prefix, dtype).neg_()
        dk_end = chunks.times(written @ after.to(low).mT, suffix, dtype)
        dscores, dA = dy @ written.mT, (dv @ E.to(low).mT).to(dtype).neg_()
        coupling = _coupling(k.to(dtype), pair)
        dgates = [(dwritten * E).sum(-1) + (dA * coupling).sum(-2)]
        dA = dA * beta[..., None, :]
        if log_decay:
            since = chunks.rows(q * dq, C).sum((-1, -2)) + (k * dk).sum(-1)
            since = (
                since[..., None] + chunks.pair_balance(dscores.to(dtype), scores) + chunks.pair_balance(dA, coupling)
            )
            through = (before * after).sum((-1, -2), keepdim=True) * total
            dgates.append(chunks.log_decay_grad(since, (k * dk_end).sum(-1, keepdim=True), through)[..., 0])
        dscores, dgram = chunks.decayed(dscores, pair, C), chunks.decayed(dA, pair, C).tril_(-1).to(low)
        dq = chunks.add_product(dq, dscores, k)
        dk = chunks.add_product(chunks.add_product(dk.add_(dk_end), dscores.mT, q), dgram, k)
        return dq, chunks.add_product(dk, dgram.mT, k), dv, dgates, dstate


chunks.RULES[OP] = DeltaRule()


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


def _carry(k_write, W, E, total, state):
    """Through the chunks: E_n -= W_n S (in place), S <- total_n S + k_write_n^T E_n. Gives those states."""
    B, G, n = W.shape[:3]
    S, low, before = state.flatten(0, 1), W.dtype, []
    for i in range(n):
        before.append(S)
        E_i = E[:, :, i].flatten(0, 1)
        _add(E_i, W[:, :, i], S.to(low), -1.0)
        S = S.clone() if total is None else S * total[:, :, i].flatten(0, 1)
        _add(S, k_write[:, :, i].mT, E_i.to(low))
    return torch.stack(before, dim=1).unflatten(0, (B, G)), S.unflatten(0, (B, G))


def _carry_back(k_end, W, dwritten, dbefore, total, dlast):
    """The same way back: dwritten_n += k_end_n dS (in place), dS <- total_n dS + dbefore_n - W_n^T dwritten_n."""
    B, G, n = W.shape[:3]
    dS, low, after = dlast.flatten(0, 1), W.dtype, []
    for i in range(n - 1, -1, -1):
        after.append(dS)
        d_i, x_i = dwritten[:, :, i].flatten(0, 1), dbefore[:, :, i].flatten(0, 1)
        _add(d_i, k_end[:, :, i], dS.to(low))
        dS = x_i + dS if total is None else torch.addcmul(x_i, total[:, :, i].flatten(0, 1), dS)
        _add(dS, W[:, :, i].mT, d_i.to(low), -1.0)
    return torch.stack(after[::-1], dim=1).unflatten(0, (B, G)), dS.unflatten(0, (B, G))


def _add(x: Tensor, a: Tensor, b: Tensor, sign: float = 1.0) -> None:
    """x += sign * a @ b in place; a (B, G, ., .) may be of lower precision than x."""
    a = a.flatten(0, 1)
    if a.dtype == x.dtype:
        x.baddbmm_(a, b, alpha=sign)
    else:
        x.add_(a @ b, alpha=sign)
