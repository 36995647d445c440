"""Students that a layout can hold: options are set for it, and what has no form there is refused before any work."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from zoo.config import MixerOptions, ZooConfig
from zoo.convert.layouts.api import expressed
from zoo.convert.layouts.family import Family, families
from zoo.convert.selection import Keep
from zoo.convert.surgery import attention_layers, attention_of, layer_options
from zoo.errors import CheckpointError, ConfigError, ConversionError, ExportError, TraitError, unknown_name
from zoo.mixers.base import AttentionWeights
from zoo.models.backbone import ZooPreTrainedModel
from zoo.registry import list_mixers


def fit_to_target(model: ZooPreTrainedModel, spec: Any, keep: Keep, target: str) -> Any:
    """The options of a mixer under which the student has a form in the layout `target`.

    Args:
        model: the teacher.
        spec: the mixer's options with `name`, as the user gave them, or complete; None: an exact import.
        keep: the layers that keep attention, or how many.
        target: a layout that is written, such as "transformers".

    Options that a class there needs and that were not given are set. Raises ConversionError with the reason, and the
    mixers that would have a form, where there is none; UnknownNameError for a layout that does not exist.
    """
    check_target(target)
    spec = spec.plain() if isinstance(spec, MixerOptions) else spec
    attention = {i: attention_of(model, i) for i in attention_layers(model)}
    kept = tuple(attention)[: keep.count] if keep.layers is None else keep.layers
    layers = [] if spec is None else [i for i in attention if i not in kept]
    found, reasons = _fit(model.config, spec, {i: attention[i] for i in layers}, target)
    if found is not None or (spec is None and not reasons):
        return found
    able = [n for n in _known(target) if _fit(model.config, {"name": n}, {i: attention[i] for i in layers}, target)[0]]
    near = f"; mixers that have one: {', '.join(able)}" if able else "; no mixer has one with these layers kept"
    said = [reason for reason in reasons if "has no" not in reason] or reasons[:1]
    what = "the teacher" if spec is None else f"mixer {spec['name']!r}"
    raise ConversionError(f"target {target!r}: {what} has no form there ({'; '.join(said[:3])}){near}")


def check_target(target: str) -> None:
    """Raise UnknownNameError, with the nearest names, for a layout that does not exist or is not written."""
    written = sorted({family.layout for family in families() if family.writes})
    if target not in written:
        raise unknown_name("target", target, written)


def _fit(
    config: ZooConfig, spec: dict[str, Any] | None, layers: Mapping[int, AttentionWeights], target: str
) -> tuple[Any, list[str]]:
    """The completed options, or None and why each family of the layout cannot hold the student."""
    reasons: list[str] = []
    for family in _in_order(config, target):
        if spec is not None and spec["name"] not in family.mixers:
            continue
        options = None if spec is None else {**family.conversion(spec["name"], config), **spec}
        try:
            expressed(family, _student(config, options, layers))
        except (ExportError, CheckpointError, ConfigError, TraitError) as error:
            reasons.append(f"{family.name}: {error}")
        else:
            return options, []
    return None, reasons or ["no class there has such layers"]


def _student(config: ZooConfig, options: dict[str, Any] | None, layers: Mapping[int, AttentionWeights]) -> ZooConfig:
    """The config that the student would have."""
    student = copy.deepcopy(config)
    for i, attention in layers.items():
        assert options is not None
        student.layers[i]["mixer"] = layer_options(options, attention).plain()
    return student


def _in_order(config: ZooConfig, target: str) -> Iterable[Family]:
    """The families of a layout, that of the teacher first."""
    home = config.origin.get("family")
    return sorted((f for f in families(target) if f.writes), key=lambda f: f.name != home)


def _known(target: str) -> list[str]:
    """The mixers of a layout's families, but attention itself."""
    named = {name for family in families(target) if family.writes for name in family.mixers} - {"attention"}
    return [name for name in list_mixers() if name in named]
