"""The attention models of `zoo.convert.teachers` as families of the layout `transformers`: read and written as files.

A teacher is opened by its original class and compared with it. Here only the files are read, tensor by tensor, so that
a large checkpoint needs no second copy; names, options and both directions come from the same adapters.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, difference, register_family_source
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry, same
from zoo.convert.layouts.names import LAYER_NORM, class_of
from zoo.convert.teachers import adapter as adapters
from zoo.convert.teachers.adapter import Packed, TeacherAdapter, as_packed
from zoo.transformers_keys import TOKEN_IDS, present

_PRETRAINING = ("cls.seq_relationship", "sop_classifier")


class _Files(NamedTuple):
    """What published files of a family need beside its adapter; see `Family`. pooler: a layer of the bare class."""

    root: str = ""
    spare: tuple[str, ...] = ()
    read_as: dict[str, str] = {}  # noqa: RUF012
    pooler: str | None = None


_FILES = {
    "albert": _Files(
        "albert.", ("albert.pooler", *_PRETRAINING), {"AlbertForPreTraining": "AlbertForMaskedLM"}, "pooler"
    ),
    # fit_dense, fit_denses: the maps to the teacher's width, in huawei-noah/TinyBERT_*, which are BERTs
    "bert": _Files(
        "bert.",
        ("bert.pooler", "fit_dense", "fit_denses", *_PRETRAINING),
        {"BertForPreTraining": "BertForMaskedLM"},
        "pooler.dense",
    ),
    "distilbert": _Files("distilbert."),
    "gpt2": _Files("transformer."),
    "gpt_neox": _Files("gpt_neox."),
    "llama": _Files("model."),
    "mobilebert": _Files(
        "mobilebert.", ("mobilebert.pooler", *_PRETRAINING), {"MobileBertForPreTraining": "MobileBertForMaskedLM"},
        "pooler.dense",
    ),
    "opt": _Files("model."),
    "timm": _Files("timm_model."),
    "roberta": _Files("roberta.", ("roberta.pooler",), pooler="pooler.dense"),
}  # fmt: skip


class AdapterFamily(Family):
    """One teacher adapter as a family. Written is the class that the model came from, where it is still that, or what
    the adapter describes."""

    layout = "transformers"
    mixers = ("attention", "mla", "mobile_bert", "shifted_window", "sliding_window")

    def __init__(self, adapter: TeacherAdapter) -> None:
        self.adapter = adapter
        self.name = adapter.family  # type: ignore[misc]
        self.about = ", ".join(adapter.architectures)  # type: ignore[misc]
        self.files = _FILES.get(adapter.family, _Files())
        self.root, self.spare = self.files.root, self.files.spare
        self.older = (*LAYER_NORM, *adapter.published)

    def recognises(self, checkpoint: Checkpoint) -> bool:
        c = checkpoint.config
        if "model_type" not in c:  # BERT before there were others, as TinyBERT is published
            layers = any(name.startswith("bert.encoder.layer.0.") for name in checkpoint.shapes)
            return self.name == "bert" and layers and "type_vocab_size" in c and "architectures" not in c
        return c["model_type"] in self.adapter.model_types

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        values = {"model_type": self.adapter.model_types[0], **checkpoint.config}
        classes = self.adapter.architectures_of(values["model_type"])
        config, architecture = self.adapter.config(values), class_of(checkpoint, classes, self.files.read_as)
        self.adapter.check_options(config)
        carried = present(values, *TOKEN_IDS)
        labels = present(values, "id2label", "label2id", "problem_type")
        if not labels and classes[architecture].endswith("classification"):
            labels = {"num_labels": config.num_labels}
        origin = {"architecture": architecture, "source": str(checkpoint.path)}
        return {**self.adapter.fields(config, architecture), **carried, **labels, "origin": origin}

    def conversion(self, mixer: str, config: ZooConfig) -> dict[str, Any]:
        return {"sinks": 0} if mixer == "sliding_window" else {}

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        from zoo.convert.layouts.loading import meta_model

        original, architecture = self._original(config)
        ours = meta_model(config).state_dict()
        for theirs, mine in self.adapter.tensors(original, architecture).items():
            yield same(self._published(theirs), mine)
        modules = self.adapter.modules(original, architecture)
        for name, entry in packed_entries(modules, self.adapter.our_layers(original), ours):
            yield Entry((self._published(name),), entry.ours, entry.read, entry.write)

    def _published(self, name: str) -> str:
        name = {same: copy for copy, same in self.adapter.copies.items()}.get(name, name)
        for pattern, replacement in self.adapter.published:
            name = re.sub(pattern, replacement, name)
        return name

    def _original(self, config: ZooConfig) -> tuple[Any, str]:
        values = dict(self.config(config))
        return self.adapter.config(values), values["architectures"][0]

    def aliases(self, config: ZooConfig) -> dict[str, str]:
        original, architecture = self._original(config)
        modules = {
            as_packed(target).parts[0]: name for name, target in self.adapter.modules(original, architecture).items()
        }
        copies = {same: copy for copy, same in self.adapter.copies.items()}
        for head in ("lm_head", "lm_head.words"):
            if config.tie_word_embeddings and head in modules:
                words = self._published(f"{modules['model.embed_tokens']}.weight")
                copies[self._published(f"{modules[head]}.weight")] = words
        return copies

    def ignored(self, config: ZooConfig) -> tuple[str, ...]:
        return (".position_ids", ".inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".masked_bias")

    def is_dropped(self, name: str) -> bool:
        return self.adapter.is_dropped(name) or super().is_dropped(name)

    def fillers(self, config: ZooConfig) -> dict[str, tuple[int, ...]]:
        pooler, D = self.files.pooler, config.hidden_size
        if pooler is None or config.task != "sentence-embedding":
            return {}
        return {f"{pooler}.weight": (D, D), f"{pooler}.bias": (D,)}

    def config(self, config: ZooConfig) -> dict[str, Any]:
        origin = config.origin
        if origin.get("architecture") in self.adapter.architectures:
            kind = {"model_type": self.adapter.model_types[0]}
            values = {**kind, **origin["config"], "architectures": [origin["architecture"]]}
            again = {**self.fields(Checkpoint(Path(self.name), values)), "origin": {}}
            if difference(config, ZooConfig(**again)) is None:
                return values
        return self.adapter.describe(config)


def packed_entries(
    modules: Mapping[str, str | Packed], layers: list[int], ours: Collection[str]
) -> Iterator[tuple[str, Entry]]:
    """Entries of an adapter's modules, each with its name there, for the parameters that our model has (`ours`).

    layers: for each number that "{i}" stands for, the layer here.
    """
    for theirs, target in modules.items():
        packed = as_packed(target)
        read, write = functools.partial(_unpack, packed), functools.partial(_pack, packed)
        for i, place in enumerate(layers if "{i}" in theirs else [0]):
            for parameter in ("weight", "bias"):
                names = tuple(f"{part.replace('{i}', str(place))}.{parameter}" for part in packed.parts)
                if names[0] in ours:
                    name = f"{theirs.replace('{i}', str(i))}.{parameter}"
                    yield name, Entry((name,), names, read, write)


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
