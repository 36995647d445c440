"""Attention in shifted windows: against the dense form, with masks, special tokens, and grids that do not divide."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ops.reference_sparse import shifted_window_attention_reference
from zoo.ops.shifted_window import shifted_window_attention

H, K, V = 4, 6, 5
KINDS = {
    "windows": ({"window": 3, "grid": (6, 9)}, 0),
    "shifted": ({"window": 3, "shift": 1, "grid": (6, 9)}, 0),
    "padded": ({"window": 4, "shift": 2, "grid": (6, 9)}, 0),
    "one row of windows": ({"window": 4, "shift": 3, "grid": (4, 10)}, 0),
    "one window": ({"window": 7, "shift": 3, "grid": (5, 6)}, 0),
    "special tokens": ({"window": 3, "shift": 1, "grid": (5, 6)}, 2),
    "a sequence": ({"window": 5, "shift": 2}, 13),
    "a short sequence, shifted too": ({"window": 9, "shift": 4}, 7),
}


def inputs(kind: str, kv_heads: int = H):
    options, more = KINDS[kind]
    rows, columns = options.get("grid", (0, 0))
    L = rows * columns + more
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.double, generator=generator)

    q, k, v = draw(2, H, L, K), draw(2, kv_heads, L, K), draw(2, kv_heads, L, V)
    mask = torch.rand(2, L, generator=generator) > 0.3
    return (q, k, v, draw((2 * options["window"] - 1) ** 2, H)), mask, options


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_what_the_dense_form_says(kind, masked):
    tensors, mask_BL, options = inputs(kind, kv_heads=2 if masked else H)
    mask_BL = mask_BL if masked else None
    tensors = [t.requires_grad_() for t in tensors]
    y = shifted_window_attention(*tensors, **options, mask_BL=mask_BL)
    expected = shifted_window_attention_reference(*tensors, **options, mask_BL=mask_BL)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(y)
    got = torch.autograd.grad((y * weight).sum(), tensors)
    for a, b in zip(got, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_what_is_masked_may_hold_anything():
    (q, k, v, bias), mask_BL, options = inputs("special tokens")
    expected = shifted_window_attention(q, k, v, bias, **options, mask_BL=mask_BL)
    hidden = ~mask_BL[:, None, :, None]
    k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)
    torch.testing.assert_close(shifted_window_attention(q, k, v, bias, **options, mask_BL=mask_BL), expected)


def test_a_patch_sees_its_window_only():
    (q, k, v, bias), _, _ = inputs("shifted")
    v = v.requires_grad_()
    y = shifted_window_attention(q, k, v, bias, window=3, shift=1, grid=(6, 9))
    (gradient,) = torch.autograd.grad(y[0, 0, 4 * 9 + 4].sum(), v)
    seen = {divmod(i, 9) for i in gradient[0, 0].abs().sum(-1).nonzero().flatten().tolist()}
    assert seen == {(r, c) for r in (4, 5) for c in (4, 5, 6)}  # rows 4 to 6, of which there are two; columns 4 to 6


def test_shapes_that_do_not_fit():
    (q, k, v, bias), _, _ = inputs("shifted")
    with pytest.raises(ConfigError, match=r"grid \(6, 10\) and biases"):
        shifted_window_attention(q, k, v, bias, window=3, grid=(6, 10))
    with pytest.raises(ConfigError, match="do not fit 54 tokens of 4 heads"):
        shifted_window_attention(q, k, v, bias[:-1], window=3, grid=(6, 9))
