"""Hyena: gates and convolutions as long as the text, whose filters a small network writes (Poli et al. 2023,
arXiv 2302.10866).

    x_0, .., x_{N-1}, v = conv(W_in u)                       conv: depthwise, causal, a few taps
    v <- h_n * (x_{N-n} v) + d_n x_{N-n} v                   for n = 1 .. N-1: a long convolution and a skip
    y = W_out (x_0 v)
    h_n(t) = (exp(-|a_n| t / (T-1)) + shift) (W sin(w (.. sin(w (W z(t) + b)) ..)))      for t < T = window

z(t) holds t / (T-1) and cos, -sin of 2 pi f t / T at a few frequencies f, and is trained. A filter ends after T taps,
so that longer texts are served with a look-back of T. (The authors' code cuts such a text off.) Two-sided, a second
network writes what lies ahead, as in M2-BERT (Fu et al. 2023, arXiv 2310.12109).

No recurrence of constant size gives these filters, so the state is what the convolutions have read, at most T - 1
inputs each: (N - 1) D numbers a token, half of what attention caches. A decoding step costs T D.

Conversion: gates of one, W_v and W_o, and the filter (1 - z) z^t, where z has the head's look-back as its half-life:
the network gets a constant feature, the decay does the rest. Content does not steer the start; training opens the
gates.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import MixerOptions
from zoo.errors import ConversionError
from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, SequenceMixer, State, Traits
from zoo.mixers.qkv import Inputs, ShortConv
from zoo.mixers.recurrent import LN2, lookback
from zoo.ops.backends import no_autocast
from zoo.ops.long_conv import long_conv, long_conv_step
from zoo.ops.padding import right_align, take
from zoo.registry import register_mixer


class HyenaConfig(MixerOptions):
    """Options of `hyena`; the defaults are those of the authors' language models.

    order: N, so many gates and one long convolution less. inner_size: channels inside; None is the width of the
    model. window: T, taps of a long filter. conv: taps of the short one. filter_size, filter_layers: width and
    inner layers of the network; frequency: w, where its sines start. filter_features: size of z, odd;
    learn_positions: z is trained. modulate: multiply with the decay, whose rates run evenly from log(decay_target)
    / slow_decay to / fast_decay over the channels, and are trained with learn_decay. out_init: factor of W_out at the
    start.
    """

    name: Literal["hyena"] = "hyena"
    order: int = Field(2, ge=2, le=16)
    inner_size: int | None = Field(None, ge=1, le=1 << 20)
    window: int = Field(2048, ge=1, le=1 << 24)
    conv: int = Field(3, ge=1, le=64)
    filter_size: int = Field(64, ge=1, le=1 << 14)
    filter_layers: int = Field(2, ge=0, le=64)
    filter_features: int = Field(33, ge=3, le=4097)
    frequency: float = Field(14.0, gt=0, le=1e4)
    learn_positions: bool = True
    modulate: bool = True
    learn_decay: bool = False
    fast_decay: float = Field(0.3, gt=0, le=1e4)
    slow_decay: float = Field(1.5, gt=0, le=1e4)
    decay_target: float = Field(0.01, gt=0, lt=1)
    decay_shift: float = Field(0.0, ge=0, le=1e4)
    out_init: float = Field(1.0, ge=0, le=1e4)
    causal: bool = True

    @field_validator("filter_features")
    @classmethod
    def _time_and_pairs(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"time and pairs of cosine and sine make an odd number; {value} is not, try {value + 1}")
        return value


class FilterMLP(nn.Module):
    """z (T, F) to the taps of all channels (T, C): layers of sines whose frequencies are trained, a linear map last."""

    def __init__(self, features: int, size: int, layers: int, channels: int) -> None:
        super().__init__()
        self.first_weight = nn.Parameter(torch.empty(size, features))
        self.first_bias = nn.Parameter(torch.empty(size))
        self.inner_weight = nn.Parameter(torch.empty(layers, size, size)) if layers else None
        self.inner_bias = nn.Parameter(torch.empty(layers, size)) if layers else None
        self.last_weight = nn.Parameter(torch.empty(channels, size))
        self.frequency = nn.Parameter(torch.empty(size))

    def forward(self, z_TF: Tensor, length: int) -> Tensor:
        """The first `length` taps."""
        h_TX = torch.sin(self.frequency * F.linear(z_TF[:length], self.first_weight, self.first_bias))
        if self.inner_weight is not None and self.inner_bias is not None:
            for weight, bias in zip(self.inner_weight, self.inner_bias, strict=True):
                h_TX = torch.sin(self.frequency * F.linear(h_TX, weight, bias))
        return F.linear(h_TX, self.last_weight)

    def start(self, std: float, frequency: float) -> None:
        """Normal weights, no biases, one frequency."""
        for weight in (self.first_weight, self.inner_weight, self.last_weight):
            if weight is not None:
                init.normal_(weight, std=std)
        for bias in (self.first_bias, self.inner_bias):
            if bias is not None:
                init.zeros_(bias)
        init.constant_(self.frequency, frequency)

    @torch.no_grad()
    def make_constant(self, taps_C: Tensor) -> None:
        """The same taps at every position: feature 0 of the last sines becomes one, and only it is read."""
        inner = self.inner_weight is not None and self.inner_bias is not None
        weight = self.inner_weight[-1] if inner else self.first_weight  # type: ignore[index]
        bias = self.inner_bias[-1] if inner else self.first_bias  # type: ignore[index]
        weight[0] = 0
        bias[0] = math.pi / 2 / self.frequency[0]
        self.last_weight.zero_()
        self.last_weight[:, 0] = taps_C


@register_mixer("hyena")
class Hyena(SequenceMixer):
    """Hyena; see the module docstring."""

    Config = HyenaConfig
    traits = Traits(causal=True, bidirectional=True, state="window")
    keep_float32 = (
        "first_weight", "first_bias", "inner_weight", "inner_bias", "last_weight", "frequency", "positions", "decay",
        "skip",
    )  # fmt: skip
    config: HyenaConfig
    decay: Tensor  # (C)

    def __init__(self, config: HyenaConfig, width: int) -> None:
        super().__init__(config, width)
        c, self.inner = config, config.inner_size or width
        channels, sizes = (c.order - 1) * self.inner, (c.filter_features, c.filter_size, c.filter_layers)
        self.in_proj = Linear(width, (c.order + 1) * self.inner)
        self.conv = ShortConv((c.order + 1) * self.inner, c.conv, bias=True)
        self.conv.activation = None
        self.filter = FilterMLP(*sizes, channels)
        self.filter_back = None if c.causal else FilterMLP(*sizes, channels)
        self.positions = nn.Parameter(torch.empty(c.window, c.filter_features)) if c.learn_positions else None
        if c.learn_decay and c.modulate:
            self.decay = nn.Parameter(torch.empty(channels))
        elif c.modulate:
            self.register_buffer("decay", torch.empty(channels))
        self.skip = nn.Parameter(torch.empty(c.order - 1, self.inner))
        self.o_proj = Linear(self.inner, width)
        self._kept: tuple[list[Any], Tensor] | None = None  # filters between two decoding steps
        self.reset_parameters(0.02)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        x_BLD = self.take_in(x_BLD, mask_BL, segments_BL, state)
        inputs = Inputs(x_BLD, mask_BL, segments_BL, None, state)
        u_BLC, tail = self.conv(self.in_proj(x_BLD), inputs, None if state is None else state["conv"])
        first, *gates, v_BLE = u_BLC.split(self.inner, -1)
        reach = x_BLD.shape[1] + (0 if state is None else state["past"].shape[2])
        kernel_NET, back_NET = self._filters(reach, inputs)
        pasts: list[Any] = []
        for n, gate_BLE in enumerate(reversed(gates)):
            back_ET = None if back_NET is None else back_NET[n]
            past_BSE = None if state is None else state["past"][:, n]
            read_BLE = v_BLE * gate_BLE
            y_BLE, past = self._convolve(read_BLE, kernel_NET[n], back_ET, inputs, past_BSE)
            v_BLE = y_BLE + read_BLE * self.skip[n].to(read_BLE.dtype)
            pasts.append(past)
        out_BLD = self.o_proj(v_BLE * first)
        if state is None:
            return out_BLD, None
        assert tail is not None
        return out_BLD, State({"conv": tail, "past": torch.stack(pasts, 1)}, state.length + x_BLD.shape[1])

    def _convolve(
        self, x_BLE: Tensor, kernel_ET: Tensor, back_ET: Tensor | None, inputs: Inputs, past_BSE: Tensor | None
    ) -> tuple[Tensor, Any]:
        """The long convolution of x behind what was read before, and what the next call has to know."""
        if past_BSE is None:
            return long_conv(x_BLE, kernel_ET, back_ET, mask_BL=inputs.mask_BL, segments_BL=inputs.segments_BL), None
        L, mask_BS = x_BLE.shape[1], None
        joined_BSE = torch.cat([past_BSE, x_BLE], 1)
        S, keep = joined_BSE.shape[1], self.config.window - 1
        if inputs.mask_BL is not None:  # zeros that stand where a row is younger are inputs like others
            mask_BS = F.pad(inputs.mask_BL, (S - L, 0), value=True)
        y_BLE = None if L == 1 else long_conv(joined_BSE, kernel_ET, mask_BL=mask_BS)[:, S - L :]
        if mask_BS is not None:  # padding, which is zero here, moves in front of all that is real
            joined_BSE = take(joined_BSE, right_align(mask_BS), 1)
        if y_BLE is None:
            y_BLE = long_conv_step(joined_BSE, kernel_ET)
        return y_BLE, joined_BSE[:, torch.sym_max(S - keep, 0) :]

    def kernels(self, length: int) -> tuple[Tensor, Tensor | None]:
        """The first `length` taps, at most `window`, of all filters (N - 1, E, T), and of those that look ahead."""
        c, weight = self.config, self.filter.first_weight
        T: Any = torch.sym_min(length, c.window)
        with no_autocast(weight):
            if self.positions is not None:
                z_TF: Tensor = self.positions
            else:
                z_TF = position_features(c.window, c.filter_features, T, weight.device).to(weight.dtype)
            fade_TC: Tensor | float = 1.0
            if c.modulate:
                time_T1 = torch.arange(T, device=weight.device, dtype=weight.dtype)[:, None] / max(c.window - 1, 1)
                fade_TC = torch.exp(-time_T1 * self.decay.abs()) + c.decay_shift
            networks = [self.filter] if self.filter_back is None else [self.filter, self.filter_back]
            taps = [(net(z_TF, T) * fade_TC).T.unflatten(0, (c.order - 1, self.inner)) for net in networks]
        return taps[0], taps[1] if len(taps) > 1 else None

    def _filters(self, length: int, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """`kernels`, kept from one decoding step to the next as long as no weight changes."""
        if (
            torch.compiler.is_exporting() and inputs.x_BLD.shape[1] > 1
        ):  # no length is built in where all taps are there
            return self.kernels(self.config.window)
        step = inputs.state is not None and inputs.start > 0 and inputs.x_BLD.shape[1] == 1
        if not step or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._kept = None
            return self.kernels(length)
        own = [*self.filter.parameters(), *self.parameters(recurse=False), *self.buffers(recurse=False)]
        key = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in own]
        if self._kept is None or self._kept[0] != key or self._kept[1].shape[2] < min(length, self.config.window):
            self._kept = key, self.kernels(1 << (length - 1).bit_length())[0]
        return self._kept[1][..., :length], None

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        weight, order = self.o_proj.weight, self.config.order
        device, dtype = device or weight.device, dtype or weight.dtype
        conv = torch.zeros(batch_size, self.config.conv - 1, (order + 1) * self.inner, device=device, dtype=dtype)
        past = torch.zeros(batch_size, order - 1, 0, self.inner, device=device, dtype=dtype)
        return State({"conv": conv, "past": past})

    def reset_parameters(self, std: float) -> None:
        """As the authors' language models: normal weights with `std` (W_out times `out_init`), z and the decays by
        their formulas, the skips standard normal, the short convolution as torch's own."""
        c = self.config
        for net in (self.filter, self.filter_back):
            if net is not None:
                net.start(std, c.frequency)
        if self.positions is not None:
            init.copy_(self.positions, position_features(c.window, c.filter_features, c.window).float())
        if c.modulate:
            slow, fast = (-math.log(c.decay_target) / part for part in (c.slow_decay, c.fast_decay))
            init.copy_(self.decay, torch.linspace(slow, fast, len(self.decay)))
        init.normal_(self.skip)
        init.normal_(self.o_proj.weight, std=std * c.out_init)
        bound = c.conv**-0.5
        assert self.conv.bias is not None
        init.uniform_(self.conv.bias, -bound, bound)

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        inner = attention.num_heads * attention.value_head_dim
        values: dict[str, Any] = {"causal": attention.causal}
        if inner != attention.q_HKD.shape[1]:
            values["inner_size"] = inner
        if attention.window is not None:
            values["window"] = attention.window
        return cls.Config.parse({"name": cls.name, **values, **options}, "mixer")

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        assert isinstance(config, HyenaConfig)
        a, mixer = attention, cls(config, attention.q_HKD.shape[1])
        if mixer.inner != a.num_heads * a.value_head_dim or not config.modulate or config.decay_shift:
            raise ConversionError(
                f"mixer 'hyena' made from attention with {a.num_heads} heads of {a.value_head_dim} needs inner_size "
                f"{a.num_heads * a.value_head_dim}, modulate and decay_shift 0; got inner_size {mixer.inner}, modulate "
                f"{config.modulate}, decay_shift {config.decay_shift}"
            )
        mixer.start_from(attention, stats)
        return mixer

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        """Set all weights as the module docstring says."""
        a, E, T = attention, self.inner, self.config.window
        self.in_proj.weight.zero_()
        self.in_proj.weight[-E:] = a.per_query_head(a.v_GVD).flatten(0, 1)
        self.in_proj.bias.fill_(1.0)
        self.in_proj.bias[-E:] = 0
        if a.v_bias is not None:
            self.in_proj.bias[-E:] = a.per_query_head(a.v_bias).flatten()
        self.conv.set_identity()
        half_life_E = lookback(a, stats, a.num_heads).repeat_interleave(a.value_head_dim).to(self.decay)
        z_E = 2 ** (-1 / half_life_E)
        self.decay[:E] = LN2 * (T - 1) / half_life_E
        taps_C = torch.zeros_like(self.decay)  # the first convolution averages, those after it hand on
        taps_C[:E] = (1 - z_E) if self.config.causal else (1 - z_E) / 2
        for net in (self.filter, self.filter_back):
            if net is not None:
                net.make_constant(taps_C)
        self.skip.fill_(1.0)
        self.skip[0] = 0
        self.o_proj.weight.copy_(a.o_DHV)
        self.o_proj.bias.zero_()
        if a.o_bias is not None:
            self.o_proj.bias.copy_(a.o_bias)

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """Filters shorter than the sequences of `zoo.testing`."""
        return {"window": 24, "filter_size": 8, "filter_features": 5, "frequency": 2.0, "conv": 3}


def position_features(window: int, features: int, length: int, device: Any = "cpu") -> Tensor:
    """z (length, features) in float64: t / (T-1), cos(2 pi f t / T), -sin(2 pi f t / T), f evenly from 1e-4 to
    features // 2 - 1, as in the authors' code."""
    bands = (features - 1) // 2
    time_T1 = torch.arange(length, dtype=torch.float64, device=device)[:, None]
    frequency_F = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64, device=device)
    angle_TF = 2 * math.pi / window * time_T1 * frequency_F
    return torch.cat([time_T1 / max(window - 1, 1), angle_TF.cos(), -angle_TF.sin()], -1)
