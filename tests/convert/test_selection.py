"""Reading `keep`, attention statistics, and the one-layer scan against brute force."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from conftest import motif_rows

from zoo.convert.layerwise import Trace, embed, mixer_input
from zoo.convert.selection import parse_keep, restore_scan, select_layers, sensitivity_scan
from zoo.convert.stats import StatsSum
from zoo.convert.surgery import make_mixer, replace_mixers
from zoo.convert.teachers import load_teacher
from zoo.errors import ConversionError

WINDOW = {"name": "sliding_window", "window": 4, "sinks": 1}


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("all", tuple(range(12))),
        ("none", ()),
        ([7, 2], (2, 7)),
        ("7, 2", (2, 7)),
        ([], ()),
        ("first:2", (0, 1)),
        ("last:2", (10, 11)),
        ("uniform:1/3", (0, 3, 6, 9)),
        ("uniform:0.25", (0, 4, 8)),
        ("uniform:5", (0, 2, 4, 7, 9)),
        ("uniform:12", tuple(range(12))),
        ("uniform:1/100", (0,)),
    ],
)
def test_keep_names_layers(spec, layers):
    assert parse_keep(spec, 12).layers == layers


def test_keep_by_sensitivity_is_left_to_the_scan():
    keep = parse_keep("sensitivity:1/5", 30)
    assert (keep.layers, keep.count, keep.rounds) == (None, 6, 1)
    assert parse_keep("sensitivity:1/3", 32).count == 10  # at most the share
    assert parse_keep("sensitivity:4,rounds=3", 30).rounds == 3


def test_keep_counts_attention_layers_only():
    assert parse_keep("uniform:2", [1, 3, 5, 7]).layers == (1, 5)
    with pytest.raises(ConversionError, match="no attention layer 2; the teacher has 1, 3, 5, 7"):
        parse_keep([2], [1, 3, 5, 7])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("sensitivty:1/3", "did you mean 'sensitivity'"),
        ("sensitivity", "cannot read 'sensitivity'; write 'all', 'none'"),
        ("non", "did you mean 'none'"),
        ("uniform:0", "from 1 to 12"),
        ("uniform:13", "from 1 to 12"),
        ("uniform:3/2", "a share from 0 to 1"),
        ("uniform:1/0", "a number of layers or a share such as"),
        ("uniform:1.2.3", "a number of layers or a share such as"),
        ("first:2,rounds=3", "only with 'sensitivity'"),
        ("sensitivity:2,rounds=0", "from 1 to 100"),
        ([12], "no attention layer 12; the teacher has 0 to 11"),
        ([-1], "no attention layer -1"),
        ([1, 1], "named twice"),
        ([1.5], "cannot read"),
        ([True], "cannot read"),
        (0.3, "cannot read 0.3"),
        (None, "cannot read None"),
    ],
)
def test_keep_that_cannot_be_read_is_refused(spec, says):
    with pytest.raises(ConversionError, match=says):
        parse_keep(spec, 12)


def plain_maps(mixer, x_NLD):
    """The attention maps and outputs of a zoo attention layer in float64, written plainly; no rotary, no QK-norm."""
    c = mixer.config
    q, k, v = (
        getattr(mixer, f"{n}_proj")(x_NLD).double().unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for n in "qkv"
    )
    scores = q @ k.mT * c.softmax_scale
    L = x_NLD.shape[1]
    ago = torch.arange(L)[:, None] - torch.arange(L)
    unseen = ago < 0 if c.causal else torch.zeros_like(ago, dtype=torch.bool)
    if c.window is not None:
        unseen = unseen | (ago.abs() >= c.window)
    a = scores.masked_fill(unseen, float("-inf")).softmax(-1)
    return q, k, a, ago.abs(), a @ v


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("at_once", [1 << 23, 500])
def test_stats_against_whole_maps(family, at_once, request, monkeypatch):
    monkeypatch.setattr("zoo.convert.stats.SCORES_AT_ONCE", at_once)
    model = load_teacher(request.getfixturevalue(family)).model
    tokens = torch.randint(0, 40, (3, 20))
    block = model.model.layers[0]
    with torch.no_grad():
        block.mixer.q_proj.weight.mul_(30)  # maps that are far from flat
        x_NLD = mixer_input(block, embed(model, tokens))
        q, k, a, ago, out = plain_maps(block.mixer, x_NLD)
        sums = StatsSum()
        sums.add(block.mixer, x_NLD[:1])
        sums.add(block.mixer, x_NLD[1:])
    stats = sums.result()
    torch.testing.assert_close(stats.lookback_H.double(), (a * ago).sum(-1).mean((0, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.q_norm_H.double(), q.norm(dim=-1).mean((0, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.k_norm_H.double(), k.norm(dim=-1).mean((0, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.out_rms_H.double(), out.square().mean((0, 2, 3)).sqrt(), rtol=1e-4, atol=1e-5)


def test_stats_count_a_key_once_for_every_query_head(llama):
    stats = Trace(load_teacher(llama).model, torch.randint(0, 40, (2, 12))).stats
    assert set(stats) == {0, 1}
    assert stats[0].k_norm_H.shape == (4,)
    assert stats[0].k_norm_H[0] == stats[0].k_norm_H[1] != stats[0].k_norm_H[2]


@torch.no_grad()
def brute_force_kl(teacher, student, tokens):
    """KL(teacher || student) in nats a token, from two whole float32 forward passes."""
    a, b = (m(tokens).logits.double().log_softmax(-1) for m in (teacher, student))
    return float(F.kl_div(b, a, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("rows_at_once", [2048, 50])
def test_scan_equals_swapping_whole_models(trained_llama, rows_at_once, monkeypatch):
    monkeypatch.setattr("zoo.convert.layerwise.TOKENS_AT_ONCE", rows_at_once)
    monkeypatch.setattr("zoo.convert.layerwise.LOGITS_AT_ONCE", 32 * 10)  # several pieces of a row
    model, tokens = trained_llama.model, motif_rows(5, 24, seed=0)
    before = copy.deepcopy(model.state_dict())
    trace = Trace(model, tokens, fast=False)
    found = sensitivity_scan(model, WINDOW, trace=trace)
    expected = [brute_force_kl(model, replace_mixers(model, {i: WINDOW}), tokens) for i in range(3)]
    assert min(expected) > 0
    assert max(expected) > 3 * min(expected)  # there is something to rank
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-6)
    assert [b.mixer.name for b in model.model.layers] == ["attention"] * 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_scan_without_kept_probabilities_is_the_same(trained_llama, monkeypatch):
    model, tokens = trained_llama.model, motif_rows(3, 24, seed=0)
    kept = sensitivity_scan(model, WINDOW, trace=Trace(model, tokens, fast=False))
    monkeypatch.setattr("zoo.convert.layerwise.KEPT_PROBABILITIES", 0)
    assert sensitivity_scan(model, WINDOW, trace=Trace(model, tokens, fast=False)) == pytest.approx(
        kept, rel=1e-3, abs=1e-6
    )


def test_fast_scan_is_close_and_sees_no_difference_where_there_is_none(trained_llama):
    model, tokens = trained_llama.model, motif_rows(4, 24, seed=0)
    exact = sensitivity_scan(model, WINDOW, trace=Trace(model, tokens, fast=False))
    fast = sensitivity_scan(model, WINDOW, tokens)
    assert fast == pytest.approx(exact, rel=0.15)
    assert max(sensitivity_scan(model, "attention", tokens)) < 1e-6  # bf16 alone must not look like a loss


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_scan_for_other_families(family, request):
    model = load_teacher(request.getfixturevalue(family)).model
    with torch.no_grad():
        for block in model.model.layers:
            block.mixer.q_proj.weight.mul_(30)
            block.mixer.v_proj.weight.mul_(10)
        model.lm_head.weight.mul_(20)  # a random head says too little to be missed
    tokens = torch.randint(0, 40, (2, 30))
    found = sensitivity_scan(model, WINDOW, trace=Trace(model, tokens, fast=False))
    expected = [brute_force_kl(model, replace_mixers(model, {i: WINDOW}), tokens) for i in range(2)]
    assert min(expected) > 1e-5
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-2, atol=1e-7)


def joint_kl(model, kept, tokens):
    return brute_force_kl(model, replace_mixers(model, {i: WINDOW for i in range(3) if i not in kept}), tokens)


@pytest.mark.parametrize("rows_at_once", [2048, 50])
def test_restoring_equals_swapping_whole_models(trained_llama, rows_at_once, monkeypatch):
    monkeypatch.setattr("zoo.convert.layerwise.TOKENS_AT_ONCE", rows_at_once)
    model, tokens = trained_llama.model, motif_rows(5, 24, seed=0)
    mixers = {i: make_mixer(model, i, WINDOW) for i in range(3)}
    found = restore_scan(model, mixers, Trace(model, tokens, fast=False))
    none = joint_kl(model, [], tokens)
    expected = [none - joint_kl(model, [i], tokens) for i in range(3)]
    assert max(expected) > 0.1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-5)
    assert [b.mixer.name for b in model.model.layers] == ["attention"] * 3


@pytest.mark.parametrize("count", [1, 2])
def test_selection_is_the_best_there_is_on_a_small_model(trained_llama, count):
    model, tokens = trained_llama.model, motif_rows(4, 24, seed=0)
    chosen = select_layers(model, WINDOW, count, Trace(model, tokens, fast=False))
    choices = [list(c) for c in combinations(range(3), count)]
    assert joint_kl(model, chosen.kept, tokens) == min(joint_kl(model, kept, tokens) for kept in choices)


def test_a_layer_must_be_missed_and_gain_to_rank_high(trained_llama, monkeypatch):
    model = trained_llama.model
    trace = Trace(model, motif_rows(2, 16, seed=0), fast=False)
    monkeypatch.setattr("zoo.convert.selection.sensitivity_scan", lambda *a, **k: [3.0, 2.0, 0.1])
    monkeypatch.setattr("zoo.convert.selection.restore_scan", lambda *a, **k: [-1.0, 0.5, 0.6])
    assert select_layers(model, WINDOW, 1, trace).kept == [1]
    assert select_layers(model, WINDOW, 2, trace).kept == [1, 2]
    monkeypatch.setattr("zoo.convert.selection.restore_scan", lambda *a, **k: [0.0, 0.0, 0.0])
    assert select_layers(model, WINDOW, 1, trace).kept == [0]  # nothing gains: by what is missed


def test_exchanges_find_a_better_pair_than_a_wrong_start(trained_llama, monkeypatch):
    """From the worst ranking there is, exchanges must climb to a choice that brute force confirms to be better."""
    model, tokens = trained_llama.model, motif_rows(4, 24, seed=0)
    trace = Trace(model, tokens, fast=False)
    scores = sensitivity_scan(model, WINDOW, trace=trace)
    monkeypatch.setattr("zoo.convert.selection.sensitivity_scan", lambda *a, **k: [-s for s in scores])
    monkeypatch.setattr("zoo.convert.selection.restore_scan", lambda *a, **k: [0.0] * 3)
    start = select_layers(model, WINDOW, 1, trace).kept
    end = select_layers(model, WINDOW, 1, trace, rounds=5).kept
    assert start != end
    assert joint_kl(model, end, tokens) < joint_kl(model, start, tokens)
    assert joint_kl(model, end, tokens) == pytest.approx(min(joint_kl(model, [i], tokens) for i in range(3)))
    assert [b.mixer.name for b in model.model.layers] == ["attention"] * 3
