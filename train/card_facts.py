"""What a card says that no score holds: who the teacher was, what was trained on, in which stages, under which licence.

`card.json` beside a model holds both what its author gives and, copied when the card is written, what the run and the
config of the model recorded (`found_facts`), so that a card and its JSON stand for themselves. Every text is checked or
escaped: these files may come from anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator

from zoo.errors import ConfigError, DataError
from zoo.options import Options
from zoo.train.checkpoint import write_atomically

FILE = "card.json"
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Number = int | float
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]{0,63}")
_TAG = re.compile(r"\w[\w .:+\-]{0,63}")
_TASK = re.compile(r"\w[\w.\-]{0,95}")


class Facts(Options):
    """What the author of a card may say; every key is optional, and what is not given is not on the card.

    Args:
        title: the heading; by default the name of the folder.
        repo: the repository on the Hub from which readers load it.
        location: without a repository, the folder in which `command` leaves it.
        teacher, teacher_revision, teacher_license: what it was made from.
        base_model: the teacher's repository on the Hub.
        license: of these weights, as the Hub abbreviates it.
        data, data_license: what it was trained on, in words.
        datasets: what it was trained on, as data sets on the Hub.
        stages: of training, in order; a column a key.
        tokens, cpu_seconds, gpu_seconds: what training took, where the score does not say.
        seed, version, commit: of the training, and of this package then.
        command: what trains it again.
        tags, limits: more of them.
        benchmark_task: the task, in the benchmark on the Hub that was scored, which the score answers.
    """

    title: Text | None = None
    repo: Text | None = None
    location: Text | None = None
    teacher: Text | None = None
    teacher_revision: Text | None = None
    teacher_license: Text | None = None
    base_model: Text | None = None
    license: Text | None = None
    data: Text | None = None
    data_license: Text | None = None
    datasets: list[Text] = Field(default_factory=list, max_length=100)
    stages: list[dict[Text, Text | Number | None]] = Field(default_factory=list, max_length=100)
    tokens: int | None = Field(default=None, ge=0)
    cpu_seconds: float | None = Field(default=None, ge=0)
    gpu_seconds: float | None = Field(default=None, ge=0)
    seed: int | None = None
    version: Text | None = None
    commit: Text | None = None
    command: Text | None = None
    tags: list[Text] = Field(default_factory=list, max_length=100)
    limits: list[Text] = Field(default_factory=list, max_length=100)
    benchmark_task: Text | None = None

    @field_validator("repo", "base_model")
    @classmethod
    def _repository(cls, value: str | None) -> str | None:
        if value is not None and not is_repository(value):
            raise ValueError(f"expected a repository on the Hub such as 'org/name', got {value!r:.80}")
        return value

    @field_validator("datasets")
    @classmethod
    def _data_sets(cls, values: list[str]) -> list[str]:
        if wrong := [value for value in values if not is_repository(value)]:
            raise ValueError(f"expected data sets on the Hub such as 'org/name', got {wrong[0]!r:.80}")
        return values

    @field_validator("license", "teacher_license")
    @classmethod
    def _license(cls, value: str | None) -> str | None:
        if value is not None and not _LICENSE.fullmatch(value):
            raise ValueError(f"expected the Hub's short name of a licence such as 'apache-2.0', got {value!r:.80}")
        return value

    @field_validator("tags")
    @classmethod
    def _tags(cls, values: list[str]) -> list[str]:
        if wrong := [value for value in values if not _TAG.fullmatch(value)]:
            raise ValueError(f"a tag has letters, digits, spaces and . : + - _, got {wrong[0]!r:.80}")
        return values

    @field_validator("benchmark_task")
    @classmethod
    def _task(cls, value: str | None) -> str | None:
        if value is not None and not _TASK.fullmatch(value):
            raise ValueError(f"expected the id of a task in the benchmark's eval.yaml, got {value!r:.80}")
        return value

    def known(self) -> dict[str, Any]:
        """The facts that are there."""
        return {key: value for key, value in self.plain().items() if value not in (None, [])}

    def updated(self, values: Mapping[str, Any], path: str = "") -> Self:
        """These facts with others in their place; None takes one away."""
        both = {**self.known(), **values}
        return type(self).parse({key: value for key, value in both.items() if value is not None}, path)


class CardFile(Options):
    """card.json: the facts that the author of a card gives, and those that were recorded where the model was made."""

    given: Facts = Facts()
    recorded: Facts = Facts()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """That of a folder; an empty one where there is none. Raises ConfigError, DataError for what is wrong in it."""
        return cls.parse(read_mapping(folder / FILE), str(folder / FILE))

    def save(self, folder: Path) -> None:
        """Write it, without what is not known."""
        values = {"given": self.given.known(), "recorded": self.recorded.known()}
        write_atomically(folder / FILE, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    def facts(self) -> Facts:
        """All of them; what is given stands above what was recorded."""
        return self.recorded.updated(self.given.known())


def is_repository(name: str) -> bool:
    """Whether a name is that of a repository on the Hub: `org/name`."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def read_mapping(path: Path) -> dict[str, Any]:
    """A mapping in a file of JSON; {} where there is no file. Raises DataError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a mapping, got {type(values).__name__}")
    return values


def found_facts(folder: Path) -> Facts:
    """What the run in a folder (train.json) and the config of its model recorded. Raises ConfigError, DataError."""
    run, found = read_mapping(folder / "train.json"), _origin(folder)
    if isinstance(source := run.get("data"), str):
        if source.startswith("hf:"):
            found["datasets"] = [source.removeprefix("hf:").split(":")[0]]
        found["data"] = source if source.startswith("hf:") else Path(source).name
    for key in ("stages", "seed", "command", "tokens", "cpu_seconds", "gpu_seconds"):
        found[key] = run.get(key)
    if isinstance(versions := run.get("versions"), dict):
        found |= {"version": versions.get("zoo"), "commit": versions.get("commit")}
    return Facts.parse({k: v for k, v in found.items() if v is not None}, str(folder / "train.json"))


def _origin(folder: Path) -> dict[str, Any]:
    """The teacher, as config.json names it: a repository, or the last part of a path."""
    origin = read_mapping(folder / "config.json").get("origin") or {}
    if not isinstance(origin, dict):
        raise ConfigError(f"{folder / 'config.json'}: origin: expected a mapping, got {type(origin).__name__}")
    source, revision = origin.get("source"), origin.get("revision")
    if not isinstance(source, str) or not source:
        return {}
    on_hub = is_repository(source) and isinstance(revision, str) and bool(revision)  # what came from a path has none
    return {
        "teacher": source if on_hub else Path(source).name or None,
        "base_model": source if on_hub else None,
        "teacher_revision": revision if on_hub else None,
    }
