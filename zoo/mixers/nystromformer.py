"""Nystromformer: softmax attention from landmarks, and a convolution of the values (Xiong et al. 2021, AAAI,
arXiv 2102.03902).

    y = softmax(Q K~^T) softmax(Q~ K~^T)^+ softmax(Q~ K^T) V + conv(V)

Q~ and K~ are the means of `landmarks` pieces of the sequence, ^+ is the pseudo-inverse by six iterations, and conv is
depthwise along the sequence, with one kernel per head (section 3.4). Time and memory grow with L * landmarks.
See `zoo.ops.nystrom`.

There is no causal form: the means hold later tokens. Landmarks and the convolution follow the tokens of a sequence, so
padding is taken out of a row first and packed sequences get landmarks of their own. The authors' code instead cuts one
fixed padded length into pieces; for a sequence without padding the two agree.

Conversion copies the projections and starts the convolution at zero. It is exact for sequences of at most `landmarks`
tokens, where every token is its own landmark.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs, QKVMixer, QKVOptions
from zoo.ops.nystrom import nystrom_attention
from zoo.ops.sequences import find_sequences
from zoo.registry import register_mixer


class NystromformerConfig(QKVOptions):
    """Options of `nystromformer`. `skip_taps`: length of the convolution of the values, odd; None leaves it out."""

    name: Literal["nystromformer"] = "nystromformer"
    causal: bool = False
    landmarks: int = Field(64, ge=1, le=1 << 14)
    iterations: int = Field(6, ge=1, le=64)
    skip_taps: int | None = Field(65, ge=1, le=1023)

    @model_validator(mode="after")
    def _odd(self) -> NystromformerConfig:
        if self.skip_taps is not None and self.skip_taps % 2 == 0:
            raise ValueError(f"skip_taps ({self.skip_taps}) must be odd, to have a middle; try {self.skip_taps + 1}")
        return self


@register_mixer("nystromformer")
class Nystromformer(QKVMixer):
    """Nystrom attention; see the module docstring."""

    Config = NystromformerConfig
    traits = Traits(causal=False, bidirectional=True, state="none")
    config: NystromformerConfig

    def __init__(self, config: NystromformerConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        if config.skip_taps is not None:
            self.skip_HT = nn.Parameter(torch.empty(config.num_heads, config.skip_taps))
            self.reset_parameters(0.02)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        B, L = q_BHLK.shape[0], q_BHLK.shape[2]
        sequences = find_sequences((B, L), inputs.mask_BL, inputs.segments_BL)
        if sequences is None:
            return self._attend(q_BHLK, k_BGLK, v_BGLV, None), {}
        q_RHTK, k_RGTK, v_RGTV = (sequences.split_heads(x) for x in (q_BHLK, k_BGLK, v_BGLV))
        return sequences.join_heads(self._attend(q_RHTK, k_RGTK, v_RGTV, sequences.length_R)), {}

    def _attend(self, q_RHTK: Tensor, k_RGTK: Tensor, v_RGTV: Tensor, length_R: Tensor | None) -> Tensor:
        """Sequences that start at 0, zeros behind their ends."""
        c = self.config
        y_RHTV = nystrom_attention(
            q_RHTK, k_RGTK, v_RGTV,
            landmarks=c.landmarks, iterations=c.iterations, scale=c.softmax_scale, length_B=length_R,
        )  # fmt: skip
        if c.skip_taps is None:
            return y_RHTV
        v_RHTV = v_RGTV.repeat_interleave(c.num_heads // c.kv_heads, 1)
        weight = self.skip_HT.to(v_RHTV.dtype)[:, None, :, None]
        skip_RHTV = F.conv2d(v_RHTV, weight, padding=(c.skip_taps // 2, 0), groups=c.num_heads)
        return y_RHTV + skip_RHTV

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def reset_parameters(self, std: float) -> None:
        """The convolution as the other weights, normal with `std`."""
        if self.config.skip_taps is not None:
            init.normal_(self.skip_HT, std=std)

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        if self.config.skip_taps is not None:
            self.skip_HT.zero_()

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """Fewer landmarks than the sequences of `zoo.testing` have tokens."""
        return {"landmarks": 8, "skip_taps": 5}
