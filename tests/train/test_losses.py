"""Losses against plain formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from zoo.train import losses
from zoo.train.losses import embedding_distance, head_loss, relative_error


def plain(h, w, b, t, tw, tb, targets, kl, ce, T):
    V = min(len(w), len(tw))
    s = (h @ w[:V].T + b[:V]) / T
    log_q, log_p = F.log_softmax(s, -1), F.log_softmax((t @ tw[:V].T + tb[:V]) / T, -1)
    kl_term = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / len(h)
    return kl * T * T * kl_term + ce * F.cross_entropy(s * T, targets), kl_term * T * T


@pytest.mark.parametrize(("kl", "ce", "T"), [(1, 0, 1), (0, 1, 1), (0.7, 0.3, 1), (0.7, 0.3, 2.5), (0, 1, 2)])
@pytest.mark.parametrize("sizes", [(50, 50), (50, 47), (47, 50)])
def test_head_loss_is_the_plain_one(monkeypatch, kl, ce, T, sizes):
    monkeypatch.setattr(losses, "ROWS", 7)
    monkeypatch.setattr(losses, "BLOCK", 150)
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    h, w, b = make(30, 8), make(sizes[0], 8), make(sizes[0])
    t, tw, tb = make(30, 6), make(sizes[1], 6), make(sizes[1])
    targets = torch.randint(0, 47, (30,), generator=g)
    targets[::4] = -100
    ours, theirs = [[x.clone().requires_grad_() for x in (h, w, b)] for _ in range(2)]
    options = {"targets_N": targets, "kl": kl, "ce": ce, "temperature": T}
    loss, terms = head_loss(*ours, teacher=(t, tw, tb), **options)
    want, want_kl = plain(*theirs, t, tw, tb, targets, kl, ce, T)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    if kl:
        torch.testing.assert_close(terms["kl"], want_kl.detach(), rtol=1e-10, atol=1e-12)
    (3 * loss).backward()
    (3 * want).backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


def test_head_loss_is_zero_for_the_teacher_itself_and_far_logits_stay_finite():
    h, w = torch.randn(20, 8) * 100, torch.randn(40, 8)
    h.requires_grad_()
    loss, _ = head_loss(h, w, teacher=(h.detach(), w, None), kl=1.0)
    loss.backward()
    assert loss.abs() < 1e-5
    assert h.grad.abs().max() < 1e-6
    loss, _ = head_loss(h, w, teacher=(-h.detach(), w, None), kl=1.0)
    assert torch.isfinite(loss)
    assert loss > 100


def test_head_loss_in_bf16_is_near_and_frozen_parts_get_nothing():
    torch.manual_seed(0)
    h, t, w = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32), torch.randn(300, 32) * 0.3
    exact, _ = head_loss(h, w, teacher=(t, w, None), kl=1.0)
    (want,) = torch.autograd.grad(exact, h)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = head_loss(h, w, teacher=(t, w, None), kl=1.0, dtype=torch.bfloat16)
    (got,) = torch.autograd.grad(loss, h)
    assert abs(loss - exact) / exact < 5e-3
    assert (got - want).norm() / want.norm() < 2e-2
    assert loss.dtype == got.dtype == torch.float32
    assert set(terms) == {"kl"}


def test_no_target_counts_no_cross_entropy():
    h = torch.randn(5, 4, requires_grad=True)
    loss, terms = head_loss(h, torch.randn(9, 4), targets_N=torch.full((5,), -100), ce=1.0)
    loss.backward()
    assert loss == terms["ce"] == 0
    assert not h.grad.any()


def test_relative_error():
    y, target = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 1.0], requires_grad=True)
    error = relative_error(y, target)
    assert error == 0.5
    error.backward()
    assert y.grad.tolist() == [0.0, 1.0]
    assert target.grad is None
    assert torch.isfinite(relative_error(y, torch.zeros(2)))


def test_padding_does_not_count():
    y, t = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    want = ((y - t)[mask] ** 2).sum() / (t[mask] ** 2).sum()
    y[~mask] = 1e6
    torch.testing.assert_close(relative_error(y, t, mask), want)


def test_the_distance_of_embeddings_is_one_less_the_cosine():
    y, t = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64)
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(y.detach(), t, strict=True)]
    distance = embedding_distance(y, 3 * t.requires_grad_())
    assert distance.item() == pytest.approx(1 - sum(cosines) / 4)
    distance.backward()
    assert t.grad is None
    assert torch.autograd.gradcheck(lambda x: embedding_distance(x, t.detach()), y.detach().requires_grad_())
