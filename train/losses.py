"""Losses of distillation. All sums are in float32 (float64 for float64 inputs).

The distance of two distributions over a large vocabulary is the hot spot: `head_loss` multiplies hidden states with the
vocabulary, takes KL and cross-entropy, and goes back to the hidden states, all in blocks of tokens. So (tokens,
vocabulary) never exists as a whole, and what is kept for the backward pass is the gradient of the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 512  # tokens whose logits exist at one time, in the dtype of the product
BLOCK = 1 << 20  # numbers that are in work in float32 at one time: they stay in the cache


def relative_error(y: Tensor, target: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """||y - target||^2 / ||target||^2 over all entries, a scalar; the gradient does not reach the target.

    mask_BL: False at the positions of y (B, L, D) that are not counted.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    y, target = y.to(wide), target.detach().to(wide)
    if mask_BL is not None:
        y, target = (x.masked_fill(~mask_BL[..., None], 0) for x in (y, target))
    return (y - target).square().sum() / target.square().sum().clamp_min(1e-20)


def embedding_distance(y_BD: Tensor, target_BD: Tensor) -> Tensor:
    """1 - cosine of each sentence's embedding and the teacher's, the mean; the gradient does not reach the target."""
    wide = torch.promote_types(y_BD.dtype, torch.float32)
    return 1 - F.cosine_similarity(y_BD.to(wide), target_BD.detach().to(wide), dim=-1).mean()


def head_loss(
    h_ND: Tensor,
    w_VD: Tensor,
    bias_V: Tensor | None = None,
    *,
    teacher: tuple[Tensor, Tensor, Tensor | None] | None = None,
    targets_N: Tensor | None = None,
    kl: float = 0.0,
    ce: float = 0.0,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """kl * T^2 KL(teacher || student at temperature T) + ce * cross-entropy, from the states before the vocabulary.

    The KL is the mean over all N positions, the cross-entropy over those whose target is not negative. Where the
    vocabularies differ in size (padding), both are cut to the smaller one.

    Args:
        h_ND, w_VD, bias_V: the student's states and head.
        teacher: the teacher's states (N, D'), head (V', D') and bias; no gradient goes there.
        targets_N: int64 ids, negative where not counted.
        dtype: of the products with the vocabulary; None: the states' own.

    Returns:
        The loss, and the terms {"kl" (with its T^2), "ce"} that were computed, without weights and gradients.
    """
    if (ce and targets_N is None) or (kl and teacher is None):
        raise ValueError("kl needs the teacher's states and ce needs targets")
    V = w_VD.shape[0] if teacher is None else min(w_VD.shape[0], teacher[1].shape[0])
    t_ND, tw_VD, tb_V = (None, None, None) if teacher is None or not kl else teacher
    options = (kl, ce, float(temperature), V, dtype or h_ND.dtype)
    loss, kl_sum, ce_sum = _HeadLoss.apply(h_ND, w_VD, bias_V, t_ND, tw_VD, tb_V, targets_N, options)
    terms = {}
    if kl:
        terms["kl"] = kl_sum.detach()
    if ce:
        terms["ce"] = ce_sum.detach()
    return loss, terms


class _HeadLoss(torch.autograd.Function):
    """See `head_loss`: the gradient is computed with the loss, block by block, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        w_VD: Tensor,
        bias_V: Tensor | None,
        t_ND: Tensor | None,
        tw_VD: Tensor | None,
        tb_V: Tensor | None,
        targets_N: Tensor | None,
        options: tuple,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kl, ce, T, V, dtype = options
        with torch.autocast(h_ND.device.type, enabled=False):
            wide = torch.promote_types(h_ND.dtype, torch.float32)
            need_h, need_w, need_b = ctx.needs_input_grad[:3]
            N, count = h_ND.shape[0], 1
            if ce and targets_N is not None:
                count = max(1, int(targets_N.ge(0).sum()))
            w, tw = w_VD[:V].to(dtype), None if tw_VD is None else tw_VD[:V].to(dtype)
            grad_h = torch.zeros_like(h_ND, dtype=wide) if need_h else None
            grad_w = torch.zeros(w_VD.shape, dtype=wide, device=w_VD.device) if need_w else None
            grad_b = torch.zeros(w_VD.shape[0], dtype=wide, device=w_VD.device) if need_b else None
            sums = torch.zeros(2, dtype=wide, device=h_ND.device)
            for i in range(0, N, ROWS):
                rows = slice(i, i + ROWS)
                h = h_ND[rows].to(dtype)
                s_NV = _logits(h, w, bias_V, V)
                t_NV = None if t_ND is None else _logits(t_ND[rows].to(dtype), tw, tb_V, V)
                target = targets_N[rows] if ce and targets_N is not None else None
                _rows_loss(s_NV, t_NV, target, sums, (kl / N, ce / count, T), wide)
                if grad_h is not None:
                    grad_h[rows] = (s_NV @ w).to(wide)
                if grad_w is not None:
                    grad_w[:V] += (s_NV.T @ h).to(wide)
                if grad_b is not None:
                    grad_b[:V] += s_NV.to(wide).sum(0)
            kl_mean, ce_mean = sums[0] / N, sums[1] / count
        ctx.save_for_backward(grad_h, grad_w, grad_b)
        ctx.dtypes = (h_ND.dtype, w_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(kl_mean, ce_mean)
        return kl * kl_mean + ce * ce_mean, kl_mean, ce_mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        grads = [
            None if g is None else (g * grad.to(g.dtype)).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None)


def _logits(h_ND: Tensor, w_VD: Tensor | None, bias_V: Tensor | None, V: int) -> Tensor:
    out_NV = h_ND @ w_VD.T  # type: ignore[union-attr]
    return out_NV if bias_V is None else out_NV.add_(bias_V[:V].to(out_NV.dtype))


def _rows_loss(
    s_NV: Tensor, t_NV: Tensor | None, target_N: Tensor | None, sums: Tensor, weights: tuple, wide: torch.dtype
) -> None:
    """Add both terms of these rows to `sums`, and put the gradient of the weighted loss into `s_NV` in place."""
    kl, ce, T = weights
    step = max(1, BLOCK // s_NV.shape[1])
    for i in range(0, s_NV.shape[0], step):
        rows = slice(i, i + step)
        grad = None
        logits = s_NV[rows].to(wide)
        q, log_q_sum, shifted = _softmax(logits / T if T != 1 else logits)
        if t_NV is not None and kl:
            t = t_NV[rows].to(wide)
            p, log_p_sum, t_shifted = _softmax(t / T if T != 1 else t)
            # KL = sum p (log p - log q); the log-sums are of one row, so the large sum is of differences
            value = torch.linalg.vecdot(p, t_shifted.sub_(shifted)) - log_p_sum + log_q_sum
            sums[0] += T * T * value.sum()
            grad = (q - p if ce and T == 1 else torch.sub(q, p, out=p)).mul_(kl * T)
        if ce and target_N is not None:
            if T != 1:
                q, log_q_sum, shifted = _softmax(logits)
            target = target_N[rows]
            place, counted = target.clamp_min(0)[:, None], target >= 0
            value = log_q_sum - shifted.gather(1, place)[:, 0]
            sums[1] += value[counted].sum()
            q.scatter_add_(1, place, torch.full_like(place, -1, dtype=wide)).mul_(ce * counted[:, None].to(wide))
            grad = q if grad is None else grad.add_(q)
        s_NV[rows] = grad if grad is not None else 0


def _softmax(x_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(softmax, log of the sum of exponentials of the shifted rows, shifted rows)."""
    shifted = x_NV - x_NV.amax(1, keepdim=True)
    e = shifted.exp()
    total = e.sum(1, keepdim=True)
    return e.div_(total), total[:, 0].log(), shifted
