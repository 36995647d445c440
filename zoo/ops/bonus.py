"""The gated linear recurrence of RWKV-6 (Peng et al. 2024, arXiv 2404.05892): a bonus for the present.

    y_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t          S_t = diag(a_t) S_{t-1} + k_t v_t^T

A query reads the state *before* its own token, and its own token with a weight u of its own. The state before t is
itself a gated linear recurrence, P_t = diag(a_{t-1}) P_{t-1} + k_{t-1} v_{t-1}^T: that of `zoo.ops.recurrence` with
keys, values and decays of the step before. The bonus is one number per step and head. The loop over time is
`bonus_recurrence_reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops import chunks
from zoo.ops.backends import no_autocast
from zoo.ops.recurrence import linear_recurrence

OP = "bonus_recurrence"


def bonus_recurrence(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    log_decay_BGLK: Tensor,
    bonus_GK: Tensor,
    *,
    scale: float = 1.0,
    initial: Tensor | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t, S_t = diag(a_t) S_{t-1} + k_t v_t^T.

    Args:
        q_BHLK, k_BGLK, v_BGLV: H = R*G query heads; query head h reads key/value head h // R.
        log_decay_BGLK: log a_t <= 0 for each channel of the keys, however strong. bonus_GK: u.
        scale, initial, final, mask_BL, segments_BL, chunk: as in `linear_recurrence`. backend: of `linear_recurrence`.

    Returns:
        y_BHLV in the dtype of v, and the final state S (B, G, K, V) or None, in float32 (float64 for float64).

    Raises:
        ConfigError: shapes that do not fit together.
    """
    R = chunks.check_heads(OP, q_BHLK, k_BGLK, v_BGLV)
    wanted = {"log_decay": (log_decay_BGLK, tuple(k_BGLK.shape)), "bonus": (bonus_GK, k_BGLK.shape[1::2])}
    if initial is not None:
        wanted["initial"] = (initial, (*k_BGLK.shape[:2], k_BGLK.shape[3], v_BGLV.shape[3]))
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ConfigError(f"{OP}: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    dtype = chunks.sum_dtype(q_BHLK, k_BGLK, v_BGLV)
    q, k, v, log_decay = q_BHLK, k_BGLK, v_BGLV, log_decay_BGLK.to(dtype)
    if mask_BL is not None:
        hidden_B1L1 = ~mask_BL[:, None, :, None]
        q, k, v, log_decay = (x.masked_fill(hidden_B1L1, 0.0) for x in (q, k, v, log_decay))
    if q.shape[2] == 1 and backend is None:
        with no_autocast(q):
            y, after = _step(q.to(dtype), k.to(dtype), v.to(dtype), log_decay, bonus_GK.to(dtype), initial, R)
            return (y if scale == 1.0 else y * scale).to(v_BGLV.dtype), after if final else None
    k_before, v_before, log_before = (F.pad(x[:, :, :-1], (0, 0, 1, 0)) for x in (k, v, log_decay))
    if segments_BL is not None:
        starts_B1L1 = chunks.run_starts(segments_BL, mask_BL)[:, None, :, None]
        k_before = k_before.masked_fill(starts_B1L1, 0.0)
        log_before = log_before.masked_fill(starts_B1L1, -torch.inf)
    y_BHLV, before = linear_recurrence(
        q, k_before, v_before, log_before, scale=scale, initial=initial, final=final, chunk=chunk, backend=backend
    )
    with no_autocast(q):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        weight_BGRL1 = (q.unflatten(1, (-1, R)) * (k * bonus_GK[:, None].to(dtype))[:, :, None]).sum(-1, keepdim=True)
        y_BHLV = y_BHLV + (weight_BGRL1 * scale * v[:, :, None]).flatten(1, 2).to(y_BHLV.dtype)
        if before is None:
            return y_BHLV, None
        return y_BHLV, log_decay[:, :, -1:].exp().mT * before + k[:, :, -1:].mT * v[:, :, -1:]


def _step(q_BH1K, k_BG1K, v_BG1V, log_decay_BG1K, bonus_GK, state_BGKV: Tensor | None, R: int):
    """One step: read the state and the token with its bonus, then move on."""
    written_BGKV = k_BG1K.mT * v_BG1V
    seen_BGKV, after_BGKV = bonus_GK[..., None] * written_BGKV, written_BGKV
    if state_BGKV is not None:
        state_BGKV = state_BGKV.to(written_BGKV.dtype)
        seen_BGKV = seen_BGKV + state_BGKV
        after_BGKV = torch.addcmul(written_BGKV, log_decay_BG1K.exp().mT, state_BGKV)
    y_BGRV = q_BH1K.unflatten(1, (-1, R)).squeeze(3) @ seen_BGKV
    return y_BGRV.flatten(1, 2)[:, :, None], after_BGKV
