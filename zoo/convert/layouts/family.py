"""What a family of checkpoints must say so that its models come in exactly, and go out where they can be expressed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from zoo.config import LayerSpec, ZooConfig
from zoo.convert.layouts.files import Checkpoint, open_checkpoint
from zoo.convert.layouts.mapping import Entry
from zoo.errors import CheckpointError, ConfigError, ExportError

# What does not change the function of a trained model: only how fresh weights are drawn, and where it came from.
INERT = {"initializer_range", "embedding_initializer_range", "origin"}
# Options that say something for some tasks only.
_OF_TASK = {
    "causal-lm": {"tie_word_embeddings", "lm_head_bias", "exits"},
    "masked-lm": {"tie_word_embeddings", "lm_head_bias", "mlm_transform", "mlm_activation"},
    "sequence-classification": {"pooling", "pooler", "classifier_dropout"},
    "sentence-embedding": {"pooling", "normalize_embeddings"},
    "image-classification": {"pooling", "classifier_dropout"},
}


class OtherKindError(ExportError):
    """The model is of another kind than the family: told where no family comes nearer."""


class Family(ABC):
    """One family in one layout, such as Mamba in `mamba_ssm`. Nothing in it builds or runs a model.

    layout: the layout's name. name: the family's. about: one line for the list of layouts.
    mixers: names of the sequence mixers that its models may have; what else is in a model, `config` must refuse.
    inert: options of mixers and channel mixers that change only how fresh weights are drawn.
    reads, writes: whether models can be read from this layout, and written in it.
    own_format: what its files are, where only `opens` reads them.
    older: names that older files have, as (pattern, replacement) of `re.sub`; tried where a name has no place.
    root: what stands before the names of a whole model and not before those of a bare backbone, such as "bert.".
    spare: modules that published files have beside those of the task, such as the head of a second pretraining task.
    """

    layout: ClassVar[str]
    name: ClassVar[str]
    about: ClassVar[str] = ""
    mixers: ClassVar[tuple[str, ...]]
    inert: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[bool] = True
    reads: ClassVar[bool] = True
    older: tuple[tuple[str, str], ...] = ()
    root: str = ""
    spare: tuple[str, ...] = ()
    own_format: ClassVar[str] = ""

    @classmethod
    def opens(cls, path: Path) -> Checkpoint | None:
        """A checkpoint in a format of the layout's own; None where it is not that, and the common files are tried."""
        return None

    @abstractmethod
    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is of this family and layout, by its config and its names."""

    @abstractmethod
    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Fields of `ZooConfig`. Raises CheckpointError for an option that cannot be expressed, by name and value."""

    @abstractmethod
    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        """Their tensors and ours, for a model of our config; the same list reads and writes."""

    def entries_of(self, config: ZooConfig, checkpoint: Checkpoint) -> Iterator[Entry]:
        """The entries of a checkpoint at hand, where files of the family are stored in more than one way."""
        return self.entries(config)

    def config(self, config: ZooConfig) -> dict[str, Any]:
        """Their config of a model of ours. Raises ExportError with the reason where there is none.

        `fields` of what comes back must be our config again (or `written` of it): `export_model` compares the two,
        so that an option that has no place there is refused and not lost.
        """
        raise ExportError(f"{self.layout} checkpoints of {self.name} can be read, not written")

    def written(self, config: ZooConfig) -> ZooConfig:
        """What is read back of a model of `config`, where the layout has another form of it that computes the same."""
        return config

    def conversion(self, mixer: str, config: ZooConfig) -> dict[str, Any]:
        """The options that a mixer in place of attention needs, in a model of `config`, so that its layers fit here."""
        return {}

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        """Their name -> the other name of theirs that always has the same tensor."""
        return {}

    def ignored(self, config: ZooConfig) -> tuple[str, ...]:
        """Endings of names that are not read: buffers that are computed and not learned."""
        return ()

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor of theirs has no counterpart on purpose, such as a pooler that the task does not use."""
        return any(n.startswith(f"{module}.") for module in self.spare for n in (name, self.root + name))

    def fillers(self, config: ZooConfig) -> dict[str, tuple[int, ...]]:
        """Tensors that their class has and our model of this task has not: written as zeros, so that none is missing.

        Only what the task does not compute with may be one, such as the pooler of a masked LM.
        """
        return {}

    def write(self, model: Any, folder: Path, config: dict[str, Any], tokenizer: Any = None) -> None:
        """Write a model; by default `save` of its tensors under their names. The tokenizer is saved beside them."""
        from zoo.convert.layouts.loading import their_tensors

        self.save(folder, config, their_tensors(self, model))

    def save(self, folder: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Any]]) -> None:
        """Write the files of the layout; by default `config.json` and safetensors in shards."""
        from zoo.convert.layouts.writing import save_safetensors

        save_safetensors(folder, config, tensors)


_FAMILIES: dict[tuple[str, str], Family] = {}


def register_family(cls: type[Family]) -> type[Family]:
    """Class decorator: make a family known. Raises ConfigError where its layout has one of this name already."""
    key = (cls.layout, cls.name)
    other = _FAMILIES.get(key)
    if other is not None and (type(other).__module__, type(other).__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"layout {cls.layout!r} already has a family {cls.name!r}")
    _FAMILIES[key] = cls()
    return cls


_SOURCES: list[Callable[[], list[Family]]] = []


def register_family_source(source: Callable[[], list[Family]]) -> Callable[[], list[Family]]:
    """Decorator: make known what a function lists, each time it is asked (another registry's entries)."""
    _SOURCES.append(source)
    return source


def families(layout: str | None = None) -> list[Family]:
    """The families of a layout, or all, in the order of their names."""
    found = [*_FAMILIES.values(), *(family for source in _SOURCES for family in source())]
    return sorted((f for f in found if layout in (None, f.layout)), key=lambda f: (f.layout, f.name))


def open_any(path: Path, layout: str | None) -> Checkpoint:
    """A checkpoint in whichever format one of the families can open."""
    for family in families(layout):
        opened = type(family).opens(path)
        if opened is not None:
            return opened
    if layout is not None and all(family.own_format for family in families(layout)):
        raise CheckpointError(f"{path}: not {families(layout)[0].own_format}")
    return open_checkpoint(path)


def one_layer(config: ZooConfig) -> LayerSpec:
    """The layer that all layers are like. Raises ExportError, with the first that is not."""
    layers = config.spec.layers
    for i, layer in enumerate(layers):
        if layer != layers[0]:
            raise ExportError(f"layers.{i}: differs from layer 0, and all layers of the layout's class are alike")
    return layers[0]


def difference(config: ZooConfig, again: ZooConfig, inert: tuple[str, ...] = ()) -> str | None:
    """The first option in which two configs compute differently, as `path: value, not value`; None where none does."""
    ours, theirs = (_flat(resolved(c), inert) for c in (config, again))
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            return f"{path}: {ours.get(path)!r}, where the layout has {theirs.get(path)!r}"
    return None


def resolved(config: ZooConfig) -> dict[str, Any]:
    """A config as JSON types, with sizes that follow from the width written out, without what its task has not."""
    spec = config.spec
    silent = set().union(*_OF_TASK.values()) - _OF_TASK[spec.task]
    plain = {key: value for key, value in spec.plain().items() if key not in silent}
    if spec.positions == "none":  # then it limits nothing
        del plain["max_position_embeddings"]
    for layer, options in zip(plain["layers"], spec.layers, strict=True):
        layer["mixer"] = options.mixer.resolved(spec.hidden_size).plain()
        if options.ffn is not None:
            layer["ffn"] = options.ffn.resolved(spec.hidden_size).plain()
    return plain


def _flat(value: Any, inert: tuple[str, ...], path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(k, v) for k, v in value.items() if k not in INERT and k not in inert]
    elif isinstance(value, list):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {path: value}
    found: dict[str, Any] = {path: {}} if not items else {}
    for key, inner in items:
        found |= _flat(inner, inert, f"{path}.{key}" if path else key)
    return found
