"""What the RWKV mixers share: the start of the token shift by depth, bottlenecks, the norm per head, a common base.

A token shift mixes every token with the one before it, x + (x_before - x) * share; `share` is a parameter per channel
(RWKV-4 keeps one minus it, as published). RWKV-6 and -7 have heads with a matrix state each, and fit over attention's
projections: receptance is the query. Both start every parameter from a formula in the layer's place in the model.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init

from zoo.linear import Linear
from zoo.mixers.base import AttentionWeights
from zoo.mixers.qkv import Inputs, QKVOptions
from zoo.mixers.recurrent import FeatureMap, RecurrentMixer, feature_map, softmax_features
from zoo.ops.shift import token_shift


class RWKVOptions(QKVOptions):
    """Options of `rwkv6` and `rwkv7`; the defaults are the published blocks.

    norm: the norm per head in front of the output gate (mean and variance, as in a group norm), with `norm_eps`.
    feature_map: of receptances and keys; converted layers have one, the published blocks none.
    """

    conv: None = None  # type: ignore[assignment]
    conv_bias: Literal[False] = False
    head_norm: Literal[False] = False
    scale: float | None = Field(1.0, gt=0, le=1e4)
    gate: bool = True
    norm: bool = True
    norm_eps: float = Field(64e-5, gt=0, le=1)
    feature_map: FeatureMap | None = None


class RWKVMixer(RecurrentMixer):
    """Base of `rwkv6` and `rwkv7`: `project` leaves what depends on the shifted input for `mix`."""

    config: RWKVOptions
    stands_alone = True
    keep_float32: ClassVar[tuple[str, ...]] = ("decay_bias",)
    shift_MD: nn.Parameter  # the static shares of the previous token, one row for each use
    norm: NormPerHead

    def __init__(self, config: RWKVOptions, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        self.decay_bias = nn.Parameter(torch.empty(config.kv_heads * config.head_dim))
        if config.norm:
            self.norm = NormPerHead(config.num_heads, config.value_dim, config.norm_eps)

    def shift(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """x_before - x at every position, and what to carry."""
        x_BLD, state = inputs.x_BLD, inputs.state
        shifted_BLD, last_BD = token_shift(
            x_BLD,
            initial=None if state is None else state["shift"],
            final=state is not None,
            mask_BL=inputs.mask_BL,
            segments_BL=inputs.segments_BL,
        )
        return shifted_BLD - x_BLD, {} if last_BD is None else {"shift": last_BD}

    def by_head(self, x_BLE: Tensor, size: int) -> Tensor:
        """(B, L, heads * size) -> (B, heads, L, size)."""
        return x_BLE.unflatten(-1, (-1, size)).transpose(1, 2)

    def norm_and_rotate(self, q_BHLK: Tensor, k_BGLK: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """As in the base class, and the feature map behind."""
        q_BHLK, k_BGLK = super().norm_and_rotate(q_BHLK, k_BGLK, inputs)
        name = self.config.feature_map
        return feature_map(name, q_BHLK), feature_map(name, k_BGLK)

    def close(self, y_BHLV: Tensor, inputs: Inputs, bonus_BHLV: Tensor | None = None) -> Tensor:
        """The norm per head, what is added behind it, and the output gate; by head again."""
        y_BLHV = y_BHLV.transpose(1, 2)
        if self.config.norm:
            y_BLHV = self.norm(y_BLHV)
        if bonus_BHLV is not None:
            y_BLHV = y_BLHV + bonus_BHLV.transpose(1, 2)
        if self.config.gate:
            y_BLHV = y_BLHV * inputs.found["gate"].unflatten(-1, y_BLHV.shape[-2:])
        return y_BLHV.transpose(1, 2)

    def finish(self, y_BHLV: Tensor, x_BLD: Tensor) -> Tensor:
        """The output projection; norm and gate have been applied by `mix`."""
        return self.o_proj(y_BHLV.transpose(1, 2).flatten(-2))

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        shift_BD = torch.zeros(batch_size, self.width, device=device, dtype=dtype)
        return {**super().mix_state(batch_size, device, dtype), "shift": shift_BD}

    def reset_projections(self) -> None:
        """W_r and W_v orthogonal, W_k a tenth of that, W_o zero; the norm's weights rise with the depth."""
        for linear, gain in ((self.q_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
            init.orthogonal_(linear.weight, gain=gain)
        init.zeros_(self.o_proj.weight)
        if self.config.norm:
            layer, layers = self.place
            init.constant_(self.norm.weight, ((1 + layer) / layers) ** 0.7)

    @property
    def normalizes_output(self) -> bool:
        return self.config.norm

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        # Products of softmax features are about 1 / head_dim: the scale brings them to one, far above the norm's eps.
        return softmax_features(attention)


class NormPerHead(nn.Module):
    """A group norm with one group per head: (B, L, H, V) -> (B, L, H, V), weight and bias per channel."""

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(heads * size)), nn.Parameter(torch.zeros(heads * size))
        self.eps = eps

    def forward(self, x_BLHV: Tensor) -> Tensor:
        y_BLHV = F.layer_norm(x_BLHV, x_BLHV.shape[-1:], eps=self.eps)
        weight_HV, bias_HV = (p.to(y_BLHV.dtype).view(x_BLHV.shape[-2:]) for p in (self.weight, self.bias))
        return torch.addcmul(bias_HV, y_BLHV, weight_HV)

    def reset_parameters(self, std: float) -> None:
        """Weights of one, no bias."""
        init.ones_(self.weight)
        init.zeros_(self.bias)


class Bottleneck(nn.Module):
    """x -> W_up f(W_down x); f is the identity, tanh or sigmoid."""

    def __init__(self, width: int, rank: int, size: int, activation: Literal["tanh", "sigmoid"] | None = None) -> None:
        super().__init__()
        self.down = Linear(width, rank, bias=False)
        self.up = Linear(rank, size, bias=False)
        self.activation = activation

    def forward(self, x_BLD: Tensor) -> Tensor:
        low_BLR = self.down(x_BLD)
        return self.up(low_BLR if self.activation is None else getattr(torch, self.activation)(low_BLR))

    @property
    def weight(self) -> Tensor:
        """That of the last map, whose zero is the zero of the whole."""
        return self.up.weight

    @property
    def bias(self) -> None:
        """There is none."""


def depth(place: tuple[int, int]) -> tuple[float, float]:
    """A layer's place as a number from 0 (first) to 1 (last), and as one from 1 (first) to almost 0 (last)."""
    layer, layers = place
    return layer / max(layers - 1, 1), 1 - layer / layers


def ramp(size: int) -> Tensor:
    """0, 1/n, ..., (n-1)/n over the channels."""
    return torch.arange(size) / size


def ramp_to_one(size: int) -> Tensor:
    """0, 1/(n-1), ..., 1 over the channels."""
    return torch.arange(size) / max(size - 1, 1)


def zigzag(size: int, step: float) -> Tensor:
    """0, step, -step, 0, step, ... over the channels."""
    return ((torch.arange(size) + 1) % 3 - 1) * step


def first_values(inputs: Inputs, name: str, v_BGLV: Tensor) -> Tensor:
    """The values that the first layer of a kind left under `name` in this pass; that layer's own are left there."""
    if inputs.shared is None:
        return v_BGLV
    return inputs.shared.setdefault(f"{name}.values", v_BGLV)
