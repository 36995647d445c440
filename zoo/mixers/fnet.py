"""FNet: a Fourier transform in place of attention, without a single weight (Lee-Thorp et al. 2021, arXiv 2105.03824).

    y = Re F_seq x F_hidden          over the L tokens of the sequence and the D channels, not normalised

Every output is a fixed sum of all inputs, so there is a two-sided form only, and no state. Learned positions, which
the model adds, are what tells positions apart. L is the number of real tokens of a sequence: padding is taken out
before the transform and packed sequences are transformed alone. (The authors' code transforms padding with the rest;
on rows without padding the two are equal.) See `zoo.ops.fourier`.

Conversion: there is nothing to set and nothing to copy, so a converted layer starts nowhere near attention. What can
learn are the layers around it.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor

from zoo.config import MixerOptions
from zoo.mixers.base import AttentionStats, AttentionWeights, SequenceMixer, State, Traits
from zoo.ops.fourier import fourier_mixing
from zoo.registry import register_mixer


class FNetConfig(MixerOptions):
    """Options of `fnet`: none."""

    name: Literal["fnet"] = "fnet"
    causal: bool = False


@register_mixer("fnet")
class FNet(SequenceMixer):
    """Fourier mixing; see the module docstring."""

    Config = FNetConfig
    traits = Traits(causal=False, bidirectional=True, state="none")

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        x_BLD = self.take_in(x_BLD, mask_BL, segments_BL, state)
        return fourier_mixing(x_BLD, mask_BL=mask_BL, segments_BL=segments_BL), None

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        return State()

    def reset_parameters(self, std: float) -> None:
        """Nothing: there are no parameters."""

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        return cls.Config.parse({"name": cls.name, "causal": attention.causal, **options}, "mixer")

    @classmethod
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        return cls(config, attention.q_HKD.shape[1])
