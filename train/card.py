"""The model card, written from what was measured and from nothing else; what `zoo card` runs.

A card is a function of two files: score.json (what was measured, and on which weights) and card.json (what its author
says, and what the run recorded in train.json and config.json); and of which pictures lie beside them. It fills
`model_cards/template.md`. What neither file says is not on the card.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

from zoo.errors import CheckpointError, ConfigError, DataError, did_you_mean
from zoo.train.card_facts import CardFile, Facts, found_facts, is_repository, read_mapping
from zoo.train.card_tasks import CardTask, Row, at, card_task, lengths, tables
from zoo.train.checkpoint import write_atomically
from zoo.train.markdown import code, code_block, front_matter, inline, one_line, table

CARD, SCORE, RESULTS = "README.md", "score.json", ".eval_results/zoo.yaml"
PLOTS = {
    "by_position.png": "Perplexity and KL by position",
    "by_length.png": "State bytes and decoding speed by length",
    "tradeoff.png": "KL against the number of layers that keep attention",
}
UNNAMED = (
    "**Which weights these numbers belong to was not recorded when they were measured.** A model trained again is "
    "another one, and needs a score of its own."
)


def card(folder: str | Path, *, run: str | Path | None = None, overwrite: bool = False, **given: Any) -> Path:
    """Write the card of the model in a folder, README.md, from its score.json; the path of the card.

    Also draws the pictures (where matplotlib is installed), writes `.eval_results/zoo.yaml` where the score is one of a
    benchmark on the Hub, and keeps in card.json what is given, so that the next call needs nothing.

    Args:
        folder: of a saved model that was scored; or of a score alone, for a card that is kept without the weights.
        run: the folder of the run that made the model, where that is another.
        overwrite: replace a README.md that was not written here.
        given: facts that no file records, see `zoo.train.card_facts.Facts`: title, repo, license, limits, ...

    Raises:
        DataError: no score.json, or not a score. CheckpointError: the score was measured on other weights than those
        beside it, or a README.md of somebody else is in the way. ConfigError: a fact that is unknown or not allowed.
    """
    folder = Path(folder)
    score = read_score(folder)
    check_weights(folder, score)
    _refuse_to_replace(folder, overwrite)
    before, recorded = CardFile.load(folder), found_facts(Path(run or folder))
    title = before.given.title or folder.resolve().name
    file = CardFile(
        given=before.given.updated({"title": title, **given}, "card"),
        recorded=recorded if recorded.known() else before.recorded,
    )
    card_text(folder, score, file.facts())  # whatever is wrong is said before anything is written
    results = eval_results(score, file.facts())
    _draw(folder, score)
    text = card_text(folder, score, file.facts())
    file.save(folder)
    path = folder / RESULTS
    if results is None:
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, results)
    write_atomically(folder / CARD, text)
    return folder / CARD


def verify_card(folder: str | Path) -> None:
    """Raise where the card of a model does not say what was measured on the weights beside it.

    README.md must be, to the letter, what `card` writes from the JSON in the folder, and score.json must name the hash
    of the weights that are there.

    Raises:
        DataError: no card or no score. CheckpointError: a card that was changed, or one of other weights.
    """
    folder = Path(folder)
    again = f"write it again: zoo card {shlex.quote(str(folder))}"
    score = read_score(folder)
    check_weights(folder, score, needed=True)
    if not (folder / CARD).is_file():
        raise DataError(f"{folder}: no {CARD} in it; write it: zoo card {shlex.quote(str(folder))}")
    facts = CardFile.load(folder).facts()
    text, results = card_text(folder, score, facts), eval_results(score, facts)
    if (line := _first_difference(_read(folder / CARD), text)) is not None:
        raise CheckpointError(f"{folder / CARD}:{line}: is not what was measured and recorded here; {again}")
    there = _read(folder / RESULTS) if (folder / RESULTS).is_file() else None
    if there != results:
        raise CheckpointError(f"{folder / RESULTS}: is not what was measured here; {again}")


def read_score(folder: Path) -> dict[str, Any]:
    """score.json of a folder. Raises DataError where there is none, and names the first thing that is wrong in it."""
    if not folder.is_dir():
        near = [p.name for p in folder.parent.glob("*") if p.is_dir()] if folder.parent.is_dir() else []
        raise DataError(f"{folder}: no such folder{did_you_mean(folder.name, near)}")
    path = folder / SCORE
    if not path.is_file():
        measure = f"zoo score {shlex.quote(str(folder))} --data FILES"
        raise DataError(f"{folder}: no {SCORE} in it, and a card says only what was measured; first: {measure}")
    score = read_mapping(path)
    rows = score.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: not a score: rows: expected a list of mappings; `zoo score` writes one")
    for row in rows:
        if not isinstance(row.get("role"), str) or not isinstance(row.get("name"), str):
            raise DataError(f"{path}: not a score: every row has a name and a role; `zoo score` writes one")
        for key, values in row.items():
            for name in values if isinstance(values, dict) and key != "branches" else ():
                at(row, key, name)  # a number, or it says so
        if not isinstance(row.get("mixers") or {}, dict):
            raise DataError(f"{path}: mixers: expected a mapping, got {row['mixers']!r:.80}")
    for key, kind in (("data", dict), ("versions", dict), ("machine", dict), ("notes", list), ("command", str)):
        if not isinstance(score.get(key) or kind(), kind):
            raise DataError(f"{path}: {key}: expected a {kind.__name__}, got {score[key]!r:.80}")
    if student_of(score) is None:
        raise DataError(f"{path}: a card needs a score with a row for the student")
    return score


def student_of(score: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row of the model that a score is of."""
    return next((row for row in score["rows"] if row["role"] == "student"), None)


def check_weights(folder: Path, score: Mapping[str, Any], needed: bool = False) -> None:
    """Raise CheckpointError where weights are in the folder, or are needed, that the score was not measured on."""
    if not needed and not any(folder.glob("*.safetensors*")):
        return
    from zoo.hub.weights import weights_hash

    measured = (student_of(score) or {}).get("weights_sha256")
    measure = f"measure again: zoo score {shlex.quote(str(folder))}"
    if measured is None:
        raise CheckpointError(f"{folder / SCORE}: does not say which weights it was measured on; {measure}")
    there = weights_hash(folder)
    if measured != there:
        was = one_line(measured)[:12]
        raise CheckpointError(
            f"{folder / SCORE}: was measured on other weights (sha256 {was}..., here {there[:12]}...); {measure}"
        )


def _refuse_to_replace(folder: Path, overwrite: bool) -> None:
    path = folder / CARD
    if overwrite or not path.is_file():
        return
    try:
        values = yaml.safe_load(_read(path).split("---\n")[1])
        ours = isinstance(values, dict) and values.get("library_name") == "zoo"
    except (IndexError, yaml.YAMLError, RecursionError):
        ours = False
    if not ours:
        raise CheckpointError(f"{path}: was not written by zoo card; move it away, or overwrite it with --overwrite")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None


def _first_difference(one: str, other: str) -> int | None:
    """The number of the first line that differs."""
    if one == other:
        return None
    lines = (one.split("\n"), other.split("\n"))
    same = (a == b for a, b in zip(*lines, strict=False))
    return next((i for i, equal in enumerate(same, 1) if not equal), min(map(len, lines)) + 1)


def _draw(folder: Path, score: Mapping[str, Any]) -> None:
    """The pictures, where they can be drawn; without matplotlib those that are there stay."""
    from zoo.train.plots import tradeoff_plot, write_plots

    points = read_points(folder)
    try:
        write_plots(score, folder)
        if points:
            student = student_of(score) or {}
            layers = sum(at(student, "mixers", name) or 0 for name in student.get("mixers") or {})
            tradeoff_plot(points, folder / "tradeoff.png", layers=int(layers) or None)
    except ImportError:
        return


def read_points(folder: Path) -> list[dict[str, Any]]:
    """tradeoff.json, the points of a curve; [] where there is none."""
    path = folder / "tradeoff.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, list) or not all(isinstance(point, dict) for point in values):
        raise DataError(f"{path}: expected a list of points")
    for point in values:
        for key in ("keep", "kl"):
            at(point, key)
    return values


def card_text(folder: Path, score: Mapping[str, Any], facts: Facts) -> str:
    """The text of the card of a folder, with the pictures that are there."""
    return render(score, facts, [name for name in PLOTS if (folder / name).is_file()])


def render(score: Mapping[str, Any], facts: Facts, plots: Sequence[str] = ()) -> str:
    """The text of a card, from a score as `read_score` gives it, facts, and the names of pictures beside it."""
    student, task = student_of(score) or {}, card_task(score)
    teacher = next((row for row in score["rows"] if row["role"] == "teacher"), None)
    template = resources.files("zoo.model_cards").joinpath("template.md").read_text(encoding="utf-8")
    text = Template(template).substitute(
        front_matter=front_matter(_metadata(score, facts, task, student)),
        title=inline(facts.title or student["name"]),
        summary=_summary(student, teacher, facts, task),
        usage=_usage(facts, task),
        lineage=_lineage(facts, student, score),
        score=_score_section(score, student),
        plots="\n\n".join(f"![{alt}]({name})" for name, alt in PLOTS.items() if name in plots),
        limits=_limits(score, student, facts, task),
        reproduce=_reproduce(facts, score),
    )
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def _metadata(score: Mapping[str, Any], facts: Facts, task: CardTask, student: Row) -> dict[str, Any]:
    """What the Hub reads; https://huggingface.co/docs/hub/model-cards describes the keys."""
    mixers = sorted(one_line(name) for name in set(student.get("mixers") or {}) - {"attention"})
    known = [name for name in mixers if name.replace("_", "").isalnum()]
    return {
        "license": facts.license,
        "base_model": facts.base_model,
        "datasets": facts.datasets,
        "library_name": "zoo",
        "pipeline_tag": task.pipeline,
        "tags": list(dict.fromkeys([*facts.tags, "zoo", *(["distillation"] if facts.teacher else []), *known])),
        "model-index": _model_index(score, facts, task, student),
    }


def _model_index(score: Mapping[str, Any], facts: Facts, task: CardTask, student: Row) -> list[dict[str, Any]]:
    """The Hub's older form of results, the only one for text that is no benchmark there."""
    values = [(metric, at(student, metric.key)) for metric in task.metrics]
    metrics = [{"type": m.type, "name": m.name, "value": round(v, 6)} for m, v in values if v is not None]
    source = (score.get("data") or {}).get("source")
    if not metrics or not isinstance(source, str):
        return []
    on_hub = _hub_data(score)
    data = {"type": on_hub or "unknown", "name": one_line(source), "split": "held out"}
    results = [{"task": {"type": task.pipeline}, "dataset": data, "metrics": metrics}]
    return [{"name": one_line(facts.title or student["name"]), "results": results}]


def _hub_data(score: Mapping[str, Any]) -> str | None:
    """The data set on the Hub that was scored, or None."""
    source = (score.get("data") or {}).get("source")
    name = source.removeprefix("hf:").split(":")[0] if isinstance(source, str) and source.startswith("hf:") else ""
    return name if is_repository(name) else None


def eval_results(score: Mapping[str, Any], facts: Facts) -> str | None:
    """The result in the form of `.eval_results/*.yaml`, for a score of a benchmark on the Hub; else None.

    Raises ConfigError for the task of a benchmark without a score of one.
    """
    if facts.benchmark_task is None:
        return None
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    name, student, task = _hub_data(score), student_of(score) or {}, card_task(score)
    value = at(student, task.metrics[0].key) if task.metrics else None
    if name is None or value is None:
        raise ConfigError(
            f"benchmark_task: {facts.benchmark_task!r} needs a score of a data set on the Hub; "
            "measure with: zoo score DIR --data hf:ORG/NAME"
        )
    entry = EvalResultEntry(
        dataset_id=name, task_id=facts.benchmark_task, value=value, date=score.get("date"),
        notes=f"{task.metrics[0].name}, measured by zoo score",
    )  # fmt: skip
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)


def _summary(student: Row, teacher: Row | None, facts: Facts, task: CardTask) -> str:
    name = facts.teacher or (teacher or {}).get("name")
    mixers = {code(mixer): at(student, "mixers", mixer) or 0 for mixer in student.get("mixers") or {}}
    layers = sum(mixers.values())
    parts = [f"{count} of {layers} layers are {mixer}" for mixer, count in mixers.items()]
    made = f"Made from {inline(name)} by replacing its attention and distilling" if name else "Trained from nothing"
    sentences = [f"{made}: {', '.join(parts)}." if parts else f"{made}."]
    summary = " ".join([*sentences, *task.summary(student), *_ratios(student, teacher)])
    return summary if student.get("weights_sha256") else f"{summary}\n\n{UNNAMED}"


def _ratios(student: Row, teacher: Row | None) -> list[str]:
    def numbers(row: Row | None, key: str) -> dict[int, float]:
        found = {n: at(row or {}, key, n) for n in lengths([row or {}], key)}
        return {int(n): value for n, value in found.items() if value and n.isdecimal()}

    out = []
    own, other = numbers(student, "state_bytes"), numbers(teacher, "state_bytes")
    if shared := set(own) & set(other):
        longest = max(shared)
        out.append(f"After {longest} tokens its state has {own[longest] / other[longest]:.2f}x the bytes.")
    if speedup := numbers(student, "decode_speedup"):
        longest = max(speedup)
        out.append(f"After {longest} tokens it writes {speedup[longest]:.2f}x as fast.")
    return out


def _usage(facts: Facts, task: CardTask) -> str:
    """How to load the model in three lines, and what to do with it."""
    place = facts.repo or facts.location or "path/to/model"
    source = json.dumps(f"hf-hub:{facts.repo}" if facts.repo else place)
    lines = ["import zoo", f"model = zoo.create_model({source}).eval()"]
    if task.loader is not None:
        prepare = "tokenizer" if task.loader == "AutoTokenizer" else "processor"
        lines[0] += ", transformers"
        lines.append(f"{prepare} = transformers.{task.loader}.from_pretrained({json.dumps(place)})")
    said = "The model is a transformers `PreTrainedModel`; its classes are registered when `zoo` is imported."
    return "\n\n".join([code_block(lines, "python"), *([code_block(task.use, "python")] if task.use else []), said])


def _lineage(facts: Facts, student: Row, score: Mapping[str, Any]) -> str:
    tokens, cpu = at(student, "train_tokens"), at(student, "train_cpu_seconds")
    cpu = facts.cpu_seconds if cpu is None else cpu
    stated = {
        "Teacher": facts.teacher,
        "Revision of the teacher": facts.teacher_revision,
        "Licence of the teacher": facts.teacher_license,
        "Licence": facts.license,
        "Trained on": facts.data,
        "Licence of the data": facts.data_license,
        "Tokens trained on": facts.tokens if tokens is None else tokens,
        "CPU-seconds": None if cpu is None else round(cpu),
        "GPU-seconds": None if facts.gpu_seconds is None else round(facts.gpu_seconds),
        "Seed": facts.seed,
        "zoo": facts.version or (score.get("versions") or {}).get("zoo"),
        "Commit of zoo": facts.commit,
    }
    lines = [f"- {name}: {inline(value)}" for name, value in stated.items() if value is not None]
    if facts.stages:
        columns = list(dict.fromkeys(key for stage in facts.stages for key in stage))
        cells = [[_cell(stage.get(column)) for column in columns] for stage in facts.stages]
        lines += ["", "Stages, in this order:", "", table([c.replace("_", " ") for c in columns], cells)]
    return "\n".join(lines) or "Nothing is recorded."


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _score_section(score: Mapping[str, Any], student: Row) -> str:
    parts, batch = (
        [f"{title}:\n\n{table(header, lines)}" for title, header, lines in tables(score)],
        card_task(score).batch,
    )
    if source := (score.get("data") or {}).get("source"):
        parts.append(f"Data: {inline(source)}, the same for all models.")
    if machine := score.get("machine"):
        where = machine.get("cpu") if machine.get("device") in (None, "cpu") else machine["device"]
        parts.append(
            f"Measured on {inline(where)}, {inline(machine.get('threads'))} threads of "
            f"{inline(machine.get('cores'))} cores, {inline(machine.get('dtype'))}, batch {batch}; times were taken in "
            "turns."
        )
    versions = {**(score.get("versions") or {}), "date": score.get("date")}
    if known := [f"{name} {version}" for name, version in versions.items() if version]:
        parts.append(f"Measured with: {inline(', '.join(known))}.")
    if sha256 := student.get("weights_sha256"):
        parts.append(f"These are the numbers of the weights whose SHA-256 is {code(sha256)} (`zoo.hub.weights`).")
    return "\n\n".join([*parts, *(f"- {inline(note)}" for note in score.get("notes") or [])])


def _limits(score: Mapping[str, Any], student: Row, facts: Facts, task: CardTask) -> str:
    inherited = ["It inherits what its teacher gets wrong; nothing was done about it here."]
    taught = facts.teacher or any(row["role"] == "teacher" for row in score["rows"])
    found = [*(inherited if taught else []), *task.limits(score, student), *map(inline, facts.limits)]
    return "\n".join(f"- {line}" for line in found)


def _reproduce(facts: Facts, score: Mapping[str, Any]) -> str:
    commands = [c for c in dict.fromkeys((facts.command, score.get("command"))) if c]
    return code_block(commands) if commands else "The command was not recorded."
