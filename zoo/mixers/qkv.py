"""What all attention-like mixers share: projections, short convolutions, norms, positions, gate, output.

q, k, v = conv(x W_q), conv(x W_k), conv(x W_v)        conv: optional short causal convolution + SiLU
q, k    = rotary(norm(q)), rotary(norm(k))             norm: optional RMSNorm per head; rotary: optional
y       = mix(q, k, v)                                 the architecture itself: the only method a subclass must write
out     = (norm(y) * silu(x W_g)) W_o                  head norm and gate: optional; some gates are sigmoids
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import MixerOptions
from zoo.errors import ConversionError
from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, SequenceMixer, State
from zoo.ops.positions import token_positions
from zoo.ops.rotary import RotaryConfig, apply_rotary, rotary_tables

SILU_ONE = 1.278464542761074  # silu(SILU_ONE) == 1: a gate with this bias and no weight is open
# Options that say nothing where another one is off.
_BESIDE = {
    "qk_norm": ("qk_norm_eps", "qk_norm_span", "qk_norm_zero_centered"),
    "conv": ("conv_bias", "conv_activation"),
    "head_norm": ("head_norm_affine", "head_norm_eps"),
    "gate": ("gate_bias", "gate_activation"),
}


class QKVOptions(MixerOptions):
    """Options that all attention-like mixers share. Head sizes in numbers, `conv` in taps."""

    num_heads: int = Field(ge=1, le=1024)
    num_kv_heads: int | None = Field(None, ge=1, le=1024)  # None: as many as num_heads
    head_dim: int = Field(ge=1, le=4096)
    value_head_dim: int | None = Field(None, ge=1, le=4096)  # None: head_dim
    qkv_bias: bool = False
    out_bias: bool = False
    rotary: RotaryConfig | None = None
    qk_norm: bool = False
    qk_norm_eps: float = Field(1e-6, gt=0, le=1)
    scale: float | None = Field(None, gt=0, le=1e4)  # None: head_dim ** -0.5
    causal: bool = True
    conv: int | None = Field(None, ge=2, le=64)
    conv_bias: bool = False
    head_norm: bool = False
    head_norm_affine: bool = True
    head_norm_eps: float = Field(1e-5, gt=0, le=1)
    gate: bool = False
    gate_bias: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.num_kv_heads})")
        return self

    def resolved(self, width: int) -> Self:
        """With value size and scale written out, and at its default what says nothing beside the other options."""
        told: dict[str, Any] = {
            "num_kv_heads": None if self.kv_heads == self.num_heads else self.kv_heads,
            "value_head_dim": self.value_dim,
            "scale": self.softmax_scale,
        }
        fields = type(self).model_fields
        for needed, keys in _BESIDE.items():
            if not getattr(self, needed):
                told |= {key: fields[key].default for key in keys if key in fields}
        if self.rotary is not None and self.rotary.dim == self.head_dim:
            told["rotary"] = self.rotary.model_copy(update={"dim": None})
        return self.model_copy(update=told)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def value_dim(self) -> int:
        """Head size of the values."""
        return self.value_head_dim or self.head_dim

    @property
    def softmax_scale(self) -> float:
        """What the product of query and key is multiplied with."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class Inputs:
    """One call's arguments, as `mix` sees them.

    `positions_BL` counts real tokens of each sequence from 0. It is None where all rows simply go on from
    `state.length`, and where nobody needs it. `shared` is as in `SequenceMixer`; `found` is what a mixer's own
    `project` leaves there for its `mix`.
    """

    x_BLD: Tensor
    mask_BL: Tensor | None
    segments_BL: Tensor | None
    positions_BL: Tensor | None
    state: State | None
    shared: dict[str, Tensor] | None = None
    found: dict[str, Tensor] = field(default_factory=dict)

    @property
    def start(self) -> int:
        """How many positions came before, padding included."""
        return 0 if self.state is None else self.state.length


class QKVMixer(SequenceMixer):
    """Base of the attention-like mixers; see the module docstring.

    With `own_projections=False` the module has no projections of its own: it is a branch inside another mixer, which
    calls `mix` with its queries, keys and values.
    """

    config: QKVOptions
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_norm: nn.Module
    needs_positions = False  # beyond rotary
    averages_values: ClassVar[bool] = True  # outputs are weighted means of values, so of their scale
    stands_alone: ClassVar[bool] = False  # `mix` needs what its own `project` found, so it cannot be a branch

    def __init__(self, config: QKVOptions, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width)
        if not own_projections:
            return
        c = config
        q_heads, k_heads, v_heads = self.projected_heads(c)
        sizes = {"q": q_heads * c.head_dim, "k": k_heads * c.head_dim, "v": v_heads * c.value_dim}
        for name, size in sizes.items():
            setattr(self, f"{name}_proj", Linear(width, size, bias=c.qkv_bias))
            if c.conv:
                setattr(self, f"{name}_conv", ShortConv(size, c.conv, c.conv_bias))
        if c.qk_norm:
            self.q_norm = HeadNorm(c.head_dim, eps=c.qk_norm_eps)
            self.k_norm = HeadNorm(c.head_dim, eps=c.qk_norm_eps)
        if c.gate:
            self.g_proj = Linear(width, c.num_heads * c.value_dim, bias=c.gate_bias)
        if c.head_norm:
            self.head_norm = HeadNorm(c.value_dim, eps=c.head_norm_eps, elementwise_affine=c.head_norm_affine)
        self.o_proj = Linear(c.num_heads * c.value_dim, width, bias=c.out_bias)

    @staticmethod
    def projected_heads(config: Any) -> tuple[int, int, int]:
        """How many heads of queries, keys and values the projections make."""
        return config.num_heads, config.kv_heads, config.kv_heads

    @abstractmethod
    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The architecture: outputs per head (B, H, L, V) and the tensors of its new state ({} where state is None)."""

    @abstractmethod
    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of `mix`'s state before the first position."""

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        x_BLD = self.take_in(x_BLD, mask_BL, segments_BL, state)
        positions_BL, seen_B = None, None
        counts = self.config.rotary is not None or self.needs_positions
        if counts and state is not None and (mask_BL is not None or "seen" in state):
            # Rows differ from the first padding on; until then a state's length says it all.
            B = x_BLD.shape[0]
            seen_B = state["seen"] if "seen" in state else x_BLD.new_full((B,), state.length, dtype=torch.long)
        if counts and (mask_BL is not None or segments_BL is not None or seen_B is not None):
            positions_BL = token_positions(x_BLD, mask_BL, segments_BL, seen_B)
        inputs = Inputs(x_BLD, mask_BL, segments_BL, positions_BL, state, shared)
        q_BHLK, k_BGLK, v_BGLV, carried = self.project(inputs)
        y_BHLV, mixed = self.mix(q_BHLK, k_BGLK, v_BGLV, inputs)
        out_BLD = self.finish(y_BHLV, x_BLD)
        if state is None:
            return out_BLD, None
        if seen_B is not None:
            carried["seen"] = seen_B + (x_BLD.shape[1] if mask_BL is None else mask_BL.sum(1))
        return out_BLD, State({**carried, **mixed}, state.length + x_BLD.shape[1])

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Queries, keys and values by head, and the carried tails of the short convolutions."""
        c, x_BLD, state = self.config, inputs.x_BLD, inputs.state
        carried: dict[str, Tensor] = {}
        heads = []
        for name, size in (("q", c.head_dim), ("k", c.head_dim), ("v", c.value_dim)):
            y_BLE = getattr(self, f"{name}_proj")(x_BLD)
            if c.conv:
                initial = None if state is None else state[f"{name}_conv"]
                y_BLE, tail = getattr(self, f"{name}_conv")(y_BLE, inputs, initial)
                if tail is not None:
                    carried[f"{name}_conv"] = tail
            heads.append(y_BLE.unflatten(-1, (-1, size)).transpose(1, 2))
        q_BHLK, k_BGLK, v_BGLV = heads
        return *self.norm_and_rotate(q_BHLK, k_BGLK, inputs), v_BGLV, carried

    def norm_and_rotate(self, q_BHLK: Tensor, k_BGLK: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys with the norm per head and the rotary positions, where the config has them."""
        rotary = self.config.rotary
        if self.config.qk_norm:
            q_BHLK, k_BGLK = self.q_norm(q_BHLK), self.k_norm(k_BGLK)
        if rotary is not None:
            cos, sin = self._rotary_tables(inputs, q_BHLK.dtype)
            if q_BHLK.shape[2] == 1:  # in a decoding step the number of calls is what costs
                both = apply_rotary(torch.cat([q_BHLK, k_BGLK], 1), cos, sin, rotary.interleaved)
                return both[:, : q_BHLK.shape[1]], both[:, q_BHLK.shape[1] :]
            q_BHLK = apply_rotary(q_BHLK, cos, sin, rotary.interleaved)
            k_BGLK = apply_rotary(k_BGLK, cos, sin, rotary.interleaved)
        return q_BHLK, k_BGLK

    def _rotary_tables(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        c, x_BLD = self.config, inputs.x_BLD
        assert c.rotary is not None
        if inputs.positions_BL is not None:
            return rotary_tables(c.rotary, c.head_dim, inputs.positions_BL)
        end = inputs.start + x_BLD.shape[1]
        if torch.compiler.is_compiling():
            return rotary_tables(c.rotary, c.head_dim, torch.arange(inputs.start, end, device=x_BLD.device)[None])
        dtype = torch.promote_types(dtype, torch.bfloat16)
        inference = torch.is_inference_mode_enabled()
        return _shared_tables(c.rotary, c.head_dim, inputs.start, end, x_BLD.device, dtype, inference)

    def finish(self, y_BHLV: Tensor, x_BLD: Tensor) -> Tensor:
        """Head norm, gate and output projection."""
        y_BLHV = y_BHLV.transpose(1, 2)
        if self.config.head_norm:
            y_BLHV = self.head_norm(y_BLHV)
        y_BLE = y_BLHV.flatten(-2)
        if self.config.gate:
            y_BLE = y_BLE * self.activate_gate(self.g_proj(x_BLD))
        return self.o_proj(y_BLE)

    def activate_gate(self, gate: Tensor) -> Tensor:
        """What the output is multiplied with, of the gate's projection."""
        return F.silu(gate)

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        weight = self.o_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        tensors = self.mix_state(batch_size, device, dtype)
        if self.config.conv:
            for name in ("q", "k", "v"):
                size = getattr(self, f"{name}_proj").out_features
                tensors[f"{name}_conv"] = torch.zeros(
                    batch_size, self.config.conv - 1, size, device=device, dtype=dtype
                )
        return State(tensors)

    def reset_parameters(self, std: float) -> None:
        """Nothing of its own: plain projections are initialised by the model."""

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        a = attention
        values: dict[str, Any] = {
            "num_heads": a.num_heads,
            "num_kv_heads": None if a.num_kv_heads == a.num_heads else a.num_kv_heads,
            "head_dim": a.head_dim,
            "value_head_dim": None if a.value_head_dim == a.head_dim else a.value_head_dim,
            "qkv_bias": any(b is not None for b in (a.q_bias, a.k_bias, a.v_bias)),
            "out_bias": a.o_bias is not None,
            "rotary": a.rotary,
            "qk_norm": a.qk_norm is not None,
            "qk_norm_eps": a.qk_norm_eps,
            "scale": None if abs(a.scale - a.head_dim**-0.5) < 1e-12 else a.scale,
            "causal": a.causal,
        }
        return cls.Config.parse({"name": cls.name, **values, **cls.conversion_defaults(a), **options}, "mixer")

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        """Options that this architecture needs so that it starts as close to attention as it can."""
        return {}

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        mixer = cls(config, attention.q_HKD.shape[1])  # type: ignore[arg-type]
        for module in mixer.modules():
            if isinstance(module, ShortConv):
                module.set_identity()
        mixer.reset_parameters(0.02)
        mixer.copy_projections(attention)
        mixer.start_from(attention, stats)
        if mixer.normalizes_output:
            mixer.scale_heads(output_rms(attention, stats))
        return mixer

    @property
    def normalizes_output(self) -> bool:
        """Whether each head's output is normalised, so that its scale has to come from the output projection."""
        return self.config.head_norm

    @torch.no_grad()
    def scale_heads(self, gain_H: Tensor) -> None:
        """Multiply what each head adds to the output by a gain, in the columns of W_o."""
        columns = gain_H.to(self.o_proj.weight).repeat_interleave(self.config.value_dim)
        self.o_proj.weight.mul_(columns)

    @torch.no_grad()
    def copy_projections(self, attention: AttentionWeights) -> None:
        """Copy what has the same meaning in attention and here: W_q, W_k, W_v, W_o, biases, QK-norm; open the gate.

        Where several heads share keys and values there and not here, each gets a copy of its own.
        """
        a, c = attention, self.config
        heads, (q_heads, *kv_heads) = a.num_kv_heads, self.projected_heads(c)
        fits = q_heads == a.num_heads and not any(n % heads for n in kv_heads)
        if (a.num_heads, a.head_dim, a.value_head_dim) != (c.num_heads, c.head_dim, c.value_dim) or not fits:
            raise ConversionError(
                f"mixer {self.name!r} with {c.num_heads} heads of {c.head_dim} and values of {c.value_dim} cannot copy "
                f"attention with {a.num_heads} heads of {a.head_dim} and values of {a.value_head_dim}"
            )
        sources = {
            "q": (a.q_HKD, a.q_bias),
            "k": (a.k_GKD, a.k_bias),
            "v": (a.v_GVD, a.v_bias),
            "o": (a.o_DHV, a.o_bias),
        }
        for name, (weight, bias) in sources.items():
            linear = getattr(self, f"{name}_proj")
            times = kv_heads["kv".index(name)] // heads if name in "kv" else 1
            linear.weight.copy_(repeat_heads(weight, heads, times))
            if linear.bias is not None:
                linear.bias.zero_() if bias is None else linear.bias.copy_(repeat_heads(bias, heads, times))
        if a.qk_norm is not None and c.qk_norm:
            self.q_norm.weight.copy_(a.qk_norm[0])
            self.k_norm.weight.copy_(a.qk_norm[1])
        if c.gate:
            self.g_proj.weight.zero_()
            if self.g_proj.bias is not None:
                self.g_proj.bias.fill_(SILU_ONE)

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        """Set what attention does not have (decays, gates, feature maps) to where it disturbs least."""


def repeat_heads(rows: Tensor, heads: int, times: int) -> Tensor:
    """The rows of each of `heads` heads `times` times, one copy behind the other."""
    if times == 1:
        return rows
    return rows.unflatten(0, (heads, -1)).repeat_interleave(times, 0).flatten(0, 1)


@functools.lru_cache(maxsize=8)
def _shared_tables(
    rotary: RotaryConfig, head_dim: int, start: int, end: int, device: torch.device, dtype: torch.dtype, inference: bool
) -> tuple[Tensor, Tensor]:
    """Rotary tables of consecutive positions; all layers of a model ask for the same ones one after another.

    `inference` keeps apart what was made in inference mode, for autograd refuses it.
    """
    cos, sin = rotary_tables(rotary, head_dim, torch.arange(start, end, device=device)[None])
    return cos.to(dtype), sin.to(dtype)


def output_rms(attention: AttentionWeights, stats: AttentionStats | None) -> Tensor:
    """Root mean square of each head's output: measured, or that of a value whose input has unit variance, halved.

    (Averages over a few values are smaller than the values; a half is the order of magnitude, calibration the rest.)
    """
    if stats is not None:
        return stats.out_rms_H
    rows_GV = attention.v_GVD.float().square().sum(-1).view(attention.num_kv_heads, -1)
    return 0.5 * rows_GV.mean(-1).sqrt().repeat_interleave(attention.num_heads // attention.num_kv_heads)


class HeadNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, so that autocast keeps the fused kernel and bfloat16 stays bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class ShortConv(nn.Module):
    """Depthwise causal convolution with SiLU; `weight` (E, taps), the last tap meets the current position."""

    def __init__(self, size: int, taps: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, taps))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.activation: str | None = "silu"
        bound = taps**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x_BLE: Tensor, inputs: Inputs, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The convolved input, and the tail for the next call where there is a state."""
        return ops.short_conv(
            x_BLE,
            self.weight,
            self.bias,
            initial=initial,
            final=inputs.state is not None,
            mask_BL=inputs.mask_BL,
            segments_BL=inputs.segments_BL,
            activation=self.activation,
        )

    def reset_parameters(self, std: float) -> None:
        """Uniform in 1/sqrt(taps), as torch's convolutions."""
        bound = self.weight.shape[1] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.zeros_(self.bias)

    @torch.no_grad()
    def set_identity(self) -> None:
        """Only the current tap, weight one (the SiLU remains)."""
        self.weight.zero_()
        self.weight[:, -1] = 1.0
        if self.bias is not None:
            self.bias.zero_()
