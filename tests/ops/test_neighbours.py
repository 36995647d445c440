"""Neighbouring vectors side by side: a loop over real tokens says what is meant."""

from __future__ import annotations

import pytest
import torch

from zoo.ops.neighbours import neighbours

B, L, D = 3, 9, 2
MASK_BL = torch.tensor([[1] * 9, [0, 0, 1, 0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1, 1, 0]]).bool()
SEGMENTS_BL = torch.tensor([[0] * 4 + [1] * 5, [3] * 5 + [4] * 4, [7, 7, 7, 7, 8, 7, 7, 7, 7]])


def sequential(x_BLD, count, mask_BL, segments_BL):
    """One token at a time: walk over the real tokens of its run to both sides."""
    out = x_BLD.new_zeros(B, L, count, D)
    for b in range(B):
        real = [t for t in range(L) if mask_BL is None or mask_BL[b, t]]
        for place, t in enumerate(real):
            for j, offset in enumerate(range(count // 2, -count // 2, -1)):
                ids = [] if segments_BL is None else segments_BL[b]
                other = place + offset
                if not 0 <= other < len(real):
                    continue
                path = real[min(place, other) : max(place, other) + 1]
                if len(ids) and len({int(ids[s]) for s in path}) > 1:
                    continue
                out[b, t, j] = x_BLD[b, real[other]]
    return out.flatten(2)


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("mask_BL", [None, MASK_BL], ids=["whole", "padded"])
@pytest.mark.parametrize("segments_BL", [None, SEGMENTS_BL], ids=["one", "packed"])
def test_it_is_what_the_loop_gives(count, mask_BL, segments_BL):
    x_BLD = torch.randn(B, L, D, dtype=torch.double, requires_grad=True)
    expected = sequential(x_BLD, count, mask_BL, segments_BL)
    poisoned = x_BLD if mask_BL is None or count == 1 else x_BLD.masked_fill(~mask_BL[..., None], float("nan"))
    got = neighbours(poisoned, count, mask_BL, segments_BL)
    real_BL = slice(None) if mask_BL is None else mask_BL
    assert torch.equal(got[real_BL], expected[real_BL])
    weights = torch.randn(B, L, count * D, dtype=torch.double)
    ours, theirs = (
        torch.autograd.grad((y * weights)[real_BL].sum(), x_BLD, retain_graph=True)[0] for y in (got, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_an_even_count_is_refused():
    with pytest.raises(ValueError, match="must be odd, got 2"):
        neighbours(torch.zeros(1, 2, 3), 2)


def test_a_row_shorter_than_the_neighbourhood():
    assert neighbours(torch.ones(1, 1, 1), 5).tolist() == [[[0, 0, 1, 0, 0]]]
