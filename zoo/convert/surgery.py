"""Replacing mixers: the student is the teacher with other mixers, and shares no memory with it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from zoo.config import MixerOptions, ZooConfig
from zoo.errors import ConfigError, ConversionError, TraitError
from zoo.mixers.base import AttentionStats, AttentionWeights, SequenceMixer, Traits
from zoo.models.backbone import ZooPreTrainedModel, float32_patterns
from zoo.models.shared import join_mixers, refuse_shared, set_config
from zoo.registry import list_mixers, mixer_class

MixerSpec = str | Mapping[str, Any] | MixerOptions


def mixer_spec(mixer: MixerSpec, options: Mapping[str, Any] | None = None) -> dict[str, Any] | MixerOptions:
    """A mixer as a user names it -> `{"name": ..., its options}`, checked as far as is possible without a layer.

    Takes a registered name, ``"M+window"`` (`windowed_linear` with the linear mixer M), or a mapping with `name`;
    `options` are laid on top. Complete `MixerOptions` are passed through.

    Raises UnknownNameError with the nearest names; ConfigError for anything else than these forms.
    """
    if isinstance(mixer, MixerOptions):
        if options:
            raise ConfigError("mixer options are complete already; give mixer_options with a name or a mapping")
        return mixer
    values = {"name": mixer} if isinstance(mixer, str) else dict(mixer) if isinstance(mixer, Mapping) else {}
    name = values.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"mixer: expected a name, 'M+window' or a mapping with 'name', got {mixer!r}")
    if "name" in (options or {}):
        raise ConfigError(f"mixer_options.name: the mixer is named already ({name!r})")
    if match := re.fullmatch(r"\s*(\w+)\s*\+\s*window\s*", name):
        mixer_class(match[1])  # raises with the nearest names
        values = {**values, "name": "windowed_linear", "linear": match[1]}
    elif "+" in name:
        raise ConfigError(
            f"mixer: cannot read {name!r}; what can be combined is a linear mixer and a window: 'M+window'"
        )
    mixer_class(values["name"])
    return {**values, **(options or {})}


def layer_options(spec: dict[str, Any] | MixerOptions, attention: AttentionWeights) -> MixerOptions:
    """The complete options of a mixer in place of `attention`.

    Raises TraitError where the mixer cannot read in the teacher's direction; ConfigError for wrong options.
    """
    name = spec.name if isinstance(spec, MixerOptions) else spec["name"]
    cls: Any = mixer_class(name)
    trait = "causal" if attention.causal else "bidirectional"
    if not getattr(cls.traits, trait):
        able = [n for n in list_mixers() if getattr(_traits(n), trait) and n != "attention"]
        kind = "a causal language model" if attention.causal else "a two-sided encoder"
        raise TraitError(
            f"mixer {name!r} cannot replace attention in {kind} (traits.{trait} is False); "
            f"choose from {', '.join(able)}"
        )
    if isinstance(spec, MixerOptions):
        return spec
    return cls.config_from_attention(attention, **{k: v for k, v in spec.items() if k != "name"})


def _traits(name: str) -> Traits:
    cls: Any = mixer_class(name)
    return cls.traits


def attention_layers(model: ZooPreTrainedModel) -> list[int]:
    """The layers whose mixer is softmax attention: those that can be converted."""
    return [i for i, block in enumerate(model.model.layers) if block.mixer.name == "attention"]


def attention_of(model: ZooPreTrainedModel, layer: int) -> AttentionWeights:
    """A layer's softmax attention as numbers, with what only the model knows about it."""
    image = model.config.spec.image
    weights = model.model.layers[layer].mixer.attention_weights()
    return replace(weights, special_tokens=0 if image is None else image.prefix)


@torch.no_grad()
def make_mixer(
    teacher: ZooPreTrainedModel, layer: int, spec: MixerSpec, stats: AttentionStats | None = None
) -> SequenceMixer:
    """A mixer that starts from the teacher's attention in `layer`, on its device and in its dtype."""
    count = len(teacher.model.layers)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
        raise ConversionError(f"layer {layer!r} does not exist; the teacher has layers 0 to {count - 1}")
    old = teacher.model.layers[layer].mixer
    if old.name != "attention":
        raise ConversionError(f"layer {layer} is {old.name!r}, not attention; there is nothing to convert in it")
    refuse_shared(teacher, [layer])
    attention = attention_of(teacher, layer)
    options = layer_options(mixer_spec(spec), attention)
    cls: Any = mixer_class(options.name)
    new = cls.from_attention(options, attention, stats)
    weight = old.o_proj.weight
    new = new.to(weight.device)
    for name, parameter in new.named_parameters():
        if not any(part in new.keep_float32 for part in name.split(".")):
            parameter.data = parameter.data.to(weight.dtype)
    return new.eval()


def replace_mixers(
    teacher: ZooPreTrainedModel,
    layers: Mapping[int, MixerSpec],
    stats: Mapping[int, AttentionStats] | None = None,
) -> ZooPreTrainedModel:
    """A copy of `teacher` in which `layers` have other mixers, each started from the attention that it replaces.

    Args:
        layers: for each layer index a mixer's name, options with `name`, or complete `MixerOptions`.
        stats: what was measured on the layers' attention, for mixers that start better with it.

    Returns: a model of the same class, in eval mode, every parameter trainable; no tensor is shared with the teacher.
    `config.origin` has the replacement added to its `lineage`.

    Raises: ConversionError for a layer that does not exist or is not attention; TraitError; ConfigError.
    """
    mixers = {i: make_mixer(teacher, i, spec, (stats or {}).get(i)) for i, spec in sorted(layers.items())}
    # What is in the memo is not copied: the mixers that go are never copied, the new ones come in in their place, and
    # what a conversion hung on the model (report, tokenizer) stays with it.
    memo: dict[int, Any] = {id(teacher.model.layers[i].mixer): mixer for i, mixer in mixers.items()}
    memo |= {id(value): None for key in ("report", "tokenizer") if (value := teacher.__dict__.get(key)) is not None}
    student = copy.deepcopy(teacher, memo)
    for key in ("report", "tokenizer"):
        student.__dict__.pop(key, None)
    join_mixers(student.model.layers, new=set(mixers.values()))
    set_config(student, _new_config(teacher.config, mixers))
    student.model._keep_in_fp32_modules_strict = float32_patterns(student)
    return student.requires_grad_(True).eval()


def _new_config(config: ZooConfig, mixers: Mapping[int, SequenceMixer]) -> ZooConfig:
    new = copy.deepcopy(config)
    for i, mixer in mixers.items():
        new.layers[i]["mixer"] = mixer.config.plain()
    if mixers:
        step = {"step": "replace_mixers", "layers": {str(i): mixer.name for i, mixer in mixers.items()}}
        new.origin = {**new.origin, "lineage": [*new.origin.get("lineage", []), step]}
    _ = new.spec  # validates
    return new


def describe_mixer(new: SequenceMixer, old: SequenceMixer) -> tuple[list[str], list[str]]:
    """Names of the parameters of `new` that are copies of one of `old`, and of those that are not."""
    copied: list[str] = []
    fresh: list[str] = []
    for name, parameter in new.named_parameters():
        same = any(
            source.shape == parameter.shape
            and (_leaf(name) == _leaf(other) or (source.dim() > 1 and bool(source.any())))
            and torch.equal(source, parameter)
            for other, source in old.named_parameters()
        )
        (copied if same else fresh).append(name)
    return copied, fresh


def _leaf(name: str) -> str:
    return ".".join(name.split(".")[-2:])
