"""Performer: softmax attention through positive orthogonal random features, FAVOR+ (Choromanski et al. 2021, ICLR,
arXiv 2009.14794).

    y_t = sum_s (phi(q_t) . phi(k_s)) v_s  /  sum_s phi(q_t) . phi(k_s)

    softmax kernel   phi(x)_j = exp(w_j . x - |x|^2 / 2),   E_w[phi(q) . phi(k)] = exp(q . k)      (lemma 1)
    ReLU kernel      phi(x)_j = relu(w_j . x) + eps                                                (section 2.2)

with q and k multiplied by scale ** 1/2, and w_1 .. w_M Gaussian vectors made orthogonal in blocks of K (section 2.4).
The w are a buffer, shared by the heads. They can be drawn again: `redraw()`, or `redraw_every` training steps.

What keeps the exponentials in range has to leave the output as it is. A query's own largest feature always cancels.
For keys there are two answers:

- Two-sided: the largest key projection of the sequence. The authors' code then adds `eps` to every feature (1e-4),
  which is a little uniform attention; `eps: 0` is the paper's formula.
- Causal: a maximum over all keys would tell early positions about late ones, as soon as an eps is added to it. Here it
  is the running maximum m_t of online softmax, carried in the state: what was summed before is multiplied by
  exp(m_(t-1) - m_t), a scalar decay of the one recurrence. It cancels exactly, so a split changes nothing; no eps then.
  (A query whose features lie more than exp(69) below those of all its keys reads 0.)

The state is a matrix (M, V), a vector (M) and m per key/value head. Conversion copies the projections: the features
estimate softmax attention without bias, so the start is as close as M allows; the variance grows as exp(|q + k|^2).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.mixers.base import AttentionWeights, Traits
from zoo.mixers.qkv import Inputs, QKVOptions
from zoo.mixers.recurrent import RecurrentMixer, two_sided
from zoo.ops.backends import no_autocast
from zoo.ops.padding import segment_runs
from zoo.ops.random_features import LEAST, LOWEST, random_feature_attention
from zoo.registry import register_mixer

DEFAULT_EPS = {"softmax": 1e-4, "relu": 1e-3}  # those of the authors' code


class PerformerConfig(QKVOptions):
    """Options of `performer`.

    num_features: M; None is K ln K, the number of the paper's theorem 4 and of its code.
    kernel: the positive features of softmax, or generalised attention with ReLU.
    eps: added to every feature. None: 1e-4 (softmax, two-sided), 0 (softmax, causal; must be), 1e-3 (ReLU).
    row_norms: w_j as long as Gaussian vectors are ("random", unbiased) or all sqrt(K) ("fixed", less variance).
    redraw_every: training steps after which the w are drawn again; None keeps them.
    """

    name: Literal["performer"] = "performer"
    num_features: int | None = Field(None, ge=1, le=1 << 16)
    kernel: Literal["softmax", "relu"] = "softmax"
    eps: float | None = Field(None, ge=0, le=1)
    row_norms: Literal["random", "fixed"] = "random"
    redraw_every: int | None = Field(None, ge=1, le=1 << 31)

    @model_validator(mode="after")
    def _eps_can_be(self) -> PerformerConfig:
        if self.eps and self.causal and self.kernel == "softmax":
            raise ValueError(f"eps ({self.eps}) would let early positions see late keys in causal softmax; use 0")
        return self

    @property
    def features(self) -> int:
        """M."""
        return self.num_features or max(1, int(self.head_dim * math.log(self.head_dim)))

    @property
    def feature_eps(self) -> float:
        """What is added to every feature."""
        if self.causal and self.kernel == "softmax":
            return 0.0
        return DEFAULT_EPS[self.kernel] if self.eps is None else self.eps


@register_mixer("performer")
class Performer(RecurrentMixer):
    """FAVOR+ attention; see the module docstring."""

    Config = PerformerConfig
    traits = Traits(causal=True, bidirectional=True, state="constant")
    config: PerformerConfig
    keep_float32 = ("projection_MK",)
    averages_values = True
    normalizer = True
    projection_MK: Tensor
    steps: Tensor

    def __init__(self, config: PerformerConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        self.register_buffer("projection_MK", self._draw())
        if config.redraw_every is not None:
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def state_key_dim(self) -> int:
        return self.config.features

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        self._count_step()
        if not c.causal and inputs.segments_BL is None:
            return random_feature_attention(
                q_BHLK, k_BGLK, v_BGLV, self.projection_MK,
                kernel=c.kernel, scale=c.softmax_scale, eps=c.feature_eps, mask_BL=inputs.mask_BL,
            ), {}  # fmt: skip
        with no_autocast(q_BHLK):
            if c.kernel == "relu":
                q, k = (self._project(x)[0].relu() + c.feature_eps for x in (q_BHLK, k_BGLK))
                return self._sum(q, k, v_BGLV, None, inputs)
            q_dash, q_half = self._project(q_BHLK)
            k_dash, k_half = self._project(k_BGLK)
            if c.feature_eps:  # the stabilisers do not cancel exactly, so their gradient counts
                q = (q_dash - q_half - q_dash.amax(-1, keepdim=True)).exp() + c.feature_eps
                k = _exp(k_dash - k_half, _sequence_max(k_dash, inputs), inputs.mask_BL) + c.feature_eps
                return self._sum(q, k, v_BGLV, None, inputs)
            q = (q_dash - q_dash.amax(-1, keepdim=True).detach()).exp()
            k_log = k_dash - k_half
            log_decay, tensors = None, {}
            if inputs.segments_BL is None:
                peak, log_decay = _running_max(k_log, inputs)
                tensors = {} if inputs.state is None else {"peak": peak[:, :, -1]}
            else:
                peak = _sequence_max(k_log.detach(), inputs)
            y_BHLV, carried = self._sum(q, _exp(k_log, peak, inputs.mask_BL), v_BGLV, log_decay, inputs)
            return y_BHLV, {**carried, **tensors}

    def _project(self, x_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """w_j . x for every feature, and |x|^2 / 2, of x times scale ** 1/2 and in at least float32."""
        x = x_BHLK.to(torch.promote_types(x_BHLK.dtype, torch.float32)) * self.config.softmax_scale**0.5
        return x @ self.projection_MK.to(x.dtype).mT, x.square().sum(-1, keepdim=True) / 2

    def _sum(
        self, q_BHLM: Tensor, k_BGLM: Tensor, v_BGLV: Tensor, log_decay_BGL: Tensor | None, inputs: Inputs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted mean of the values, over the past or over a packed sequence."""
        mask_BL, state, V = inputs.mask_BL, inputs.state, v_BGLV.shape[-1]
        if self.config.causal:
            y_BHLV, final = ops.linear_recurrence(
                q_BHLM, k_BGLM, v_BGLV, log_decay_BGL, normalize=True, eps=LEAST,
                initial=None if state is None else state["kv"], final=state is not None,
                mask_BL=mask_BL, segments_BL=inputs.segments_BL,
            )  # fmt: skip
            return y_BHLV, {} if final is None else {"kv": final}
        value = nn.functional.pad(v_BGLV, (0, 1), value=1.0).to(q_BHLM.dtype)  # the last column sums the weights
        y = two_sided(q_BHLM, k_BGLM, value, inputs)
        return (y[..., :V] / y[..., V:].clamp(min=LEAST)).to(v_BGLV.dtype), {}

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = super().mix_state(batch_size, device, dtype)
        if self.config.kernel == "softmax":
            tensors["peak"] = torch.full_like(tensors["kv"][:, :, 0, 0], LOWEST)
        return tensors

    def _draw(self) -> Tensor:
        return orthogonal_features(self.config.features, self.config.head_dim, self.config.row_norms)

    @torch.no_grad()
    def redraw(self) -> None:
        """New random features. A state from before the draw does not fit them."""
        self.projection_MK.copy_(self._draw())

    def _count_step(self) -> None:
        """Draw again when it is time. What activation checkpointing computes a second time is not a step."""
        if self.config.redraw_every is None or not self.training or torch._C._current_graph_task_id() != -1:
            return
        if int(self.steps) >= self.config.redraw_every:
            self.redraw()
            self.steps.zero_()
        self.steps += 1

    def reset_parameters(self, std: float) -> None:
        """Fresh features; the rest are plain projections."""
        init.copy_(self.projection_MK, self._draw())
        if self.config.redraw_every is not None:
            init.zeros_(self.steps)

    @classmethod
    def conversion_defaults(cls, attention: AttentionWeights) -> dict[str, Any]:
        """The paper's formula without eps, and four features for each of the head's numbers."""
        return {"eps": 0.0, "num_features": 4 * attention.head_dim}


def orthogonal_features(count: int, size: int, row_norms: str = "random") -> Tensor:
    """`count` vectors (count, size), orthogonal in blocks of `size`, each uniformly distributed in direction.

    Their lengths are those of independent Gaussian vectors ("random"), or sqrt(size) ("fixed"). Directions are the
    rows of Q of a Gaussian matrix, with the signs that make Q uniform (Mezzadri 2007, arXiv math-ph/0609050).
    """
    blocks, triangle = torch.linalg.qr(torch.randn(-(-count // size), size, size))
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    directions = (blocks * signs).mT.reshape(-1, size)[:count]
    lengths = torch.randn(count, size).norm(dim=1) if row_norms == "random" else torch.full((count,), size**0.5)
    return directions * lengths[:, None]


def _exp(log_BGLM: Tensor, peak: Tensor, mask_BL: Tensor | None) -> Tensor:
    """exp(log - peak); 1 at masked positions, whose difference may be anything."""
    shifted = log_BGLM - peak[..., None]
    return (shifted if mask_BL is None else shifted.masked_fill(~mask_BL[:, None, :, None], 0)).exp()


def _running_max(log_BGLM: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """m_t = max over s <= t and all features, from the carried one on, and m_(t-1) - m_t: both (B, G, L)."""
    top_BGL = log_BGLM.detach().amax(-1)
    if inputs.mask_BL is not None:
        top_BGL = top_BGL.masked_fill(~inputs.mask_BL[:, None], LOWEST)
    before_BG1 = torch.full_like(top_BGL[:, :, :1], LOWEST)
    if inputs.state is not None:
        before_BG1 = inputs.state["peak"].to(top_BGL.dtype)[:, :, None]
    peak = torch.cat([before_BG1, top_BGL], -1).cummax(-1).values
    return peak[:, :, 1:], peak[:, :, :-1] - peak[:, :, 1:]


def _sequence_max(log_BGLM: Tensor, inputs: Inputs) -> Tensor:
    """The largest value in each position's own packed sequence, over all features: (B, G, L)."""
    assert inputs.segments_BL is not None
    top_BGL = log_BGLM.amax(-1)
    if inputs.mask_BL is not None:
        top_BGL = top_BGL.masked_fill(~inputs.mask_BL[:, None], LOWEST)
    runs_BGL = segment_runs(inputs.segments_BL, inputs.mask_BL)[:, None].expand_as(top_BGL)
    lowest = torch.full_like(top_BGL, LOWEST)
    return lowest.scatter_reduce(-1, runs_BGL, top_BGL, "amax").gather(-1, runs_BGL)
