"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762), with all the heads in use today.

    y_t = sum_{s <= t} softmax_s(scale * q_t . k_s) v_s

Multi-head, grouped-query (Ainslie et al. 2023) and multi-query (Shazeer 2019) attention differ in `num_kv_heads` only.
Rotary positions, QK-norm, biases, a window and an output gate (a sigmoid in Qwen3-Next, 2025) are options. The state
is the keys and values of all positions: it grows by 2 * num_kv_heads * head_dim numbers a token. Conversion from
attention is a copy.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from zoo import ops
from zoo.errors import ConversionError
from zoo.linear import ZeroCenteredRMSNorm
from zoo.mixers.base import AttentionStats, AttentionWeights, State, Traits
from zoo.mixers.qkv import HeadNorm, Inputs, QKVMixer, QKVOptions
from zoo.registry import register_mixer


class AttentionConfig(QKVOptions):
    """Options of `attention`.

    window: a position sees itself and the `window - 1` before it. qk_norm_span: a QK-norm is over each head, or over
    all heads as one vector (OLMo-2, OLMoE); zero_centered: it multiplies by 1 + weight (Qwen3-Next). conv_activation:
    None leaves out that of the convolutions (the attention of mamba_ssm).
    """

    name: Literal["attention"] = "attention"
    window: int | None = Field(None, ge=1, le=1 << 27)
    qk_norm_span: Literal["head", "all"] = "head"
    qk_norm_zero_centered: bool = False
    gate_activation: Literal["silu", "sigmoid"] = "silu"
    conv_activation: Literal["silu"] | None = "silu"

    @model_validator(mode="after")
    def _one_norm(self) -> Self:
        if self.qk_norm_zero_centered and self.qk_norm_span == "all":
            raise ValueError("qk_norm_zero_centered is of norms of each head: qk_norm_span must be 'head'")
        return self


class AllHeadsNorm(HeadNorm):
    """RMSNorm over the heads of a position as one vector; its weight has H * K numbers."""

    def forward(self, x_BHLK: Tensor) -> Tensor:
        """(B, H, L, K) -> the same shape."""
        x_BLHK = x_BHLK.transpose(1, 2)
        return super().forward(x_BLHK.flatten(2)).view_as(x_BLHK).transpose(1, 2)


@register_mixer("attention")
class Attention(QKVMixer):
    """Softmax attention; see the module docstring."""

    Config = AttentionConfig
    traits = Traits(causal=True, bidirectional=True, state="grows", exact=True)
    config: AttentionConfig

    def __init__(self, config: AttentionConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        if own_projections and config.qk_norm and config.qk_norm_span == "all":
            self.q_norm = AllHeadsNorm(config.num_heads * config.head_dim, eps=config.qk_norm_eps)
            self.k_norm = AllHeadsNorm(config.kv_heads * config.head_dim, eps=config.qk_norm_eps)
        if own_projections and config.conv:
            for letter in "qkv":
                getattr(self, f"{letter}_conv").activation = config.conv_activation
        if own_projections and config.qk_norm and config.qk_norm_zero_centered:
            self.q_norm = ZeroCenteredRMSNorm(config.head_dim, eps=config.qk_norm_eps)  # type: ignore[assignment]
            self.k_norm = ZeroCenteredRMSNorm(config.head_dim, eps=config.qk_norm_eps)  # type: ignore[assignment]

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        mask_BS, tensors = inputs.mask_BL, {}
        if inputs.state is not None:
            tensors = append(inputs.state, k_BGLK, v_BGLV, inputs.mask_BL)
            S = inputs.state.length + k_BGLK.shape[2]
            k_BGLK, v_BGLV = tensors["k"][:, :, :S], tensors["v"][:, :, :S]
            mask_BS = tensors["mask"][:, :S] if "mask" in tensors else None
        y_BHLV = ops.attention(
            q_BHLK,
            k_BGLK,
            v_BGLV,
            causal=self.config.causal,
            scale=self.config.softmax_scale,
            mask_BS=mask_BS,
            segments_BS=inputs.segments_BL,
            window=self.config.window,
        )
        return y_BHLV, tensors

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        c = self.config
        return {
            "k": torch.empty(batch_size, c.kv_heads, 0, c.head_dim, device=device, dtype=dtype),
            "v": torch.empty(batch_size, c.kv_heads, 0, c.value_dim, device=device, dtype=dtype),
        }

    def activate_gate(self, gate: Tensor) -> Tensor:
        return gate.sigmoid() if self.config.gate_activation == "sigmoid" else super().activate_gate(gate)

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        return {"window": attention.window}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        c = self.config
        if c.qk_norm and c.qk_norm_zero_centered:
            self.q_norm.weight.sub_(1)
            self.k_norm.weight.sub_(1)
        if c.gate and c.gate_activation == "sigmoid":  # half open everywhere, and twice what goes through
            if self.g_proj.bias is not None:
                self.g_proj.bias.zero_()
            self.o_proj.weight.mul_(2)

    def attention_weights(self) -> AttentionWeights:
        """This layer as numbers, for the `from_attention` of another mixer."""
        c = self.config
        if c.qk_norm and c.qk_norm_span == "all":
            raise ConversionError(
                "attention with qk_norm_span: all cannot be converted: other mixers norm head by head"
            )
        if wrong := [key for key in ("gate", "conv", "head_norm") if getattr(c, key)]:
            raise ConversionError(f"attention with {wrong[0]}: {getattr(c, wrong[0])} cannot be converted")
        biases = {n: None if (b := getattr(self, f"{n}_proj").bias) is None else b.detach() for n in "qkvo"}
        qk_norm = (self.q_norm.weight.detach(), self.k_norm.weight.detach()) if c.qk_norm else None
        if qk_norm is not None and c.qk_norm_zero_centered:
            qk_norm = (1 + qk_norm[0], 1 + qk_norm[1])
        return AttentionWeights(
            q_HKD=self.q_proj.weight.detach(),
            k_GKD=self.k_proj.weight.detach(),
            v_GVD=self.v_proj.weight.detach(),
            o_DHV=self.o_proj.weight.detach(),
            q_bias=biases["q"],
            k_bias=biases["k"],
            v_bias=biases["v"],
            o_bias=biases["o"],
            num_heads=c.num_heads,
            num_kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            value_head_dim=c.value_dim,
            rotary=c.rotary,
            qk_norm=qk_norm,
            qk_norm_eps=c.qk_norm_eps,
            scale=c.softmax_scale,
            causal=c.causal,
            window=c.window,
        )


def append(
    state: State, k_BGLK: Tensor, v_BGLV: Tensor, mask_BL: Tensor | None, more: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The keys, values and validity of all positions so far, in buffers that grow by an eighth at a time.

    `more`: further tensors (B, G, L, ...) that are kept for every position.

    Decoding writes one position in place instead of copying the whole cache; with gradients the pieces are joined.
    A validity mask exists only once some position was masked.
    """
    new = {"k": (k_BGLK, 2), "v": (v_BGLV, 2), **{name: (x, 2) for name, x in (more or {}).items()}}
    tensors = dict(state.tensors)
    start, end = state.length, state.length + k_BGLK.shape[2]
    if mask_BL is not None or "mask" in state:
        B, device = k_BGLK.shape[0], k_BGLK.device
        tensors.setdefault("mask", torch.ones(B, start, dtype=torch.bool, device=device))
        ones = torch.ones(B, end - start, dtype=torch.bool, device=device)
        new["mask"] = (ones if mask_BL is None else mask_BL.bool(), 1)
    out = {}
    for name, (piece, dim) in new.items():
        buffer = tensors[name]
        grads = torch.is_grad_enabled() and (piece.requires_grad or buffer.requires_grad)
        if grads or torch.compiler.is_exporting():
            out[name] = torch.cat([buffer.narrow(dim, 0, start), piece], dim)
            continue
        if buffer.shape[dim] < end:
            shape = list(buffer.shape)
            shape[dim] = end if start == 0 else end + max(64, end // 8)
            grown = torch.empty(shape, dtype=piece.dtype, device=piece.device)
            grown.narrow(dim, 0, start).copy_(buffer.narrow(dim, 0, start))
            buffer = grown
        buffer.narrow(dim, start, end - start).copy_(piece)
        out[name] = buffer
    return out
