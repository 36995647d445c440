"""Kimi Delta Attention, KDA (Kimi Linear, 2025, arXiv 2510.26692): Gated DeltaNet with a decay per channel.

    S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T          y_t = S_t^T q_t / sqrt(K)
    beta_t = sigmoid(W_b x_t)       log a_t = -exp(A_log) * softplus(W_2 W_1 x_t + dt_bias)
    out_t = W_o (norm(y_t) * sigmoid(W_4 W_3 x_t))

Queries, keys and values pass short convolutions with SiLU; queries and keys are L2-normalised; outputs are RMS-
normalised per head. A_log is one number a head, dt_bias one a channel; both gates go through a bottleneck, of the size
of a head unless said otherwise. The state is one matrix (K, V) per key/value head. Kimi Linear has three such layers to
one of latent attention without positions. Conversion: every channel with the measured look-back as half-life, beta 1/2,
the output gate at 1/2 and twice the scale of attention's outputs in W_o, no convolution.
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
from zoo.mixers.qkv import Inputs, QKVOptions
from zoo.mixers.recurrent import (
    LN2,
    SOFTPLUS_ONE,
    RecurrentMixer,
    inverse_softplus_times,
    l2_normalize,
    lookback,
    softplus32,
)
from zoo.registry import register_mixer


class KimiDeltaAttentionConfig(QKVOptions):
    """Options of `kimi_delta_attention`; the defaults are the published block.

    decay_rank, gate_rank: sizes of the bottlenecks; None is head_dim and value_head_dim.
    """

    name: Literal["kimi_delta_attention"] = "kimi_delta_attention"
    conv: int | None = Field(4, ge=2, le=64)
    head_norm: bool = True
    gate: bool = True
    decay_rank: int | None = Field(None, ge=1, le=4096)
    gate_rank: int | None = Field(None, ge=1, le=4096)


@register_mixer("kimi_delta_attention")
class KimiDeltaAttention(RecurrentMixer):
    """Kimi Delta Attention; see the module docstring."""

    Config = KimiDeltaAttentionConfig
    traits = Traits(causal=True, bidirectional=False, state="constant")
    keep_float32 = ("A_log", "dt_bias")
    config: KimiDeltaAttentionConfig
    g_proj: LowRank  # type: ignore[assignment]

    def __init__(self, config: KimiDeltaAttentionConfig, width: int, own_projections: bool = True) -> None:
        c = config
        super().__init__(config, width, own_projections)
        self.b_proj = Linear(width, c.kv_heads, bias=False)
        self.a_proj = LowRank(width, c.decay_rank or c.head_dim, c.kv_heads * c.head_dim)
        self.A_log = nn.Parameter(torch.empty(c.kv_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.kv_heads * c.head_dim))
        if own_projections and c.gate:
            self.g_proj = LowRank(width, c.gate_rank or c.value_dim, c.num_heads * c.value_dim, c.gate_bias)
        self.reset_parameters(0.02)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        c, state = self.config, inputs.state
        beta_BLG = self.b_proj(inputs.x_BLD)
        beta_BGL = beta_BLG.to(torch.promote_types(beta_BLG.dtype, torch.float32)).sigmoid().transpose(1, 2)
        step_BLE = softplus32(self.a_proj(inputs.x_BLD), self.dt_bias)
        log_decay_BLGK = -self.A_log.exp()[:, None] * step_BLE.unflatten(-1, (c.kv_heads, c.head_dim))
        y_BHLV, last = ops.vector_delta_rule(
            l2_normalize(q_BHLK),
            l2_normalize(k_BGLK),
            v_BGLV,
            beta_BGL,
            log_decay_BLGK.transpose(1, 2),
            scale=c.softmax_scale,
            initial=None if state is None else state["kv"],
            final=state is not None,
            mask_BL=inputs.mask_BL,
            segments_BL=inputs.segments_BL,
        )
        return y_BHLV, {} if last is None else {"kv": last}

    def activate_gate(self, gate: Tensor) -> Tensor:
        return gate.sigmoid()

    def reset_parameters(self, std: float) -> None:
        """A uniform in [1, 16] per head, steps log-uniform in [0.001, 0.1] per channel."""
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log())
        init.copy_(self.dt_bias, inverse_softplus_times(0.001, 0.1, tuple(self.dt_bias.shape)))

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        return {"conv": None, "gate_bias": True}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        self.b_proj.weight.zero_()
        self.a_proj.up.weight.zero_()
        self.dt_bias.fill_(SOFTPLUS_ONE)  # steps of one, so that A alone says how fast a head forgets
        self.A_log.copy_(math.log(LN2) - lookback(attention, stats, self.config.kv_heads).log())
        if self.config.gate and self.g_proj.bias is not None:
            self.g_proj.bias.zero_()  # half open: a sigmoid that is all open learns no more

    @torch.no_grad()
    def scale_heads(self, gain_H: Tensor) -> None:
        super().scale_heads(2 * gain_H if self.config.gate else gain_H)


class LowRank(nn.Module):
    """x -> W_up W_down x + bias."""

    def __init__(self, width: int, rank: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.down = Linear(width, rank, bias=False)
        self.up = Linear(rank, size, bias=bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.up(self.down(x_BLD))

    @property
    def weight(self) -> Tensor:
        """That of the last map, whose zero is the zero of the whole."""
        return self.up.weight

    @property
    def bias(self) -> Tensor | None:
        """That of the last map."""
        return self.up.bias
