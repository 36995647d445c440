"""Longformer and BigBird over random sizes, lengths, masks and packings: every sequence is answered as if alone."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from zoo.mixers.base import State
from zoo.registry import mixer_class

D = 12
SEEDS = range(40)


def random_mixer(name, rng, causal):
    heads = rng.choice([1, 2, 4])
    options = {
        "num_heads": heads, "num_kv_heads": rng.choice([n for n in (1, 2, 4) if heads % n == 0]), "head_dim": 4,
        "value_head_dim": rng.choice([None, 3]), "rotary": rng.choice([None, {"theta": 50.0}]), "causal": causal,
    }  # fmt: skip
    if name == "longformer":
        dilation = rng.choice([1, rng.randint(1, 9), [rng.randint(1, 5) for _ in range(heads)]])
        options |= {"window": rng.randint(1, 7), "dilation": dilation, "global_tokens": rng.randint(0, 6)}
    else:
        options |= {"block_size": rng.randint(1, 5), "num_random_blocks": rng.randint(0, 2), "seed": rng.randint(0, 99)}
    cls = mixer_class(name)
    return cls(cls.Config.parse(options), D).double().eval()


def random_lengths(rng, rows, longest):
    """Real tokens of each row: none, one and odd numbers among them."""
    special = [0, 1, longest, longest // 2 | 1]
    return [rng.choice([*special, rng.randint(0, longest)]) for _ in range(rows)]


def padded_batch(rng, counts, longest):
    """The rows' tokens spread at random places, NaN between them."""
    mask_BL = torch.zeros(len(counts), longest, dtype=torch.bool)
    for row, count in enumerate(counts):
        mask_BL[row, rng.sample(range(longest), count)] = True
    x_BLD = torch.randn(len(counts), longest, D, dtype=torch.double)
    return x_BLD, x_BLD.masked_fill(~mask_BL[..., None], torch.nan), mask_BL


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "causal"), [("longformer", True), ("longformer", False), ("big_bird", False)])
def test_rows_are_answered_as_if_alone(name, causal, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    mixer, longest = random_mixer(name, rng, causal), rng.choice([1, 2, 13, 31, 47, 64])
    x_BLD, poisoned, mask_BL = padded_batch(rng, random_lengths(rng, 4, longest), longest)
    with torch.no_grad():
        y_BLD, _ = mixer(poisoned, mask_BL=mask_BL)
        assert y_BLD.isfinite().all()
        for row, mask_L in enumerate(mask_BL):
            if mask_L.any():
                close(y_BLD[row, mask_L], mixer(x_BLD[row : row + 1, mask_L])[0][0])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "causal"), [("longformer", True), ("longformer", False), ("big_bird", False)])
def test_packed_sequences_are_answered_as_if_alone(name, causal, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    mixer, longest = random_mixer(name, rng, causal), rng.choice([1, 13, 31, 64])
    x_BLD = torch.randn(2, longest, D, dtype=torch.double)
    cuts = [sorted(rng.sample(range(longest + 1), min(rng.randint(0, 5), longest))) for _ in range(2)]
    segments_BL = torch.tensor([[sum(c <= t for c in row) % 2 for t in range(longest)] for row in cuts])
    with torch.no_grad():
        y_BLD, _ = mixer(x_BLD, segments_BL=segments_BL)
        for b, row in enumerate(cuts):
            edges = [0, *row, longest]
            for start, end in itertools.pairwise(edges):
                if end > start:
                    close(y_BLD[b, start:end], mixer(x_BLD[b : b + 1, start:end])[0][0])


@pytest.mark.parametrize("seed", SEEDS)
def test_longformer_goes_on_from_any_state(seed):
    """Pieces of any length, with rows that are all padding or one token at first."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    mixer = random_mixer("longformer", rng, True)
    sizes = [rng.choice([1, 1, 2, 7, 20]) for _ in range(rng.randint(2, 7))]
    total = sum(sizes)
    _, poisoned, mask_BL = padded_batch(rng, random_lengths(rng, 3, total), total)
    mask_BL[0, : sizes[0]] = False
    mask_BL[1, : sizes[0]] = torch.arange(sizes[0]) == 0
    x_BLD = torch.where(mask_BL[..., None], poisoned.nan_to_num(0.3), torch.nan)
    with torch.no_grad():
        whole, _ = mixer(x_BLD, mask_BL=mask_BL)
        state: State | None = mixer.init_state(3)
        parts, start = [], 0
        for size in sizes:
            keep = slice(start, start + size)
            y, state = mixer(x_BLD[:, keep], mask_BL=mask_BL[:, keep], state=state)
            parts.append(y)
            start += size
    close(torch.cat(parts, 1)[mask_BL], whole[mask_BL])
