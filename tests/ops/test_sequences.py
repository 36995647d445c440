"""Rows with padding and packing as sequences of their own, and back."""

from __future__ import annotations

import torch

from zoo.ops.sequences import find_sequences


def test_padding_and_packing_become_rows_and_go_back():
    x_BLD = torch.arange(1.0, 13.0).view(2, 6, 1)
    mask_BL = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 0, 1]]).bool()
    segments_BL = torch.tensor([[5, 5, 5, 7, 7, 7], [2, 2, 2, 3, 3, 2]])  # 2 comes back
    sequences = find_sequences((2, 6), mask_BL, segments_BL)
    assert sequences.length_R.tolist() == [2, 2, 2, 1, 1]
    rows = sequences.split(x_BLD.masked_fill(~mask_BL[..., None], torch.nan))
    assert rows[..., 0].tolist() == [[2, 3], [5, 6], [7, 8], [10, 0], [12, 0]]
    assert sequences.join(rows)[..., 0].tolist() == (x_BLD[..., 0] * mask_BL).tolist()
    heads = x_BLD[:, None].expand(2, 3, 6, 1)
    assert torch.equal(sequences.join_heads(sequences.split_heads(heads)), heads * mask_BL[:, None, :, None])


def test_a_mask_alone_keeps_the_shape():
    mask_BL = torch.tensor([[0, 1, 1], [0, 0, 0]]).bool()
    sequences = find_sequences((2, 3), mask_BL, None)
    assert sequences.split(torch.arange(1.0, 7.0).view(2, 3, 1))[..., 0].tolist() == [[2, 3, 0], [0, 0, 0]]
    assert sequences.length_R.tolist() == [2, 0]


def test_whole_rows_need_nothing():
    assert find_sequences((2, 3), None, None) is None


def test_a_row_without_tokens_beside_packed_ones():
    mask_BL = torch.tensor([[0, 0, 0], [1, 1, 1]]).bool()
    sequences = find_sequences((2, 3), mask_BL, torch.tensor([[1, 2, 3], [1, 1, 2]]))
    assert sequences.length_R.tolist() == [0, 2, 1]
