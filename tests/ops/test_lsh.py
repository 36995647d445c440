"""LSH attention, its decoding and chunked local attention against position-by-position references."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ops.decisions import decided, recording, replaying
from zoo.ops.local_attention import local_attention
from zoo.ops.lsh import hash_buckets, lsh_attention, lsh_decode, unit_rms
from zoo.ops.reference_lsh import local_attention_reference, lsh_attention_reference, lsh_step_reference

B, H, K, V = 2, 2, 4, 3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def inputs(length, rounds=2, buckets=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(B, H, length, n, dtype=torch.double, generator=generator) for n in (K, V))
    return x, v, torch.randint(0, buckets, (B, H, length, rounds), generator=generator)


def gradients(y, tensors):
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weights).sum(), tensors)


@pytest.mark.parametrize("own_keys", [False, True], ids=["shared", "own keys"])
@pytest.mark.parametrize("length", [1, 4, 5, 9, 23])
@pytest.mark.parametrize("options", [
    {}, {"causal": False}, {"causal": False, "after": 1}, {"before": 2, "scale": 1.5}, {"before": 0},
    {"across_buckets": False}, {"across_buckets": False, "causal": False, "after": 1},
], ids=str)  # fmt: skip
def test_lsh_is_the_reference(length, options, own_keys):
    x, v, buckets = inputs(length)
    k = inputs(length, seed=1)[0] if own_keys else None
    tensors = [t.requires_grad_() for t in (x, v, k) if t is not None]
    ys = [f(x, v, buckets, keys_BHLK=k, chunk=4, **options) for f in (lsh_attention, lsh_attention_reference)]
    torch.testing.assert_close(*ys, **CLOSE)
    for got, expected in zip(*(gradients(y, tensors) for y in ys), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"causal": False, "after": 1}, {"across_buckets": False}], ids=str)
def test_every_row_is_as_long_as_it_says(options):
    x, v, buckets = inputs(21)
    length_B = torch.tensor([21, 6])
    y = lsh_attention(x, v, buckets, chunk=4, length_B=length_B, **options)
    for row, n in enumerate(length_B.tolist()):
        alone = lsh_attention(*(t[row : row + 1, :, :n] for t in (x, v, buckets)), chunk=4, **options)
        torch.testing.assert_close(y[row : row + 1, :, :n], alone, **CLOSE)
        assert not y[row, :, n:].any()
        own = lsh_attention(x, v, buckets, keys_BHLK=x.flip(0), chunk=4, length_B=length_B, **options)
        alone = (t[row : row + 1, :, :n] for t in (x, v, buckets))
        alone = lsh_attention(*alone, keys_BHLK=x.flip(0)[row : row + 1, :, :n], chunk=4, **options)
        torch.testing.assert_close(own[row : row + 1, :, :n], alone, **CLOSE)
    empty = lsh_attention(x, v, buckets, chunk=4, length_B=torch.tensor([0, 3]))
    assert empty.isfinite().all()
    assert not empty[0].any()


def test_one_chunk_is_attention_without_oneself():
    x, v, buckets = inputs(7, rounds=3)
    y = lsh_attention(x, v, buckets, chunk=8, causal=False)
    scores = (x @ unit_rms(x).mT * K**-0.5).masked_fill(torch.eye(7, dtype=torch.bool), -torch.inf)
    torch.testing.assert_close(y, scores.softmax(-1) @ v, **CLOSE)
    causal = lsh_attention(x, v, buckets, chunk=8)
    torch.testing.assert_close(causal[:, :, 0], v[:, :, 0], **CLOSE)  # alone: itself
    torch.testing.assert_close(causal[:, :, 1], v[:, :, 0], **CLOSE)


@pytest.mark.parametrize("meets_itself", [False, True])
@pytest.mark.parametrize("length", [1, 4, 5, 7, 8, 22])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_decoding_is_the_reference(length, before, meets_itself):
    x, v, buckets = inputs(length)
    k, options = unit_rms(x), {"chunk": 4, "before": before, "meets_itself": meets_itself}
    got = lsh_decode(x[:, :, -1:], k, v, buckets, **options)
    expected = lsh_step_reference(x[:, :, -1:], k, v, buckets, **options)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("across_buckets", [True, False])
def test_decoding_several_positions_is_decoding_them_one_by_one(across_buckets, monkeypatch):
    monkeypatch.setattr("zoo.ops.lsh._SORTED_AT_ONCE", 400)  # three at a time
    x, v, buckets = inputs(30)
    k, mask_BS = unit_rms(x), torch.rand(B, 30) > 0.3
    options = {"chunk": 4, "across_buckets": across_buckets}
    for mask in (None, mask_BS):
        together = lsh_decode(x[:, :, 11:], k, v, buckets, mask_BS=mask, **options)
        for t in range(11, 30):
            past = (tensor[:, :, : t + 1] for tensor in (k, v, buckets))
            one = lsh_decode(x[:, :, t : t + 1], *past, mask_BS=None if mask is None else mask[:, : t + 1], **options)
            torch.testing.assert_close(together[:, :, t - 11 : t - 10], one, **CLOSE)
            if mask is not None and mask[0, t]:
                there = mask[0, : t + 1]
                past = (tensor[:1, :, : t + 1][:, :, there] for tensor in (k, v, buckets))
                torch.testing.assert_close(lsh_decode(x[:1, :, t : t + 1], *past, **options), one[:1], **CLOSE)


def test_angles_decide_buckets():
    """A vector, its multiples and its neighbours share a bucket; its opposite has the opposite one."""
    rotations = torch.randn(H, 16, 3, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(B, H, 50, 16, generator=torch.Generator().manual_seed(1))
    one = hash_buckets(x, rotations, (8,))
    assert one.shape == (B, H, 50, 3)
    assert sorted(one.unique().tolist()) == list(range(8))
    assert torch.equal(hash_buckets(7 * x, rotations, (8,)), one)
    assert torch.equal(hash_buckets(-x, rotations, (8,)), (one + 4) % 8)
    near = (hash_buckets(x + 0.1 * torch.randn(x.shape), rotations, (8,)) == one).float().mean()
    far = (hash_buckets(torch.randn(x.shape), rotations, (8,)) == one).float().mean()
    assert near > 0.8 > 0.3 > far
    digits = hash_buckets(x, rotations, (2, 6))
    turned = torch.einsum("bhlk,hkrm->bhlrm", x, rotations)
    low, high = turned[..., :1] < 0, torch.cat([turned[..., 1:], -turned[..., 1:]], -1).argmax(-1)
    assert torch.equal(digits, low[..., 0] + 2 * high)


def test_similar_positions_meet():
    """Queries find the one key that is like them, anywhere in a sequence of many chunks, and more with more rounds."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(1, 1, 128, 32, generator=generator)
    x = torch.cat([half, half + 0.1 * torch.randn(half.shape, generator=generator)], 2)
    v = torch.eye(256)[None, None]
    found = []
    for rounds in (1, 4):
        rotations = torch.randn(1, 32, rounds, 16, generator=generator)
        y = lsh_attention(x, v, hash_buckets(x, rotations, (32,)), chunk=8, scale=4.0)
        found.append((y[0, 0, 128:].argmax(-1) == torch.arange(128)).float().mean().item())
    assert found[0] > 0.6
    assert found[1] > 0.9


@pytest.mark.parametrize("length", [1, 5, 8, 23])
@pytest.mark.parametrize("options", [
    {}, {"before": 0}, {"before": 2}, {"causal": False}, {"causal": False, "before": 2, "after": 1, "scale": 2.0},
], ids=str)  # fmt: skip
def test_local_is_the_reference(length, options):
    q, v, _ = inputs(length)
    k = torch.randn_like(q[:, :1])
    tensors = [t.requires_grad_() for t in (q, k, v)]
    ys = [f(q, k, v[:, :1], chunk=4, **options) for f in (local_attention, local_attention_reference)]
    torch.testing.assert_close(*ys, **CLOSE)
    for got, expected in zip(*(gradients(y, tensors) for y in ys), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
    n = max(1, length - 6)
    y = local_attention(q, k, v[:, :1], chunk=4, length_B=torch.tensor([n, 0]), **options)
    alone = local_attention(q[:1, :, :n], k[:1, :, :n], v[:1, :1, :n], chunk=4, **options)
    torch.testing.assert_close(y[:1, :, :n], alone, **CLOSE)
    assert not y[0, :, n:].any()
    assert not y[1].any()


def test_shapes_that_do_not_fit_are_refused():
    x, v, buckets = inputs(6)
    with pytest.raises(ConfigError, match="do not fit together"):
        lsh_attention(x, v, buckets[:, :, :5], chunk=4)
    with pytest.raises(ConfigError, match="not of the shape of the queries"):
        lsh_attention(x, v, buckets, keys_BHLK=x[:, :1], chunk=4)
    with pytest.raises(ConfigError, match="6 new positions but 5 in all"):
        lsh_decode(x, *(t[:, :, :5] for t in (x, v, buckets)), chunk=4)


def test_decisions_are_taken_once():
    with recording() as decisions:
        first = [decided(lambda: torch.randn(3)) for _ in range(2)]
    for _ in range(2):
        with replaying(decisions):
            assert [decided(lambda: torch.zeros(3)) for _ in range(2)] == first
    assert not torch.equal(decided(lambda: torch.zeros(3)), first[0])
