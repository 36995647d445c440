"""`zoo train`: run a recipe."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer

from zoo.cli.common import JsonOption, only_json_on_stdout, print_json, print_table, quiet_libraries, say

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that is installed.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to set, such as stages.0.lr=1e-3."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Remove the run that is in `out` and start anew.")]


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: create a model (or convert a teacher) and train it in stages.

    A run that was stopped goes on where it was when the same command is given again.
    """
    run_recipe(recipe, overrides or [], overwrite, as_json, needs_teacher=False)


def run_recipe(recipe: str, overrides: list[str], overwrite: bool, as_json: bool, needs_teacher: bool) -> None:
    """What `zoo train` and `zoo distill` do."""
    from zoo.errors import ConfigError

    with only_json_on_stdout(as_json):
        from zoo.train.recipe import load_recipe

        loaded = load_recipe(recipe, overrides)
        if loaded.out is None:
            raise ConfigError("out: this key is needed; name a folder for the result, such as out=runs/first")
        if needs_teacher and loaded.teacher is None:
            raise ConfigError("teacher: this key is needed, such as teacher=HuggingFaceTB/SmolLM2-135M-Instruct")
        quiet_libraries()
        from zoo.train.api import train_recipe

        result = train_recipe(loaded, overwrite=overwrite, command=shlex.join(["zoo", *sys.argv[1:]]))
    summary = {"out": loaded.out, "tokens": result.tokens, "cpu_seconds": result.cpu_seconds, "stages": result.stages}
    if as_json:
        print_json(summary)
        return
    print_stages(summary)
    images = result.model.config.task == "image-classification"
    score = [f"zoo score {loaded.out}"] if loaded.teacher or images else []
    follows = ", or ".join([*score, *([] if images else [f"zoo generate {loaded.out} --prompt TEXT"])])
    say(f"saved in {loaded.out}; next: {follows}")


def print_stages(summary: dict[str, Any]) -> None:
    """A line a stage."""
    names = list(dict.fromkeys(key for stage in summary["stages"] for key in stage))
    rows = [[_short(stage.get(name)) for name in names] for stage in summary["stages"]]
    print_table(names, rows, right=names[1:])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
