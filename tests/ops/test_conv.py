"""The short convolution against the loop and torch's own."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import ConfigError
from zoo.ops.conv import short_conv
from zoo.ops.padding import invert, right_align, segment_runs, take
from zoo.ops.reference import short_conv_reference

D64 = torch.float64


def inputs(b=2, length=13, d=5, taps=4, dtype=D64):
    torch.manual_seed(taps)
    shapes = ((b, length, d), (d, taps), (d,), (b, taps - 1, d))
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]


def masks(b, length):
    return {
        "left": torch.arange(length).expand(b, -1) >= torch.tensor([[4], [0]]),
        "right": torch.arange(length).expand(b, -1) < torch.tensor([[length - 5], [length]]),
        "interior": torch.rand(b, length) < 0.5,
        "nothing": torch.zeros(b, length, dtype=torch.bool),
    }


@pytest.mark.parametrize("dtype", [torch.float32, D64])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("mask", [None, "left", "right", "interior", "nothing"])
@pytest.mark.parametrize("packed", [False, True])
def test_agrees_with_the_loop(dtype, taps, length, carried, activation, mask, packed):
    x, weight, bias, initial = inputs(length=length, taps=taps, dtype=dtype)
    options = {
        "initial": initial if carried else None,
        "final": True,
        "mask_BL": masks(2, length).get(mask),
        "segments_BL": (torch.rand(2, length) < 0.3).long().cumsum(-1) % 2 if packed else None,
        "activation": activation,
    }
    held = x if mask is None else x.masked_fill(~options["mask_BL"][..., None], float("nan"))
    y, tail = short_conv(held, weight, bias, **options)
    expected, expected_tail = short_conv_reference(x, weight, bias, **options)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(tail, expected_tail)
    if mask:
        assert (y[~options["mask_BL"]] == 0).all()


def test_agrees_with_torch():
    x, weight, bias, _ = inputs()
    expected = F.conv1d(x.mT, weight[:, None], bias, padding=3, groups=5)[..., :13].mT
    y, tail = short_conv(x, weight, bias)
    torch.testing.assert_close(y, expected)
    assert tail is None
    torch.testing.assert_close(short_conv(x, weight, activation="silu")[0], F.silu(expected - bias))


@pytest.mark.parametrize("mask", [None, "interior"])
def test_any_split_with_the_tail_carried(mask):
    x, weight, bias, _ = inputs()
    mask_BL = masks(2, 13).get(mask)
    whole, last = short_conv(x, weight, bias, final=True, mask_BL=mask_BL)
    for cuts in [*itertools.combinations(range(1, 13), 2), tuple(range(1, 13))]:
        tail, parts = None, []
        for i, j in itertools.pairwise((0, *cuts, 13)):
            part = None if mask_BL is None else mask_BL[:, i:j]
            y, tail = short_conv(x[:, i:j], weight, bias, initial=tail, final=True, mask_BL=part)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(tail, last)


def test_nothing_depends_on_later_tokens():
    x, weight, bias, _ = inputs()
    early = short_conv(x, weight, bias)[0][:, :6]
    x[:, 6:] = 9.0
    torch.testing.assert_close(short_conv(x, weight, bias)[0][:, :6], early)


@pytest.mark.parametrize("length", [1, 5])
def test_gradients(length):
    x, weight, bias, initial = (t.requires_grad_() for t in inputs(length=length, d=2, taps=3))
    ids = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 2]])[:, :length]
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 1]], dtype=torch.bool)[:, :length]
    for options in ({}, {"segments_BL": ids}, {"mask_BL": mask}, {"mask_BL": mask, "segments_BL": ids}):

        def run(x, weight, bias, initial, options=options):
            return short_conv(x, weight, bias, initial=initial, final=True, **options)

        assert torch.autograd.gradcheck(run, (x, weight, bias, initial))
    assert torch.autograd.gradgradcheck(lambda *a: short_conv(*a)[0], (x, weight, bias))


def test_gradients_of_the_fast_form():
    """float32 takes the library's convolution, which float64 does not."""
    tensors = [t.requires_grad_() for t in inputs(dtype=torch.float32)]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    for (x, weight, bias, initial), f in ((tensors, short_conv), (wide, short_conv_reference)):
        f(x, weight, bias, initial=initial, activation="silu")[0].square().sum().backward()
    for a, b in zip(tensors, wide, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_is_as_good_as_plain_torch(packed):
    x, weight, bias, _ = inputs(length=64, d=32, dtype=torch.float32)
    ids = torch.arange(64).expand(2, -1) // 23 if packed else None
    exact = short_conv_reference(x, weight, bias, segments_BL=ids)[0]
    low = [t.bfloat16() for t in (x, weight, bias)]
    plain = (short_conv_reference(*low, segments_BL=ids)[0] - exact).abs().max()
    y = short_conv(*low, segments_BL=ids)[0]
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= plain
    with torch.autocast("cpu", torch.bfloat16):  # weights in float32, activations as they come
        low[0].requires_grad_(), weight.requires_grad_()
        y = short_conv(low[0], weight, bias, segments_BL=ids)[0]
        y.sum().backward()
    assert y.dtype == low[0].grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    assert (y - exact).abs().max() <= plain


def test_refuses_what_does_not_fit():
    x, weight, bias, initial = inputs()
    with pytest.raises(ConfigError, match="do not fit an input of 5 channels"):
        short_conv(x, weight[:4], bias)
    with pytest.raises(ConfigError, match=r"initial has shape \(2, 2, 5\), but 4 taps need \(2, 3, 5\)"):
        short_conv(x, weight, bias, initial=initial[:, 1:])
    with pytest.raises(ConfigError, match="unknown activation 'sulu'; did you mean 'silu'"):
        short_conv(x, weight, bias, activation="sulu")
    with pytest.raises(ConfigError, match="mask_BL has shape"):
        short_conv(x, weight, mask_BL=torch.ones(2, 12, dtype=torch.bool))


def test_right_align():
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 1]], dtype=torch.bool)
    index = right_align(mask)
    assert torch.equal(index, torch.argsort(mask.int(), dim=-1, stable=True))
    x = torch.randn(4, 2, 5, 3)
    there = take(x, index, 2)
    assert torch.equal(there[0], x[0][:, [1, 4, 0, 2, 3]])
    assert torch.equal(take(there, invert(index), 2), x)
    assert torch.equal(take(x[:, :, :, 0], index, -1), there[..., 0])


def test_segment_runs():
    ids = torch.tensor([[7, 7, 3, 7, 7]])
    assert segment_runs(ids).tolist() == [[0, 0, 1, 2, 2]]
    mask = torch.tensor([[1, 1, 0, 1, 1]], dtype=torch.bool)
    runs = segment_runs(ids, mask)  # what lay between was padding
    assert len(set(runs[mask].tolist())) == 1


@pytest.mark.slow
def test_compiles_without_breaks():
    x, weight, bias, initial = inputs(dtype=torch.float32)
    compiled = torch.compile(short_conv, fullgraph=True, backend="aot_eager", dynamic=False)
    mask, ids = masks(2, 13)["interior"], torch.arange(13).expand(2, -1) // 4
    for options in ({"initial": initial}, {"segments_BL": ids}, {"mask_BL": mask, "segments_BL": ids}):
        w = weight.clone().requires_grad_()
        y = compiled(x, w, bias, final=True, **options)
        torch.testing.assert_close(y, short_conv(x, weight, bias, final=True, **options))
        y[0].sum().backward()
        assert w.grad.isfinite().all()
