"""The two dense channel mixers.

mlp:        W_2 act(W_1 x)
gated_mlp:  W_down (act(W_gate x) * W_up x)        (Shazeer 2020, arXiv 2002.05202; SwiGLU with act = silu)
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor, nn
from transformers.activations import ACT2FN

from zoo.config import FFNOptions
from zoo.errors import did_you_mean
from zoo.ffn.chunked import in_chunks
from zoo.linear import Linear
from zoo.registry import register_ffn


class MLPConfig(FFNOptions):
    """Options of `mlp`: inner width, activation by transformers' name, biases, positions at a time (None: all)."""

    name: Literal["mlp"] = "mlp"
    hidden_size: int = Field(ge=1, le=1 << 20)
    activation: str = "gelu"
    bias: bool = True
    chunk: int | None = Field(default=None, ge=1, le=1 << 27)

    @field_validator("activation")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ACT2FN:
            raise ValueError(f"unknown activation {value!r}{did_you_mean(value, ACT2FN)}")
        return value


class GatedMLPConfig(MLPConfig):
    """Options of `gated_mlp`."""

    name: Literal["gated_mlp"] = "gated_mlp"  # type: ignore[assignment]
    activation: str = "silu"
    bias: bool = False


@register_ffn("mlp")
class MLP(nn.Module):
    """Two layers with an activation between; (B, L, D) -> (B, L, D)."""

    Config = MLPConfig

    def __init__(self, config: MLPConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.up_proj = Linear(width, config.hidden_size, bias=config.bias)
        self.down_proj = Linear(config.hidden_size, width, bias=config.bias)
        self.act = ACT2FN[config.activation]

    def forward(self, x_BLD: Tensor) -> Tensor:
        return in_chunks(lambda x: self.down_proj(self.act(self.up_proj(x))), x_BLD, self.config.chunk)


@register_ffn("gated_mlp")
class GatedMLP(nn.Module):
    """An activated gate times a linear map, projected back; (B, L, D) -> (B, L, D)."""

    Config = GatedMLPConfig

    def __init__(self, config: GatedMLPConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = Linear(width, config.hidden_size, bias=config.bias)
        self.up_proj = Linear(width, config.hidden_size, bias=config.bias)
        self.down_proj = Linear(config.hidden_size, width, bias=config.bias)
        self.act = ACT2FN[config.activation]

    def forward(self, x_BLD: Tensor) -> Tensor:
        return in_chunks(
            lambda x: self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x)), x_BLD, self.config.chunk
        )
