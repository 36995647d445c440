"""Rotary positions: queries and keys turned by an angle that grows with their position.

Pair i of a head at position p is rotated by `p * theta ** (-2i / dim)` (Su et al. 2021, arXiv:2104.09864), so that a
product of query and key depends on their distance. The scalings stretch this to longer texts: linear (Chen et al.
2023, arXiv:2306.15595), dynamic NTK, YaRN (Peng et al. 2023, arXiv:2309.00071), LongRoPE (Ding et al. 2024,
arXiv:2402.13753) and that of Llama 3.1. Their parameters have the names that transformers gives them, and the tables
agree with those of transformers bit for bit where the arithmetic is the same.

Two scalings depend on the length of the text. "dynamic" and "longrope" take it, as transformers does, from the
largest position of the call, over the whole batch. So keys that were cached while the text was short keep their old
angles, splitting a text differently changes the result once it is longer than the original length, and rows of
different length in a batch influence each other; that is how these models run everywhere. One thing is not followed:
after a long text, transformers goes on with its "dynamic" frequencies for shorter ones (down to the original length)
until the module sees one within the original length. Here each call stands for itself.

Shapes: B batch, L positions, H heads, K head size, P = rotated part of a head (`dim`), F = P / 2 frequencies.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from zoo.errors import ConfigError, did_you_mean

_Factor = Annotated[float, Field(ge=1.0, le=1e6, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0.0, le=1e6, allow_inf_nan=False)]
_Length = Annotated[int, Field(ge=1, le=1 << 30)]
_Factors = Annotated[
    tuple[_Positive, ...],
    Field(min_length=1, max_length=4096),
    BeforeValidator(lambda x: tuple(x) if isinstance(x, list) else x),
]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LinearScaling(_Strict):
    """Positions divided by `factor`."""

    rope_type: Literal["linear"] = "linear"
    factor: _Factor


class DynamicScaling(_Strict):
    """NTK-aware base that grows once the text is longer than the original length."""

    rope_type: Literal["dynamic"] = "dynamic"
    factor: _Factor
    original_max_position_embeddings: _Length


class YarnScaling(_Strict):
    """Slow pairs interpolated, fast ones left, a ramp between; scores sharpened by `attention_factor`."""

    rope_type: Literal["yarn"] = "yarn"
    factor: _Factor
    original_max_position_embeddings: _Length
    attention_factor: _Positive | None = None
    beta_fast: _Positive = 32.0
    beta_slow: _Positive = 1.0
    mscale: float | None = Field(default=None, ge=0.0, le=1e6)
    mscale_all_dim: float | None = Field(default=None, ge=0.0, le=1e6)
    truncate: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> YarnScaling:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast ({self.beta_fast}) must not be below beta_slow ({self.beta_slow})")
        return self


class Llama3Scaling(_Strict):
    """Long wavelengths stretched by `factor`, short ones left, those between blended (Llama 3.1)."""

    rope_type: Literal["llama3"] = "llama3"
    factor: _Factor
    low_freq_factor: _Positive
    high_freq_factor: _Positive
    original_max_position_embeddings: _Length

    @model_validator(mode="after")
    def _ordered(self) -> Llama3Scaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor ({self.low_freq_factor})"
            )
        return self


class LongRopeScaling(_Strict):
    """A factor for each pair: `short_factor` up to the original length, `long_factor` beyond."""

    rope_type: Literal["longrope"] = "longrope"
    short_factor: _Factors
    long_factor: _Factors
    factor: _Factor
    original_max_position_embeddings: _Length
    attention_factor: _Positive | None = None

    @model_validator(mode="after")
    def _same_length(self) -> LongRopeScaling:
        if len(self.short_factor) != len(self.long_factor):
            raise ValueError(
                f"short_factor has {len(self.short_factor)} entries, long_factor {len(self.long_factor)}; "
                "both need one for each rotated pair"
            )
        return self


Scaling = Annotated[
    LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling | LongRopeScaling, Field(discriminator="rope_type")
]
_SCALINGS: dict[str, type[_Strict]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
    "longrope": LongRopeScaling,
}


class RotaryConfig(_Strict):
    """How a mixer turns its queries and keys.

    theta: base of the wavelengths. dim: size of the rotated part of each head, from its start; None is the whole
    head. scaling: None, or one of the scalings above, chosen by its `rope_type`. interleaved: pairs are neighbours
    (GPT-J) rather than halves of the rotated part (Llama, GPT-NeoX).
    """

    theta: Annotated[float, Field(gt=1.0, le=1e12, allow_inf_nan=False)] = 10000.0
    dim: Annotated[int, Field(ge=2, le=1 << 16, multiple_of=2)] | None = None
    scaling: Scaling | None = None
    interleaved: bool = False

    @model_validator(mode="after")
    def _fits(self) -> RotaryConfig:
        if isinstance(self.scaling, DynamicScaling) and self.dim == 2:
            raise ValueError("dynamic scaling needs more than one rotated pair; dim is 2")
        return self

    @classmethod
    def from_transformers(cls, config: Any, head_dim: int, interleaved: bool = False) -> RotaryConfig:
        """From a transformers config with `rope_parameters`, for heads of size `head_dim`.

        Raises ConfigError for a `rope_type` that is not known here, pydantic's ValidationError for bad values.
        """
        parameters = {key: value for key, value in (config.rope_parameters or {}).items() if value is not None}
        rope_type = parameters.pop("rope_type", parameters.pop("type", "default"))
        parameters.pop("type", None)
        theta = float(parameters.pop("rope_theta", None) or getattr(config, "rope_theta", None) or 10000.0)
        part = parameters.pop("partial_rotary_factor", None) or getattr(config, "partial_rotary_factor", None) or 1.0
        dim = int(head_dim * part)
        scaling: Any = None
        if rope_type != "default":
            if rope_type not in _SCALINGS:
                raise ConfigError(f"unknown rope_type {rope_type!r}{did_you_mean(rope_type, [*_SCALINGS, 'default'])}")
            scaling = _SCALINGS[rope_type](**_filled(rope_type, parameters, config))
        return cls(theta=theta, dim=None if dim == head_dim else dim, scaling=scaling, interleaved=interleaved)

    def to_transformers(self, head_dim: int) -> dict[str, Any]:
        """The `rope_parameters` of a transformers config, for heads of size `head_dim`; inverse of `from_transformers`.

        "dynamic" is measured against the config's `max_position_embeddings`, which must be the original length.
        """
        found: dict[str, Any] = {"rope_type": "default", "rope_theta": self.theta}
        if self.dim is not None and self.dim != head_dim:
            found["partial_rotary_factor"] = self.dim / head_dim
        if self.scaling is not None:
            found |= self.scaling.model_dump(mode="json", exclude_none=True)
        if isinstance(self.scaling, DynamicScaling):
            del found["original_max_position_embeddings"]
        return found


def _filled(rope_type: str, parameters: dict[str, Any], config: Any) -> dict[str, Any]:
    """The parameters of a scaling, with what transformers takes from elsewhere in a model's config."""
    filled = {key: value for key, value in parameters.items() if key in _SCALINGS[rope_type].model_fields}
    longest = config.max_position_embeddings
    if rope_type == "dynamic":  # transformers always measures against this one
        filled["original_max_position_embeddings"] = longest
    elif rope_type != "linear":
        filled.setdefault("original_max_position_embeddings", longest)
        # DeepSeek-V3 and Phi-3 give the two lengths and no factor.
        filled.setdefault("factor", longest / filled["original_max_position_embeddings"])
    return filled


def rotary_tables(config: RotaryConfig, head_dim: int, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for `apply_rotary`: float32, (B, L, P).

    positions_BL: integer positions of any shape (..., L). The sine of the first partner of each pair carries a minus,
    so that turning is one product and one fused multiply-add.

    Raises ConfigError where the rotated part does not fit the head.
    """
    dim = head_dim if config.dim is None else config.dim
    if dim > head_dim or dim % 2:
        raise ConfigError(f"rotary dim is {dim}, but must be even and at most the head size {head_dim}")
    frequencies_F, sharpness = _frequencies(config, dim, positions_BL)
    angles = positions_BL.unsqueeze(-1).float() * frequencies_F
    cos, sin = angles.cos(), angles.sin()
    if sharpness != 1.0:
        cos, sin = cos * sharpness, sin * sharpness
    if config.interleaved:
        return torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotary_factors(config: RotaryConfig, head_dim: int) -> Tensor:
    """What a scaling divides the angle of each pair by at positions within the original length: (P / 2,), float32."""
    dim, start = config.dim or head_dim, torch.zeros(1, dtype=torch.long)
    plain_F, _ = _frequencies(config.model_copy(update={"scaling": None}), dim, start)
    return plain_F / _frequencies(config, dim, start)[0]


def apply_rotary(x_BHLK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first P channels of every head by the tables of `rotary_tables`; the rest passes. Keeps the dtype."""
    dim = cos.shape[-1]
    # In the precision of the input, as transformers does.
    cos, sin = cos.to(x_BHLK.dtype).unsqueeze(-3), sin.to(x_BHLK.dtype).unsqueeze(-3)
    x = x_BHLK if dim == x_BHLK.shape[-1] else x_BHLK[..., :dim]
    # Each channel's partner: its neighbour, or the one half of the rotated part away.
    partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(dim // 2, -1)
    turned = torch.addcmul(x * cos, partner, sin)
    return turned if dim == x_BHLK.shape[-1] else torch.cat([turned, x_BHLK[..., dim:]], -1)


def _frequencies(config: RotaryConfig, dim: int, positions: Tensor) -> tuple[Tensor, float]:
    """Angle per position of each pair, (F,) float32, and the factor on the tables."""
    scaling, device = config.scaling, positions.device
    # float32 in this order of operations, for it decides the last digits of angles at large positions.
    exponents_F = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    if isinstance(scaling, DynamicScaling):
        length = scaling.original_max_position_embeddings
        seen = (positions.max() + 1).clamp(min=length)
        base = config.theta * ((scaling.factor * seen / length) - (scaling.factor - 1)) ** (dim / (dim - 2))
        return 1.0 / base**exponents_F, 1.0
    slowed_F = config.theta**exponents_F
    if isinstance(scaling, LinearScaling):
        return (1.0 / slowed_F) / scaling.factor, 1.0
    if isinstance(scaling, YarnScaling):
        return _yarn(scaling, config.theta, dim, slowed_F)
    if isinstance(scaling, Llama3Scaling):
        return _llama3(scaling, 1.0 / slowed_F), 1.0
    if isinstance(scaling, LongRopeScaling):
        return _longrope(scaling, dim, slowed_F, positions)
    return 1.0 / slowed_F, 1.0


def _llama3(scaling: Llama3Scaling, plain_F: Tensor) -> Tensor:
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength_F = 2 * math.pi / plain_F
    stretched_F = plain_F / scaling.factor
    share_F = (length / wavelength_F - low) / (high - low)  # of the plain frequency in those between
    blended_F = (1 - share_F) * stretched_F + share_F * plain_F
    slow_or_between = torch.where(wavelength_F > length / low, stretched_F, blended_F)
    return torch.where(wavelength_F < length / high, plain_F, slow_or_between)


def _yarn(scaling: YarnScaling, theta: float, dim: int, slowed_F: Tensor) -> tuple[Tensor, float]:
    length = scaling.original_max_position_embeddings

    def pair_of(turns: float) -> float:
        """The (fractional) pair that makes so many full turns within the original length."""
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    pairs_F = torch.arange(dim // 2, dtype=torch.float32, device=slowed_F.device)
    plain_share_F = 1 - ((pairs_F - low) / width).clamp(0, 1)
    frequencies_F = 1.0 / (scaling.factor * slowed_F) * (1 - plain_share_F) + 1.0 / slowed_F * plain_share_F

    def sharpness(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return frequencies_F, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return frequencies_F, sharpness(scaling.mscale) / sharpness(scaling.mscale_all_dim)
    return frequencies_F, sharpness(1.0)


def _longrope(scaling: LongRopeScaling, dim: int, slowed_F: Tensor, positions: Tensor) -> tuple[Tensor, float]:
    if len(scaling.short_factor) != dim // 2:
        raise ConfigError(f"longrope has {len(scaling.short_factor)} factors, but {dim // 2} pairs are rotated")
    short_F = torch.tensor(scaling.short_factor, dtype=torch.float32, device=positions.device)
    long_F = torch.tensor(scaling.long_factor, dtype=torch.float32, device=positions.device)
    length = scaling.original_max_position_embeddings
    factors_F = torch.where(positions.max() + 1 > length, long_F, short_F)
    sharpness = scaling.attention_factor
    if sharpness is None:
        sharpness = 1.0 if scaling.factor <= 1 else math.sqrt(1 + math.log(scaling.factor) / math.log(length))
    return 1.0 / (factors_F * slowed_F), sharpness
