"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236), with the feature maps in use.

    y_t = sum_{s <= t} (phi(q_t) . phi(k_s)) v_s  /  sum_{s <= t} phi(q_t) . phi(k_s)

phi is elu + 1, relu, softmax over the features of a head, or Hedgehog's [softmax(W x); softmax(-W x)] with a learned
W per head that starts as the identity (Zhang et al. 2024, arXiv 2402.04347). The state is one matrix (K, V) and one
vector (K) per key/value head. Without `causal` the sums run over all positions. Conversion copies the projections; of
the maps Hedgehog comes nearest to softmax attention, all need training.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo.mixers.base import AttentionWeights, Traits
from zoo.mixers.qkv import Inputs, QKVOptions
from zoo.mixers.recurrent import RecurrentMixer, feature_map, two_sided
from zoo.ops.backends import no_autocast
from zoo.registry import register_mixer

EPS = 1e-6


class LinearAttentionConfig(QKVOptions):
    """Options of `linear_attention`."""

    name: Literal["linear_attention"] = "linear_attention"
    feature_map: Literal["elu", "relu", "softmax", "hedgehog"] = "elu"


@register_mixer("linear_attention")
class LinearAttention(RecurrentMixer):
    """Normalised linear attention; see the module docstring."""

    Config = LinearAttentionConfig
    traits = Traits(causal=True, bidirectional=True, state="constant")
    config: LinearAttentionConfig
    averages_values = True
    normalizer = True

    def __init__(self, config: LinearAttentionConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        if config.feature_map == "hedgehog":
            self.q_map = HedgehogMap(config.num_heads, config.head_dim)
            self.k_map = HedgehogMap(config.kv_heads, config.head_dim)

    @property
    def state_key_dim(self) -> int:
        return self.config.head_dim * (2 if self.config.feature_map == "hedgehog" else 1)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        name = self.config.feature_map
        if name == "hedgehog":
            q_BHLK, k_BGLK = self.q_map(q_BHLK), self.k_map(k_BGLK)
        else:
            q_BHLK, k_BGLK = feature_map(name, q_BHLK), feature_map(name, k_BGLK)
        if self.config.causal:
            return self.recur(q_BHLK, k_BGLK, v_BGLV, inputs)
        return self._all_positions(q_BHLK, k_BGLK, v_BGLV, inputs), {}

    @staticmethod
    def _all_positions(q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> Tensor:
        (B, H, L, K), (G, V) = q_BHLK.shape, (k_BGLK.shape[1], v_BGLV.shape[-1])
        value = nn.functional.pad(v_BGLV, (0, 1), value=1.0).to(q_BHLK.dtype)  # the last column sums the weights
        with no_autocast(q_BHLK):
            if inputs.segments_BL is not None:
                y = two_sided(q_BHLK, k_BGLK, value, inputs)
            else:
                if inputs.mask_BL is not None:
                    k_BGLK = k_BGLK.masked_fill(~inputs.mask_BL[:, None, :, None], 0)
                y = (q_BHLK.reshape(B, G, -1, K) @ (k_BGLK.mT @ value)).view(B, H, L, V + 1)
            return (y[..., :V] / y[..., V:].clamp(min=EPS)).to(v_BGLV.dtype)

    def reset_parameters(self, std: float) -> None:
        """Hedgehog's maps start as the identity; the rest are plain projections."""
        for module in self.children():
            if isinstance(module, HedgehogMap):
                module.reset_parameters(std)

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        return {"feature_map": "hedgehog"}


class HedgehogMap(nn.Module):
    """[softmax(W x); softmax(-W x)] with one W per head: (B, H, L, K) -> (B, H, L, 2K), in at least float32."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.weight_HKK = nn.Parameter(torch.eye(size).repeat(heads, 1, 1))

    def forward(self, x_BHLK: Tensor) -> Tensor:
        y = x_BHLK @ self.weight_HKK.mT
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return torch.stack([y, -y], -2).softmax(-1).flatten(-2)

    def reset_parameters(self, std: float) -> None:
        """The identity: features of the queries and keys as they are."""
        heads, size, _ = self.weight_HKK.shape
        init.copy_(self.weight_HKK, torch.eye(size).repeat(heads, 1, 1))
