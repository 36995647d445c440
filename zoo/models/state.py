"""The states of all layers inside transformers' cache classes, so that `generate`, beams and lm-eval just work."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from zoo.mixers.base import State


class StateLayer(CacheLayerMixin):
    """One layer of a transformers cache that holds the `State` of a sequence mixer."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.ahead = 0  # positions of the state that are no tokens: meta tokens

    def set(self, state: State | None) -> None:
        """Keep the state that came back from the mixer."""
        self.state = state
        self.is_initialized = state is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a zoo state is made by its mixer (trait: abstract key/value interface not used)")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a zoo state is updated by its mixer (trait: abstract key/value interface not used)")

    def get_seq_length(self) -> int:
        return 0 if self.state is None else max(self.state.length - self.ahead, 0)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.set(None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.state is not None:
            self.state = self.state.map(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        if self.state is not None:
            self.state = self.state.map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing to do: a state is moved by the mixer's device."""


def state_cache(num_layers: int, ahead: int = 0) -> DynamicCache:
    """An empty cache of `StateLayer`s."""
    cache = DynamicCache()
    return as_state_cache(cache, num_layers, ahead)


def as_state_cache(cache: Cache, num_layers: int, ahead: int = 0) -> Any:
    """`cache` with layers that hold states, exchanged in place while it is still empty.

    Raises ValueError where keys and values of another kind of layer are in it already.
    """
    if cache.layers and all(isinstance(layer, StateLayer) for layer in cache.layers):
        return cache
    if any(layer.is_initialized for layer in cache.layers if hasattr(layer, "is_initialized")):
        raise ValueError("past_key_values was filled by another model; start from an empty cache")
    layers = [StateLayer() for _ in range(num_layers)]
    for layer in layers:
        layer.ahead = ahead
    cache.layers = list(layers)
    cache.layer_class_to_replicate = None
    return cache


def state_bytes(cache: Cache) -> int:
    """Bytes of all states in a cache."""
    states = (layer.state for layer in cache.layers if isinstance(layer, StateLayer))
    return sum(state.nbytes for state in states if state is not None)
