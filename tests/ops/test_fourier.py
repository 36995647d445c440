"""Fourier mixing: the double sum, rows of any length, gradients."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ops.fourier import fourier_mixing, fourier_mixing_reference, ragged_fourier

B, L, D = 3, 23, 6


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_double_sum(masked, packed):
    torch.manual_seed(0)
    x_BLD = torch.randn(B, L, D, dtype=torch.double)
    mask_BL = torch.rand(B, L) > 0.4 if masked else torch.ones(B, L, dtype=torch.bool)
    mask_BL[1] &= not masked  # a row without a token
    segments_BL = (torch.rand(B, L) > 0.8).cumsum(1) % 2 if packed else torch.zeros(B, L, dtype=torch.long)
    expected = fourier_mixing_reference(x_BLD, mask_BL, segments_BL)
    if masked:
        x_BLD = x_BLD.masked_fill(~mask_BL[..., None], torch.nan)
    got = fourier_mixing(x_BLD, mask_BL=mask_BL if masked else None, segments_BL=segments_BL if packed else None)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    single = fourier_mixing(x_BLD.float(), mask_BL=mask_BL)
    assert single.dtype == torch.float32
    if not packed:
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("length", "width"), [(1, 1), (1, 2), (2, 1), (2, 2), (8, 3), (9, 4), (16, 5)])
def test_half_of_the_transform_is_enough(length, width):
    x_BLD = torch.randn(2, length, width, dtype=torch.double)
    torch.testing.assert_close(fourier_mixing(x_BLD), torch.fft.fft2(x_BLD).real, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 97, 1024])
def test_a_chirp_is_a_transform_of_any_length(length):
    torch.manual_seed(0)
    x_RTD = torch.randn(2, 1024, 2, dtype=torch.complex128)
    x_RTD[:, length:] = 0
    got = ragged_fourier(x_RTD, torch.tensor([length, length]))[:, :length]
    torch.testing.assert_close(got, torch.fft.fft(x_RTD[:, :length], dim=1).real, rtol=1e-10, atol=1e-9)
    single = ragged_fourier(x_RTD.to(torch.complex64), torch.tensor([length, length]))[:, :length]
    assert ((single - got).norm() / got.norm()).item() < 1e-6


def test_gradients():
    x_BLD = torch.randn(1, 7, 3, dtype=torch.double, requires_grad=True)
    mask_BL = torch.tensor([[True, True, False, True, True, True, False]])
    segments_BL = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: fourier_mixing(x), (x_BLD,))
    assert torch.autograd.gradgradcheck(lambda x: fourier_mixing(x).square(), (x_BLD,))
    assert torch.autograd.gradcheck(lambda x: fourier_mixing(x, mask_BL=mask_BL, segments_BL=segments_BL), (x_BLD,))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"mask_BL has shape \(3, 22\), but there are \(3, 23\) positions"):
        fourier_mixing(torch.zeros(B, L, D), mask_BL=torch.ones(B, L - 1, dtype=torch.bool))
