"""Retention, the mixer of RetNet (Sun et al. 2023, arXiv 2307.08621).

    S_t = gamma S_{t-1} + k_t v_t^T,    y_t = S_t^T q_t / sqrt(K),    out = (norm(y) * swish(W_g x)) W_o

with one constant gamma per head, 1 - 2^(-5-h) by default, rotary positions on q and k (xPos without its own decay,
which gamma is), and a norm per head. The state is one matrix (K, V) per key/value head. The two-sided form decays with
the distance to either side. Conversion: gamma with the measured look-back as half-life, softmax features of queries and
keys (the published layer has none), so that their products are positive as attention's weights are, open gate, the
scale of attention's outputs in W_o.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs, QKVOptions
from zoo.mixers.recurrent import FeatureMap, RecurrentMixer, feature_map, lookback, softmax_features, two_sided
from zoo.ops.rotary import RotaryConfig
from zoo.registry import register_mixer


class RetentionConfig(QKVOptions):
    """Options of `retention`; the defaults are the published block, whose value heads are twice as large. (Its rotary
    positions depend on the head size: `published_rotary`. Those of the default are Llama's.)

    head_norm_centered: subtract the mean, as the paper's GroupNorm; the official code and its successors do not.
    learn_decay: gamma is trained (through its logit); otherwise it is fixed, but saved with the weights.
    decay_norm: divide y_t by the square root of the sum of its decays, as the paper (section 2.2) and the official code
    do before the norm per head. What that norm leaves of it is its eps, which counts where values are small: in a fresh
    model of the official code 1e-2 of the logits. Its successors leave it out.
    feature_map: of queries and keys, behind their positions; converted layers have one.
    """

    name: Literal["retention"] = "retention"
    rotary: RotaryConfig | None = RotaryConfig()
    head_norm: bool = True
    head_norm_affine: bool = False
    head_norm_centered: bool = False
    gate: bool = True
    learn_decay: bool = False
    decay_norm: bool = False
    first_decay: float = Field(5.0, ge=0, le=64)  # gamma of head 0 is 1 - 2 ** -first_decay
    feature_map: FeatureMap | None = None


def published_rotary(head_dim: int) -> RotaryConfig:
    """The rotary positions of the authors' code for heads of this size: neighbours are pairs, and pair i of F turns by
    10000 ** (-i / (F - 1)), so that the last is at 1 / 10000 exactly. That is the usual row of another theta.
    """
    pairs = head_dim // 2
    return RotaryConfig(theta=10000.0 ** (pairs / (pairs - 1)), interleaved=True)


@register_mixer("retention")
class Retention(RecurrentMixer):
    """Retention; see the module docstring."""

    Config = RetentionConfig
    traits = Traits(causal=True, bidirectional=True, state="constant")
    keep_float32 = ("decay_logit_G",)
    config: RetentionConfig

    def __init__(self, config: RetentionConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        if own_projections and config.head_norm and config.head_norm_centered:
            self.head_norm = nn.LayerNorm(config.value_dim, config.head_norm_eps, config.head_norm_affine)
        logit_G = torch.empty(config.kv_heads)
        if config.learn_decay:
            self.decay_logit_G = nn.Parameter(logit_G)
        else:
            self.register_buffer("decay_logit_G", logit_G)
        self.reset_parameters(0.02)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        scale, log_decay_G = self.config.softmax_scale, F.logsigmoid(self.decay_logit_G)
        q_BHLK, k_BGLK = (feature_map(self.config.feature_map, x) for x in (q_BHLK, k_BGLK))
        if self.config.causal:
            y_BHLV, state = self.recur(q_BHLK, k_BGLK, v_BGLV, inputs, log_decay_G, scale)
        else:
            y_BHLV, state = two_sided(q_BHLK * scale, k_BGLK, v_BGLV, inputs, log_decay_G), {}
        if not self.config.decay_norm:
            return y_BHLV, state
        sums_BGL1, carried = self.decay_sums(k_BGLK, inputs, log_decay_G)
        sums_BHL1 = sums_BGL1.clamp(min=1).repeat_interleave(y_BHLV.shape[1] // sums_BGL1.shape[1], 1)
        return (y_BHLV * sums_BHL1.rsqrt()).to(y_BHLV.dtype), state | carried

    def decay_sums(self, k_BGLK: Tensor, inputs: Inputs, log_decay_G: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """sum_s gamma^(t - s) over the tokens that t sees (B, G, L, 1), which is retention of ones; with its state."""
        state, ones_BGL1 = inputs.state, torch.ones_like(k_BGLK[..., :1], dtype=log_decay_G.dtype)
        if not self.config.causal:
            return two_sided(ones_BGL1, ones_BGL1, ones_BGL1, inputs, log_decay_G), {}
        sums_BGL1, final = ops.linear_recurrence(
            ones_BGL1,
            ones_BGL1,
            ones_BGL1,
            log_decay_G,
            initial=None if state is None else state["decays"],
            final=state is not None,
            mask_BL=inputs.mask_BL,
            segments_BL=inputs.segments_BL,
        )
        return sums_BGL1, {} if final is None else {"decays": final}

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        state = super().mix_state(batch_size, device, dtype)
        return state | ({"decays": torch.zeros_like(state["kv"][..., :1, :1])} if self.config.decay_norm else {})

    def reset_parameters(self, std: float) -> None:
        """As published, whatever `std`: gamma_h = 1 - 2^(-5-h), that is logit(gamma_h) = log(2^(5+h) - 1), and
        projections Xavier uniform, those into the block with a gain of 2^-2.5.
        """
        for name in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"):
            if isinstance(linear := getattr(self, name, None), nn.Linear):
                init.xavier_uniform_(linear.weight, gain=1.0 if name == "o_proj" else 2**-2.5)
        exponents_G = self.config.first_decay + torch.arange(self.config.kv_heads, dtype=torch.float64)
        init.copy_(self.decay_logit_G, torch.log(torch.exp2(exponents_G) - 1).float())

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        return {"gate_bias": True, "learn_decay": True, **softmax_features(attention)}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        self.decay_logit_G.copy_(torch.logit(2 ** (-1 / lookback(attention, stats, self.config.kv_heads))))
