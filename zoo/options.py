"""The base of every options class: frozen, strictly typed, and errors that say where, what, and what was meant."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from zoo.errors import ConfigError, did_you_mean


class Options(BaseModel):
    """Base of every options class: frozen, keyword-only, strictly typed, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    @classmethod
    def parse(cls, values: dict[str, Any], path: str = "") -> Self:
        """Build from a dictionary. Raises ConfigError naming the path of the first wrong key."""
        if not isinstance(values, dict):
            raise ConfigError(f"{path or cls.__name__}: expected a mapping of options, got {values!r:.200}")
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, path)) from None

    def resolved(self, width: int) -> Self:
        """The options with those that follow from the model's width (None) written out."""
        return self

    def plain(self) -> dict[str, Any]:
        """The options as JSON types, in the order of the class."""
        return self.model_dump(mode="json")


class MixerOptions(Options):
    """Options of a sequence mixer; `name` is its name in the registry."""

    name: str


class FFNOptions(Options):
    """Options of a channel mixer; `name` is its name in the registry."""

    name: str


def explain(error: ValidationError, cls: type[BaseModel], path: str = "") -> str:
    """One line for the first problem in a pydantic error: path, value, what is expected, nearest valid key."""
    problems = error.errors()
    # A misspelt key is often also a missing one: name the key that is there.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in (path, *problem["loc"]) if part != "")
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{did_you_mean(str(problem['loc'][-1]), _keys_at(cls, problem['loc'][:-1]))}"
    if problem["type"] == "value_error":
        said = str(problem["ctx"]["error"])
        if not where:
            return said
        goes_on = isinstance(problem["ctx"]["error"], ConfigError) and re.match(r"[a-z_][\w.]*: ", said)
        return f"{where}{'.' if goes_on else ': '}{said}"  # an error from deeper down starts with its own path
    if problem["type"] == "missing":
        return f"{where}: this key is needed"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r:.200}"


def _keys_at(cls: type[BaseModel], loc: tuple) -> list[str]:
    for part in loc:
        field = cls.model_fields.get(str(part))
        annotations = [field.annotation] if field else []
        annotations += [a for outer in annotations for a in getattr(outer, "__args__", ())]
        cls = next((a for a in annotations if isinstance(a, type) and issubclass(a, BaseModel)), cls)
    return list(cls.model_fields)
