"""The model card, written from what was measured and from nothing else.

`write_card` fills `model_cards/template.md` from score.json and the lineage of a model. What is not in them reads
"not measured" or is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

from zoo.errors import DataError
from zoo.models.costs import short_bytes, short_count

ABSENT = "not measured"
NONE = "–"  # noqa: RUF001  where there is nothing to measure
PIPELINES = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "sentence-embedding": "sentence-similarity",
    "sequence-classification": "text-classification",
}
PLOTS = {
    "by_position.png": "Perplexity and KL by position",
    "by_length.png": "State bytes and decoding speed by length",
    "tradeoff.png": "KL against the number of layers that keep attention",
}
Table = tuple[str, list[str], list[list[str]]]
Cell = Callable[[Mapping[str, Any]], str]


def tables(score: Mapping[str, Any]) -> list[Table]:
    """(title, header, lines of cells) of a score: a column a model, a line a number; what nobody measured is left out.

    Header and lines have one cell more than there are models, the first: what the line is.
    """
    rows = score["rows"]
    header = ["", *(row["role"].replace("_", " ") for row in rows)]
    made = [
        (f"Quality on {_held_out(score)}", {"model": lambda row: row["name"], **_quality(rows)}),
        ("Branches, on a part of the tokens", _branches()),
        ("Recall (share right) by length", _recall(rows)),
        ("Cost", _cost(rows)),
    ]
    out = []
    for title, cells in made:
        lines = [[name, *(cell(row) for row in rows)] for name, cell in cells.items()]
        lines = [line for line in lines if set(line[1:]) - {ABSENT, NONE}]
        if any(line[0] != "model" for line in lines):
            out.append((title, header, lines))
    return out


def _held_out(score: Mapping[str, Any]) -> str:
    data = score.get("data", {})
    if "tokens" not in data:
        return "held-out text"
    if data.get("rows_from") == "texts":
        return f"{data['rows']} held-out texts of up to {data['length']} tokens"
    return f"{data['tokens']} held-out tokens in rows of {data['length']}"


def _quality(rows: Sequence[Mapping[str, Any]]) -> dict[str, Cell]:
    def cosine(row: Mapping[str, Any]) -> str:
        error = row.get("cosine_standard_error")
        return _number(row.get("cosine"), 4) + (f" ± {error:.4f}" if error and error >= 5e-5 else "")

    def by_length(n: str) -> Cell:
        return lambda row: _number(_at(row, "cosine_by_length", n), 4)

    def kl(row: Mapping[str, Any]) -> str:
        error = row.get("kl_standard_error")
        return _number(row.get("kl"), 4) + (f" ± {error:.4f}" if error else "")

    return {
        "perplexity": lambda row: _number(row.get("perplexity"), 2),
        "KL to the teacher, nats": kl,
        "top-1 agreement": lambda row: _percent(row.get("top1")),
        "cosine to the teacher's embedding": cosine,
        **{f"cosine, {n} tokens": by_length(n) for n in _lengths(rows, "cosine_by_length")},
        "Spearman of pairwise similarities": lambda row: _number(row.get("spearman"), 4),
        "same nearest neighbour": lambda row: _percent(row.get("neighbour")),
        "greedy agreement, tokens": lambda row: _number(row.get("greedy_agreement"), 1),
    }


def _branches() -> dict[str, Cell]:
    def cell(case: str, key: str, digits: int) -> Cell:
        return lambda row: _number(_at(row, "branches", case, key), digits) if row.get("branches") else NONE

    cases = {"both_on": "both on", "linear_off": "linear off", "window_off": "window off"}
    return {
        f"{title}, {name}": cell(case, key, digits)
        for key, title, digits in (("kl", "KL", 4), ("perplexity", "perplexity", 2))
        for case, name in cases.items()
    }


def _recall(rows: Sequence[Mapping[str, Any]]) -> dict[str, Cell]:
    def cell(key: str, length: str) -> Cell:
        return lambda row: _percent(_at(row, key, length))

    titles = {"passkey": "passkey", "passkey_choice": "passkey among 10", "mqar": "MQAR"}
    return {f"{title}, {n}": cell(key, n) for key, title in titles.items() for n in _lengths(rows, key)}


def _cost(rows: Sequence[Mapping[str, Any]]) -> dict[str, Cell]:
    teacher = next((row for row in rows if row["role"] == "teacher"), {})

    def speed(key: str, length: str) -> Cell:
        def cell(row: Mapping[str, Any]) -> str:
            own, other = _at(row, key, length), _at(teacher, key, length)
            ratio = own / other if own and other else None
            if key == "decode_tokens_per_s":  # step by step, in turns: closer than the ratio of two medians
                ratio = _at(row, "decode_speedup", length) or ratio
            return _number(own, 1) + (f" ({ratio:.2f}x)" if ratio and row is not teacher else "")

        return cell

    def state(length: str) -> Cell:
        return lambda row: _bytes(_at(row, "state_bytes", length))

    def spent(key: str, show: Callable[[Any], str]) -> Cell:
        return lambda row: NONE if row["role"] in ("teacher", "untrained") else show(row.get(key))

    lines: dict[str, Cell] = {f"state at {n}": state(n) for n in _lengths(rows, "state_bytes")}
    for key, title in (("decode_tokens_per_s", "decoding"), ("prefill_tokens_per_s", "prefill")):
        lines |= {f"{title} at {n}, tokens/s": speed(key, n) for n in _lengths(rows, key)}
    lines["parameters"] = lambda row: _count(row.get("parameters"))
    lines["distilled on, tokens"] = spent("train_tokens", _count)
    lines["distilled for, CPU-seconds"] = spent("train_cpu_seconds", lambda value: _number(value, 0))
    return lines


def _lengths(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(str(n) for row in rows for n in (row.get(key) or {})))


def _at(row: Mapping[str, Any], *path: str) -> Any:
    value: Any = row
    for key in path:
        value = None if value is None else value.get(key)
    return value


def _number(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f} %"


def _bytes(value: int | None) -> str:
    return ABSENT if value is None else short_bytes(value)


def _count(value: int | None) -> str:
    return ABSENT if value is None else short_count(value)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column to the left, numbers to the right."""
    aligned = ["---", *(["---:"] * (len(header) - 1))]
    escaped = [
        [str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in (header, aligned, *lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def write_card(
    folder: str | Path,
    score: Any,
    lineage: Mapping[str, Any],
    *,
    title: str | None = None,
    location: str | None = None,
    task: str = "causal-lm",
    tags: Sequence[str] = (),
    limits: Sequence[str] = (),
) -> Path:
    """Write README.md, the model card, into the folder of a model; its path.

    Args:
        folder: of the saved model; plots that are in it are shown.
        score: a `Score`, its JSON, or the path of score.json.
        lineage: what the model was made from. Keys that are known, all optional: `teacher`, `teacher_revision`,
            `base_model` (the teacher's name on the Hub), `license`, `data`, `data_license`, `stages` (mappings with
            `name`, `tokens`, `cpu_seconds`, and whatever else is worth a column), `seed`, `version`, `command`.
        title: by default the name of the folder.
        location: where readers load it from; by default `folder` as it is given.
        task: of the model, for its pipeline tag.
        tags: more tags for the front matter.
        limits: sentences on what the model must not be trusted with, below those that follow from the score.

    Raises:
        DataError: a score without a row for a student.
    """
    folder = Path(folder)
    values = _score_json(score)
    student = next((row for row in values["rows"] if row.get("role") == "student"), None)
    if student is None:
        raise DataError("a card needs a score with a row for the student")
    teacher = next((row for row in values["rows"] if row.get("role") == "teacher"), None)
    text = Template(resources.files("zoo.model_cards").joinpath("template.md").read_text(encoding="utf-8")).substitute(
        front_matter=_front_matter(lineage, student, task, tags),
        title=title or folder.resolve().name,
        summary=_summary(student, teacher, lineage),
        usage=_usage(location or str(folder), task),
        lineage=_lineage(lineage, student, values),
        score=_score_section(values),
        plots="\n\n".join(f"![{alt}]({name})" for name, alt in PLOTS.items() if (folder / name).is_file()),
        limits=_limits(values, student, limits),
        reproduce=_reproduce(lineage, values),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / "README.md", folder / "README.md.partial"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def _score_json(score: Any) -> dict[str, Any]:
    from zoo.train.score import Score

    if isinstance(score, str | Path):
        score = Score.load(score)
    return score.to_json() if isinstance(score, Score) else dict(score)


def _front_matter(lineage: Mapping[str, Any], student: Mapping[str, Any], task: str, tags: Sequence[str]) -> str:
    mixers = sorted(set(student.get("mixers") or {}) - {"attention"})
    values = {
        "license": lineage.get("license"),
        "base_model": lineage.get("base_model"),
        "library_name": "zoo",
        "pipeline_tag": PIPELINES.get(task),
        "tags": list(dict.fromkeys([*tags, "zoo", "distillation", *mixers])),
    }
    kept = {key: value for key, value in values.items() if value is not None}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---"


def _summary(student: Mapping[str, Any], teacher: Mapping[str, Any] | None, lineage: Mapping[str, Any]) -> str:
    name = lineage.get("teacher") or (teacher or {}).get("name") or "a Transformer"
    mixers = student.get("mixers") or {}
    layers = sum(mixers.values())
    parts = [f"{count} of {layers} layers are `{mixer}`" for mixer, count in mixers.items()]
    made = f"Made from {name} by replacing its attention and distilling"
    sentences = [f"{made}: {', '.join(parts)}." if parts else f"{made}."]
    kl, top1 = student.get("kl"), student.get("top1")
    if kl is not None and top1 is not None:
        sentences.append(
            f"On held-out text KL(teacher || student) is {kl:.3f} nats per token, and the likeliest next token is the "
            f"teacher's {100 * top1:.1f} % of the time."
        )
    cosine, neighbour = student.get("cosine"), student.get("neighbour")
    if cosine is not None:
        told = ""
        if neighbour is not None:
            share = f"{100 * neighbour:.1f} % of the time"
            told = f", and a text's nearest neighbour is the one that the teacher finds {share}"
        sentences.append(f"On held-out text the mean cosine to the teacher's embedding is {cosine:.3f}{told}.")
    ratios = _ratios(student, teacher)
    return " ".join([*sentences, *ratios])


def _ratios(student: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> list[str]:
    out = []
    own, other = student.get("state_bytes") or {}, (teacher or {}).get("state_bytes") or {}
    shared = [n for n in own if own[n] and other.get(n)]
    if shared:
        longest = max(shared, key=int)
        out.append(f"After {longest} tokens its state has {own[longest] / other[longest]:.2f}x the bytes.")
    if speedup := student.get("decode_speedup"):
        longest = max(speedup, key=int)
        out.append(f"After {longest} tokens it writes {speedup[longest]:.2f}x as fast.")
    return out


def _usage(location: str, task: str) -> str:
    """How to load the model, and what to do with it."""
    if task == "sentence-embedding":
        return (
            "```python\nimport torch, zoo\nfrom transformers import AutoTokenizer\n"
            f'model = zoo.create_model("{location}").eval()\ntokenizer = AutoTokenizer.from_pretrained("{location}")\n'
            'batch = tokenizer(["A first text.", "And another one."], padding=True, return_tensors="pt")\n'
            "with torch.no_grad():\n    embeddings = model(**batch).pooler_output  # (2, width), of length one\n```"
        )
    return (
        f'```python\nimport zoo\nmodel = zoo.create_model("{location}")\n'
        "print(model.num_parameters(), model.config.mixer_names)\n```\n\n"
        "The model is a transformers `PreTrainedModel`: tokenizer, `generate()` and batches work as with any other. "
        f'From the command line:\n`zoo generate {location} --prompt "..."`.'
    )


def _lineage(lineage: Mapping[str, Any], student: Mapping[str, Any], score: Mapping[str, Any]) -> str:
    teacher = lineage.get("teacher")
    if teacher and lineage.get("teacher_revision"):
        teacher = f"{teacher}, revision {lineage['teacher_revision']}"
    version = lineage.get("version") or score.get("versions", {}).get("zoo")
    facts = {
        "Teacher": teacher,
        "Licence": lineage.get("license"),
        "Training text": lineage.get("data"),
        "Licence of the text": lineage.get("data_license"),
        "Tokens trained on": student.get("train_tokens"),
        "CPU-seconds": None if student.get("train_cpu_seconds") is None else round(student["train_cpu_seconds"]),
        "Seed": lineage.get("seed"),
        "zoo": version,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    stages = lineage.get("stages") or []
    if stages:
        columns = list(dict.fromkeys(key for stage in stages for key in stage))
        cells = [[_cell(stage.get(column)) for column in columns] for stage in stages]
        lines += ["", "Stages, in this order:", "", markdown_table([c.replace("_", " ") for c in columns], cells)]
    return "\n".join(lines) or "Nothing is recorded."


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _score_section(score: Mapping[str, Any]) -> str:
    parts = [f"{title}:\n\n{markdown_table(header, lines)}" for title, header, lines in tables(score)]
    source = score.get("data", {}).get("source")
    if source:
        parts.append(f"Text: {source}. All models were scored on the same tokens.")
    m = score.get("machine") or {}
    if m:
        parts.append(
            f"Measured on {m.get('cpu')}, {m.get('threads')} threads of {m.get('cores')} cores, {m.get('dtype')}, "
            f"batch 1; times were taken in turns."
        )
    return "\n\n".join([*parts, *score.get("notes", [])])


def _limits(score: Mapping[str, Any], student: Mapping[str, Any], limits: Sequence[str]) -> str:
    found = ["It inherits what its teacher gets wrong; nothing was done about it here."]
    length = score.get("data", {}).get("length")
    if student.get("cosine") is not None:
        found += [f"Embeddings were compared on texts of at most {length} tokens, of one kind."] if length else []
        return "\n".join(f"- {line}" for line in (*found, *limits))
    if length:
        found.append(f"KL and perplexity were measured on texts of {length} tokens, of one kind.")
    window = next((row for row in score["rows"] if row.get("role") == "window_baseline"), None)
    if window is None and set(student.get("mixers") or {"?"}) <= {"attention", "sliding_window"}:
        pass  # it is such a window itself
    elif window is None:
        found.append("It was not compared with a sliding window of equal state bytes.")
    elif student.get("kl") is not None and window.get("kl") is not None and window["kl"] <= student["kl"]:
        found.append(
            f"A sliding window of equal state bytes does as well or better on this text (KL {window['kl']:.3f} against "
            f"{student['kl']:.3f})."
        )
    if not student.get("passkey"):
        found.append("Recall over long distances was not measured.")
    return "\n".join(f"- {line}" for line in (*found, *limits))


def _reproduce(lineage: Mapping[str, Any], score: Mapping[str, Any]) -> str:
    commands = [c for c in dict.fromkeys((lineage.get("command"), score.get("command"))) if c]
    if not commands:
        return "The command was not recorded."
    return "```\n" + "\n".join(commands) + "\n```"
