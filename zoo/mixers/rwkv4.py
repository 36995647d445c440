"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048): a recurrent network that trains like a Transformer.

    r_t, k_t, v_t = W_r (x shifted by mu_r), W_k (x shifted by mu_k), W_v (x shifted by mu_v)
    y_t   = (sum_{s < t} e^{k_s - (t-1-s) w} v_s + e^{u + k_t} v_t) / (the same sum of the weights alone)
    out_t = W_o (sigmoid(r_t) * y_t)

Every channel averages its values with weights e^k that fade at a rate w = exp(log_rate); the present token has a bonus
u instead. "x shifted by mu" is x_{t-1} + (x_t - x_{t-1}) * mu with the share mu of the present token per channel (later
versions keep that of the token before). The state is a numerator, a denominator and an exponent per channel, and the
last input.

Conversion: there is no product of queries and keys, so a head starts as an average of its values that fades so that it
looks back as far as was measured, and sees of the scores what does not depend on the query's token: the mean query
(of the measured mean input, or a bias alone) makes W_k, so that what all queries look at, such as a first token, has
its weight. Receptances are 1/2 (W_r = 0), twice W_o makes up for it; a bias of the values passes the average unchanged
and goes into that of the output. Uniform attention is met exactly.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import MixerOptions
from zoo.errors import ConversionError
from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, SequenceMixer, State, Traits
from zoo.mixers.recurrent import LN2, half_life_of_average, lookback
from zoo.mixers.rwkv import depth, ramp, ramp_to_one, zigzag
from zoo.ops.shift import token_shift
from zoo.ops.wkv import empty_state, wkv
from zoo.registry import register_mixer


class RWKV4Config(MixerOptions):
    """Options of `rwkv4`; the defaults are the published block.

    inner_dim: channels of the average; None is the model width. out_bias: of the output projection.
    """

    name: Literal["rwkv4"] = "rwkv4"
    inner_dim: int | None = Field(None, ge=1, le=1 << 20)
    out_bias: bool = False
    causal: bool = True

    def resolved(self, width: int) -> Self:
        """With the number of channels written out."""
        return self.model_copy(update={"inner_dim": self.inner_dim or width})


@register_mixer("rwkv4")
class RWKV4(SequenceMixer):
    """The time mix of RWKV-4; see the module docstring."""

    Config = RWKV4Config
    traits = Traits(causal=True, bidirectional=False, state="constant")
    keep_float32 = ("log_rate", "bonus")
    config: RWKV4Config

    def __init__(self, config: RWKV4Config, width: int) -> None:
        super().__init__(config, width)
        self.inner = config.inner_dim or width
        self.shift_k, self.shift_v, self.shift_r = (nn.Parameter(torch.empty(width)) for _ in range(3))
        self.k_proj, self.v_proj, self.r_proj = (Linear(width, self.inner, bias=False) for _ in range(3))
        self.log_rate = nn.Parameter(torch.empty(self.inner))
        self.bonus = nn.Parameter(torch.empty(self.inner))
        self.o_proj = Linear(self.inner, width, bias=config.out_bias)
        self.reset_parameters(0.02)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        x_BLD = self.take_in(x_BLD, mask_BL, segments_BL, state)
        where: dict[str, Any] = {"mask_BL": mask_BL, "segments_BL": segments_BL, "final": state is not None}
        initial = (None, None) if state is None else (state["shift"], state["wkv"])
        shifted_BLD, last_BD = token_shift(x_BLD, initial=initial[0], **where)
        delta_BLD = x_BLD - shifted_BLD
        k_BLE, v_BLE, r_BLE = (
            linear(torch.addcmul(shifted_BLD, delta_BLD, share_D.to(x_BLD.dtype)))
            for linear, share_D in (
                (self.k_proj, self.shift_k), (self.v_proj, self.shift_v), (self.r_proj, self.shift_r)
            )
        )  # fmt: skip
        y_BLE, last_B3E = wkv(k_BLE, v_BLE, self.log_rate.exp(), self.bonus, initial=initial[1], **where)
        out_BLD = self.o_proj(r_BLE.sigmoid() * y_BLE)
        if state is None or last_BD is None or last_B3E is None:
            return out_BLD, None
        return out_BLD, State({"shift": last_BD, "wkv": last_B3E}, state.length + x_BLD.shape[1])

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        device, dtype = device or self.o_proj.weight.device, dtype or self.o_proj.weight.dtype
        shift_BD = torch.zeros(batch_size, self.width, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return State({"shift": shift_BD, "wkv": empty_state(batch_size, self.inner, device, wide)})

    def reset_parameters(self, std: float) -> None:
        """As in the authors' code, whatever `std`: rates e^-5 to e^3 over the channels, bonuses around log 0.3, shifts
        by depth; W_v orthogonal, the other projections zero."""
        down, up = depth(self.place)
        init.copy_(self.shift_k, ramp(self.width) ** up)
        init.copy_(self.shift_v, ramp(self.width) ** up + 0.3 * down)
        init.copy_(self.shift_r, ramp(self.width) ** (0.5 * up))
        init.copy_(self.log_rate, -5 + 8 * ramp_to_one(self.inner) ** (0.7 + 1.3 * down))
        init.copy_(self.bonus, math.log(0.3) + zigzag(self.inner, 0.5))
        init.orthogonal_(self.v_proj.weight, gain=max(1.0, self.inner / self.width) ** 0.5)
        for linear in (self.k_proj, self.r_proj, self.o_proj):
            init.zeros_(linear.weight)
        if self.o_proj.bias is not None:
            init.zeros_(self.o_proj.bias)

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        a = attention
        biased = a.o_bias is not None or a.v_bias is not None
        values = {"inner_dim": a.num_heads * a.value_head_dim, "out_bias": biased, "causal": a.causal}
        return cls.Config.parse({"name": cls.name, **values, **options}, "mixer")

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        assert isinstance(config, RWKV4Config)
        mixer, values = cls(config, attention.q_HKD.shape[1]), attention.num_heads * attention.value_head_dim
        biased = attention.o_bias is not None or attention.v_bias is not None
        if mixer.inner != values or (biased and not config.out_bias):
            raise ConversionError(
                f"mixer 'rwkv4' made from attention with {attention.num_heads} heads of {attention.value_head_dim} "
                f"needs inner_dim {values}{' and out_bias' if biased else ''}; got inner_dim {mixer.inner}, "
                f"out_bias {config.out_bias}"
            )
        mixer.start_from(attention, stats)
        return mixer

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        """Set all weights as the module docstring says."""
        a = attention
        for share_D in (self.shift_k, self.shift_v, self.shift_r):
            share_D.fill_(1.0)
        v_ED = a.per_query_head(a.v_GVD).flatten(0, 1)
        half_life_H = lookback(a, stats, a.num_heads)
        if stats is not None and stats.length is not None:
            half_life_H = half_life_of_average(stats.lookback_H.float(), stats.length)
        rate_E = (LN2 / half_life_H).repeat_interleave(a.value_head_dim)
        self.v_proj.weight.copy_(v_ED)
        self.log_rate.copy_(rate_E.log())
        self.bonus.copy_(rate_E)  # so that the present continues the line: it counts e^w times its predecessor
        mean_E = torch.zeros(len(a.q_HKD), device=v_ED.device) if a.q_bias is None else a.q_bias.float()
        if stats is not None and stats.x_mean_D is not None:
            mean_E = mean_E + a.q_HKD.float() @ stats.x_mean_D
        if a.qk_norm is None:  # with a norm a score is no linear function of the key's token
            mean_HK = mean_E.view(a.num_heads, -1)
            score_HD = a.scale * torch.einsum("hk,hkd->hd", mean_HK, a.per_query_head(a.k_GKD))
            self.k_proj.weight.copy_(score_HD.repeat_interleave(a.value_head_dim, 0))
        self.o_proj.weight.copy_(2 * a.o_DHV.float())
        if self.o_proj.bias is not None:
            bias_D = torch.zeros(self.width, device=v_ED.device) if a.o_bias is None else a.o_bias.float()
            if a.v_bias is not None:
                bias_D = bias_D + a.o_DHV.float() @ a.per_query_head(a.v_bias).flatten()
            self.o_proj.bias.copy_(bias_D)
