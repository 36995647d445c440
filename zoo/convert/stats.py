"""What softmax attention does on real tokens: how far heads look back, how large their queries, keys and outputs are.

The maps a_ts are computed for a chunk of queries at a time and summed up at once, so that no (L, L) map is ever held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.mixers.attention import Attention
from zoo.mixers.base import AttentionStats
from zoo.mixers.qkv import Inputs
from zoo.ops.positions import token_positions

SCORES_AT_ONCE = 1 << 23  # float32 numbers: 32 MB


class StatsSum:
    """Sums over tokens from which the means of `AttentionStats` are made; add as many batches as there are."""

    def __init__(self) -> None:
        self.tokens = self.rows = 0
        self.sums: Tensor | None = None  # (4, H): look-back, query norm, key norm, mean square of outputs
        self.x_sum_D: Tensor | None = None

    @torch.no_grad()
    def add(self, mixer: Attention, x_NLD: Tensor) -> None:
        """Count whole rows (no padding) of an attention layer's input."""
        c = mixer.config
        positions = token_positions(x_NLD) if c.rotary is not None else None
        q_NHLK, k_NGLK, v_NGLV, _ = mixer.project(Inputs(x_NLD, None, None, positions, None))
        repeat = c.num_heads // c.kv_heads
        q, k, v = q_NHLK.float(), k_NGLK.float(), v_NGLV.float()
        N, _, L, _ = q.shape
        lookback_H, square_H = attention_moments(
            q,
            k.repeat_interleave(repeat, 1),
            v.repeat_interleave(repeat, 1),
            scale=c.softmax_scale,
            causal=c.causal,
            window=c.window,
        )
        key_norm_H = k.norm(dim=-1).sum((0, 2)).repeat_interleave(repeat)
        sums = torch.stack([lookback_H, q.norm(dim=-1).sum((0, 2)), key_norm_H, square_H])
        x_sum_D = x_NLD.float().sum((0, 1))
        self.sums = sums if self.sums is None else self.sums + sums
        self.x_sum_D = x_sum_D if self.x_sum_D is None else self.x_sum_D + x_sum_D
        self.tokens, self.rows = self.tokens + N * L, self.rows + N

    def result(self) -> AttentionStats:
        """The means. Raises ValueError where nothing was added."""
        if self.sums is None or self.x_sum_D is None:
            raise ValueError("no tokens were added")
        lookback_H, q_norm_H, k_norm_H, square_H = self.sums / self.tokens
        return AttentionStats(
            lookback_H=lookback_H,
            q_norm_H=q_norm_H,
            k_norm_H=k_norm_H,
            out_rms_H=square_H.sqrt(),
            x_mean_D=self.x_sum_D / self.tokens,
            length=self.tokens / self.rows,
        )


def attention_moments(
    q_NHLK: Tensor, k_NHLK: Tensor, v_NHLV: Tensor, *, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """Sums over rows and queries, per head: of sum_s a_ts |t - s|, and of the mean square of the output; both (H,)."""
    with torch.autocast(q_NHLK.device.type, enabled=False):
        return _moments(q_NHLK, k_NHLK, v_NHLV, scale, causal, window)


def _moments(
    q_NHLK: Tensor, k_NHLK: Tensor, v_NHLV: Tensor, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    N, H, L, _ = q_NHLK.shape
    place_L = torch.arange(L, device=q_NHLK.device)
    lookback_H, square_H = q_NHLK.new_zeros(H), q_NHLK.new_zeros(H)
    step = max(1, SCORES_AT_ONCE // (N * H * L))
    for start in range(0, L, step):
        q_NHCK = q_NHLK[:, :, start : start + step]
        C = q_NHCK.shape[2]
        end = start + C if causal else L  # later keys are not seen
        ago_CS = place_L[start : start + C, None] - place_L[:end]
        unseen_CS = ago_CS < 0 if causal else torch.zeros_like(ago_CS, dtype=torch.bool)
        if window is not None:
            unseen_CS = unseen_CS | (ago_CS.abs() >= window)
        a_NHCS = (q_NHCK @ k_NHLK[:, :, :end].mT * scale).masked_fill(unseen_CS, float("-inf")).softmax(-1)
        lookback_H += torch.einsum("nhcs,cs->h", a_NHCS, ago_CS.abs().float())
        square_H += (a_NHCS @ v_NHLV[:, :, :end]).square().mean(-1).sum((0, 2))
    return lookback_H, square_H
