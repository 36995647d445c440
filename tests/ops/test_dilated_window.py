"""Dilated windows with global tokens, against the dense matrix of who sees whom."""

from __future__ import annotations

import itertools

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ops.dilated_window import dilated_window_attention
from zoo.ops.reference_sparse import dilated_window_attention_reference

CASES = list(itertools.product([True, False], [(1, 1, 0), (3, 1, 2), (2, 3, 0), (4, 2, 3), (2, 7, 5), (50, 2, 1)]))


def heads(length, batch=2):
    q = torch.randn(batch, 4, length, 6, dtype=torch.double)
    k, v = (torch.randn(batch, 2, length, size, dtype=torch.double) for size in (6, 5))
    return q, k, v


def masks_and_segments(length):
    place = torch.arange(length)
    ragged = torch.rand(2, length) > 0.4
    segments = torch.stack([place // 17 % 2, place // 5])
    ragged_segments = ragged | (segments.diff(append=1 - segments[:, -1:]) != 0)
    empty = torch.stack([place < 0, place == 3])
    return [(None, None), (ragged, None), (empty, None), (None, segments), (ragged_segments, segments)]


def agree(q, k, v, mask, segments, **options):
    got = dilated_window_attention(q, k, v, mask_BS=mask, segments_BS=segments, **options)
    clean = [x if mask is None else x.masked_fill(~mask[:, None, :, None], 0) for x in (q, k, v)]
    expected = dilated_window_attention_reference(*clean, mask_BL=mask, segments_BL=segments, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    return got, expected


@pytest.mark.parametrize("length", [1, 7, 70])
@pytest.mark.parametrize(("causal", "sizes"), CASES)
def test_is_the_dense_matrix(length, causal, sizes):
    window, dilation, global_tokens = sizes
    options = {"window": window, "dilation": dilation, "global_tokens": global_tokens, "causal": causal, "scale": 0.7}
    q, k, v = heads(length)
    for mask, segments in masks_and_segments(length):
        poison = [x if mask is None else x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k, v)]
        agree(*poison, mask, segments, **options)


def test_gradients_are_those_of_the_dense_matrix():
    options = {"window": 3, "dilation": 2, "global_tokens": 2, "causal": False}
    leaves = [x.requires_grad_() for x in heads(37)]
    mask, segments = masks_and_segments(37)[4]
    got, expected = agree(*leaves, mask, segments, **options)
    weights = torch.randn_like(got)
    pairs = zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (got, expected)), strict=True)
    for gradient, reference in pairs:
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("window", "dilation", "global_tokens"), [(3, 1, 2), (3, 4, 3), (2, 3, 0)])
def test_carried_keys_and_given_globals(window, dilation, global_tokens):
    """The last (window - 1) * dilation keys and the first ones are all that later queries need."""
    q, k, v = heads(61)
    options = {"window": window, "dilation": dilation, "global_tokens": global_tokens}
    whole = dilated_window_attention(q, k, v, **options)
    for start in (1, 2, 20, 60):
        first = max(start - (window - 1) * dilation, 0)
        given = (k[:, :, :global_tokens], v[:, :, :global_tokens]) if global_tokens else None
        tail = dilated_window_attention(
            q[:, :, start:],
            k[:, :, first:],
            v[:, :, first:],
            positions_BS=torch.arange(first, 61)[None],
            global_kv=given,
            **options,
        )
        torch.testing.assert_close(tail, whole[:, :, start:], rtol=1e-10, atol=1e-10)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = heads(5)
    with pytest.raises(ConfigError, match="dilation is 0"):
        dilated_window_attention(q, k, v, window=2, dilation=0)
    with pytest.raises(ConfigError, match="global_kv holds 5 tokens where global_tokens is 2"):
        dilated_window_attention(q, k, v, window=2, global_tokens=2, global_kv=(k, v))
