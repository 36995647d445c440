"""What tests of single architectures share: numbers made from a formula, other people's names, distances, alignment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.base import AttentionStats, SequenceMixer
from zoo.models.backbone import ZooModel
from zoo.registry import mixer_class, model_config


def wave(*shape: int, step: float) -> Tensor:
    """Numbers in [-1, 1] that anybody can make again, in float64."""
    return torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.double) ** 1.5).view(shape)


def largest_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected number."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def corners(y_BLD: Tensor) -> list[float]:
    """Three numbers of the first and three of the last position, for comparison with recorded ones."""
    return torch.cat([y_BLD[0, 0, :3], y_BLD[-1, -1, :3]]).tolist()


def shaken(module: Any, std: float) -> Any:
    """The module with noise on every parameter, so that no part is hidden behind a zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(std * torch.randn_like(p))
    return module


BERT_NAMES = {  # transformers' names of BERT and its kin, below the model, and ours; the longer before the shorter
    "embeddings.word_embeddings": "embed_tokens",
    "embeddings.position_embeddings": "embed_positions",
    "embeddings.token_type_embeddings": "embed_token_types",
    "embeddings.LayerNorm": "embed_norm",
    "encoder.layer": "layers",
    "attention.self.query": "mixer.q_proj",
    "attention.self.key": "mixer.k_proj",
    "attention.self.value": "mixer.v_proj",
    "attention.output.dense": "mixer.o_proj",
    "attention.output.LayerNorm": "mixer_norm",
    "intermediate.dense": "ffn.up_proj",
    "output.dense": "ffn.down_proj",
    "output.LayerNorm": "ffn_norm",
}


def renamed(tensors: dict[str, Any], names: dict[str, str], drop: str = "pooler") -> dict[str, Any]:
    """The tensors under names in which every old part is replaced by the new one, without those that contain `drop`."""
    out = {}
    for key, tensor in tensors.items():
        if drop not in key:
            for old, new in names.items():
                key = key.replace(old, new)
            out[key] = tensor
    return out


def teacher(
    width: int = 32, *, causal: bool, heads: int = 4, kv_heads: int | None = None, sharpness: float = 1.0, seed: int = 0
) -> Attention:
    """Softmax attention whose logits on unit inputs have about this standard deviation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AttentionConfig(
            num_heads=heads, num_kv_heads=kv_heads, head_dim=width // heads, causal=causal, qkv_bias=True
        )
        attention = Attention(config, width)
        with torch.no_grad():
            for name, p in attention.named_parameters():
                p.normal_(std=(sharpness**0.5 if name[0] in "qk" else 1.0) * width**-0.5)
    return attention


def measured(lookback: float | Tensor, heads: int = 4, out_rms: float | Tensor = 1.0) -> AttentionStats:
    """Statistics of heads that look back so many tokens and put out values of this size."""
    ones_H = torch.ones(heads)
    return AttentionStats(
        lookback_H=lookback * ones_H, q_norm_H=ones_H, k_norm_H=ones_H, out_rms_H=out_rms * ones_H
    )  # fmt: skip


def convert(attention: Attention, name: str, stats: AttentionStats | None = None, **options) -> SequenceMixer:
    """`from_attention` with a fixed seed."""
    cls, weights = mixer_class(name), attention.attention_weights()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return cls.from_attention(cls.config_from_attention(weights, **options), weights, stats)


@torch.no_grad()
def fading_average(attention: Attention, x_BLD: Tensor, half_life: float | Tensor) -> Tensor:
    """W_o of each head's values, averaged with weights (1 - z) z^age that halve in `half_life` tokens.

    Two-sided, a half of the weight is on each side, and what lies ahead is one step nearer. Biases of values are a
    constant, which is its own average.
    """
    c, L = attention.config, x_BLD.shape[1]
    z_H11 = 2 ** (-1 / (half_life * torch.ones(c.num_heads)))[:, None, None]
    age_LL = torch.arange(L)[:, None] - torch.arange(L)
    past_HLL = torch.where(age_LL >= 0, (1 - z_H11) * z_H11 ** age_LL.clamp(min=0), 0.0)
    ahead_HLL = torch.where(age_LL < 0, (1 - z_H11) * z_H11 ** (-age_LL - 1).clamp(min=0), 0.0)
    weights_HLL = past_HLL if c.causal else (past_HLL + ahead_HLL) / 2
    v_LE = torch.nn.functional.linear(x_BLD, attention.v_proj.weight)
    heads = [v.unflatten(-1, (c.kv_heads, -1)).repeat_interleave(c.num_heads // c.kv_heads, -2)
             for v in (v_LE, attention.v_proj.bias)]  # fmt: skip
    return attention.o_proj((torch.einsum("hts,bshv->bthv", weights_HLL, heads[0]) + heads[1]).flatten(2))


def text_like(rows: int, length: int = 48, width: int = 32) -> Tensor:
    """Inputs whose neighbours resemble each other."""
    x_BLD = torch.randn(rows, length, width)
    for t in range(1, length):
        x_BLD[:, t] = 0.9 * x_BLD[:, t - 1] + 0.19**0.5 * x_BLD[:, t]
    return x_BLD


def distance(got: Tensor, expected: Tensor) -> Tensor:
    """sqrt(sum (got - expected)^2 / sum expected^2)."""
    return ((got - expected).square().sum() / expected.square().sum()).sqrt()


def relative_error(
    student: SequenceMixer, attention: Attention, length: int = 48, x_BLD: Tensor | None = None
) -> float:
    """The `distance` of the outputs on random inputs, or on these."""
    if x_BLD is None:
        x_BLD = torch.randn(4, length, attention.width, generator=torch.Generator().manual_seed(7))
    x_BLD = x_BLD.to(attention.o_proj.weight)
    with torch.no_grad():
        return distance(student(x_BLD)[0], attention(x_BLD)[0]).item()


def align(
    student: SequenceMixer,
    attention: Attention,
    steps: int = 30,
    length: int = 48,
    rate: float = 3e-3,
    inputs: Callable[[], Tensor] | None = None,
    fast: tuple[str, ...] = (),
) -> list[float]:
    """A few steps towards the teacher mixer's output; the distances on the way. `inputs` makes those of each step.

    Parameters whose names begin with one of `fast` (logarithms of rates, which have far to go) take steps 30 times as
    large.
    """
    groups = [
        {"params": [p], "lr": 30 * rate if name.startswith(fast) else rate} for name, p in student.named_parameters()
    ]
    optimizer = torch.optim.Adam(groups)
    generator, errors = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        x_BLD = torch.randn(8, length, attention.width, generator=generator) if inputs is None else inputs()
        x_BLD = x_BLD.to(attention.o_proj.weight)
        with torch.no_grad():
            expected = attention(x_BLD)[0]
        loss = distance(student(x_BLD)[0], expected)
        errors.append(loss.item())
        optimizer.zero_grad()
        loss.square().backward()
        optimizer.step()
    return errors


def parameters(name: str) -> tuple[int, int]:
    """How many parameters a registered model's backbone has, and how many of them are not embeddings."""
    with torch.device("meta"):
        model = ZooModel(model_config(name))
    total = sum(p.numel() for p in model.parameters())
    embeddings = sum(p.numel() for n, p in model.named_parameters() if n.startswith("embed_") and "norm" not in n)
    return total, total - embeddings
