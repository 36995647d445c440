"""Layers that share weights: whole blocks (`same_as` in a layer's spec), or what all mixers of a kind have in common.

ALBERT (Lan et al. 2019, arXiv 1909.11942) has one block for all layers, Zamba (Glorioso et al. 2024, arXiv 2405.16712)
one attention block between runs of Mamba. Such a block is one module, registered once under the index of its first
layer: parameters are counted, saved, loaded and given to an optimizer once; their gradient is the sum over the runs.
Each run has a state of its own. The same holds for parameters that mixers of equal options have in common
(`SequenceMixer.common`), such as the one projection of a Linformer shared by all layers: the first mixer holds them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import LayerSpec, ModelSpec, ZooConfig
from zoo.errors import ConversionError
from zoo.mixers.base import SequenceMixer


class SharedLayers(nn.ModuleList):
    """Blocks in the order in which they run; `first[i]` is the layer whose block runs as layer i.

    A read-only list: to exchange a block, give each layer its own weights first (`unshare`).
    """

    def __init__(self, blocks: list[nn.Module], first: list[int]) -> None:
        super().__init__()
        self.first = first
        for i in sorted(set(first)):
            self.add_module(str(i), blocks[i])

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self._modules[str(i)] for i in self.first])  # type: ignore[misc]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._modules[str(i)] for i in self.first[index]]
        return self._modules[str(self.first[index])]

    def __setitem__(self, *unused: Any) -> None:
        raise TypeError("layers share weights here (same_as); zoo.models.unshare(model) gives each layer its own")

    __delitem__ = append = extend = insert = __setitem__  # type: ignore[assignment]


def make_layers(spec: ModelSpec, make: Callable[[ModelSpec, LayerSpec], Any]) -> nn.ModuleList:
    """The blocks of a model; a plain list where no layer has `same_as`."""
    first = [i if layer.same_as is None else layer.same_as for i, layer in enumerate(spec.layers)]
    blocks = [make(spec, layer) if first[i] == i else None for i, layer in enumerate(spec.layers)]
    for i, layer in enumerate(spec.layers):
        if first[i] == i and layer.memory is not None and layer.memory.same_as is not None:
            blocks[i].held_by = (blocks[first[layer.memory.same_as]].memory,)  # type: ignore[union-attr]
    if len(set(first)) == len(first):
        return nn.ModuleList(blocks)  # type: ignore[arg-type]
    for i in shared_indices(first):
        blocks[first[i]].runs_as = f"layers.{first[i]}"  # type: ignore[union-attr]
    return SharedLayers(blocks, first)  # type: ignore[arg-type]


def shared_indices(first: list[int]) -> list[int]:
    """The layers whose block runs in another layer as well."""
    return [i for i, owner in enumerate(first) if first.count(owner) > 1]


def sharing_layers(model: Any) -> list[int]:
    """The layers of a model whose weights another layer uses as well."""
    return shared_indices(getattr(model.base_model.layers, "first", []))


def refuse_shared(model: Any, layers: list[int]) -> None:
    """Raise ConversionError where one of `layers` has weights that another layer uses."""
    if found := sorted(set(layers) & set(sharing_layers(model))):
        raise ConversionError(
            f"layer {found[0]} shares its weights with another layer (same_as), so it cannot get a mixer of its own; "
            "zoo.models.unshare(teacher) gives a copy in which each layer has its own weights"
        )


def unshare(model: Any) -> Any:
    """A copy of `model` in which each layer has weights of its own; it computes the same and has more parameters."""
    new = copy.deepcopy(model)
    backbone, first = new.base_model, getattr(new.base_model.layers, "first", None)
    if first is None:
        return new
    blocks = [b if first[i] == i else copy.deepcopy(b) for i, b in enumerate(backbone.layers)]
    for block in blocks:
        block.runs_as = None
    backbone.layers = nn.ModuleList(blocks)
    join_mixers(backbone.layers)
    config: ZooConfig = copy.deepcopy(model.config)
    for layer in config.layers:
        layer.pop("same_as", None)
    set_config(new, config)
    return new


def join_mixers(blocks: Iterable[nn.Module], new: Collection[nn.Module] = ()) -> None:
    """Let mixers of equal options, at the same place in their blocks, hold once what they have in `common`.

    The first holds it. Where only some of the mixers are `new`, the values are those of the older ones.
    """
    groups: list[tuple[str, list[SequenceMixer]]] = []
    for block in dict.fromkeys(blocks):
        for path, mixer in block.named_modules():
            if isinstance(mixer, SequenceMixer) and mixer.common:
                same = [g for at, g in groups if at == path and g[0].config == mixer.config]
                same[0].append(mixer) if same else groups.append((path, [mixer]))
    for _, (first, *others) in groups:
        values = next((m.holder for m in (first, *others) if m not in new), first)
        with torch.no_grad():
            for name in first.common if values is not first else ():
                getattr(first, name).copy_(getattr(values, name))
        for mixer in others:
            mixer.read_from(first)


def parameters_of(*modules: nn.Module) -> list[nn.Parameter]:
    """The parameters that modules compute with: their own, and those that another mixer holds for them."""
    found = [p for module in modules for p in module.parameters()]
    parts = [m for module in modules for m in module.modules() if isinstance(m, SequenceMixer)]
    return found + [getattr(m.holder, name) for m in parts if m.holder is not m for name in m.common]


def set_config(model: nn.Module, config: ZooConfig) -> None:
    """Give a model and the models inside it this config."""
    for module in model.modules():
        if isinstance(getattr(module, "config", None), ZooConfig):
            module.config = config  # type: ignore[assignment]


def add_earlier_runs(ffn: Any, name: str, passed: dict[str, Tensor]) -> None:
    """Where the block `name` ran before in this pass, the loss that its channel mixer adds becomes the sum of the runs.

    `passed` is what is handed through all layers of one pass; the sum so far is kept there.
    """
    if ffn.auxiliary_loss is None:
        return
    key = f"{name}.auxiliary_loss"
    if key in passed:
        ffn.auxiliary_loss = passed[key] + ffn.auxiliary_loss
    passed[key] = ffn.auxiliary_loss
