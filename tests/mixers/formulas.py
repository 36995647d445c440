"""What tests of single architectures share: numbers made from a formula, distances, a few steps of alignment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.base import SequenceMixer
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


def teacher(width: int = 32, *, causal: bool, heads: int = 4, sharpness: float = 1.0, seed: int = 0) -> Attention:
    """Softmax attention whose logits on unit inputs have about this standard deviation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AttentionConfig(num_heads=heads, head_dim=width // heads, causal=causal, qkv_bias=True)
        attention = Attention(config, width)
        with torch.no_grad():
            for name, p in attention.named_parameters():
                p.normal_(std=(sharpness**0.5 if name[0] in "qk" else 1.0) * width**-0.5)
    return attention


def convert(attention: Attention, name: str, **options) -> SequenceMixer:
    """`from_attention` with a fixed seed."""
    cls, weights = mixer_class(name), attention.attention_weights()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return cls.from_attention(cls.config_from_attention(weights, **options), weights)


def relative_error(student: SequenceMixer, attention: Attention, length: int = 48) -> float:
    """sqrt(sum (student - teacher)^2 / sum teacher^2) on random inputs."""
    x_BLD = torch.randn(4, length, attention.width, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = attention(x_BLD)[0]
        return ((student(x_BLD)[0] - expected).square().sum() / expected.square().sum()).sqrt().item()


def align(student: SequenceMixer, attention: Attention, steps: int = 30, length: int = 48, rate: float = 3e-3) -> None:
    """A few steps towards the teacher mixer's output."""
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x_BLD = torch.randn(8, length, attention.width, generator=generator)
        with torch.no_grad():
            expected = attention(x_BLD)[0]
        loss = (student(x_BLD)[0] - expected).square().sum() / expected.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def parameters(name: str) -> tuple[int, int]:
    """How many parameters a registered model's backbone has, and how many of them are not embeddings."""
    with torch.device("meta"):
        model = ZooModel(model_config(name))
    total = sum(p.numel() for p in model.parameters())
    embeddings = sum(p.numel() for n, p in model.named_parameters() if n.startswith("embed_") and "norm" not in n)
    return total, total - embeddings
