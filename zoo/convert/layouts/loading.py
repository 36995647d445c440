"""From entries to a model: built on the meta device, checked name by name and shape by shape, filled tensor by tensor.

Nothing is read before every name and shape fits. One entry is in memory beside the model, never a second copy of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry
from zoo.convert.layouts.names import in_todays_names
from zoo.errors import CheckpointError
from zoo.models.backbone import ZooPreTrainedModel
from zoo.models.heads import TASK_CLASSES


def meta_model(config: ZooConfig) -> ZooPreTrainedModel:
    """A model without numbers: every parameter and buffer has its shape and no memory."""
    with torch.device("meta"):
        return TASK_CLASSES[config.task](config)


def needed_tensors(model: ZooPreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint must fill: the state dict without the second names of tied weights."""
    tied = set(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def load_entries(
    family: Family,
    config: ZooConfig,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
) -> ZooPreTrainedModel:
    """The model of a config with a checkpoint's weights, in eval mode.

    dtype: of the weights; None: as they are stored. Parameters that must stay float32 do so. device_map: a device, a
    mapping of module names to devices, or a strategy of accelerate such as "auto"; None: the CPU.

    Raises CheckpointError for the first tensor that is missing, surplus or of another shape than the config says.
    """
    model = meta_model(config)
    needed = needed_tensors(model)
    checkpoint = in_todays_names(family, config, checkpoint)
    entries = [e for e in family.entries_of(config, checkpoint) if _wanted(e, needed, checkpoint)]
    _check(family, config, entries, needed, checkpoint)
    stored = _stored_dtype(entries, checkpoint) if dtype is None else dtype
    model.config.dtype = stored
    keep = [re.compile(pattern) for pattern in model._keep_in_fp32_modules_strict or ()]
    devices = _devices(model, device_map)
    order = checkpoint.in_file_order(entry.theirs[0] for entry in entries)
    by_first = {entry.theirs[0]: entry for entry in entries}
    for first in order:
        entry = by_first[first]
        for name, tensor in zip(entry.ours, entry.read([checkpoint.get(n) for n in entry.theirs]), strict=True):
            wanted = torch.float32 if any(p.search(name) for p in keep) else stored
            _put(model, name, tensor.to(wanted) if tensor.is_floating_point() else tensor, devices)
    _check_aliases(family, config, checkpoint)
    checkpoint.close()
    _finish(model, devices)
    return _dispatched(model.eval(), device_map, devices)


def _wanted(entry: Entry, needed: dict[str, Tensor], checkpoint: Checkpoint) -> bool:
    if entry.optional and not any(name in checkpoint.shapes for name in entry.theirs):
        return False
    return any(name in needed for name in entry.ours)


def _check(
    family: Family, config: ZooConfig, entries: list[Entry], needed: dict[str, Tensor], checkpoint: Checkpoint
) -> None:
    path, read = checkpoint.path, set(family.aliases(config))
    filled: set[str] = set()
    for entry in entries:
        for name, expected in zip(entry.theirs, their_shapes(entry, needed), strict=True):
            if name not in checkpoint.shapes:
                raise CheckpointError(f"{path}: {name} is missing ({family.layout} layout of {family.name})")
            if checkpoint.shapes[name] != expected:
                called = checkpoint.stored_name(name)
                raise CheckpointError(f"{path}: {called} is {checkpoint.shapes[name]}, expected {expected}")
        read.update(entry.theirs)
        filled.update(entry.ours)
    ignored = family.ignored(config)
    others = [n for n in checkpoint.shapes if n not in read and not family.is_dropped(n)]
    surplus = [n for n in others if not ignored or not n.endswith(ignored)]
    if surplus:
        raise CheckpointError(f"{path}: {min(surplus)} has no place in {family.name} ({family.layout} layout)")
    left = {n for e in family.entries_of(config, checkpoint) if e.optional for n in e.ours}
    if empty := sorted(needed.keys() - filled - left):
        raise CheckpointError(f"{path}: nothing in the {family.layout} layout of {family.name} fills {empty[0]}")


def their_shapes(entry: Entry, needed: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """Which shapes their tensors must have, from the shapes of ours."""
    return [tuple(t.shape) for t in entry.write([needed[name].to("meta") for name in entry.ours])]


def _stored_dtype(entries: list[Entry], checkpoint: Checkpoint) -> torch.dtype:
    """Of the largest tensor, which decides what the whole costs."""
    names = (name for entry in entries for name in entry.theirs)
    largest = max(names, key=lambda name: torch.Size(checkpoint.shapes[name]).numel())
    found = checkpoint.get(largest).dtype
    return found if found in (torch.float32, torch.float16, torch.bfloat16, torch.float64) else torch.float32


def _put(model: ZooPreTrainedModel, name: str, tensor: Tensor, devices: dict[str, Any]) -> None:
    from accelerate.utils import set_module_tensor_to_device

    set_module_tensor_to_device(model, name, _device_of(name, devices), value=tensor, dtype=tensor.dtype)
    owner, _, leaf = name.rpartition(".")
    getattr(model.get_submodule(owner), leaf)._is_hf_initialized = True  # `initialize_weights` leaves it alone


def _devices(model: ZooPreTrainedModel, device_map: Any) -> dict[str, Any]:
    if device_map is None:
        return {"": "cpu"}
    if isinstance(device_map, dict):
        return device_map
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        from accelerate import infer_auto_device_map

        return infer_auto_device_map(
            model, no_split_module_classes=["Block", "RoutedBlock", "MemoryBlock", "StageBlock"]
        )
    return {"": device_map}


def _device_of(name: str, devices: dict[str, Any]) -> Any:
    places = [place for place in devices if place == "" or name == place or name.startswith(f"{place}.")]
    if not places:
        raise CheckpointError(f"device_map: no entry for {name}")
    return devices[max(places, key=len)]


def _check_aliases(family: Family, config: ZooConfig, checkpoint: Checkpoint) -> None:
    for name, same in family.aliases(config).items():
        if name in checkpoint.shapes and same in checkpoint.shapes:
            one, other = checkpoint.get(name), checkpoint.get(same)
            if one.shape != other.shape or not torch.equal(one, other):
                raise CheckpointError(f"{checkpoint.path}: {name} differs from {same}, which the config says it equals")


def _finish(model: ZooPreTrainedModel, devices: dict[str, Any]) -> None:
    """Memory and initial values for what no checkpoint holds: drawn rotations, parameters new to this package."""
    model.tie_weights()
    for module_name, module in model.named_modules():
        for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta:
                device = _device_of(f"{module_name}.{leaf}".lstrip("."), devices)
                empty = torch.empty_like(tensor, device=device)
                if leaf in module._parameters:
                    module._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
                else:
                    module._buffers[leaf] = empty
    model.initialize_weights()
    model.tie_weights()


def _dispatched(model: ZooPreTrainedModel, device_map: Any, devices: dict[str, Any]) -> ZooPreTrainedModel:
    if device_map is None or len(devices) == 1:
        return model
    from accelerate import dispatch_model

    return dispatch_model(model, devices)


def written_shapes(family: Family, config: ZooConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `their_tensors` would give."""
    return {name: tuple(t.shape) for name, t in _their_tensors(family, meta_model(config))}


@torch.no_grad()
def their_tensors(family: Family, model: ZooPreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """A model's weights under their names, one entry at a time, then the fillers. Tensors are on the CPU."""
    return ((name, _alone(tensor.cpu())) for name, tensor in _their_tensors(family, model))


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that is no part of another one's memory, as files want it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _their_tensors(family: Family, model: ZooPreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    needed = needed_tensors(model)
    for entry in family.entries(model.config):
        if not entry.optional and all(name in needed for name in entry.ours):
            pieces = entry.write([needed[name].detach() for name in entry.ours])
            yield from zip(entry.theirs, pieces, strict=True)
    for name, shape in family.fillers(model.config).items():
        yield name, torch.zeros(shape, dtype=model.dtype, device=model.device)
