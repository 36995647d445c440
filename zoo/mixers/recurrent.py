"""What the mixers with a matrix as their state share: the recurrence, its two-sided form, where decays start.

S_t = diag(a_t) S_{t-1} + k_t v_t^T          y_t = scale * S_t^T q_t
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from zoo import ops
from zoo.mixers.base import AttentionStats, AttentionWeights
from zoo.mixers.qkv import Inputs, QKVMixer, QKVOptions

LN2 = math.log(2.0)
SOFTPLUS_ONE = math.log(math.expm1(1.0))  # softplus(SOFTPLUS_ONE) == 1

FeatureMap = Literal["elu", "relu", "softmax"]


class RecurrentMixer(QKVMixer):
    """Base of the mixers whose state is one matrix (K, V) per key/value head."""

    averages_values = False
    normalizer = False  # whether the state has one more column, the normaliser z

    @property
    def state_key_dim(self) -> int:
        """Head size of the keys as the state sees them."""
        return self.config.head_dim

    @property
    def state_heads(self) -> int:
        """How many matrices the state has."""
        return self.config.kv_heads

    def recur(
        self,
        q_BHLK: Tensor,
        k_BGLK: Tensor,
        v_BGLV: Tensor,
        inputs: Inputs,
        log_decay: Tensor | None = None,
        scale: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`ops.linear_recurrence` from the carried state to the next."""
        state = inputs.state
        y_BHLV, final = ops.linear_recurrence(
            q_BHLK,
            k_BGLK,
            v_BGLV,
            log_decay,
            scale=scale,
            normalize=self.normalizer,
            initial=None if state is None else state["kv"],
            final=state is not None,
            mask_BL=inputs.mask_BL,
            segments_BL=inputs.segments_BL,
        )
        return y_BHLV, {} if final is None else {"kv": final}

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        c, dtype = self.config, torch.promote_types(dtype, torch.float32)
        shape = (batch_size, self.state_heads, self.state_key_dim, c.value_dim + self.normalizer)
        return {"kv": torch.zeros(shape, device=device, dtype=dtype)}


def two_sided(
    q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs, log_decay_G: Tensor | None = None
) -> Tensor:
    """sum_s a^|t-s| (q_t . k_s) v_s over all s: both directions, less the step itself, which both have counted."""
    mask_BL, segments_BL = inputs.mask_BL, inputs.segments_BL
    ahead, _ = ops.linear_recurrence(q_BHLK, k_BGLK, v_BGLV, log_decay_G, mask_BL=mask_BL, segments_BL=segments_BL)
    back, _ = ops.linear_recurrence(
        q_BHLK.flip(2),
        k_BGLK.flip(2),
        v_BGLV.flip(2),
        log_decay_G,
        mask_BL=None if mask_BL is None else mask_BL.flip(1),
        segments_BL=None if segments_BL is None else segments_BL.flip(1),
    )
    (B, G, L, K), V = k_BGLK.shape, v_BGLV.shape[-1]
    own_BGRL1 = (q_BHLK.reshape(B, G, -1, L, K) * k_BGLK[:, :, None]).sum(-1, keepdim=True)
    own_BHLV = (own_BGRL1 * v_BGLV[:, :, None]).reshape(B, -1, L, V)
    if mask_BL is not None:
        own_BHLV = own_BHLV.masked_fill(~mask_BL[:, None, :, None], 0)
    return ahead + back.flip(2) - own_BHLV


def feature_map(name: str | None, x: Tensor) -> Tensor:
    """Positive features of queries or keys, in at least float32: "elu" is elu + 1, "softmax" is over the head, None
    leaves them as they are.

    What starts from attention needs them where scores are not weights: softmax weights are positive, the products of
    plain queries and keys are as often negative, so that sums of values have nothing in common with attention's means.
    """
    if name is None:
        return x
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if name == "elu":
        return x.clamp(max=0).exp() + x.relu()  # elu(x) + 1 without the cancellation at x << 0
    return x.relu() if name == "relu" else x.softmax(-1)


def softmax_features(attention: AttentionWeights) -> dict[str, Any]:
    """Options of a converted mixer: features, and a scale that brings their products, about 1 / head_dim, to one, far
    above the eps of the norm behind them."""
    return {"feature_map": "softmax", "scale": float(attention.head_dim)}


def lookback(attention: AttentionWeights, stats: AttentionStats | None, heads: int) -> Tensor:
    """The half-life in tokens at which each of `heads` decays starts: the measured look-back, at least one token.

    A key/value head takes the mean over its query heads. Without measurements the half-lives are spread over the heads,
    from 8 to 1024 tokens in equal ratios.
    """
    if stats is None:
        return 2 ** torch.linspace(3, 10, heads, device=attention.q_HKD.device)
    return stats.lookback_H.float().view(heads, -1).mean(1).clamp(min=1.0)


def half_life_of_average(lookback_H: Tensor, length: float, most: float = 16.0) -> Tensor:
    """The half-life (H) at which a fading average of what there is so far looks back so many tokens, in the mean over
    the positions of a sequence; at least one token and at most `most` lengths.

    Where nothing fades that is (length - 1) / 4: a half-life of as many tokens would forget what attention does not.
    """
    age_L = torch.arange(max(1, round(length)), dtype=torch.double, device=lookback_H.device)
    # Halving the interval in which the logarithm of 1 / half-life lies.
    low_H = torch.full_like(lookback_H, -math.log(most * length), dtype=torch.double)
    high_H = torch.zeros_like(low_H)
    for _ in range(40):
        middle_H = (low_H + high_H) / 2
        weight_HL = torch.exp2(-middle_H.exp()[:, None] * age_L)
        far_H = (weight_HL * age_L).cumsum(1).div(weight_HL.cumsum(1)).mean(1) > lookback_H
        low_H, high_H = torch.where(far_H, middle_H, low_H), torch.where(far_H, high_H, middle_H)
    return (-high_H).exp().float()


def first_order_share(attention: AttentionWeights, stats: AttentionStats | None) -> Tensor:
    """How much of its scores s each query head (H) can add to the weights 1 + s of an average: at most all, and no more
    than leaves typical weights positive.

    Softmax to first order is 1 + s, but only for small scores, and what has no denominator cannot make up for large
    ones. |s| is at most scale |q| |k|, with the measured norms or those of inputs of unit variance.
    """
    a = attention
    if stats is not None:
        return (1 / (a.scale * stats.q_norm_H * stats.k_norm_H).float().clamp(min=1e-6)).clamp(max=1.0)
    squares = []
    for weight, bias, heads in ((a.q_HKD, a.q_bias, a.num_heads), (a.k_GKD, a.k_bias, a.num_kv_heads)):
        rows = weight.float().square().sum(1) + (0 if bias is None else bias.float().square())
        squares.append(rows.view(heads, -1).sum(1).repeat_interleave(a.num_heads // heads))
    return (1 / (a.scale * (squares[0] * squares[1]).sqrt()).clamp(min=1e-6)).clamp(max=1.0)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


class GroupedOptions(QKVOptions):
    """Options of mixers in which several value heads may share one head of queries and keys.

    num_groups: heads of queries and keys; each serves num_heads / num_groups value heads, and every value head has a
    state of its own. None is the arrangement of attention: num_heads query heads over num_kv_heads states.
    """

    num_groups: int | None = Field(None, ge=1, le=1024)

    @model_validator(mode="after")
    def _groups_divide(self) -> GroupedOptions:
        if self.num_groups is None:
            return self
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_heads ({self.num_heads}) is not a multiple of num_groups ({self.num_groups})")
        if self.kv_heads != self.num_heads:
            raise ValueError("num_groups and num_kv_heads exclude each other: groups share keys, not states")
        return self


def grouped_heads(config: GroupedOptions) -> tuple[int, int, int]:
    """Heads of queries, keys and values that the projections make."""
    if config.num_groups is None:
        return config.num_heads, config.kv_heads, config.kv_heads
    return config.num_groups, config.num_groups, config.num_heads


def spread_groups(config: GroupedOptions, q_BHLK: Tensor, k_BGLK: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys repeated for every value head of their group."""
    if config.num_groups is None or config.num_groups == config.num_heads:
        return q_BHLK, k_BGLK
    times = config.num_heads // config.num_groups
    return q_BHLK.repeat_interleave(times, 1), k_BGLK.repeat_interleave(times, 1)


def inverse_softplus_times(low: float, high: float, shape: tuple[int, ...], floor: float = 1e-4) -> Tensor:
    """softplus^-1 of step sizes drawn evenly on a logarithmic scale from [low, high] (Mamba's `dt_bias`)."""
    steps = torch.exp(torch.rand(shape) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return steps + torch.log(-torch.expm1(-steps))


def softplus32(x: Tensor, bias: Tensor) -> Tensor:
    """softplus(x + bias) in at least float32, whatever autocast says."""
    return F.softplus(x.to(torch.promote_types(x.dtype, torch.float32)) + bias)
