"""Pictures of a score: quality by position, cost by length, and what each layer of attention buys.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; every line has a marker and a dash of its own
as well. matplotlib is imported when something is drawn; without it the functions raise ImportError.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import DataError
from zoo.train.markdown import one_line

STYLES = {
    "teacher": ("#000000", "o", "-"),
    "untrained": ("#999999", "s", ":"),
    "student": ("#0072B2", "D", "-"),
    "window_baseline": ("#D55E00", "^", "--"),
}
OTHERS = (("#009E73", "v", "-."), ("#CC79A7", "P", "--"), ("#E69F00", "X", ":"), ("#56B4E9", "*", "-"))


def write_plots(score: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Draw what there are numbers for: by_position.png and by_length.png in `folder`; the paths written."""
    folder = Path(folder)
    written = []
    if any(row.get("perplexity_by_position") for row in score["rows"]):
        written.append(position_plot(score, folder / "by_position.png"))
    if any(row.get("state_bytes") or row.get("decode_tokens_per_s") for row in score["rows"]):
        written.append(length_plot(score, folder / "by_length.png"))
    return written


def position_plot(score: Mapping[str, Any], path: str | Path) -> Path:
    """Perplexity, and KL to the teacher, in buckets of positions."""
    figure, axes = _figure(2)
    _lines(axes[0], score, "perplexity_by_position")
    _lines(axes[1], score, "kl_by_position", skip=("teacher",))
    axes[0].set(title="How well it predicts", ylabel="perplexity")
    axes[1].set(title="How far it is from the teacher", ylabel="KL(teacher || model), nats per token")
    axes[1].set_ylim(0, None if axes[1].dataLim.y1 <= 0 else 1.08 * axes[1].dataLim.y1)
    for axis in axes:
        axis.set_xlabel("position in the text, tokens")
        axis.tick_params(axis="x", labelrotation=30)
    return _save(figure, axes, path)


def length_plot(score: Mapping[str, Any], path: str | Path) -> Path:
    """State bytes and decoding speed by length."""
    figure, axes = _figure(2)
    _lines(axes[0], score, "state_bytes", scale=1 / 2**20)
    _lines(axes[1], score, "decode_tokens_per_s")
    axes[0].set(title="What one sequence occupies", ylabel="state, MiB", yscale="log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[1].set(title="How fast it writes", ylabel="decoding, tokens/s")
    axes[1].set_ylim(0, None if axes[1].dataLim.y1 <= 0 else 1.08 * axes[1].dataLim.y1)
    for axis in axes:
        axis.set_xlabel("tokens read before")
    return _save(figure, axes, path)


def tradeoff_plot(points: Sequence[Mapping[str, Any]], path: str | Path, *, layers: int | None = None) -> Path:
    """KL against the number of layers that keep attention, untrained and trained.

    Args:
        points: mappings with `keep` (layers with attention), `kl` (nats per token), `trained` (bool) and `label` (what
            the other layers became). Points of one label are joined.
        path: of the picture; the ending chooses the format.
        layers: how many layers there are, where the axis shall end.

    Raises DataError for points without these keys.
    """
    groups: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for i, point in enumerate(points):
        missing = [key for key in ("keep", "kl", "trained", "label") if key not in point]
        if missing:
            raise DataError(f"points[{i}]: no key {missing[0]!r}")
        groups.setdefault((str(point["label"]), bool(point["trained"])), []).append((point["keep"], point["kl"]))
    if not groups:
        raise DataError("a trade-off picture needs at least one point")
    figure, (axis,) = _figure(1)
    styles = (STYLES["student"], STYLES["window_baseline"], *OTHERS)
    labels = list(dict.fromkeys(label for label, _ in groups))
    for (label, trained), values in groups.items():
        color, marker, _ = styles[labels.index(label) % len(styles)]
        values.sort()
        axis.plot(
            *zip(*values, strict=True),
            color=color,
            marker=marker,
            linestyle="-" if trained else ":",
            markerfacecolor=color if trained else "white",
            label=one_line(f"{label}, {'distilled' if trained else 'untrained'}"),
        )
    axis.set(
        title="What each layer of attention buys",
        xlabel="layers that keep full attention" + (f" (of {layers})" if layers else ""),
        ylabel="KL(teacher || student), nats per token",
    )
    axis.set_ylim(bottom=0)
    axis.set_xlim(-0.5, None if layers is None else layers + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    return _save(figure, [axis], path, legend_below=False)


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(5.2 * columns + (1.6 if columns == 1 else 0), 4.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _lines(axis: Any, score: Mapping[str, Any], key: str, *, scale: float = 1.0, skip: Sequence[str] = ()) -> None:
    """One line a row; places along the axis are the labels of the buckets or lengths, at equal distances."""
    rows = [row for row in score["rows"] if row.get(key) and row["role"] not in skip]
    places = list(dict.fromkeys(place for row in rows for place in row[key]))
    for row in rows:
        color, marker, line = STYLES.get(row["role"], OTHERS[0])
        shown = [(places.index(p), value * scale) for p, value in row[key].items() if value is not None]
        if shown:
            label = one_line(f"{row['role'].replace('_', ' ')}: {row['name']}")
            axis.plot(*zip(*shown, strict=True), color=color, marker=marker, linestyle=line, label=label)
    axis.set_xticks(range(len(places)), places)


def _save(figure: Any, axes: Sequence[Any], path: str | Path, legend_below: bool = True) -> Path:
    seen: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    if seen and legend_below:
        columns = 2 if max(map(len, seen)) < 60 else 1
        figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    elif seen:
        axes[0].legend(fontsize=8, frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    figure.savefig(partial, dpi=150)
    os.replace(partial, path)
    return path
