"""Positions count the real tokens of each sequence, whatever stands between them."""

from __future__ import annotations

import torch

from zoo.ops.positions import token_positions


def loop(mask_BL, segments_BL, seen_B):
    """The definition, one token at a time."""
    out = torch.zeros(mask_BL.shape, dtype=torch.long)
    for b in range(mask_BL.shape[0]):
        count, segment = int(seen_B[b]) if seen_B is not None else 0, None
        for t in range(mask_BL.shape[1]):
            if not mask_BL[b, t]:
                continue
            if segments_BL is not None and segment is not None and segments_BL[b, t] != segment:
                count = 0
            segment = None if segments_BL is None else segments_BL[b, t]
            out[b, t] = count
            count += 1
    return out


def test_positions_equal_the_definition_for_random_padding_and_packing():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        mask_BL = torch.rand(3, 20, generator=generator) < 0.7
        runs_BL = (torch.rand(3, 20, generator=generator) < 0.2).cumsum(1)
        ids_BL = torch.where(mask_BL, runs_BL, torch.randint(9, (3, 20), generator=generator))  # padding: any id
        seen_B = torch.randint(5, (3,), generator=generator)
        x_BLD = torch.zeros(3, 20, 1)
        for segments, seen in ((None, None), (None, seen_B), (ids_BL, None)):
            found = token_positions(x_BLD, mask_BL, segments, seen)
            assert torch.equal(found[mask_BL], loop(mask_BL, segments, seen)[mask_BL])


def test_rows_that_agree_share_one_row():
    assert token_positions(torch.zeros(4, 3, 1)).tolist() == [[0, 1, 2]]
