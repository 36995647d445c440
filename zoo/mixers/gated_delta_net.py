"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464); without decay DeltaNet (Yang et al. 2024,
arXiv 2406.06484).

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T          y_t = S_t^T q_t / sqrt(K)
    beta_t = sigmoid(W_b x_t)             log a_t = -exp(A_log) * softplus(W_a x_t + dt_bias)

Queries, keys and values pass short convolutions with SiLU; queries and keys are L2-normalised; outputs are RMS-
normalised per head and gated by silu(W_g x). `allow_neg_eigval` doubles beta, so that a step can reflect (Grazzi et
al. 2024, arXiv 2411.12537). The state is one matrix (K, V) per key/value head, in which a key's old answer is
replaced, not added to. Conversion: decays with the measured look-back as half-life, beta 1/2, open gate, no
convolution, the scale of attention's outputs in W_o.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs
from zoo.mixers.recurrent import (
    LN2,
    SOFTPLUS_ONE,
    GroupedOptions,
    RecurrentMixer,
    grouped_heads,
    inverse_softplus_times,
    l2_normalize,
    lookback,
    softplus32,
    spread_groups,
)
from zoo.registry import register_mixer


class GatedDeltaNetConfig(GroupedOptions):
    """Options of `gated_delta_net`; the defaults are the published block."""

    name: Literal["gated_delta_net"] = "gated_delta_net"
    conv: int | None = Field(4, ge=2, le=64)
    head_norm: bool = True
    head_norm_eps: float = Field(1e-6, gt=0, le=1)
    gate: bool = True
    use_decay: bool = True
    allow_neg_eigval: bool = False


@register_mixer("gated_delta_net")
class GatedDeltaNet(RecurrentMixer):
    """Gated DeltaNet and DeltaNet; see the module docstring."""

    Config = GatedDeltaNetConfig
    traits = Traits(causal=True, bidirectional=False, state="constant")
    keep_float32 = ("A_log", "dt_bias")
    projected_heads = staticmethod(grouped_heads)
    config: GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        self.b_proj = Linear(width, config.kv_heads, bias=False)
        if config.use_decay:
            self.a_proj = Linear(width, config.kv_heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(config.kv_heads))
            self.dt_bias = nn.Parameter(torch.empty(config.kv_heads))
        self.reset_parameters(0.02)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        c, state = self.config, inputs.state
        q_BHLK, k_BGLK = spread_groups(c, l2_normalize(q_BHLK), l2_normalize(k_BGLK))
        beta_BLG = self.b_proj(inputs.x_BLD)
        beta_BGL = beta_BLG.to(torch.promote_types(beta_BLG.dtype, torch.float32)).sigmoid().transpose(1, 2)
        log_decay_BGL = None
        if c.use_decay:
            step_BLG = softplus32(self.a_proj(inputs.x_BLD), self.dt_bias)
            log_decay_BGL = (-self.A_log.exp() * step_BLG).transpose(1, 2)
        y_BHLV, last = ops.delta_rule(
            q_BHLK,
            k_BGLK,
            v_BGLV,
            2 * beta_BGL if c.allow_neg_eigval else beta_BGL,
            log_decay_BGL,
            scale=c.softmax_scale,
            initial=None if state is None else state["kv"],
            final=state is not None,
            mask_BL=inputs.mask_BL,
            segments_BL=inputs.segments_BL,
        )
        return y_BHLV, {} if last is None else {"kv": last}

    def reset_parameters(self, std: float) -> None:
        """A uniform in (0, 16), steps log-uniform in [0.001, 0.1], as Mamba-2 and Gated DeltaNet do."""
        if self.config.use_decay:
            heads = self.config.kv_heads
            init.copy_(self.A_log, torch.empty(heads).uniform_(0.01, 16).log())
            init.copy_(self.dt_bias, inverse_softplus_times(0.001, 0.1, (heads,)))

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        return {"conv": None, "gate_bias": True}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        self.b_proj.weight.zero_()
        if self.config.use_decay:
            self.a_proj.weight.zero_()
            self.dt_bias.fill_(SOFTPLUS_ONE)  # steps of one, so that A alone says how fast a head forgets
            self.A_log.copy_(math.log(LN2) - lookback(attention, stats, self.config.kv_heads).log())
