"""Shifted-window attention (Swin Transformer, Liu et al. 2021, arXiv 2103.14030).

    y_i = sum_j softmax_j(scale * q_i . k_j + bias_h[r_i - r_j, c_i - c_j]) v_j,    j in the window of i

The grid of an image's patches is cut into windows of `window` x `window` patches, in every second layer shifted by half
of that, so that what two layers see crosses the borders. The bias is learned, one number for each head and relative
place. Special tokens (class tokens; Swin has none) see all and are seen by all, without a bias. In a sequence that is
no image a window is `window` tokens in a row. There is no causal form and no state.

Conversion from attention copies the projections, with a bias of zero: exact for windows as large as the image. All
layers then have the same `shift`; `replace_mixers` gives every second one its own.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs, QKVMixer, QKVOptions
from zoo.ops.sequences import find_sequences
from zoo.ops.shifted_window import shifted_window_attention
from zoo.registry import register_mixer


class ShiftedWindowOptions(QKVOptions):
    """Options of `shifted_window`: patches along a side of a window, and by how many the windows are shifted."""

    name: Literal["shifted_window"] = "shifted_window"
    window: int = Field(7, ge=1, le=256)
    shift: int = Field(0, ge=0, le=255)
    causal: bool = False

    @model_validator(mode="after")
    def _shift_fits(self) -> Self:
        if self.shift >= self.window:
            raise ValueError(f"shift ({self.shift}) must be smaller than window ({self.window})")
        return self


@register_mixer("shifted_window")
class ShiftedWindow(QKVMixer):
    """Attention in the windows of an image; see the module docstring."""

    Config = ShiftedWindowOptions  # type: ignore[assignment]
    traits = Traits(causal=False, bidirectional=True, state="none")
    config: ShiftedWindowOptions  # type: ignore[assignment]
    shares = True

    def __init__(self, config: ShiftedWindowOptions, width: int) -> None:
        super().__init__(config, width)
        self.bias_table = nn.Parameter(torch.empty((2 * config.window - 1) ** 2, config.num_heads))
        self.reset_parameters(0.02)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        c, grid_RC = self.config, (inputs.shared or {}).get("grid_RC")
        options: dict[str, Any] = {"window": c.window, "shift": c.shift, "scale": c.softmax_scale}
        if grid_RC is not None and inputs.segments_BL is None:
            rows, columns = grid_RC.shape
            options |= {"grid": (rows, columns), "mask_BL": inputs.mask_BL}
            return shifted_window_attention(q_BHLK, k_BGLK, v_BGLV, self.bias_table, **options), {}
        sequences = find_sequences((q_BHLK.shape[0], q_BHLK.shape[2]), inputs.mask_BL, inputs.segments_BL)
        if sequences is None:
            return shifted_window_attention(q_BHLK, k_BGLK, v_BGLV, self.bias_table, **options), {}
        q, k, v = (sequences.split_heads(x) for x in (q_BHLK, k_BGLK, v_BGLV))
        y_RHTV = shifted_window_attention(q, k, v, self.bias_table, mask_BL=sequences.mask_RT, **options)
        return sequences.join_heads(y_RHTV), {}

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def reset_parameters(self, std: float) -> None:
        """The bias normal, as the authors' code has it."""
        init.normal_(self.bias_table, std=std)

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """A shift, for `zoo.testing`."""
        return {"window": 5, "shift": 2}

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        return {"window": 7}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        self.bias_table.zero_()
