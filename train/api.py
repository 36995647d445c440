"""Running a recipe: `distill` for a student and a teacher at hand, `train_recipe` for everything that a YAML names."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zoo.errors import ConfigError, DataError
from zoo.models.create import create_model, load_folder
from zoo.text import Source, byte_tokenizer
from zoo.train.checkpoint import CheckpointFolder
from zoo.train.folder import (
    TEMPORARY,
    claim,
    finished,
    full_disk_is_said,
    processes,
    read_json,
    save_quietly,
    save_result,
    weights_digest,
)
from zoo.train.guards import catching_interrupts
from zoo.train.loop import run_stages
from zoo.train.measure import versions
from zoo.train.progress import RunLog
from zoo.train.recipe import Checkpoints, Recipe, Stage, parse_stages
from zoo.train.run import Run
from zoo.train.sources import TrainingData, training_data


@dataclass
class DistillResult:
    """A trained model and what it cost. `stages`: one record a stage; `log`: one row a step."""

    model: Any
    log: list[dict[str, Any]]
    tokens: int
    cpu_seconds: float
    stages: list[dict[str, Any]] = field(default_factory=list)
    out: Path | None = None


def distill(
    student: Any,
    teacher: Any,
    *,
    data: Source | Any,
    stages: Any = "quick",
    out: str | Path | None = None,
    tokenizer: Any = None,
    resume: bool = True,
    overwrite: bool = False,
    held_out: float = 0.05,
    eval_tokens: int = 0,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> DistillResult:
    """Train `student` in stages, most of them against `teacher`. The student itself is changed, and comes back.

    Args:
        student: a zoo model, or the folder of one.
        teacher: a zoo model, a `Teacher`, anything that `load_teacher` takes; None where no stage needs one.
        data: text, see `zoo.text.read_documents`; of image classifiers images with labels, see `zoo.images`.
        stages: a recipe's file or name (its stages are taken), or a list of `Stage`s or mappings.
        out: the run's folder, see above; without it nothing is written and nothing can be resumed.
        tokenizer: by default the student's or the teacher's; images need none.
        resume: go on with a run that is in `out` already; it must be this very run.
        overwrite: remove the run that is in `out`.
        held_out: the share of documents or images (by hash of them and `seed`) that is not trained on.
        eval_tokens: how many tokens of those are scored at each checkpoint; with it the best checkpoint is the one with
            the lowest held-out loss, without it the one with the lowest running mean of the training loss.
        seed: of shuffling and of the stages.
        checkpoints: how often, and how many are kept.
        tensorboard, progress: show it there; show a bar.

    Raises:
        ConfigError: stages that do not fit the models. DataError: text or tokenizer that does not fit.
        CheckpointError: `out` belongs to another run. TrainingError: NaN, divergence, a full disk.
        Interrupted (a KeyboardInterrupt): Ctrl-C, after the state was saved.
    """
    plan = parse_stages(stages)
    student, found = _model(student)
    teacher_model, found_too = _teacher(teacher)
    tokenizer = tokenizer if tokenizer is not None else (found if found is not None else found_too)
    return _run(
        student,
        teacher_model if any(stage.needs_teacher for stage in plan) else None,
        training_data(student, data, tokenizer=tokenizer, held_out=held_out, seed=seed),
        plan,
        out=None if out is None else Path(out),
        resume=resume,
        overwrite=overwrite,
        held_out=held_out,
        eval_tokens=eval_tokens,
        seed=seed,
        when=checkpoints or Checkpoints(),
        tensorboard=tensorboard,
        progress=progress,
    )


def train_recipe(
    recipe: Recipe,
    *,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> DistillResult:
    """Run a whole recipe: create the model or convert the teacher, then train it in stages. Errors as in `distill`.

    `command` is what a shell would be told to do the same, for the record in train.json.
    """
    if recipe.data is None:
        raise ConfigError("data: this key is needed; name text files, such as data='text/*.txt'")
    if recipe.model is None and recipe.mixer is None:
        raise ConfigError("give a model to train, or a teacher and a mixer to convert it to")
    data: Source = recipe.data if isinstance(recipe.data, str) else [Path(name) for name in recipe.data]
    out = None if recipe.out is None else Path(recipe.out)
    values = recipe.plain()
    if out is not None:
        claim(out, {"recipe": {k: v for k, v in values.items() if k != "out"}}, resume, overwrite)
    teacher, found = _teacher(recipe.teacher)
    tokenizer = _tokenizer(recipe.tokenizer) if recipe.tokenizer else found
    if recipe.model is not None:
        torch.manual_seed(recipe.seed)
        student, own = _model(recipe.model, **recipe.model_options)
        tokenizer = tokenizer if tokenizer is not None else own
    how: dict[str, Any] = {"tokenizer": tokenizer, "held_out": recipe.held_out, "seed": recipe.seed}
    read = training_data(teacher if recipe.model is None else student, data, **how)
    if recipe.model is None:
        student = _converted(recipe, teacher, tokenizer, read, out, progress)
    return _run(
        student,
        teacher if any(stage.needs_teacher for stage in recipe.stages) else None,
        read,
        recipe.stages,
        out=out,
        resume=True,
        overwrite=False,
        held_out=recipe.held_out,
        eval_tokens=recipe.eval_tokens,
        seed=recipe.seed,
        when=recipe.checkpoints,
        tensorboard=recipe.tensorboard,
        progress=progress,
        command=command,
    )


def _converted(
    recipe: Recipe, teacher: Any, tokenizer: Any, data: TrainingData, out: Path | None, progress: bool
) -> Any:
    """The student that a recipe asks for: converted once, then kept in `out/initial` for whoever resumes."""
    from zoo.convert.api import convert
    from zoo.convert.teachers import Teacher

    state = processes()
    initial = None if out is None else out / "initial"
    with state.main_process_first():
        if initial is not None and (initial / "config.json").is_file():
            return load_folder(initial)
        student = convert(
            Teacher(model=teacher, tokenizer=tokenizer),
            recipe.mixer,
            keep=recipe.keep,  # type: ignore[arg-type]
            mixer_options=recipe.mixer_options or None,
            calibrate=recipe.calibrate,
            seed=recipe.seed,
            progress=progress,
            **data.calibration(recipe.stages),
        )
        if initial is not None and state.is_main_process:
            with full_disk_is_said(initial):
                temporary = initial.with_name(f"{TEMPORARY}initial")
                shutil.rmtree(temporary, ignore_errors=True)
                save_quietly(student, temporary)
                if (report := getattr(student, "report", None)) is not None and hasattr(report, "to_dict"):
                    (temporary / "conversion.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
                os.rename(temporary, initial)
    return student


def _run(
    student: Any,
    teacher: Any,
    data: TrainingData,
    stages: list[Stage],
    *,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    held_out: float,
    eval_tokens: int,
    seed: int,
    when: Checkpoints,
    tensorboard: bool,
    progress: bool,
    command: str | None = None,
) -> DistillResult:
    data.check([model for model in (student, teacher) if model is not None], stages)
    run = Run(student, teacher, data, stages, seed, eval_tokens, out, when=when, show=progress)
    run.command = command
    main = processes().is_main_process
    if out is not None:
        identity = {
            "stages": [stage.plain() for stage in stages],
            "seed": [seed, held_out, eval_tokens, processes().num_processes],
            "student": weights_digest(student),
            "teacher": None if teacher is None else weights_digest(teacher),
            **data.identity(),
        }
        claim(out, identity, resume, overwrite)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        if (summary := finished(student, out)) is not None:
            run.log = RunLog(out / "log.jsonl")
            run.log.rewind(1 << 60)
            costs = (summary["tokens"], summary["cpu_seconds"], summary["stages"])
            return DistillResult(student, run.log.rows, *costs, out)
        run.checkpoints = CheckpointFolder(out / "checkpoints", key, when.keep)
        run.log = RunLog(out / "log.jsonl" if main else None, out / "tensorboard" if tensorboard and main else None)
    with catching_interrupts() as run.stop:
        try:
            run_stages(run)
        finally:
            run.log.close()
    summary = _summary(run)
    if out is not None and main:
        save_result(student, data, out, summary)
    rows = run.log.rows
    return DistillResult(student, rows, run.state.tokens, run.state.cpu_seconds, run.state.done, out)


def _summary(run: Run) -> dict[str, Any]:
    device = run.student.device
    wall = sum(stage["seconds"] for stage in run.state.done) * processes().num_processes
    return {
        "tokens": run.state.tokens,
        "cpu_seconds": round(run.state.cpu_seconds, 3),
        **({} if device.type == "cpu" else {"gpu_seconds": round(wall, 3)}),
        "stages": run.state.done,
        "recipe": [stage.plain() for stage in run.stages],
        "data": run.data.name,
        "seed": run.seed,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} {platform.system()}",
        "versions": versions(),
        "command": run.command,
    }


def _model(model: Any, **options: Any) -> tuple[Any, Any]:
    """A zoo model and the tokenizer that comes with it (or None)."""
    if not isinstance(model, str | Path):
        return model, getattr(model, "tokenizer", None)
    loaded = create_model(str(model), **options)
    return loaded, _saved_tokenizer(Path(model))


def _teacher(teacher: Any) -> tuple[Any, Any]:
    from zoo.models.backbone import ZooPreTrainedModel

    if teacher is None:
        return None, None
    if isinstance(teacher, ZooPreTrainedModel):
        return teacher, getattr(teacher, "tokenizer", None)
    if isinstance(teacher, str | Path) and read_json(Path(teacher) / "config.json").get("model_type") == "zoo":
        return _model(teacher)
    from zoo.convert.teachers import Teacher, load_teacher

    loaded = teacher if isinstance(teacher, Teacher) else load_teacher(teacher)
    return loaded.model, loaded.tokenizer


def _saved_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _tokenizer(name: str) -> Any:
    if name == "bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
