"""Hymba: attention and Mamba on the same input in one layer, averaged before a shared projection (Dong et al. 2024,
arXiv 2411.13676, "hybrid heads").

    a = attention(q, k, v) over all heads, E channels            m = mamba(x, z), E channels, without its projection
    out = W_o (norm_a(a) + norm_m(m)) / 2                        norm: RMSNorm, whose weights say how much each counts

One layer is `window: null` (all positions) or a window with `sinks`, which are the model's meta tokens. With `kv_back`
the keys and values of the layer so many before are read, in a window of the same kind, and no own ones are made or
kept: they go through the dictionary that the layers of a pass share. B, C and the steps of Mamba are normed.
`parallel` is the other arrangement: whole mixers with projections of their own, added (Falcon-H1).

The state is that of the attention, unless it is read from another layer, and that of Mamba. Conversion: the attention's
weights, norm_a at the mean size of its output, norm_m zero: a token's output is scaled, and training has to follow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import initialization as init

from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.base import AttentionStats, AttentionWeights, State, Traits
from zoo.mixers.mamba import Mamba, MambaConfig
from zoo.mixers.qkv import HeadNorm, Inputs, QKVMixer, QKVOptions, output_rms
from zoo.mixers.sliding_window import Joined, SlidingWindow, SlidingWindowConfig
from zoo.registry import register_mixer

_SHARED = ("num_heads", "num_kv_heads", "head_dim", "value_head_dim", "scale", "causal")


class HymbaConfig(QKVOptions):
    """Options of `hymba`. Mamba has num_heads * value_head_dim channels.

    window: counts the position itself; None: all positions. sinks: the first tokens, which a window always sees.
    kv_back: read the keys and values of the layer so many before. state_dim, dt_rank, mamba_conv: of Mamba; dt_rank
    None is the model width / 16, rounded up. bcdt_norm: whether its B, C and steps are normed. norm_eps: of all norms.
    """

    name: Literal["hymba"] = "hymba"
    causal: Literal[True] = True
    conv: Literal[None] = None
    gate: Literal[False] = False
    head_norm: Literal[False] = False
    window: int | None = Field(None, ge=1, le=1 << 24)
    sinks: int = Field(0, ge=0, le=1024)
    kv_back: int | None = Field(None, ge=1, le=1024)
    state_dim: int = Field(16, ge=1, le=1024)
    dt_rank: int | None = Field(None, ge=1, le=16384)
    mamba_conv: int = Field(4, ge=2, le=64)
    bcdt_norm: bool = True
    norm_eps: float = Field(1e-6, gt=0, le=1)

    @model_validator(mode="after")
    def _reads_a_window(self) -> HymbaConfig:
        if self.kv_back is not None and self.window is None:
            raise ValueError("kv_back: keys and values are shared between windows; give the window of that layer")
        if self.kv_back is not None and self.qk_norm:
            raise ValueError("kv_back: the keys are another layer's, and so is their norm; take qk_norm: false")
        return self

    def attention_options(self) -> AttentionConfig | SlidingWindowConfig:
        """The attention's own config."""
        shared = {key: getattr(self, key) for key in _SHARED}
        if self.window is None:
            return AttentionConfig(**shared)
        return SlidingWindowConfig(**shared, window=self.window, sinks=self.sinks)

    def mamba_options(self) -> MambaConfig:
        """Mamba's own config."""
        norm = {"bcdt_norm_eps": self.norm_eps, "bcdt_norm_weights": True} if self.bcdt_norm else {}
        inner = self.num_heads * self.value_dim
        sizes = {"inner_dim": inner, "state_dim": self.state_dim, "dt_rank": self.dt_rank, "conv": self.mamba_conv}
        return MambaConfig(**sizes, **norm)  # type: ignore[arg-type]


@register_mixer("hymba")
class Hymba(QKVMixer):
    """Attention and Mamba side by side; see the module docstring."""

    Config = HymbaConfig
    traits = Traits(causal=True, bidirectional=False, state="window")
    keep_float32 = ("A_log", "dt_bias", "D")
    shares = True
    stands_alone = True
    config: HymbaConfig

    def __init__(self, config: HymbaConfig, width: int) -> None:
        super().__init__(config, width)
        if config.kv_back is not None:
            del self.k_proj, self.v_proj
        options, inner = config.attention_options(), config.num_heads * config.value_dim
        cls: Any = Attention if config.window is None else SlidingWindow
        self.attention: Any = cls(options, width, own_projections=False)
        self.mamba = Mamba(config.mamba_options(), width, own_output=False)
        self.attention_norm = HeadNorm(inner, eps=config.norm_eps)
        self.mamba_norm = HeadNorm(inner, eps=config.norm_eps)
        self.needs_positions = self.attention.needs_positions
        if config.window is None:  # what a class says of all its instances depends on the window here
            self.traits = Traits(causal=True, bidirectional=False, state="grows")  # type: ignore[misc]

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        if self.config.kv_back is None:
            return super().project(inputs)
        q_BHLK = self.q_proj(inputs.x_BLD).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        k_BGLK = q_BHLK[:, :0]
        return *self.norm_and_rotate(q_BHLK, k_BGLK, inputs), k_BGLK, {}

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        ours = theirs = None
        if inputs.state is not None:
            ours, theirs = inputs.state.sub("attention."), inputs.state.sub("mamba.")
        y_BHLV, kept = self._attend(q_BHLK, k_BGLK, v_BGLV, replace(inputs, state=ours))
        m_BLE, left = self.mamba.scan(inputs.x_BLD, inputs.mask_BL, inputs.segments_BL, theirs)
        y_BLE = (self.attention_norm(y_BHLV.transpose(1, 2).flatten(-2)) + self.mamba_norm(m_BLE)) / 2
        tensors = {f"attention.{n}": t for n, t in kept.items()} | {f"mamba.{n}": t for n, t in left.items()}
        return y_BLE.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2), tensors

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Attention on own keys and values, which are handed on, or on those of an earlier layer."""
        c, shared = self.config, {} if inputs.shared is None else inputs.shared
        if c.kv_back is not None:
            place = f"kv.{self.place[0] - c.kv_back}."
            if f"{place}k" not in shared:
                if inputs.shared:
                    raise ValueError(f"kv_back: layer {self.place[0] - c.kv_back} hands on no keys and values")
                return q.new_zeros(*q.shape[:3], c.value_dim), {}  # a layer by itself has nothing to read
            found = {n.removeprefix(place): t for n, t in shared.items() if n.startswith(place)}
            if inputs.state is None:
                return self.attention.mix(q, found["k"], found["v"], inputs)[0], {}
            joined = Joined(found["k"], found["v"], found.get("mask"), found)
            return self.attention.attend(q, joined, inputs), {}
        if inputs.state is None or c.window is None:
            given = {"k": k, "v": v} if c.window is not None else {}
            y_BHLV, tensors = self.attention.mix(q, k, v, inputs)
        else:
            joined = self.attention.join(k, v, inputs)
            y_BHLV, tensors = self.attention.attend(q, joined, inputs), joined.tensors
            given = {n: t for n, t in tensors.items() if n.startswith("sink_")}
            given |= {"k": joined.k_BGSK, "v": joined.v_BGSV}
            given |= {} if joined.mask_BS is None else {"mask": joined.mask_BS}
        shared.update({f"kv.{self.place[0]}.{name}": t for name, t in given.items()})
        return y_BHLV, tensors

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        kept = {} if self.config.kv_back is not None else self.attention.mix_state(batch_size, device, dtype)
        left = self.mamba.init_state(batch_size, device=device, dtype=dtype).tensors
        return {f"attention.{n}": t for n, t in kept.items()} | {f"mamba.{n}": t for n, t in left.items()}

    def reset_parameters(self, std: float) -> None:
        """Norms one; the rest is Mamba's, or plain projections."""
        init.ones_(self.attention_norm.weight)
        init.ones_(self.mamba_norm.weight)

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        return {"window": attention.window}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        rms = output_rms(attention, stats).square().mean().sqrt()
        self.attention_norm.weight.fill_(2 * float(rms))
        self.mamba_norm.weight.zero_()

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        weight = self.o_proj.weight
        return State(self.mix_state(batch_size, device or weight.device, dtype or weight.dtype))

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """A layer with keys and values of its own, for the tests of `zoo.testing`."""
        return {"state_dim": 4, "dt_rank": 2}
