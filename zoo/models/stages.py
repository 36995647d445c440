"""Blocks of hierarchical models of images (Swin): as wide as their stage, whose last one merges patches."""

from __future__ import annotations

from torch import Tensor

from zoo.config import LayerSpec, ModelSpec
from zoo.mixers.base import State
from zoo.models.backbone import Block, make_norm
from zoo.models.images import PatchMerging, stage_of


class StageBlock(Block):
    """A block of a hierarchical model of images: as wide as its stage, which it may end by merging patches."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, index: int) -> None:
        assert spec.image is not None
        stage, last = stage_of(spec.image, index)
        width = spec.hidden_size << stage
        super().__init__(spec, layer, width)
        self.grid = f"grid_RC.{stage}" if stage else "grid_RC"
        self.merge = PatchMerging(width, make_norm(spec, 4 * width)) if last else None

    def sees(self, shared: dict[str, Tensor] | None) -> dict[str, Tensor]:
        if shared is None or self.grid not in shared:
            raise ValueError("a hierarchical model needs the grid of its images: give pixel_values")
        return {**shared, "grid_RC": shared[self.grid]}

    def forward(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None,
        segments_BL: Tensor | None,
        state: State | None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        """One block, and the merging of patches behind it."""
        seen = self.sees(shared)
        x_BLD, state = super().forward(x_BLD, mask_BL, segments_BL, state, seen)
        return (x_BLD if self.merge is None else self.merge(x_BLD, seen["grid_RC"])), state
