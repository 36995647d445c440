"""The long convolution against the sum that it is."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ops.long_conv import fast_length, long_conv

B, L, E = 2, 37, 3


def direct(x_LE, kernel_EL, back_EL=None):
    """The sum over all pairs of positions of one sequence."""
    age_LL = torch.arange(len(x_LE))[:, None] - torch.arange(len(x_LE))
    taps = kernel_EL.shape[1]
    map_ELL = torch.where((age_LL >= 0) & (age_LL < taps), kernel_EL[:, age_LL.clamp(0, taps - 1)], 0.0)
    if back_EL is not None:
        ahead = (-age_LL - 1).clamp(0, back_EL.shape[1] - 1)
        map_ELL = map_ELL + torch.where((age_LL < 0) & (-age_LL <= back_EL.shape[1]), back_EL[:, ahead], 0.0)
    return torch.einsum("ets,se->te", map_ELL, x_LE)


def expected(x_BLE, kernel, back, mask_BL, runs_BL):
    y_BLE = torch.zeros_like(x_BLE)
    for b in range(B):
        for run in runs_BL[b].unique():
            here = mask_BL[b] & (runs_BL[b] == run)
            y_BLE[b, here] = direct(x_BLE[b, here], kernel, back)
    return y_BLE


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("taps", [1, 9, L, 2 * L])
def test_is_the_sum_over_pairs(two_sided, packed, masked, taps):
    x_BLE, kernel, back = torch.randn(B, L, E).double(), torch.randn(E, taps).double(), torch.randn(E, taps).double()
    x_BLE, kernel, back = (t.requires_grad_() for t in (x_BLE, kernel, back))
    mask_BL = torch.rand(B, L) > (0.3 if masked else -1.0)
    runs_BL = (torch.rand(B, L) > (0.85 if packed else 2.0)).cumsum(1)
    got = long_conv(
        x_BLE.masked_fill(~mask_BL[..., None], torch.nan), kernel, back if two_sided else None,
        mask_BL=mask_BL if masked else None, segments_BL=runs_BL if packed else None,
    )  # fmt: skip
    wanted = expected(x_BLE, kernel, back if two_sided else None, mask_BL, runs_BL)
    assert (got - wanted).abs().max() < 1e-11
    leaves = (x_BLE, kernel, back)[: 2 + two_sided]
    weights = torch.randn(B, L, E).double()
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (got, wanted)), strict=True):
        assert (a - b).abs().max() < 1e-11


def test_half_precision_is_summed_in_single():
    x_BLE, kernel = torch.randn(1, 500, 2).bfloat16(), torch.randn(2, 500)
    y_BLE = long_conv(x_BLE, kernel)
    wanted = direct(x_BLE[0].double(), kernel.double())
    assert y_BLE.dtype == torch.bfloat16
    assert (y_BLE[0] - wanted).abs().max() < 2**-8 * wanted.abs().max()


def test_all_padding_is_all_zero():
    segments, mask = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool)
    x = torch.full((1, 4, 2), torch.nan)
    assert not long_conv(x, torch.ones(2, 4), mask_BL=mask, segments_BL=segments).any()


def test_lengths_are_even_and_smooth():
    assert [fast_length(n) for n in (1, 7, 11, 13, 97, 1023)] == [2, 8, 12, 16, 100, 1024]


def test_wrong_shapes_are_named():
    with pytest.raises(ConfigError, match=r"kernel must be \(3, taps\) for 3 channels; got \(2, 5\)"):
        long_conv(torch.zeros(1, 4, 3), torch.zeros(2, 5))
    with pytest.raises(ConfigError, match=r"mask_BL has shape \(1, 5\), but there are \(1, 4\)"):
        long_conv(torch.zeros(1, 4, 3), torch.zeros(3, 5), mask_BL=torch.ones(1, 5, dtype=torch.bool))
