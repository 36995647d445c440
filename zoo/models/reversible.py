"""Reversible residuals: a stack of blocks that keeps the activations of its end only (Gomez et al. 2017,
arXiv:1707.04585; in Transformers Kitaev et al. 2020, arXiv:2001.04451).

    a = a + mixer(norm(b));   b = b + ffn(norm(a))             two streams, both the embedding at first

Each line can be undone: b = b - ffn(norm(a)), then a = a - mixer(norm(b)). So the backward pass goes through the blocks
from the last to the first, finds the inputs of each again, computes it a second time with gradients, and throws it
away: memory for activations does not grow with depth. The second time random numbers (dropout) and decisions without a
gradient (`zoo.ops.decisions`) are those of the first. Inputs found again differ from the first ones by rounding only.
What a channel mixer adds to the loss of the model (balance of experts) is an output of the stack, beside the streams.
Mixer and channel mixer are called, not the block: what gathers parameters when a module is called (FSDP) wraps those.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.config import ModelSpec
from zoo.errors import ConfigError
from zoo.ffn.base import ChannelMixer
from zoo.models.shared import parameters_of
from zoo.ops.decisions import recording, replaying


def check_reversible(spec: ModelSpec) -> None:
    """Raise ConfigError where a config asks for reversible blocks and for what these cannot have."""
    if spec.block != "reversible":
        return
    if spec.tie_word_embeddings:
        raise ConfigError("tie_word_embeddings: must be false with block: reversible, whose heads read both streams")
    if spec.embedding_size is not None:
        raise ConfigError("embedding_size: not with block: reversible, whose heads read both streams as they are")
    if any(layer.ffn is None for layer in spec.layers):
        raise ConfigError("block: reversible needs a channel mixer (ffn) in every layer")
    if any(layer.block is not None for layer in spec.layers):
        raise ConfigError("layers.0.block: a model of reversible blocks has no other ones")
    if any(layer.memory is not None for layer in spec.layers):
        raise ConfigError("memory: belongs to block: pre_norm, for it is no residual that could be undone")
    if any(layer.depth is not None for layer in spec.layers):
        raise ConfigError("depth: a block that some tokens pass by cannot be reversible; take block: pre_norm")


def can_recompute(blocks: Iterable[Any]) -> bool:
    """Whether a stack can be run by `reversible_stack`.

    Not with mixers that share tensors between layers: what these leave behind (the first layer's values) would have no
    gradient.
    """
    return all(block.order == "reversible" and not block.mixer.shares for block in blocks)


def reversible_stack(
    blocks: Iterable[Any], x_BLE: Tensor, mask_BL: Tensor | None, segments_BL: Tensor | None
) -> Tensor:
    """The blocks one after the other on both streams side by side, (B, L, 2 D), with activations recomputed.

    Afterwards `auxiliary_loss` of a channel mixer has a gradient, and is the sum over its runs in this pass.
    """
    parts: list[_Part] = []
    context = {"mask_BL": mask_BL, "segments_BL": segments_BL}
    for block in blocks:
        parts.append(_Part(0, _mix(block, context), _trained(block.mixer_norm, block.mixer)))
        parts.append(_Part(1, _feed(block, context), _trained(block.ffn_norm, block.ffn), block.ffn))
    a_BLD, b_BLD, *losses = _Reversible.apply(
        parts, *x_BLE.chunk(2, -1), *(p for part in parts for p in part.parameters)
    )
    mixers = [part.ffn for part in parts if part.adds]
    for ffn in mixers:
        ffn.auxiliary_loss = torch.stack([x for owner, x in zip(mixers, losses, strict=True) if owner is ffn]).sum()
    return torch.cat([a_BLD, b_BLD], -1)


def _mix(block: Any, context: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    return lambda x_BLD: block.mixer(block.mixer_norm(x_BLD), **context)[0]


def _feed(block: Any, context: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    if isinstance(block.ffn, ChannelMixer):
        return lambda x_BLD: block.ffn(block.ffn_norm(x_BLD), **context)[0]
    return lambda x_BLD: block.ffn(block.ffn_norm(x_BLD))


def _trained(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for p in parameters_of(*modules) if p.requires_grad]


@dataclass
class _Part:
    """One line of a block: what is added to stream `target` is a function of the other stream.

    `adds`: whether the channel mixer `ffn` also added to the loss.
    """

    target: int
    function: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    ffn: Any = None
    adds: bool = False
    random: dict[str, Tensor] = field(default_factory=dict)
    decisions: deque[Tensor] = field(default_factory=deque)

    def first(self, x_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is added to the stream and to the loss, without gradients; remembers what the second time needs."""
        self.random = _random_state(x_BLD.device)
        with recording() as self.decisions:
            y_BLD, loss = self.function(x_BLD), getattr(self.ffn, "auxiliary_loss", None)
        self.adds = loss is not None
        return y_BLD, loss

    def again(self, x_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The second time, with gradients."""
        before = getattr(self.ffn, "auxiliary_loss", None)
        with torch.enable_grad(), _as_before(self.random), replaying(self.decisions):
            y_BLD = self.function(x_BLD)
        if not self.adds:
            return y_BLD, None
        loss, self.ffn.auxiliary_loss = self.ffn.auxiliary_loss, before
        return y_BLD, loss


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: list[_Part], a_BLD: Tensor, b_BLD: Tensor, *parameters: Tensor) -> Any:
        streams, losses = [a_BLD, b_BLD], []
        for part in parts:
            y_BLD, loss = part.first(streams[1 - part.target])
            streams[part.target] = streams[part.target] + y_BLD
            losses += [] if loss is None else [loss]
        ctx.parts = parts
        kind = a_BLD.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(*streams)
        return *streams, *losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        streams, slopes, of_losses = list(ctx.saved_tensors), list(gradients[:2]), list(gradients[2:])
        kind, dtype, enabled = ctx.autocast
        found: list[Tensor | None] = []
        for part in reversed(ctx.parts):
            x_BLD = streams[1 - part.target].detach().requires_grad_()
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                y_BLD, loss = part.again(x_BLD)
            streams[part.target] = streams[part.target] - y_BLD.detach()
            ends, given = [y_BLD], [slopes[part.target].to(y_BLD.dtype)]
            if loss is not None:
                ends, given = [y_BLD, loss], [*given, of_losses.pop()]
            slope, *own = torch.autograd.grad(ends, [x_BLD, *part.parameters], given, allow_unused=True)
            if slope is not None:
                slopes[1 - part.target] = slopes[1 - part.target] + slope
            found = [*own, *found]
        return None, *slopes, *found


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


@contextmanager
def _as_before(states: dict[str, Tensor]) -> Iterator[None]:
    """Random numbers as when `states` were taken; afterwards they go on as if nothing had been."""
    devices = [torch.cuda.current_device()] if "cuda" in states else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(states["cpu"])
        if devices:
            torch.cuda.set_rng_state(states["cuda"])
        yield
