"""Names: mixers, channel mixers and models; listing, filters, deprecations, plugins.

A mixer is registered by its decorator, a model by a YAML file in `configs/models/` or by `register_model`. Packages
outside name an entry point in the group `zoo.plugins`; it is imported (and called, if callable) the first time a name
is looked up.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import metadata, resources
from typing import Any

from pydantic import Field

from zoo.config import FFNOptions, MixerOptions, ZooConfig
from zoo.errors import ConfigError, did_you_mean, unknown_name
from zoo.options import Options
from zoo.yaml_files import load_yaml


class Pretrained(Options):
    """Published weights of a model: where they are, in whose layout, under which licence.

    licence: as SPDX abbreviates it, or what their authors call theirs. parameters: how many there are. tokenizer: the
    repository of the tokenizer, where it is not beside the weights. file: the file of weights, where it does not have
    the usual name. revision: the full sha of the commit that is meant; None: what is newest.
    """

    repo: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$", max_length=96)
    layout: str = Field(pattern=r"^[a-z_]+$")
    licence: str = Field(min_length=2)
    paper: str = Field(pattern=r"^https://\S+$")
    parameters: int = Field(ge=1)
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    tokenizer: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
    file: str | None = Field(None, pattern=r"^[\w.-]+$")


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """What the registry knows about one model name."""

    name: str
    config: dict[str, Any]
    family: str = ""
    paper: str = ""
    about: str = ""
    tags: dict[str, Pretrained] = field(default_factory=dict)  # published weights, by tag


_MIXERS: dict[str, type] = {}
_FFNS: dict[str, type] = {}
_MODELS: dict[str, ModelEntry] = {}
_DEPRECATED: dict[str, str] = {}


def register_mixer(name: str) -> Callable[[type], type]:
    """Class decorator: make a `SequenceMixer` available under `name` (snake case)."""
    return _register(_MIXERS, "mixer", name)


def register_ffn(name: str) -> Callable[[type], type]:
    """Class decorator: make a channel mixer available under `name` (snake case)."""
    return _register(_FFNS, "channel mixer", name)


def _register(table: dict[str, type], kind: str, name: str) -> Callable[[type], type]:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"{kind} name {name!r} is not snake case")

    def add(cls: type) -> type:
        other = table.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"{kind} {name!r} is already registered by {other.__module__}")
        cls.name = name  # type: ignore[attr-defined]
        table[name] = cls
        return cls

    return add


def register_model(
    name: str,
    config: dict[str, Any],
    *,
    family: str = "",
    paper: str = "",
    about: str = "",
    tags: dict[str, dict[str, Any]] | None = None,
    deprecated: Iterable[str] = (),
) -> None:
    """Make a model available under `name` (kebab case with a size); `deprecated` names warn and lead to it.

    `tags` are published weights, each with the keys of `Pretrained`. Raises ConfigError for wrong names and keys.
    """
    if not re.fullmatch(r"[a-z][a-z0-9.-]*", name):
        raise ConfigError(f"model name {name!r} is not kebab case with a size, such as 'retnet-tiny'")
    published = {}
    for tag, values in (tags or {}).items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", str(tag)):
            raise ConfigError(f"{name}.tags.{tag}: a tag is of small letters, digits, - and _")
        published[tag] = Pretrained.parse(values, f"{name}.tags.{tag}")
    _MODELS[name] = ModelEntry(
        name=name, config=config, family=family or name.split("-")[0], paper=paper, about=about, tags=published
    )
    _DEPRECATED.update(dict.fromkeys(deprecated, name))


@functools.cache
def _load_all() -> None:
    """Import every mixer and channel mixer, read every YAML, then the plugins of other packages."""
    for package in ("zoo.mixers", "zoo.ffn"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
    for file in sorted(resources.files("zoo.configs.models").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            _read_family(str(file))
    for plugin in metadata.entry_points(group="zoo.plugins"):
        loaded = plugin.load()
        if callable(loaded):
            loaded()


def _read_family(path: str) -> None:
    """One YAML is one family: `family`, `paper`, `about`, `base` (shared config), `models: {name: overrides}`."""
    values = load_yaml(path)
    keys = ("family", "paper", "about", "base", "models")
    if not isinstance(values, dict) or not isinstance(values.get("models"), dict):
        raise ConfigError(f"{path}: expected a mapping with 'family' and 'models', see docs/adding_a_mixer.md")
    if unknown := set(values) - set(keys):
        raise ConfigError(f"{path}: {min(unknown)}: unknown key{did_you_mean(min(unknown), keys)}")
    shared = {k: values.get(k, "") for k in ("family", "paper", "about")}
    for name, overrides in values["models"].items():
        overrides = dict(overrides)
        own = {k: overrides.pop(k) for k in ("paper", "about", "tags", "deprecated") if k in overrides}
        register_model(name, merge(values.get("base", {}), overrides), **{**shared, **own})


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries merged, `overrides` winning; lists are replaced whole."""
    out = deepcopy(base)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merge(out[key], value)
        else:
            out[key] = deepcopy(value)
    return out


def mixer_class(name: str) -> type:
    """The class registered under a mixer's name. Raises UnknownNameError with the nearest names."""
    return _lookup(_MIXERS, "mixer", name)


def ffn_class(name: str) -> type:
    """The class registered under a channel mixer's name. Raises UnknownNameError with the nearest names."""
    return _lookup(_FFNS, "channel mixer", name)


def _lookup(table: dict[str, type], kind: str, name: str) -> type:
    if name not in table:
        _load_all()
    if name not in table:
        raise unknown_name(kind, name, table)
    return table[name]


def parse_mixer(value: Any, path: str = "mixer") -> MixerOptions:
    """Options of a mixer from a name, a mapping with `name`, or options that are already parsed."""
    return _parse(value, path, mixer_class, MixerOptions)


def parse_ffn(value: Any, path: str = "ffn") -> FFNOptions:
    """Options of a channel mixer from a name, a mapping with `name`, or options that are already parsed."""
    return _parse(value, path, ffn_class, FFNOptions)


def _parse(value: Any, path: str, find: Callable[[str], type], base: type) -> Any:
    if isinstance(value, base):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ConfigError(f"{path}: expected a name or a mapping with 'name', got {value!r:.200}")
    return find(value["name"]).Config.parse(value, path)  # type: ignore[attr-defined]


def list_mixers(pattern: str = "*") -> list[str]:
    """The registered sequence mixers, in alphabetical order; `pattern` takes wildcards."""
    _load_all()
    return sorted(fnmatch.filter(_MIXERS, pattern))


def list_ffns(pattern: str = "*") -> list[str]:
    """The registered channel mixers, in alphabetical order; `pattern` takes wildcards."""
    _load_all()
    return sorted(fnmatch.filter(_FFNS, pattern))


def list_models(
    pattern: str = "*", *, pretrained: bool = False, task: str | None = None, mixer: str | None = None
) -> list[str]:
    """Model names in natural order (130m before 1.3b, tiny first).

    Args:
        pattern: wildcards, such as ``"retnet*"``.
        pretrained: only names with published weights, written ``name.tag``.
        task: only models of a task, such as ``"causal-lm"``.
        mixer: only models with a layer of this mixer.
    """
    _load_all()
    entries = [_MODELS[name] for name in fnmatch.filter(_MODELS, pattern)]
    if task is not None:
        entries = [e for e in entries if e.config.get("task", "causal-lm") == task]
    if mixer is not None:
        entries = [e for e in entries if mixer in ZooConfig(**deepcopy(e.config)).mixer_names]
    names = [e.name for e in entries]
    if pretrained:
        names = [f"{e.name}.{tag}" for e in entries for tag in e.tags]
    return sorted(names, key=natural_key)


_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def natural_key(name: str) -> tuple:
    """Sort key under which sizes order by value: tiny < 130m < 1.3b."""
    key: list[tuple] = []
    for part in re.split(r"[-]", name):
        size = re.match(r"(?:a|\d+x)?(\d+(?:\.\d+)?)([kmbt])(?:\.|$)", part)  # also 8x7b, a2.7b
        if part == "tiny":
            key.append((0, 0.0, part))
        elif size:
            key.append((0, float(size[1]) * _UNITS[size[2]], part))
        else:
            key.append((1, 0.0, part))
    return tuple(key)


def model_entry(name: str) -> ModelEntry:
    """The entry of a model name (``name`` or ``name.tag``). A deprecated name warns and gives the new one's entry."""
    _load_all()
    if name in _DEPRECATED:
        new = _DEPRECATED[name]
        warnings.warn(f"model name {name!r} is deprecated, use {new!r}", DeprecationWarning, stacklevel=3)
        name = new
    if name in _MODELS:
        return _MODELS[name]
    stem, _, tag = name.rpartition(".")
    if stem in _MODELS:
        if tag in _MODELS[stem].tags:
            return _MODELS[stem]
        raise unknown_name(f"tag of {stem}", tag, _MODELS[stem].tags)
    raise unknown_name("model", name, [*_MODELS, *_DEPRECATED])


def tag_of(name: str) -> Pretrained | None:
    """The published weights behind a ``name.tag``; None for any other text. Raises UnknownNameError for another tag."""
    _load_all()
    if name in _MODELS or name.rpartition(".")[0] not in _MODELS:
        return None
    entry = model_entry(name)
    return entry.tags[name[len(entry.name) + 1 :]]


def model_config(name: str, **overrides: Any) -> ZooConfig:
    """The config of a model by name, with overrides of its top-level fields."""
    return ZooConfig(**merge(model_entry(name).config, overrides))
