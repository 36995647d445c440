"""MobileBERT's layer (Sun et al. 2020, arXiv 2004.02984): attention and several feed-forwards within a bottleneck.

    a = N(W_a x),  r = N(W_r x)                                      from D channels to b = num_heads * head_dim
    h = N(r + W_o attention(W_q a, W_k a, W_v x))                    queries and keys share a bottleneck of their own
    h = N(h + W_2 act(W_1 h))                                        `feed_forwards` times
    y = W_y h                                                        from b channels back to D

N is a scale and a shift a channel (`no_norm`) or LayerNorm. The residuals of attention and feed-forwards run within the
bottleneck, so the layer is one mixer, in a `post_norm` block without a channel mixer: the block adds x and norms. With
`attention_input: residual` queries, keys and values all read r (the authors' smaller variant).

There is no causal form and no state. Conversion from attention with heads of the same sizes: W_a and (W_q, W_k) are the
best factors of rank b of its query and key maps, exact where their rank is at most b (as in BERT, where b = D); W_o is
the identity, W_y the output map, W_r and W_2 are zero. So what is new starts silent.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo import ops
from zoo.config import MixerOptions
from zoo.errors import ConversionError, TraitError
from zoo.ffn.mlp import MLP, MLPConfig
from zoo.linear import Linear, NoNorm
from zoo.mixers.base import AttentionStats, AttentionWeights, SequenceMixer, State, Traits
from zoo.registry import register_mixer


class MobileBertConfig(MixerOptions):
    """Options of `mobile_bert`. inner_size: of each of the `feed_forwards`; the rest as in the module docstring."""

    name: Literal["mobile_bert"] = "mobile_bert"
    num_heads: int = Field(ge=1, le=1024)
    head_dim: int = Field(ge=1, le=4096)
    feed_forwards: int = Field(4, ge=1, le=64)
    inner_size: int = Field(512, ge=1, le=1 << 20)
    activation: str = "relu"
    norm: Literal["no_norm", "layer_norm"] = "no_norm"
    norm_eps: float = Field(1e-12, gt=0, le=1)
    attention_input: Literal["own", "residual"] = "own"
    causal: bool = False

    @property
    def bottleneck(self) -> int:
        """The width b within."""
        return self.num_heads * self.head_dim


@register_mixer("mobile_bert")
class MobileBert(SequenceMixer):
    """Attention and feed-forwards in a bottleneck; see the module docstring."""

    Config = MobileBertConfig
    traits = Traits(causal=False, bidirectional=True, state="none")
    config: MobileBertConfig

    def __init__(self, config: MobileBertConfig, width: int) -> None:
        super().__init__(config, width)
        b, own = config.bottleneck, config.attention_input == "own"
        norm = NoNorm if config.norm == "no_norm" else nn.LayerNorm
        self.residual_proj, self.residual_norm = Linear(width, b), norm(b, eps=config.norm_eps)
        self.shared_proj = Linear(width, b) if own else None
        self.shared_norm = norm(b, eps=config.norm_eps) if own else None
        self.q_proj, self.k_proj = Linear(b, b), Linear(b, b)
        self.v_proj = Linear(width if own else b, b)
        self.o_proj, self.o_norm = Linear(b, b), norm(b, eps=config.norm_eps)
        inner = MLPConfig(hidden_size=config.inner_size, activation=config.activation)
        self.ffn = nn.ModuleList(MLP(inner, b) for _ in range(config.feed_forwards))
        self.ffn_norm = nn.ModuleList(norm(b, eps=config.norm_eps) for _ in range(config.feed_forwards))
        self.y_proj = Linear(b, width)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask_BL: Tensor | None = None,
        segments_BL: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        if state is not None:
            raise TraitError(f"mixer {self.name!r} is two-sided (causal: false), so there is no state to carry")
        if mask_BL is not None:
            x_BLD = x_BLD.masked_fill(~mask_BL[..., None], 0)
        r_BLE = self.residual_norm(self.residual_proj(x_BLD))
        if self.shared_proj is None or self.shared_norm is None:
            asks_BLE, v_BLE = r_BLE, self.v_proj(r_BLE)
        else:
            asks_BLE, v_BLE = self.shared_norm(self.shared_proj(x_BLD)), self.v_proj(x_BLD)
        heads = [
            y.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
            for y in (self.q_proj(asks_BLE), self.k_proj(asks_BLE), v_BLE)
        ]
        y_BHLV = ops.attention(
            *heads, causal=False, scale=self.config.head_dim**-0.5, mask_BS=mask_BL, segments_BS=segments_BL
        )
        h_BLE = self.o_norm(self.o_proj(y_BHLV.transpose(1, 2).flatten(-2)) + r_BLE)
        for ffn, norm in zip(self.ffn, self.ffn_norm, strict=True):
            h_BLE = norm(h_BLE + ffn(h_BLE))
        return self.y_proj(h_BLE), None

    def init_state(self, batch_size: int, *, device: Any = None, dtype: torch.dtype | None = None) -> State:
        return State()

    def reset_parameters(self, std: float) -> None:
        """Nothing of its own: plain projections are initialised by the model, as in BERT."""

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """Small sizes, and an activation without the kink that finite differences of gradients would meet."""
        return {"feed_forwards": 2, "inner_size": 24, "activation": "gelu"}

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        a = attention
        for what, there in (("rotary positions", a.rotary), ("a norm on queries and keys", a.qk_norm)):
            if there is not None:
                raise ConversionError(f"mixer {cls.name!r} has no {what}, which the attention to convert has")
        if a.head_dim != a.value_head_dim or a.window is not None:
            raise ConversionError(f"mixer {cls.name!r} needs attention without a window, keys and values of one size")
        values = {"num_heads": a.num_heads, "head_dim": a.head_dim, "causal": a.causal}
        values |= {"feed_forwards": 1, "inner_size": 4 * a.num_heads * a.head_dim, **options}
        return cls.Config.parse({"name": cls.name, **values}, "mixer")

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls, config: MixerOptions, attention: AttentionWeights, stats: AttentionStats | None = None
    ) -> Self:
        a, mixer = attention, cls(config, attention.q_HKD.shape[1])  # type: ignore[arg-type]
        c = mixer.config
        if (a.num_heads, a.head_dim) != (c.num_heads, c.head_dim):
            raise ConversionError(
                f"mixer {cls.name!r} with {c.num_heads} heads of {c.head_dim} cannot copy attention with "
                f"{a.num_heads} heads of {a.head_dim}"
            )
        if mixer.shared_proj is None:
            raise ConversionError("attention_input: 'residual' leaves no room for the attention's own; take 'own'")
        gain = a.scale * a.head_dim**0.5
        k_ED, v_ED, k_bias, v_bias = (_for_each_query_head(x, a) for x in (a.k_GKD, a.v_GVD, a.k_bias, a.v_bias))
        q_EE, k_EE, shared_ED = shared_factors(a.q_HKD * gain, k_ED, c.bottleneck)
        parts = {
            "shared_proj": (shared_ED, None),
            "residual_proj": (torch.zeros_like(shared_ED), None),
            "q_proj": (q_EE, None if a.q_bias is None else a.q_bias * gain),
            "k_proj": (k_EE, k_bias),
            "v_proj": (v_ED, v_bias),
            "o_proj": (torch.eye(c.bottleneck), None),
            "y_proj": (a.o_DHV, a.o_bias),
        }
        for name, (weight, bias) in parts.items():
            linear = getattr(mixer, name)
            linear.weight.copy_(weight)
            linear.bias.zero_() if bias is None else linear.bias.copy_(bias)
        ffns: Any = mixer.ffn
        for ffn in ffns:
            ffn.down_proj.weight.zero_()
            ffn.down_proj.bias.zero_()
        return mixer


def _for_each_query_head(x: Any, attention: AttentionWeights) -> Any:
    """Rows by key/value head, repeated for the query heads that read them; None stays None."""
    if x is None:
        return None
    heads = x.unflatten(0, (attention.num_kv_heads, -1))
    return heads.repeat_interleave(attention.num_heads // attention.num_kv_heads, 0).flatten(0, 1)


def shared_factors(q_ED: Tensor, k_ED: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(W_q, W_k, W_a), each with `size` inner channels, so that W_q W_a and W_k W_a are closest to two maps.

    q_ED, k_ED: (E, D). Returns (E, size), (E, size), (size, D); zeros beyond the rank of the two together.
    """
    left, values, right = torch.linalg.svd(torch.cat([q_ED, k_ED]).double(), full_matrices=False)
    rank = min(size, len(values))
    factors = left.new_zeros(left.shape[0], size)
    factors[:, :rank] = left[:, :rank] * values[:rank]
    shared_ED = right.new_zeros(size, right.shape[1])
    shared_ED[:rank] = right[:rank]
    return factors[: len(q_ED)], factors[len(q_ED) :], shared_ED
