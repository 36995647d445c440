"""Shifted windows: images and sequences, special tokens, initial biases, conversion."""

from __future__ import annotations

import pytest
import torch
from formulas import align, convert, largest_error, relative_error, teacher

import zoo
from zoo.errors import ConfigError, TraitError
from zoo.mixers.shifted_window import ShiftedWindow, ShiftedWindowOptions

GRID = {"grid_RC": 1 + torch.arange(30).view(5, 6)}


def test_windows_as_large_as_the_image_are_attention():
    attention = teacher(causal=False)
    student = convert(attention, "shifted_window", window=6, shift=3)
    x_BLD = torch.randn(2, 31, 32)
    assert largest_error(student(x_BLD, shared=GRID)[0], attention(x_BLD)[0]) < 1e-5
    narrow = convert(attention, "shifted_window", window=2)
    assert largest_error(narrow(x_BLD, shared=GRID)[0], attention(x_BLD)[0]) > 1e-2


def test_a_class_token_sees_all_and_is_seen_by_all():
    student = convert(teacher(causal=False), "shifted_window", window=2, shift=1).double()
    x_BLD = torch.randn(1, 31, 32, dtype=torch.double).requires_grad_()
    y_BLD = student(x_BLD, shared=GRID)[0]
    (gradient,) = torch.autograd.grad(y_BLD[0, 0].sum(), x_BLD, retain_graph=True)
    assert (gradient.abs().amax(-1) > 0).all()
    (gradient,) = torch.autograd.grad(y_BLD[0, 1].sum(), x_BLD)  # the corner, alone in its shifted window
    assert gradient.abs().amax(-1).nonzero()[:, 1].tolist() == [0, 1]


def test_conversion_starts_close_and_learns():
    attention = teacher(causal=False)
    student = convert(attention, "shifted_window", window=24)
    assert not student.bias_table.any()
    start = relative_error(student, attention)
    assert start < 1
    align(student, attention, steps=20)
    assert relative_error(student, attention) < 0.9 * start


def test_initial_biases():
    torch.manual_seed(0)
    model = zoo.create_model(
        "swin-tiny-patch4-window7-224",
        layers=zoo.registry.model_config("swin-tiny-patch4-window7-224").layers[:2],
        image={"stages": [2]},
    )
    biases = torch.cat([block.mixer.bias_table.flatten() for block in model.model.layers])
    assert biases.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.model.layers[0].ffn.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3, "shift": 3}, r"shift \(3\) must be smaller than window \(3\)"),
        ({"window": 0}, "window: input should be greater than or equal to 1"),
        ({"windw": 3}, "windw: unknown key; did you mean 'window'"),
    ],
)
def test_impossible_windows(options, message):
    with pytest.raises(ConfigError, match=message):
        ShiftedWindowOptions.parse({"num_heads": 2, "head_dim": 4, **options})


def test_there_is_no_causal_form():
    with pytest.raises(TraitError, match="no causal form"):
        ShiftedWindow(ShiftedWindowOptions(num_heads=2, head_dim=4, causal=True), 8)


def test_a_hierarchical_model_needs_the_grid():
    model = zoo.create_model("swin-tiny").model
    with pytest.raises(ValueError, match="needs the grid of its images"):
        model(inputs_embeds=torch.zeros(1, 64, 32))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"stages": [2, 3]}, r"image\.stages: \[2, 3\] are not the 4 layers there are"),
        ({"stages": [1, 1, 1, 1], "image_size": 48}, "a side of 12 patches does not divide by 8"),
        ({"class_token": True}, "there can be no class token"),
        ({"stages": [0, 4]}, "greater than or equal to 1"),
    ],
)
def test_impossible_stages(image, message):
    with pytest.raises(ConfigError, match=message):
        zoo.create_model("swin-tiny", image=image)
