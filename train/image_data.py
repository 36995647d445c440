"""Images with labels to batches, as a stream that goes on exactly where it stopped.

A batch is a function of seed and place alone: which images come when, how they are cut and which are mirrored. So the
place in the stream is one number, and a batch that comes again (`restart_after`) is the same to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import ImageOptions
from zoo.errors import ConfigError, DataError
from zoo.images import Images, SomeImages, normalise, open_images, sample_images, split_images
from zoo.train.data import Batch
from zoo.train.recipe import Augment, Stage
from zoo.train.sources import Stream, TrainingData


class ImageBatches:
    """An endless iterator of batches; the images come in a new order each time all of them were given.

    Args:
        images, options: what is read, and how the model reads it.
        batch_size: images in a batch.
        augment: how they are varied.
        seed, rank, world, restart_after: as of `zoo.train.data.PackedBatches`.
    """

    def __init__(
        self,
        images: Images,
        options: ImageOptions,
        *,
        batch_size: int,
        augment: Augment,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        restart_after: int | None = None,
    ) -> None:
        self.images, self.options, self.augment = images, options, augment
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.restart_after, self.index = restart_after, 0
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __iter__(self) -> ImageBatches:
        return self

    def __next__(self) -> Batch:
        if self.restart_after is not None and self.index == self.restart_after:
            self.index = 0
        start = (self.index * self.world + self.rank) * self.batch_size
        places = [divmod(start + i, len(self.images)) for i in range(self.batch_size)]
        numbers = [int(self._order(turn)[place]) for turn, place in places]
        x_BCHW = self.images.pixels(numbers, self.options)
        x_BCHW = varied(x_BCHW, self.augment, self._generator(f"batch {start}"))
        self.index += 1
        return Batch(normalise(x_BCHW, self.options), self.images.labels_N[numbers], None)

    def _shuffled(self, turn: int) -> Tensor:
        return torch.randperm(len(self.images), generator=self._generator(f"turn {turn}"))

    def _generator(self, what: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed} {what}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream."""
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place in the stream."""
        self.index = state["index"]


def varied(x_BCHW: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """One random variation of each image, values between 0 and 1."""
    B, (height, width) = len(x_BCHW), x_BCHW.shape[2:]
    if pad := augment.crop:
        x_BCHW = F.pad(x_BCHW, [pad] * 4)
        top_B, left_B = torch.randint(2 * pad + 1, (2, B), generator=generator)
        row_BH1 = (top_B[:, None] + torch.arange(height))[:, :, None]
        column_B1W = (left_B[:, None] + torch.arange(width))[:, None, :]
        # (B, H, W) of places, channels last and back
        x_BCHW = x_BCHW.permute(0, 2, 3, 1)[torch.arange(B)[:, None, None], row_BH1, column_B1W].permute(0, 3, 1, 2)
    if augment.flip:
        flip_B = torch.rand(B, generator=generator) < 0.5
        x_BCHW = torch.where(flip_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)
    return x_BCHW.contiguous()


def image_batches(images: Images, options: ImageOptions, size: int) -> Iterator[Batch]:
    """The images as they are, one after the other, each once, in batches of up to `size`."""
    for start in range(0, len(images), size):
        numbers = list(range(start, min(start + size, len(images))))
        yield Batch(normalise(images.pixels(numbers, options), options), images.labels_N[numbers], None)


class ImageData(TrainingData):
    """Images and their labels, read as a model's config says."""

    def __init__(self, source: Any, config: Any, held_out: float, seed: int) -> None:
        whole = open_images(source)
        self.name, self.options, self.seed, self.whole = whole.name, config.spec.image, seed, whole
        self.train, self.held = split_images(whole, held_out, seed)

    def identity(self) -> dict[str, Any]:
        return {"data": self.whole.fingerprint()}

    def check(self, models: Sequence[Any], stages: Sequence[Stage]) -> None:
        for model in models:
            if self.train.num_labels > model.config.num_labels:
                raise DataError(
                    f"{self.name}: labels up to {self.train.num_labels - 1}, but the model has "
                    f"{model.config.num_labels} classes (num_labels)"
                )
            if model.config.spec.image != self.options:
                differ = [k for k, v in self.options.plain().items() if model.config.spec.image.plain()[k] != v]
                if set(differ) & {"image_size", "channels", "mean", "std"}:
                    raise ConfigError(f"image.{differ[0]}: student and teacher read images differently")
            if (kind := model.config.problem_type) not in (None, "single_label_classification"):
                raise ConfigError(f"problem_type: images have one label each here, this model is for {kind}")

    def row_tokens(self, stage: Stage) -> int:
        return self.options.prefix + self.options.grid**2

    def stream(self, stage: Stage, *, seed: int, rank: int, world: int, restart_after: int | None) -> Stream:
        return ImageBatches(
            self.train, self.options, batch_size=stage.batch_size, augment=stage.augment, seed=seed, rank=rank,
            world=world, restart_after=restart_after,
        )  # fmt: skip

    def held_out(self, stage: Stage, tokens: int) -> list[Batch]:
        first = torch.arange(min(len(self.held), -(-tokens // self.row_tokens(stage))))
        return list(image_batches(SomeImages(self.held, first), self.options, stage.batch_size))

    def calibration(self, stages: Sequence[Stage]) -> dict[str, Any]:
        return {"data": sample_images(self.train, self.options, seed=self.seed)}
