"""LSH attention of the Reformer (Kitaev et al. 2020, arXiv:2001.04451): softmax attention among similar positions.

    x_t = W_qk u_t                       one vector per position and head is query and key
    y_t = sum_s softmax_s(scale * x_t . k_s) v_s   over the s near t in sorted order,   k_s = x_s / rms(x_s)

The order is by hash bucket: the angle of x_s decides, by random rotations. Positions are sorted, cut into chunks, and a
chunk sees itself and the one before; `num_hashes` rounds are combined. A position sees itself only where it sees nobody
else. Time grows with L log L. See `zoo.ops.lsh`.

What a position sees depends on the whole sequence: later tokens shift the borders of chunks, in the causal form too.
So a split with the state carried gives the same, and no output depends on a later input, only up to `chunk` tokens,
where all see all (`traits.splits`). Beyond, a first piece is computed as training does it, and every later token as if
it came alone, by its bucket among those so far: what transformers does, and what generation needs. The state is the
keys, values and buckets of all positions.

Rotations are drawn from `seed`, the same for every call, so results can be repeated; transformers draws the same ones
for its `hash_seed`. With `redraw`, training draws new ones in every forward pass, as the published models were trained.

With `shared_qk: false`, which is not in the paper, keys have a projection of their own and are not normalised, a
position sees itself as any other, and q_t / |q_t| + k_t / |k_t| decides its bucket. So a conversion starts: every
projection is copied, up to `chunk` tokens it is attention itself, and beyond it misses what hashing misses.

With `shared_qk: true` a conversion cannot be exact, for attention has queries that differ from its keys. It starts from
the nearest shared projection: the score x_i^T M x_j of a head, M = W_q^T W_k, is replaced by the positive part of M's
symmetric half, the best approximation of rank K by a product of a vector with itself. Rotary positions do not commute
with that; there it starts from the mean of queries and keys.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import initialization as init

from zoo.config import MixerOptions
from zoo.errors import ConversionError
from zoo.mixers.attention import append
from zoo.mixers.base import AttentionWeights, Traits
from zoo.mixers.local_attention import refuse_later_chunks
from zoo.mixers.qkv import SILU_ONE, Inputs, QKVMixer, QKVOptions
from zoo.ops.decisions import decided
from zoo.ops.lsh import hash_buckets, lsh_attention, lsh_decode, unit_rms
from zoo.ops.rotary import apply_rotary
from zoo.ops.sequences import find_sequences
from zoo.registry import register_mixer


class LSHAttentionConfig(QKVOptions):
    """Options of `lsh_attention`.

    num_buckets: even; about 2 * length / chunk is the authors' advice. A list of even numbers hashes by digits.
    across_buckets: positions in one chunk see each other whatever their buckets, as in the published models.
    shared_qk: queries are keys, as in the paper; see the module docstring. qk_norm needs keys of their own.
    """

    name: Literal["lsh_attention"] = "lsh_attention"
    num_kv_heads: None = None  # type: ignore[assignment]  # each head sorts its own
    shared_qk: bool = True
    conv: None = None  # type: ignore[assignment]
    chunk: int = Field(64, ge=1, le=1 << 20)
    chunks_before: int = Field(1, ge=0, le=64)
    chunks_after: int = Field(0, ge=0, le=64)
    num_buckets: int | list[int] = 64
    num_hashes: int = Field(1, ge=1, le=64)
    across_buckets: bool = True
    seed: int = Field(0, ge=0, le=(1 << 31) - 1)
    redraw: bool = False

    @field_validator("num_buckets")
    @classmethod
    def _even(cls, value: int | list[int]) -> int | list[int]:
        sizes = value if isinstance(value, list) else [value]
        for size in sizes:
            if size < 2 or size % 2 or size > 1 << 20:
                raise ValueError(f"{size} must be an even number of buckets from 2 to {1 << 20}")
        if not 1 <= len(sizes) <= 8 or math.prod(sizes) > 1 << 30:
            raise ValueError(f"{sizes} must be one to eight numbers whose product is at most {1 << 30}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> LSHAttentionConfig:
        if self.shared_qk and self.qk_norm:
            raise ValueError("qk_norm needs shared_qk: false, for keys that are queries have a norm already")
        return refuse_later_chunks(self)

    @property
    def bucket_sizes(self) -> tuple[int, ...]:
        """The digits of a bucket's number."""
        return tuple(self.num_buckets) if isinstance(self.num_buckets, list) else (self.num_buckets,)


@register_mixer("lsh_attention")
class LSHAttention(QKVMixer):
    """LSH attention; see the module docstring. `q_proj` makes queries and, without a `k_proj`, the keys."""

    Config = LSHAttentionConfig
    traits = Traits(causal=True, bidirectional=True, state="grows", splits="within_chunk")
    keep_float32 = ("rotations_HKRM",)
    config: LSHAttentionConfig
    rotations_HKRM: Tensor

    def __init__(self, config: LSHAttentionConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        if own_projections and config.shared_qk:
            del self.k_proj
        shape = (config.num_heads, config.head_dim, config.num_hashes, sum(config.bucket_sizes) // 2)
        self.register_buffer("rotations_HKRM", torch.empty(shape, dtype=torch.float32), persistent=False)
        if not self.rotations_HKRM.is_meta:
            self.rotations_HKRM.copy_(self._draw())

    def _draw(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed)
        return torch.randn(self.rotations_HKRM.shape, generator=generator, dtype=torch.float32, device="cpu")

    def reset_parameters(self, std: float) -> None:
        """The rotations of the seed; the rest are plain projections."""
        if not self.rotations_HKRM.is_meta:
            init.copy_(self.rotations_HKRM, self._draw().to(self.rotations_HKRM.device))

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The shared vectors twice, or queries and keys, and the values, by head."""
        c, x_BLD = self.config, inputs.x_BLD
        if not c.shared_qk:
            return super().project(inputs)
        q_BHLK = self.q_proj(x_BLD).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        v_BHLV = self.v_proj(x_BLD).unflatten(-1, (-1, c.value_dim)).transpose(1, 2)
        if c.rotary is not None:
            cos, sin = self._rotary_tables(inputs, q_BHLK.dtype)
            q_BHLK = apply_rotary(q_BHLK, cos, sin, c.rotary.interleaved)
        return q_BHLK, q_BHLK, v_BHLV, {}

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        c, state = self.config, inputs.state
        rotations = self.rotations_HKRM
        if c.redraw and self.training and state is None:
            rotations = torch.randn_like(rotations)
        hashed_BHLK = q_BHLK if c.shared_qk else F.normalize(q_BHLK, dim=-1) + F.normalize(k_BGLK, dim=-1)
        buckets_BHLR = decided(lambda: hash_buckets(hashed_BHLK, rotations, c.bucket_sizes))
        parts = (q_BHLK, v_BGLV, buckets_BHLR) if c.shared_qk else (q_BHLK, v_BGLV, buckets_BHLR, k_BGLK)
        if state is None:
            return self._whole(parts, inputs), {}
        keys_BHLK = unit_rms(q_BHLK) if c.shared_qk else k_BGLK
        tensors = append(state, keys_BHLK, v_BGLV, inputs.mask_BL, {"buckets": buckets_BHLR.int()})
        if state.length == 0:
            return self._whole(parts, inputs), tensors
        S = state.length + q_BHLK.shape[2]
        k_BHSK, v_BHSV, buckets_BHSR = (tensors[name][:, :, :S] for name in ("k", "v", "buckets"))
        y_BHLV = lsh_decode(
            q_BHLK, k_BHSK, v_BHSV, buckets_BHSR, chunk=c.chunk, before=c.chunks_before, scale=c.softmax_scale,
            across_buckets=c.across_buckets, meets_itself=not c.shared_qk,
            mask_BS=tensors["mask"][:, :S] if "mask" in tensors else None,
        )  # fmt: skip
        return y_BHLV, tensors

    def _whole(self, parts: tuple[Tensor, ...], inputs: Inputs) -> Tensor:
        """Rows that are whole sequences, or hold them packed: queries, values, buckets and maybe keys."""
        c = self.config
        rows = find_sequences((inputs.x_BLD.shape[0], inputs.x_BLD.shape[1]), inputs.mask_BL, inputs.segments_BL)
        x, v, buckets, *keys = parts if rows is None else (rows.split_heads(y) for y in parts)
        y = lsh_attention(
            x, v, buckets, keys_BHLK=keys[0] if keys else None, chunk=c.chunk, before=c.chunks_before,
            after=c.chunks_after, causal=c.causal, scale=c.softmax_scale, across_buckets=c.across_buckets,
            length_B=None if rows is None else rows.length_R,
        )  # fmt: skip
        return y if rows is None else rows.join_heads(y)

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        c = self.config
        sizes = {"k": (c.head_dim, dtype), "v": (c.value_dim, dtype), "buckets": (c.num_hashes, torch.int32)}
        return {
            name: torch.empty(batch_size, c.num_heads, 0, size, device=device, dtype=kind)
            for name, (size, kind) in sizes.items()
        }

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """Chunks short enough that the laws meet many of them."""
        return {"num_kv_heads": None, "chunk": 16, "num_buckets": 8, "num_hashes": 2}

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        """Keys of their own unless `options` say otherwise; keys and values for each query head; four rounds."""
        defaults: dict[str, Any] = {"num_kv_heads": None, "shared_qk": False, "num_hashes": 4}
        if options.get("shared_qk"):
            defaults["qk_norm"] = False
        return super().config_from_attention(attention, **{**defaults, **options})

    @torch.no_grad()
    def copy_projections(self, attention: AttentionWeights) -> None:
        """All of them (grouped heads repeated), or W_v and W_o and the shared projection from W_q and W_k."""
        a, c = attention, self.config
        if not c.shared_qk:
            super().copy_projections(attention)
            return
        if (a.num_heads, a.head_dim, a.value_head_dim) != (c.num_heads, c.head_dim, c.value_dim):
            raise ConversionError(
                f"mixer {self.name!r} with {c.num_heads} heads of {c.head_dim} and values of {c.value_dim} cannot copy "
                f"attention with {a.num_heads} heads of {a.head_dim} and values of {a.value_head_dim}"
            )
        values = [a.v_GVD, torch.zeros(len(a.v_GVD)) if a.v_bias is None else a.v_bias]
        weight, bias = (a.per_query_head(x).flatten(0, 1) for x in values)
        self.v_proj.weight.copy_(weight)
        self.o_proj.weight.copy_(a.o_DHV)
        shared_HKE = shared_projection(a)
        self.q_proj.weight.copy_(shared_HKE[..., :-1].flatten(0, 1))
        if self.q_proj.bias is not None:
            self.v_proj.bias.copy_(bias)
            self.q_proj.bias.copy_(shared_HKE[..., -1].flatten())
        if self.o_proj.bias is not None:
            self.o_proj.bias.zero_() if a.o_bias is None else self.o_proj.bias.copy_(a.o_bias)
        if c.gate:
            self.g_proj.weight.zero_()
            if self.g_proj.bias is not None:
                self.g_proj.bias.fill_(SILU_ONE)


def shared_projection(attention: AttentionWeights) -> Tensor:
    """One projection per head in place of W_q and W_k: (H, K, D + 1), the last column the bias.

    Its scale makes the scores those of attention for inputs of mean square 1, keys having root mean square 1 here.
    """
    a = attention
    q_HKE, k_GKE = (
        torch.cat([w.float(), (w.new_zeros(len(w)) if b is None else b).float()[:, None]], 1).unflatten(0, (n, -1))
        for w, b, n in ((a.q_HKD, a.q_bias, a.num_heads), (a.k_GKD, a.k_bias, a.num_kv_heads))
    )
    k_HKE = k_GKE.repeat_interleave(a.num_heads // a.num_kv_heads, 0)
    if a.qk_norm is not None:
        q_HKE, k_HKE = (
            g.float()[:, None] * x / _typical_norm(x, a.head_dim)
            for g, x in zip(a.qk_norm, (q_HKE, k_HKE), strict=True)
        )
    if a.rotary is not None:
        balance = (k_HKE.norm(dim=(1, 2), keepdim=True) / q_HKE.norm(dim=(1, 2), keepdim=True)).sqrt()
        shared_HKE = (balance * q_HKE + k_HKE / balance) / 2
    else:
        # M lies in the span of the rows of W_q and W_k: 2 K dimensions instead of D.
        basis_HEJ, _ = torch.linalg.qr(torch.cat([q_HKE, k_HKE], 1).mT)
        m_HJJ = (q_HKE @ basis_HEJ).mT @ (k_HKE @ basis_HEJ)
        values_HJ, vectors_HJJ = torch.linalg.eigh((m_HJJ + m_HJJ.mT) / 2)
        # A row of zeros would have no gradient: what is not positive gets a ten-thousandth of the largest instead.
        scales_HJ = values_HJ.clamp(min=0).maximum(1e-4 * values_HJ[:, -1:].clamp(min=1e-6)).sqrt()
        rows_HJE = (basis_HEJ @ vectors_HJJ * scales_HJ[:, None]).mT[:, -a.head_dim :]
        shared_HKE = F.pad(rows_HJE, (0, 0, 0, a.head_dim - rows_HJE.shape[1]))
    return shared_HKE * _typical_norm(shared_HKE, a.head_dim)


def _typical_norm(x_HKE: Tensor, size: int) -> Tensor:
    """The root mean square of what a head projects inputs of mean square 1 to, (H, 1, 1)."""
    return (x_HKE.square().sum((1, 2), keepdim=True) / size).sqrt().clamp(min=1e-6)
