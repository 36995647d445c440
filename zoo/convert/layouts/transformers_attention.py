"""The attention models of `zoo.convert.teachers` as families of the layout `transformers`: read and written as files.

A teacher is opened by its original class and compared with it. Here only the files are read, tensor by tensor, so that
a large checkpoint needs no second copy; names, options and both directions come from the same adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family_source
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, same
from zoo.convert.teachers import adapter as adapters
from zoo.convert.teachers.adapter import Packed, TeacherAdapter, as_packed
from zoo.errors import CheckpointError, ExportError


class AdapterFamily(Family):
    """One teacher adapter as a family. Written is what an adapter can say: the class that the model came from."""

    layout = "transformers"
    mixers = ("attention", "mla", "mobile_bert", "shifted_window")

    def __init__(self, adapter: TeacherAdapter) -> None:
        self.adapter = adapter
        self.name = adapter.family  # type: ignore[misc]
        self.about = ", ".join(adapter.architectures)  # type: ignore[misc]

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.config.get("model_type") in self.adapter.model_types

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        values = dict(checkpoint.config)
        config, architecture = self.adapter.config(values), self._architecture(checkpoint)
        self.adapter.check_options(config)
        carried = {k: values[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if values.get(k) is not None}
        labels = {k: values[k] for k in ("id2label", "label2id", "problem_type") if values.get(k) is not None}
        origin = {"architecture": architecture, "source": str(checkpoint.path)}
        return {**self.adapter.fields(config, architecture), **carried, **labels, "origin": origin}

    def _architecture(self, checkpoint: Checkpoint) -> str:
        named = (checkpoint.config.get("architectures") or [""])[0]
        supported = self.adapter.architectures_of(checkpoint.config["model_type"])
        if named not in supported:
            listing = ", ".join(supported)
            raise CheckpointError(f"{checkpoint.path}: architectures.0 is {named!r}; supported: {listing}")
        return named

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        from zoo.convert.layouts.loading import meta_model

        original, architecture = self._original(config)
        ours = meta_model(config).state_dict()
        for theirs, mine in self.adapter.tensors(original, architecture).items():
            yield same(theirs, mine)
        for theirs, target in self.adapter.modules(original, architecture).items():
            packed = as_packed(target)
            read, write = functools.partial(_unpack, packed), functools.partial(_pack, packed)
            for i, place in enumerate(self.adapter.our_layers(original) if "{i}" in theirs else [0]):
                for parameter in ("weight", "bias"):
                    names = tuple(f"{part.replace('{i}', str(place))}.{parameter}" for part in packed.parts)
                    if names[0] in ours:
                        yield Entry((f"{theirs.replace('{i}', str(i))}.{parameter}",), names, read, write)

    def _original(self, config: ZooConfig) -> tuple[Any, str]:
        return self.adapter.config(dict(config.origin["config"])), config.origin["architecture"]

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        original, architecture = self._original(config)
        modules = {
            as_packed(target).parts[0]: name for name, target in self.adapter.modules(original, architecture).items()
        }
        copies = dict(self.adapter.copies)
        if config.tie_word_embeddings and "lm_head" in modules:
            copies[f"{modules['lm_head']}.weight"] = f"{modules['model.embed_tokens']}.weight"
        return copies

    def ignored(self, config: ZooConfig) -> tuple[str, ...]:
        return (".position_ids", ".inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".masked_bias")

    def is_dropped(self, name: str) -> bool:
        return self.adapter.is_dropped(name)

    def config(self, config: ZooConfig) -> dict[str, Any]:
        origin = config.origin
        if origin.get("architecture") not in self.adapter.architectures:
            raise ExportError("has no such class to write back to: the model did not come from it")
        return {**origin["config"], "architectures": [origin["architecture"]]}


def _unpack(packed: Packed, tensors: list[Tensor]) -> list[Tensor]:
    return packed.unpack(tensors[0])


def _pack(packed: Packed, tensors: list[Tensor]) -> list[Tensor]:
    return [packed.pack(tensors)]


@register_family_source
def _from_adapters() -> list[Family]:
    return [_family(name) for name in adapters.list_teachers()]


@functools.cache
def _family(name: str) -> Family:
    return AdapterFamily(adapters._ADAPTERS[name])
