"""HGRN2, the hierarchically gated linear RNN with state expansion (Qin et al. 2024, arXiv 2404.07904).

    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T          y_t = S_t^T silu(W_q x_t) / sqrt(K)
    f_t = l + (1 - l) * sigmoid(-W_k x_t)              the forget gate is the decay, and the key is what it leaves

An outer product widens HGRN's vector state (Qin et al. 2023, arXiv 2311.04823) to a matrix (K, V) per head, with no
parameters of its own: the input gate 1 - f serves as the key. Outputs pass one RMSNorm over all heads together, without
a gate. Our W_k is the paper's W_f with the sign turned, so that a large product means "write", as for any key.

The lower bound l keeps upper layers from forgetting. In the paper the bounds of all layers are one parameter, a
cumulative softmax over the layers less its first term: 0 in the first layer, then rising, and i / layers in layer i
before training. A mixer knows nothing of other layers, so here every layer learns a bound of its own per channel, as a
logit that starts at `lower_bound`; 0 means no bound and no parameter, as in the paper's first layer. All bounds that
the paper can learn can be written so. What is given up is that training keeps the bounds in the order of the layers;
the YAML files start them at the paper's values.

Conversion: W_q, W_k, W_v, W_o are copied, and l starts where a key in the middle of its range (1 - l) / 2 decays with
the measured look-back as half-life; heads are normalised apart, with the scale of attention's outputs in W_o.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import HeadNorm, Inputs, QKVOptions
from zoo.mixers.recurrent import LN2, RecurrentMixer, lookback
from zoo.registry import register_mixer

LEAST_BOUND = 1e-4  # a logit is finite


class HGRN2Config(QKVOptions):
    """Options of `hgrn2`; the defaults are the published block in a model's first layer.

    lower_bound: where the lower bound of the forget gate starts; 0 is none. out_norm: one RMSNorm over all heads'
    outputs; `head_norm` normalises every head apart instead.
    """

    name: Literal["hgrn2"] = "hgrn2"
    lower_bound: float = Field(0.0, ge=0.0, lt=1.0)
    out_norm: bool = True

    @model_validator(mode="after")
    def _one_norm(self) -> HGRN2Config:
        if self.out_norm and self.head_norm:
            raise ValueError("out_norm and head_norm exclude each other: one norm for all heads, or one for each")
        if 0 < self.lower_bound < LEAST_BOUND:
            raise ValueError(f"lower_bound is 0 or at least {LEAST_BOUND}, got {self.lower_bound}")
        return self


@register_mixer("hgrn2")
class HGRN2(RecurrentMixer):
    """HGRN2; see the module docstring."""

    Config = HGRN2Config
    traits = Traits(causal=True, bidirectional=False, state="constant")
    keep_float32 = ("bound_logit",)
    config: HGRN2Config

    def __init__(self, config: HGRN2Config, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        if config.lower_bound:
            self.bound_logit = nn.Parameter(torch.empty(config.kv_heads, config.head_dim))
        if own_projections and config.out_norm:
            self.out_norm = HeadNorm(config.num_heads * config.value_dim, eps=config.head_norm_eps)
        self.reset_parameters(0.02)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        logit_BGLK = k_BGLK.to(torch.promote_types(k_BGLK.dtype, torch.float32))
        log_forget_BGLK, input_BGLK = F.logsigmoid(-logit_BGLK), logit_BGLK.sigmoid()
        if self.config.lower_bound:
            # As sums of logarithms: 1 - input would lose the digits of a small forget gate.
            bound_GLK = self.bound_logit.to(logit_BGLK.dtype)[:, None]
            log_free_GLK = F.logsigmoid(-bound_GLK)
            log_forget_BGLK = torch.logaddexp(F.logsigmoid(bound_GLK), log_free_GLK + log_forget_BGLK)
            input_BGLK = input_BGLK * log_free_GLK.exp()
        # The gate stays in float32: rounded keys would no longer be what the decay leaves.
        return self.recur(F.silu(q_BHLK), input_BGLK, v_BGLV, inputs, log_forget_BGLK, self.config.softmax_scale)

    def finish(self, y_BHLV: Tensor, x_BLD: Tensor) -> Tensor:
        """One norm over all heads, or the norm per head and the gate of the base class; then the output projection."""
        if not self.config.out_norm:
            return super().finish(y_BHLV, x_BLD)
        y_BLE = self.out_norm(y_BHLV.transpose(1, 2).flatten(-2))
        if self.config.gate:
            y_BLE = y_BLE * F.silu(self.g_proj(x_BLD))
        return self.o_proj(y_BLE)

    def reset_parameters(self, std: float) -> None:
        """Bounds at `lower_bound`, the same in every channel."""
        if self.config.lower_bound:
            bound = self.config.lower_bound
            init.constant_(self.bound_logit, math.log(bound) - math.log1p(-bound))

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        return {"lower_bound": 0.5, "out_norm": False, "head_norm": True}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        if not self.config.lower_bound:
            return
        # l + (1 - l) / 2 = 2^(-1/d); expm1 keeps the digits of decays close to one.
        free_G = -2 * torch.expm1(-LN2 / lookback(attention, stats, self.config.kv_heads))
        bound_G = (1 - free_G).clamp(min=LEAST_BOUND)
        self.bound_logit.copy_((bound_G.log() - free_G.log())[:, None].expand_as(self.bound_logit))
