"""Mamba, a selective state space model (Gu and Dao 2023, arXiv 2312.00752).

    x, z = u W_in                         x = silu(conv(x))                    E channels each
    d, B_t, C_t = x W_x                   dt_t = softplus(d W_dt + b_dt)       d of low rank, B and C of size N
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t                                   A = -exp(A_log), (E, N)
    out = ((h_t C_t + D x_t) * silu(z)) W_out

The state is one vector (N) per channel and the tail of the convolution. A block has no channel mixer. Falcon Mamba (Zuo
et al. 2024, arXiv 2410.05355) has d, B_t and C_t divided by their root mean square (`bcdt_norm_eps`).

Conversion from attention: the value path becomes exactly linear, for silu(v) - silu(-v) = v. Channels come in pairs,
one with W_v and one with -W_v, which share their decay and end in W_out with opposite signs. One channel more is the
constant 1 (its convolution has only a bias): it makes B_0 = C_0 = 1, so that each head starts as an average of its
values whose weights halve over the measured look-back, the zeroth order of softmax. The other N - 1 pairs of B and C
are its first order, exp(q . k) = 1 + q . k + ...: the best product of that rank of the mean over the heads of
W_q^T W_k and the biases of queries (by singular values), read from what of the input the values still show, and weaker
where scores are large (`first_order_share`). Positions and QK-norm are left out.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import MixerOptions
from zoo.errors import ConversionError
from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, SequenceMixer, State, Traits
from zoo.mixers.qkv import SILU_ONE, HeadNorm, Inputs, ShortConv
from zoo.mixers.recurrent import LN2, SOFTPLUS_ONE, first_order_share, inverse_softplus_times, lookback, softplus32
from zoo.ops.diagonal import selective_scan
from zoo.registry import register_mixer

SPARE = 8  # channels of a converted layer beside its pairs; the first of them is the constant


class MambaConfig(MixerOptions):
    """Options of `mamba`; the defaults are the published block.

    inner_dim: channels E; None is twice the model width. state_dim: N. dt_rank: of the steps' projection; None is the
    model width / 16, rounded up. bias: of the first and the last projection. bcdt_norm_eps: of the norms of steps, B
    and C; None: there are none. bcdt_norm_weights: whether these have weights (Hymba). dt_min, dt_max: range from which
    `reset_parameters` draws the steps. out_init: factor of W_out at initialisation; as published 1 / sqrt(layers).
    """

    name: Literal["mamba"] = "mamba"
    inner_dim: int | None = Field(None, ge=1, le=262144)
    state_dim: int = Field(16, ge=1, le=1024)
    dt_rank: int | None = Field(None, ge=1, le=16384)
    conv: int = Field(4, ge=2, le=64)
    conv_bias: bool = True
    bias: bool = False
    bcdt_norm_eps: float | None = Field(None, gt=0, le=1)
    bcdt_norm_weights: bool = False
    dt_min: float = Field(0.001, gt=0, le=10)
    dt_max: float = Field(0.1, gt=0, le=10)
    out_init: float = Field(1.0, gt=0, le=100)
    causal: bool = True

    def resolved(self, width: int) -> Self:
        """With the inner width and the rank of the steps written out."""
        sizes = {"inner_dim": self.inner_dim or 2 * width, "dt_rank": self.dt_rank or math.ceil(width / 16)}
        return self.model_copy(update=sizes)


@register_mixer("mamba")
class Mamba(SequenceMixer):
    """Mamba; see the module docstring."""

    Config = MambaConfig
    traits = Traits(causal=True, bidirectional=False, state="constant")
    keep_float32 = ("A_log", "dt_bias", "D")
    config: MambaConfig

    def __init__(self, config: MambaConfig, width: int, own_output: bool = True) -> None:
        super().__init__(config, width)
        sizes: Any = config.resolved(width)
        self.inner, self.rank = sizes.inner_dim, sizes.dt_rank
        E, N = self.inner, config.state_dim
        self.in_proj = Linear(width, 2 * E, bias=config.bias)
        self.conv = ShortConv(E, config.conv, config.conv_bias)
        self.x_proj = Linear(E, self.rank + 2 * N, bias=False)
        self.dt_proj = Linear(self.rank, E, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(E))
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        if config.bcdt_norm_eps is not None and config.bcdt_norm_weights:
            sizes = {"dt": self.rank, "B": N, "C": N}
            self.bcdt_norms = nn.ModuleDict({n: HeadNorm(size, eps=config.bcdt_norm_eps) for n, size in sizes.items()})
        self.out_proj: Any = Linear(E, width, bias=config.bias) if own_output else None
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
        y_BLE, left = self.scan(x_BLD, mask_BL, segments_BL, state)
        return self.out_proj(y_BLE), None if state is None else State(left, state.length + x_BLD.shape[1])

    def scan(
        self, x_BLD: Tensor, mask_BL: Tensor | None, segments_BL: Tensor | None, state: State | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the output projection reads (B, L, E), and the tensors of the new state ({} where state is None)."""
        inputs = Inputs(x_BLD, mask_BL, segments_BL, None, state)
        x_BLE, z_BLE = self.in_proj(x_BLD).chunk(2, -1)
        x_BLE, tail = self.conv(x_BLE, inputs, None if state is None else state["conv"])
        N = self.config.state_dim
        low_BLR, B_BLN, C_BLN = self.x_proj(x_BLE).split([self.rank, N, N], -1)
        if (eps := self.config.bcdt_norm_eps) is not None:
            if self.config.bcdt_norm_weights:
                norms = self.bcdt_norms
                low_BLR, B_BLN, C_BLN = norms["dt"](low_BLR), norms["B"](B_BLN), norms["C"](C_BLN)
            else:
                low_BLR, B_BLN, C_BLN = (F.rms_norm(x, x.shape[-1:], eps=eps) for x in (low_BLR, B_BLN, C_BLN))
        y_BLE, final = selective_scan(
            x_BLE,
            softplus32(self.dt_proj(low_BLR), self.dt_bias),
            -self.A_log.exp(),
            B_BLN,
            C_BLN,
            initial=None if state is None else state["ssm"],
            final=state is not None,
            mask_BL=mask_BL,
            segments_BL=segments_BL,
        )
        y_BLE = y_BLE + x_BLE * self.D.to(x_BLE.dtype)
        y_BLE = y_BLE * F.silu(z_BLE)
        if state is None:
            return y_BLE, {}
        assert tail is not None
        assert final is not None
        return y_BLE, {"conv": tail, "ssm": final}

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        device, dtype = device or self.in_proj.weight.device, dtype or self.in_proj.weight.dtype
        conv = torch.zeros(batch_size, self.config.conv - 1, self.inner, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return State({"conv": conv, "ssm": torch.zeros(batch_size, *self.A_log.shape, device=device, dtype=wide)})

    def reset_parameters(self, std: float) -> None:
        """As published, whatever `std`: A_n = -n, D one, steps log-uniform in [dt_min, dt_max], the projections uniform
        in 1/sqrt(their inputs), W_out times `out_init`."""
        E, N = self.A_log.shape
        init.copy_(self.A_log, torch.arange(1.0, N + 1).log().expand(E, N))
        init.ones_(self.D)
        init.copy_(self.dt_bias, inverse_softplus_times(self.config.dt_min, self.config.dt_max, (E,)))
        factors = dict.fromkeys([self.in_proj, self.x_proj, self.dt_proj], 1.0)
        if self.out_proj is not None:
            factors[self.out_proj] = self.config.out_init
        for linear, factor in factors.items():
            bound = factor * linear.in_features**-0.5
            init.uniform_(linear.weight, -bound, bound)
            if linear.bias is not None:
                init.zeros_(linear.bias)

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        inner = 2 * attention.num_heads * attention.value_head_dim + SPARE
        defaults = {"inner_dim": inner, "bias": True, "causal": attention.causal}
        return cls.Config.parse({"name": cls.name, **defaults, **options}, "mixer")

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        assert isinstance(config, MambaConfig)
        mixer = cls(config, attention.q_HKD.shape[1])
        values = attention.num_heads * attention.value_head_dim
        if mixer.inner < 2 * values + 1 or not config.bias or not config.conv_bias:
            raise ConversionError(
                f"mixer 'mamba' made from attention with {attention.num_heads} heads of {attention.value_head_dim} "
                f"needs inner_dim >= {2 * values + 1}, bias and conv_bias; got inner_dim {mixer.inner}, bias "
                f"{config.bias}, conv_bias {config.conv_bias}"
            )
        if config.bcdt_norm_eps is not None:
            raise ConversionError("mixer 'mamba' starts from attention with B and C as they are: no bcdt_norm_eps")
        mixer.start_from(attention, stats)
        return mixer

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        """Set all weights as the module docstring says."""
        a, N, R = attention, self.config.state_dim, self.rank
        assert self.conv.bias is not None
        P, v_PD = a.num_heads * a.value_head_dim, a.per_query_head(a.v_GVD).flatten(0, 1)
        half_life_P = lookback(a, stats, a.num_heads).repeat_interleave(a.value_head_dim).to(v_PD.device)
        self.in_proj.bias.zero_()
        self.in_proj.weight[self.inner :] = 0  # z: gates open
        self.in_proj.bias[self.inner :] = SILU_ONE
        self.in_proj.weight[: 2 * P] = torch.cat([v_PD, -v_PD])
        self.in_proj.weight[2 * P] = 0
        v_P = v_PD.new_zeros(P)
        if a.v_bias is not None:
            v_P = a.per_query_head(a.v_bias).flatten()
            self.in_proj.bias[: 2 * P] = torch.cat([v_P, -v_P])
        self.conv.set_identity()
        self.conv.weight[2 * P] = 0
        self.conv.bias[2 * P] = SILU_ONE
        self.D.zero_()
        self.dt_proj.weight.zero_()
        self.dt_bias.fill_(SOFTPLUS_ONE)
        self.A_log[: 2 * P] = (math.log(LN2) - half_life_P.log()).repeat(2)[:, None]
        keys_ND, queries_ND, queries_N = _first_order(a, first_order_share(a, stats).to(v_PD.device), N - 1)
        read_DP = torch.linalg.pinv(v_PD, rtol=1e-3)
        self.x_proj.weight[R:] = 0
        self.x_proj.weight[[R, R + N], 2 * P] = 1
        for row, maps_ND, bias_N in ((R + 1, keys_ND, 0), (R + N + 1, queries_ND, queries_N)):
            maps_NP = maps_ND @ read_DP
            self.x_proj.weight[row : row + N - 1, : 2 * P] = torch.cat([maps_NP, -maps_NP], 1)
            self.x_proj.weight[row : row + N - 1, 2 * P] = bias_N - maps_NP @ v_P  # the bias of the values is no input
        o_DP = a.o_DHV.float() * (1 - 2 ** (-1 / half_life_P))  # the weights of an average add up to one
        self.out_proj.weight.zero_()
        self.out_proj.weight[:, : 2 * P] = torch.cat([o_DP, -o_DP], 1)
        self.out_proj.bias.zero_()
        if a.o_bias is not None:
            self.out_proj.bias.copy_(a.o_bias)


def _first_order(attention: AttentionWeights, share_H: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (rank, D) of keys and of queries and the queries' bias (rank): the best product of that rank for the heads'
    mean score, each head's times its share. Biases of keys cancel in a softmax and are left out."""
    a = attention
    q_HKE = a.q_HKD.float().unflatten(0, (a.num_heads, -1))
    bias_HK1 = torch.zeros_like(q_HKE[..., :1]) if a.q_bias is None else a.q_bias.float().view(a.num_heads, -1, 1)
    q_HKE = torch.cat([q_HKE, bias_HK1], -1) * share_H[:, None, None]
    k_HKD = a.per_query_head(a.k_GKD)
    u_ER, s_R, v_RD = torch.linalg.svd(
        torch.einsum("hke,hkd->ed", q_HKE, k_HKD) * (a.scale / a.num_heads), full_matrices=False
    )
    keys_ND, queries_NE = k_HKD.new_zeros(rank, v_RD.shape[1]), k_HKD.new_zeros(rank, len(u_ER))
    kept = min(rank, len(s_R))
    root_R1 = s_R[:kept, None].sqrt()
    keys_ND[:kept], queries_NE[:kept] = root_R1 * v_RD[:kept], root_R1 * u_ER.T[:kept]
    return keys_ND, queries_NE[:, :-1], queries_NE[:, -1]
