"""The contract of a sequence mixer: what it computes from, what it carries, what it promises.

Shapes are written as suffixes. The legend of the whole package:

    B batch          L new positions        S positions of keys (carried + new; the queries are the last L)
    D model width    H query heads          G key/value heads, H = R * G; query head h reads head h // R
    K head size of queries and keys         V head size of values
    N chunks         C positions in a chunk W window
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from zoo.config import MixerOptions
from zoo.errors import ConversionError, TraitError
from zoo.ops.rotary import RotaryConfig


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What an architecture can do.

    causal, bidirectional: which of the two forms exist. state: "constant" (does not grow), "window" (grows to a bound)
    or "grows" (with the length). exact: the conversion from attention is exact for every input. splits: a sequence cut
    "anywhere" gives the same with the state carried, and in the causal form no output depends on a later input; or that
    holds up to `config.chunk` tokens only ("within_chunk"), for who sees whom depends on the whole sequence.
    """

    causal: bool = True
    bidirectional: bool = False
    state: Literal["constant", "window", "grows", "none"] = "constant"
    exact: bool = False
    splits: Literal["anywhere", "within_chunk"] = "anywhere"


@dataclass
class State:
    """What a mixer carries from one call to the next: tensors with the batch first, by name.

    `length` counts all positions taken in, padding included. A state handed to `forward` is consumed: what comes back
    may live in the same memory. `clone()` it first to go on twice from the same place.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    length: int = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def map(self, function: Any) -> State:
        """The same state with `function` applied to every tensor."""
        return State({name: function(t) for name, t in self.tensors.items()}, self.length)

    def clone(self) -> State:
        """A copy that shares no memory."""
        return self.map(Tensor.clone)

    def select(self, index_B: Tensor) -> State:
        """The rows `index_B` of the batch (beam search)."""
        return self.map(lambda t: t.index_select(0, index_B.to(t.device)))

    def sub(self, prefix: str) -> State:
        """The part of a composite state whose names start with `prefix`."""
        return State({n[len(prefix) :]: t for n, t in self.tensors.items() if n.startswith(prefix)}, self.length)

    def split(self, prefix: str) -> tuple[State, State]:
        """The part whose names do not start with `prefix`, and the part whose names do, without it."""
        rest = {n: t for n, t in self.tensors.items() if not n.startswith(prefix)}
        return State(rest, self.length), self.sub(prefix)

    def joined(self, prefix: str, other: State) -> State:
        """This state and `other`, whose names get `prefix`."""
        return State({**self.tensors, **{prefix + n: t for n, t in other.tensors.items()}}, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """A softmax-attention layer as numbers, whatever model it came from; what every `from_attention` starts from.

    Weights are as in `nn.Linear`: (out, in). Query, key and value rows are grouped by head. `qk_norm` holds the RMSNorm
    weights (K,) of queries and keys, applied per head before the rotary positions. `special_tokens` is how many tokens
    at the start of every sequence are not part of the text or image, where that is known (class tokens).
    """

    q_HKD: Tensor  # (H*K, D)
    k_GKD: Tensor  # (G*K, D)
    v_GVD: Tensor  # (G*V, D)
    o_DHV: Tensor  # (D, H*V)
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    rotary: RotaryConfig | None = None
    qk_norm: tuple[Tensor, Tensor] | None = None
    qk_norm_eps: float = 1e-6
    scale: float
    causal: bool = True
    window: int | None = None
    special_tokens: int = 0

    def per_query_head(self, rows: Tensor) -> Tensor:
        """Rows of key/value heads, weights (G*n, D) or biases (G*n), for every query head: (H, n, ..) in float32."""
        by_head = rows.float().unflatten(0, (self.num_kv_heads, -1))
        return by_head.repeat_interleave(self.num_heads // self.num_kv_heads, 0)


@dataclass(frozen=True, kw_only=True)
class AttentionStats:
    """What a calibration pass measured on a softmax-attention layer, per query head (float32).

    lookback_H: E_t[sum_s a_ts (t - s)], the mean distance a head looks back, in tokens.
    q_norm_H, k_norm_H: mean Euclidean norm of queries and keys as they meet in the product.
    out_rms_H: root mean square of the head's output before the output projection.
    x_mean_D: the mean input; length: how long the sequences were, in the mean. None where nobody has measured them.
    """

    lookback_H: Tensor
    q_norm_H: Tensor
    k_norm_H: Tensor
    out_rms_H: Tensor
    x_mean_D: Tensor | None = None
    length: float | None = None


class SequenceMixer(nn.Module, ABC):
    """Base of all sequence mixers.

    A subclass sets `Config` (a `MixerOptions` with `name: Literal[...]`) and `traits`, and is registered with
    `register_mixer`. `keep_float32` names parameters that must stay float32 under any dtype; they are kept so on load.
    A mixer with `shares = True` also gets `shared=`, a dictionary made anew for each pass of a model and handed through
    all its layers (RWKV-7 reads the first layer's values there); without one it behaves as the first layer does.
    `common` names parameters that a model has once for all its mixers of equal options: the first one holds them, and
    the others read them from `holder` (`zoo.models.shared.join_mixers`). A mixer by itself is its own holder.
    `place` is the index of the layer and the number of layers of the model, set before a model initialises its weights,
    for initialisations that depend on the depth.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MixerOptions]]
    traits: ClassVar[Traits]
    keep_float32: ClassVar[tuple[str, ...]] = ()
    shares: ClassVar[bool] = False
    common: tuple[str, ...] = ()
    place: tuple[int, int] = (0, 1)
    _holder: tuple[Any, ...] = ()  # a tuple, so that the holder is not a module inside this one

    def __init__(self, config: MixerOptions, width: int) -> None:
        super().__init__()
        self.config = config
        self.width = width
        causal = getattr(config, "causal", True)
        if causal and not self.traits.causal:
            raise TraitError(f"mixer {self.name!r} has no causal form (traits.causal is False); use a causal mixer")
        if not causal and not self.traits.bidirectional:
            raise TraitError(
                f"mixer {self.name!r} has no two-sided form (traits.bidirectional is False); "
                "for encoders use attention, sliding_window, linear_attention or retention"
            )

    @property
    def holder(self) -> Self:
        """The mixer that holds this one's `common` parameters."""
        return self._holder[0] if self._holder else self

    def read_from(self, holder: Self) -> None:
        """Read the `common` parameters from `holder` from now on; those of this mixer go."""
        for name in set(self.common) & self._parameters.keys():
            delattr(self, name)
        self._holder = (holder,)

    @abstractmethod
    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """Mix along the sequence.

        Args:
            x_BLD: input.
            mask_BL: True at real positions; the others are identity steps.
            segments_BL: ids of packed sequences, in contiguous runs. Not together with `state`.
            state: carried from earlier calls, or a fresh `init_state`; with None no state comes back.

        Returns:
            The output (B, L, D) and the new state.
        """

    def take_in(self, x_BLD: Tensor, mask_BL: Tensor | None, segments_BL: Tensor | None, state: State | None) -> Tensor:
        """`admit` for a call of `forward`. Raises TraitError for a state that a two-sided mixer cannot carry."""
        if state is not None and not getattr(self.config, "causal", True):
            raise TraitError(f"mixer {self.name!r} is two-sided here (causal: false), so there is no state to carry")
        return admit(x_BLD, mask_BL, segments_BL, state)

    @abstractmethod
    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first position."""

    @abstractmethod
    def reset_parameters(self, std: float) -> None:
        """Initialise as the paper does; `std` is the model's `initializer_range` for plain projections."""

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        """The config under which `attention` fits this mixer, with the user's `options` on top."""
        raise ConversionError(f"mixer {cls.name!r} does not say how it is made from attention")

    @classmethod
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        """A mixer that starts from a softmax-attention layer's weights. Raises ConversionError where it cannot."""
        raise ConversionError(f"mixer {cls.name!r} does not say how it is made from attention")


def admit(x_BLD: Tensor, mask_BL: Tensor | None, segments_BL: Tensor | None, state: State | None) -> Tensor:
    """The input with zeros at padding: whatever stands there, nothing of it gets any further.

    Raises ValueError where packed segments and a carried state are given together.
    """
    refuse_segments_with_state(segments_BL, state)
    return x_BLD if mask_BL is None else x_BLD.masked_fill(~mask_BL[..., None], 0)


def refuse_segments_with_state(segments_BL: Tensor | None, state: State | None) -> None:
    """Raise ValueError where packed segments and a carried state are given together."""
    if segments_BL is not None and state is not None:
        raise ValueError("segments and state cannot be given together: packing is for training, a state for decoding")
