"""The delta rule with a decay per channel (Kimi Delta Attention, 2025, arXiv 2510.26692, section 3).

    S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T          y_t = scale * S_t^T q_t

First every row of the state decays at its own rate, then what the state answers to the key is replaced, by the share
beta, by the value. `zoo.ops.delta` is the case of one rate for all rows. The loop over time is `delta_rule_reference`,
which takes either decay.

In a chunk that starts from S_0 the errors e_i = v_i - S_0^T (p_i * k_i) - sum_{j < i} A_ij e_j are one unit lower
triangular system with A_ij = beta_j k_i^T diag(a[j+1] ... a[i]) k_j, p_i = a[1] ... a[i]. Outputs need the same
products with q_i, so queries and keys go through the decay tree of `zoo.ops.recurrence` together, as rows of one
matrix: no exponent is positive and no quotient is taken, however strong the decay. The backward is written by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops import chunks, fla
from zoo.ops.backends import register_backend
from zoo.ops.delta import _carry, _carry_back, run, unit_inverse
from zoo.ops.recurrence import _vector_scores, _vector_scores_grad

OP = "vector_delta_rule"


def vector_delta_rule(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    beta_BGL: Tensor,
    log_decay_BGLK: Tensor,
    *,
    scale: float = 1.0,
    initial: Tensor | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T, y_t = scale * S_t^T q_t.

    Args:
        q_BHLK, k_BGLK, v_BGLV: H = R*G query heads; query head h reads key/value head h // R. The state stays bounded
            for |k|^2 beta <= 2, so keys are usually L2-normalised by the caller.
        beta_BGL: the share of the old answer that is replaced, 0 to 1 (to 2 with negative eigenvalues).
        log_decay_BGLK: log a_t <= 0 for each channel of the keys. However strong (-1e4, -inf), nothing overflows.
        scale: factor of the output.
        initial: the state (B, G, K, V) to start from. final: also return the state behind the last step.
        mask_BL: bool, True for real tokens. A masked position is an identity step whatever it holds; its output is 0.
        segments_BL: int; every run of equal ids is an independent sequence. `initial` belongs to a row's first run and
            the final state is that of its last.
        chunk: steps per chunk, a power of two. backend: a name from `zoo.backends()`; None takes the best.

    Returns:
        y_BHLV in the dtype of v, and the final state S_BGKV or None. Sums and products are in float32 (float64 for
        float64).

    Raises:
        ConfigError: shapes that do not fit together.
    """
    R = chunks.check_heads(OP, q_BHLK, k_BGLK, v_BGLV)
    for name, x, wanted in (("beta", beta_BGL, k_BGLK.shape[:3]), ("log_decay", log_decay_BGLK, k_BGLK.shape)):
        if x.shape != wanted:
            raise ConfigError(f"{OP}: {name} must be {tuple(wanted)}, got {tuple(x.shape)}")
    size = (*k_BGLK.shape[:2], k_BGLK.shape[3], v_BGLV.shape[3])
    if initial is not None and initial.shape != size:
        raise ConfigError(f"{OP}: the initial state must be {size}, got {tuple(initial.shape)}")
    return run(
        OP, q_BHLK, k_BGLK, v_BGLV, beta_BGL, log_decay_BGLK, R, scale=scale, initial=initial, final=final,
        mask_BL=mask_BL, segments_BL=segments_BL, chunk=chunk, backend=backend,
    )  # fmt: skip


def kernel_serves(q, k, v, *_) -> bool:
    """Whether flash-linear-attention's kernels with a decay per channel take these heads."""
    return fla.serves(q, k, v)


@register_backend(OP, "fla", **fla.OPTIONS, usable=kernel_serves)
def _kernel(q_BHLK, k_BGLK, v_BGLV, beta_BGL, log_decay_BGLK, initial, scale: float, chunk, starts_BL):
    """flash-linear-attention: chunk_kda."""
    gates = {"beta": beta_BGL, "g": fla.bounded(log_decay_BGLK)}
    return fla.run("kda.chunk_kda", q_BHLK, {"k": k_BGLK, "v": v_BGLV}, gates, initial, starts_BL, scale=scale)


@register_backend(OP, "torch")
def _chunked(q_BHLK, k_BGLK, v_BGLV, beta_BGL, log_decay_BGLK, initial, scale: float, chunk: int | None, starts_BL):
    """The portable implementation: y (B, H, L, V) and the final state."""
    if starts_BL is not None:  # a decay of 0 starts a new sequence
        log_decay_BGLK = log_decay_BGLK.masked_fill(starts_BL[:, None, :, None], -torch.inf)
    C = chunks.chunk_length(OP, k_BGLK, chunk)
    return chunks.ChunkedScan.apply(OP, C, scale, None, q_BHLK, k_BGLK, v_BGLV, initial, beta_BGL, log_decay_BGLK)


class VectorDeltaRule(chunks.Rule):
    """gates: beta (B, G, n, C) and log_decay (B, G, n, C, K). Names as in `zoo.ops.delta.DeltaRule`.

    Each step has R + 1 readers of what the steps before it wrote: its queries, and its key (which asks what to
    correct). `scores` are their products with the keys, decayed: (..., C * (R + 1), C).
    """

    # As in `VectorDecay`: the pairs' share of d log a is a difference that needs exact products.
    low_precision = False

    def forward(self, span, state):
        q, k, v, (beta, log_decay) = span[:4]
        C, beta_C1 = k.shape[3], beta[..., None]
        scores, prefix, suffix = _vector_scores(_readers(q, k), k, log_decay.exp())
        scores_q, coupling = _parts(scores, C)
        coupling = coupling.tril(-1)
        inverse = unit_inverse(coupling * beta[..., None, :])
        W, E = inverse @ (k * prefix), inverse @ v
        before, last = _carry(k * suffix * beta_C1, W, E, prefix[..., -1, :, None], state)
        y = chunks.times(q, prefix, q.dtype) @ before
        y = chunks.add_product(y, scores_q, E * beta_C1)
        return y, (inverse, W, E, before, scores_q, coupling), last

    def backward(self, span, saved, dy, dlast, gate_grads):
        q, k, _, (beta, log_decay) = span[:4]
        inverse, W, E, before, scores_q, coupling = saved
        C, dtype, a, beta_C1 = k.shape[3], dlast.dtype, log_decay.exp(), beta[..., None]
        prefix, suffix = _prefix_suffix(a)
        dwritten, dbefore = scores_q.mT @ dy, chunks.times(q, prefix, dtype).mT @ dy
        total = prefix[..., -1, :, None]
        after, dstate = _carry_back(k * suffix, W * beta_C1, dwritten, dbefore, total, dlast)

        written, dv = E * beta_C1, inverse.mT @ (dwritten * beta_C1)
        dq_start = chunks.times(dy @ before.mT, prefix, dtype)
        dk_start = (dv @ before.mT).mul_(prefix).neg_()
        dk_end = (written @ after.mT).mul_(suffix)
        dscores_q, dA = dy @ written.mT, (dv @ E.mT).neg_()
        dbeta = (dwritten * E).sum(-1) + (dA * coupling).sum(-2)
        dscores = _readers(dscores_q, dA * beta[..., None, :])
        dreaders, dk, _, _ = _vector_scores_grad(_readers(q, k), k, a, dscores)
        dq, dk_read = _parts(dreaders, C)
        dq, dk_read = dq + dq_start, dk_read + dk_start

        dlog_decay = None
        if gate_grads[1]:
            since = chunks.rows(q * dq, C).sum(-2) + k * (dk_read - dk)
            through = (before * after).sum(-1)[..., None, :] * prefix[..., -1:, :]
            dlog_decay = chunks.log_decay_grad(since, k * dk_end, through)
        own_CR1 = chunks.rows(dscores_q, C).diagonal(dim1=-3, dim2=-1).mT[..., None]  # of every step with itself
        chunks.rows(dq, C).addcmul_(own_CR1, k[..., None, :])
        dk = dk.add_(dk_read).add_(dk_end).add_((own_CR1 * chunks.rows(q, C)).sum(-2))
        return dq, dk, dv, [dbeta, dlog_decay], dstate


chunks.RULES[OP] = VectorDeltaRule()


def _readers(x_QX: Tensor, y_CX: Tensor) -> Tensor:
    """Rows of the R queries of each step, then one of its key: (..., C*R, X), (..., C, X) -> (..., C*(R+1), X)."""
    return torch.cat([chunks.rows(x_QX, y_CX.shape[-2]), y_CX.unsqueeze(-2)], -2).flatten(-3, -2)


def _parts(x: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """The inverse of `_readers`."""
    x = chunks.rows(x, C)
    return x[..., :-1, :].flatten(-3, -2), x[..., -1, :]


def _prefix_suffix(a: Tensor) -> tuple[Tensor, Tensor]:
    """The decay from the chunk's start to each step (itself included), and behind it to the chunk's end."""
    prefix, suffix, m = a.clone(), torch.ones_like(a), 1
    while m < a.shape[-2]:
        chunks.double(prefix, suffix, m)
        m *= 2
    return prefix, suffix
