"""What a model costs, counted on tensors that have shapes and no memory: parameters, bytes of state, FLOPs.

Parameters and products are counted on the modules themselves, run on torch's meta device, so that nothing here repeats
a formula which the code could contradict. Layers that are equal are built and run once.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights

from zoo.config import ZooConfig
from zoo.errors import ConfigError
from zoo.ffn.base import ChannelMixer
from zoo.mixers.base import SequenceMixer
from zoo.models.axial import AxialPositions
from zoo.models.heads import TASK_CLASSES


@dataclass(frozen=True)
class StateSize:
    """Float32 bytes of the state of one sequence: `constant + per_token * length`, once every window is full."""

    constant: int
    per_token: int


def empty_model(config: ZooConfig) -> Any:
    """The model of a config on the meta device: modules and shapes, no numbers."""
    with torch.device("meta"), no_init_weights():
        model: Any = TASK_CLASSES[config.task](config)
    model.tie_weights()  # which is part of what is left out above
    return model


def size_of(config: ZooConfig) -> tuple[int, StateSize | None]:
    """Parameters and state of the model of a config. Of equal layers one is made, which runs for the others."""
    layers = [layer.plain() for layer in config.spec.layers]
    added: list[int] = []
    if config.task != "image-classification":  # there equal layers may be of different widths
        first: dict[str, int] = {}
        for i, layer in enumerate(layers):
            if layer.get("same_as") is None and first.setdefault(repr(layer), i) != i:
                added.append(i)
        for i in added:
            layers[i] = {**layers[i], "same_as": first[repr(layers[i])]}
    config = copy.deepcopy(config)
    config.layers = layers
    model = empty_model(config)
    total = parameter_counts(model)[0] + sum(_own_parameters(model.model.layers[i]) for i in added)
    return total, state_size(model)


def _own_parameters(block: nn.Module) -> int:
    """How many parameters one more block like this adds to a model."""
    mixers = [m for m in block.modules() if isinstance(m, SequenceMixer) and m.holder is m]
    common = sum(getattr(m, name).numel() for m in mixers for name in m.common)
    return sum(p.numel() for p in block.parameters()) - common


@torch.no_grad()
def mixer_state_bytes(mixer: SequenceMixer, length: int) -> int:
    """Bytes of a mixer's state for one sequence after `length` positions, in the dtype of its weights."""
    weight = next(mixer.parameters())
    state = mixer.init_state(1, device=weight.device, dtype=weight.dtype)
    x_1LD = torch.zeros(1, length, mixer.width, device=weight.device, dtype=weight.dtype)
    after = mixer(x_1LD, state=state)[1]
    return 0 if after is None else after.nbytes


def state_bytes(model: Any, length: int) -> int | None:
    """Bytes of the state of one sequence after `length` tokens, in the dtype of the weights; None where there is none.

    Also None beyond the learned positions. The mixers are run, each kind once and by itself, over a whole sequence in
    one piece: that is what a cache holds after a prefill in one call (in pieces, growing buffers keep spare room).
    """
    config = model.config
    learned = config.positions == "learned"
    if not model.model.is_causal or (learned and length > config.max_position_embeddings):
        return None
    total = torch.long.itemsize if learned else 0  # the number of tokens seen
    by_kind: dict[str, int] = {}
    for block in model.model.layers:
        taken = _tokens(block, length) + config.meta_tokens
        kind = repr((block.mixer.config, getattr(block.ffn, "config", None), taken))
        if kind not in by_kind:
            fed = block.ffn.init_state(1).nbytes if isinstance(block.ffn, ChannelMixer) else 0
            by_kind[kind] = _full_state_bytes(block.mixer, taken) + fed
        total += by_kind[kind] + (mixer_state_bytes(block.read.attention, taken) if hasattr(block, "read") else 0)
    return total


def _tokens(block: Any, length: int) -> int:
    """How many of `length` tokens a block takes: all, or the share of one that only some take."""
    return math.ceil(length * block.depth.capacity) if hasattr(block, "depth") else length


def _full_state_bytes(mixer: SequenceMixer, length: int) -> int:
    if mixer.traits.state in ("constant", "none"):
        return mixer.init_state(1).nbytes
    if mixer.traits.state == "window":  # full long before that
        length = min(length, 2 * largest_window(mixer.config.plain()) + 64)
    return mixer_state_bytes(mixer, length)


def largest_window(options: Any) -> int:
    """The largest `window` in a mixer's options, at any depth; 0 where there is none."""
    if isinstance(options, dict):
        return max([options.get("window") or 0, *map(largest_window, options.values())])
    return max(map(largest_window, options), default=0) if isinstance(options, list) else 0


def state_size(model: Any) -> StateSize | None:
    """How large the state of one sequence is once every window is full; None for models that carry none."""
    full = 2 * max(largest_window(block.mixer.config.plain()) for block in model.model.layers) + 64
    if model.config.positions == "learned":
        full = min(full, model.config.max_position_embeddings // 2)
    shorter, longer = state_bytes(model, full), state_bytes(model, 2 * full)
    if shorter is None or longer is None:
        return None
    per_token = (longer - shorter) // full
    return StateSize(shorter - per_token * full, per_token)


def flops_per_token(model: Any, length: int) -> float | None:
    """FLOPs of all matrix products in reading `length` tokens at once, divided by them; two for a multiply and add.

    A causal map of attention counts as a whole square. What is no product (norms, activations, gates) does not count.
    None where a layer does not take the length, or where its work depends on numbers and it does not say its cost.
    """
    total = 0.0
    known: dict[str, float] = {}
    for block in model.model.layers:
        taken = _tokens(block, length)
        for part, width in block.parts():
            kind = repr((getattr(part, "config", part), taken, width))
            if kind not in known:
                try:
                    known[kind] = _products(part, taken, width) * (taken / length)
                except (NotImplementedError, RuntimeError, ConfigError):  # asked for a number, or too long for it
                    return None
            total += known.get(kind, 0.0)
    ends = [getattr(model, name, None) for name in ("transform", "lm_head")]
    for end in (model.model.project_in, *ends, model.model.project_out):
        if end is not None:
            total += sum(2.0 * m.weight.numel() for m in end.modules() if isinstance(m, nn.Linear))
    return total


@torch.no_grad()
def _products(part: Any, length: int, width: int) -> float:
    """FLOPs a token of one mixer or channel mixer."""
    if (says := getattr(part, "flops_per_token", None)) is not None:
        return float(says)
    with FlopCounterMode(display=False) as counter:
        part(torch.empty(1, length, width, device="meta"))
    return counter.get_total_flops() / length


def parameter_counts(model: Any) -> tuple[int, int]:
    """All parameters, tied and shared ones once, and those that are not embeddings or an untied vocabulary."""
    kinds = (nn.Embedding, AxialPositions)
    embeddings = sum(p.numel() for m in model.modules() if isinstance(m, kinds) for p in m.parameters())
    head = getattr(model, "lm_head", None)
    if head is not None and not model.config.tie_word_embeddings:
        embeddings += head.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    return total, total - embeddings


def active_parameters(model: Any) -> int:
    """Those that one token meets: all, without the experts that it is not sent to."""
    stacked = [m.stacked_weights() for m in model.modules() if isinstance(m, ChannelMixer)]
    return sum(p.numel() for p in model.parameters()) - sum(whole - met for whole, met in stacked)


def short_bytes(value: int) -> str:
    """Bytes for people: 1.50 MiB, 24.0 KiB."""
    if value < 2**10:
        return f"{value} bytes"
    return f"{value / 2**20:.2f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"


def short_count(value: int) -> str:
    """A number for people: 134.5 M, 41.0 k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)
