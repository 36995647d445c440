"""The plain mathematics of RWKV's ops: one token after another, as the papers write them.

The fast forms are tested against these in float64. They take the arguments of the ops, without `chunk` and `backend`.
A masked position changes nothing and gives 0; a packed run starts from nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.ops.reference import _run_starts


def wkv_reference(
    k_BLE: Tensor,
    v_BLE: Tensor,
    rate_E: Tensor,
    bonus_E: Tensor,
    *,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
) -> Tensor:
    """RWKV-4 (Peng et al. 2023) as it stands there, every sum anew, without any shift of exponents."""
    B, L, _ = k_BLE.shape
    mask_BL = torch.ones(B, L, dtype=torch.bool, device=k_BLE.device) if mask_BL is None else mask_BL
    starts_BL = _run_starts(segments_BL, mask_BL)
    y_BLE = torch.zeros_like(v_BLE)
    for row in range(B):
        past: list[int] = []
        for t in mask_BL[row].nonzero()[:, 0].tolist():
            past = [] if starts_BL[row, t] else past
            weights = [torch.exp(k_BLE[row, s] - (len(past) - 1 - i) * rate_E) for i, s in enumerate(past)]
            weights.append(torch.exp(bonus_E + k_BLE[row, t]))
            past.append(t)
            y_BLE[row, t] = sum(w * v_BLE[row, s] for w, s in zip(weights, past, strict=True)) / sum(weights)
    return y_BLE


def bonus_recurrence_reference(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    log_decay_BGLK: Tensor,
    bonus_GK: Tensor,
    *,
    scale: float = 1.0,
    initial: Tensor | None = None,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-6 (Peng et al. 2024): y_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t, then the state moves on."""

    def step(t: int, S_BGKV: Tensor) -> tuple[Tensor, Tensor]:
        write_BGKV = k_BGLK[:, :, t, :, None] * v_BGLV[:, :, t, None]
        after_BGKV = log_decay_BGLK[:, :, t, :, None].exp() * S_BGKV + write_BGKV
        return S_BGKV + bonus_GK[..., None] * write_BGKV, after_BGKV

    return _token_by_token(step, q_BHLK, k_BGLK, v_BGLV, scale, initial, mask_BL, segments_BL)


def generalized_delta_rule_reference(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    removal_BGLK: Tensor,
    along_BGLK: Tensor,
    log_decay_BGLK: Tensor,
    *,
    scale: float = 1.0,
    initial: Tensor | None = None,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7 (Peng et al. 2025): S_t = (diag(a_t) - b_t c_t^T) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t."""

    def step(t: int, S_BGKV: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = log_decay_BGLK[:, :, t].exp(), along_BGLK[:, :, t], removal_BGLK[:, :, t]
        transition_BGKK = torch.diag_embed(a) - b[..., None] * c[..., None, :]
        after_BGKV = transition_BGKK @ S_BGKV + k_BGLK[:, :, t, :, None] * v_BGLV[:, :, t, None]
        return after_BGKV, after_BGKV

    return _token_by_token(step, q_BHLK, k_BGLK, v_BGLV, scale, initial, mask_BL, segments_BL)


def _token_by_token(
    step: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    scale: float,
    initial: Tensor | None,
    mask_BL: Tensor | None,
    segments_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """From `step`, which makes the matrix that the queries of token t read and the one after it from the one before."""
    B, G, L, K = k_BGLK.shape
    R = q_BHLK.shape[1] // G
    real_BL = torch.ones(B, L, dtype=torch.bool, device=k_BGLK.device) if mask_BL is None else mask_BL
    starts_BL = _run_starts(segments_BL, real_BL)
    S_BGKV = k_BGLK.new_zeros(B, G, K, v_BGLV.shape[-1]) if initial is None else initial
    outputs = []
    for t, (real_B, start_B) in enumerate(zip(real_BL.T, starts_BL.T, strict=True)):
        S_BGKV = S_BGKV.masked_fill(start_B[:, None, None, None], 0)
        seen_BGKV, after_BGKV = step(t, S_BGKV)
        y_BHV = scale * torch.einsum("bhk,bhkv->bhv", q_BHLK[:, :, t], seen_BGKV.repeat_interleave(R, 1))
        S_BGKV = torch.where(real_B[:, None, None, None], after_BGKV, S_BGKV)
        outputs.append(torch.where(real_B[:, None, None], y_BHV, 0.0))
    return torch.stack(outputs, 2), S_BGKV
