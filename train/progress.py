"""What a run shows and writes while it works: a bar, log.jsonl, TensorBoard on request."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

from zoo.train.checkpoint import write_atomically

LINE_EVERY = 30.0  # seconds between lines where there is no terminal for a bar


class RunLog:
    """The rows of a run, one a step, in `out/log.jsonl` (where there is an `out`) and in memory."""

    def __init__(self, path: Path | None, tensorboard: Path | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._file: Any = None
        self._board = _summary_writer(tensorboard) if tensorboard is not None else None

    def rewind(self, step: int) -> None:
        """Forget rows after `step` (of the run): they are made again."""
        if self.path is not None and self.path.is_file():
            self.rows = [row for row in _read_rows(self.path) if row["step"] <= step]
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self.rows.append(row)
        if self.path is not None:
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a killed run
            break
    return rows


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn("TensorBoard is not installed; the log is in log.jsonl only", stacklevel=3)
        return None
    return SummaryWriter(str(folder))


class Bar:
    """A progress bar with tokens/s, loss and remaining time; lines every half minute where there is no terminal."""

    def __init__(self, title: str, show: bool) -> None:
        self.title, self.show = title, show
        self._bar: Any = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Bar:
        if self.show:
            from rich.console import Console

            self.console = Console(stderr=True)
            if self.console.is_terminal:
                self._start()
        return self

    def _start(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task(self.title, total=1.0, info="")
        self._bar.start()

    def update(self, fraction: float, loss: float, tokens_per_second: float, seconds: float) -> None:
        """Show where the stage is: the fraction of the budget used, in `seconds` on the wall."""
        if not self.show:
            return
        left = duration(seconds * (1 - fraction) / fraction) if 0 < fraction <= 1 else "?"
        info = f"loss {loss:.4g} · {tokens_per_second:.0f} tokens/s · {left} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=min(1.0, fraction), info=info)
        elif time.monotonic() - self._last_line > LINE_EVERY:
            self._last_line = time.monotonic()
            self.console.print(f"{self.title} {min(1.0, fraction):.0%} · {info}")

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
