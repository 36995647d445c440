"""`zoo export`: a zoo model out, in somebody's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.common import JsonOption, only_json_on_stdout, print_json, quiet_libraries, say


def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder of a saved model.")],
    layout: Annotated[str, typer.Option(metavar="L", help="Whose names: see zoo list --layouts.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the result.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model so that another program can load it; what it cannot express is refused with the reason."""
    with only_json_on_stdout(as_json):
        from zoo.convert.layouts import export_model
        from zoo.models.create import load_folder

        quiet_libraries()
        tokenizer = None
        if (Path(folder) / "tokenizer_config.json").is_file():
            from zoo.cli.common import load_tokenizer

            tokenizer = load_tokenizer(folder)
        if layout == "onnx":
            say("making graphs: torch needs several seconds a layer for each")
        family = export_model(load_folder(folder), layout, out, tokenizer=tokenizer, overwrite=overwrite)
    if as_json:
        print_json({"layout": family.layout, "family": family.name, "class": family.about, "out": str(out)})
        return
    say(f"written to {out} as {family.about or family.name} (layout {family.layout})")
