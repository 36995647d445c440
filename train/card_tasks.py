"""What a score of each task looks like on a card and on the screen: tables, a sentence, limits, numbers for the Hub.

A task is one entry of `CARD_TASKS`. Its `tables` take a score as JSON and give groups of lines; a line is a name and a
function from a row of the score (a model) to the text of its cell. What nobody measured is left out by `tables`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.errors import DataError, did_you_mean
from zoo.models.costs import short_bytes, short_count

ABSENT = "not measured"
NONE = "–"  # noqa: RUF001  where there is nothing to measure
Row = Mapping[str, Any]
Values = Mapping[str, Any]  # a score as JSON
Table = tuple[str, list[str], list[list[str]]]
Cell = Callable[[Row], str]
Group = tuple[str, dict[str, Cell]]


@dataclass(frozen=True)
class Metric:
    """A number of a student's row, and what the Hub calls it."""

    key: str
    name: str
    type: str


@dataclass(frozen=True)
class CardTask:
    """What a card says about models of one task.

    Args:
        pipeline: the Hub's name of the task (`pipeline_tag`).
        tables: the groups of lines of a score as JSON, without the costs, which all tasks share.
        metrics: for the Hub; the first is the one that a benchmark would ask for.
        summary: sentences about the student's row.
        limits: sentences on what the score does not say.
        use: lines of Python after `model` and `tokenizer` were loaded.
        loader: the class of transformers that loads what prepares the input, or None.
        batch: how many rows were timed at once.
    """

    pipeline: str
    tables: Callable[[Values], list[Group]]
    metrics: tuple[Metric, ...] = ()
    summary: Callable[[Row], list[str]] = lambda row: []
    limits: Callable[[Values, Row], list[str]] = lambda score, row: []
    use: tuple[str, ...] = ()
    loader: str | None = "AutoTokenizer"
    batch: int = 1


def card_task(score: Values) -> CardTask:
    """The entry for the task of a score. Raises DataError for a task without one."""
    name = task_name(score)
    if name not in CARD_TASKS:
        raise DataError(f"score: no card for the task {name[:80]!r}{did_you_mean(name, CARD_TASKS)}")
    return CARD_TASKS[name]


def task_name(score: Values) -> str:
    """The task that a score names; older scores name none and are of text."""
    if score.get("task"):
        return str(score["task"])
    embeds = any(row.get("cosine") is not None for row in score["rows"])
    return "sentence-embedding" if embeds else "causal-lm"


def tables(score: Values) -> list[Table]:
    """(title, header, lines of cells) of a score: a column a model, a line a number; what nobody measured is left out.

    Header and lines have one cell more than there are models, the first: what the line is.
    """
    rows = score["rows"]
    header = ["", *(str(row["role"]).replace("_", " ") for row in rows)]
    groups = [*card_task(score).tables(score), ("Cost", cost(rows))]
    out = []
    for i, (title, cells) in enumerate(groups):
        lines = [[name, *(cell(row) for row in rows)] for name, cell in cells.items()]
        lines = [line for line in lines if set(line[1:]) - {ABSENT, NONE}]
        if lines:
            names = [] if i else [["model", *(str(row["name"]) for row in rows)]]
            out.append((title, header, names + lines))
    return out


def held_out(score: Values) -> str:
    """What was scored, for a title."""
    data = score.get("data") or {}
    tokens, length, rows = at(data, "tokens"), at(data, "length"), at(data, "rows")
    if tokens is None or length is None:
        return "held-out text"
    if data.get("rows_from") == "texts":
        return f"{rows} held-out texts of up to {length} tokens"
    return f"{tokens} held-out tokens in rows of {length}"


def text_tables(score: Values) -> list[Group]:
    """Language models: distance from the teacher, branches, recall."""
    rows = score["rows"]
    quality: dict[str, Cell] = {
        "perplexity": lambda row: number(row, "perplexity", digits=2),
        "KL to the teacher, nats": _with_error("kl", "kl_standard_error"),
        "top-1 agreement": lambda row: percent(row, "top1"),
        "greedy agreement, tokens": lambda row: number(row, "greedy_agreement", digits=1),
    }
    groups = [(f"Quality on {held_out(score)}", quality), ("Branches, on a part of the tokens", _branches())]
    return [*groups, ("Recall (share right) by length", _recall(rows))]


def sentence_tables(score: Values) -> list[Group]:
    """Sentence encoders: how near embeddings are to the teacher's."""

    def by_length(n: str) -> Cell:
        return lambda row: number(row, "cosine_by_length", n, digits=4)

    quality: dict[str, Cell] = {
        "cosine to the teacher's embedding": _with_error("cosine", "cosine_standard_error"),
        **{f"cosine, {n} tokens": by_length(n) for n in lengths(score["rows"], "cosine_by_length")},
        "Spearman of pairwise similarities": lambda row: number(row, "spearman", digits=4),
        "same nearest neighbour": lambda row: percent(row, "neighbour"),
    }
    return [(f"Quality on {held_out(score)}", quality)]


def _with_error(key: str, error: str) -> Cell:
    def cell(row: Row) -> str:
        spread = at(row, error)
        return number(row, key, digits=4) + (f" ± {spread:.4f}" if spread and spread >= 5e-5 else "")

    return cell


def _branches() -> dict[str, Cell]:
    def cell(case: str, key: str, digits: int) -> Cell:
        return lambda row: number(row, "branches", case, key, digits=digits) if row.get("branches") else NONE

    cases = {"both_on": "both on", "linear_off": "linear off", "window_off": "window off"}
    return {
        f"{title}, {name}": cell(case, key, digits)
        for key, title, digits in (("kl", "KL", 4), ("perplexity", "perplexity", 2))
        for case, name in cases.items()
    }


def _recall(rows: Sequence[Row]) -> dict[str, Cell]:
    def cell(key: str, length: str) -> Cell:
        return lambda row: percent(row, key, length)

    titles = {"passkey": "passkey", "passkey_choice": "passkey among 10", "mqar": "MQAR"}
    return {f"{title}, {n}": cell(key, n) for key, title in titles.items() for n in lengths(rows, key)}


def cost(rows: Sequence[Row]) -> dict[str, Cell]:
    """State, speed, parameters and training: the lines that all tasks share."""
    teacher: Row = next((row for row in rows if row["role"] == "teacher"), {})

    def speed(key: str, length: str) -> Cell:
        def cell(row: Row) -> str:
            own, other = at(row, key, length), at(teacher, key, length)
            ratio = own / other if own and other else None
            if key == "decode_tokens_per_s":  # step by step, in turns: closer than the ratio of two medians
                ratio = at(row, "decode_speedup", length) or ratio
            return number(row, key, length, digits=1) + (f" ({ratio:.2f}x)" if ratio and row is not teacher else "")

        return cell

    def state(length: str) -> Cell:
        return lambda row: _shown(short_bytes, at(row, "state_bytes", length))

    def spent(cell: Cell) -> Cell:
        return lambda row: NONE if row["role"] in ("teacher", "untrained") else cell(row)

    lines: dict[str, Cell] = {f"state at {n}": state(n) for n in lengths(rows, "state_bytes")}
    for key, title in (("decode_tokens_per_s", "decoding"), ("prefill_tokens_per_s", "prefill")):
        lines |= {f"{title} at {n}, tokens/s": speed(key, n) for n in lengths(rows, key)}
    lines["parameters"] = lambda row: _shown(short_count, at(row, "parameters"))
    made = "distilled" if teacher else "trained"
    lines[f"{made} on, tokens"] = spent(lambda row: _shown(short_count, at(row, "train_tokens")))
    lines[f"{made} for, CPU-seconds"] = spent(lambda row: number(row, "train_cpu_seconds", digits=0))
    return lines


def lengths(rows: Sequence[Row], key: str) -> list[str]:
    """The keys of a mapping in the rows, such as the lengths at which something was measured, in order."""
    found = [row.get(key) or {} for row in rows]
    if wrong := [value for value in found if not isinstance(value, Mapping)]:
        raise DataError(f"score: {key}: expected numbers by length, got {wrong[0]!r:.80}")
    return list(dict.fromkeys(str(n) for value in found for n in value))


def at(row: Row, *path: str) -> float | None:
    """A number in a row, or None where it was not measured. Raises DataError where something else is there."""
    value: Any = row
    for key in path:
        if value is not None and not isinstance(value, Mapping):
            raise DataError(f"score: {'.'.join(path)}: expected a number, got {value!r:.80}")
        value = None if value is None else value.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise DataError(f"score: {'.'.join(path)}: expected a number, got {value!r:.80}")
    return value if value is None or math.isfinite(value) else None


def number(row: Row, *path: str, digits: int) -> str:
    """The text of a number in a row."""
    return _shown(lambda value: f"{value:.{digits}f}", at(row, *path))


def percent(row: Row, *path: str, digits: int = 1) -> str:
    """The text of a share in a row."""
    return _shown(lambda value: f"{100 * value:.{digits}f} %", at(row, *path))


def _shown(show: Callable[[Any], str], value: float | None) -> str:
    return ABSENT if value is None else show(value)


def _text_summary(student: Row) -> list[str]:
    kl, top1 = at(student, "kl"), at(student, "top1")
    if kl is None or top1 is None:
        return []
    return [
        f"On held-out text KL(teacher || student) is {kl:.3f} nats per token, and the likeliest next token is the "
        f"teacher's {100 * top1:.1f} % of the time."
    ]


def _text_limits(score: Values, student: Row) -> list[str]:
    found = []
    if length := at(score.get("data") or {}, "length"):
        found.append(f"KL and perplexity were measured on texts of {length} tokens, of one kind.")
    window = next((row for row in score["rows"] if row["role"] == "window_baseline"), None)
    own, other = at(student, "kl"), at(window or {}, "kl")
    if window is None and not set(student.get("mixers") or {"?"}) <= {"attention", "sliding_window"}:
        found.append("It was not compared with a sliding window of equal state bytes.")
    elif own is not None and other is not None and other <= own:
        found.append(
            f"A sliding window of equal state bytes does as well or better on this text (KL {other:.3f} against "
            f"{own:.3f})."
        )
    return found if student.get("passkey") else [*found, "Recall over long distances was not measured."]


def _sentence_summary(student: Row) -> list[str]:
    cosine, neighbour = at(student, "cosine"), at(student, "neighbour")
    if cosine is None:
        return []
    told = ""
    if neighbour is not None:
        share = f"{100 * neighbour:.1f} % of the time"
        told = f", and a text's nearest neighbour is the one that the teacher finds {share}"
    return [f"On held-out text the mean cosine to the teacher's embedding is {cosine:.3f}{told}."]


def _sentence_limits(score: Values, student: Row) -> list[str]:
    length = at(score.get("data") or {}, "length")
    return [f"Embeddings were compared on texts of at most {length} tokens, of one kind."] if length else []


def image_tables(score: Values) -> list[Group]:
    """Image classifiers: right answers, distance from the teacher, speed."""
    quality: dict[str, Cell] = {
        "accuracy": lambda row: percent(row, "accuracy", digits=2),
        "same answer as the teacher": lambda row: percent(row, "top1"),
        "KL to the teacher, nats": _with_error("kl", "kl_standard_error"),
        "images/s": lambda row: number(row, "images_per_s", digits=0),
        "images/CPU-second": lambda row: number(row, "images_per_cpu_s", digits=0),
    }
    count = at(score.get("data") or {}, "rows")
    return [(f"Quality on {'held-out' if count is None else count} images", quality)]


def _image_summary(student: Row) -> list[str]:
    accuracy, top1 = at(student, "accuracy"), at(student, "top1")
    if accuracy is None:
        return []
    same = "" if top1 is None else f", and its answer is the teacher's for {100 * top1:.1f} % of them"
    return [f"It is right about {100 * accuracy:.2f} % of the images that it was scored on{same}."]


def _image_limits(score: Values, student: Row) -> list[str]:
    return ["It was scored on images of one kind, as it was trained on; other pictures were not tried."]


_PREDICTION = (
    Metric("perplexity", "Perplexity", "perplexity"),
    Metric("kl", "KL(teacher || student), nats per token", "kl"),
    Metric("top1", "Top-1 agreement with the teacher", "agreement"),
)
CARD_TASKS: dict[str, CardTask] = {
    "causal-lm": CardTask(
        "text-generation", text_tables, _PREDICTION, _text_summary, _text_limits,
        use=(
            'batch = tokenizer("The capital of France is", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**batch, max_new_tokens=32)[0]))",
        ),
    ),
    "masked-lm": CardTask("fill-mask", text_tables, _PREDICTION, _text_summary, _text_limits),
    "sequence-classification": CardTask("text-classification", text_tables, limits=_text_limits),
    "sentence-embedding": CardTask(
        "sentence-similarity", sentence_tables,
        (
            Metric("cosine", "Cosine to the teacher's embedding", "cosine_similarity"),
            Metric("spearman", "Spearman of pairwise similarities with the teacher's", "spearman"),
            Metric("neighbour", "Same nearest neighbour as the teacher", "agreement"),
        ),
        _sentence_summary, _sentence_limits,
        use=(
            "import torch",
            'batch = tokenizer(["A first text.", "And another one."], padding=True, return_tensors="pt")',
            "with torch.no_grad():",
            "    embeddings = model(**batch).pooler_output  # (2, width), of length one",
        ),
    ),
    "image-classification": CardTask(
        "image-classification", image_tables,
        (
            Metric("accuracy", "Accuracy", "accuracy"),
            Metric("top1", "Same answer as the teacher", "agreement"),
            Metric("kl", "KL(teacher || student), nats per image", "kl"),
        ),
        _image_summary, _image_limits,
        use=(
            "from zoo.images import normalise, open_images",
            'images = open_images("path/to/images")  # a folder with a folder for each class, an IDX file, ...',
            "pixels = images.pixels([0, 1], model.config.spec.image)",
            "print(model(pixel_values=normalise(pixels, model.config.spec.image)).logits.argmax(-1))",
        ),
        loader=None, batch=100,
    ),
}  # fmt: skip
