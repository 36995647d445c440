"""The generalised delta rule of RWKV-7 (Peng et al. 2025, arXiv 2503.14456): diagonal plus rank one.

    S_t = (diag(a_t) - b_t c_t^T) S_{t-1} + k_t v_t^T          y_t = scale * S_t^T q_t

What the state answers to the removal key c is taken away along b, and k v^T is written, three directions that need not
agree; the delta rule with a decay per channel (`zoo.ops.vector_delta`) ties them together. The loop over time is
`generalized_delta_rule_reference`.

Inside a chunk that starts from S_0 the corrections e_i (minus what is taken away) solve a unit lower triangular system,

    e_i + sum_{j < i} A_ij e_j = -S_0^T (p_i * c_i) - sum_{j < i} B_ij v_j
    A_ij = c_i^T diag(a[j+1] ... a[i-1]) b_j,  B_ij = c_i^T diag(a[j+1] ... a[i-1]) k_j,  p_i = a[1] ... a[i-1]

and then both are written, e along b and v along k. Queries and removal keys go through the decay tree of
`zoo.ops.recurrence` together, as rows of one matrix. The tree decays up to and including step i, one step more than c_i
may see, so c_i is divided by a_i first: decays must not be stronger than about e^-20 a step (RWKV-7's are at least
e^-0.61; a new sequence is no decay in this sense). The backward is written by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops import chunks, fla
from zoo.ops.backends import dispatch, no_autocast, register_backend
from zoo.ops.delta import _carry, _carry_back, unit_inverse
from zoo.ops.recurrence import _vector_scores, _vector_scores_grad
from zoo.ops.stepwise import leaves_torch, repeat_step
from zoo.ops.vector_delta import _parts, _prefix_suffix, _readers, kernel_serves

OP = "generalized_delta_rule"


def generalized_delta_rule(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    removal_BGLK: Tensor,
    along_BGLK: Tensor,
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
    """S_t = (diag(a_t) - b_t c_t^T) S_{t-1} + k_t v_t^T, y_t = scale * S_t^T q_t.

    Args:
        q_BHLK, k_BGLK, v_BGLV: H = R*G query heads; query head h reads key/value head h // R.
        removal_BGLK, along_BGLK: c and b. RWKV-7 has c of unit length and b = rate * c with rates from 0 to 1.
        log_decay_BGLK: log a_t from -20 to 0 for each channel of the keys.
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
    wanted = {name: (x, k_BGLK.shape) for name, x in (("removal", removal_BGLK), ("along", along_BGLK))}
    wanted["log_decay"] = (log_decay_BGLK, k_BGLK.shape)
    if initial is not None:
        wanted["initial"] = (initial, torch.Size((*k_BGLK.shape[:2], k_BGLK.shape[3], v_BGLV.shape[3])))
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ConfigError(f"{OP}: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    dtype = chunks.sum_dtype(q_BHLK, k_BGLK, v_BGLV)
    with no_autocast(q_BHLK):
        q, k, v = q_BHLK, k_BGLK, v_BGLV
        c, b, log_decay = (x.to(dtype) for x in (removal_BGLK, along_BGLK, log_decay_BGLK))
        state = None if initial is None else initial.to(dtype)
        if mask_BL is not None:
            hidden_B1L1 = ~mask_BL[:, None, :, None]
            q, k, v, c, b, log_decay = (x.masked_fill(hidden_B1L1, 0.0) for x in (q, k, v, c, b, log_decay))
        if q.shape[2] == 1 and backend is None:
            y, state = _step(q.to(dtype), k.to(dtype), v.to(dtype), c, b, log_decay, state, R)
            y = (y if scale == 1.0 else y * scale).to(v_BGLV.dtype)
            return y, state if final else None
        starts_BL = None if segments_BL is None else chunks.run_starts(segments_BL, mask_BL)
        y, state = dispatch(OP, backend, q, k, v, c, b, log_decay, state, scale, chunk, starts_BL)
    return y, state if final else None


def _step(q_BH1K, k_BG1K, v_BG1V, c_BG1K, b_BG1K, log_decay_BG1K, state_BGKV, R: int):
    """One step: decay the state, take away what it answered to c, write, read with q."""
    written_BGKV = k_BG1K.mT * v_BG1V
    if state_BGKV is None:
        state_BGKV = written_BGKV
    else:
        taken_BGKV = b_BG1K.mT * (c_BG1K @ state_BGKV)
        state_BGKV = torch.addcmul(written_BGKV - taken_BGKV, log_decay_BG1K.exp().mT, state_BGKV)
    y_BGRV = q_BH1K.unflatten(1, (-1, R)).squeeze(3) @ state_BGKV
    return y_BGRV.flatten(1, 2)[:, :, None], state_BGKV


@register_backend(OP, "fla", **fla.OPTIONS, usable=kernel_serves)
def _kernel(q_BHLK, k_BGLK, v_BGLV, c_BGLK, b_BGLK, log_decay_BGLK, initial, scale: float, chunk, starts_BL):
    """flash-linear-attention: chunk_dplr_delta_rule, whose a and b are our -c and b."""
    operands = {"k": k_BGLK, "v": v_BGLV, "a": -c_BGLK, "b": b_BGLK}
    name = "generalized_delta_rule.chunk_dplr_delta_rule"
    return fla.run(name, q_BHLK, operands, {"gk": log_decay_BGLK}, initial, starts_BL, scale=scale)


@register_backend(OP, "scan", usable=leaves_torch)
def _by_steps(q_BHLK, k_BGLK, v_BGLV, c_BGLK, b_BGLK, log_decay_BGLK, initial, scale: float, chunk, starts_BL):
    """Step by step, for graphs that leave torch."""
    (B, G, _, K), dtype = k_BGLK.shape, log_decay_BGLK.dtype
    state = k_BGLK.new_zeros(B, G, K, v_BGLV.shape[-1], dtype=dtype) if initial is None else initial
    R, inputs = q_BHLK.shape[1] // G, (q_BHLK, k_BGLK, v_BGLV, c_BGLK, b_BGLK, log_decay_BGLK)

    def step(state, q, k, v, c, b, log_decay):
        return _step(q, k, v, c, b, log_decay, state, R)

    y, state = repeat_step(step, state, tuple(x.to(dtype) for x in inputs), 2)
    return (y if scale == 1.0 else y * scale).to(v_BGLV.dtype), state


@register_backend(OP, "torch")
def _chunked(q_BHLK, k_BGLK, v_BGLV, c_BGLK, b_BGLK, log_decay_BGLK, initial, scale, chunk: int | None, starts_BL):
    """The portable implementation: y (B, H, L, V) and the final state. c is divided by the decay of its own step."""
    c_BGLK = c_BGLK * (-log_decay_BGLK).exp()
    if starts_BL is not None:  # a decay of 0 starts a new sequence
        log_decay_BGLK = log_decay_BGLK.masked_fill(starts_BL[:, None, :, None], -torch.inf)
    C = chunks.chunk_length(OP, k_BGLK, chunk)
    gates = (c_BGLK, b_BGLK, log_decay_BGLK)
    return chunks.ChunkedScan.apply(OP, C, scale, None, q_BHLK, k_BGLK, v_BGLV, initial, *gates)


class GeneralizedDeltaRule(chunks.Rule):
    """gates: c (divided by the decay of its step), b and log_decay, all (B, G, n, C, K).

    Names: E the corrections, W what the inverse of their system makes of the decayed c, `before` the state before each
    chunk. `scores_b` and `scores_k` are what queries find of b and of k, `take_b` (A) and `take_k` (B) what
    removal keys find.
    """

    # As in `VectorDecay`: the pairs' share of d log a is a difference that needs exact products.
    low_precision = False

    def forward(self, span, state):
        q, k, v, (c, b, log_decay) = span[:4]
        C, a = k.shape[3], log_decay.exp()
        readers = _readers(q, c)
        of_b, prefix, suffix = _vector_scores(readers, b, a)
        scores_b, take_b = _parts(of_b, C)
        scores_k, take_k = _parts(_vector_scores(readers, k, a)[0], C)
        take_b, take_k = take_b.tril(-1), take_k.tril(-1)
        inverse = unit_inverse(take_b)
        W, E = inverse @ (c * prefix), inverse @ (take_k @ v).neg_()
        # Both are written: the corrections, which depend on the state, and the values, which do not.
        both, none = torch.cat([E, v], -2), torch.cat([W, torch.zeros_like(W)], -2)
        before, last = _carry(
            torch.cat([b, k], -2) * suffix.repeat(1, 1, 1, 2, 1), none, both, prefix[..., -1, :, None], state
        )
        E = both[..., :C, :]
        y = chunks.times(q, prefix, q.dtype) @ before
        y = chunks.add_product(chunks.add_product(y, scores_k, v), scores_b, E)
        return y, (inverse, W, E, before, scores_b, scores_k, take_k), last

    def backward(self, span, saved, dy, dlast, gate_grads):
        q, k, v, (c, b, log_decay) = span[:4]
        inverse, W, E, before, scores_b, scores_k, take_k = saved
        C, dtype, a = k.shape[3], dlast.dtype, log_decay.exp()
        prefix, suffix = _prefix_suffix(a)
        total = prefix[..., -1, :, None]
        dE, dbefore = scores_b.mT @ dy, chunks.times(q, prefix, dtype).mT @ dy
        after, dstate = _carry_back(b * suffix, W, dE, dbefore, total, dlast)

        dright = inverse.mT @ dE  # of the right-hand side of the system
        dv = scores_k.mT @ dy + (k * suffix) @ after - take_k.mT @ dright
        dq_start, dc_start = chunks.times(dy @ before.mT, prefix, dtype), (dright @ before.mT).mul_(prefix).neg_()
        dk_end, db_end = (v @ after.mT).mul_(suffix), (E @ after.mT).mul_(suffix)

        readers, dscores_b, dscores_k = _readers(q, c), dy @ E.mT, dy @ v.mT
        dof_b = _readers(dscores_b, (dright @ E.mT).neg_())
        dof_k = _readers(dscores_k, (dright @ v.mT).neg_())
        dreaders_b, db, _, _ = _vector_scores_grad(readers, b, a, dof_b)
        dreaders_k, dk, _, _ = _vector_scores_grad(readers, k, a, dof_k)
        dq, dc = _parts(dreaders_b.add_(dreaders_k), C)
        dq, dc = dq + dq_start, dc + dc_start

        dlog_decay = None
        if gate_grads[2]:
            since = chunks.rows(q * dq, C).sum(-2) + c * dc - b * db - k * dk
            through = (before * after).sum(-1)[..., None, :] * prefix[..., -1:, :]
            dlog_decay = chunks.log_decay_grad(since, b * db_end + k * dk_end, through)
        # Every step with itself: only queries see their own step.
        for x, dx, dscores in ((b, db.add_(db_end), dscores_b), (k, dk.add_(dk_end), dscores_k)):
            own_CR1 = chunks.rows(dscores, C).diagonal(dim1=-3, dim2=-1).mT[..., None]
            chunks.rows(dq, C).addcmul_(own_CR1, x[..., None, :])
            dx.add_((own_CR1 * chunks.rows(q, C)).sum(-2))
        return dq, dk, dv, [dc, db, dlog_decay], dstate


chunks.RULES[OP] = GeneralizedDeltaRule()
