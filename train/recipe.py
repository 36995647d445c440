"""Recipes: what is trained, on what, in which stages. Strictly typed; YAML files in `configs/recipes/`.

teacher: HuggingFaceTB/SmolLM2-135M-Instruct
mixer: gated_delta_net
keep: "sensitivity:1/5"
data: text/*.txt
stages:
  - {kind: align, budget: {tokens: 100000}, lr: 1e-3}
  - {kind: distill, budget: {cpu_seconds: 600}, lr: 3e-4, loss: {kl: 1.0}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from zoo.config import Options
from zoo.errors import ConfigError, did_you_mean
from zoo.yaml_files import Loader, load_yaml

MAX_TOKENS = 1 << 50
UNITS = ("tokens", "images", "seconds", "cpu_seconds")
Kind = Literal["pretrain", "align", "distill", "finetune"]


class Budget(Options):
    """How long a stage runs: exactly one of tokens, images, seconds on the wall, seconds of CPU time (all processes).

    An image is as many tokens as it has patches and special tokens.
    """

    tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    images: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    seconds: float | None = Field(default=None, gt=0, le=1e9)
    cpu_seconds: float | None = Field(default=None, gt=0, le=1e9)

    @field_validator("tokens", "images", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            known = f"{', '.join(UNITS[:-1])} and {UNITS[-1]}"
            raise ValueError(f"give exactly one of {known}, got {' and '.join(given) or 'none'}")
        return self

    @property
    def unit(self) -> str:
        """The name of the one that is set."""
        return next(name for name in UNITS if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """Its value."""
        return getattr(self, self.unit)


class Schedule(Options):
    """The learning rate over the fraction of the budget used.

    It rises over `warmup`, then follows `name` down to `final` times its peak. `wsd` stays at the peak and falls
    linearly over the last `decay`.
    """

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, le=1)
    final: float = Field(default=0.1, ge=0, le=1)
    decay: float = Field(default=0.2, gt=0, le=1)

    def factor(self, fraction: float) -> float:
        """The multiple of the peak rate after `fraction` (0 to 1) of the budget."""
        import math

        if fraction < self.warmup:
            return fraction / self.warmup
        rest = min(1.0, (fraction - self.warmup) / max(1e-12, 1 - self.warmup))
        if self.name == "constant":
            return 1.0
        if self.name == "wsd":
            rest = max(0.0, (fraction - (1 - self.decay)) / self.decay)
        shape = 0.5 * (1 + math.cos(math.pi * rest)) if self.name == "cosine" else 1 - rest
        return self.final + (1 - self.final) * shape


class LossWeights(Options):
    """Weights of the terms of a loss; a term of weight 0 is not computed.

    kl: KL(teacher || student) at the stage's temperature, times its square. ce: cross-entropy of the next token, or of
    an image's label. hidden: relative squared error of each layer's output. mixer: relative squared error of each
    converted mixer. embedding: 1 - cosine to the teacher's sentence embedding, for encoders of sentences. hard:
    cross-entropy of the class that the teacher finds the likeliest (DeiT's hard distillation), for classifiers.
    """

    kl: float = Field(default=0.0, ge=0, le=1e6)
    ce: float = Field(default=0.0, ge=0, le=1e6)
    hidden: float = Field(default=0.0, ge=0, le=1e6)
    mixer: float = Field(default=0.0, ge=0, le=1e6)
    embedding: float = Field(default=0.0, ge=0, le=1e6)
    hard: float = Field(default=0.0, ge=0, le=1e6)

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.used:
            raise ValueError(f"every weight is 0, so there is nothing to learn; set one of {', '.join(self.plain())}")
        return self

    @property
    def used(self) -> set[str]:
        """The names of the terms that count."""
        return {name for name, weight in self.plain().items() if weight}


class Augment(Options):
    """How images are varied in training: one random variation of each, anew each time.

    crop: pixels that are added on every side (black) before a cut of the old size is taken anywhere. flip: whether
    every other image is mirrored, left to right.
    """

    crop: int = Field(default=0, ge=0, le=1 << 12)
    flip: bool = False


DEFAULT_LOSS = {
    "pretrain": LossWeights(ce=1.0),
    "finetune": LossWeights(ce=1.0),
    "distill": LossWeights(kl=1.0),
    "align": LossWeights(mixer=1.0),
}
DEFAULT_TRAIN = {"pretrain": "all", "finetune": "all", "distill": "mixers", "align": "mixers"}


class Stage(Options):
    """One step of a run: a loss, what trains, a budget.

    train: "mixers" (those that were converted), "all", a list of these and of parameter-name patterns, or a mapping
    from them to learning rates; the first that fits decides. epochs: how often the same `budget / epochs` of text is
    gone over; from the second time on, with `cache_teacher`, the teacher's part is read from disk.
    exits: how early exits learn, where the model has some: with the kl and ce of the last layer, in one mean weighted
    by depth ("as_last"), or by the KL to the model's own last layer, added to the loss ("from_last"); or not ("none").
    """

    kind: Kind
    budget: Budget
    length: int = Field(default=512, ge=2, le=1 << 24)
    batch_size: int = Field(default=2, ge=1, le=1 << 20)
    accumulate: int = Field(default=1, ge=1, le=1 << 16)
    packing: Literal["separate", "joined", "none"] = "separate"  # how documents share a row: see `zoo.train.data`
    lr: float = Field(default=3e-4, gt=0, le=10)
    schedule: Schedule = Schedule()
    train: str | list[str] | dict[str, float] | None = None
    loss: LossWeights | None = None
    exits: Literal["as_last", "from_last", "none"] = "as_last"
    temperature: float = Field(default=1.0, gt=0, le=100)
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(default=1e-8, gt=0, le=1)
    clip: float | None = Field(default=1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    ema: float | None = Field(default=None, gt=0, lt=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 31)
    epochs: int = Field(default=1, ge=1, le=10_000)
    cache_teacher: bool = True
    augment: Augment = Augment()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("schedule", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"each beta is at least 0 and below 1, got {value}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.epochs > 1 and self.budget.unit not in ("tokens", "images"):
            raise ValueError(f"epochs={self.epochs} needs a budget in tokens or images, got one in {self.budget.unit}")
        if self.epochs > 1 and self.packing == "none":
            raise ValueError(f"epochs={self.epochs} counts full rows; it cannot be used with packing: none")
        loss = self.weights
        if loss.embedding and self.packing != "none":
            raise ValueError(f"loss.embedding is of a whole text, so packing must be none, not {self.packing}")
        if self.kind == "align" and loss.used != {"mixer"}:
            raise ValueError("an align stage compares mixers only; its loss is {mixer: weight}")
        if self.kind in ("pretrain", "finetune") and loss.used != {"ce"}:
            raise ValueError(f"a {self.kind} stage has no teacher; its loss is {{ce: weight}}")
        return self

    @property
    def weights(self) -> LossWeights:
        """The loss, or the kind's own."""
        return self.loss or DEFAULT_LOSS[self.kind]

    @property
    def trains(self) -> dict[str, float]:
        """What trains, as patterns with their peak learning rates."""
        chosen = DEFAULT_TRAIN[self.kind] if self.train is None else self.train
        if isinstance(chosen, dict):
            return dict(chosen)
        return dict.fromkeys([chosen] if isinstance(chosen, str) else chosen, self.lr)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher runs in this stage."""
        return self.kind in ("align", "distill")


class Checkpoints(Options):
    """When the state of the run is written: after so many seconds or steps, the last `keep` and the best are kept."""

    every_seconds: float | None = Field(default=300.0, gt=0)
    every_steps: int | None = Field(default=None, ge=1)
    keep: int = Field(default=2, ge=1, le=1000)


class Recipe(Options):
    """A whole run: a model to train, or a teacher to convert and distill; data; stages; where it goes."""

    model: str | None = None
    model_options: dict[str, Any] = Field(default_factory=dict)
    teacher: str | None = None
    mixer: str | None = None
    mixer_options: dict[str, Any] = Field(default_factory=dict)
    keep: str | int | list[int] = "sensitivity:1/5"
    calibrate: bool = True
    tokenizer: str | None = None  # a folder or Hub name, or "bytes"; None: the model's or teacher's own
    data: str | list[str] | None = None  # text (`zoo.text`), or images where the model reads them (`zoo.images`)
    held_out: float = Field(default=0.05, ge=0, lt=1)
    eval_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)  # held-out tokens scored at each checkpoint; 0: none
    stages: list[Stage] = Field(min_length=1, max_length=1000)
    checkpoints: Checkpoints = Checkpoints()
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    out: str | None = None
    tensorboard: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.mixer is not None and self.teacher is None:
            raise ValueError(
                "mixer is what a teacher is converted to; name the teacher, or choose a model with `model`"
            )
        if self.model is not None and self.mixer is not None:
            raise ValueError("give either model (trained as it is) or teacher and mixer (converted), not both")
        return self


def load_recipe(path_or_name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from a YAML file or by its name among the recipes that are installed.

    Args:
        path_or_name: ``"my.yaml"``, or a name such as ``"quick"``.
        overrides: ``"key.path=value"``; values are read as YAML, list items are numbered: ``"stages.0.lr=1e-3"``.

    Raises ConfigError with the path of the wrong key and the nearest valid ones.
    """
    values = load_yaml(find_recipe(path_or_name))
    if not isinstance(values, dict):
        raise ConfigError(f"{path_or_name}: a recipe is a mapping of keys, got {values!r}")
    for override in overrides:
        _override(values, override)
    return Recipe.parse(values)


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe. Raises ConfigError with the nearest names."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    folder = Path(str(resources.files("zoo.configs.recipes")))
    names = list_recipes()
    name = path.name.removesuffix(".yaml")
    if name in names and (path.parent == Path() or path.parts[-3:-1] == ("configs", "recipes")):
        return folder / f"{name}.yaml"
    raise ConfigError(f"no recipe {str(path_or_name)!r}{did_you_mean(name, names)}")


def list_recipes() -> list[str]:
    """The names of the recipes that are installed."""
    folder = Path(str(resources.files("zoo.configs.recipes")))
    return sorted(p.stem for p in folder.glob("*.yaml"))


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: write key.path=value, such as stages.0.lr=1e-3")
    try:
        value = yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: cannot read the value {text!r}") from None
    *parents, last = key.split(".")
    place: Any = values
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        place = place[_index(place, part, where)] if isinstance(place, list) else _child(place, part, where)
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ConfigError(f"{key}: {'.'.join(parents)} is {place!r}, which has no keys")


def _child(place: Any, part: str, where: str) -> Any:
    if not isinstance(place, dict):
        raise ConfigError(f"{where}: there is nothing with keys here, but {place!r}")
    if place.get(part) is None:
        place[part] = {}
    elif isinstance(place[part], str) and part == "schedule":
        place[part] = {"name": place[part]}
    return place[part]


def _index(place: list, part: str, where: str) -> int:
    if not part.isdecimal() or int(part) >= len(place):
        raise ConfigError(f"{where}: expected a number from 0 to {len(place) - 1}, got {part!r}")
    return int(part)


def parse_stages(stages: Any) -> list[Stage]:
    """Stages from a recipe's file or name, a `Recipe`, or a list of `Stage`s and mappings."""
    if isinstance(stages, str | Path):
        return load_recipe(stages).stages
    if isinstance(stages, Recipe):
        return stages.stages
    if isinstance(stages, Stage | Mapping):
        stages = [stages]
    parsed = [s if isinstance(s, Stage) else Stage.parse(dict(s), f"stages.{i}") for i, s in enumerate(stages)]
    if not parsed:
        raise ConfigError("stages: there is none; give at least one stage or the name of a recipe")
    return parsed
