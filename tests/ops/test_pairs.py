"""Pairs of real tensors compute what complex tensors do."""

from __future__ import annotations

import pytest
import torch

from zoo.ops.pairs import Pairs, from_pairs, log1p, numbers, to_pairs, where

EXPRESSIONS = {
    "sum": lambda a, b, r: a + b + r,
    "difference": lambda a, b, r: r - a - b - 2,
    "product": lambda a, b, r: a * b * r * 3,
    "real on the left": lambda a, b, r: r * a + 2 * b,
    "quotient": lambda a, b, r: a / b / 2,
    "one over": lambda a, b, r: 1 / (1 - r * a),
    "conjugate": lambda a, b, r: -a.conj() * b,
    "exp": lambda a, b, r: (a * 0.3).exp(),
    "log1p": lambda a, b, r: log1p(a * 1e-3) - log1p(b),
    "reduced": lambda a, b, r: (a * b).sum(-1, keepdim=True),
    "indexed": lambda a, b, r: a[..., None][:, 0].flatten(0, 1).unflatten(0, (1, -1)),
    "chosen": lambda a, b, r: where(r > 0, a, b),
    "wide": lambda a, b, r: a.to(torch.complex128).exp().to(b.dtype),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_operators_are_those_of_complex_tensors(name):
    a, b, r = torch.randn(3, 4, 2), torch.randn(3, 4, 2), torch.randn(3, 4)
    got = EXPRESSIONS[name](*(Pairs(x[..., 0], x[..., 1]) for x in (a, b)), r)
    expected = EXPRESSIONS[name](from_pairs(a, steps=True), from_pairs(b, steps=True), r)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    torch.testing.assert_close(to_pairs(got), to_pairs(expected.resolve_conj()))
    torch.testing.assert_close(got.real, expected.real)
    torch.testing.assert_close(got.imag, expected.imag)


def test_numbers_are_complex_outside_of_graphs():
    x = numbers(torch.ones(2), torch.zeros(2), steps=True)
    assert x.dtype == torch.complex64
