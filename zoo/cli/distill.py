"""`zoo distill`: run a recipe that has a teacher."""

from __future__ import annotations

from zoo.cli.common import JsonOption
from zoo.cli.train import OverridesArgument, OverwriteOption, RecipeArgument, run_recipe


def distill(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe that converts a teacher and trains the student against it, in stages.

    A run that was stopped goes on where it was when the same command is given again.
    """
    run_recipe(recipe, overrides or [], overwrite, as_json, needs_teacher=True)
