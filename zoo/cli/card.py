"""`zoo card`: the model card, from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.common import JsonOption, only_json_on_stdout, parse_options, print_json


def card(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of models that were scored: score.json is in them.")
    ],
    repo: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="The repository on the Hub from which readers load it.")
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Of these weights, such as apache-2.0.")
    ] = None,
    facts: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Another fact: title, teacher_license, data, datasets, limits, ... (docs/cards.md). null removes one.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail where a card is not what was measured.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a README.md that was not written by this command.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write README.md, the model card, from score.json and what the run recorded.

    What was not measured is not on it. A score of other weights than those in the folder is refused.
    """
    with only_json_on_stdout(as_json):
        from zoo.errors import ConfigError
        from zoo.train import card as cards

        given = parse_options(facts or [], "--set")
        given |= {key: value for key, value in (("repo", repo), ("license", license_)) if value is not None}
        if check and given:
            raise ConfigError("--check writes nothing; leave out --repo, --license and --set")
        if given and len(folders) > 1:
            raise ConfigError("facts belong to one model; give --repo, --license and --set with one folder")
        written = []
        for folder in folders:
            if check:
                cards.verify_card(folder)
            else:
                cards.card(folder, overwrite=overwrite, **given)
            written.append(str(folder / cards.CARD))
    if as_json:
        print_json({"checked" if check else "written": written})
        return
    for path in written:
        print(f"{path}: {'says what was measured' if check else 'written'}")
