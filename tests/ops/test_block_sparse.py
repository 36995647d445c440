"""Block-sparse attention against the dense matrix of who meets whom how often."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ops.block_sparse import block_sparse_attention, separate_segments
from zoo.ops.reference_sparse import block_sparse_attention_reference


def heads(length, batch=3):
    q = torch.randn(batch, 4, length, 6, dtype=torch.double)
    k, v = (torch.randn(batch, 2, length, size, dtype=torch.double) for size in (6, 5))
    return q, k, v


def masks(length):
    place = torch.arange(length)
    ragged = torch.rand(3, length) > torch.tensor([[0.1], [0.5], [0.9]])
    empty = torch.stack([place < 0, place == length - 1, place > length // 2])
    return [None, ragged, empty]


def agree(q, k, v, mask, **options):
    got = block_sparse_attention(q, k, v, mask_BL=mask, **options)
    clean = [x if mask is None else x.masked_fill(~mask[:, None, :, None], 0) for x in (q, k, v)]
    expected = block_sparse_attention_reference(*clean, mask_BL=mask, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    return got, expected


def table(blocks, listed, rows=1):
    """Any blocks of short rows too: what stands in a row's table must lie within the row."""
    upper = torch.arange(blocks).clamp(min=1)[:, None].expand(rows, 4, blocks, listed)
    return (torch.rand(rows, 4, blocks, listed) * upper).long()


@pytest.mark.parametrize("length", [1, 5, 17, 64, 71])
@pytest.mark.parametrize(("block", "listed", "full_up_to"), [(1, 2, 0), (4, 0, 0), (4, 3, 12), (7, 1, 49)])
def test_is_the_dense_matrix(length, block, listed, full_up_to):
    random = table(-(-length // block), listed, rows=3)
    for mask in masks(length):
        poison = [x if mask is None else x.masked_fill(~mask[:, None, :, None], torch.nan) for x in heads(length)]
        agree(*poison, mask, block=block, random_BHNR=random, full_up_to=full_up_to, scale=0.7)


def test_gradients_are_those_of_the_dense_matrix():
    leaves = [x.requires_grad_() for x in heads(45)]
    got, expected = agree(*leaves, masks(45)[1], block=4, random_BHNR=table(12, 2), full_up_to=8)
    weights = torch.randn_like(got)
    pairs = zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (got, expected)), strict=True)
    for gradient, reference in pairs:
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


def test_a_block_listed_twice_counts_twice():
    q, k, v = heads(40)
    once, twice = (torch.full((1, 4, 10, n), 7) for n in (1, 2))
    rows = [block_sparse_attention(q, k, v, block=4, random_BHNR=r)[:, :, 8:12] for r in (once, twice)]
    assert (rows[0] - rows[1]).abs().max() > 1e-3


def test_segments_become_rows():
    segments = torch.tensor([[0, 0, 1, 1, 0], [2, 2, 2, 2, 2]])
    mask = torch.tensor([[True, False, True, True, True], [False] * 4 + [True]])
    index, real = separate_segments(segments, mask)
    assert [row[m].tolist() for row, m in zip(index, real, strict=True)] == [[0], [2, 3], [4], [9]]
    index, real = separate_segments(segments, torch.zeros_like(mask))
    assert index.numel() == real.numel() == 0


def test_tables_that_do_not_fit_are_refused():
    q, k, v = heads(20)
    with pytest.raises(ConfigError, match=r"random_BHNR has shape \(1, 4, 4, 1\), but must be \(3, 4, 5 or more, R\)"):
        block_sparse_attention(q, k, v, block=4, random_BHNR=table(4, 1))
