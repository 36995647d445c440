"""The program `zoo`: a list of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.backends import backends
from zoo.cli.card import card
from zoo.cli.common import JsonOption, examples, guarded
from zoo.cli.convert import convert
from zoo.cli.distill import distill
from zoo.cli.export import export
from zoo.cli.generate import generate
from zoo.cli.import_ import import_
from zoo.cli.list import list_
from zoo.cli.pull import pull
from zoo.cli.push import push
from zoo.cli.score import score
from zoo.cli.show import show
from zoo.cli.train import train

GO_ON = "run the same command again to go on from the last checkpoint"
AGAIN = "run the same command again: what has arrived is not sent twice"

app = typer.Typer(
    name="zoo",
    help="Turn a pretrained Transformer into a cheaper model that still knows what it knew.",
    epilog=examples(
        "zoo list 'mamba2*'",
        "zoo convert HuggingFaceTB/SmolLM2-135M-Instruct --mixer gated_delta_net+window --keep sensitivity:1/5 --out m",
        "zoo generate m --prompt 'Why is the sky blue?' --chat",
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import zoo

        print(zoo.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the result.")] = Path("demo"),
    minutes: Annotated[
        float, typer.Option(min=0.1, max=10_000, metavar="N", help="Minutes of training for the student.")
    ] = 2.0,
    mixer: Annotated[
        str | None, typer.Option(metavar="M", help="What replaces attention; the default is what works best.")
    ] = None,
    as_json: JsonOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in --out.")] = False,
) -> None:
    """The main job on a real teacher, end to end: scan, convert, calibrate, distill, score, generate."""
    from zoo.cli.common import quiet_libraries
    from zoo.cli.demo import demo as run

    quiet_libraries()
    run(out, minutes, mixer, as_json, overwrite)


app.command("list", epilog=examples("zoo list", "zoo list 'retnet*' --json", "zoo list --mixers"))(guarded(list_))
app.command("show", epilog=examples("zoo show mamba2-130m", "zoo show runs/quick --json"))(guarded(show))
app.command("backends", epilog=examples("zoo backends", "zoo backends --json"))(guarded(backends))
app.command(
    "convert",
    epilog=examples(
        "zoo convert HuggingFaceTB/SmolLM2-135M --mixer gated_delta_net+window --option window=64 --out student",
        "zoo convert model.gguf --mixer mamba2+window --keep sensitivity:1/5 --data 'text/*.txt' --out student",
        "zoo convert gpt2 --out exact      [dim]# no mixer: an exact import[/dim]",
    ),
)(guarded(convert))
app.command(
    "distill",
    epilog=examples(
        "zoo distill quick teacher=HuggingFaceTB/SmolLM2-135M-Instruct data='text/*.txt' out=runs/quick",
        "zoo distill my.yaml stages.0.lr=1e-3 out=runs/faster",
    ),
)(guarded(distill, GO_ON))
app.command(
    "train",
    epilog=examples(
        "zoo train pretrain-tiny data='text/*.txt' out=runs/tiny",
        "zoo train pretrain-tiny model=mamba2-tiny data=hf:roneneldan/TinyStories out=runs/stories",
    ),
)(guarded(train, GO_ON))
app.command(
    "score",
    epilog=examples(
        "zoo score runs/quick",
        "zoo score student --against HuggingFaceTB/SmolLM2-135M --data held_out.txt --quick --json",
    ),
)(guarded(score))
app.command(
    "card",
    epilog=examples(
        "zoo card runs/quick --license apache-2.0 --repo me/smollm2-135m-windowed",
        "zoo card runs/quick --set teacher_license=apache-2.0 --set 'limits=[\"It reads English only.\"]'",
        "zoo card model_cards/*/ --check",
    ),
)(guarded(card))
app.command(
    "generate",
    epilog=examples(
        "zoo generate runs/quick --prompt 'Once upon a time'",
        "zoo generate student --prompt 'Why is the sky blue?' --chat --temperature 0.7 --top-p 0.9",
        "zoo generate student --prompt 'The capital of France is' --beams 4 --max-new-tokens 8",
    ),
)(guarded(generate))
app.command(
    "import",
    epilog=examples(
        "zoo import mamba-130m --out model      [dim]# the layout is guessed[/dim]",
        "zoo import RWKV-4-Pile-169M.pth --layout rwkv --out model",
        "zoo import state-spaces/mamba-130m --out model      [dim]# from the Hub[/dim]",
    ),
)(guarded(import_))
app.command("export", epilog=examples("zoo export student --layout transformers --out for-everyone"))(guarded(export))
app.command(
    "push",
    epilog=examples(
        "zoo push runs/quick org/name --dry-run",
        "zoo push runs/quick org/name --public --tag v1 --card model_cards/quick",
    ),
)(guarded(push, AGAIN))
app.command(
    "pull",
    epilog=examples(
        "zoo pull org/name --out student",
        "zoo pull org/name@v1 --out student --json",
        "zoo pull BlinkDL/rwkv-4-pile-169m --file RWKV-4-Pile-169M-20220807-8023.pth --out rwkv",
    ),
)(guarded(pull, AGAIN))
app.command("demo", epilog=examples("zoo demo --out demo", "zoo demo --mixer mamba2+window --minutes 10 --json"))(
    guarded(demo, GO_ON)
)


def main() -> None:
    """Run the program; what the console script and `python -m zoo` call."""
    app(prog_name="zoo")
