"""H3, "hungry hungry hippos": two state space models and two gates (Fu et al. 2022, arXiv 2212.14052).

    q, k, v = W_q x, W_k x, W_v x
    k~_t    = sum_{l < N} s_l k_{t-l} + d' k_t                  the shift model: s_l = sum_n B'_n C'_{n+l}
    S       = ssm(k~ v^T) + d k~ v^T                            a diagonal model per head, applied to every entry
    y       = W_o (S^T q)

A head has `head_dim` channels, so k~ v^T is a square of them; with one channel, as in the released models, all
products are elementwise. The shift model remembers the last N keys and compares; the diagonal one, S4D with a B of
its own and bilinear steps, keeps what passed. A sequence is a short and a long convolution, a step two recurrences:
the state is the last N - 1 keys and N / 2 complex numbers per entry. Positions are in the kernels. Causal only, as
published. (The authors' W_o reads the channels of a head before the heads; ours reads head by head.)

Conversion: with the shift model at the identity and one mode of the diagonal one a real decay, a head is linear
attention (1 + q'k') over a fading past. The 1 comes from a constant channel; q'k' is the best product of rank
head_dim - 1 for the head's logits, so this is the softmax to first order, as far as the logits are small
(`first_order_share`). Every group of head_dim value channels gets a head of its own.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import MixerOptions
from zoo.errors import ConfigError, ConversionError
from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, SequenceMixer, State, Traits
from zoo.mixers.recurrent import first_order_share, lookback
from zoo.mixers.s4d import PairedStateOptions, initial_rates
from zoo.ops.pairs import from_pairs, numbers, to_pairs
from zoo.ops.state_space import diagonal_ssm, discretize
from zoo.registry import register_mixer


class H3Config(PairedStateOptions):
    """Options of `h3`; the defaults are the released models.

    state_dim: N, of both models, counting both of a conjugate pair. inner_size: channels; None is the width of the
    model. init: where A starts, as for `s4d`. dt_min, dt_max: range from which `reset_parameters` draws the heads'
    steps.
    """

    name: Literal["h3"] = "h3"
    head_dim: int = Field(1, ge=1, le=256)
    inner_size: int | None = Field(None, ge=1, le=1 << 20)
    init: Literal["lin", "inv", "legs"] = "lin"
    discretization: Literal["bilinear", "zoh"] = "bilinear"
    bias: bool = True


@register_mixer("h3")
class H3(SequenceMixer):
    """H3; see the module docstring."""

    Config = H3Config
    traits = Traits(causal=True, bidirectional=False, state="constant")
    keep_float32 = ("shift_B", "shift_C", "shift_D", "log_dt", "log_A_real", "A_imag", "B", "C", "D")
    config: H3Config

    def __init__(self, config: H3Config, width: int) -> None:
        super().__init__(config, width)
        self.inner, N = config.inner_size or width, config.state_dim
        if self.inner % config.head_dim:
            raise ConfigError(f"head_dim: {self.inner} channels do not divide into heads of {config.head_dim}")
        heads = self.inner // config.head_dim
        self.q_proj = Linear(width, self.inner, bias=config.bias)
        self.k_proj = Linear(width, self.inner, bias=config.bias)
        self.v_proj = Linear(width, self.inner, bias=config.bias)
        self.shift_B = nn.Parameter(torch.empty(self.inner, N))
        self.shift_C = nn.Parameter(torch.empty(self.inner, N))
        self.shift_D = nn.Parameter(torch.empty(self.inner))
        self.log_dt = nn.Parameter(torch.empty(heads))
        self.log_A_real = nn.Parameter(torch.empty(heads, N // 2))
        self.A_imag = nn.Parameter(torch.empty(heads, N // 2))
        self.B = nn.Parameter(torch.empty(heads, N // 2, 2))
        self.C = nn.Parameter(torch.empty(heads, N // 2, 2))
        self.D = nn.Parameter(torch.empty(heads))
        self.o_proj = Linear(self.inner, width, bias=config.bias)
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
        q_BLE, k_BLE, v_BLE = self.q_proj(x_BLD), self.k_proj(x_BLD), self.v_proj(x_BLD)
        wide = torch.promote_types(k_BLE.dtype, torch.float32)
        k_BLE, tail = ops.short_conv(
            k_BLE.to(wide),
            self.shift_kernel().flip(1),
            initial=None if state is None else state["shift"],
            final=state is not None,
            mask_BL=mask_BL,
            segments_BL=segments_BL,
        )
        y_BLE, after = self._remember(q_BLE, k_BLE, v_BLE.to(wide), mask_BL, segments_BL, state)
        out_BLD = self.o_proj(y_BLE.to(q_BLE.dtype))
        if state is None:
            return out_BLD, None
        assert tail is not None
        assert after is not None
        return out_BLD, State({"shift": tail, "ssm": after}, state.length + x_BLD.shape[1])

    def _remember(
        self, q_BLE: Tensor, k_BLE: Tensor, v_BLE: Tensor, mask_BL: Tensor | None, segments_BL: Any, state: State | None
    ) -> tuple[Tensor, Tensor | None]:
        """The diagonal model over the products of keys and values, read with the queries; and its new state."""
        (B, L, _), P = k_BLE.shape, self.config.head_dim
        split = lambda x_BLE: x_BLE.unflatten(-1, (-1, P)).permute(0, 3, 1, 2)  # noqa: E731 (B, P, L, H)
        kv_RLH = (split(k_BLE)[:, :, None] * split(v_BLE)[:, None]).flatten(0, 2)
        repeat = lambda t: None if t is None else t.repeat_interleave(P * P, 0)  # noqa: E731
        steps = state is not None
        A_HN = numbers(-self.log_A_real.exp(), self.A_imag, steps)
        log_z, taken = discretize(self.log_dt.exp(), A_HN, self.config.discretization)
        s_RLH, after = diagonal_ssm(
            kv_RLH,
            log_z,
            from_pairs(self.B, steps) * from_pairs(self.C, steps) * taken,
            initial=None if state is None else from_pairs(state["ssm"], steps).flatten(0, 1),
            final=steps,
            mask_BL=repeat(mask_BL),
            segments_BL=repeat(segments_BL),
        )
        s_RLH = s_RLH + kv_RLH * self.D.to(kv_RLH.dtype)
        y_BPLH = (s_RLH.view(B, P, P, L, -1) * split(q_BLE)[:, :, None]).sum(1)
        y_BLE = y_BPLH.permute(0, 2, 3, 1).flatten(2)
        return y_BLE, None if after is None else to_pairs(after.unflatten(0, (B, P * P)))

    def shift_kernel(self) -> Tensor:
        """s_l, with the skip in s_0: (E, N), a correlation of B' and C'."""
        size = 2 * self.config.state_dim
        spectrum = torch.fft.rfft(self.shift_B, n=size).conj() * torch.fft.rfft(self.shift_C, n=size)
        taps_EN = torch.fft.irfft(spectrum, n=size)[:, : self.config.state_dim]
        return torch.cat([taps_EN[:, :1] + self.shift_D[:, None], taps_EN[:, 1:]], 1)

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        device, dtype = device or self.D.device, torch.promote_types(dtype or self.D.dtype, torch.float32)
        shift = torch.zeros(batch_size, self.config.state_dim - 1, self.inner, device=device, dtype=dtype)
        shape = (batch_size, self.config.head_dim**2, *self.C.shape)
        return State({"shift": shift, "ssm": torch.zeros(shape, device=device, dtype=dtype)})

    def reset_parameters(self, std: float) -> None:
        """The shift model as torch's convolutions with B' the first unit vector, A as `init` says, B one, C complex
        normal of variance one, dt log-uniform in [dt_min, dt_max], skips standard normal."""
        c, bound = self.config, self.config.state_dim**-0.5
        unit_N = torch.zeros(c.state_dim)
        unit_N[0] = 1
        init.copy_(self.shift_B, unit_N.expand_as(self.shift_B))
        init.uniform_(self.shift_C, -bound, bound)
        low, high = math.log(c.dt_min), math.log(c.dt_max)
        init.copy_(self.log_dt, torch.rand(len(self.log_dt)) * (high - low) + low)
        A_N = initial_rates(c.init, c.state_dim)
        init.copy_(self.log_A_real, (-A_N.real).log().expand_as(self.log_A_real))
        init.copy_(self.A_imag, A_N.imag.expand_as(self.A_imag))
        init.copy_(self.B, torch.tensor([1.0, 0.0]).expand_as(self.B))
        init.normal_(self.C, std=0.5**0.5)
        for skip in (self.shift_D, self.D):
            init.normal_(skip)

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        inner = attention.num_heads * attention.value_head_dim
        values: dict[str, Any] = {"causal": attention.causal, "head_dim": math.gcd(8, attention.value_head_dim)}
        if inner != attention.q_HKD.shape[1]:
            values["inner_size"] = inner
        return cls.Config.parse({"name": cls.name, **values, **options}, "mixer")

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        assert isinstance(config, H3Config)
        a, mixer = attention, cls(config, attention.q_HKD.shape[1])
        if mixer.inner != a.num_heads * a.value_head_dim or a.value_head_dim % config.head_dim or not config.bias:
            raise ConversionError(
                f"mixer 'h3' made from attention with {a.num_heads} heads of {a.value_head_dim} needs inner_size "
                f"{a.num_heads * a.value_head_dim}, a head_dim that divides {a.value_head_dim}, and bias; got "
                f"inner_size {mixer.inner}, head_dim {config.head_dim}, bias {config.bias}"
            )
        mixer.start_from(attention, stats)
        return mixer

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        """Set all weights as the module docstring says."""
        a, P = attention, self.config.head_dim
        groups = a.value_head_dim // P
        q_HPD, q_HP, k_HPD = _first_order(a, first_order_share(a, stats).to(a.q_HKD.device), P)
        spread = lambda t: t.repeat_interleave(groups, 0).flatten(0, 1)  # noqa: E731 every group of values has the same
        self.q_proj.weight.copy_(spread(q_HPD))
        self.q_proj.bias.copy_(spread(q_HP))
        self.k_proj.weight.copy_(spread(k_HPD))
        self.k_proj.bias.zero_()
        self.k_proj.bias[::P] = 1
        self.v_proj.weight.copy_(a.per_query_head(a.v_GVD).flatten(0, 1))
        self.v_proj.bias.zero_()
        if a.v_bias is not None:
            self.v_proj.bias.copy_(a.per_query_head(a.v_bias).flatten())
        self.shift_C.zero_()
        self.shift_D.fill_(1)
        self.D.zero_()
        z_H = 2 ** (-1 / lookback(a, stats, a.num_heads).repeat_interleave(groups).to(self.log_dt))
        zoh = self.config.discretization == "zoh"
        rate_H = -z_H.log() if zoh else 2 * (1 - z_H) / (1 + z_H)
        self.A_imag[:, 0] = 0
        self.log_A_real[:, 0] = rate_H.log() - self.log_dt
        A_HN = torch.complex(-self.log_A_real.exp(), self.A_imag)
        taken_H = discretize(self.log_dt.exp(), A_HN, self.config.discretization)[1][:, 0].real
        self.C.zero_()
        self.C[:, 0, 0] = (1 - z_H) / taken_H / 2  # both of the "pair" are the same real mode
        self.o_proj.weight.copy_(a.o_DHV)
        self.o_proj.bias.zero_()
        if a.o_bias is not None:
            self.o_proj.bias.copy_(a.o_bias)


def _first_order(attention: AttentionWeights, share_H: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of queries (H, rank, D), their bias (H, rank) and maps of keys: q'k' = 1 + the logits at their best rank,
    times the head's share.

    Row 0 is the constant: the query's bias is one there, and so has to be the key's. Biases of keys cancel in a softmax
    and are left out.
    """
    a = attention
    q_HKD = a.q_HKD.float().unflatten(0, (a.num_heads, -1)) * (a.scale * share_H)[:, None, None]
    k_HKD = a.per_query_head(a.k_GKD)
    # W_q^T W_k = Q_q (R_q R_k^T) Q_k^T, so that only a K x K matrix is decomposed.
    (base_q, r_q), (base_k, r_k) = torch.linalg.qr(q_HKD.mT), torch.linalg.qr(k_HKD.mT)
    u_HKR, s_HR, v_HRK = torch.linalg.svd(r_q @ r_k.mT)
    kept = min(rank - 1, s_HR.shape[1])
    root_HR1 = s_HR[:, :kept, None].sqrt()
    H, D = a.num_heads, q_HKD.shape[2]
    maps_q, maps_k = q_HKD.new_zeros(H, rank, D), q_HKD.new_zeros(H, rank, D)
    bias_HP = q_HKD.new_zeros(H, rank)
    bias_HP[:, 0] = 1
    maps_q[:, 1 : kept + 1] = root_HR1 * (base_q @ u_HKR[..., :kept]).mT
    maps_k[:, 1 : kept + 1] = root_HR1 * (base_k @ v_HRK.mT[..., :kept]).mT
    if a.q_bias is not None:  # what the bias adds to the logits, in the coordinates of the kept keys
        bias_HK = a.q_bias.float().view(H, -1) * (a.scale * share_H)[:, None]
        seen_HR = (bias_HK[:, None] @ r_k.mT @ v_HRK.mT[..., :kept])[:, 0]
        bias_HP[:, 1 : kept + 1] = seen_HR / root_HR1[..., 0].clamp(min=1e-6)
    return maps_q, bias_HP, maps_k
