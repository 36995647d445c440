"""Multi-head latent attention, MLA (DeepSeek-V2, 2024, arXiv 2405.04434; unchanged in DeepSeek-V3, arXiv 2412.19437).

    c_t = norm(W_dkv x_t)      k_t^h = [W_uk^h c_t ; r_t]      v_t^h = W_uv^h c_t        r_t = rotary(W_kr x_t)
    a_t = norm(W_dq x_t)       q_t^h = [W_uq^h a_t ; rotary(W_qr^h a_t)]
    y_t^h = sum_{s <= t} softmax_s(scale * q_t^h . k_s^h) v_s^h

Softmax attention whose keys and values are read out of one latent c of `kv_rank` numbers a token. Positions are kept
apart ("decoupled"): one rotary key r of `rope_dim` numbers, shared by all heads, since a rotation between W_uk and c
could not be moved to the query. The state is [c ; r]: kv_rank + rope_dim numbers a token, however many heads there are.

Two ways to the same result. Many new positions expand keys and values and attend as usual. Few new positions (decoding)
absorb the up-projections: q . W_uk c = (W_uk^T q) . c, and W_uv is applied to the weighted mean of latents, so that the
state is read as it is, as the one key/value head of multi-query attention. The cheaper way is taken.

With YaRN (`mscale_all_dim`) the scale grows by mscale^2, as in DeepSeek's code. `rotary=None` leaves r unturned (the
layers without positions of Kimi Linear, arXiv 2510.26692).

Conversion: truncated SVD of [W_k ; W_v] over all heads, and of W_q where `q_rank` is given (X-EcoMLA, Li et al. 2025,
arXiv 2503.11132), without norms on the latents. Full rank is exact where attention has no rotary positions, and with
them where it has one key/value head and all pairs stay rotary. Otherwise every n-th rotary pair is kept, which leaves
their angles what they were; its shared key is the mean over key/value heads, and the other pairs lose their positions.
A QK-norm becomes its weight and a constant.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from zoo import ops
from zoo.config import MixerOptions
from zoo.errors import ConversionError
from zoo.linear import Linear
from zoo.mixers.attention import append
from zoo.mixers.base import AttentionStats, AttentionWeights, State, Traits
from zoo.mixers.qkv import HeadNorm, Inputs, QKVMixer
from zoo.ops.rotary import LongRopeScaling, RotaryConfig, YarnScaling, apply_rotary, rotary_tables
from zoo.registry import register_mixer


class MLAConfig(MixerOptions):
    """Options of `mla`. Sizes in numbers a head; ranks are those of the latents.

    q_rank: None projects queries at once. nope_dim, rope_dim: parts of a head's queries and keys without and with
    positions. rotary: how the second part is turned; None not at all. bias: of the down-projections and W_kr; up_bias:
    of the up-projections (and of W_q without `q_rank`). window: a position sees itself and the `window - 1` before it.
    """

    name: Literal["mla"] = "mla"
    num_heads: int = Field(ge=1, le=1024)
    q_rank: int | None = Field(None, ge=1, le=1 << 16)
    kv_rank: int = Field(ge=1, le=1 << 16)
    nope_dim: int = Field(128, ge=0, le=4096)
    rope_dim: int = Field(64, ge=0, le=4096)
    value_head_dim: int = Field(128, ge=1, le=4096)
    rotary: RotaryConfig | None = None
    latent_norm: bool = True
    norm_eps: float = Field(1e-6, gt=0, le=1)
    bias: bool = False
    up_bias: bool = False
    out_bias: bool = False
    scale: float | None = Field(None, gt=0, le=1e4)  # None: (nope_dim + rope_dim) ** -0.5, times YaRN's mscale ** 2
    causal: bool = True
    window: int | None = Field(None, ge=1, le=1 << 27)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if not self.nope_dim + self.rope_dim:
            raise ValueError("nope_dim and rope_dim are both 0: queries and keys are empty")
        if self.rotary is not None and (self.rope_dim == 0 or self.rope_dim % 2 or self.rotary.dim is not None):
            raise ValueError(
                f"rotary turns the whole of rope_dim, in pairs: rope_dim ({self.rope_dim}) must be even and positive, "
                f"and rotary.dim ({self.rotary.dim}) left out"
            )
        return self

    @property
    def head_dim(self) -> int:
        """What rotary tables are made for: the rotary part of a head."""
        return self.rope_dim

    @property
    def softmax_scale(self) -> float:
        """What the product of query and key is multiplied with."""
        if self.scale is not None:
            return self.scale
        scale, scaling = (self.nope_dim + self.rope_dim) ** -0.5, self.rotary and self.rotary.scaling
        if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim and scaling.factor > 1:
            scale *= (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0) ** 2
        return scale


@register_mixer("mla")
class MultiHeadLatentAttention(QKVMixer):
    """Multi-head latent attention; see the module docstring."""

    Config = MLAConfig
    traits = Traits(causal=True, bidirectional=True, state="grows")
    config: MLAConfig  # type: ignore[assignment]

    def __init__(self, config: MLAConfig, width: int) -> None:
        super().__init__(config, width, own_projections=False)  # type: ignore[arg-type]
        c, query_size = config, config.num_heads * (config.nope_dim + config.rope_dim)
        if c.q_rank is None:
            self.q_proj = Linear(width, query_size, bias=c.up_bias)
        else:
            self.q_down = Linear(width, c.q_rank, bias=c.bias)
            self.q_up = Linear(c.q_rank, query_size, bias=c.up_bias)
        self.kv_down = Linear(width, c.kv_rank + c.rope_dim, bias=c.bias)
        self.kv_up = Linear(c.kv_rank, c.num_heads * (c.nope_dim + c.value_head_dim), bias=c.up_bias)
        if c.latent_norm:
            self.kv_norm = HeadNorm(c.kv_rank, eps=c.norm_eps)
            if c.q_rank is not None:
                self.q_norm = HeadNorm(c.q_rank, eps=c.norm_eps)
        self.o_proj = Linear(c.num_heads * c.value_head_dim, width, bias=c.out_bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Queries by head, [latent ; rotary key] as one head, and the latent alone, a view of it."""
        c, x_BLD = self.config, inputs.x_BLD
        if c.q_rank is None:
            q_BLE = self.q_proj(x_BLD)
        else:
            a_BLR = self.q_down(x_BLD)
            q_BLE = self.q_up(self.q_norm(a_BLR) if c.latent_norm else a_BLR)
        q_BHLK = q_BLE.unflatten(-1, (c.num_heads, -1)).transpose(1, 2)
        latent, rope = self.kv_down(x_BLD)[:, None].split([c.kv_rank, c.rope_dim], -1)
        latent = self.kv_norm(latent) if c.latent_norm else latent
        if c.rotary is not None:
            cos, sin = self._rotary_tables(inputs, q_BHLK.dtype)
            nope, turned = q_BHLK.split([c.nope_dim, c.rope_dim], -1)
            q_BHLK = torch.cat([nope, apply_rotary(turned, cos, sin, c.rotary.interleaved)], -1)
            rope = apply_rotary(rope, cos, sin, c.rotary.interleaved)
        joined = torch.cat([latent, rope.to(latent.dtype)], -1)
        return q_BHLK, joined, joined[..., : c.kv_rank], {}

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        joined, mask_BS, tensors = k_BGLK, inputs.mask_BL, {}
        if inputs.state is not None:
            tensors = _append(inputs.state, joined, inputs.mask_BL)
            S = inputs.state.length + joined.shape[2]
            joined = tensors["latent"][:, :, :S]
            mask_BS = tensors["mask"][:, :S] if "mask" in tensors else None
        options = {
            "causal": self.config.causal,
            "scale": self.config.softmax_scale,
            "mask_BS": mask_BS,
            "segments_BS": inputs.segments_BL,
            "window": self.config.window,
        }
        way = self._absorbed if self.absorbs(q_BHLK.shape[2], joined.shape[2]) else self._expanded
        return way(q_BHLK, joined, options), tensors

    def absorbs(self, L: int, S: int) -> bool:
        """Whether absorbed matrices cost fewer multiplications for L queries over S keys, and may be used at all.

        They are read behind their module, so an adapter or a hook on `kv_up` rules this way out.
        """
        if type(self.kv_up) is not Linear or self.kv_up._forward_hooks or self.kv_up._forward_pre_hooks:
            return False
        c = self.config
        sizes = c.nope_dim + c.value_head_dim
        expanded = S * c.kv_rank * sizes + L * S * (sizes + c.rope_dim)
        return L * c.kv_rank * sizes + L * S * (2 * c.kv_rank + c.rope_dim) < expanded

    def _expanded(self, q_BHLK: Tensor, joined: Tensor, options: dict[str, Any]) -> Tensor:
        """Keys and values of every head, and attention as usual."""
        c = self.config
        latent, rope = joined.split([c.kv_rank, c.rope_dim], -1)
        kv_BHSE = self.kv_up(latent[:, 0]).unflatten(-1, (c.num_heads, -1)).transpose(1, 2)
        nope, v_BHSV = kv_BHSE.split([c.nope_dim, c.value_head_dim], -1)
        k_BHSK = torch.cat([nope, rope.expand(-1, c.num_heads, -1, -1).to(nope.dtype)], -1)
        return ops.attention(q_BHLK, k_BHSK, v_BHSV, **options)

    def _absorbed(self, q_BHLK: Tensor, joined: Tensor, options: dict[str, Any]) -> Tensor:
        """Attention over the latents themselves, which are one key/value head for all query heads."""
        c = self.config
        up_HER = self.kv_up.weight.unflatten(0, (c.num_heads, -1)).to(q_BHLK.dtype)
        key_HNR, value_HVR = up_HER.split([c.nope_dim, c.value_head_dim], 1)
        nope, rope = q_BHLK.split([c.nope_dim, c.rope_dim], -1)
        q_BHLE = torch.cat([nope @ key_HNR, rope], -1)
        joined = joined.to(q_BHLE.dtype)
        y_BHLV = ops.attention(q_BHLE, joined, joined[..., : c.kv_rank], **options) @ value_HVR.mT
        if self.kv_up.bias is not None:  # that of the keys adds the same to all scores of a query: nothing
            y_BHLV = y_BHLV + self.kv_up.bias.unflatten(0, (c.num_heads, -1))[:, None, c.nope_dim :].to(y_BHLV.dtype)
        return y_BHLV

    def finish(self, y_BHLV: Tensor, x_BLD: Tensor) -> Tensor:
        """The output projection."""
        return self.o_proj(y_BHLV.transpose(1, 2).flatten(-2))

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        weight = self.o_proj.weight
        return State(self.mix_state(batch_size, device or weight.device, dtype or weight.dtype))

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        size = self.config.kv_rank + self.config.rope_dim
        return {"latent": torch.empty(batch_size, 1, 0, size, device=device, dtype=dtype)}

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """Small sizes for the tests of `zoo.testing`."""
        sizes = {"kv_rank": 10, "q_rank": 12, "nope_dim": 6, "rope_dim": 4, "value_head_dim": 7, "window": None}
        return {**sizes, "rotary": {"theta": 100.0, "interleaved": True}}

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        """`kv_rank` is a quarter of what keys and values took by default, `rope_dim` half of the rotary channels."""
        a, rope = attention, options.get("rope_dim")
        if rope is None:
            turned = 0 if a.rotary is None else (a.rotary.dim or a.head_dim)
            rope = turned if turned % 4 else turned // 2
        values: dict[str, Any] = {
            "num_heads": a.num_heads,
            "kv_rank": max(1, a.num_kv_heads * (a.head_dim + a.value_head_dim) // 4),
            "nope_dim": a.head_dim - rope,
            "rope_dim": rope,
            "value_head_dim": a.value_head_dim,
            "rotary": _thinned(a, rope) if rope else None,
            "latent_norm": False,
            "bias": a.k_bias is not None,
            "up_bias": any(b is not None for b in (a.q_bias, a.k_bias, a.v_bias)),
            "out_bias": a.o_bias is not None,
            "scale": a.scale,
            "causal": a.causal,
            "window": a.window,
        }
        return cls.Config.parse({"name": cls.name, **values, **options}, "mixer")

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        assert isinstance(config, MLAConfig)
        a, c = attention, config
        if (a.num_heads, a.head_dim, a.value_head_dim) != (c.num_heads, c.nope_dim + c.rope_dim, c.value_head_dim):
            raise ConversionError(
                f"mixer {cls.name!r} with {c.num_heads} heads of {c.nope_dim} + {c.rope_dim} and values of "
                f"{c.value_head_dim} cannot copy attention with {a.num_heads} heads of {a.head_dim} and values of "
                f"{a.value_head_dim}"
            )
        mixer = cls(config, a.q_HKD.shape[1])
        nope, rope = _channels(a, c.rope_dim)
        q_HKX = _with_norm(a, a.q_HKD, a.q_bias, 0)
        q_HKX[:, _unturned(a, nope if c.rotary is not None else nope + rope)] *= _sharpness(a) ** 2
        k_GKX, v_GVX = _with_norm(a, a.k_GKD, a.k_bias, 1), _heads(a.v_GVD, a.v_bias, a.num_kv_heads)
        mixer._set_queries(q_HKX[:, nope + rope].flatten(0, 1))
        mixer._set_latent(torch.cat([k_GKX[:, nope], v_GVX], 1), k_GKX[:, rope].mean(0))
        mixer.o_proj.weight.copy_(a.o_DHV)
        if a.o_bias is not None:
            mixer.o_proj.bias.copy_(a.o_bias)
        return mixer

    def _set_queries(self, q_EX: Tensor) -> None:
        """W_q from rows (H*K, D + 1), the last column being the bias; two factors where there is a rank."""
        linear = self.q_proj if self.config.q_rank is None else self.q_up
        if self.config.q_rank is None:
            linear.weight.copy_(q_EX[:, :-1])
        else:
            up_ER, down_RD = low_rank(q_EX[:, :-1], self.config.q_rank)
            linear.weight.copy_(up_ER)
            self.q_down.weight.copy_(down_RD)
            if self.q_down.bias is not None:
                self.q_down.bias.zero_()
        if linear.bias is not None:
            linear.bias.copy_(q_EX[:, -1])

    def _set_latent(self, kv_GEX: Tensor, rope_PX: Tensor) -> None:
        """W_dkv, W_uk, W_uv from [k without positions ; v] by key/value head, and W_kr; biases in the last column."""
        c = self.config
        G, E, _ = kv_GEX.shape
        up_GER, down_RD = low_rank(kv_GEX[..., :-1].flatten(0, 1), c.kv_rank)
        times = c.num_heads // G
        self.kv_up.weight.copy_(up_GER.unflatten(0, (G, E)).repeat_interleave(times, 0).flatten(0, 1))
        self.kv_down.weight.copy_(torch.cat([down_RD, rope_PX[:, :-1]]))
        if self.kv_up.bias is not None:
            self.kv_up.bias.copy_(kv_GEX[..., -1].repeat_interleave(times, 0).flatten())
        if self.kv_down.bias is not None:
            self.kv_down.bias.copy_(torch.cat([rope_PX.new_zeros(c.kv_rank), rope_PX[:, -1]]))


def low_rank(W_ED: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors (E, rank) and (rank, D) of a matrix; singular values are shared out by their roots."""
    U, s, Vh = torch.linalg.svd(W_ED.to(torch.promote_types(W_ED.dtype, torch.float32)), full_matrices=False)
    r, root = min(rank, len(s)), s[:rank].sqrt()
    up, down = U.new_zeros(U.shape[0], rank), U.new_zeros(rank, Vh.shape[1])
    up[:, :r], down[:r] = U[:, :r] * root, root[:, None] * Vh[:r]
    return up, down


def _append(state: State, joined: Tensor, mask_BL: Tensor | None) -> dict[str, Tensor]:
    """The latents of all positions so far: attention's growing buffers, with values of no width."""
    tensors = {name: t for name, t in state.tensors.items() if name == "mask"}
    tensors |= {"k": state["latent"], "v": state["latent"][..., :0]}
    out = append(State(tensors, state.length), joined, joined[..., :0], mask_BL)
    return {"latent": out["k"], **({"mask": out["mask"]} if "mask" in out else {})}


def _heads(weight_ED: Tensor, bias_E: Tensor | None, heads: int) -> Tensor:
    """(heads, K, D + 1) in at least float32, the bias (or 0) in the last column."""
    weight_ED = weight_ED.to(torch.promote_types(weight_ED.dtype, torch.float32))
    bias_E = weight_ED.new_zeros(len(weight_ED)) if bias_E is None else bias_E.to(weight_ED)
    return torch.cat([weight_ED, bias_E[:, None]], 1).unflatten(0, (heads, -1))


def _with_norm(a: AttentionWeights, weight_ED: Tensor, bias_E: Tensor | None, which: int) -> Tensor:
    """`_heads` of queries (which 0) or keys (1). A QK-norm is its weight over the size that inputs of unit variance
    give a head."""
    heads_NKX = _heads(weight_ED, bias_E, a.num_heads if which == 0 else a.num_kv_heads)
    if a.qk_norm is None:
        return heads_NKX
    rms_N11 = heads_NKX.square().sum(-1).mean(-1).sqrt()[:, None, None]
    return heads_NKX / rms_N11 * a.qk_norm[which].to(heads_NKX)[:, None]


def _channels(a: AttentionWeights, rope_dim: int) -> tuple[list[int], list[int]]:
    """The channels of a head that go without positions, and those that stay rotary: every n-th pair."""
    if not rope_dim or a.rotary is None:
        return list(range(a.head_dim - rope_dim)), list(range(a.head_dim - rope_dim, a.head_dim))
    turned = a.rotary.dim or a.head_dim
    pairs = range(0, turned // 2, turned // rope_dim)
    if a.rotary.interleaved:
        rope = [channel for i in pairs for channel in (2 * i, 2 * i + 1)]
    else:
        rope = [*pairs, *(i + turned // 2 for i in pairs)]
    return [i for i in range(a.head_dim) if i not in set(rope)], rope


def _thinned(a: AttentionWeights, rope_dim: int) -> RotaryConfig | None:
    """Rotary positions of every n-th pair: the same base over fewer channels makes the same angles."""
    if a.rotary is None:
        return None
    turned, scaling = a.rotary.dim or a.head_dim, a.rotary.scaling
    if rope_dim < 0 or rope_dim > turned or turned % rope_dim or rope_dim % 2:
        raise ConversionError(
            f"mixer 'mla': rope_dim {rope_dim} must be even and divide the {turned} rotary channels of attention"
        )
    if isinstance(scaling, LongRopeScaling):
        kept = slice(None, None, turned // rope_dim)
        factors = {"short_factor": scaling.short_factor[kept], "long_factor": scaling.long_factor[kept]}
        scaling = scaling.model_copy(update=factors)
    return RotaryConfig(theta=a.rotary.theta, scaling=scaling, interleaved=a.rotary.interleaved)


def _unturned(a: AttentionWeights, channels: list[int]) -> list[int]:
    """Those of the channels that attention turns."""
    turned = 0 if a.rotary is None else a.rotary.dim or a.head_dim
    return [i for i in channels if i < turned]


def _sharpness(a: AttentionWeights) -> float:
    """What a scaling multiplies rotary queries and keys with (YaRN, LongRoPE), wanted also where positions are lost."""
    if a.rotary is None:
        return 1.0
    return rotary_tables(a.rotary, a.head_dim, torch.zeros(1, 1, dtype=torch.long))[0].max().item()
