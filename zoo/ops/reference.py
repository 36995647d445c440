"""The plain mathematics of every op: loops over time, written as the papers write them.

Slow and obvious. The fast forms are tested against these, in float64 where it matters. They take the same
arguments as the ops, without `chunk` and `backend`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _run_starts(segments_BL: Tensor | None, mask_BL: Tensor) -> Tensor:
    """True where a packed run begins anew: a real token whose id differs from that of the real token before it."""
    starts_BL = torch.zeros_like(mask_BL)
    if segments_BL is None:
        return starts_BL
    for b, row in enumerate(segments_BL.tolist()):
        previous = None
        for t, segment in enumerate(row):
            if mask_BL[b, t]:
                starts_BL[b, t] = previous is not None and segment != previous
                previous = segment
    return starts_BL


def _decay_at(log_decay: Tensor | None, t: int, like_BGK1: Tensor) -> Tensor:
    """The decay factor of step t in a shape that broadcasts against a state (B, G, K, V)."""
    if log_decay is None:
        return torch.ones_like(like_BGK1)
    if log_decay.ndim == 1:
        return log_decay.exp()[None, :, None, None].expand_as(like_BGK1)
    step = log_decay[:, :, t].exp()
    return (step[..., None, None] if log_decay.ndim == 3 else step[..., None]).expand_as(like_BGK1)


def linear_recurrence_reference(
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
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T and y_t = scale * S_t^T q_t, one step after another.

    Linear attention (Katharopoulos et al. 2020, eq. 16-20, with the normaliser z_t = a_t z_{t-1} + k_t), RetNet (Sun
    et al. 2023, eq. 6: constant decay), Mamba-2 (Dao and Gu 2024, section 3.1: scalar decay) and GLA (Yang et al. 2024,
    eq. 3: vector decay). See `zoo.ops.recurrence.linear_recurrence` for the arguments.
    """
    B, G, L, K = k_BGLK.shape
    H, V = q_BHLK.shape[1], v_BGLV.shape[-1]
    dtype = torch.promote_types(torch.float32, torch.promote_types(q_BHLK.dtype, v_BGLV.dtype))
    mask_BL = torch.ones(B, L, dtype=torch.bool, device=k_BGLK.device) if mask_BL is None else mask_BL
    starts_BL = _run_starts(segments_BL, mask_BL)
    q_BGRLK = q_BHLK.to(dtype).unflatten(1, (G, H // G))
    k_BGLK, v_BGLV = k_BGLK.to(dtype), v_BGLV.to(dtype)
    log_decay = None if log_decay is None else log_decay.to(dtype)
    state_BGKV = k_BGLK.new_zeros(B, G, K, V + 1) if initial is None else initial.to(dtype)
    S_BGKV, z_BGK = state_BGKV[..., :V], state_BGKV[..., -1]  # z is without meaning where nothing is normalised
    steps = []
    for t in range(L):
        real = mask_BL[:, t, None, None, None]
        a_BGK1 = _decay_at(log_decay, t, S_BGKV[..., :1])
        a_BGK1 = a_BGK1.masked_fill(starts_BL[:, t, None, None, None], 0.0)
        q_BGRK, k_BGK, v_BGV = q_BGRLK[:, :, :, t], k_BGLK[:, :, t], v_BGLV[:, :, t]
        S_BGKV = torch.where(real, a_BGK1 * S_BGKV + k_BGK[..., None] * v_BGV[..., None, :], S_BGKV)
        z_BGK = torch.where(real[..., 0], a_BGK1[..., 0] * z_BGK + k_BGK, z_BGK)
        y_BGRV = torch.einsum("bgrk,bgkv->bgrv", q_BGRK, S_BGKV)
        if normalize:
            y_BGRV = y_BGRV / torch.einsum("bgrk,bgk->bgr", q_BGRK, z_BGK).clamp(min=eps)[..., None]
        else:
            y_BGRV = scale * y_BGRV
        steps.append(torch.where(real, y_BGRV, 0.0))
    y_BHLV = torch.stack(steps, dim=3).flatten(1, 2).to(v_BGLV.dtype)
    state_BGKV = torch.cat([S_BGKV, z_BGK[..., None]], -1) if normalize else S_BGKV
    return y_BHLV, state_BGKV if final else None


def delta_rule_reference(
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
) -> tuple[Tensor, Tensor | None]:
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T and y_t = scale * S_t^T q_t, one step after another.

    DeltaNet (Schlag et al. 2021; Yang et al. 2024, eq. 4; a_t = 1) and Gated DeltaNet (Yang et al. 2025, eq. 10).
    See `zoo.ops.delta.delta_rule` for the arguments.
    """
    B, G, L, K = k_BGLK.shape
    H, V = q_BHLK.shape[1], v_BGLV.shape[-1]
    dtype = torch.promote_types(torch.float32, torch.promote_types(q_BHLK.dtype, v_BGLV.dtype))
    mask_BL = torch.ones(B, L, dtype=torch.bool, device=k_BGLK.device) if mask_BL is None else mask_BL
    starts_BL = _run_starts(segments_BL, mask_BL)
    q_BGRLK = q_BHLK.to(dtype).unflatten(1, (G, H // G))
    k_BGLK, v_BGLV, beta_BGL = k_BGLK.to(dtype), v_BGLV.to(dtype), beta_BGL.to(dtype)
    log_decay = None if log_decay_BGL is None else log_decay_BGL.to(dtype)
    S_BGKV = k_BGLK.new_zeros(B, G, K, V) if initial is None else initial.to(dtype)
    steps = []
    for t in range(L):
        real = mask_BL[:, t, None, None, None]
        a_BGK1 = _decay_at(log_decay, t, S_BGKV[..., :1])
        decayed_BGKV = a_BGK1.masked_fill(starts_BL[:, t, None, None, None], 0.0) * S_BGKV
        k_BGK, v_BGV = k_BGLK[:, :, t], v_BGLV[:, :, t]
        recalled_BGV = torch.einsum("bgk,bgkv->bgv", k_BGK, decayed_BGKV)  # what the state answers to the key
        write_BGV = beta_BGL[:, :, t, None] * (v_BGV - recalled_BGV)
        S_BGKV = torch.where(real, decayed_BGKV + k_BGK[..., None] * write_BGV[..., None, :], S_BGKV)
        y_BGRV = scale * torch.einsum("bgrk,bgkv->bgrv", q_BGRLK[:, :, :, t], S_BGKV)
        steps.append(torch.where(real, y_BGRV, 0.0))
    y_BHLV = torch.stack(steps, dim=3).flatten(1, 2).to(v_BGLV.dtype)
    return y_BHLV, S_BGKV if final else None


def _sequences(b: int, size: int, mask_BS: Tensor | None, segments_BS: Tensor | None) -> list[list[int]]:
    """The packed sequences of row b, each the list of the places of its real tokens."""
    sequences: list[list[int]] = []
    previous = None
    for place in range(size):
        if mask_BS is not None and not mask_BS[b, place]:
            continue
        segment = 0 if segments_BS is None else int(segments_BS[b, place])
        if previous is None or segment != previous:
            sequences.append([])
        sequences[-1].append(place)
        previous = segment
    return sequences


def attention_reference(
    q_BHLK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    mask_BS: Tensor | None = None,
    segments_BS: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Softmax attention one query at a time; see `zoo.ops.attention`."""
    return window_attention_reference(
        q_BHLK,
        k_BGSK,
        v_BGSV,
        window=k_BGSK.shape[2] if window is None else window,
        causal=causal,
        scale=scale,
        mask_BS=mask_BS,
        segments_BS=segments_BS,
    )


def window_attention_reference(
    q_BHLK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    *,
    window: int,
    sinks: int = 0,
    sink_kv: tuple[Tensor, Tensor] | None = None,
    positions_BL: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    mask_BS: Tensor | None = None,
    segments_BS: Tensor | None = None,
    globals_BS: Tensor | None = None,
) -> Tensor:
    """Window attention one query at a time, each with the list of keys it sees; see `zoo.ops.window_attention`."""
    B, H, L, K = q_BHLK.shape
    S, R = k_BGSK.shape[2], H // k_BGSK.shape[1]
    scale = K**-0.5 if scale is None else scale
    y_BHLV = q_BHLK.new_zeros(B, H, L, v_BGSV.shape[-1])
    for b in range(B):
        for number, sequence in enumerate(_sequences(b, S, mask_BS, segments_BS)):
            given = sink_kv is not None and number == 0
            for i, place in enumerate(sequence):
                t = place - (S - L)
                if t < 0:
                    continue
                seen = []
                for j, other in enumerate(sequence):
                    near = abs(i - j) < window
                    sink = j < sinks and not given
                    everywhere = globals_BS is not None and bool(globals_BS[b, other] | globals_BS[b, place])
                    if (near or sink or everywhere) and (j <= i or not causal):
                        seen.append(other)
                keys_GNK, values_GNV = k_BGSK[b, :, seen], v_BGSV[b, :, seen]
                if given and sink_kv is not None:
                    p = i if positions_BL is None else int(positions_BL[b, t])
                    far = [j for j in range(sink_kv[0].shape[2]) if (p - j if causal else abs(p - j)) >= window]
                    keys_GNK = torch.cat([sink_kv[0][b, :, far], keys_GNK], 1)
                    values_GNV = torch.cat([sink_kv[1][b, :, far], values_GNV], 1)
                scores_HN = scale * torch.einsum("hk,hnk->hn", q_BHLK[b, :, t], keys_GNK.repeat_interleave(R, 0))
                weights_HN = scores_HN.softmax(-1)
                y_BHLV[b, :, t] = torch.einsum("hn,hnv->hv", weights_HN, values_GNV.repeat_interleave(R, 0))
    return y_BHLV


def short_conv_reference(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The convolution one token at a time, with the list of the last K - 1 inputs; see `zoo.ops.short_conv`."""
    B, L, D = x_BLD.shape
    T = weight_DK.shape[1] - 1
    y_BLD = torch.zeros_like(x_BLD)
    tails = []
    for b in range(B):
        fresh = [x_BLD.new_zeros(D)] * T
        past = fresh if initial is None else list(initial[b])
        for number, sequence in enumerate(_sequences(b, L, mask_BL, segments_BL)):
            past = past if number == 0 else fresh
            for t in sequence:
                taps_KD = torch.stack([*past, x_BLD[b, t]])
                y_D = (taps_KD * weight_DK.T).sum(0)
                y_D = y_D if bias_D is None else y_D + bias_D
                y_BLD[b, t] = torch.nn.functional.silu(y_D) if activation == "silu" else y_D
                past = [*past, x_BLD[b, t]][1:]
        tails.append(torch.stack(past) if T else x_BLD.new_zeros(0, D))
    return y_BLD, torch.stack(tails) if final else None
