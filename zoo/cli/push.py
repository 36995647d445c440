"""`zoo push`: a saved model to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.common import JsonOption, only_json_on_stdout, print_json, print_table, quiet_libraries, say


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a saved model.")],
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="The repository, org/name or a name of yours; made where there is none."),
    ],
    public: Annotated[
        bool, typer.Option("--public/--private", help="Everybody may see it. Without this it is private.")
    ] = False,
    card: Annotated[
        Path | None, typer.Option(metavar="PATH", help="README.md, or a folder with it; default: those in DIR.")
    ] = None,
    tag: Annotated[str | None, typer.Option(metavar="TAG", help="Name of this version; default: v1, v2, ...")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.")] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Made from main where there is none; also refs/pr/N.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose it as a pull request, also where you may only read.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Weights in larger files are split.")] = "5GB",
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Also the model's code, for those without zoo (trust_remote_code).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent, and send nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Publish a model on the Hub: weights, config, tokenizer and card in one commit, with a tag for the version."""
    with only_json_on_stdout(as_json):
        from zoo.hub.push import push as run

        quiet_libraries()
        pushed = run(
            folder,
            repo,
            private=not public,
            card=card,
            tag=tag,
            message=message,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
            with_code=with_code,
            dry_run=dry_run,
        )
    if as_json:
        from dataclasses import asdict

        print_json({**asdict(pushed), "size": pushed.size})
        return
    from zoo.models.costs import short_bytes

    print_table(("file", "bytes"), [(name, f"{size:,}") for name, size in pushed.files.items()], right=("bytes",))
    for what, names in (("stays here", pushed.stays), ("removed there", pushed.removed)):
        if names:
            say(f"{what}: {', '.join(names)}")
    seen = "private" if pushed.private else "public"
    total = f"{len(pushed.files)} files, {short_bytes(pushed.size)}"
    if dry_run:
        where = pushed.url if revision is None else f"{pushed.url}@{revision}"
        where = f"a pull request at {where}" if create_pr else where
        say(f"would go to {where} ({seen}): {total}; nothing was sent")
        return
    where = pushed.pull_request or f"{pushed.url}@{pushed.tag or pushed.revision}"
    what = total if pushed.changed else "all of it was there already"
    say(f"{where} ({seen}, commit {pushed.commit}): {what}")
