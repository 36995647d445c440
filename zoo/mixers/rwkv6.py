"""RWKV-6 "Finch" (Peng et al. 2024, arXiv 2404.05892): matrix states, decays and token shifts that see the token.

    x^n_t = x_t + (x_{t-1} - x_t) * (mu_n + lora_n(x_t + (x_{t-1} - x_t) * mu_x))          n = w, k, v, r, g
    r, k, v = W_r x^r, W_k x^k, W_v x^v          g = silu(W_g x^g)          log a_t = -exp(w_0 + W_2 tanh(W_1 x^w))
    y_t   = (S_{t-1} + diag(u) k_t v_t^T)^T r_t          S_t = diag(a_t) S_{t-1} + k_t v_t^T
    out_t = W_o (norm(y_t) * g_t)

lora_n(z) = B_n tanh(A_n z) of a small rank; the norm is over each head, with weight and bias. The receptance r is what
attention calls the query. The state is one matrix (K, V) per key/value head and the last input.

Conversion (after Goldstein et al. 2025, RADLADS, arXiv 2505.03005): W_r, W_k, W_v, W_o from attention with its heads,
biases and rotary positions, no shift, every channel with the measured look-back as half-life, bonus 1, gate open, the
scale of attention's outputs in W_o; softmax features on r and k keep the products positive, as in
`gated_linear_attention`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init

from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs
from zoo.mixers.recurrent import LN2, lookback
from zoo.mixers.rwkv import Bottleneck, RWKVMixer, RWKVOptions, depth, ramp, ramp_to_one, zigzag
from zoo.ops.bonus import bonus_recurrence
from zoo.registry import register_mixer

USES = "wkvrg"


class RWKV6Config(RWKVOptions):
    """Options of `rwkv6`; the defaults are the published block.

    shift_rank, decay_rank: of what the token adds to the shifts and to the decays (64 and 128 in models 4096 wide).
    """

    name: Literal["rwkv6"] = "rwkv6"
    shift_rank: int = Field(32, ge=1, le=4096)
    decay_rank: int = Field(64, ge=1, le=4096)


@register_mixer("rwkv6")
class RWKV6(RWKVMixer):
    """The time mix of RWKV-6; see the module docstring."""

    Config = RWKV6Config
    traits = Traits(causal=True, bidirectional=False, state="constant")
    keep_float32 = ("decay_bias", "bonus_GK")
    config: RWKV6Config

    def __init__(self, config: RWKV6Config, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        c, heads = config, config.kv_heads
        self.shift_x = nn.Parameter(torch.empty(width))
        self.shift_MD = nn.Parameter(torch.empty(len(USES), width))
        self.shift_down = Linear(width, len(USES) * c.shift_rank, bias=False)
        self.shift_up_MRD = nn.Parameter(torch.empty(len(USES), c.shift_rank, width))
        self.decay_proj = Bottleneck(width, c.decay_rank, heads * c.head_dim, "tanh")
        self.bonus_GK = nn.Parameter(torch.empty(heads, c.head_dim))
        self.reset_parameters(0.02)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        c, x_BLD = self.config, inputs.x_BLD
        delta_BLD, carried = self.shift(inputs)
        low_BLE = self.shift_down(torch.addcmul(x_BLD, delta_BLD, self.shift_x.to(x_BLD.dtype))).tanh()
        low_BLMR = low_BLE.unflatten(-1, (len(USES), c.shift_rank))
        share_MBLD = torch.einsum("blmr,mrd->mbld", low_BLMR, self.shift_up_MRD.to(low_BLMR.dtype))
        share_MBLD = share_MBLD + self.shift_MD[:, None, None].to(share_MBLD.dtype)
        w_BLD, k_BLD, v_BLD, r_BLD, g_BLD = torch.addcmul(x_BLD, delta_BLD, share_MBLD.to(x_BLD.dtype))
        log_rate_BLE = self.decay_proj(w_BLD).to(self.decay_bias.dtype) + self.decay_bias
        inputs.found["log_decay"] = self.by_head(-log_rate_BLE.exp(), c.head_dim)
        if c.gate:
            inputs.found["gate"] = F.silu(self.g_proj(g_BLD))
        r_BHLK, k_BGLK = (self.by_head(y, c.head_dim) for y in (self.q_proj(r_BLD), self.k_proj(k_BLD)))
        v_BGLV = self.by_head(self.v_proj(v_BLD), c.value_dim)
        return *self.norm_and_rotate(r_BHLK, k_BGLK, inputs), v_BGLV, carried

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        state = inputs.state
        y_BHLV, last = bonus_recurrence(
            q_BHLK,
            k_BGLK,
            v_BGLV,
            inputs.found["log_decay"],
            self.bonus_GK,
            scale=self.config.softmax_scale,
            initial=None if state is None else state["kv"],
            final=state is not None,
            mask_BL=inputs.mask_BL,
            segments_BL=inputs.segments_BL,
        )
        return self.close(y_BHLV, inputs), {} if last is None else {"kv": last}

    def reset_parameters(self, std: float) -> None:
        """As in the authors' code, whatever `std`: rates e^-6 to e^-1 over the channels, shifts and bonuses by depth;
        W_r and W_v orthogonal, W_k and W_g a tenth of that, W_o zero; what the token adds starts at nothing."""
        c, (down, up), D = self.config, depth(self.place), self.width
        size = c.kv_heads * c.head_dim
        init.copy_(self.shift_x, 1 - ramp(D) ** up)
        rows = {"w": ramp(D) ** up, "r": ramp(D) ** (0.5 * up), "v": ramp(D) ** up + 0.3 * down}
        rows |= {"k": rows["w"], "g": rows["r"]}
        init.copy_(self.shift_MD, 1 - torch.stack([rows[name] for name in USES]))
        init.zeros_(self.shift_down.weight)
        init.uniform_(self.shift_up_MRD, -0.01, 0.01)
        init.copy_(self.decay_bias, -6 + 5 * ramp_to_one(size) ** (0.7 + 1.3 * down))
        init.zeros_(self.decay_proj.down.weight)
        init.uniform_(self.decay_proj.up.weight, -0.01, 0.01)
        bonus_E = down * (1 - ramp_to_one(size)) + zigzag(size, 0.1)
        init.copy_(self.bonus_GK, bonus_E.view(c.kv_heads, c.head_dim))
        self.reset_projections()
        if c.gate:
            init.orthogonal_(self.g_proj.weight, gain=0.1)

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        return {**super().conversion_defaults(attention), "gate_bias": True}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        c = self.config
        for shift in (self.shift_x, self.shift_MD):
            shift.zero_()
        log_rate_G = math.log(LN2) - lookback(attention, stats, c.kv_heads).log()
        self.decay_bias.copy_(log_rate_G.repeat_interleave(c.head_dim))
        self.bonus_GK.fill_(1.0)
