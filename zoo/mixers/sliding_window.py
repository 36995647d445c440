"""Sliding-window attention with sinks (Longformer, Beltagy et al. 2020, arXiv 2004.05150; StreamingLLM, Xiao et al.
2023, arXiv 2309.17453).

    y_t = sum_s softmax_s(scale * q_t . k_s) v_s   over   t - window < s <= t   and   s < sinks

A position sees itself, the `window - 1` tokens before it and the first `sinks` tokens of its sequence, on which
pretrained Transformers park the attention that they do not need. Padding does not count. The state is the last
`window - 1` keys and values and those of the sinks: it stops growing there. With no more tokens than the window this
is softmax attention, so conversion is a copy. The two-sided form sees `window - 1` tokens to either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from zoo import ops
from zoo.mixers.attention import AttentionConfig
from zoo.mixers.base import Traits
from zoo.mixers.qkv import Inputs, QKVMixer, QKVOptions
from zoo.ops.padding import right_align, take
from zoo.registry import register_mixer


class SlidingWindowConfig(QKVOptions):
    """Options of `sliding_window`. `window` counts the position itself; `sinks` tokens stay visible for ever."""

    name: Literal["sliding_window"] = "sliding_window"
    window: int = Field(64, ge=1, le=1 << 24)
    sinks: int = Field(4, ge=0, le=1024)

    def resolved(self, width: int) -> Any:
        """Without sinks the options of `attention` with this window, which computes the same from the same weights."""
        found = super().resolved(width)
        if self.sinks or not self.causal:
            return found
        shared = {key: getattr(found, key) for key in QKVOptions.model_fields if key != "name"}
        return AttentionConfig(**shared, window=self.window)


@dataclass(frozen=True)
class Joined:
    """Carried and new keys and values in order, which of them are real (None: all), and the state they leave."""

    k_BGSK: Tensor
    v_BGSV: Tensor
    mask_BS: Tensor | None
    tensors: dict[str, Tensor]


@register_mixer("sliding_window")
class SlidingWindow(QKVMixer):
    """Sliding-window attention with sinks; see the module docstring.

    `keep` is how many keys and values the state holds beside the sinks, at least `window - 1`.
    """

    Config = SlidingWindowConfig
    traits = Traits(causal=True, bidirectional=True, state="window")
    config: SlidingWindowConfig

    def __init__(self, config: SlidingWindowConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        self.needs_positions = config.sinks > 0
        self.keep = config.window - 1

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        if inputs.state is None:
            c = self.config
            y_BHLV = ops.window_attention(
                q_BHLK,
                k_BGLK,
                v_BGLV,
                window=c.window,
                sinks=c.sinks,
                causal=c.causal,
                scale=c.softmax_scale,
                mask_BS=inputs.mask_BL,
                segments_BS=inputs.segments_BL,
            )
            return y_BHLV, {}
        joined = self.join(k_BGLK, v_BGLV, inputs)
        return self.attend(q_BHLK, joined, inputs), joined.tensors

    def join(self, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> Joined:
        """The carried keys and values with the new ones behind them, and the tensors of the next state."""
        state, mask_BL = inputs.state, inputs.mask_BL
        assert state is not None
        k_BGSK, v_BGSV = torch.cat([state["k"], k_BGLK], 2), torch.cat([state["v"], v_BGLV], 2)
        B, L, S = k_BGLK.shape[0], k_BGLK.shape[2], k_BGSK.shape[2]
        first = torch.sym_max(S - self.keep, 0)  # no branch: a graph may be of any length
        mask_BS, tensors = None, {}
        if mask_BL is not None or "mask" in state:
            ones = torch.ones(B, S, dtype=torch.bool, device=k_BGLK.device)
            old_BS = state["mask"] if "mask" in state else ones[:, : S - L]
            mask_BS = torch.cat([old_BS, ones[:, :L] if mask_BL is None else mask_BL], 1)
        if mask_BL is None or mask_BS is None:  # what is carried is right-aligned, so the whole is
            tensors = {"k": k_BGSK[:, :, first:], "v": v_BGSV[:, :, first:]}
            if mask_BS is not None:
                tensors["mask"] = mask_BS[:, first:]
        else:
            order = right_align(mask_BS)[:, first:]
            tensors = {"k": take(k_BGSK, order, 2), "v": take(v_BGSV, order, 2), "mask": mask_BS.gather(1, order)}
        if (
            not torch.compiler.is_exporting() and 2 * self.keep + 16 < S
        ):  # do not hold a long prompt in memory for the sake of its end
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        if self.config.sinks:
            tensors["sink_k"] = self._sinks(state["sink_k"], k_BGLK, mask_BS, inputs)
            tensors["sink_v"] = self._sinks(state["sink_v"], v_BGLV, mask_BS, inputs)
        return Joined(k_BGSK, v_BGSV, mask_BS, tensors)

    def _sinks(self, old_BGNX: Tensor, new_BGLX: Tensor, mask_BS: Tensor | None, inputs: Inputs) -> Tensor:
        """The first tokens of each row's sequence, as far as they have come."""
        N, L = self.config.sinks, new_BGLX.shape[2]
        if mask_BS is None:
            start = inputs.start
            end = min(start + L, N)
            if start >= N:
                return old_BGNX
            return torch.cat([old_BGNX[:, :, :start], new_BGLX[:, :, : end - start], old_BGNX[:, :, end:]], 2)
        place_N1 = torch.arange(N, device=new_BGLX.device)[:, None]
        here_BNL = (inputs.positions_BL[:, None] == place_N1) & mask_BS[:, None, -L:]  # type: ignore[index]
        found_BNL, index_BN = here_BNL.to(torch.uint8).max(-1)
        return torch.where(found_BNL.bool()[:, None, :, None], take(new_BGLX, index_BN, 2), old_BGNX)

    def attend(self, q_BHLK: Tensor, joined: Joined, inputs: Inputs) -> Tensor:
        """Attention of the new queries over the window and the sinks."""
        c, tensors = self.config, joined.tensors
        if q_BHLK.shape[2] == 1:
            return self._attend_one(q_BHLK, joined, inputs)
        positions_BL, L = inputs.positions_BL, q_BHLK.shape[2]
        if positions_BL is None and c.sinks:
            positions_BL = torch.arange(inputs.start, inputs.start + L, device=q_BHLK.device).expand(q_BHLK.shape[0], L)
        return ops.window_attention(
            q_BHLK,
            joined.k_BGSK,
            joined.v_BGSV,
            window=c.window,
            sink_kv=(tensors["sink_k"], tensors["sink_v"]) if c.sinks else None,
            positions_BL=positions_BL,
            scale=c.softmax_scale,
            mask_BS=joined.mask_BS,
        )

    def _attend_one(self, q_BH1K: Tensor, joined: Joined, inputs: Inputs) -> Tensor:
        """One query: the window and the sinks beside each other are all its keys."""
        c, tensors, mask_BS = self.config, joined.tensors, joined.mask_BS
        first = torch.sym_max(joined.k_BGSK.shape[2] - c.window, 0)
        k, v = joined.k_BGSK[:, :, first:], joined.v_BGSV[:, :, first:]
        if c.sinks and mask_BS is None:
            outside = min(max(inputs.start - c.window + 1, 0), c.sinks)
            if outside:
                k = torch.cat([tensors["sink_k"][:, :, :outside], k], 2)
                v = torch.cat([tensors["sink_v"][:, :, :outside], v], 2)
        elif mask_BS is not None:
            mask_BS = mask_BS[:, first:]
            if c.sinks:
                sinks_N = torch.arange(c.sinks, device=k.device)
                outside_BN = inputs.positions_BL - sinks_N >= c.window  # type: ignore[operator]
                mask_BS = torch.cat([outside_BN, mask_BS], 1)
                k, v = torch.cat([tensors["sink_k"], k], 2), torch.cat([tensors["sink_v"], v], 2)
        return ops.attention(q_BH1K, k, v, scale=c.softmax_scale, mask_BS=mask_BS)

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        c = self.config
        sizes = {"k": (0, c.head_dim), "v": (0, c.value_dim)}
        if c.sinks:
            sizes |= {"sink_k": (c.sinks, c.head_dim), "sink_v": (c.sinks, c.value_dim)}
        return {
            name: torch.zeros(batch_size, c.kv_heads, *size, device=device, dtype=dtype) for name, size in sizes.items()
        }
