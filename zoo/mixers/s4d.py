"""S4D, a diagonal state space model (Gu et al. 2022, arXiv 2206.11893), in the block of S4 (arXiv 2111.00396).

    h' = A h + x          k_l = 2 Re(sum_n C_n (e^{dt A_n} - 1) / A_n e^{l dt A_n})      N / 2 conjugate pairs a channel
    out = glu(gelu(k * x + D x) W + b)

A is complex and diagonal, dt, A and C are those of each channel, nothing depends on the token: a whole sequence is one
long convolution, a step the recurrence, whose state is one complex vector (N / 2) per channel. Two-sided, a second C
reads the same states run backwards (Goel et al. 2022, arXiv 2202.09729, section 4.3). Positions are in the kernel.

Conversion: content does not steer a convolution, so what it can take over is the average over positions. One mode of
each channel becomes a real decay with the look-back of the heads as its half-life, W the sum of W_o W_v over the heads,
and inputs of gelu are made small, where it is linear.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import MixerOptions
from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, SequenceMixer, State, Traits
from zoo.mixers.recurrent import LN2, lookback
from zoo.ops.pairs import from_pairs, numbers, to_pairs
from zoo.ops.state_space import diagonal_ssm, discretize, legs_normal
from zoo.registry import register_mixer

SMALL = 0.1  # what a converted layer's inputs of gelu are multiplied with


class PairedStateOptions(MixerOptions):
    """Options of state space models with complex states. state_dim: N, counting both of a conjugate pair.

    dt_min, dt_max: range from which `reset_parameters` draws the steps.
    """

    state_dim: int = Field(64, ge=2, le=1024)
    dt_min: float = Field(0.001, gt=0, le=10)
    dt_max: float = Field(0.1, gt=0, le=10)
    causal: bool = True

    @field_validator("state_dim")
    @classmethod
    def _in_pairs(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"states come in conjugate pairs, so their number is even; {value} is not")
        return value


class StateSpaceOptions(PairedStateOptions):
    """Options of mixers in the block of S4. glu: a gate after W."""

    glu: bool = True


class StateSpaceMixer(SequenceMixer):
    """The block of S4: a state space model per channel, skip, GELU, a map over the channels with a gate."""

    config: StateSpaceOptions
    traits = Traits(causal=True, bidirectional=True, state="constant")
    C: nn.Parameter
    C_back: nn.Parameter | None  # of the two-sided form

    def __init__(self, config: StateSpaceOptions, width: int) -> None:
        super().__init__(config, width)
        self.D = nn.Parameter(torch.empty(width))
        self.out_proj = Linear(width, width * (1 + config.glu))

    @abstractmethod
    def ssm(self, x_BLD: Tensor, mask_BL: Tensor | None, segments_BL: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """The state space model: outputs (B, L, D), and the new complex state (or `Pairs`) where there was one."""

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        x_BLD = self.take_in(x_BLD, mask_BL, segments_BL, state)
        before = None if state is None else from_pairs(state["ssm"], steps=True)
        y_BLD, after = self.ssm(x_BLD, mask_BL, segments_BL, before)
        out_BLD = self.out_proj(F.gelu(y_BLD + x_BLD * self.D.to(x_BLD.dtype)))
        if self.config.glu:
            out_BLD = F.glu(out_BLD)
        if state is None:
            return out_BLD, None
        assert after is not None
        return out_BLD, State({"ssm": to_pairs(after)}, state.length + x_BLD.shape[1])

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        device, dtype = device or self.D.device, torch.promote_types(dtype or self.D.dtype, torch.float32)
        shape = (batch_size, self.width, self.config.state_dim // 2, 2)
        return State({"ssm": torch.zeros(shape, device=device, dtype=dtype)})

    def reset_parameters(self, std: float) -> None:
        """D normal, the map uniform in 1/sqrt(its inputs), as published."""
        init.normal_(self.D)
        bound = self.width**-0.5
        init.uniform_(self.out_proj.weight, -bound, bound)
        init.uniform_(self.out_proj.bias, -bound, bound)

    def log_steps(self) -> Tensor:
        """Logarithms of steps (D) drawn evenly from [log dt_min, log dt_max]."""
        low, high = math.log(self.config.dt_min), math.log(self.config.dt_max)
        return torch.rand(self.width) * (high - low) + low

    def start_map(self, attention: AttentionWeights) -> None:
        """W from the sum of W_o W_v over the heads, for inputs of gelu that are `SMALL` times what they stand for."""
        a, D = attention, self.width
        v_PD = a.per_query_head(a.v_GVD).flatten(0, 1)
        factor = 2.0 if self.config.glu else 1.0  # a gate of weight zero is a half
        bias_D = torch.zeros(D, device=v_PD.device) if a.o_bias is None else a.o_bias.float()
        if a.v_bias is not None:
            bias_D = bias_D + a.o_DHV.float() @ a.per_query_head(a.v_bias).flatten()
        self.D.zero_()
        self.out_proj.weight.zero_()
        self.out_proj.bias.zero_()
        self.out_proj.weight[:D] = a.o_DHV.float() @ v_PD * (2 * factor / SMALL)  # gelu(y) = y / 2 + ...
        self.out_proj.bias[:D] = factor * bias_D

    def read_first_mode(self, average_D: Tensor) -> None:
        """C that reads nothing but the first mode, which `average_D` makes a mean of the inputs."""
        # Both of the "pair" are the same real mode, hence a half; two-sided, each side is a half of the average.
        share = 0.5 if self.config.causal else 0.25
        for C in (self.C, self.C_back):
            if C is not None:
                C.zero_()
                C[:, 0, 0] = SMALL * average_D * share

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        return cls.Config.parse({"name": cls.name, "causal": attention.causal, **options}, "mixer")


def channel_half_lives(attention: AttentionWeights, stats: AttentionStats | None) -> Tensor:
    """Half-life (D) of each input channel: the heads' look-backs, a geometric mean weighted by what they take of it."""
    a = attention
    o_DHV = a.o_DHV.float().unflatten(1, (a.num_heads, -1))
    v_HVD = a.per_query_head(a.v_GVD)
    share_HD = torch.stack([(o_DHV[:, h] @ v_HVD[h]).square().sum(0) for h in range(a.num_heads)])
    log_H = lookback(a, stats, a.num_heads).to(share_HD).log()
    return ((share_HD * log_H[:, None]).sum(0) / share_HD.sum(0).clamp(min=1e-12)).exp().clamp(min=1.0)


class S4DConfig(StateSpaceOptions):
    """Options of `s4d`. init: where A starts, "lin" -1/2 + i pi n, "inv" -1/2 + i N/pi (N/(2n+1) - 1), "legs" the
    eigenvalues of the normal part of HiPPO-LegS; B is one. discretization: zero-order hold or bilinear."""

    name: Literal["s4d"] = "s4d"
    init: Literal["lin", "inv", "legs"] = "lin"
    discretization: Literal["zoh", "bilinear"] = "zoh"


@register_mixer("s4d")
class S4D(StateSpaceMixer):
    """S4D; see the module docstring."""

    Config = S4DConfig
    keep_float32 = ("log_dt", "log_A_real", "A_imag", "C", "C_back", "D")
    config: S4DConfig

    def __init__(self, config: S4DConfig, width: int) -> None:
        super().__init__(config, width)
        pairs = config.state_dim // 2
        self.log_dt = nn.Parameter(torch.empty(width))
        self.log_A_real = nn.Parameter(torch.empty(width, pairs))
        self.A_imag = nn.Parameter(torch.empty(width, pairs))
        self.C = nn.Parameter(torch.empty(width, pairs, 2))
        self.C_back = None if config.causal else nn.Parameter(torch.empty(width, pairs, 2))
        self.reset_parameters(0.02)

    def discrete(self, steps: bool = False) -> tuple[Any, Any]:
        """log z and the factor of the inputs, both complex (D, N / 2)."""
        A_DN = numbers(-self.log_A_real.exp(), self.A_imag, steps)
        return discretize(self.log_dt.exp(), A_DN, self.config.discretization)

    def ssm(self, x_BLD: Tensor, mask_BL: Tensor | None, segments_BL: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        final = state is not None
        log_z, taken = self.discrete(steps=final)
        back = None if self.C_back is None else torch.view_as_complex(self.C_back) * taken
        c = from_pairs(self.C, steps=final) * taken
        return diagonal_ssm(x_BLD, log_z, c, back, initial=state, final=final, mask_BL=mask_BL, segments_BL=segments_BL)

    def reset_parameters(self, std: float) -> None:
        """A as `init` says, C complex normal of variance one, dt log-uniform in [dt_min, dt_max]."""
        super().reset_parameters(std)
        init.copy_(self.log_dt, self.log_steps())
        A_N = initial_rates(self.config.init, self.config.state_dim)
        init.copy_(self.log_A_real, (-A_N.real).log().expand_as(self.log_A_real))
        init.copy_(self.A_imag, A_N.imag.expand_as(self.A_imag))
        for C in (self.C, self.C_back):
            if C is not None:
                init.normal_(C, std=0.5**0.5)

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        assert isinstance(config, S4DConfig)
        mixer = cls(config, attention.q_HKD.shape[1])
        mixer.start_map(attention)
        mixer.A_imag[:, 0] = 0
        mixer.log_A_real[:, 0] = math.log(LN2) - channel_half_lives(attention, stats).log() - mixer.log_dt
        log_z, taken = mixer.discrete()
        average_D = ((1 - log_z[:, 0].exp()) / taken[:, 0]).real
        mixer.read_first_mode(average_D)
        return mixer


def initial_rates(name: str, state_dim: int) -> Tensor:
    """A (N / 2), complex128, of the initialisation `name`: section 4 of the S4D paper."""
    n = torch.arange(state_dim // 2, dtype=torch.float64)
    if name == "legs":
        return legs_normal(state_dim)[0]
    imag = math.pi * n if name == "lin" else state_dim / math.pi * (state_dim / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(n, -0.5), imag)
