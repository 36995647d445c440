"""RWKV-7 "Goose" (Peng et al. 2025, arXiv 2503.14456): a generalised delta rule with learning rates per channel.

    x^n_t = x_t + (x_{t-1} - x_t) * mu_n                                                   n = r, w, k, v, a, g
    r, k, v = W_r x^r, W_k x^k, W_v x^v          log w_t = -e^(-1/2) sigmoid(w_0 + W_2 tanh(W_1 x^w))
    a_t   = sigmoid(a_0 + A_2 A_1 x^a)           v_t <- v_t + (v'_t - v_t) * sigmoid(v_0 + V_2 V_1 x^v)
    c_t   = normalised(k_t * xi)                 k_t <- k_t * (1 + (a_t - 1) * alpha)
    S_t   = (diag(w_t) - (a_t * c_t) c_t^T) S_{t-1} + k_t v_t^T                            y_t = S_t^T r_t
    out_t = W_o ((norm(y_t) + (r_t . (rho * k_t)) v_t) * g_t)                              g_t = G_2 sigmoid(G_1 x^g)

The in-context learning rate a says per channel how much of what the state answers to the removal key c is taken away;
v' are the values of the model's first RWKV-7 layer at the same token. The norm is over each head, with weight and bias;
the receptance r is what attention calls the query. The state is one matrix (K, V) per key/value head and the last
input.

Conversion (after Goldstein et al. 2025, RADLADS, arXiv 2505.03005): W_r, W_k, W_v, W_o from attention with its heads,
biases and rotary positions, no shift, every channel with the measured look-back as half-life, alpha = 0 and a small a,
so that keys are written whole and little is removed, no bonus rho, no first values, gate open, the scale of attention's
outputs in W_o; softmax features on r and k keep the products positive, as in `gated_linear_attention`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init

from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs
from zoo.mixers.recurrent import LN2, lookback
from zoo.mixers.rwkv import Bottleneck, RWKVMixer, RWKVOptions, depth, first_values, ramp, ramp_to_one
from zoo.ops.generalized_delta import generalized_delta_rule
from zoo.registry import register_mixer

USES = "rwkvag"
FASTEST = math.exp(-0.5)  # the strongest log decay of a step
SMALL = 0.02  # of what a conversion starts with as next to nothing


class RWKV7Config(RWKVOptions):
    """Options of `rwkv7`; the defaults are the published block.

    decay_rank, rate_rank, value_rank, gate_rank: sizes of the bottlenecks; None is the authors' rule, 2.5, 2.5, 1.7 and
    5 times the root of the width, rounded to 32s. value_residual: mix in the values of the first layer.
    """

    name: Literal["rwkv7"] = "rwkv7"
    gate_bias: Literal[False] = False
    decay_rank: int | None = Field(None, ge=1, le=4096)
    rate_rank: int | None = Field(None, ge=1, le=4096)
    value_rank: int | None = Field(None, ge=1, le=4096)
    gate_rank: int | None = Field(None, ge=1, le=4096)
    value_residual: bool = True

    def resolved(self, width: int) -> Self:
        """With the sizes of the bottlenecks written out."""
        factors = {"decay_rank": 2.5, "rate_rank": 2.5, "value_rank": 1.7, "gate_rank": 5}
        sizes = {key: getattr(self, key) or rank(width, factor) for key, factor in factors.items()}
        return super().resolved(width).model_copy(update=sizes)


def rank(width: int, factor: float) -> int:
    """The authors' rule for the size of a bottleneck."""
    return max(32, round(factor * width**0.5 / 32) * 32)


@register_mixer("rwkv7")
class RWKV7(RWKVMixer):
    """The time mix of RWKV-7; see the module docstring."""

    Config = RWKV7Config
    traits = Traits(causal=True, bidirectional=False, state="constant")
    shares = True
    config: RWKV7Config
    g_proj: Bottleneck  # type: ignore[assignment]

    def __init__(self, config: RWKV7Config, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        keys, values = config.kv_heads * config.head_dim, config.kv_heads * config.value_dim
        c: Any = config.resolved(width)
        self.shift_MD = nn.Parameter(torch.empty(len(USES), width))
        self.decay_proj = Bottleneck(width, c.decay_rank, keys, "tanh")
        self.a_proj = Bottleneck(width, c.rate_rank, keys)
        self.a_bias = nn.Parameter(torch.empty(keys))
        if c.value_residual:
            self.residual_proj = Bottleneck(width, c.value_rank, values)
            self.residual_bias = nn.Parameter(torch.empty(values))
        if c.gate:
            self.g_proj = Bottleneck(width, c.gate_rank, c.num_heads * c.value_dim, "sigmoid")
        self.removal_GK = nn.Parameter(torch.empty(c.kv_heads, c.head_dim))  # xi; k_k in the authors' code
        self.rate_share_GK = nn.Parameter(torch.empty(c.kv_heads, c.head_dim))  # alpha; k_a
        self.bonus_HK = nn.Parameter(torch.empty(c.num_heads, c.head_dim))  # rho; r_k
        self.reset_parameters(0.02)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        c, x_BLD, found = self.config, inputs.x_BLD, inputs.found
        delta_BLD, carried = self.shift(inputs)
        shifted = torch.addcmul(x_BLD, delta_BLD, self.shift_MD[:, None, None].to(x_BLD.dtype))
        r_BLD, w_BLD, k_BLD, v_BLD, a_BLD, g_BLD = shifted
        decay_BLE = self.decay_proj(w_BLD).to(self.decay_bias.dtype) + self.decay_bias
        found["log_decay"] = self.by_head(-FASTEST * decay_BLE.sigmoid(), c.head_dim)
        rate_BLE = (self.a_proj(a_BLD) + self.a_bias.to(x_BLD.dtype)).sigmoid()
        found["rate"] = self.by_head(rate_BLE, c.head_dim)
        if c.gate:
            found["gate"] = self.g_proj(g_BLD)
        r_BHLK, k_BGLK = (self.by_head(y, c.head_dim) for y in (self.q_proj(r_BLD), self.k_proj(k_BLD)))
        v_BGLV = self.by_head(self.v_proj(v_BLD), c.value_dim)
        if c.value_residual:
            share_BLE = (self.residual_proj(v_BLD) + self.residual_bias.to(x_BLD.dtype)).sigmoid()
            share_BGLV = self.by_head(share_BLE, c.value_dim).to(v_BGLV.dtype)
            v_BGLV = torch.lerp(v_BGLV, first_values(inputs, self.name, v_BGLV), share_BGLV)
        return *self.norm_and_rotate(r_BHLK, k_BGLK, inputs), v_BGLV, carried

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        state, dtype = inputs.state, torch.promote_types(q_BHLK.dtype, torch.float32)
        k_BGLK, rate_BGLK = k_BGLK.to(dtype), inputs.found["rate"].to(dtype)
        removal_BGLK = F.normalize(k_BGLK * self.removal_GK[:, None], dim=-1)
        k_BGLK = k_BGLK * (1 + (rate_BGLK - 1) * self.rate_share_GK[:, None])
        y_BHLV, last = generalized_delta_rule(
            q_BHLK,
            k_BGLK,
            v_BGLV,
            removal_BGLK,
            removal_BGLK * rate_BGLK,
            inputs.found["log_decay"],
            scale=self.config.softmax_scale,
            initial=None if state is None else state["kv"],
            final=state is not None,
            mask_BL=inputs.mask_BL,
            segments_BL=inputs.segments_BL,
        )
        times = q_BHLK.shape[1] // k_BGLK.shape[1]
        k_BHLK, v_BHLV = k_BGLK.repeat_interleave(times, 1), v_BGLV.repeat_interleave(times, 1)
        weight_BHL1 = (q_BHLK * k_BHLK * self.bonus_HK[:, None]).sum(-1, keepdim=True)
        bonus_BHLV = weight_BHL1.to(v_BHLV.dtype) * v_BHLV
        return self.close(y_BHLV, inputs, bonus_BHLV), {} if last is None else {"kv": last}

    def reset_parameters(self, std: float) -> None:
        """As in the authors' code, whatever `std`: decays, rates, shifts and removal keys by channel and depth,
        W_r and W_v orthogonal, W_k a tenth of that, W_o zero; the bottlenecks start at nothing."""
        c, (down, up), D = self.config, depth(self.place), self.width
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        init.copy_(self.shift_MD, 1 - torch.stack([ramp(D) ** (powers[name] * up) for name in USES]))
        keys, values = c.kv_heads * c.head_dim, c.kv_heads * c.value_dim
        line, within = ramp_to_one(keys) - 0.5, 2 * ramp_to_one(c.head_dim) - 1
        bend = (within * within.abs()).repeat(c.kv_heads)
        speed = -6 + 6 * ramp_to_one(keys) ** (1 + down**0.3)
        init.copy_(self.decay_bias, speed + 0.5 + 2.5 * bend)
        init.copy_(self.a_bias, -0.19 + 0.3 * bend + 0.4 * line)
        init.copy_(self.removal_GK, (0.71 - 0.1 * line).view_as(self.removal_GK))
        init.constant_(self.rate_share_GK, 1.02)
        init.constant_(self.bonus_HK, -0.04)
        if c.value_residual:
            init.copy_(self.residual_bias, 0.73 - 0.4 * (ramp_to_one(values) - 0.5))
        for module in self.children():
            if isinstance(module, Bottleneck):
                size, low = module.up.weight.shape
                init.zeros_(module.down.weight)
                init.orthogonal_(module.up.weight, gain=0.1 * max(1.0, low / size) ** 0.5)
        self.reset_projections()

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        return {**super().conversion_defaults(attention), "value_residual": False}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        c = self.config
        self.shift_MD.zero_()
        # The strongest decay has a half-life of 1.14 tokens.
        half_life_G = lookback(attention, stats, c.kv_heads).clamp(min=1.2)
        self.decay_bias.copy_(torch.logit(LN2 / FASTEST / half_life_G).repeat_interleave(c.head_dim))
        # All keys are positive, so whatever is removed is taken from all: a quarter of what fades at most.
        fades_G = -torch.expm1(-LN2 / half_life_G)
        self.a_bias.copy_(torch.logit((fades_G / 4).clamp(max=SMALL)).repeat_interleave(c.head_dim))
        self.removal_GK.fill_(1.0)
        self.rate_share_GK.zero_()
        self.bonus_HK.zero_()
        if c.gate:  # sigmoid(0) is a half in every place of the bottleneck
            self.g_proj.down.weight.zero_()
            self.g_proj.up.weight.fill_(2 / self.g_proj.down.out_features)
        if c.value_residual:
            self.residual_bias.fill_(math.log(SMALL))
