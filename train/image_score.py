"""Image classifiers on the same images: right answers, distance from the teacher, speed.

    accuracy     share of images whose likeliest class is the label
    top-1        share of images for which teacher and student find the same class the likeliest
    KL           mean over images of sum_c p_teacher(c) log(p_teacher(c) / p_student(c)), in nats

Logits are compared in float64. Speed is that of batches of pixels that are ready in memory, models in turns.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.images import Images, SomeImages, normalise, open_images
from zoo.train.evaluation import OnBatch, autocast, evaluating

BATCH = 100  # images that go through the models at once
QUICK = 1000
ROUNDS = 12  # batches of each model that are timed


@dataclass(frozen=True)
class ImageComparison:
    """One model's answers. `right_N`: whether they are the labels; `kl_N`, `same_N`: against the teacher's, or None."""

    right_N: Tensor
    kl_N: Tensor | None
    same_N: Tensor | None

    def row(self) -> dict[str, float | None]:
        """The numbers by the keys of a score's row. Standard errors are over images."""
        count = len(self.right_N)
        found: dict[str, float | None] = {"accuracy": float(self.right_N.double().mean())}
        if self.kl_N is not None and self.same_N is not None:
            error = float(self.kl_N.std() / count**0.5) if count > 1 else None
            found |= {"kl": float(self.kl_N.mean()), "kl_standard_error": error}
            found["top1"] = float(self.same_N.double().mean())
        return found


def sample_images(data: Any, models: Mapping[str, Any], *, quick: bool, seed: int) -> tuple[Images, dict[str, Any]]:
    """The images that are scored, all of them or with `quick` some, and their description.

    Raises DataError where there are none, or their labels are beyond a model's classes.
    """
    images = open_images(data)
    if not len(images):
        raise DataError(f"{images.name}: there is no image to score")
    if quick and len(images) > QUICK:
        images = SomeImages(images, torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:QUICK])
    for role, model in models.items():
        if images.num_labels > model.config.num_labels:
            have = f"but the {role} has {model.config.num_labels} classes"
            raise DataError(f"{images.name}: labels up to {images.num_labels - 1}, {have}")
    digest = hashlib.sha256(images.labels_N.numpy().astype("<i8").tobytes())
    for i in range(len(images)):
        digest.update(images.content(i))
    source = images.name if images.name.startswith("hf:") else Path(images.name).name
    return images, {"source": source, "rows_from": "images", "rows": len(images), "sha256": digest.hexdigest()}


def compare_images(
    teacher: Any,
    others: Mapping[str, Any],
    images: Images,
    *,
    dtype: torch.dtype = torch.float32,
    on_batch: OnBatch | None = None,
) -> dict[str, ImageComparison]:
    """The teacher (or None) and every other model on the images, in one pass; "teacher" is the teacher with itself.

    Every model reads the images as its own config says. `on_batch` is told how many images are done.
    """
    models = {**({} if teacher is None else {"teacher": teacher}), **others}
    parts: dict[str, list[Tensor]] = {name: [] for name in models}
    done = 0
    with evaluating(*models.values()):
        for start in range(0, len(images), BATCH):
            numbers = list(range(start, min(start + BATCH, len(images))))
            for name, model in models.items():
                options = model.config.spec.image
                x_BCHW = normalise(images.pixels(numbers, options), options)
                with autocast(model, dtype):
                    parts[name].append(model(pixel_values=x_BCHW.to(model.device)).logits.double().cpu())
            done += len(numbers)
            if on_batch is not None:
                on_batch(done)
    answers = {name: torch.cat(part).log_softmax(-1) for name, part in parts.items()}
    return {name: _compared(answers.get("teacher"), log_NC, images.labels_N) for name, log_NC in answers.items()}


def _compared(teacher_NC: Tensor | None, log_NC: Tensor, labels_N: Tensor) -> ImageComparison:
    best_N = log_NC.argmax(-1)
    if teacher_NC is None:
        return ImageComparison(best_N == labels_N, None, None)
    kl_N = (teacher_NC.exp() * (teacher_NC - log_NC)).sum(-1)
    return ImageComparison(best_N == labels_N, kl_N, best_N == teacher_NC.argmax(-1))


def image_speed(
    models: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, on_round: OnBatch | None = None
) -> dict[str, dict[str, float]]:
    """Images a second, and a CPU-second, in batches of `BATCH`: of the median batch, models in turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with evaluating(*models.values()):
        for turn in range(ROUNDS + 1):  # the first is not timed: kernels are chosen, weights are touched
            for name, model in models.items():
                o = model.config.spec.image
                x_BCHW = torch.randn(BATCH, o.channels, o.image_size, o.image_size, device=model.device)
                _wait(model)
                wall, cpu = time.perf_counter(), time.process_time()
                with autocast(model, dtype):
                    model(pixel_values=x_BCHW)
                _wait(model)
                if turn:
                    times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            if on_round is not None:
                on_round(turn + 1)
    keys = ("images_per_s", "images_per_cpu_s")
    return {
        name: {key: BATCH / max(1e-9, statistics.median(step[i] for step in steps)) for i, key in enumerate(keys)}
        for name, steps in times.items()
    }


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
