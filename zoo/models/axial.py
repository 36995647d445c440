"""Axial positions (Kitaev et al. 2020, arXiv:2001.04451; Ho et al. 2019, arXiv:1912.12180): learned positions of very
long sequences from few parameters.

A position is written as a number with one digit for each axis of a grid (the last axis turns fastest). Each axis has a
small table of vectors, and a position's vector is the vectors of its digits beside each other: half a million positions
of width 256 take 512 * 64 + 1024 * 192 numbers instead of 134 million.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import ModelSpec
from zoo.errors import ConfigError


def axial_positions(spec: ModelSpec) -> AxialPositions:
    """The positions that a model's config describes. Raises ConfigError where its numbers do not fit together."""
    shape, dims, places = spec.axial_shape, spec.axial_dims, math.prod(spec.axial_shape)
    if spec.positions != "learned" or spec.position_offset:
        raise ConfigError("axial_shape: needs positions: learned and no position_offset")
    if len(shape) != len(dims) or min(*shape, *dims) < 1:
        raise ConfigError(f"axial_shape: {shape} and axial_dims {dims} must be as many positive numbers")
    if places != spec.max_position_embeddings:
        raise ConfigError(f"axial_shape: {shape} is {places} positions, not {spec.max_position_embeddings}")
    if sum(dims) != spec.sum_size:
        raise ConfigError(f"axial_dims: {dims} add up to {sum(dims)}, not to hidden_size ({spec.sum_size})")
    return AxialPositions(shape, dims)


class AxialPositions(nn.Module):
    """Position vectors from one table per axis: int64 (B, L) -> (B, L, sum of dims).

    Args:
        shape: how many places each axis has; their product is the number of positions.
        dims: the width of each axis' vectors.
    """

    def __init__(self, shape: Sequence[int], dims: Sequence[int]) -> None:
        super().__init__()
        self.axes = nn.ParameterList(nn.Parameter(torch.empty(n, d)) for n, d in zip(shape, dims, strict=True))
        self.reset_parameters(0.0)

    def reset_parameters(self, std: float) -> None:
        """Normal with standard deviation 1, as the authors' models, whatever that of the other weights is."""
        for axis in self.axes:
            init.normal_(axis, std=1.0)

    def forward(self, positions_BL: Tensor) -> Tensor:
        parts = []
        for axis in reversed(self.axes):
            parts.append(axis[positions_BL % axis.shape[0]])
            positions_BL = positions_BL // axis.shape[0]
        return torch.cat(parts[::-1], -1)
