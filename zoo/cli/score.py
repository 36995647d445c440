"""`zoo score`: what a student kept of its teacher and what it costs, as a table and as score.json."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.common import (
    JsonOption,
    console,
    data_source,
    load_tokenizer,
    only_json_on_stdout,
    print_json,
    quiet_libraries,
    say,
)


def score(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The student: a folder of a saved model.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="TEACHER", help="A Hub name, a folder or a GGUF file. Default: what it was made from."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILES",
            help="Text or images it was not trained on: files, globs, or hf:NAME. Default: what its run held out.",
        ),
    ] = None,
    untrained: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The student before training. Default: DIR/initial where there is one."),
    ] = None,
    window: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A window of equal state bytes, trained the same way, as a baseline."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of text.")] = 20480,
    length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens in a row.")] = 512,
    quick: Annotated[bool, typer.Option("--quick", help="A glance: fewer tokens and shorter lengths.")] = False,
    speed: Annotated[bool, typer.Option(help="Measure speed, the slowest part.")] = True,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A folder, a Hub name, or bytes. Default: the teacher's, or the student's."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sample.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for score.json and plots. Default: DIR.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity, distance from the teacher, recall, state bytes and speed, beside the teacher and baselines."""
    with only_json_on_stdout(as_json):
        from zoo.errors import ConfigError, DataError
        from zoo.models.create import read_config

        config = read_config(folder)
        teacher = against or (config.origin or {}).get("source") or _recipe(folder).get("teacher")
        if not teacher and config.task != "image-classification":
            raise ConfigError(f"{folder}: does not say what it was made from; name the teacher with --against")
        images = config.task == "image-classification"
        source = data[0] if images and data and len(data) == 1 else data_source(data or [])
        source = _held_out(folder, images) if source is None else source
        if source is None:
            raise DataError(f"{folder}: no run here that held anything out; name data with --data")
        words = None if tokenizer is None else load_tokenizer(folder, tokenizer)
        quiet_libraries()
        from zoo.train.score import score as measure

        initial = untrained or (folder / "initial" if (folder / "initial" / "config.json").is_file() else None)
        result = measure(
            str(folder),
            teacher=None if not teacher else str(teacher),
            untrained=None if initial is None else str(initial),
            window_baseline=None if window is None else str(window),
            data=source,
            tokenizer=words,
            length=length,
            tokens=tokens,
            speed=speed,
            quick=quick,
            seed=seed,
            train_info=_costs({"student": folder, "window_baseline": window}),
            out=out or folder,
            command=shlex.join(["zoo", *sys.argv[1:]]),
            progress=True,
        )
    if as_json:
        print_json(result.to_json())
        return
    result.table(console())
    say(f"saved in {out or folder}: score.json, and plots where matplotlib is installed")


def _recipe(folder: Path) -> dict[str, Any]:
    """The recipe that was run in a folder, or {}."""
    from zoo.train.folder import read_json

    return read_json(folder / "run.json").get("recipe") or {}


def _held_out(folder: Path, images: bool = False) -> Any:
    """The documents or images that the run in a folder did not train on, or None where no run is recorded."""
    from zoo.errors import DataError
    from zoo.text import split_documents

    recipe = _recipe(folder)
    names = recipe.get("data")
    if not names or not recipe.get("held_out"):
        return None
    source = names if isinstance(names, str) else [Path(name) for name in names]
    if images:
        from zoo.images import open_images, split_images

        return split_images(open_images(source), recipe["held_out"], recipe["seed"])[1]
    held_out = split_documents(source, recipe["held_out"], recipe["seed"])[1]
    if next(iter(held_out), None) is None:
        raise DataError(f"{folder}: its run held out none of the few documents in {names!r}; name others with --data")
    return held_out


def _costs(folders: dict[str, Path | None]) -> dict[str, Any]:
    """What training took, by role, as the runs wrote it."""
    from zoo.train.folder import read_json

    found = {role: read_json(folder / "train.json") for role, folder in folders.items() if folder is not None}
    return {role: info for role, info in found.items() if info}
