"""Conversions of one attention layer, for every registered mixer: they start near, and alignment brings them nearer.

The inputs resemble their neighbours, as those of a layer inside a language model do. Of the two teachers one has keys
that are its queries, so that tokens that resemble each other attend to each other; the other's have nothing to do with
each other. Numbers are distances relative to the attention's output: an output of zeros is at 1.
`python benchmarks/conversions.py` prints them all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from formulas import align, convert, distance, relative_error, teacher, text_like

from zoo.convert.stats import StatsSum
from zoo.registry import list_mixers, mixer_class


class Case(NamedTuple):
    """How far a mixer may be from either teacher at the start, what 30 steps of alignment leave of the first distance,
    the rate of the steps, and the beginnings of names of the parameters that take larger ones."""

    name: str
    causal: bool
    alike: float
    unrelated: float
    left: float
    rate: float
    options: dict[str, Any] = {}  # noqa: RUF012  # a tuple's default is never written to
    fast: tuple[str, ...] = ()


WINDOW = {"window": 8, "sinks": 2}
HASHES = {"chunk": 16, "num_buckets": 8}
PROJECTED = {"max_length": 48, "projected_length": 12}
CASES = [
    Case("big_bird", False, 0.31, 0.45, 0.96, 1e-3, {"block_size": 4, "num_random_blocks": 1}),
    Case("gated_delta_net", True, 0.62, 1.25, 0.98, 3e-3, {}, ("A_log", "dt_bias")),
    Case("gated_linear_attention", True, 0.42, 0.43, 0.98, 1e-3, {}, ("decay_up",)),
    Case("h3", True, 0.69, 0.59, 0.65, 3e-3),
    Case("hgrn2", True, 0.80, 0.88, 0.60, 1e-2, {}, ("bound_logit",)),
    Case("hyena", True, 0.50, 0.59, 0.93, 1e-3, {"window": 48}),
    Case("hyena", False, 0.49, 0.61, 0.80, 1e-3, {"window": 48}),
    Case("hymba", True, 0.22, 0.22, 1.01, 1e-4),  # a norm over all heads, which no training takes back
    Case("kimi_delta_attention", True, 0.62, 1.25, 0.98, 3e-3, {}, ("A_log", "dt_bias")),
    Case("linear_attention", True, 0.37, 0.23, 0.94, 1e-2),
    Case("linear_attention", False, 0.43, 0.32, 0.92, 1e-2),
    Case("linformer", False, 0.10, 0.08, 0.97, 3e-4, PROJECTED),
    Case("local_attention", True, 0.36, 0.56, 0.95, 1e-3, {"chunk": 8}),
    Case("local_attention", False, 0.50, 0.82, 0.91, 1e-3, {"chunk": 8}),
    Case("longformer", True, 0.40, 0.53, 0.95, 1e-3, {"window": 5}),
    Case("longformer", False, 0.57, 0.90, 0.88, 1e-3, {"window": 5}),
    Case("lsh_attention", True, 0.12, 0.15, 0.94, 1e-3, HASHES),
    Case("lsh_attention", False, 0.14, 0.18, 0.95, 1e-3, HASHES),
    Case("mamba", True, 0.66, 0.59, 0.85, 3e-4),
    Case("mamba2", True, 0.42, 0.43, 0.99, 1e-3, {}, ("A_log", "dt_")),
    Case("mla", True, 0.50, 0.45, 0.82, 1e-2),
    Case("mla", False, 0.48, 0.46, 0.90, 1e-2),
    Case("nystromformer", False, 0.08, 0.08, 0.97, 3e-4, {"landmarks": 8}),
    Case("performer", True, 0.33, 0.28, 0.96, 3e-3),
    Case("performer", False, 0.40, 0.41, 0.95, 3e-3),
    Case("retention", True, 0.42, 0.43, 0.98, 1e-3, {}, ("decay_logit_G",)),
    Case("retention", False, 0.45, 0.51, 0.98, 1e-3, {}, ("decay_logit_G",)),
    Case("rwkv4", True, 0.34, 0.30, 0.96, 3e-3, {}, ("log_rate", "bonus")),
    Case("rwkv6", True, 0.60, 0.60, 0.80, 3e-3, {}, ("decay_bias", "bonus")),
    Case("rwkv7", True, 0.60, 0.61, 0.80, 1e-2, {}, ("decay_bias",)),
    Case("s4", True, 0.50, 0.59, 0.92, 1e-3),
    Case("s4", False, 0.49, 0.60, 0.85, 1e-3),
    Case("s4d", True, 0.50, 0.59, 0.92, 1e-3),
    Case("s4d", False, 0.49, 0.60, 0.85, 1e-3),
    Case("scan", False, 0.41, 0.50, 0.95, 3e-3),
    Case("shifted_window", False, 0.68, 0.99, 0.87, 3e-3),
    Case("sliding_window", True, 0.39, 0.52, 0.95, 1e-3, WINDOW),
    Case("sliding_window", False, 0.48, 0.79, 0.90, 1e-3, WINDOW),
    Case("windowed_linear", True, 0.39, 0.52, 0.95, 1e-3, {"linear": "gated_delta_net", **WINDOW}, ("mix_",)),
    Case("windowed_linear", False, 0.47, 0.78, 0.75, 1e-2, {"linear": "linear_attention", **WINDOW}, ("mix_",)),
]
EXACT = [("attention", True), ("attention", False), ("parallel", True), ("parallel", False), ("mobile_bert", False)]
NOTHING_TO_LEARN = [("fnet", False)]  # no weights: nothing can be carried over, and nothing aligned
WORSE_THAN_NOTHING = [case for case in CASES if case.unrelated > 1]  # with that teacher, until aligned


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


def test_every_mixer_and_every_form_is_here():
    forms = [
        (name, causal)
        for name in list_mixers()
        for causal in (True, False)
        if getattr(mixer_class(name).traits, "causal" if causal else "bidirectional")
    ]
    assert sorted([(case.name, case.causal) for case in CASES] + EXACT + NOTHING_TO_LEARN) == sorted(forms)
    assert {case.name for case in WORSE_THAN_NOTHING} == {"gated_delta_net", "kimi_delta_attention"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{'causal' if case.causal else 'two-sided'}")
def test_a_conversion_starts_near_and_alignment_brings_it_nearer(case):
    attention, held_out = alike(case.causal), text_like(16)
    student = convert(attention, case.name, statistics(attention, text_like(16)), **case.options)
    start = relative_error(student, attention, x_BLD=held_out)
    assert start < case.alike < 1
    random = of_random_weights(student)
    assert relative_error(random, attention, x_BLD=held_out) > 0.9
    align(student, attention, rate=case.rate, fast=case.fast, inputs=lambda: text_like(8))
    assert relative_error(student, attention, x_BLD=held_out) < case.left * start
    align(random, attention, rate=5e-3, inputs=lambda: text_like(8))
    assert relative_error(random, attention, x_BLD=held_out) > 1.1 * start  # more than what the conversion begins with
    unrelated = teacher(causal=case.causal)
    other = convert(unrelated, case.name, statistics(unrelated, text_like(16)), **case.options)
    assert relative_error(other, unrelated, x_BLD=held_out) < case.unrelated


@pytest.mark.parametrize(("name", "causal"), EXACT)
def test_what_can_be_exact_is(name, causal):
    for attention in (alike(causal), teacher(causal=causal)):
        assert relative_error(convert(attention, name), attention, x_BLD=text_like(4)) < 1e-5


@pytest.mark.parametrize("case", WORSE_THAN_NOTHING, ids=lambda case: case.name)
def test_what_starts_worse_than_nothing_is_better_than_nothing_once_aligned(case):
    """A delta rule over signed keys that have nothing to do with the queries has little in common with an average."""
    attention, held_out = teacher(causal=True), text_like(16)
    student = convert(attention, case.name, statistics(attention, text_like(16)))
    assert relative_error(student, attention, x_BLD=held_out) > 1
    align(student, attention, rate=1e-2, inputs=lambda: text_like(8))
    assert relative_error(student, attention, x_BLD=held_out) < 0.9


@pytest.mark.parametrize("name", ["retention", "mamba2"])
def test_without_features_signed_scores_have_little_in_common_with_an_average(name):
    attention, x_BLD = teacher(causal=True), text_like(16)
    stats = statistics(attention, text_like(16))
    with_features = convert(attention, name, stats)
    plain = convert(attention, name, stats, feature_map=None)
    assert relative_error(with_features, attention, x_BLD=x_BLD) < 0.45
    assert relative_error(plain, attention, x_BLD=x_BLD) > 1


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
