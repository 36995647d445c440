"""Mamba-2, state space duality (Dao and Gu 2024, arXiv 2405.21060).

    h_t = exp(-exp(A_log) dt_t) h_{t-1} + dt_t B_t x_t^T          y_t = h_t^T C_t + D x_t
    dt_t = softplus(W_dt u_t + dt_bias)                           out = norm(y * silu(W_z u)) W_o

In the words of attention: C is the query, B the key, x the value, `head_dim` the size N of the state and
`value_head_dim` the head size P. B, C and x pass short convolutions with SiLU; the norm is an RMSNorm over
`norm_groups` parts of the inner width, after the gate. `num_groups` heads of B and C are shared by the heads of x.
The state is one matrix (N, P) per head. Conversion (Wang et al. 2024, arXiv 2408.15237): C, B, x from W_q, W_k, W_v
with grouped heads as in attention, dt 1 and A such that the measured look-back is the half-life, D 0, open gate, norm
per head, no convolution, and softmax features of C and B, so that their products are positive as attention's weights.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs
from zoo.mixers.recurrent import (
    LN2,
    SOFTPLUS_ONE,
    FeatureMap,
    GroupedOptions,
    RecurrentMixer,
    feature_map,
    grouped_heads,
    inverse_softplus_times,
    lookback,
    softmax_features,
    softplus32,
    spread_groups,
)
from zoo.registry import register_mixer


class Mamba2Config(GroupedOptions):
    """Options of `mamba2`; the defaults are the published block. `norm_groups` None: as `num_groups`, or one.

    step_bias: whether the steps' projection has a bias beside `dt_bias`, as where all projections of a published model
    have one. dt_min, dt_max: range from which `reset_parameters` draws the steps of the heads. dt_floor: no step is
    smaller (Zamba2). feature_map: of C and B, behind their convolutions; converted layers have one.
    """

    name: Literal["mamba2"] = "mamba2"
    conv: int | None = Field(4, ge=2, le=64)
    conv_bias: bool = True
    head_norm: Literal[False] = False  # the norm is over groups of heads, and after the gate
    gate: bool = True
    scale: float | None = Field(1.0, gt=0, le=1e4)
    norm: bool = True
    norm_groups: int | None = Field(None, ge=1, le=1024)
    norm_eps: float = Field(1e-5, gt=0, le=1)
    step_bias: bool = False
    dt_min: float = Field(0.001, gt=0, le=10)
    dt_max: float = Field(0.1, gt=0, le=10)
    dt_floor: float = Field(0.0, ge=0, le=10)
    feature_map: FeatureMap | None = None

    @model_validator(mode="after")
    def _norm_divides(self) -> Mamba2Config:
        if (self.num_heads * self.value_dim) % self.group_count:
            raise ValueError(
                f"inner width {self.num_heads * self.value_dim} does not divide into {self.norm_groups} groups"
            )
        return self

    @property
    def group_count(self) -> int:
        """Parts of the inner width that are normalised apart."""
        return self.norm_groups or self.num_groups or 1

    def resolved(self, width: int) -> Self:
        """With the number of parts written out, and heads that share nothing as groups of one."""
        groups = self.num_heads if self.num_groups is None and self.kv_heads == self.num_heads else self.num_groups
        sizes = {"norm_groups": self.group_count if self.norm else None, "num_groups": groups}
        return super().resolved(width).model_copy(update=sizes)


@register_mixer("mamba2")
class Mamba2(RecurrentMixer):
    """Mamba-2; see the module docstring."""

    Config = Mamba2Config
    traits = Traits(causal=True, bidirectional=False, state="constant")
    keep_float32 = ("A_log", "dt_bias", "D")
    projected_heads = staticmethod(grouped_heads)
    config: Mamba2Config

    def __init__(self, config: Mamba2Config, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        heads = config.kv_heads
        self.dt_proj = Linear(width, heads, bias=config.step_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        if own_projections and config.norm:
            self.norm = GroupNorm(config.num_heads * config.value_dim, config.group_count, config.norm_eps)
        self.reset_parameters(0.02)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        q_BHLK, k_BGLK = (feature_map(self.config.feature_map, x) for x in (q_BHLK, k_BGLK))
        q_BHLK, k_BGLK = spread_groups(self.config, q_BHLK, k_BGLK)
        dt_BGL = softplus32(self.dt_proj(inputs.x_BLD), self.dt_bias).transpose(1, 2)
        if self.config.dt_floor:
            dt_BGL = dt_BGL.clamp(min=self.config.dt_floor)
        log_decay_BGL = -self.A_log.exp()[:, None] * dt_BGL
        written_BGLV = v_BGLV * dt_BGL[..., None].to(v_BGLV.dtype)
        y_BHLV, tensors = self.recur(q_BHLK, k_BGLK, written_BGLV, inputs, log_decay_BGL, self.config.softmax_scale)
        skip_BGLV = v_BGLV * self.D[:, None, None].to(v_BGLV.dtype)
        if q_BHLK.shape[1] != skip_BGLV.shape[1]:
            skip_BGLV = skip_BGLV.repeat_interleave(q_BHLK.shape[1] // skip_BGLV.shape[1], 1)
        return y_BHLV + skip_BGLV, tensors

    def finish(self, y_BHLV: Tensor, x_BLD: Tensor) -> Tensor:
        """Gate, norm over groups and output projection, in this order."""
        y_BLE = y_BHLV.transpose(1, 2).flatten(-2)
        if self.config.gate:
            y_BLE = y_BLE * F.silu(self.g_proj(x_BLD))
        if self.config.norm:
            y_BLE = self.norm(y_BLE)
        return self.o_proj(y_BLE)

    @property
    def normalizes_output(self) -> bool:
        return self.config.norm

    def reset_parameters(self, std: float) -> None:
        """A uniform in [1, 16], steps log-uniform in [dt_min, dt_max], D one."""
        heads = self.config.kv_heads
        init.copy_(self.A_log, torch.empty(heads).uniform_(1, 16).log())
        init.copy_(self.dt_bias, inverse_softplus_times(self.config.dt_min, self.config.dt_max, (heads,)))
        init.ones_(self.D)

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        plain = {"conv": None, "conv_bias": False, "gate_bias": True, "norm_groups": attention.num_heads}
        return {**plain, **softmax_features(attention)}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        self.dt_proj.weight.zero_()
        if self.dt_proj.bias is not None:
            self.dt_proj.bias.zero_()
        self.dt_bias.fill_(SOFTPLUS_ONE)  # dt 1: what is written is the value itself
        self.A_log.copy_(math.log(LN2) - lookback(attention, stats, self.config.kv_heads).log())
        self.D.zero_()


class GroupNorm(nn.Module):
    """RMSNorm over `groups` equal parts of the last dimension, with one weight per channel."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, x_BLE: Tensor) -> Tensor:
        if self.groups == 1:
            return F.rms_norm(x_BLE, self.weight.shape, self.weight.to(x_BLE.dtype), self.eps)
        x = x_BLE.unflatten(-1, (self.groups, -1))
        return F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(-2) * self.weight.to(x.dtype)

    def reset_parameters(self, std: float) -> None:
        """Weights of one."""
        init.ones_(self.weight)
