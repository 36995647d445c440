"""Chunked local attention (Kitaev et al. 2020, arXiv:2001.04451: the layers between the LSH layers of the published
Reformers).

    y_t = sum_s softmax_s(scale * q_t . k_s) v_s   over the chunks floor(t / C) - before .. floor(t / C) + after

In the causal form s <= t, and there is nothing after; in the two-sided form the chunks stand in a ring. How far a
position sees thus depends on where in its chunk it stands: from `before * C + 1` to `(before + 1) * C` positions. All
chunks are equal, so the work is a few large matrix products. Padding does not count: chunks are of real tokens.

The state is the keys and values of the chunks that the next token can see, at most (before + 1) * C - 1, in a buffer of
that size. With no more tokens than C this is softmax attention, so conversion is a copy.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from zoo import ops
from zoo.mixers.base import Traits
from zoo.mixers.qkv import Inputs, QKVMixer, QKVOptions
from zoo.ops.local_attention import local_attention
from zoo.ops.padding import invert, right_align, take
from zoo.ops.sequences import find_sequences
from zoo.registry import register_mixer


class LocalAttentionConfig(QKVOptions):
    """Options of `local_attention`: tokens a chunk, and how many chunks before and after its own a token sees."""

    name: Literal["local_attention"] = "local_attention"
    chunk: int = Field(64, ge=1, le=1 << 20)
    chunks_before: int = Field(1, ge=0, le=64)
    chunks_after: int = Field(0, ge=0, le=64)

    @model_validator(mode="after")
    def _nothing_later(self) -> LocalAttentionConfig:
        return refuse_later_chunks(self)


def refuse_later_chunks(config: Any) -> Any:
    """Raise ValueError for a causal config with chunks after its own."""
    if config.causal and config.chunks_after:
        raise ValueError(f"chunks_after ({config.chunks_after}) must be 0 in the causal form: nothing later is seen")
    return config


@register_mixer("local_attention")
class LocalAttention(QKVMixer):
    """Chunked local attention; see the module docstring. `keep`: how many keys and values the state has room for."""

    Config = LocalAttentionConfig
    traits = Traits(causal=True, bidirectional=True, state="window")
    config: LocalAttentionConfig
    needs_positions = True

    def __init__(self, config: LocalAttentionConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        self.keep = (config.chunks_before + 1) * config.chunk - 1

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        if inputs.state is not None:
            if inputs.mask_BL is None and "seen" not in inputs.state:
                return self._go_on(q_BHLK, k_BGLK, v_BGLV, inputs)
            return self._go_on_padded(q_BHLK, k_BGLK, v_BGLV, inputs)
        rows = find_sequences((q_BHLK.shape[0], q_BHLK.shape[2]), inputs.mask_BL, inputs.segments_BL)
        if rows is None:
            return self._attend(q_BHLK, k_BGLK, v_BGLV), {}
        q, k, v = (rows.split_heads(x) for x in (q_BHLK, k_BGLK, v_BGLV))
        return rows.join_heads(self._attend(q, k, v, rows.length_R)), {}

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, length_B: Tensor | None = None) -> Tensor:
        c = self.config
        return local_attention(
            q, k, v, chunk=c.chunk, before=c.chunks_before, after=c.chunks_after, causal=c.causal,
            scale=c.softmax_scale, length_B=length_B,
        )  # fmt: skip

    def _first_seen(self, position: Any) -> Any:
        """The first position that a token at `position` (a number or a tensor) sees."""
        first = (position // self.config.chunk - self.config.chunks_before) * self.config.chunk
        return first.clamp(min=0) if isinstance(first, Tensor) else max(first, 0)

    def _go_on(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """All rows stand at the same place: carried and new tokens beside each other begin with a chunk."""
        state = inputs.state
        assert state is not None
        first, end = self._first_seen(state.length), state.length + q.shape[2]
        old = state.length - first
        k, v = torch.cat([state["k"][:, :, :old], k], 2), torch.cat([state["v"][:, :, :old], v], 2)
        drop = self._first_seen(end) - first
        room = self.keep - (end - first - drop)
        tensors = {name: F.pad(x[:, :, drop:], (0, 0, 0, room)) for name, x in (("k", k), ("v", v))}
        if q.shape[2] == 1:
            return ops.attention(q, k, v, scale=self.config.softmax_scale), tensors
        return self._attend(F.pad(q, (0, 0, old, 0)), k, v)[:, :, old:], tensors

    def _go_on_padded(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Every row stands somewhere else; the same, with padding sorted behind each row's tokens."""
        state, mask_BL, (B, _, L, _) = inputs.state, inputs.mask_BL, q.shape
        assert state is not None
        if mask_BL is None:
            mask_BL = torch.ones(B, L, dtype=torch.bool, device=q.device)
        seen_B = state["seen"] if "seen" in state else torch.full((B,), state.length, device=q.device)
        first_B, end_B = self._first_seen(seen_B), seen_B + mask_BL.sum(1)
        carried = torch.arange(self.keep, device=q.device) < (seen_B - first_B)[:, None]
        mask_BT = torch.cat([carried, mask_BL], 1)
        k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        order_BT = right_align(~mask_BT)
        k_front, v_front = take(k, order_BT, 2), take(v, order_BT, 2)
        drop_B1 = (self._first_seen(end_B) - first_B)[:, None]
        kept_BW = (drop_B1 + torch.arange(self.keep, device=q.device)).clamp(max=mask_BT.shape[1] - 1)
        tensors = {"k": take(k_front, kept_BW, 2), "v": take(v_front, kept_BW, 2)}
        if L == 1:
            return ops.attention(q, k, v, scale=self.config.softmax_scale, mask_BS=mask_BT), tensors
        q_front = take(F.pad(q, (0, 0, self.keep, 0)), order_BT, 2)
        y = take(self._attend(q_front, k_front, v_front, end_B - first_B), invert(order_BT), 2)
        return y[:, :, self.keep :], tensors

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        c = self.config
        return {
            name: torch.zeros(batch_size, c.kv_heads, self.keep, size, device=device, dtype=dtype)
            for name, size in (("k", c.head_dim), ("v", c.value_dim))
        }

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """Chunks short enough that the laws meet many of them."""
        return {"chunk": 6}
