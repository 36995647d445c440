"""`zoo import`: somebody's checkpoint in, a zoo model out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.common import JsonOption, only_json_on_stdout, print_json, quiet_libraries, say

if TYPE_CHECKING:
    from zoo.convert.layouts import Imported


def import_(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="A folder, a file, a repository, org/name[@revision], or NAME.TAG."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the result.")],
    layout: Annotated[
        str | None, typer.Option(metavar="L", help="Whose names: see zoo list --layouts. Default: guessed, and said.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16. Default: as stored.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="A folder or a Hub name. Default: the one beside the weights.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="NAME", help="The file of weights in a repository, such as RWKV-4.pth.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read an official checkpoint exactly: names, shapes and options are checked before anything is loaded."""
    with only_json_on_stdout(as_json):
        from zoo.errors import CheckpointError

        quiet_libraries()
        if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
            raise CheckpointError(f"{out}: exists already; --overwrite replaces it")
        found = _read(checkpoint, file, _dtype(dtype), layout=layout, tokenizer=tokenizer)
        found.model.save_pretrained(out)
        if found.tokenizer is not None:
            found.tokenizer.save_pretrained(out)
    parameters = sum(p.numel() for p in found.model.parameters())
    if as_json:
        facts = {"layout": found.layout, "family": found.family, "parameters": parameters}
        print_json({**facts, "dtype": str(found.model.dtype).removeprefix("torch."), "out": str(out)})
        return
    say(f"read as {found.family} in the layout {found.layout}: {parameters:,} parameters, {found.model.dtype}")
    if found.tokenizer is None:
        say(f"saved in {out}, without a tokenizer; next: zoo show {out}")
    else:
        say(f"saved in {out}; next: zoo show {out}, zoo generate {out} --prompt TEXT")


def _read(checkpoint: str, file: str | None, dtype: Any, **given: str | None) -> Imported:
    """What `checkpoint` names: a tag of the registry says all by itself, for anything else `given` is asked."""
    from zoo.convert.layouts import import_checkpoint
    from zoo.errors import CheckpointError
    from zoo.hub.pretrained import import_published
    from zoo.registry import tag_of

    source = None if Path(checkpoint).exists() else tag_of(checkpoint)
    if source is None:
        place, came_from = _place(checkpoint, file)
        found = import_checkpoint(place, dtype=dtype, **given)
        found.model.config.origin = {**found.model.config.origin, **came_from}
        return found
    for option, value in {"file": file, **given}.items():
        if value is not None:
            raise CheckpointError(f"--{option}: {checkpoint} says that itself")
    return import_published(source, dtype=dtype)


def _place(checkpoint: str, file: str | None) -> tuple[Path, dict[str, Any]]:
    """Where the files are, and what a config records of the repository they came from; {} for files of one's own."""
    path = Path(checkpoint)
    if path.exists() or not re.fullmatch(r"(hf-hub:)?[\w.-]+/[\w.-]+(@\S+)?", checkpoint):
        return (path if file is None else path / file), {}
    from zoo.hub.client import parse_reference
    from zoo.hub.pull import origin, snapshot

    taken = snapshot(*parse_reference(checkpoint), files=[] if file is None else [file])
    return (taken.folder if file is None else taken.folder / file), origin(taken)


def _dtype(name: str | None) -> Any:
    import torch

    from zoo.errors import ConfigError, did_you_mean

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name is not None and name not in known:
        raise ConfigError(f"--dtype {name!r}{did_you_mean(name, known)}")
    return None if name is None else known[name]
