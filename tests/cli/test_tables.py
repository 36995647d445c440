"""zoo list, show, backends: tables, JSON, and what a misspelt name is answered with."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.cli.show import LENGTHS, describe
from zoo.models.costs import empty_model, parameter_counts, size_of, state_size
from zoo.models.depth import routed_blocks
from zoo.models.state import state_bytes
from zoo.registry import model_config


def test_list_shows_names_in_natural_order(run):
    lines = run("list", "gpt2-*").out.splitlines()
    assert lines[0].split() == ["model", "task", "layers", "width", "parameters", "state", "mixers", "weights"]
    assert [line.split()[0] for line in lines[1:]] == zoo.list_models("gpt2-*")


def test_list_as_json(run):
    rows = run("list", "--json").json()
    assert [row["name"] for row in rows] == zoo.list_models()
    row = next(row for row in rows if row["name"] == "windowed-linear-h-tiny")
    assert row["mixers"] == "2 windowed_linear, 1 attention"
    assert (row["layers"], row["hidden_size"], row["task"]) == (3, 64, "causal-lm")


def test_list_filters(run):
    assert [r["name"] for r in run("list", "bert", "--json").json()] == zoo.list_models("*bert*")
    assert [r["name"] for r in run("list", "--task", "masked-lm", "--json").json()] == zoo.list_models(task="masked-lm")
    names = [r["name"] for r in run("list", "--mixer", "mamba2", "--json").json()]
    assert names == zoo.list_models(mixer="mamba2")
    assert [r["name"] for r in run("list", "--pretrained", "--json").json()] == zoo.list_models(pretrained=True)
    assert run("list", "x*", "--json").json() == []


def test_list_mixers(run):
    rows = {row["name"]: row for row in run("list", "--mixers", "--json").json()}
    assert sorted(rows) == zoo.list_mixers()
    assert rows["attention"]["state"] == "grows"
    assert rows["mamba2"]["direction"] == "causal"
    assert "2405.21060" in rows["mamba2"]["about"]
    assert "retention" in run("list", "--mixers").out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["list", "retnet-tny"], "unknown model 'retnet-tny'; did you mean 'retnet-tiny'"),
        (["list", "--mixers", "retntion"], "unknown mixer 'retntion'; did you mean 'retention'"),
        (["list", "--mixer", "gated_delta"], "unknown mixer 'gated_delta'; did you mean 'gated_delta_net'"),
        (["list", "--task", "causal_lm"], "unknown task 'causal_lm'; did you mean 'causal-lm'?"),
        (["show", "mamba2-130"], "unknown model 'mamba2-130'; did you mean 'mamba2-130m'"),
        (["show", "./nothing"], "nothing: no such folder"),
    ],
)
def test_misspelt_names(run, args, message):
    assert run(*args).error.startswith(message)


@pytest.mark.parametrize("name", zoo.list_models("*-tiny"))
def test_show_counts_what_a_real_model_has(name):
    info = describe(name)
    model = zoo.create_model(name).eval()
    assert info["parameters"] == sum(p.numel() for p in model.parameters())
    embeddings = sum(p.numel() for n, p in model.named_parameters() if "embed" in n and "norm" not in n)
    if not model.config.tie_word_embeddings:
        embeddings += model.lm_head.weight.numel()
    assert info["parameters_without_embeddings"] == info["parameters"] - embeddings
    assert sum(_count(group["layers"]) for group in info["layers"]) == model.config.num_hidden_layers
    for length in LENGTHS[:1]:
        counted = info["state_bytes"][str(length)]
        if model.config.task != "causal-lm":
            assert counted is None
        else:
            cache = model(torch.ones(1, length, dtype=torch.long), use_cache=True).past_key_values
            taken = [block.chosen_BL.sum().item() for block in routed_blocks(model)]
            assert counted == state_bytes(cache) or any(n != length * 0.5 for n in taken)


def _count(layers: str) -> int:
    first, _, last = layers.partition("-")
    return int(last or first) - int(first) + 1


def test_show_collapses_equal_layers(run):
    assert [g["layers"] for g in describe("windowed-linear-h-tiny")["layers"]] == ["0-1", "2"]
    assert [g["layers"] for g in describe("gated-deltanet-h-tiny")["layers"]] == ["0", "1", "2", "3"]
    shown = run("show", "mamba2-2.7b").out
    assert "0-63  mamba2" in shown
    assert "2,702,599,680" in shown
    assert "171,900,928" in shown


def test_show_counts_products_and_state():
    info = describe("transformer-tiny")
    a_layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    linear = 2 * (2 * a_layer + 64 * 256)
    for length in LENGTHS:  # attention: scores and values of every pair, in heads of 16, four of them, in two layers
        assert info["flops_per_token"][str(length)] == linear + 2 * 2 * length * 64 * 2
    assert info["state_bytes"] == {str(n): 2 * 2 * 2 * 16 * 4 * n for n in LENGTHS}
    assert describe("gpt2-tiny")["state_bytes"]["2048"] is None  # beyond its learned positions


def test_show_at_a_length_of_ones_own(run):
    info = run("show", "transformer-tiny", "--length", "100", "--length", "200", "--json").json()
    assert list(info["state_bytes"]) == list(info["flops_per_token"]) == ["100", "200"]
    assert "FLOPs a token at 100" in run("show", "transformer-tiny", "--length", "100").out


def test_products_of_a_recurrence_do_not_grow_with_the_length():
    flops = describe("retnet-tiny", (1024, 4096))["flops_per_token"]
    assert flops["1024"] == pytest.approx(flops["4096"], rel=0.02)
    attention = describe("transformer-tiny", (1024, 4096))["flops_per_token"]
    assert attention["4096"] > 2 * attention["1024"]


def test_list_counts_all_of_equal_layers_though_it_makes_one():
    for name in zoo.list_models("*-tiny"):
        config = model_config(name)
        model = empty_model(config)
        assert size_of(config) == (parameter_counts(model)[0], state_size(model)), name
    assert size_of(model_config("gpt2-124m"))[0] == 124_439_808


def test_list_says_what_a_state_costs(run):
    rows = {row["name"]: row for row in run("list", "*-tiny", "--json").json()}
    assert rows["transformer-tiny"]["state"] == {"constant": 0, "per_token": 2 * 2 * 2 * 16 * 4}
    assert rows["retnet-tiny"]["state"]["per_token"] == 0
    assert rows["retnet-tiny"]["state"]["constant"] == describe("retnet-tiny")["state_bytes"]["8192"]
    assert rows["bert-tiny"]["state"] is None
    assert rows["bert-tiny"]["parameters"] == describe("bert-tiny")["parameters"]
    shown = run("list", "transformer-tiny").out
    assert "512 bytes a token" in shown
    assert shown.split()[-1] == "none"  # no weights are published


def test_show_leaves_nothing_behind():
    describe("transformer-tiny")
    assert torch.isfinite(zoo.create_model("transformer-tiny")(torch.ones(1, 8, dtype=torch.long)).logits).all()


def test_show_of_a_folder(run, student):
    info = run("show", student, "--json").json()
    assert [g["mixer"] for g in info["layers"]] == ["windowed_linear", "attention", "windowed_linear"]
    assert info["origin"]
    assert "made from" in run("show", student).out


def test_show_of_a_foreign_folder(run, teacher):
    assert "model_type is 'llama', not 'zoo'; `zoo convert" in run("show", teacher).error


def test_backends(run):
    rows = run("backends", "--json").json()
    assert rows == zoo.backends()
    assert {"attention", "delta_rule", "linear_recurrence", "short_conv", "window_attention"} <= {r["op"] for r in rows}
    assert "sdpa" in run("backends").out
