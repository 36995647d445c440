"""What a run trains on: a source, the part of it that is held out, and batches of both.

Text and images differ here and at the end of the model (`zoo.train.heads`); the loop between knows neither. A new kind
of input is a `TrainingData`, chosen in `training_data` by the task of the model that reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from zoo.errors import DataError
from zoo.text import Source, describe, split_documents
from zoo.train.data import Batch, PackedBatches, evaluation_batches
from zoo.train.folder import fingerprint
from zoo.train.recipe import Stage


class Stream(Protocol):
    """An endless iterator of batches that can go back to a place in it."""

    index: int  # batches given since the start, or since it began again

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainingData(ABC):
    """A source and its held-out part, as batches for a stage."""

    name: str  # what the source is, for messages and records

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells this data from other data, without reading it all: JSON types."""

    @abstractmethod
    def check(self, models: Sequence[Any], stages: Sequence[Stage]) -> None:
        """Raise DataError or ConfigError where models or stages do not fit the data."""

    @abstractmethod
    def row_tokens(self, stage: Stage) -> int:
        """Tokens in a row: how far one row of a batch goes on the way to a budget in tokens."""

    def full_rows(self, stage: Stage) -> bool:
        """Whether every row has that many, so that they need not be counted."""
        return True

    @abstractmethod
    def stream(self, stage: Stage, *, seed: int, rank: int, world: int, restart_after: int | None) -> Stream:
        """Batches to train on: see `PackedBatches` for the arguments."""

    @abstractmethod
    def held_out(self, stage: Stage, tokens: int) -> list[Batch]:
        """Batches that are never trained on, in a fixed order, of about so many tokens; [] where there are none."""

    @abstractmethod
    def calibration(self, stages: Sequence[Stage]) -> dict[str, Any]:
        """The arguments of `zoo.convert` that say what to measure on."""

    def save(self, folder: Path) -> None:  # noqa: B027 (most inputs need nothing)
        """Write beside a model's weights what its inputs need."""


class TextData(TrainingData):
    """Documents and a tokenizer."""

    def __init__(self, source: Source, tokenizer: Any, held_out: float, seed: int) -> None:
        if tokenizer is None:
            raise DataError(
                "no tokenizer comes with the model; give one, such as tokenizer=bytes for a vocabulary of 256"
            )
        self.source, self.tokenizer, self.name = source, tokenizer, describe(source)
        self.train_documents, self.held_documents = split_documents(source, held_out, seed)

    def identity(self) -> dict[str, Any]:
        return {"data": fingerprint(self.source), "vocabulary": len(self.tokenizer)}

    def check(self, models: Sequence[Any], stages: Sequence[Stage]) -> None:
        for model in models:
            if len(self.tokenizer) > model.config.vocab_size:
                raise DataError(
                    f"the tokenizer has {len(self.tokenizer)} words and the model a vocabulary of "
                    f"{model.config.vocab_size}; they do not fit"
                )
        for i, stage in enumerate(stages):
            if stage.budget.unit == "images" or stage.label_smoothing or stage.augment != type(stage.augment)():
                raise DataError(
                    f"stages.{i}: a budget in images, augment and label_smoothing are for images, and this is text"
                )

    def row_tokens(self, stage: Stage) -> int:
        return stage.length

    def full_rows(self, stage: Stage) -> bool:
        return stage.packing != "none"

    def stream(self, stage: Stage, *, seed: int, rank: int, world: int, restart_after: int | None) -> Stream:
        return PackedBatches(
            self.train_documents, self.tokenizer, batch_size=stage.batch_size, length=stage.length,
            packing=stage.packing, seed=seed, rank=rank, world=world, restart_after=restart_after,
        )  # fmt: skip

    def held_out(self, stage: Stage, tokens: int) -> list[Batch]:
        shape: dict[str, Any] = {"batch_size": stage.batch_size, "length": stage.length, "packing": stage.packing}
        return evaluation_batches(self.held_documents, self.tokenizer, tokens=tokens, **shape)

    def calibration(self, stages: Sequence[Stage]) -> dict[str, Any]:
        # the student may take no longer rows than it is trained on
        return {"data": self.train_documents, "length": min(512, max(stage.length for stage in stages))}

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def training_data(model: Any, source: Any, *, tokenizer: Any = None, held_out: float, seed: int) -> TrainingData:
    """The data that a model of this task reads. Raises DataError where the source has none."""
    if model.config.task == "image-classification":
        from zoo.train.image_data import ImageData

        return ImageData(source, model.config, held_out, seed)
    return TextData(source, tokenizer, held_out, seed)
