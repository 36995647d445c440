"""`zoo pull`: a model of the Hub as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.common import JsonOption, only_json_on_stdout, print_json, quiet_libraries, say


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="org/name, or org/name@revision.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the result.")],
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="A branch, a tag or a commit, as after the @.")
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A file to take instead of the usual weights. Repeatable."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take a model from the Hub: weights, config, tokenizer and card, from one commit that is named in full."""
    with only_json_on_stdout(as_json):
        from zoo.hub.pull import pull as run

        quiet_libraries()
        taken = run(repo, out, revision=revision, files=file or (), overwrite=overwrite)
    if as_json:
        print_json({"repo": taken.repo, "revision": taken.revision, "out": str(out), "files": list(taken.files)})
        return
    print(f"{taken.repo}@{taken.revision}")
    say(f"saved in {out} ({len(taken.files)} files); next: zoo show {out}")
