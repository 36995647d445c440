"""What the commands share: errors as one line, tables or JSON, `key=value` options, tokenizers."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

BAD_INPUT = 2
INTERRUPTED = 130
WIDTH_OF_A_PIPE = 160

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; everything else goes to stderr.")]


def examples(*lines: str) -> str:
    """The epilog of a command's help: commands that can be copied."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [cyan]{line}[/cyan]" for line in lines)])


def guarded(function: Callable[..., None], resume: str = "nothing was written") -> Callable[..., None]:
    """A command whose errors are one line: exit code 2 for bad input, 130 for Ctrl-C. ZOO_DEBUG=1 shows tracebacks.

    `resume` is what Ctrl-C leaves behind, for commands whose own work does not say it.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from zoo.errors import ZooError

        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as stop:
            _fail(INTERRUPTED, str(stop) or f"interrupted; {resume}")
        except BrokenPipeError:
            raise
        except (ZooError, OSError) as error:
            if os.environ.get("ZOO_DEBUG"):
                raise
            _fail(BAD_INPUT, f"error: {_one_line(error)}")

    return run


def _fail(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(code)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


@contextlib.contextmanager
def only_json_on_stdout(wanted: bool) -> Iterator[None]:
    """While the work runs, send what libraries print to stderr where stdout is to be JSON."""
    if not wanted:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_json(value: Any) -> None:
    """One JSON document on stdout; numbers that are not finite must be null already."""
    print(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; wide enough for a table where there is none."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made = Console(stderr=stderr, highlight=False, width=WIDTH_OF_A_PIPE)
    return made


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str] = ()) -> None:
    """A table on stdout; the columns named in `right` are aligned to the right. Without column names no header."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, show_header=bool(columns))
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    console().print(table)


def say(message: str) -> None:
    """A line for the user on stderr."""
    print(message, file=sys.stderr)


def quiet_libraries() -> None:
    """No loading bars or advice from transformers and datasets: the commands have their own."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.showwarning = lambda message, *_: say(f"warning: {' '.join(str(message).split())}")


def parse_options(given: Sequence[str], flag: str = "--option") -> dict[str, Any]:
    """`["window=64", "linear.name=mamba2"]` -> `{"window": 64, "linear": {"name": "mamba2"}}`; values are YAML."""
    import yaml

    from zoo.errors import ConfigError
    from zoo.yaml_files import Loader

    values: dict[str, Any] = {}
    for option in given:
        key, equals, text = option.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{flag} {option!r}: write key=value, such as window=64")
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{flag} {option!r}: {parent} has a value already")
        try:
            place[last] = yaml.load(text, Loader=Loader)
        except yaml.YAMLError:
            raise ConfigError(f"{flag} {option!r}: cannot read the value {text!r}") from None
    return values


def data_source(given: Sequence[str]) -> Any:
    """What `--data` names: nothing, one source, or several files. Raises DataError for a mix that cannot be read."""
    if len(given) <= 1:
        return given[0] if given else None
    from zoo.errors import DataError
    from zoo.text import find_files

    if remote := [name for name in given if name.startswith("hf:")]:
        raise DataError(f"--data {remote[0]}: a data set stands alone; give either it or files")
    return [file for name in given for file in find_files(name)]


def load_tokenizer(folder: str | Path, given: str | None = None) -> Any:
    """The tokenizer saved with a model, or the one named: a folder, a Hub name, or "bytes"."""
    from zoo.errors import DataError

    if given == "bytes":
        from zoo.text import byte_tokenizer

        return byte_tokenizer()
    if given is None and not (Path(folder) / "tokenizer_config.json").is_file():
        raise DataError(f"{folder}: no tokenizer in it; name one with --tokenizer (a folder, a Hub name, or bytes)")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(given or folder)
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer {given or str(folder)!r} cannot be loaded: {str(error).splitlines()[0]}") from None
