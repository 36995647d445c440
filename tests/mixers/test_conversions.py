"""Conversions of one attention layer beside the same mixer with random weights: they start near, and stay ahead.

The inputs resemble their neighbours, as those of a layer inside a language model do, and tokens that resemble each
other attend to each other. Numbers are distances relative to the attention's output.
"""

from __future__ import annotations

import pytest
import torch
from formulas import align, convert, distance, relative_error, teacher, text_like

from zoo.convert.stats import StatsSum

# Mixer, causal, options, how far it may be at the start, what alignment leaves of that, and its rate.
CASES = [
    ("lsh_attention", True, {"chunk": 16, "num_buckets": 8}, 0.27, 1.0, 1e-3),
    ("rwkv4", True, {}, 0.36, 1.0, 2e-3),
    ("mamba", True, {}, 0.70, 0.85, 3e-4),
    ("s4", True, {}, 0.53, 0.93, 1e-3),
    ("s4d", True, {}, 0.53, 0.93, 1e-3),
    ("h3", True, {}, 0.73, 0.75, 1e-3),
    ("hyena", True, {"window": 48}, 0.53, 0.93, 1e-3),
    ("lsh_attention", False, {"chunk": 16, "num_buckets": 8}, 0.27, 1.0, 1e-3),
    ("s4", False, {}, 0.53, 0.88, 1e-3),
    ("nystromformer", False, {"landmarks": 8}, 0.1, 0.97, 3e-4),
    ("linformer", False, {"max_length": 48, "projected_length": 12}, 0.57, 0.92, 3e-3),
]


def alike(causal: bool):
    """Attention whose keys are its queries, so that it looks at what resembles the query."""
    attention = teacher(causal=causal)
    with torch.no_grad():
        attention.k_proj.load_state_dict(attention.q_proj.state_dict())
    return attention


def statistics(attention, x_BLD):
    """What a calibration pass measures."""
    measured = StatsSum()
    measured.add(attention, x_BLD)
    return measured.result()


def of_random_weights(student):
    """The same mixer with its own start, and projections of the size that attention's have here."""
    other = type(student)(student.config, student.width)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name.endswith("_proj.weight"):
                p.normal_(std=student.width**-0.5)
    return other


@pytest.mark.parametrize(("name", "causal", "options", "near", "left", "rate"), CASES, ids=lambda v: str(v)[:15])
def test_a_conversion_starts_near_and_alignment_brings_it_nearer(name, causal, options, near, left, rate):
    attention = alike(causal)
    held_out = text_like(16)
    student = convert(attention, name, statistics(attention, text_like(16)), **options)
    start = relative_error(student, attention, x_BLD=held_out)
    assert start < near
    random = of_random_weights(student)
    assert relative_error(random, attention, x_BLD=held_out) > 0.9
    align(student, attention, steps=30, rate=rate, inputs=lambda: text_like(8))
    assert relative_error(student, attention, x_BLD=held_out) < left * start
    align(random, attention, steps=30, rate=5e-3, inputs=lambda: text_like(8))
    assert relative_error(random, attention, x_BLD=held_out) > 1.1 * start  # more than what the conversion begins with


@pytest.mark.parametrize("name", ["mamba", "h3"])
def test_large_scores_and_biases_leave_the_average_at_the_start(name):
    """Without a denominator the first order of the softmax is worse than nothing where scores are large."""
    attention = alike(causal=True)
    with torch.no_grad():
        for p in attention.q_proj.parameters():
            p.mul_(3)
        attention.v_proj.bias.normal_()
    x_BLD = text_like(16)
    student = convert(attention, name, statistics(attention, x_BLD))
    with torch.no_grad():
        assert distance(student(x_BLD)[0], attention(x_BLD)[0]) < 0.8
    assert relative_error(convert(attention, name), attention, x_BLD=x_BLD) < 1  # without statistics, too
