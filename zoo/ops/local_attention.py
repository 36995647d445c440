"""Attention between neighbouring chunks of a sequence: the local layers of the published Reformers (Kitaev et al.
2020, arXiv:2001.04451).

A sequence is cut into chunks of C tokens. A query in chunk i sees the chunks i - before .. i + after, in the causal
form up to its own position. In the two-sided form the chunks stand in a ring, as in transformers: the first looks back
at the last. Cost grows with L * C.

Shapes: B batch, L positions, H = R * G query heads, G key/value heads, K and V head sizes, N chunks, C chunk,
J chunks that a chunk looks at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.attention import check_heads
from zoo.ops.backends import autocast_dtype
from zoo.ops.padding import take


def local_attention(
    q_BHLK: Tensor,
    k_BGLK: Tensor,
    v_BGLV: Tensor,
    *,
    chunk: int,
    before: int = 1,
    after: int = 0,
    causal: bool = True,
    scale: float | None = None,
    length_B: Tensor | None = None,
) -> Tensor:
    """Chunked local attention; returns y_BHLV.

    length_B: real tokens of each row, which stand first; what is behind them must be finite and returns 0.
    In a ring of few chunks a chunk may come twice; it then counts twice, as in transformers.

    Raises ConfigError where shapes do not fit.
    """
    check_heads(q_BHLK, k_BGLK, v_BGLV)
    (b, h, length, _), g = q_BHLK.shape, k_BGLK.shape[1]
    n = -(-length // chunk)
    q, k, v = (F.pad(x, (0, 0, 0, n * chunk - length)) for x in (q_BHLK, k_BGLK, v_BGLV))
    if (dtype := autocast_dtype(q)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    ends_B = torch.full((1,), length, device=q.device) if length_B is None else length_B
    look_BNJ, visible_BNCS = _who_sees_whom(ends_B, n, chunk, before, after, causal)
    index_BN = look_BNJ.flatten(1).expand(b, -1)

    def near(x_BGTX: Tensor) -> Tensor:
        """(B, G, N * C, X) -> (B * N, G, J * C, X)."""
        chunks = x_BGTX.unflatten(2, (n, chunk)).flatten(3)
        return take(chunks, index_BN, 2).view(b, g, n, -1, x_BGTX.shape[-1]).transpose(1, 2).flatten(0, 1)

    y = F.scaled_dot_product_attention(
        q.unflatten(2, (n, chunk)).transpose(1, 2).flatten(0, 1),
        near(k),
        near(v),
        attn_mask=visible_BNCS.expand(b, -1, -1, -1).flatten(0, 1)[:, None],
        scale=scale,
        enable_gqa=h != g,
    )
    y_BHLV = y.unflatten(0, (b, n)).transpose(1, 2).flatten(2, 3)[:, :, :length]
    if length_B is None:
        return y_BHLV
    real_BL = torch.arange(length, device=q.device) < length_B[:, None]
    return y_BHLV.masked_fill(~real_BL[:, None, :, None], 0)


def _who_sees_whom(ends_B: Tensor, n: int, chunk: int, before: int, after: int, causal: bool) -> tuple[Tensor, Tensor]:
    """The chunks that each chunk looks at (B, N, J), and which of their S = J * C tokens each query sees."""
    device = ends_B.device
    look_NJ = torch.arange(n, device=device)[:, None] + torch.arange(-before, after + 1, device=device)
    if causal:
        exists_NJ, look_BNJ = look_NJ >= 0, look_NJ.clamp(min=0).expand(ends_B.shape[0], -1, -1)
    else:
        exists_NJ, look_BNJ = None, look_NJ % (-(-ends_B // chunk)).clamp(min=1)[:, None, None]
    own_NC1 = torch.arange(n * chunk, device=device).view(n, chunk, 1)
    seen_BNJC = look_BNJ[..., None] * chunk + torch.arange(chunk, device=device)
    real_BNJC = seen_BNJC < ends_B[:, None, None, None]
    if exists_NJ is not None:
        real_BNJC = real_BNJC & exists_NJ[..., None]
    seen_BN1S, real_BN1S = seen_BNJC.flatten(2)[:, :, None], real_BNJC.flatten(2)[:, :, None]
    # Behind the end of a row there may be nothing to see; such a query sees all, for a softmax over nothing is NaN.
    real_BN1S = real_BN1S | ~real_BN1S.any(-1, keepdim=True)
    visible = real_BN1S & (seen_BN1S <= own_NC1) if causal else real_BN1S.expand(-1, -1, chunk, -1)
    return look_BNJ, visible
