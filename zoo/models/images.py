"""Images as sequences: patches, special tokens, positions that can be resized.

    x = [class; distillation; patch_1 W + b; ...; patch_N W + b] + positions

Vision Transformer: Dosovitskiy et al. 2020, arXiv 2010.11929. The distillation token: Touvron et al. 2020 (DeiT), arXiv
2012.12877. Patches are numbered row by row; the special tokens come first.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import ImageOptions
from zoo.linear import Linear


class PatchEmbedding(nn.Module):
    """Pixels (B, channels, rows, columns) to the input of the first layer (B, prefix + patches, D)."""

    def __init__(self, options: ImageOptions, width: int) -> None:
        super().__init__()
        self.options = options
        size = options.patch_size
        self.projection: nn.Module = nn.Conv2d(options.channels, width, kernel_size=size, stride=size)
        if options.stem is not None:
            self.projection = ConvolutionalStem([options.channels, *options.stem, width])
        if options.class_token:
            self.class_token = nn.Parameter(torch.empty(1, 1, width))
        if options.distillation_token:
            self.distillation_token = nn.Parameter(torch.empty(1, 1, width))
        if options.positions:
            self.position_table = nn.Parameter(torch.empty(1, options.prefix + options.grid**2, width))
        self.reset_parameters(0.02)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The sequence. Raises ValueError for other channels or sizes than the config allows."""
        rows, columns = self.grid_size(pixel_values)
        x_BDRC = self.projection(pixel_values.to(next(self.projection.parameters()).dtype))
        parts = [x_BDRC.flatten(2).mT]
        for name in ("distillation_token", "class_token"):
            if hasattr(self, name):
                parts.insert(0, getattr(self, name).expand(x_BDRC.shape[0], -1, -1).to(x_BDRC.dtype))
        x_BLD = torch.cat(parts, 1)
        return x_BLD + self.positions(rows, columns) if self.options.positions else x_BLD

    def grid_size(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in these images. Raises ValueError where they do not fit the config."""
        o = self.options
        if pixel_values.dim() != 4 or pixel_values.shape[1] != o.channels:
            raise ValueError(f"images must be (batch, {o.channels}, rows, columns), got {tuple(pixel_values.shape)}")
        height, width = pixel_values.shape[2:]
        unit = o.patch_size * o.merged
        if height % unit or width % unit:
            raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {unit}")
        if o.interpolation is None and (height, width) != (o.image_size, o.image_size):
            raise ValueError(
                f"images are {height} x {width} pixels, but the model is for {o.image_size} x {o.image_size} "
                "(set image.interpolation to resize its positions)"
            )
        return height // o.patch_size, width // o.patch_size

    def grids(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """`grid_RC`: where in the sequence the patch of a row and column stands; `grid_RC.1`, ...: in later stages."""
        rows, columns = self.grid_size(pixel_values)
        found = {}
        for stage in range(len(self.options.stages or [1])):
            place_L = self.options.prefix + torch.arange(rows * columns, device=pixel_values.device)
            found[f"grid_RC.{stage}" if stage else "grid_RC"] = place_L.view(rows, columns)
            rows, columns = rows // 2, columns // 2
        return found

    def positions(self, rows: int, columns: int) -> Tensor:
        """The learned positions (1, L, D), those of the patches resized where the image is of another size."""
        o = self.options
        if rows == columns == o.grid:
            return self.position_table
        patches_1DRC = self.position_table[:, o.prefix :].mT.unflatten(2, (o.grid, o.grid))
        resized_1DRC = F.interpolate(
            patches_1DRC.float(),
            size=(rows, columns),
            mode="bicubic",
            align_corners=False,
            antialias=o.interpolation == "bicubic_antialias",
        )
        resized_1LD = resized_1DRC.to(self.position_table.dtype).flatten(2).mT
        return torch.cat([self.position_table[:, : o.prefix], resized_1LD], 1)

    def reset_parameters(self, std: float) -> None:
        """Tokens and positions normal, as in DeiT; the projection scaled by what it sums, as in ViT's own code.

        A stem's convolutions are scaled for the ReLU behind them (He et al. 2015, arXiv 1502.01852), as in CCT's code.
        """
        for conv in (m for m in self.projection.modules() if isinstance(m, nn.Conv2d)):
            gain = 1.0 if self.options.stem is None else 2.0**0.5
            init.normal_(conv.weight, std=gain * conv.weight[0].numel() ** -0.5)
            if conv.bias is not None:
                init.zeros_(conv.bias)
        for name in ("class_token", "distillation_token", "position_table"):
            if hasattr(self, name):
                init.normal_(getattr(self, name), std=std)


class ConvolutionalStem(nn.Sequential):
    """Patches by convolutions that overlap: 3 x 3, ReLU and 3 x 3 maxima two apart, as often as channels change.

    The tokenizer of the compact convolutional transformer for small images (CCT, Hassani et al. 2021, arXiv
    2104.05704), which learns from little data what a projection of patches learns from much. Each step halves the
    sides.
    """

    def __init__(self, channels: list[int]) -> None:
        parts: list[nn.Module] = []
        for before, behind in itertools.pairwise(channels):
            parts += [nn.Conv2d(before, behind, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
        super().__init__(*parts)


def stage_of(options: ImageOptions, layer: int) -> tuple[int, bool]:
    """The stage of a layer, from 0, and whether patches are merged behind it."""
    ends = list(itertools.accumulate(options.stages or []))
    stage = next(i for i, end in enumerate(ends) if layer < end)
    return stage, layer + 1 == ends[stage] and stage + 1 < len(ends)


class PatchMerging(nn.Module):
    """Four neighbouring patches become one of twice the width (Swin, Liu et al. 2021, arXiv 2103.14030, section 3.1).

    y = norm([x at row 0, column 0; row 1, column 0; row 0, column 1; row 1, column 1]) W
    """

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm  # of 4 * width
        self.reduction = Linear(4 * width, 2 * width, bias=False)

    def forward(self, x_BLD: Tensor, grid_RC: Tensor) -> Tensor:
        """(B, rows * columns, D) -> (B, rows * columns / 4, 2 D)."""
        rows, columns = grid_RC.shape
        x = x_BLD.unflatten(1, (rows // 2, 2, columns // 2, 2))
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)))
