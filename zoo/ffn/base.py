"""The contract of a channel mixer that needs more than the position itself.

Most channel mixers are plain modules, (B, L, D) -> (B, L, D), and need nothing from here. One that has to know which
positions are real (a router that counts tokens), that looks one step back (RWKV's token shift) or that adds a term to
the loss (load balancing) derives from `ChannelMixer`. Shapes: see `zoo.mixers.base`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.config import FFNOptions
from zoo.mixers.base import State


class ChannelMixer(nn.Module, ABC):
    """Base of channel mixers with context: a mask, packed segments, a carried state, a loss of their own.

    `auxiliary_loss` is a scalar, already weighted, that the last forward in training added to the loss of the model;
    None where there is none. `keep_float32` names parameters that must stay float32 under any dtype; `place` is as in a
    `SequenceMixer`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[FFNOptions]]
    keep_float32: ClassVar[tuple[str, ...]] = ()
    auxiliary_loss: Tensor | None = None
    place: tuple[int, int] = (0, 1)

    @property
    def causal(self) -> bool:
        """Whether no output depends on a later position."""
        return True

    @property
    def not_causal(self) -> str:
        """The option because of which `causal` is False, for messages."""
        return self.name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "auxiliary_loss": None}  # copies and pickles: not of a graph

    @abstractmethod
    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """The output (B, L, D) and the new state, None where none was given. Arguments as of a `SequenceMixer`."""

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first position; empty where nothing is carried."""
        return State()

    def after_step(self) -> None:
        """Called after each step of the optimizer: what is learned by counting instead of by gradients."""

    def stacked_weights(self) -> tuple[int, int]:
        """Weights of linear maps that are not modules (experts): all of them, and those that one token meets."""
        return 0, 0

    @abstractmethod
    def reset_parameters(self, std: float) -> None:
        """Initialise as the paper does; `std` is the model's `initializer_range` for plain projections."""
