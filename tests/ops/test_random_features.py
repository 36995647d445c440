"""Attention through random features in blocks: the dense formula, its gradient, padding, room that is not cleared."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ops import random_features
from zoo.ops.random_features import random_feature_attention, random_feature_attention_reference

B, H, L, K, V, M = 2, 4, 37, 6, 5, 11


def inputs(kv_heads=H, size=1.0):
    torch.manual_seed(0)
    shapes = [(B, H, L, K), (B, kv_heads, L, K), (B, kv_heads, L, V)]
    q, k, v = (size * torch.randn(*shape, dtype=torch.double) for shape in shapes)
    return [t.requires_grad_() for t in (q, k, v)], torch.randn(M, K, dtype=torch.double)


@pytest.fixture(params=[4, 1 << 19], ids=["blocks of 16", "one block"])
def room(request, monkeypatch):
    monkeypatch.setattr(random_features, "_ROOM", request.param)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize(("kernel", "eps"), [("softmax", 0.1), ("softmax", 0.0), ("relu", 0.01)])
def test_it_is_the_dense_formula(room, kernel, eps, kv_heads, masked):
    (q, k, v), p = inputs(kv_heads)
    mask_BL = torch.rand(B, L) > 0.4 if masked else torch.ones(B, L, dtype=torch.bool)
    results = []
    for function, options in (
        (random_feature_attention, {"mask_BL": mask_BL if masked else None}),
        (random_feature_attention_reference, {"mask_BL": mask_BL}),
    ):
        y = function(q, k, v, p, kernel=kernel, eps=eps, **options)
        results.append([y, *torch.autograd.grad((y * torch.arange(L)[:, None].cos()).sum(), (q, k, v))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_gradients_are_those_of_small_changes(room, eps):
    """With an eps the largest features are part of the gradient."""
    parts, p = inputs()
    assert torch.autograd.gradcheck(lambda *x: random_feature_attention(*x, p, eps=eps), parts, fast_mode=True)


def test_a_later_larger_key_changes_what_was_summed_before(monkeypatch):
    """The running maximum: keys whose exponents grow by hundreds from block to block."""
    monkeypatch.setattr(random_features, "_ROOM", 1)
    (q, k, v), p = inputs()
    k = k.detach() * torch.linspace(0.1, 40, L)[:, None]
    y = random_feature_attention(q.float(), k.float(), v.float(), p.float(), eps=1e-4)
    expected = random_feature_attention_reference(q, k, v, p, "softmax", 1e-4, torch.ones(B, L, dtype=torch.bool))
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-4)


def test_rows_without_a_token_and_what_stands_in_padding(room):
    (q, k, v), p = inputs()
    mask_BL = torch.arange(L) < torch.tensor([[20], [0]])
    y = random_feature_attention(q, k, v, p, eps=1e-4, mask_BL=mask_BL)
    changed = [t.detach().masked_fill(~mask_BL[:, None, :, None], 1e4) for t in (k, v)]
    again = random_feature_attention(q, *changed, p, eps=1e-4, mask_BL=mask_BL)
    assert torch.equal(again[0, :, :20], y[0, :, :20])
    assert y.isfinite().all()
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[0, :, 20:].any() for g in grads[1:])


def test_low_precision_is_summed_in_float32(room):
    (q, k, v), p = inputs()
    low = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    y = random_feature_attention(*low, p.float(), eps=1e-4)
    assert y.dtype == torch.bfloat16
    exact = random_feature_attention(*(t.double() for t in low), p, eps=1e-4)
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(y.float().sum(), low))


def test_shapes_that_do_not_fit_are_refused():
    (q, k, v), p = inputs()
    with pytest.raises(ConfigError, match=r"expected \(B, H, L, K\).* got .*\(11, 5\)"):
        random_feature_attention(q, k, v, p[:, :5])
