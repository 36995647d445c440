"""Softmax attention against the loop, whatever is masked."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import ConfigError, ZooError
from zoo.ops.attention import attention
from zoo.ops.reference import attention_reference

D = torch.float64
POISON = float("nan")


def qkv(b=2, h=4, g=2, length=7, s=7, k=4, v=4, dtype=D):
    torch.manual_seed(0)
    return [torch.randn(b, n, t, d, dtype=dtype) for n, t, d in ((h, length, k), (g, s, k), (g, s, v))]


def poisoned(q, k, v, mask):
    pad = ~mask[:, None, :, None]
    return q.masked_fill(pad[:, :, -q.shape[2] :], POISON), k.masked_fill(pad, POISON), v.masked_fill(pad, POISON)


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]],
    "interior": [[1, 0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 1]],
    "nothing": [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("h", "g", "k", "v"), [(4, 4, 4, 4), (4, 2, 4, 4), (4, 1, 4, 3), (6, 2, 3, 8)])
@pytest.mark.parametrize(("length", "s"), [(7, 7), (3, 7), (1, 7), (1, 1)])
@pytest.mark.parametrize("window", [None, 3])
def test_agrees_with_the_loop(causal, h, g, k, v, length, s, window):
    tensors = qkv(h=h, g=g, length=length, s=s, k=k, v=v)
    options = {"causal": causal, "window": window, "scale": 0.3 if k == 3 else None}
    torch.testing.assert_close(attention(*tensors, **options), attention_reference(*tensors, **options))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("length", [7, 3, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_padding_changes_nothing_and_leaks_nothing(mask, causal, window, length, packed):
    q, k, v = qkv(length=length)
    mask_BS = torch.tensor(MASKS[mask], dtype=torch.bool)
    # Padding carries ids of its own: a sequence goes on behind it.
    ids = torch.tensor([[0, 5, 0, 5, 5, 0, 1], [3, 3, 1, 1, 7, 7, 1]]) if packed else None
    options = {"causal": causal, "window": window, "mask_BS": mask_BS, "segments_BS": ids}
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    y = attention(*poisoned(q, k, v, mask_BS), **options)
    torch.testing.assert_close(y, attention_reference(q, k, v, **options))
    assert (y.masked_select(~mask_BS[:, None, 7 - length :, None]) == 0).all()
    torch.testing.assert_close(attention(q, k, v, finite_padding=True, **options), y)
    for gradient in torch.autograd.grad(y.square().sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_packed_sequences_equal_separate_ones():
    tensors = qkv(b=1, length=9, s=9)
    ids = torch.tensor([[4, 4, 4, 1, 1, 4, 4, 4, 4]])  # an id that comes again is another sequence
    packed = attention(*tensors, segments_BS=ids)
    separate = [attention(*(x[:, :, a:b] for x in tensors)) for a, b in ((0, 3), (3, 5), (5, 9))]
    torch.testing.assert_close(packed, torch.cat(separate, 2))


def test_carried_keys_in_any_split():
    q, k, v = qkv(length=7)
    whole = attention(q, k, v)
    for a, b in itertools.combinations(range(1, 8), 2):
        parts = [attention(q[:, :, i:j], k[:, :, :j], v[:, :, :j]) for i, j in ((0, a), (a, b), (b, 7)) if i < j]
        torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_nothing_depends_on_later_tokens():
    q, k, v = qkv(length=7)
    early = attention(q, k, v)[:, :, :4]
    k[:, :, 4:], v[:, :, 4:], q[:, :, 4:] = 9.0, 9.0, 9.0
    assert torch.equal(attention(q, k, v)[:, :, :4], early)


def test_gradients():
    q, k, v = (x[:1].requires_grad_() for x in qkv(h=2, g=1, length=3, s=4, v=3))
    mask = torch.tensor([[1, 0, 1, 1]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda *x: attention(*x), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask_BS=mask, window=2), (q, k, v))


def test_bfloat16_is_as_good_as_plain_torch():
    q, k, v = qkv(h=4, g=4, length=64, s=64, k=32, v=32, dtype=torch.float32)
    exact = attention_reference(q, k, v)
    low = [x.bfloat16() for x in (q, k, v)]
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)
    scores = (low[0] @ low[1].mT * 32**-0.5).masked_fill(hidden, float("-inf"))
    plain = (scores.softmax(-1) @ low[2] - exact).abs().max()
    assert (attention(*low) - exact).abs().max() <= 2 * plain
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(q, k, v)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 2 * plain


def test_plain_causal_calls_need_no_mask(monkeypatch):
    """The fast paths: a dense mask would cost more than the attention of a short row."""
    seen = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **o: (seen.append(o.get("attn_mask")), sdpa(*a, **o))[1]
    )
    q, k, v = qkv()
    attention(q, k, v)
    attention(q[:, :, -1:], k, v)
    attention(q, k, v, causal=False)
    assert seen == [None] * 3


def test_refuses_what_does_not_fit():
    q, k, v = qkv()
    with pytest.raises(ConfigError, match="do not fit together"):
        attention(q, k[..., :2], v)
    with pytest.raises(ConfigError, match="3 query heads cannot share 2"):
        attention(q[:, :3], k, v)
    with pytest.raises(ConfigError, match="7 queries but 5 keys"):
        attention(q, k[:, :, :5], v[:, :, :5])
    with pytest.raises(ConfigError, match="window is 0"):
        attention(q, k, v, window=0)
    with pytest.raises(ConfigError, match="mask_BS has shape"):
        attention(q, k, v, mask_BS=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ZooError, match="did you mean 'sdpa'"):
        attention(q, k, v, backend="spda")


@pytest.mark.slow
def test_compiles_without_breaks():
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    tensors = qkv()
    mask = torch.tensor(MASKS["interior"], dtype=torch.bool)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    for options in ({}, {"mask_BS": mask, "segments_BS": ids, "window": 3}):
        torch.testing.assert_close(compiled(*tensors, **options), attention(*tensors, **options))


@pytest.mark.parametrize("autocast", [False, True])
def test_short_rows_train_in_float32_on_a_cpu(autocast):
    """The result is bf16, but rounded once at the end; long rows and inference go the usual way."""
    parts = [torch.randn(2, 2, 20, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    low = [x.bfloat16().requires_grad_() for x in parts]
    exact = [x.detach().float().requires_grad_() for x in low]
    given = exact if autocast else low
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = attention(*given, causal=True)
    expected = attention(*(x.detach().requires_grad_() for x in exact), causal=True)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())
    y.float().square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.dtype == x.dtype for x in given)
