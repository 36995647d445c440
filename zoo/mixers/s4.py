"""S4, the structured state space model (Gu et al. 2021, arXiv 2111.00396): HiPPO-LegS as diagonal plus low rank.

    h' = A h + B x,  y = C h        A = diag(w) - P P*, at the start the normal form of HiPPO-LegS
    out = glu(gelu(y + D x) W + b)

Each channel has a model of its own, discretised by the bilinear rule with a learned step dt. A sequence is one long
convolution, whose kernel comes from repeated squarings (`zoo.ops.dplr` says why not from the paper's Cauchy kernels,
whose sum is the same); a step is the recurrence, O(N) by Woodbury's identity. The state is one complex vector (N / 2)
per channel. Two-sided, a second C reads the states run backwards (arXiv 2202.09729). As in that paper P stands on both
sides, which keeps A stable; C, not C (I - Abar^L), is the parameter: lengths may vary.

Conversion as for `s4d`: the first mode, taken out of the low-rank part, becomes the fading average over positions.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import MixerOptions
from zoo.mixers.base import AttentionStats, AttentionWeights
from zoo.mixers.s4d import StateSpaceMixer, StateSpaceOptions, channel_half_lives
from zoo.ops.dplr import DPLR, dplr_ssm
from zoo.ops.pairs import from_pairs, numbers
from zoo.ops.state_space import legs_normal
from zoo.registry import register_mixer


class S4Config(StateSpaceOptions):
    """Options of `s4`."""

    name: Literal["s4"] = "s4"


@register_mixer("s4")
class S4(StateSpaceMixer):
    """S4; see the module docstring."""

    Config = S4Config
    keep_float32 = ("log_dt", "log_A_real", "A_imag", "P", "B", "C", "C_back", "D")
    config: S4Config

    def __init__(self, config: S4Config, width: int) -> None:
        super().__init__(config, width)
        pairs = config.state_dim // 2
        self.log_dt = nn.Parameter(torch.empty(width))
        self.log_A_real = nn.Parameter(torch.empty(width, pairs))
        self.A_imag = nn.Parameter(torch.empty(width, pairs))
        self.P = nn.Parameter(torch.empty(width, pairs, 2))
        self.B = nn.Parameter(torch.empty(width, pairs, 2))
        self.C = nn.Parameter(torch.empty(width, pairs, 2))
        self.C_back = None if config.causal else nn.Parameter(torch.empty(width, pairs, 2))
        self.reset_parameters(0.02)

    def model(self, steps: bool = False) -> DPLR:
        """The state space models of all channels; `steps` where they go from state to state."""
        outputs: list[Tensor] = [self.C] if self.C_back is None else [self.C, self.C_back]
        return DPLR(
            self.log_dt.exp(),
            numbers(-self.log_A_real.exp(), self.A_imag, steps),
            *(from_pairs(x, steps) for x in (self.P, self.B, torch.stack(outputs))),
        )

    def ssm(self, x_BLD: Tensor, mask_BL: Tensor | None, segments_BL: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        final = state is not None
        return dplr_ssm(x_BLD, self.model(final), initial=state, final=final, mask_BL=mask_BL, segments_BL=segments_BL)

    def reset_parameters(self, std: float) -> None:
        """w, P and B of HiPPO-LegS, C complex normal of variance one, dt log-uniform in [dt_min, dt_max]."""
        super().reset_parameters(std)
        init.copy_(self.log_dt, self.log_steps())
        w_N, p_N, b_N = legs_normal(self.config.state_dim)
        init.copy_(self.log_A_real, (-w_N.real).log().expand_as(self.log_A_real))
        init.copy_(self.A_imag, w_N.imag.expand_as(self.A_imag))
        init.copy_(self.P, torch.view_as_real(p_N).expand_as(self.P))
        init.copy_(self.B, torch.view_as_real(b_N).expand_as(self.B))
        for C in (self.C, self.C_back):
            if C is not None:
                init.normal_(C, std=0.5**0.5)

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        assert isinstance(config, S4Config)
        mixer = cls(config, attention.q_HKD.shape[1])
        mixer.start_map(attention)
        z_D = 2 ** (-1 / channel_half_lives(attention, stats))
        turn_D = (1 - z_D) / (1 + z_D)  # -dt/2 A of the mode that fades by z a step
        mixer.A_imag[:, 0] = 0
        mixer.log_A_real[:, 0] = (2 * turn_D).log() - mixer.log_dt
        mixer.P[:, 0] = 0
        mixer.B[:, 0] = torch.tensor([1.0, 0.0])
        average_D = (1 - z_D) * (1 + turn_D) / mixer.log_dt.exp()
        mixer.read_first_mode(average_D)
        return mixer
