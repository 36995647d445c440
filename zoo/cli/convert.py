"""`zoo convert`: a Transformer in, a cheaper model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.common import (
    JsonOption,
    data_source,
    only_json_on_stdout,
    parse_options,
    print_json,
    print_table,
    quiet_libraries,
    say,
)


def convert(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A Hub name, a folder, or a GGUF file.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the result.")],
    mixer: Annotated[
        str | None,
        typer.Option(metavar="M", help="What replaces attention: a name of `zoo list --mixers`, or M+window."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Layers that keep attention: all, none, 0,8,17, first:K, last:K, uniform:1/3 or sensitivity:1/3 "
            "(chosen by a scan). Default: none with a mixer, all without.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", metavar="KEY=VALUE", help="An option of the mixer, such as window=64. Repeatable."
        ),
    ] = None,
    ffn: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="MLPs to mixtures of experts: upcycle (copies) or moefy (parts)."),
    ] = None,
    ffn_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the mixture, such as num_experts=8. Repeatable."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="A layout that must be able to hold the result, such as transformers: options are set for it.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILES",
            help="Text to scan and calibrate on: files, globs, or hf:NAME. Repeatable. Default: the teacher writes it.",
        ),
    ] = None,
    calibrate: Annotated[bool, typer.Option(help="Refit output projections where that helps.")] = True,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to measure on.")] = 2048,
    length: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens in a row.")] = 512,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sampling.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Replace the attention of a Transformer by an efficient mixer; the result can be distilled, scored and used."""
    options, ffn_options = parse_options(option or []), parse_options(ffn_option or [])
    source = data_source(data or [])
    with only_json_on_stdout(as_json):
        from zoo.convert.api import convert as run

        quiet_libraries()
        student = run(
            teacher,
            mixer,
            keep=keep,
            mixer_options=options or None,
            ffn=ffn,
            ffn_options=ffn_options or None,
            target=target,
            data=source,
            calibrate=calibrate,
            tokens=tokens,
            length=length,
            seed=seed,
            out=out,
            overwrite=overwrite,
        )
    report = student.report
    if as_json:
        print_json({**report.to_dict(), "out": str(out)})
        return
    print(report.summary())
    if report.mixer is not None:
        from zoo.convert.report import COLUMNS

        print_table(COLUMNS, [report._row(layer) for layer in report.layers], right=COLUMNS[2:7])
    if target is not None:
        say(f"for {target}: zoo export {out} --layout {target} --out DIR")
    say(f"saved in {out}; next: zoo score {out} --data FILES, or zoo generate {out} --prompt TEXT")
