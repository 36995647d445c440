"""Two-sided attention through positive random features, in blocks that stay in the cache (Choromanski et al. 2021,
arXiv 2009.14794).

    y_t = sum_s (phi(q_t) . phi(k_s)) v_s  /  sum_s phi(q_t) . phi(k_s)  =  phi(q_t) W / phi(q_t) w
    softmax:  phi(x)_j = exp(p_j . x - |x|^2 / 2 - max p . x) + eps,   the maximum of a query's own, of all keys'
    ReLU:     phi(x)_j = relu(p_j . x) + eps

with q and k times scale ** 1/2. With eps = 0 whatever is the same for all features of a query cancels, and |q|^2 / 2 is
left out; the maximum over the keys is then that of p_i . k - |k|^2 / 2.

The features are M numbers for each of L positions and each head, far more than q, k and v: to write them out, and their
gradients, takes longer than the products. So each block of positions has its features made, used and forgotten; the
gradient makes them again. The maximum over the keys runs along as in online softmax: what is summed so far shrinks
with it. With an eps, beside which it does not cancel, it is part of the gradient.

Shapes: B batch, H query heads, G key/value heads, H = R * G, L positions, K and V head sizes, M features, n positions
of a block, X = R * n.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import ConfigError
from zoo.ops.backends import no_autocast

OP = "random_feature_attention"
LOWEST = -1e30  # the running maximum before the first key; finite, so that differences are
LEAST = 1e-30  # what a sum of weights is at least: sums of stabilised features may be small and right
_ROOM = 1 << 19  # features at a time on a CPU: two megabytes in float32


def random_feature_attention(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    projection_MK: Tensor,
    *,
    kernel: Literal["softmax", "relu"] = "softmax",
    scale: float | None = None,
    eps: float = 0.0,
    mask_BL: Tensor | None = None,
) -> Tensor:
    """y (B, H, L, V) in the dtype of v; sums are kept in float32 (float64 for float64).

    Args:
        projection_MK: the p_j; gets no gradient.
        scale: of the product of query and key; K ** -0.5 by default.
        mask_BL: bool, True = real token; other keys do not count, and must be finite.

    Raises ConfigError for shapes that do not fit together.
    """
    (B, H, L, K), G = q_BHLK.shape, k_BGLK.shape[1]
    if k_BGLK.shape != (B, G, L, K) or v_BGLV.shape[:3] != (B, G, L) or H % G or projection_MK.shape[1] != K:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_BHLK, k_BGLK, v_BGLV, projection_MK))
        raise ConfigError(f"{OP}: expected (B, H, L, K), (B, G, L, K), (B, G, L, V) and (M, K); got {shapes}")
    scale = K**-0.5 if scale is None else scale
    with no_autocast(q_BHLK):
        return _Attention.apply(q_BHLK, k_BGLK, v_BGLV, projection_MK, mask_BL, kernel == "softmax", scale, eps)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, projection, mask, softmax: bool, scale: float, eps: float) -> Tensor:
        (B, H, L, _), G, V = q.shape, k.shape[1], v.shape[-1]
        dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
        p_MK = projection.to(dtype) * scale**0.5
        W_BGMV, peak_BG, row_BG = _write(k, v, p_MK, mask, softmax, scale, eps)
        constant_BG1V = eps * W_BGMV.sum(2, keepdim=True)
        y_BLHV, weight_BHL1 = v.new_empty(B, L, H, V), p_MK.new_empty(B, H, L, 1)
        for start, stop in _blocks(q, p_MK):
            e_BGXM = _query_features(_queries(q, G, start, stop, dtype), p_MK, softmax, scale, eps)[0]
            read_BHnV = (e_BGXM @ W_BGMV).add_(constant_BG1V).view(B, H, stop - start, V + 1)
            weight_BHL1[:, :, start:stop] = read_BHnV[..., V:].clamp(min=LEAST)
            y_BLHV[:, start:stop] = (read_BHnV[..., :V] / weight_BHL1[:, :, start:stop]).transpose(1, 2)
        y_BHLV = y_BLHV.transpose(1, 2)
        ctx.save_for_backward(q, k, v, p_MK, mask, y_BHLV, weight_BHL1, W_BGMV, peak_BG, row_BG)
        ctx.options = softmax, scale, eps
        return y_BHLV

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, p_MK, mask, y, weight, W_BGMV, peak_BG, row_BG = ctx.saved_tensors
        with no_autocast(q):
            dq, dW_BGMV = _query_gradients(q, p_MK, dy, y, weight, W_BGMV, *ctx.options)
            dk, dv = _key_gradients(k, v, p_MK, mask, dW_BGMV, peak_BG, row_BG, *ctx.options)
        return dq, dk, dv, None, None, None, None, None


def _write(k, v, p_MK, mask, softmax: bool, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """W and w side by side (B, G, M, V + 1), the largest exponent of each sequence (B, G) and at which key it is."""
    W_BGVM = p_MK.new_zeros(*k.shape[:2], v.shape[-1] + 1, len(p_MK))
    total_BGV1 = torch.zeros_like(W_BGVM[..., :1])
    peak_BG, row_BG = W_BGVM.new_full(k.shape[:2], LOWEST), k.new_zeros(k.shape[:2], dtype=torch.long)
    for start, stop in _blocks(k, p_MK):
        k_BGnK, v_BGnV, mask_B1n1 = _keys(k, v, mask, start, stop, p_MK.dtype)
        e_BGnM = k_BGnK @ p_MK.mT
        if softmax:
            half = (scale / 2) * k_BGnK.square().sum(-1, keepdim=True)
            top_BGn1 = (e_BGnM if eps else e_BGnM.sub_(half)).amax(-1, keepdim=True)
            if mask_B1n1 is not None:
                top_BGn1 = top_BGn1.masked_fill(~mask_B1n1, LOWEST)
            top_BG, at_BG = top_BGn1[..., 0].max(-1)
            higher, before = top_BG > peak_BG, peak_BG
            peak_BG, row_BG = torch.where(higher, top_BG, peak_BG), torch.where(higher, at_BG + start, row_BG)
            W_BGVM *= (before - peak_BG).exp()[..., None, None]
            shift = peak_BG[..., None, None]
            e_BGnM = e_BGnM.sub_(half + shift if eps else shift).exp_()
        else:
            e_BGnM = e_BGnM.relu_()
        _add_product(W_BGVM, v_BGnV.mT, _only(e_BGnM, mask_B1n1))
        total_BGV1 += v_BGnV.sum(2)[..., None]
    return W_BGVM.add_(eps * total_BGV1).mT.contiguous(), peak_BG, row_BG


def _query_gradients(q, p_MK, dy, y, weight_BHL1, W_BGMV, softmax: bool, scale: float, eps: float):
    """Gradients of the queries and of W."""
    (B, H, _, K), G = q.shape, W_BGMV.shape[1]
    dq, dW_BGVM = _room(q), torch.zeros_like(W_BGMV.mT, memory_format=torch.contiguous_format)
    total_BGV1 = torch.zeros_like(dW_BGVM[..., :1])
    with_sums = F.pad(p_MK, (0, 1), value=1.0)  # the last column sums over the features
    for start, stop in _blocks(q, p_MK):
        q_BGXK = _queries(q, G, start, stop, p_MK.dtype)
        e_BGXM, best_BGX = _query_features(q_BGXK, p_MK, softmax, scale, eps, best=True)
        weight_BHn1 = weight_BHL1[:, :, start:stop]
        dread = dy[:, :, start:stop] / weight_BHn1
        dweight = (dread * y[:, :, start:stop]).sum(-1, keepdim=True).neg_().masked_fill_(weight_BHn1 <= LEAST, 0)
        dread_BGXV = torch.cat([dread, dweight], -1).to(p_MK.dtype).view(B, G, -1, W_BGMV.shape[-1])
        _add_product(dW_BGVM, dread_BGXV.mT, e_BGXM)
        total_BGV1 += dread_BGXV.sum(2)[..., None]
        slope_BGXM = (dread_BGXV @ W_BGMV.mT).mul_(e_BGXM if softmax else e_BGXM.sign_())
        back_BGXK, sum_BGX1 = (slope_BGXM @ with_sums).split([K, 1], -1)
        if softmax and eps:
            back_BGXK = back_BGXK - sum_BGX1 * (scale * q_BGXK + p_MK[best_BGX])
        dq[:, :, start:stop] = back_BGXK.reshape(B, H, -1, K)
    return dq, dW_BGVM.add_(eps * total_BGV1).mT.contiguous()


def _key_gradients(k, v, p_MK, mask, dW_BGMV, peak_BG, row_BG, softmax: bool, scale: float, eps: float):
    """Gradients of keys and values."""
    K, V = k.shape[-1], v.shape[-1]
    dk, dv, dpeak_BG = _room(k), _room(v), torch.zeros_like(peak_BG)
    constant_BG1V = eps * dW_BGMV[..., :V].sum(2, keepdim=True)
    with_sums = F.pad(p_MK, (0, 1), value=1.0)
    for start, stop in _blocks(k, p_MK):
        k_BGnK, v_BGnV, mask_B1n1 = _keys(k, v, mask, start, stop, p_MK.dtype)
        e_BGnM = k_BGnK @ p_MK.mT
        if softmax:
            half = (scale / 2) * k_BGnK.square().sum(-1, keepdim=True)
            e_BGnM = e_BGnM.sub_(half + peak_BG[..., None, None]).exp_()
        else:
            e_BGnM = e_BGnM.relu_()
        e_BGnM = _only(e_BGnM, mask_B1n1)
        slope_BGnM = v_BGnV @ dW_BGMV.mT
        slope_BGnM = slope_BGnM.mul_(e_BGnM if softmax else e_BGnM.sign())
        back_BGnK, sum_BGn1 = (slope_BGnM @ with_sums).split([K, 1], -1)
        dk[:, :, start:stop] = back_BGnK - scale * sum_BGn1 * k_BGnK if softmax else back_BGnK
        dpeak_BG -= sum_BGn1.sum((2, 3))
        dv[:, :, start:stop] = _only((e_BGnM @ dW_BGMV[..., :V]).add_(constant_BG1V), mask_B1n1)
    if softmax and eps:
        at_BG1K = row_BG[..., None, None].expand(-1, -1, 1, K)
        best_BG1 = (k.gather(2, at_BG1K).to(p_MK.dtype) @ p_MK.mT).argmax(-1)
        dk.scatter_add_(2, at_BG1K, (dpeak_BG[..., None, None] * p_MK[best_BG1]).to(dk.dtype))
    return dk, dv


def _query_features(q_BGXK, p_MK, softmax: bool, scale: float, eps: float, best: bool = False):
    """The features of queries without the eps, and if asked (and of use) which one is the largest."""
    e_BGXM, best_BGX = q_BGXK @ p_MK.mT, None
    if not softmax:
        return e_BGXM.relu_(), None
    if best and eps:
        shift_BGX1, best_BGX = e_BGXM.max(-1, keepdim=True)
        best_BGX = best_BGX[..., 0]
    else:
        shift_BGX1 = e_BGXM.amax(-1, keepdim=True)
    if eps:
        shift_BGX1 = shift_BGX1 + (scale / 2) * q_BGXK.square().sum(-1, keepdim=True)
    return e_BGXM.sub_(shift_BGX1).exp_(), best_BGX


def _queries(q_BHLK: Tensor, G: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The queries of a block, those of one key head beside each other: (B, G, X, K)."""
    B, _, _, K = q_BHLK.shape
    return q_BHLK[:, :, start:stop].to(dtype).reshape(B, G, -1, K)


def _keys(k, v, mask_BL, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values with a one behind them, and the mask of a block; values at padding are zero."""
    mask_B1n1 = None if mask_BL is None else mask_BL[:, None, start:stop, None]
    v_BGnV = F.pad(v[:, :, start:stop].to(dtype), (0, 1), value=1.0)
    return k[:, :, start:stop].to(dtype), _only(v_BGnV, mask_B1n1), mask_B1n1


def _add_product(sum_BGVM: Tensor, a_BGVn: Tensor, b_BGnM: Tensor) -> None:
    """sum += a b, in place."""
    sum_BGVM.flatten(0, 1).baddbmm_(a_BGVn.flatten(0, 1), b_BGnM.flatten(0, 1))


def _only(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask, 0)


def _room(x_BHLK: Tensor) -> Tensor:
    """An empty tensor for the gradient of heads that a projection made: positions first in memory."""
    B, H, L, K = x_BHLK.shape
    return x_BHLK.new_empty(B, L, H, K).transpose(1, 2)


def _blocks(x_BHLK: Tensor, p_MK: Tensor) -> list[tuple[int, int]]:
    """The positions in blocks whose features fit into the cache; all at once on a GPU and in one graph."""
    B, H, L, _ = x_BHLK.shape
    if x_BHLK.device.type != "cpu" or torch.compiler.is_compiling():
        return [(0, L)]
    step = max(16, _ROOM // (B * H * len(p_MK)))
    return [(start, min(start + step, L)) for start in range(0, L, step)]


def random_feature_attention_reference(
    q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, projection_MK: Tensor, kernel: str, eps: float, mask_BL: Tensor
) -> Tensor:
    """The formulas of the module docstring, with every pair of a query and a key."""
    K = q_BHLK.shape[-1]
    k_BHLK, v_BHLV = (x.repeat_interleave(q_BHLK.shape[1] // x.shape[1], 1) for x in (k_BGLK, v_BGLV))
    q, k = (x * K**-0.25 for x in (q_BHLK, k_BHLK))
    q_dash, k_dash = q @ projection_MK.mT, k @ projection_MK.mT
    if kernel == "softmax":
        seen = k_dash.masked_fill(~mask_BL[:, None, :, None], LOWEST)
        q = (q_dash - q.square().sum(-1, keepdim=True) / 2 - q_dash.amax(-1, keepdim=True)).exp() + eps
        k = (k_dash - k.square().sum(-1, keepdim=True) / 2 - seen.amax((-1, -2), keepdim=True)).exp() + eps
    else:
        q, k = q_dash.relu() + eps, k_dash.relu() + eps
    weights_BHLS = (q @ k.mT).masked_fill(~mask_BL[:, None, None], 0)
    return weights_BHLS @ v_BHLV / weights_BHLS.sum(-1, keepdim=True).clamp(min=LEAST)
