"""What a family of Transformers must say so that its models can be imported exactly and written back.

An adapter is four lookups (five, where parameters stand outside modules), and nothing in it runs a model:

    architectures    original class -> task
    only             option -> the values that can be expressed; any other value is refused by name
    spec             original config -> fields of `ZooConfig`
    modules          original module names -> ours, "{i}" standing for the layer
    tensors          original parameters that are not a module's weight or bias -> ours

`register_teacher` makes it known, also from outside the package.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import transformers
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig

from zoo.config import ZooConfig
from zoo.errors import ConfigError, ConversionError, ExportError, did_you_mean
from zoo.ops.rotary import RotaryConfig
from zoo.transformers_keys import TOKEN_IDS


@dataclass(frozen=True)
class Packed:
    """One original module that holds several of ours, or holds one in another order.

    parts: our modules, in order. transposed: its weight is (in, out), as in GPT-2's Conv1D. by_head: its rows are
    grouped by so many heads, and by part within a head, as in GPT-NeoX; 0: by part.
    """

    parts: tuple[str, ...]
    transposed: bool = False
    by_head: int = 0

    def unpack(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of our modules (weights as (out, in)) from a weight or bias of the original."""
        rows = tensor.T if self.transposed and tensor.dim() == 2 else tensor
        if self.by_head:
            grouped = rows.unflatten(0, (self.by_head, len(self.parts), -1))
            return [part.flatten(0, 1).contiguous() for part in grouped.unbind(1)]
        return [part.contiguous() for part in rows.chunk(len(self.parts))]

    def pack(self, tensors: list[Tensor]) -> Tensor:
        """The inverse of `unpack`."""
        if self.by_head:
            rows = torch.stack([t.unflatten(0, (self.by_head, -1)) for t in tensors], 1).flatten(0, 2)
        else:
            rows = torch.cat(tensors)
        return (rows.T if self.transposed and rows.dim() == 2 else rows).contiguous()


class TeacherAdapter(ABC):
    """Base of the adapters; see the module docstring.

    copies: original tensor -> the original tensor that it always equals, and which alone is imported.
    dropped: original modules without a counterpart, whose tensors are left out; `origin["dropped"]` lists them.
    published: original names in memory -> those that files have, as (pattern, replacement) of `re.sub`, where
        transformers renames tensors when it loads and saves (its conversion_mapping.py).
    padding: the side on which a row may be padded so that the original computes the same as without; or "none".
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    architectures: ClassVar[dict[str, str]]
    only: ClassVar[dict[str, tuple[Any, ...]]] = {}
    copies: ClassVar[dict[str, str]] = {}
    dropped: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[tuple[tuple[str, str], ...]] = ()
    padding: ClassVar[Literal["left", "right", "none"]] = "left"

    @abstractmethod
    def spec(self, config: Any, task: str) -> dict[str, Any]:
        """Fields of `ZooConfig` for an original config. Raises ConversionError for what cannot be expressed."""

    @abstractmethod
    def modules(self, config: Any, architecture: str) -> dict[str, str | Packed]:
        """Original module names to ours; weights and biases follow."""

    def fields(self, config: Any, architecture: str) -> dict[str, Any]:
        """Fields of `ZooConfig` for one of the classes; to be overridden where two classes of one task differ."""
        task = self.architectures[architecture]
        return {**self.spec(config, task), "task": task}

    def tensors(self, config: Any, architecture: str) -> dict[str, str]:
        """Original tensors that are not the weight or bias of a module, each by its full name, to ours."""
        return {}

    def wrap(self, model: Any) -> Any:
        """A model of another library as a transformers model around it; None where it is not of this family."""
        return None

    def config(self, values: dict[str, Any]) -> Any:
        """The original config from the JSON types that an import keeps in `origin`."""
        return AutoConfig.for_model(**values)

    def describe(self, config: ZooConfig) -> dict[str, Any]:
        """The original config (JSON types, with `architectures`) of a model of ours that did not come from one, or is
        no longer what came. Raises ExportError; an option that it does not name is compared by who asks."""
        raise ExportError("has no class to write back to: the model did not come from it, or was changed since")

    def probe(self, config: Any) -> dict[str, Tensor] | None:
        """Arguments, of the original's forward and of ours, for the check of an import; None: random rows of tokens."""
        return None

    def original_class(self, architecture: str) -> type:
        """The original class by name."""
        return getattr(transformers, architecture)

    def build(self, architecture: str, config: Any) -> Any:
        """An original model to write into, with exactly the tensors that an import carries."""
        return self.original_class(architecture)(config)

    def inputs(self, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor]:
        """Arguments of the original's forward under which it counts positions as we do: by real tokens."""
        return {
            "input_ids": ids_BL,
            "attention_mask": mask_BL,
            "position_ids": (mask_BL.cumsum(1) - 1).clamp(min=0),
        }

    def architectures_of(self, model_type: str) -> dict[str, str]:
        """The supported classes of one model type, with their tasks."""
        found = {}
        for name, task in self.architectures.items():
            if self.original_class(name).config_class.model_type == model_type:  # type: ignore[attr-defined]
                found[name] = task
        return found

    def check_options(self, config: Any) -> None:
        """Raise ConversionError for the first option with a value that our models cannot express."""
        for option, allowed in {**_ONLY, **self.only}.items():
            value = getattr(config, option, None)
            if value is not None and value not in allowed:
                wanted = " or ".join(repr(v) for v in allowed) or "unset"
                raise ConversionError(
                    f"{config.model_type} with {option}={value!r} cannot be imported exactly; {option} must be {wanted}"
                )

    def import_tensors(self, config: Any, architecture: str, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict from the original's. Raises ConversionError for a tensor that has no place here."""
        modules, places, ours = self.modules(config, architecture), self.our_layers(config), {}
        bare = self.tensors(config, architecture)
        for key, tensor in theirs.items():
            if key in self.copies or self.is_dropped(key):
                continue
            pattern, i, parameter = split_key(key)
            if key in bare:
                ours[bare[key]] = tensor
                continue
            if (exact := key.rpartition(".")[0]) in modules:
                pattern, i = exact, ""
            if pattern not in modules:
                raise ConversionError(
                    f"{architecture}: tensor {key!r} has no place in a zoo model; "
                    "only unmodified models are imported (merge adapters such as LoRA first)"
                )
            target = as_packed(modules[pattern])
            if i and int(i) < len(places):
                i = str(places[int(i)])
            for part, piece in zip(target.parts, target.unpack(tensor), strict=True):
                ours[f"{part.replace('{i}', i)}.{parameter}"] = piece
        return ours

    def export_tensors(self, config: Any, architecture: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The original's state dict from ours; the inverse of `import_tensors`."""
        theirs = {name: ours[mine] for name, mine in self.tensors(config, architecture).items()}
        for name, target in self.modules(config, architecture).items():
            target = as_packed(target)
            for i, place in enumerate(self.our_layers(config) if "{i}" in name else [0]):
                for parameter in ("weight", "bias"):
                    keys = [f"{part.replace('{i}', str(place))}.{parameter}" for part in target.parts]
                    if keys[0] in ours:
                        theirs[f"{name.replace('{i}', str(i))}.{parameter}"] = target.pack([ours[k] for k in keys])
        theirs.update({key: theirs[same] for key, same in self.copies.items() if same in theirs})
        return theirs

    def our_layers(self, config: Any) -> list[int]:
        """For each number that "{i}" stands for in the original's names, the layer here that has these weights."""
        return list(range(config.num_hidden_layers))

    def is_dropped(self, key: str) -> bool:
        """Whether an original tensor belongs to a module that is not imported."""
        return any(key.startswith(f"{name}.") for name in self.dropped)


# Options that change what any of these models computes, and which no zoo model has.
_ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (),
    "alibi": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "pruned_heads": ({},),
}


def as_packed(target: str | Packed) -> Packed:
    """A plain name as the pack of one."""
    return target if isinstance(target, Packed) else Packed((target,))


def split_key(key: str) -> tuple[str, str, str]:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers.{i}.mlp.up_proj`, `3`, `weight`)."""
    module, _, parameter = key.rpartition(".")
    match = re.search(r"\.(\d+)(?=\.)", module)
    if match is None:
        return module, "", parameter
    return f"{module[: match.start()]}.{{i}}{module[match.end() :]}", match[1], parameter


def described(config: ZooConfig, mixers: tuple[str, ...], ffns: tuple[str, ...]) -> tuple[list[Any], list[Any]]:
    """The options of a model's mixers and channel mixers, sizes written out, windows without sinks as attention.

    Raises ExportError for the first that is of none of the given names.
    """
    spec = config.spec
    found = [layer.mixer.resolved(spec.hidden_size) for layer in spec.layers], [layer.ffn for layer in spec.layers]
    for i, mixer in enumerate(found[0]):
        if mixer.name == "sliding_window" and mixer.causal:
            raise ExportError(
                f"layers.{i}.mixer.sinks is {mixer.sinks}; no class keeps first tokens in view behind a window; give 0"
            )
        if mixer.name not in mixers:
            raise ExportError(f"has no {mixer.name}")
    for i, ffn in enumerate(found[1]):
        if (name := None if ffn is None else ffn.name) not in ffns:
            raise ExportError(f"layers.{i}.ffn is {name}; its blocks have {' or '.join(ffns)}")
    return found


def common_values(config: ZooConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """What most configs of transformers call by the same names."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        **{key: getattr(config, key) for key in TOKEN_IDS},
    }


def rotary_of(config: Any, head_dim: int) -> RotaryConfig:
    """The rotary positions of an original config. Raises ConversionError for a scaling that is not known."""
    if any(isinstance(value, dict) for value in (config.rope_parameters or {}).values()):
        raise ConversionError(
            f"rope_parameters={config.rope_parameters!r}: one set for each kind of layer is not known"
        )
    try:
        return RotaryConfig.from_transformers(config, head_dim)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConversionError(f"rope_parameters.{where}: {problem['msg']}, got {problem['input']!r}") from None
    except ConfigError as error:
        raise ConversionError(f"rope_parameters: {error}") from None


_ADAPTERS: dict[str, TeacherAdapter] = {}


def register_teacher(cls: type[TeacherAdapter]) -> type[TeacherAdapter]:
    """Class decorator: make a family known. Raises ConfigError where another one has its name or model types."""
    for family, other in _ADAPTERS.items():
        same_class = (type(other).__module__, type(other).__qualname__) == (cls.__module__, cls.__qualname__)
        if not same_class and (family == cls.family or set(other.model_types) & set(cls.model_types)):
            raise ConfigError(f"teacher family {cls.family!r} or its model types are already those of {family!r}")
    _ADAPTERS[cls.family] = cls()
    return cls


def list_teachers() -> dict[str, tuple[str, ...]]:
    """The families that can be imported, each with its model types."""
    from zoo.registry import list_mixers

    list_mixers()  # loads the plugins, which may register families
    return {name: _ADAPTERS[name].model_types for name in sorted(_ADAPTERS)}


def wrapped(model: Any) -> Any:
    """A model of another library as a transformers model, where a family knows how; anything else as it is."""
    found = (adapter.wrap(model) for adapter in _ADAPTERS.values())
    return next((wrapper for wrapper in found if wrapper is not None), model)


def adapter_for(model_type: str | None) -> TeacherAdapter:
    """The adapter of a model type. Raises ConversionError that lists the families and what a new one needs."""

    def find() -> TeacherAdapter | None:
        return next((a for a in _ADAPTERS.values() if model_type in a.model_types), None)

    adapter = find()
    if adapter is None:
        families = list_teachers()
        adapter = find()
    if adapter is None:
        known = ", ".join(f"{name} ({', '.join(types)})" for name, types in families.items())
        near = did_you_mean(str(model_type), [t for types in families.values() for t in types])
        raise ConversionError(
            f"model type {model_type!r} is not supported{near if 'mean' in near else ''}; supported families: {known}. "
            "A new one is a zoo.convert.teachers.TeacherAdapter with four lookups: architectures (class -> task), "
            "only (option -> values that can be expressed), spec (config -> fields of ZooConfig), "
            "modules (module names -> ours); make it known with register_teacher"
        )
    return adapter
