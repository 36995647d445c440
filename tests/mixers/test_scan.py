"""Scans: the orders, cross-scan as VMamba's own code does it, what a token sees, conversion."""

from __future__ import annotations

import pytest
import torch
from formulas import align, convert, corners, largest_error, relative_error, teacher, wave

import zoo
from zoo.errors import ConfigError, TraitError
from zoo.mixers.scan import Scan, ScanOptions

D = 16
INNER = {"name": "retention", "num_heads": 2, "head_dim": 8}
# `corners` of the mean of VMamba's CrossMerge (commit 25cda6a) over what `retention` answers to its CrossScan.
RECORDED = [0.53674167, -0.332007905, 0.646894821, -0.21737014, 0.159107135, -0.208002424]


def make(**options) -> Scan:
    mixer = Scan(ScanOptions(**{"inner": INNER, **options}), D).double()
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(mixer.named_parameters())):
            p.copy_(0.5 * wave(*p.shape, step=0.3 + 0.02 * i))
    return mixer.eval()


def grid(rows: int, columns: int, special: int = 0) -> dict[str, torch.Tensor]:
    return {"grid_RC": special + torch.arange(rows * columns).view(rows, columns)}


def by_hand(mixer: Scan, x_BLD: torch.Tensor, orders: list[list[int]]) -> torch.Tensor:
    """Each scan token by token: sort, mix, put every answer back where its token stood."""
    total = torch.zeros_like(x_BLD)
    for d, order in enumerate(orders):
        inner = mixer.inner[d if mixer.config.own_weights else 0]
        answer = inner(x_BLD[:, order])[0]
        for place, token in enumerate(order):
            total[:, token] += answer[:, place] / len(orders)
    return total


@pytest.mark.parametrize("own", [False, True])
def test_the_orders(own):
    x_BLD = wave(2, 7, D, step=0.7)  # a class token and 2 x 3 patches
    rows, columns = [0, 1, 2, 3, 4, 5, 6], [0, 1, 4, 2, 5, 3, 6]
    orders = [rows, rows[::-1], columns, columns[::-1]]
    mixer = make(own_weights=own)
    y_BLD = mixer(x_BLD, shared=grid(2, 3, special=1))[0]
    torch.testing.assert_close(y_BLD, by_hand(mixer, x_BLD, orders))
    along = make(own_weights=own, directions="sequence")
    torch.testing.assert_close(along(x_BLD, shared=grid(2, 3, 1))[0], by_hand(along, x_BLD, orders[:2]))
    torch.testing.assert_close(mixer(x_BLD)[0], by_hand(mixer, x_BLD, orders[:2] * 2))  # no image: one row


def test_cross_scan_is_that_of_vmamba():
    y_BLD = make(own_weights=True)(wave(2, 12, D, step=0.7), shared=grid(3, 4))[0]
    assert corners(y_BLD) == pytest.approx(RECORDED, abs=1e-8)


def test_every_token_sees_every_other_one():
    x_BLD = wave(1, 13, D, step=0.7).requires_grad_()
    y_BLD = make()(x_BLD, shared=grid(3, 4, special=1))[0]
    for t in range(13):
        (gradient,) = torch.autograd.grad(y_BLD[0, t].sum(), x_BLD, retain_graph=True)
        assert (gradient.abs().amax(-1) > 0).all()


def test_masked_patches_are_skipped_in_every_order():
    x_BLD = wave(1, 6, D, step=0.7)
    mask_BL = torch.tensor([[True, True, False, True, True, False]])  # a column of 2 x 3
    masked = make()(x_BLD, mask_BL=mask_BL, shared=grid(2, 3))[0][:, mask_BL[0]]
    alone = make()(x_BLD[:, mask_BL[0]], shared=grid(2, 2))[0]
    torch.testing.assert_close(masked, alone)


def test_scans_have_weights_of_their_own_where_asked():
    assert len(make().inner) == 1
    assert len(make(own_weights=True).inner) == 4
    assert len(make(own_weights=True, directions="sequence").inner) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": {"name": "linformer", "num_heads": 2, "head_dim": 8}}, "has no causal form"),
        ({"inner": {**INNER, "causal": False}}, "this one does already"),
        ({"inner": {**INNER, "heads": 2}}, r"inner\.heads: unknown key"),
        ({"inner": {}}, "expected a name or a mapping with 'name'"),
        ({"directions": "diagonal"}, "directions: "),
    ],
)
def test_impossible_scans(options, message):
    with pytest.raises(ConfigError, match=message):
        ScanOptions.parse({"inner": INNER, **options}, "")


def test_no_state_and_no_causal_form():
    with pytest.raises(TraitError, match="no state to carry"):
        make()(torch.zeros(1, 3, D).double(), state=make().init_state(1))
    with pytest.raises(TraitError, match="no causal form"):
        Scan(ScanOptions(inner=INNER, causal=True), D)
    with pytest.raises(ConfigError, match="expected the name of a causal mixer"):
        convert(teacher(causal=False), "scan", inner=3)
    assert convert(teacher(causal=False), "scan").inner[0].name == "linear_attention"


@pytest.mark.parametrize("inner", ["linear_attention", "mamba2"])
def test_conversion_starts_in_scale_and_learns(inner):
    attention = teacher(causal=False)
    student = convert(attention, "scan", inner=inner, directions="sequence")
    start = relative_error(student, attention)
    assert start < 1.5
    torch.testing.assert_close(student.inner[0].q_proj.weight, attention.q_proj.weight)
    align(student, attention, steps=20)
    assert relative_error(student, attention) < 0.9 * start


def test_attention_scanned_both_ways_on_one_token_is_attention():
    attention = teacher(causal=False)
    student = convert(attention, "scan", inner="attention")
    x_BLD = wave(2, 1, 32, step=0.3).float()
    assert largest_error(student(x_BLD)[0], attention(x_BLD)[0]) < 1e-6


def test_a_model_with_scans():
    torch.manual_seed(0)
    model = zoo.create_model("vit-scan-tiny").eval()
    wide, square = torch.randn(1, 3, 32, 64), torch.randn(1, 3, 32, 32)
    assert model(wide).logits.isfinite().all()
    out = model(square).logits
    with torch.no_grad():
        turned = model(square.mT).logits  # rows and columns are scanned by mixers of their own
    assert (out - turned).abs().max() > 1e-6
