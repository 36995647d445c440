"""Recipes: strict, overridable, and wrong keys are named with their path."""

import pytest

from zoo.errors import ConfigError
from zoo.train.recipe import Recipe, Schedule, Stage, list_recipes, load_recipe, parse_stages

STAGE = {"kind": "distill", "budget": {"tokens": 1000}}


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_in_the_house_is_valid(name):
    recipe = load_recipe(name)
    assert Recipe.parse(recipe.plain()) == recipe


def test_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("teacher: a\nmixer: b\nstages:\n- {kind: distill, budget: {tokens: 1e3}, schedule: linear}\n")
    overrides = ["stages.0.lr=1e-3", "stages.0.schedule.final=0.5", "stages.0.loss.kl=2", "keep=[0, 1]", "mixer=mamba2"]
    recipe = load_recipe(path, overrides)
    assert recipe.stages[0].lr == 1e-3
    assert recipe.stages[0].budget.tokens == 1000
    assert (recipe.stages[0].schedule.name, recipe.stages[0].schedule.final) == ("linear", 0.5)
    assert recipe.stages[0].weights.kl == 2
    assert (recipe.keep, recipe.mixer) == ([0, 1], "mamba2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.lrr=1", r"stages\.0\.lrr: unknown key; did you mean 'lr'"),
        ("stages.0.schedule.warmpu=1", r"stages\.0\.schedule\.warmpu: unknown key; did you mean 'warmup'"),
        ("stages.0.budget.token=1", r"stages\.0\.budget\.token: unknown key; did you mean 'tokens'"),
        ("stages.1.lr=1", r"stages\.1: expected a number from 0 to 0"),
        ("stages.x.lr=1", r"stages\.x: expected a number"),
        ("stages.0.lr=abc", r"stages\.0\.lr: .*'abc'"),
        ("stages.0.lr=-1", r"stages\.0\.lr: .*greater than 0, got -1"),
        ("stages.0.kind=distil", r"stages\.0\.kind: .*'distil'"),
        ("stages.0.budget.seconds=3", r"exactly one of .*tokens and seconds"),
        ("teachr=x", r"teachr: unknown key; did you mean 'teacher'"),
        ("model=x", r"either model"),
        ("lr", r"key\.path=value"),
        ("teacher.name=1", r"teacher"),
    ],
)
def test_wrong_overrides_are_named(tmp_path, override, message):
    path = tmp_path / "r.yaml"
    path.write_text("teacher: a\nmixer: retention\nstages:\n- {kind: distill, budget: {tokens: 1000}}\n")
    with pytest.raises(ConfigError, match=message):
        load_recipe(path, [override])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**STAGE, "kind": "align", "loss": {"kl": 1.0}}, "align"),
        ({**STAGE, "kind": "pretrain", "loss": {"kl": 1.0}}, "no teacher"),
        ({**STAGE, "loss": {}}, "nothing to learn"),
        ({**STAGE, "epochs": 2, "budget": {"seconds": 10}}, "budget in tokens"),
        ({**STAGE, "epochs": 2, "packing": "none"}, "counts full rows"),
        ({**STAGE, "loss": {"embedding": 1.0}}, "packing must be none, not separate"),
        ({**STAGE, "kind": "align", "packing": "none", "loss": {"embedding": 1.0}}, "compares mixers only"),
        ({**STAGE, "kind": "finetune", "packing": "none", "loss": {"embedding": 1.0}}, "no teacher"),
        ({**STAGE, "betas": [0.9, 1.0]}, "beta"),
        ({"kind": "distill"}, "budget"),
        ({**STAGE, "length": "512"}, "length"),
    ],
)
def test_impossible_stages_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Stage.parse(values)


def test_recipe_names():
    with pytest.raises(ConfigError, match="did you mean 'quick'"):
        load_recipe("quik")
    assert parse_stages("configs/recipes/quick.yaml") == load_recipe("quick").stages
    with pytest.raises(ConfigError, match="there is none"):
        parse_stages([])


def test_schedules():
    cosine = Schedule(name="cosine", warmup=0.1, final=0.2)
    assert cosine.factor(0.05) == pytest.approx(0.5)
    assert cosine.factor(0.1) == pytest.approx(1.0)
    assert cosine.factor(0.55) == pytest.approx(0.6)
    assert cosine.factor(1.0) == pytest.approx(0.2)
    wsd = Schedule(name="wsd", warmup=0.0, final=0.0, decay=0.5)
    assert [wsd.factor(f) for f in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 0.5, 0])
    assert Schedule(name="constant").factor(0.9) == 1
    assert Schedule(name="linear", warmup=0.0, final=0.5).factor(0.5) == pytest.approx(0.75)
