"""Nystrom attention: softmax attention from a few landmarks (Xiong et al. 2021, arXiv 2102.03902).

    softmax(Q K^T) V  ~  softmax(Q K~^T)  softmax(Q~ K~^T)^+  softmax(Q~ K^T) V

with Q~, K~ the means of M pieces of the queries and keys (section 3.2.1: segment means), and the pseudo-inverse by the
iteration of Razavi et al. (2014), which converges with the third order (equations 11 and 12):

    Z <- 1/4 Z (13 I - A Z (15 I - A Z (7 I - A Z))),    Z_0 = A^T / (|A|_1 |A|_inf)

The paper cuts n tokens into M pieces of n / M; where M does not divide n, piece j holds the tokens t with
floor(t M / n) = j, so sizes differ by at most one. With n <= M every token is its own landmark and the formula is
softmax attention itself, which is then computed as such (so does the authors' code for n = M).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.attention import attention, check_heads
from zoo.ops.backends import no_autocast


def nystrom_attention(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    *,
    landmarks: int,
    iterations: int = 6,
    scale: float | None = None,
    length_B: Tensor | None = None,
) -> Tensor:
    """Nystrom approximation of two-sided softmax attention: y_BHLV in the dtype of v.

    Args:
        q_BHLK, k_BGLK, v_BGLV: H = R*G query heads; query head h reads key/value head h // R. Sums are in float32
            (float64 for float64).
        landmarks: M. iterations: of the pseudo-inverse.
        scale: of the scores; K ** -0.5 by default.
        length_B: tokens of each row, which stand at its front; what is behind them is neither read nor returned
            (zeros are). None: all rows are full.

    Raises ConfigError where the shapes do not fit.
    """
    check_heads(q_BHLK, k_BGLK, v_BGLV)
    L, K = q_BHLK.shape[2:]
    scale = K**-0.5 if scale is None else scale
    mask_BL = None if length_B is None else torch.arange(L, device=q_BHLK.device) < length_B[:, None]
    with no_autocast(q_BHLK):
        dtype = torch.promote_types(torch.promote_types(q_BHLK.dtype, v_BGLV.dtype), torch.float32)
        q, k, v = (x.to(dtype) for x in (q_BHLK, k_BGLK, v_BGLV))
        # A graph that leaves torch has one form for all lengths; there every row is looked at by itself, below.
        if not (torch.compiler.is_exporting() and mask_BL is not None) and landmarks >= L:
            return attention(q, k, v, causal=False, scale=scale, mask_BS=mask_BL).to(v_BGLV.dtype)
        if mask_BL is not None:
            q, k, v = (x.masked_fill(~mask_BL[:, None, :, None], 0) for x in (q, k, v))
        y_BHLV = _from_landmarks(q, k, v, landmarks, iterations, scale, length_B, mask_BL)
        if mask_BL is None:
            return y_BHLV.to(v_BGLV.dtype)
        assert length_B is not None
        short_B = length_B <= landmarks  # rows whose tokens are their own landmarks
        if torch.compiler.is_compiling() or bool(short_B.any()):  # a look at the values would be a graph break
            exact_BHLV = attention(q, k, v, causal=False, scale=scale, mask_BS=mask_BL)
            y_BHLV = torch.where(short_B[:, None, None, None], exact_BHLV, y_BHLV)
        return y_BHLV.masked_fill(~mask_BL[:, None, :, None], 0).to(v_BGLV.dtype)


def _from_landmarks(q_BHLK, k_BGLK, v_BGLV, M: int, iterations: int, scale: float, length_B, mask_BL) -> Tensor:
    """The three kernels and their product; the R query heads of a key head are rows of one product where they can."""
    B, H, L, K = q_BHLK.shape
    G = k_BGLK.shape[1]
    pieces_BML = _pieces(L, M, length_B, q_BHLK)
    q_BHMK, k_BGMK = pieces_BML[:, None] @ q_BHLK, pieces_BML[:, None] @ k_BGLK
    q_BGXK, q_BGYK = (x.reshape(B, G, -1, K) * scale for x in (q_BHLK, q_BHMK))  # X = R * L rows, Y = R * M
    to_landmarks = (q_BGXK @ k_BGMK.mT).softmax(-1)
    between = (q_BGYK @ k_BGMK.mT).softmax(-1).view(B, H, M, M)
    scores_BGYL = q_BGYK @ k_BGLK.mT
    if mask_BL is not None:  # not -inf: a row without any token would become NaN
        scores_BGYL = scores_BGYL.masked_fill(~mask_BL[:, None, None], torch.finfo(scores_BGYL.dtype).min)
    from_landmarks = scores_BGYL.softmax(-1) @ v_BGLV
    core_BHMV = pseudo_inverse(between, iterations) @ from_landmarks.view(B, H, M, -1)
    return to_landmarks.view(B, H, L, M) @ core_BHMV


def _pieces(L: int, M: int, length_B: Tensor | None, like: Tensor) -> Tensor:
    """(B or 1, M, L): row j takes the mean of piece j of each row's tokens. An empty piece, which only a row with fewer
    tokens than landmarks has, is zero."""
    length_B = torch.full((1,), L, device=like.device) if length_B is None else length_B
    place_L = torch.arange(L, device=like.device)
    piece_BL = place_L * M // length_B[:, None].clamp(min=1)  # those behind the end get M and more
    taken = F.one_hot(piece_BL.clamp(max=M), M + 1)[..., :M].mT.to(like.dtype)
    return taken / taken.sum(-1, keepdim=True).clamp(min=1)


def pseudo_inverse(a: Tensor, iterations: int = 6) -> Tensor:
    """The Moore-Penrose inverse of matrices (..., M, M) with rows that sum to one, by `iterations` third-order steps.

    Every matrix starts from its own |A|_1 (the largest column sum), so that no row of a batch depends on another.
    """
    z = a.mT / (a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1))[..., None, None]
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z


def nystrom_attention_reference(
    q_HLK: Tensor, k_HLK: Tensor, v_HLV: Tensor, *, landmarks: int, iterations: int = 6, scale: float = 1.0
) -> Tensor:
    """One full sequence, one head after another, piece after piece, as the paper's algorithm 1 writes it."""
    outputs = []
    for q, k, v in zip(q_HLK, k_HLK, v_HLV, strict=True):
        n = q.shape[0]
        if n <= landmarks:
            outputs.append((scale * q @ k.T).softmax(-1) @ v)
            continue
        owners = [t * landmarks // n for t in range(n)]
        pieces = [[t for t in range(n) if owners[t] == j] for j in range(landmarks)]
        q_means, k_means = (torch.stack([x[piece].mean(0) for piece in pieces]) for x in (q, k))
        inner = (scale * q_means @ k_means.T).softmax(-1)
        z = inner.T / inner.sum(0).max()
        identity = torch.eye(landmarks, dtype=q.dtype, device=q.device)
        for _ in range(iterations):
            z = z @ (13 * identity - inner @ z @ (15 * identity - inner @ z @ (7 * identity - inner @ z))) / 4
        outputs.append((scale * q @ k_means.T).softmax(-1) @ z @ ((scale * q_means @ k.T).softmax(-1) @ v))
    return torch.stack(outputs)
