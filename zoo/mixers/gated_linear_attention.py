"""Gated linear attention, GLA (Yang et al. 2023, arXiv 2312.06635).

    S_t = diag(a_t) S_{t-1} + k_t v_t^T          y_t = S_t^T q_t / sqrt(K)
    log a_t = logsigmoid(W_2 W_1 x_t + b) / tau  one decay per channel of every key, tau = 16

Outputs are RMS-normalised per head and gated by silu(W_g x). The state is one matrix (K, V) per key/value head. In
the paper keys have half the width of values (`head_dim` half of `value_head_dim`). Conversion: W_2 = 0 and b such
that every channel has the measured look-back as half-life, softmax features on q and k, which keep the products
positive (Liger, Lan et al. 2025, arXiv 2503.01496), open gate, the scale of attention's outputs in W_o.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import initialization as init

from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs, QKVOptions
from zoo.mixers.recurrent import FeatureMap, RecurrentMixer, feature_map, lookback, softmax_features
from zoo.registry import register_mixer


class GatedLinearAttentionConfig(QKVOptions):
    """Options of `gated_linear_attention`; the defaults are the published block."""

    name: Literal["gated_linear_attention"] = "gated_linear_attention"
    head_norm: bool = True
    gate: bool = True
    decay_rank: int = Field(16, ge=1, le=4096)
    tau: float = Field(16.0, gt=0, le=1e4)
    feature_map: FeatureMap | None = None


@register_mixer("gated_linear_attention")
class GatedLinearAttention(RecurrentMixer):
    """Gated linear attention; see the module docstring."""

    Config = GatedLinearAttentionConfig
    traits = Traits(causal=True, bidirectional=False, state="constant")
    config: GatedLinearAttentionConfig

    def __init__(self, config: GatedLinearAttentionConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        self.decay_down = Linear(width, config.decay_rank, bias=False)
        self.decay_up = Linear(config.decay_rank, config.kv_heads * config.head_dim)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        q_BHLK, k_BGLK = feature_map(c.feature_map, q_BHLK), feature_map(c.feature_map, k_BGLK)
        logit_BLE = self.decay_up(self.decay_down(inputs.x_BLD))
        logit_BLE = logit_BLE.to(torch.promote_types(logit_BLE.dtype, torch.float32))
        log_decay_BLE = F.logsigmoid(logit_BLE) / c.tau
        log_decay_BGLK = log_decay_BLE.unflatten(-1, (c.kv_heads, c.head_dim)).transpose(1, 2)
        return self.recur(q_BHLK, k_BGLK, v_BGLV, inputs, log_decay_BGLK, c.softmax_scale)

    def reset_parameters(self, std: float) -> None:
        """Plain projections; the bias of the decay starts at zero, so that a channel keeps 0.5^(1/16) = 96 % a step."""
        init.zeros_(self.decay_up.bias)

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        return {"gate_bias": True, **softmax_features(attention)}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        # a = sigmoid(b)^(1/tau) = 2^(-1/d); expm1 keeps the digits of decays close to one.
        log_a_G = -self.config.tau * torch.log(torch.tensor(2.0)) / lookback(attention, stats, self.config.kv_heads)
        bias_G = log_a_G - torch.log(-torch.expm1(log_a_G))
        self.decay_up.weight.zero_()
        self.decay_up.bias.copy_(bias_G.repeat_interleave(self.config.head_dim))
