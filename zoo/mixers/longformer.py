"""Longformer's attention: a sliding window with gaps, and global tokens (Beltagy et al. 2020, arXiv 2004.05150).

    y_t = sum_s softmax_s(scale * q_t . k_s) v_s           over   s = t + m d, |m| < window,   and   s < global_tokens
    y_g = sum_s softmax_s(scale * q'_g . k'_s) v'_s        over all s, for g < global_tokens

d is the dilation, one for the layer or one per head. The first `global_tokens` tokens of each sequence (CLS) see all
and are seen by all; what they see is computed with projections q', k', v' of their own, which start as copies.
The causal form sees the past only. Its state is the last (window - 1) d keys and values and two pairs of those of the
global tokens. A window of w on both sides together, as the paper counts it, is window = w / 2 + 1 here.

Conversion is a copy, q', k', v' included; without gaps it is exact up to as many tokens as the window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.linear import Linear
from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs, QKVOptions
from zoo.mixers.sliding_window import Joined, SlidingWindow
from zoo.ops.dilated_window import dilated_window_attention
from zoo.ops.padding import right_align, segment_runs, take
from zoo.ops.rotary import apply_rotary, rotary_tables
from zoo.registry import register_mixer

Dilation = Annotated[int, Field(ge=1, le=1 << 16)]


class LongformerOptions(QKVOptions):
    """Options of `longformer`. `window` counts one side and the position itself; `dilation` may be a list of heads."""

    name: Literal["longformer"] = "longformer"
    window: int = Field(257, ge=1, le=1 << 24)
    dilation: Dilation | list[Dilation] = 1
    global_tokens: int = Field(1, ge=0, le=1024)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.dilation, list) and len(self.dilation) != self.num_heads:
            raise ValueError(f"dilation has {len(self.dilation)} numbers for num_heads ({self.num_heads})")
        if self.conv and self.global_tokens:
            raise ValueError("conv: the projections of global tokens have no convolution; use global_tokens: 0")
        return self

    @property
    def sinks(self) -> int:
        """Global tokens, as the sliding window calls tokens that stay visible."""
        return self.global_tokens

    @property
    def dilations(self) -> list[int]:
        """The dilation of every query head."""
        return self.dilation if isinstance(self.dilation, list) else [self.dilation] * self.num_heads


@register_mixer("longformer")
class Longformer(SlidingWindow):
    """A dilated window and global tokens with their own projections; see the module docstring."""

    Config = LongformerOptions  # type: ignore[assignment]
    traits = Traits(causal=True, bidirectional=True, state="window")
    config: LongformerOptions  # type: ignore[assignment]
    q_global_proj: nn.Linear
    k_global_proj: nn.Linear
    v_global_proj: nn.Linear

    def __init__(self, config: LongformerOptions, width: int) -> None:
        super().__init__(config, width)  # type: ignore[arg-type]
        c = config
        self.groups = {d: [h for h, other in enumerate(c.dilations) if other == d] for d in sorted(set(c.dilations))}
        self.keep = (c.window - 1) * max(self.groups)
        self.needs_positions = c.global_tokens > 0 or max(self.groups) > 1
        if c.global_tokens:
            sizes = (c.num_heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.value_dim)
            for letter, size in zip("qkv", sizes, strict=True):
                setattr(self, f"{letter}_global_proj", Linear(width, size, bias=c.qkv_bias))
            self.reset_parameters(0.02)

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """What the laws need beside the usual sizes."""
        return {"global_tokens": 2}

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        c, tensors = self.config, {}
        if inputs.state is None:
            y_BHLV = self._by_dilation(
                lambda d, q, k, v: dilated_window_attention(
                    q,
                    k,
                    v,
                    window=c.window,
                    dilation=d,
                    global_tokens=c.global_tokens,
                    causal=c.causal,
                    scale=c.softmax_scale,
                    mask_BS=inputs.mask_BL,
                    segments_BS=inputs.segments_BL,
                ),
                q_BHLK,
                (k_BGLK, v_BGLV),
            )
        else:
            joined = self.join(k_BGLK, v_BGLV, inputs)
            y_BHLV, tensors = self.attend(q_BHLK, joined, inputs), joined.tensors
        if c.global_tokens:
            y_BHLV, carried = self._answer_globals(y_BHLV, inputs)
            tensors = {**tensors, **carried}
        return y_BHLV, tensors

    def _by_dilation(self, attend: Callable[..., Tensor], q_BHLK: Tensor, kv: tuple[Tensor, ...]) -> Tensor:
        """`attend(dilation, q, *kv)` for the heads of each dilation, put together again."""
        if len(self.groups) == 1:
            return attend(*self.groups, q_BHLK, *kv)
        H, G, device = self.config.num_heads, self.config.kv_heads, q_BHLK.device
        parts, order = [], []
        for d, heads in self.groups.items():
            index_H = torch.tensor(heads, device=device)
            parts.append(attend(d, q_BHLK[:, index_H], *(x[:, index_H // (H // G)] for x in kv)))
            order += heads
        return torch.cat(parts, 1)[:, torch.tensor(order, device=device).argsort()]

    def attend(self, q_BHLK: Tensor, joined: Joined, inputs: Inputs) -> Tensor:
        """Attention of the new queries over the carried window, the new keys and the global tokens."""
        c, L, S = self.config, q_BHLK.shape[2], joined.k_BGSK.shape[2]
        if inputs.positions_BL is None:
            end = inputs.start + L
            positions_BS = torch.arange(end - S, end, device=q_BHLK.device)[None]
        elif joined.mask_BS is None:
            positions_BS = inputs.positions_BL[:, -1:] + torch.arange(1 - S, 1, device=q_BHLK.device)
        else:  # counted back from the last real token
            rank_BS = joined.mask_BS.long().cumsum(1)
            positions_BS = inputs.positions_BL[:, -1:] + rank_BS - rank_BS[:, -1:]
        kv: tuple[Tensor, ...] = (joined.k_BGSK, joined.v_BGSV)
        if c.global_tokens:
            kv += (joined.tensors["sink_k"], joined.tensors["sink_v"])
        step = self._step if L == 1 else self._chunk
        return self._by_dilation(lambda *parts: step(*parts, positions_BS, joined.mask_BS), q_BHLK, kv)

    def _chunk(self, dilation: int, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        *global_kv, positions_BS, mask_BS = rest
        return dilated_window_attention(
            q,
            k,
            v,
            window=self.config.window,
            dilation=dilation,
            global_tokens=self.config.global_tokens,
            global_kv=tuple(global_kv) if global_kv else None,  # type: ignore[arg-type]
            positions_BS=positions_BS,
            scale=self.config.softmax_scale,
            mask_BS=mask_BS,
        )

    def _step(self, dilation: int, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        """One query: every `dilation`-th key back from it, and the global tokens, which may be among those."""
        *global_kv, positions_BS, mask_BS = rest
        n, S = self.config.global_tokens, k.shape[2]
        first = max(S - 1 - (self.config.window - 1) * dilation, (S - 1) % dilation)
        k, v = k[:, :, first::dilation], v[:, :, first::dilation]
        places_BW = positions_BS[:, first::dilation].expand(q.shape[0], -1)
        visible = places_BW >= n
        if mask_BS is not None:
            visible = visible & mask_BS[:, first::dilation]
        if global_kv:
            k, v = torch.cat([global_kv[0], k], 2), torch.cat([global_kv[1], v], 2)
            past_BN = torch.arange(n, device=q.device) <= positions_BS[:, -1:]
            visible = torch.cat([past_BN.expand(q.shape[0], -1), visible], 1)
        # A padded query, or one at a global token, sees all: finite, and thrown away.
        y = ops.attention(q, k, v, scale=self.config.softmax_scale, mask_BS=self._or_all(visible), finite_padding=True)
        return y if mask_BS is None else y.masked_fill(~mask_BS[:, None, -1:, None], 0)

    @staticmethod
    def _or_all(visible_BS: Tensor) -> Tensor:
        """With the last key, the query's own: the op returns 0 where it is hidden, and where it counts it never is."""
        return torch.cat([visible_BS[:, :-1], torch.ones_like(visible_BS[:, -1:])], 1)

    def _answer_globals(self, y_BHLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Replace the outputs at global tokens by what their own projections see; and the state of these."""
        n, state, causal = self.config.global_tokens, inputs.state, self.config.causal
        B, _, L, _ = y_BHLV.shape
        old = {} if state is None else {name: state[name] for name in ("global_k", "global_v")}
        if inputs.positions_BL is None and inputs.start >= n:
            return y_BHLV, old
        device = y_BHLV.device
        positions_BL = inputs.positions_BL
        if positions_BL is None:
            positions_BL = torch.arange(inputs.start, inputs.start + L, device=device)[None]
        positions_BL = positions_BL.expand(B, L)
        is_global_BL = positions_BL < n if inputs.mask_BL is None else (positions_BL < n) & inputs.mask_BL
        if state is not None and not torch.compiler.is_compiling() and not bool(is_global_BL.any()):
            return y_BHLV, old
        M = min(n, L) if inputs.segments_BL is None else int(is_global_BL.sum(1).max())
        index_BM = right_align(~is_global_BL)[:, :M]
        valid_BM, places_BM = is_global_BL.gather(1, index_BM), positions_BL.gather(1, index_BM)
        x_BMD = take(inputs.x_BLD, index_BM, 1)
        q_BHMK = self._global_heads("q", x_BMD, places_BM)
        sources = (x_BMD, places_BM) if causal else (inputs.x_BLD, positions_BL)
        k, v = self._global_heads("k", *sources), self._global_heads("v", *sources)
        visible = self._seen_by_globals(inputs, index_BM, valid_BM, places_BM)
        if old:
            past_BN = torch.arange(n, device=device) < places_BM[:, :1]
            visible = torch.cat([past_BN[:, None].expand(-1, M, -1), visible], 2)
            new = {"global_k": k, "global_v": v}
            k, v = (torch.cat([old[name], new[name]], 2) for name in new)
            to_BM = torch.where(valid_BM, places_BM, n)
            old = {name: _scatter(old[name], to_BM, new[name]) for name in new}
        visible = visible | ~valid_BM[..., None]  # keeps the softmax of what is thrown away finite
        answer = F.scaled_dot_product_attention(
            q_BHMK,
            k.to(q_BHMK.dtype),
            v.to(q_BHMK.dtype),
            attn_mask=visible[:, None],
            scale=self.config.softmax_scale,
            enable_gqa=q_BHMK.shape[1] != k.shape[1],
        )
        return _scatter(y_BHLV, torch.where(valid_BM, index_BM, L), answer), old

    def _seen_by_globals(self, inputs: Inputs, index_BM: Tensor, valid_BM: Tensor, places_BM: Tensor) -> Tensor:
        """Which new keys each global token sees: all positions of its sequence, or earlier global tokens if causal."""
        B, L = inputs.x_BLD.shape[:2]
        causal, mask_BL = self.config.causal, inputs.mask_BL
        if causal:
            visible = valid_BM[:, None] & (places_BM[:, None] <= places_BM[..., None])
        elif mask_BL is None:
            visible = torch.ones(1, 1, L, dtype=torch.bool, device=index_BM.device).expand(B, index_BM.shape[1], -1)
        else:
            visible = mask_BL[:, None].expand(-1, index_BM.shape[1], -1)
        if inputs.segments_BL is not None:
            runs_BL = segment_runs(inputs.segments_BL, mask_BL)
            runs_BM = runs_BL.gather(1, index_BM)
            visible = visible & ((runs_BM if causal else runs_BL)[:, None] == runs_BM[..., None])
        return visible

    def _global_heads(self, letter: str, x_BLD: Tensor, positions_BL: Tensor) -> Tensor:
        """Queries, keys or values of the global tokens' own projections, normed and turned as the others are."""
        c = self.config
        heads = getattr(self, f"{letter}_global_proj")(x_BLD)
        heads = heads.unflatten(-1, (-1, c.value_dim if letter == "v" else c.head_dim)).transpose(1, 2)
        if letter == "v":
            return heads
        if c.qk_norm:
            heads = getattr(self, f"{letter}_norm")(heads)
        if c.rotary is not None:
            heads = apply_rotary(heads, *rotary_tables(c.rotary, c.head_dim, positions_BL), c.rotary.interleaved)
        return heads

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = super().mix_state(batch_size, device, dtype)
        if self.config.global_tokens:
            tensors |= {f"global_{n}": torch.zeros_like(tensors[f"sink_{n}"]) for n in "kv"}
        return tensors

    def reset_parameters(self, std: float) -> None:
        """The global projections start as copies of the local ones (section 3.1 of the paper)."""
        if self.config.global_tokens:
            for letter in "qkv":
                own, local = getattr(self, f"{letter}_global_proj"), getattr(self, f"{letter}_proj")
                init.copy_(own.weight, local.weight)
                if own.bias is not None:
                    init.copy_(own.bias, local.bias)

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        window = {} if attention.window is None else {"window": attention.window}
        return {"global_tokens": 4 if attention.causal else max(1, attention.special_tokens), **window}

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        self.reset_parameters(0.02)  # once more, now that the local projections are attention's


def _scatter(y_BHLV: Tensor, to_BM: Tensor, new_BHMV: Tensor) -> Tensor:
    """y with `new` written at the places `to` along dimension 2; a place behind the end is dropped."""
    index = to_BM[:, None, :, None].expand(-1, y_BHLV.shape[1], -1, y_BHLV.shape[3])
    return F.pad(y_BHLV, (0, 0, 0, 1)).scatter(2, index, new_BHMV.to(y_BHLV.dtype))[:, :, :-1]
