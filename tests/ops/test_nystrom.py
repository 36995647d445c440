"""Nystrom attention: its reference, ragged rows, the pseudo-inverse, where it is exact."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ops.attention import attention
from zoo.ops.nystrom import nystrom_attention, nystrom_attention_reference, pseudo_inverse

B, H, G, K, V = 3, 4, 2, 8, 6


def inputs(L, dtype=torch.double):
    torch.manual_seed(L)
    return (torch.randn(B, heads, L, size, dtype=dtype) for heads, size in ((H, K), (G, K), (G, V)))


@pytest.mark.parametrize(("L", "landmarks"), [(24, 6), (25, 6), (31, 7), (7, 7), (5, 7), (9, 8)])
def test_it_is_the_reference(L, landmarks):
    q, k, v = inputs(L)
    got = nystrom_attention(q, k, v, landmarks=landmarks, scale=0.4)
    for b in range(B):
        k_HLK, v_HLV = (x[b].repeat_interleave(H // G, 0) for x in (k, v))
        expected = nystrom_attention_reference(q[b], k_HLK, v_HLV, landmarks=landmarks, scale=0.4)
        torch.testing.assert_close(got[b], expected, rtol=1e-10, atol=1e-12)


def test_rows_of_any_length_are_as_alone():
    q, k, v = inputs(30)
    length_B = torch.tensor([30, 17, 4])  # more and fewer than there are landmarks
    hidden = ~(torch.arange(30) < length_B[:, None])[:, None, :, None]
    poisoned = [x.masked_fill(hidden, torch.nan) for x in (q, k, v)]
    got = nystrom_attention(*poisoned, landmarks=6, length_B=length_B)
    for b, n in enumerate(length_B.tolist()):
        alone = nystrom_attention(q[b : b + 1, :, :n], k[b : b + 1, :, :n], v[b : b + 1, :, :n], landmarks=6)
        torch.testing.assert_close(got[b : b + 1, :, :n], alone, rtol=1e-10, atol=1e-12)
        assert not got[b, :, n:].any()


def test_gradients():
    q, k, v = (x[:1, :2, :, :3].requires_grad_() for x in inputs(9))
    assert torch.autograd.gradcheck(lambda *x: nystrom_attention(*x, landmarks=3), (q, k, v))
    length_B = torch.tensor([7])
    assert torch.autograd.gradcheck(lambda *x: nystrom_attention(*x, landmarks=3, length_B=length_B), (q, k, v))


def test_few_tokens_are_softmax_attention():
    q, k, v = inputs(12)
    expected = attention(q, k, v, causal=False)
    torch.testing.assert_close(nystrom_attention(q, k, v, landmarks=12), expected)
    assert (nystrom_attention(q, k, v, landmarks=6) - expected).abs().max() > 1e-2


def test_more_iterations_come_to_the_pseudo_inverse():
    torch.manual_seed(0)
    a = torch.randn(5, 8, 8, dtype=torch.double).softmax(-1)
    expected = torch.linalg.pinv(a)
    errors = [((pseudo_inverse(a, n) - expected).norm() / expected.norm()).item() for n in (4, 6, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9
    torch.testing.assert_close(pseudo_inverse(a[:1]), pseudo_inverse(a)[:1])  # rows do not know each other


def test_low_precision_sums_in_float32():
    q, k, v = (x.float() for x in inputs(24))
    half = nystrom_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), landmarks=6)
    exact = nystrom_attention(*(x.bfloat16().double() for x in (q, k, v)), landmarks=6)
    assert half.dtype == torch.bfloat16
    assert ((half.double() - exact).abs().max() / exact.abs().max()).item() < 2**-7  # one rounding, of the result


def test_shapes_are_checked():
    q, k, v = inputs(5)
    with pytest.raises(ConfigError, match="do not fit together"):
        nystrom_attention(q, k[:, :, :4], v, landmarks=3)
