"""`zoo.convert`: a pretrained Transformer in, a cheaper model out, with a report of what was done."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.config import ImageOptions
from zoo.convert import calibration, experts
from zoo.convert.layerwise import MEASURES, Trace
from zoo.convert.report import ConversionReport, LayerReport
from zoo.convert.selection import Keep, KeepSpec, Selection, parse_keep, select_layers
from zoo.convert.surgery import (
    MixerSpec,
    attention_layers,
    attention_of,
    describe_mixer,
    layer_options,
    mixer_spec,
    replace_mixers,
)
from zoo.convert.target import check_target, fit_to_target
from zoo.convert.teachers import Teacher, load_teacher
from zoo.errors import ConversionError
from zoo.images import open_images, sample_images
from zoo.models.backbone import ZooPreTrainedModel
from zoo.models.shared import refuse_shared
from zoo.text import sample_tokens

CalibrationData = str | Path | Iterable[str] | Tensor


def convert(
    teacher: Any,
    mixer: MixerSpec | None = None,
    *,
    keep: KeepSpec | None = None,
    mixer_options: Mapping[str, Any] | None = None,
    ffn: str | None = None,
    ffn_options: Mapping[str, Any] | None = None,
    target: str | None = None,
    data: CalibrationData | None = None,
    calibrate: bool = True,
    tokens: int = 2048,
    length: int = 512,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Any:
    """Turn a pretrained Transformer into a student of the same task.

    Args:
        teacher: a Hub name, a folder, a GGUF file, a transformers model, a zoo model, or a `Teacher`.
        mixer: what replaces attention: a registered name ("gated_delta_net"), "M+window" (a linear mixer beside a
            sliding window), or a mapping of options with "name". None imports the teacher exactly.
        keep: the layers that keep attention, as `parse_keep` reads it: "all" (the default without a mixer), "none" (the
            default with one), a list of indices, "uniform:1/3", "sensitivity:1/3" (chosen by scans), ...
        mixer_options: options of the mixer, such as ``{"window": 128}``.
        ffn: what becomes of the MLPs: None leaves them, "upcycle" or "moefy" make mixtures of experts (see
            `zoo.convert.experts`), with `ffn_options` such as ``{"num_experts": 8, "top_k": 2}``.
        target: a layout that must be able to hold the student, such as "transformers" (`zoo.convert.target`): options
            are set for it, and a mixer without a form there is refused before any work.
        data: what to measure on: text (files, a glob, "hf:NAME", documents), token ids (rows, length), or images: a
            source of them (`zoo.images`), or a tensor (images, channels, rows, columns) as the model reads them. By
            default a causal language model writes text itself (`sample_from_teacher`); encoders need it given.
        calibrate: refit output projections in closed form where that brings the student closer on held-out rows.
        tokens, length: how many tokens to measure on, and in a row. A quarter of the rows is held out from the refits.
        seed: of the sampling.
        out, overwrite: a folder for `save_converted`, checked before any work is done.
        progress: show progress bars (on a terminal).

    Without data, calibration and scan nothing is run at all, and the report has no distances.
    Returns: the student, a model of the teacher's class in evaluation mode that shares no memory with it, with
    `student.report` (`ConversionReport`) and `student.tokenizer` (or None).

    Raises:
        ConversionError: a teacher that cannot be imported exactly, nothing to convert, wrong `keep`, no data where data
            is needed, too little of it, text without a tokenizer, no form in `target`. UnknownNameError: a misspelt
            mixer or target. TraitError: a mixer that cannot work in the teacher's direction. ConfigError: wrong
            options. DataError: unreadable data.
    """
    if out is not None:
        check_output(out, overwrite)
    spec = _check_request(mixer, keep, mixer_options, tokens, length)
    make_experts = experts.method(ffn, ffn_options)
    if target is not None:
        check_target(target)
    clock, owned = _Clock(), not isinstance(teacher, Teacher | ZooPreTrainedModel)
    teacher = teacher if isinstance(teacher, Teacher) else load_teacher(teacher)
    clock.lap("load")
    tokens_NL = None
    if spec is None and target is not None:
        fit_to_target(teacher.model, None, Keep(layers=(), count=0), target)
    if spec is None:
        student = teacher.model if owned else replace_mixers(teacher.model, {})
        report = _report(teacher, student, None, "all", None, None)
    else:
        wanted = _plan(teacher.model, spec, "none" if keep is None else keep)
        if target is not None:
            spec = fit_to_target(teacher.model, spec, wanted, target)
        tokens_NL, where = _calibration_tokens(teacher, wanted, data, calibrate, tokens, length, seed)
        clock.lap("data")
        student, report = _convert(teacher, spec, wanted, tokens_NL, calibrate, clock, progress)
        report.data, report.keep = where, str("none" if keep is None else keep)
    if make_experts is not None:
        if tokens_NL is None and (ffn == "moefy" or data is not None):
            tokens_NL, report.data = _calibration_tokens(
                teacher, Keep(layers=(), count=0), data, True, tokens, length, seed
            )
        student = make_experts(student, tokens_NL)
        _report_experts(report, str(ffn), teacher, student, tokens_NL)
        clock.lap("experts")
    report.cpu_seconds, student.report, student.tokenizer = clock.laps, report, teacher.tokenizer
    if out is not None:
        save_converted(student, out, overwrite)
    return student


class _Clock:
    """CPU-seconds of each step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.process_time()

    def lap(self, name: str) -> None:
        now = time.process_time()
        self.laps[name], self.last = round(now - self.last, 3), now


def _check_request(
    mixer: MixerSpec | None,
    keep: KeepSpec | None,
    mixer_options: Mapping[str, Any] | None,
    tokens: int,
    length: int,
) -> Any:
    """What is wrong with the arguments alone, before a teacher is loaded; the mixer's options, or None."""
    for name, value in (("tokens", tokens), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConversionError(f"{name} must be a positive number, got {value!r}")
    if mixer is not None:
        return mixer_spec(mixer, mixer_options)
    if keep not in (None, "all"):
        raise ConversionError(f"keep={keep!r} says which layers keep attention, but no mixer is given for the others")
    if mixer_options:
        raise ConversionError("mixer_options are given, but no mixer")
    return None


def _plan(model: ZooPreTrainedModel, spec: Any, keep: KeepSpec) -> Keep:
    """The parsed `keep`, after everything about the mixer that can be wrong was found."""
    have = attention_layers(model)
    if not have:
        raise ConversionError("nothing to convert: no layer of this model is softmax attention")
    wanted = parse_keep(keep, have)
    if wanted.count >= len(have):
        raise ConversionError(
            f"nothing to convert: keep={keep!r} keeps attention in all {len(have)} layers; "
            "leave out the mixer for an exact import"
        )
    refuse_shared(model, have)
    for i in have:
        layer_options(spec, attention_of(model, i))
    return wanted


def _calibration_tokens(
    teacher: Teacher, wanted: Keep, data: CalibrationData | None, calibrate: bool, tokens: int, length: int, seed: int
) -> tuple[Tensor | None, str]:
    """The tokens to measure on, and where they came from; None where nothing is to be measured."""
    config = teacher.model.config
    if config.positions == "learned":
        length = min(length, config.max_position_embeddings)
    if data is None and not calibrate and wanted.layers is not None:
        return None, "none"
    if isinstance(data, Tensor):
        found, where = data, "given images" if teacher.task == "image-classification" else "given tokens"
    elif data is not None and teacher.task == "image-classification":
        images, options = open_images(data), config.spec.image or ImageOptions.parse({})
        found, where = sample_images(images, options, seed=seed), images.name
    elif data is not None:
        if teacher.tokenizer is None:
            raise ConversionError(
                "text was given as data, but the teacher has no tokenizer; "
                "load it with load_teacher(..., tokenizer=...) or give token ids (rows, length)"
            )
        found = sample_tokens(data, teacher.tokenizer, tokens=tokens, length=length, seed=seed)
        where = str(data) if isinstance(data, str | Path) else "given documents"
    else:
        found = sample_from_teacher(teacher.model, max(2, tokens // length), length, seed=seed)
        where = "text that the teacher wrote"
    if calibrate:
        calibration.split_rows(len(found))  # raises where there is too little
    return found, where


@torch.no_grad()
def sample_from_teacher(model: ZooPreTrainedModel, rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Text that a causal language model writes itself: token ids (rows, length), sampled at temperature 1.

    Rows start with the model's first token (`bos_token_id`), or with a token drawn at random where it has none; an
    end-of-text token does not end a row. Raises ConversionError for encoders, which cannot write text: random tokens
    would say nothing about what their layers do.
    """
    config = model.config
    if config.task != "causal-lm":
        raise ConversionError(
            f"a model for {config.task} cannot write its own calibration text: give data=..., or calibrate=False "
            "with a fixed choice of layers"
        )
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    start_N1 = torch.randint(config.vocab_size, (rows, 1), generator=generator)
    if isinstance(config.bos_token_id, int) and 0 <= config.bos_token_id < config.vocab_size:
        start_N1 = torch.full((rows, 1), config.bos_token_id)
    found, cache = [start_N1.to(device)], None
    while len(found) < length:
        result = model(found[-1], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        probabilities = result.logits[:, -1].float().softmax(-1).cpu()
        found.append(torch.multinomial(probabilities, 1, generator=generator).to(device))
    return torch.cat(found, 1)


def _convert(
    teacher: Teacher,
    spec: Any,
    wanted: Keep,
    tokens_NL: Tensor | None,
    refit: bool,
    clock: _Clock,
    progress: bool,
) -> tuple[ZooPreTrainedModel, ConversionReport]:
    model, kept, chosen, result = teacher.model, wanted.layers, None, None
    trace = None if tokens_NL is None else Trace(model, tokens_NL)
    clock.lap("teacher")
    if kept is None:
        assert trace is not None
        chosen = select_layers(model, spec, wanted.count, trace, rounds=wanted.rounds, progress=progress)
        kept = tuple(chosen.kept)
        clock.lap("scan")
    layers = [i for i in attention_layers(model) if i not in kept]
    student = replace_mixers(model, dict.fromkeys(layers, spec), None if trace is None else trace.stats)
    described = {i: describe_mixer(student.model.layers[i].mixer, model.model.layers[i].mixer) for i in layers}
    if trace is not None:
        candidates = calibration.CANDIDATES if refit else ()
        result = calibration.calibrate(student, trace, layers, candidates=candidates, progress=progress)
        clock.lap("calibrate" if refit else "measure")
    report = _report(teacher, student, spec, "", chosen, result, described)
    report.tokens = 0 if trace is None else len(trace.tokens_NL) * trace.length
    report.held_out_tokens = 0 if result is None or trace is None else len(result.held_out_rows) * trace.length
    return student, report


def _report(
    teacher: Teacher,
    student: ZooPreTrainedModel,
    spec: Any,
    keep: str,
    chosen: Selection | None,
    result: calibration.CalibrationResult | None,
    described: Mapping[int, tuple[list[str], list[str]]] | None = None,
) -> ConversionReport:
    described = described or {}
    layers = []
    for i, block in enumerate(student.model.layers):
        names = described.get(i)
        row = LayerReport(layer=i, mixer=block.mixer.name, kept=names is None)
        if chosen is not None:
            row.missed, row.restored = chosen.missed[i], chosen.restored[i]
        if names is not None:
            sizes = {name: parameter.numel() for name, parameter in block.mixer.named_parameters()}
            row.copied, row.new = names
            row.copied_parameters, row.new_parameters = (sum(sizes[n] for n in part) for part in names)
        if result is not None and i in result.layers:
            found = result.layers[i]
            row.error_before, row.error_after = found.error_before, found.error_after
            row.refit, row.tried = found.kept, found.distances
        layers.append(row)
    name = None if spec is None else spec["name"] if isinstance(spec, dict) else spec.name
    report = ConversionReport(
        teacher=teacher.source,
        family=teacher.family,
        task=teacher.task,
        mixer=f"{_linear_name(spec)}+window" if name == "windowed_linear" else name,
        keep=keep,
        kept_layers=[row.layer for row in layers if row.kept],
        layers=layers,
        parameters=sum(p.numel() for p in student.parameters()),
        teacher_parameters=sum(p.numel() for p in teacher.model.parameters()),
        max_logit_error=teacher.max_logit_error,
    )
    if result is not None:
        report.measure = MEASURES[teacher.task]
        report.distance_before, report.distance = result.distance_before, result.distance_after
        report.agreement = result.agreement
    return report


def _report_experts(
    report: ConversionReport, ffn: str, teacher: Teacher, student: ZooPreTrainedModel, tokens_NL: Tensor | None
) -> None:
    """What changes in a report when MLPs become experts; distances are of the student as it is now, on all tokens."""
    report.ffn, report.parameters = ffn, sum(p.numel() for p in student.parameters())
    if tokens_NL is None:
        return
    trace, rows = Trace(teacher.model, tokens_NL, with_stats=False), range(len(tokens_NL))
    report.distance_before, report.measure = report.distance, MEASURES[teacher.task]
    report.distance = trace.distance(0, trace.inputs[0], rows, list(student.model.layers))
    report.tokens, report.agreement = tokens_NL.numel(), None


def _linear_name(spec: Any) -> str:
    linear = spec["linear"] if isinstance(spec, dict) else spec.linear
    return linear if isinstance(linear, str) else linear["name"]


def check_output(out: str | Path, overwrite: bool) -> None:
    """Raise ConversionError unless a model may be written to `out`: free, empty, or a model and `overwrite`."""
    out = Path(out)
    if out.is_dir():
        if any(out.iterdir()) and not overwrite:
            raise ConversionError(f"{out}: exists and is not empty; give overwrite=True (--overwrite) to replace it")
        if any(out.iterdir()) and not (out / "config.json").is_file():
            raise ConversionError(f"{out}: is not the folder of a model, so it is not overwritten; remove it yourself")
    elif out.exists():
        raise ConversionError(f"{out}: exists and is not a folder")


def save_converted(student: Any, out: str | Path, overwrite: bool = False) -> Path:
    """Save a student with its tokenizer and report: `config.json`, `model.safetensors`, the tokenizer's files and
    `conversion.json`. `zoo.create_model(out)` loads it.

    Everything is written to a folder beside `out` and renamed, so `out` is never half written, and what stood there is
    lost only once the new model is complete. Raises ConversionError where something else stands at `out`, or where it
    cannot be written.
    """
    out = Path(out)
    check_output(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ConversionError(f"{out}: cannot be written: {error.strerror or error}") from None
    try:
        _write(student, folder)
        _put_in_place(folder, out)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise ConversionError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
        raise
    return out


def _put_in_place(folder: Path, out: Path) -> None:
    if not out.exists():
        os.replace(folder, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.replace(out, old)
    try:
        os.replace(folder, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old)


def _write(student: Any, folder: Path) -> None:
    folder.chmod(0o755)  # mkdtemp makes folders that only their owner may read
    student.save_pretrained(folder)
    tokenizer, report = getattr(student, "tokenizer", None), getattr(student, "report", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if report is not None:
        (folder / "conversion.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
