"""From entries to a model: built on the meta device, checked name by name and shape by shape, filled tensor by tensor.

Nothing is read before every name and shape fits. One entry is in memory beside the model, never a second copy of it.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry
from zoo.convert.layouts.names import in_todays_names
from zoo.convert.layouts.writing import TensorStream
from zoo.errors import CheckpointError
from zoo.models.backbone import ZooPreTrainedModel
from zoo.models.heads import TASK_CLASSES

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


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
    mapping of module names to devices, or a strategy of accelerate such as "auto"; None: the CPU. What is on "meta" is
    checked and not read.

    Raises CheckpointError for the first tensor that is missing, surplus or of another shape than the config says.
    """
    model = meta_model(config)
    needed = needed_tensors(model)
    checkpoint = in_todays_names(family, config, checkpoint)
    entries = [e for e in family.entries_of(config, checkpoint) if _wanted(e, needed, checkpoint)]
    _check(family, config, entries, needed, checkpoint)
    found = _stored_dtype(entries, checkpoint)
    model.config.dtype = wanted = found if dtype is None else dtype
    keep = [re.compile(pattern) for pattern in model._keep_in_fp32_modules_strict or ()]
    devices = _devices(model, device_map)
    order = checkpoint.in_file_order(entry.theirs[0] for entry in entries)
    by_first = {entry.theirs[0]: entry for entry in entries}
    for first in order:
        entry = by_first[first]
        if all(str(_device_of(name, devices)) == "meta" for name in entry.ours):
            continue
        dtypes = [torch.float32 if any(p.search(name) for p in keep) else wanted for name in entry.ours]
        # Room for what stays before what goes: freed in between, it would leave holes that the allocator keeps.
        room = {n: torch.empty(needed[n].shape, dtype=d) for n, d in zip(entry.ours, dtypes, strict=True) if d != found}
        unread: Any = _Unread(checkpoint, entry.theirs)
        tensors = entry.read(unread)
        for name, tensor, own in zip(entry.ours, tensors, dtypes, strict=True):
            if tensor.dtype in _FP8:
                raise CheckpointError(f"{checkpoint.path}: {first} is fp8 without a scale that says what it stands for")
            if tensor.is_floating_point():
                tensor = room[name].copy_(tensor) if name in room else tensor.to(own)
            _put(model, name, tensor, devices)
        if room:
            del tensors, tensor
            _give_back()
    _check_aliases(family, config, checkpoint)
    checkpoint.close()
    _finish(model, devices)
    return _dispatched(model.eval(), devices)


def _give_back() -> None:
    """Ask glibc for the pages of what was freed, which it keeps in holes between tensors; elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class _Unread(Sequence[Tensor]):
    """Tensors of a checkpoint, each read when it is asked for, so that an entry of many need not hold them all."""

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        self.checkpoint, self.names = checkpoint, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: Any) -> Any:
        return self.checkpoint.get(self.names[i])


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
    places = device_map if isinstance(device_map, dict) else {"": device_map}
    if "disk" in places.values():
        raise CheckpointError("device_map: 'disk' is not a place for weights here; use a device, 'cpu' or 'meta'")
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


def _dispatched(model: ZooPreTrainedModel, devices: dict[str, Any]) -> ZooPreTrainedModel:
    if len({str(device) for device in devices.values()} - {"meta"}) < 2:
        return model
    from accelerate import dispatch_model

    return dispatch_model(model, devices)


def written_shapes(family: Family, config: ZooConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `their_tensors` would give."""
    return {name: tuple(t.shape) for name, t in _their_tensors(family, meta_model(config), torch.device("meta"))}


def their_tensors(family: Family, model: ZooPreTrainedModel) -> TensorStream:
    """A model's weights under their names, one entry at a time, then the fillers. Tensors are on the CPU."""
    described = dict(_their_tensors(family, model, torch.device("meta")))
    held = _their_tensors(family, model, torch.device("cpu"))
    return TensorStream(described, ((name, _alone(tensor)) for name, tensor in held))


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that is no part of another one's memory, as files want it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _their_tensors(family: Family, model: ZooPreTrainedModel, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    needed = needed_tensors(model)
    for entry in family.entries(model.config):
        if not entry.optional and all(name in needed for name in entry.ours):
            with torch.no_grad():
                pieces = entry.write([needed[name].detach().to(device) for name in entry.ours])
            yield from zip(entry.theirs, pieces, strict=True)
            del pieces
    for name, shape in family.fillers(model.config).items():
        yield name, torch.zeros(shape, dtype=model.dtype, device=device)
