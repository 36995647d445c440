"""`zoo.score`: what a student kept of its teacher, and what it costs, measured on the same text beside the baselines.

A score has a row for the teacher, for the untrained student and for the sliding window of equal state bytes where they
are given, and for the student. A number that was not measured is null; none is estimated.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.train import tasks
from zoo.train.embeddings import compare_embeddings
from zoo.train.evaluation import Ablated, Comparison, branched, compare, greedy_agreement
from zoo.train.image_score import compare_images, image_speed
from zoo.train.measure import fits, machine, measure_speed, parameters, position_limit, state_bytes_at, versions
from zoo.train.score_inputs import (
    ROLES,
    check_tasks,
    count_mixers,
    hash_of,
    model_name,
    one_tokenizer,
    resolve_model,
    sample_of,
    spent_on,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROW_KEYS = (
    "name", "role", "perplexity", "kl", "kl_standard_error", "top1", "cosine", "cosine_standard_error",
    "spearman", "neighbour", "cosine_by_length", "accuracy", "images_per_s", "images_per_cpu_s", "greedy_agreement",
    "perplexity_by_position", "kl_by_position", "passkey", "passkey_choice", "mqar", "branches", "state_bytes",
    "decode_tokens_per_s", "decode_tokens_per_cpu_s", "decode_speedup",
    "prefill_tokens_per_s", "prefill_tokens_per_cpu_s", "parameters", "mixers", "train_tokens", "train_cpu_seconds",
    "weights_sha256",
)  # fmt: skip


@dataclass
class Score:
    """Measured rows, and all that is needed to measure them again. `row("student")` gives one of them."""

    rows: list[dict[str, Any]]
    data: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    task: str | None = None
    date: str | None = None

    def row(self, role: str) -> dict[str, Any] | None:
        """The row of a role, or None."""
        return next((row for row in self.rows if row["role"] == role), None)

    def to_json(self) -> dict[str, Any]:
        """The score as JSON types; numbers that are not finite are null."""
        return _finite(asdict(self))

    def table(self, console: Any = None) -> None:
        """Print quality, recall and cost, a column a model."""
        from rich.console import Console
        from rich.table import Table

        from zoo.train.card_tasks import tables

        console = console or Console()
        for title, header, lines in tables(self.to_json()):
            table = Table(title=title, title_justify="left")
            for i, name in enumerate(header):
                table.add_column(name, justify="right" if i else "left")
            for line in lines:
                table.add_row(*line)
            console.print(table)
        for note in self.notes:
            console.print(f"note: {note}", style="dim", markup=False)

    def save(self, folder: str | Path) -> list[Path]:
        """Write score.json, and plots where matplotlib is installed; the paths written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path, partial = folder / "score.json", folder / "score.json.partial"
        partial.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
        from zoo.train.plots import write_plots

        try:
            return [path, *write_plots(self.to_json(), folder)]
        except ImportError:
            note = "no plots: matplotlib is not installed (pip install 'zoo[plots]')"
            self.notes += [] if note in self.notes else [note]
            return [path]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read score.json, or the folder it is in. Raises DataError where it is not a score."""
        path = Path(path)
        path = path / "score.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from None
        except (ValueError, TypeError):
            raise DataError(f"{path}: not a score; `zoo score` writes one") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


@dataclass(frozen=True)
class _Plan:
    """What is measured, and how much of it."""

    length: int
    tokens: int
    lengths: tuple[int, ...]
    scales: tuple[int, ...]
    examples: int
    prompts: int
    speed_lengths: tuple[int, ...]
    branch_tokens: int
    dtype: str
    seed: int

    @classmethod
    def of(cls, *, quick: bool, speed: bool, lengths: Sequence[int], **values: Any) -> _Plan:
        """Everything, or with `quick` a fraction of it."""
        fast = tuple(n for n in lengths if not quick or n <= 2048) if speed else ()
        if quick:
            values["tokens"] = min(values["tokens"], 4 * values["length"])
            values["scales"] = tuple(s for s in values["scales"] if s <= 2)
            values["examples"] = min(values["examples"], 2)
        values |= {"prompts": 4 if quick else 16, "branch_tokens": 2048 if quick else 8192}
        return cls(lengths=tuple(lengths), speed_lengths=fast, **values)


def score(
    student: Any,
    *,
    teacher: Any,
    untrained: Any = None,
    window_baseline: Any = None,
    data: Any,
    tokenizer: Any = None,
    length: int = 512,
    tokens: int = 20480,
    lengths: Sequence[int] = (512, 2048, 8192),
    scales: Sequence[int] = (1, 2, 4),
    examples: int = 4,
    speed: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    train_info: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    quick: bool = False,
    command: str | None = None,
    progress: bool = False,
) -> Score:
    """Measure a student against its teacher, beside the baselines that are given.

    Args:
        student, untrained, window_baseline: zoo models, or folders of saved ones.
        teacher: a zoo model, a `Teacher`, or anything that `load_teacher` takes; image classifiers need none.
        data: held-out text (whatever `zoo.text.read_documents` takes), or token ids (N, L) int64, scored as they are.
            Rows come from one document each where enough documents are long enough. Of image classifiers all images
            of a source (`zoo.images`), with `quick` 1000 of them.
        tokenizer: of the text; by default the teacher's, else the student's.
        length, tokens: of a row, and in all. Sentence encoders read whole texts, cut at `length`.
        lengths: where state bytes and speed are measured.
        scales: recall tasks are as long as these multiples of `length`.
        examples: prompts of each recall task at each length.
        speed: whether to measure it (the slowest part).
        dtype: "float32", or "bfloat16" for autocast; published numbers are float32.
        seed: of the sample, the tasks and the masked tokens.
        train_info: by role ("student", "window_baseline", ...) what training took: a mapping or an object with `tokens`
            and `cpu_seconds`. Given for one model, without roles, it is the student's.
        names: by role, the names in the table.
        out: a folder for score.json and the plots.
        quick: a glance: fewer tokens and examples, speed up to length 2048.
        command: how to measure this again.
        progress: show what is being measured.

    Raises:
        DataError: no tokenizer, or too little text. ConfigError: a task that has no score, vocabularies or a tokenizer
        that do not fit.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if isinstance(data, Tensor) and data.dim() == 2:
        length = data.shape[1]
    plan = _Plan.of(
        quick=quick, speed=speed, lengths=lengths, length=length, tokens=tokens, scales=tuple(scales),
        examples=examples, dtype=dtype, seed=seed,
    )  # fmt: skip
    models: dict[str, Any] = {}
    found, hashes = [], {}
    if teacher is not None:
        models["teacher"], own = resolve_model(teacher, teacher=True)
        found.append(own)
    for role, given in (("untrained", untrained), ("student", student), ("window_baseline", window_baseline)):
        if given is not None:
            models[role], own = resolve_model(given)
            found.append(own)
            if role != "untrained":
                hashes[role] = hash_of(given, models[role])
    check_tasks(models)
    tokenizer = one_tokenizer(tokenizer, found)
    sample, about = sample_of(models, data, tokenizer, tokens=plan.tokens, length=length, quick=quick, seed=seed)
    with _progress(progress) as step:
        result = _Measuring(models, tokenizer, sample, plan, step).run(train_info, names)
    result.data, result.command, result.task = about, command, models["student"].config.task
    result.date = datetime.now(UTC).isoformat(timespec="seconds")
    for role, sha256 in hashes.items():
        result.rows[[row["role"] for row in result.rows].index(role)]["weights_sha256"] = sha256
    result.settings = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(plan).items()}
    if out is not None:
        result.save(out)
    return result


@contextmanager
def _progress(show: bool) -> Iterator[Any]:
    """A function `step(what, total)` that gives back a function to be called with what was done."""
    if not show:
        yield lambda what, total=1: lambda done=1: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:

        def step(what: str, total: float = 1) -> Any:
            task = bar.add_task(what, total=total)
            return lambda done=1: bar.advance(task, done)

        yield step


class _Measuring:
    """One run of `score`: models by role, and the rows of the table as they fill."""

    def __init__(
        self,
        models: dict[str, Any],
        tokenizer: Any,
        sample: Any,
        plan: _Plan,
        step: Any,
    ) -> None:
        self.sample, self.rows_NL = sample, sample  # rows, where the task is one of text
        self.models, self.tokenizer, self.plan, self.step = models, tokenizer, plan, step
        self.teacher: Any = models.get("teacher")
        self.others = {role: model for role, model in models.items() if role != "teacher"}
        self.dtype = DTYPES[plan.dtype]
        self.rows: dict[str, dict[str, Any]] = {role: dict.fromkeys(ROW_KEYS) for role in models}
        self.notes: list[str] = []

    def run(self, train_info: Mapping[str, Any] | None, names: Mapping[str, str] | None) -> Score:
        """Measure everything that this kind of model has."""
        for role, model in self.models.items():
            spent = spent_on(train_info, role)
            self.rows[role] |= {
                "name": (names or {}).get(role) or model_name(model, role),
                "role": role,
                "parameters": parameters(model),
                "mixers": count_mixers(model),
                "train_tokens": spent.get("tokens"),
                "train_cpu_seconds": spent.get("cpu_seconds"),
            }
        task = self.models["student"].config.task
        quality = {"sentence-embedding": self.embeddings, "image-classification": self.images}
        quality.get(task, self.predictions)()
        if task == "causal-lm":
            self.branches()
            self.continuations()
            self.recall()
            self.state_bytes()
            if self.plan.speed_lengths:
                self.speed()
        device = self.models["student"].device
        return Score(
            [_finite(self.rows[role]) for role in ROLES if role in self.rows],
            versions=versions(), machine=machine(device, self.dtype), notes=self.notes,
        )  # fmt: skip

    def images(self) -> None:
        """Accuracy, agreement, KL of all models on the same images, and how many a second they read."""
        on_batch = _counting(self.step("images", len(self.sample)))
        for role, found in compare_images(
            self.teacher, self.others, self.sample, dtype=self.dtype, on_batch=on_batch
        ).items():
            self.rows[role] |= found.row()
        if self.plan.speed_lengths:
            timed = {role: model for role, model in self.models.items() if role != "untrained"}
            for role, speed in image_speed(timed, dtype=self.dtype).items():
                self.rows[role] |= speed

    def embeddings(self) -> None:
        """Cosine, Spearman and neighbours of all models on the same sentences."""
        sentences = self.sample
        on_batch = _counting(self.step("sentence embeddings", len(sentences) * len(self.models)))
        found = compare_embeddings(
            self.teacher, self.others, sentences, tokenizer=self.tokenizer, dtype=self.dtype, on_batch=on_batch
        )
        for role, c in found.items():
            self.rows[role] |= {
                "cosine": c.cosine,
                "cosine_standard_error": c.standard_error,
                "spearman": c.spearman,
                "neighbour": c.neighbour,
                "cosine_by_length": c.by_length(),
            }

    def predictions(self) -> None:
        """Perplexity, KL, top-1 over all rows, for all models in one pass."""
        for role, c in self._compare(self.others, self.rows_NL, "perplexity, KL").items():
            self.rows[role] |= {
                "perplexity": c.perplexity,
                "perplexity_by_position": c.by_position("perplexity"),
                "kl": c.kl,
                "kl_standard_error": c.kl_standard_error,
                "top1": c.top1,
                "kl_by_position": c.by_position("kl"),
            }

    def _compare(self, students: Mapping[str, Any], rows_NL: Tensor, what: str) -> dict[str, Comparison]:
        return compare(
            self.teacher, students, rows_NL, tokenizer=self.tokenizer, dtype=self.dtype, seed=self.plan.seed,
            on_batch=_counting(self.step(what, len(rows_NL))),
        )  # fmt: skip

    def branches(self) -> None:
        """The students with one branch switched off, on a part of the rows."""
        able = {role: model for role, model in self.others.items() if branched(model)}
        if not able:
            return
        part_NL = self.rows_NL[: max(1, self.plan.branch_tokens // self.rows_NL.shape[1])]
        variants: dict[str, Any] = dict(able)
        for role, model in able.items():
            variants |= {f"{role} {branch}": Ablated(model, branch) for branch in ("linear", "window")}
        totals = self._compare(variants, part_NL, "branches")
        for role in able:
            cases = {"both_on": role, "linear_off": f"{role} linear", "window_off": f"{role} window"}
            self.rows[role]["branches"] = {
                "tokens": part_NL.numel(),
                **{case: {"kl": totals[n].kl, "perplexity": totals[n].perplexity} for case, n in cases.items()},
            }

    def continuations(self) -> None:
        """How long greedy continuations stay the teacher's."""
        prompt_BP = self.rows_NL[: self.plan.prompts, : max(1, min(64, self.rows_NL.shape[1] // 2))]
        if not all(fits(model, prompt_BP.shape[1] + 64) for model in self.models.values()):
            self.notes.append("greedy agreement was not measured: the models' positions end too early")
            return
        done = self.step("greedy agreement")
        end_id = getattr(self.tokenizer, "eos_token_id", None)
        for role, mean in greedy_agreement(self.teacher, self.others, prompt_BP, end_id=end_id).items():
            self.rows[role]["greedy_agreement"] = mean
        done()

    def recall(self) -> None:
        """Passkey and MQAR at multiples of the length."""
        plan = self.plan
        limits = [limit for model in self.models.values() if (limit := position_limit(model)) is not None]
        lengths = tasks.usable_lengths(plan.length, plan.scales, min(limits, default=None))
        if len(lengths) < len(plan.scales):
            self.notes.append(f"recall was measured up to length {max(lengths, default=0)}: the models' positions end")
        symbols = tasks.symbols(self.tokenizer, min(model.config.vocab_size for model in self.models.values()))
        options: dict[str, int] = {"examples": plan.examples, "seed": plan.seed}
        advance = self.step("passkey, MQAR", len(lengths) * len(self.models))
        for role, model in self.models.items():
            row = self.rows[role]
            row |= {"passkey": {}, "passkey_choice": {}, "mqar": {}}
            for n in lengths:
                with self._noted():
                    got = tasks.passkey_scores(model, n, tokenizer=self.tokenizer, **options)
                    row["passkey"][n], row["passkey_choice"][n] = got["exact"], got["choice"]
                with self._noted():
                    row["mqar"][n] = tasks.mqar_accuracy(model, n, symbols=symbols, **options)
                advance()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """What the text or the tokenizer does not allow is left out, and said once."""
        try:
            yield
        except DataError as error:
            if str(error) not in self.notes:
                self.notes.append(str(error))

    def state_bytes(self) -> None:
        """Bytes of the state at each length."""
        for role, model in self.models.items():
            self.rows[role]["state_bytes"] = {n: state_bytes_at(model, n) for n in self.plan.lengths}

    def speed(self) -> None:
        """Prefill and decoding speed; the untrained student computes what the student does and is not timed."""
        timed = {role: model for role, model in self.models.items() if role != "untrained"}
        advance = self.step("speed", max(self.plan.speed_lengths) * len(timed))
        all_times = measure_speed(
            timed, self.plan.speed_lengths, dtype=self.dtype, on_tokens=advance, seed=self.plan.seed
        )
        for role, times in all_times.items():
            self.rows[role] |= {
                "decode_tokens_per_s": times.decode_tokens_per_s(),
                "decode_tokens_per_cpu_s": times.decode_tokens_per_s(cpu=True),
                "prefill_tokens_per_s": times.prefill_tokens_per_s(),
                "prefill_tokens_per_cpu_s": times.prefill_tokens_per_s(cpu=True),
            }
            if role != "teacher":
                self.rows[role]["decode_speedup"] = times.decode_speedup(all_times["teacher"])


def _counting(advance: Any) -> Any:
    """What is told how many are done, for a bar that is told how many more."""
    before = [0]

    def on_batch(done: int) -> None:
        advance(done - before[0])
        before[0] = done

    return on_batch
