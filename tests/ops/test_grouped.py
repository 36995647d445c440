"""Grouped linear maps: every group's rows by its own matrix, gradients, rows of nobody, compiled."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ops.grouped import grouped_linear, grouped_linear_reference, grouped_pair

ENDS = [
    [3, 3, 8, 11],  # an empty group
    [0, 0, 0, 0],  # nothing at all
    [0, 11, 11, 11],  # all in one
    [1, 2, 3, 9],  # two rows of nobody
]


def case(ends, dtype=torch.double):
    x, weight = torch.randn(11, 5, dtype=dtype), torch.randn(4, 5, 7, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("ends", ENDS)
def test_is_the_dense_sum(ends):
    x, weight, ends_E = case(ends)
    got, expected = grouped_linear(x, weight, ends_E), grouped_linear_reference(x, weight, ends_E)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    rows = torch.randn_like(got)
    pairs = zip(*(torch.autograd.grad((y * rows).sum(), (x, weight)) for y in (got, expected)), strict=True)
    for gradient, reference in pairs:
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ends", ENDS)
def test_a_pair_is_two_maps(ends):
    x, first, ends_E = case(ends)
    second = torch.randn(4, 5, 3, dtype=torch.double, requires_grad=True)
    got = grouped_pair(x, first, second, ends_E)
    expected = [grouped_linear_reference(x, weight, ends_E) for weight in (first, second)]
    torch.testing.assert_close([*got], expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y.sin().sum() + z.square().sum(), (x, first, second)) for y, z in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda *leaves: grouped_pair(*leaves, ends_E), (x, first, second))
    frozen = grouped_pair(x.detach(), first.detach(), second, ends_E)
    torch.testing.assert_close(
        torch.autograd.grad(frozen[1].square().sum(), second)[0], gradients[0][2], rtol=1e-12, atol=1e-12
    )


def test_gradients_of_gradients():
    x, weight, ends_E = case(ENDS[3])
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, ends_E), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_linear(x, w, ends_E), (x, weight))


def test_rows_of_nobody_are_not_read():
    x, weight, ends_E = case(ENDS[3])
    poisoned = x.detach().clone()
    poisoned[9:] = torch.nan
    got = grouped_linear(poisoned.requires_grad_(), weight, ends_E)
    assert torch.equal(got[:9], grouped_linear(x, weight, ends_E)[:9])
    assert not got[9:].any()
    got.sum().backward()
    assert poisoned.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_frozen_factors_get_no_gradient():
    x, weight, ends_E = case(ENDS[0])
    grouped_linear(x, weight.detach(), ends_E).sum().backward()
    assert x.grad is not None
    grouped_linear(x.detach(), weight, ends_E).sum().backward()
    assert weight.grad is not None


def test_autocast_computes_in_bfloat16():
    x, weight, ends_E = case(ENDS[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, ends_E)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), grouped_linear(x, weight, ends_E), rtol=0.05, atol=0.1)


def test_compiles_without_graph_breaks():
    x, weight, ends_E = case(ENDS[3])
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, ends_E), grouped_linear(x, weight, ends_E))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_grouped_kernel_agrees():
    x, weight = torch.randn(300, 64, device="cuda"), torch.randn(4, 64, 96, device="cuda")
    ends_E = torch.tensor([100, 100, 131, 290], dtype=torch.int32, device="cuda")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        y = grouped_linear(*leaves, ends_E, backend="torch" if dtype == torch.float32 else "grouped_mm")
        y.float().square().sum().backward()
        results.append([t.detach().float() for t in (y, *(leaf.grad for leaf in leaves))])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 0.02 * a.abs().max()


def test_shapes_that_do_not_fit_are_refused():
    x, weight, ends_E = case(ENDS[0])
    with pytest.raises(ConfigError, match=r"rows \(11, 4\) do not fit weights \(4, 5, 7\)"):
        grouped_linear(x[:, :4], weight, ends_E)
    with pytest.raises(ConfigError, match=r"ends_E must be int32 \(4,\), got torch.int64"):
        grouped_linear(x, weight, ends_E.long())
