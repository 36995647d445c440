"""ONNX: a causal model as one step with its state as inputs and outputs, any other model as one pass.

A step takes `input_ids` and `attention_mask` (batch, 1) and every tensor of the state by name, and gives `logits`
(batch, 1, vocabulary) and the new state under the same names with "new." in front. A masked token (0) changes nothing,
so rows of different lengths are fed together, padded anywhere. Which axes are free, and the state before the first
token, stand beside the graph in `zoo_onnx.json` and `initial_state.safetensors` (one row; repeat it for more).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry
from zoo.errors import ExportError
from zoo.mixers.base import State
from zoo.models.backbone import ZooPreTrainedModel
from zoo.models.state import state_cache
from zoo.registry import list_mixers

FORMAT = 1
_COMPLEX = ("s4", "s4d", "h3")  # their states are complex numbers, which ONNX has not


@register_family
class Onnx(Family):
    """Any model that can be traced; read by onnxruntime and whatever else reads ONNX, not by this package."""

    layout = name = "onnx"
    about = "ONNX graphs: one step with the state, or one pass"
    reads = False

    @property
    def mixers(self) -> tuple[str, ...]:  # type: ignore[override]
        """All but those with complex states."""
        return tuple(name for name in list_mixers() if name not in _COMPLEX)

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return False

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        raise NotImplementedError("graphs are not read")

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        return iter(())

    def config(self, config: ZooConfig) -> dict[str, Any]:
        if any(layer.depth is not None for layer in config.spec.layers):
            raise ExportError("depth: which tokens take a block is decided while it runs, and a graph is fixed")
        return {"format": FORMAT, "task": config.task, "vocab_size": config.vocab_size}

    def write(self, model: Any, folder: Path, config: dict[str, Any], tokenizer: Any = None) -> None:
        if config["task"] == "causal-lm":
            config |= export_step(model, folder)
        else:
            config |= export_pass(model, folder)
        (folder / "zoo_onnx.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Step(nn.Module):
    """A model whose state is a flat list of tensors; `names` are "layer.name", in the order of the arguments."""

    def __init__(self, model: ZooPreTrainedModel, names: list[str], grows: dict[str, list[int]]) -> None:
        super().__init__()
        self.model, self.names, self.grows = model, names, grows

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Logits and the new state."""
        layers: dict[int, dict[str, Tensor]] = {}
        lengths: dict[int, Any] = {}
        for name, tensor in zip(self.names, tensors, strict=True):
            i, part = _split(name)
            layers.setdefault(i, {})[part] = tensor
            if self.grows[name]:
                lengths[i] = tensor.shape[self.grows[name][0]]
        cache: Any = state_cache(1 + max(layers))
        for i, found in layers.items():
            cache.layers[i].set(State(found, lengths.get(i, 1)))
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        states = [cache.layers[i].state.tensors for i in range(1 + max(layers))]
        return out.logits, *(states[i][part] for i, part in map(_split, self.names))


def _split(name: str) -> tuple[int, str]:
    i, _, part = name.partition(".")
    return int(i), part


@torch.no_grad()
def export_step(model: ZooPreTrainedModel, folder: Path) -> dict[str, Any]:
    """Write `step.onnx` and `initial_state.safetensors`; returns what `zoo_onnx.json` says of them."""
    from safetensors.torch import save_file

    model = model.eval()
    state, grown = _states(model, 3), _states(model, 5)
    grows = {k: [d for d in range(1, t.dim()) if t.shape[d] != grown[k].shape[d]] for k, t in state.items()}
    start = _initial(model, state, grows)
    free = torch.export.Dim.AUTO
    axes = [{0: free, **dict.fromkeys(grows[name], free)} for name in state]
    arguments = (torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.long), *state.values())
    names = ["input_ids", "attention_mask", *state]
    _export(
        Step(model, list(state), grows), arguments, ({0: free}, {0: free}, tuple(axes)), folder / "step.onnx", names,
        ["logits", *(f"new.{name}" for name in state)],
    )  # fmt: skip
    save_file(start, folder / "initial_state.safetensors")
    return {"graph": "step.onnx", "initial_state": "initial_state.safetensors", "inputs": names, "grows": grows}


def _states(model: ZooPreTrainedModel, length: int) -> dict[str, Tensor]:
    """The state behind `length` tokens of two rows; one of them is masked, so that all parts of it are there."""
    ids_BL, mask_BL = torch.arange(2 * length).view(2, length) % model.config.vocab_size, torch.ones(2, length)
    mask_BL[0, 0] = 0
    cache = model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=True).past_key_values
    return {f"{i}.{name}": t.clone() for i, layer in enumerate(cache.layers) for name, t in layer.state.tensors.items()}


def _initial(model: ZooPreTrainedModel, like: dict[str, Tensor], grows: dict[str, list[int]]) -> dict[str, Tensor]:
    """The state before the first token, of one row."""
    found: dict[str, Tensor] = {}
    backbone: Any = model.base_model
    for i, block in enumerate(backbone.layers):
        state = block.init_state(1, device=model.device, dtype=model.dtype)
        found |= {f"{i}.{name}": tensor for name, tensor in state.tensors.items()}
    for name, tensor in like.items():
        shape = [0 if d in grows[name] else n for d, n in enumerate(tensor.shape)]
        made = found.get(name, torch.zeros(1, *shape[1:], dtype=tensor.dtype))
        fits = all(d in grows[name] or a == b for d, (a, b) in enumerate(zip(made.shape, [1, *shape[1:]], strict=True)))
        if not fits:
            raise ExportError(f"the state {name} changes its shape while it runs, from {tuple(made.shape)}")
        found[name] = made.contiguous()
    return {name: found[name] for name in like}


@torch.no_grad()
def export_pass(model: ZooPreTrainedModel, folder: Path) -> dict[str, Any]:
    """Write `model.onnx`, a whole pass with free batch size and length (images: free batch size)."""
    model = model.eval()
    free = torch.export.Dim.AUTO
    image = model.config.spec.image
    if image is not None:
        inputs = {"pixel_values": torch.randn(2, image.channels, image.image_size, image.image_size)}
        axes: tuple[dict[int, Any], ...] = ({0: free},)
    else:
        inputs = {"input_ids": torch.arange(14).view(2, 7) % model.config.vocab_size}
        inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
        axes = ({0: free, 1: free}, {0: free, 1: free})
    path = folder / "model.onnx"
    _export(Pass(model, list(inputs)), tuple(inputs.values()), axes, path, list(inputs), ["output"])
    return {"graph": "model.onnx", "inputs": list(inputs)}


class Pass(nn.Module):
    """The first output of a model, from its arguments in order."""

    def __init__(self, model: ZooPreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits or embeddings."""
        return self.model(**dict(zip(self.names, tensors, strict=True)))[0]


def _export(module: nn.Module, arguments: tuple, axes: Any, path: Path, inputs: list[str], outputs: list[str]) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"writing ONNX needs the package {error.name}: pip install 'zoo[onnx]'") from None
    if isinstance(module, Pass):
        axes = (axes,)
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(), arguments, dynamo=True, dynamic_shapes=axes, input_names=inputs, output_names=outputs,
                custom_translation_table=_translations(), verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter's own kinds: a graph that cannot be made is the model's fault here
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"torch cannot make a graph of this model: {lines[0]}") from error
    assert program is not None
    _check_rows(program, module, arguments)
    program.save(path)


def _check_rows(program: Any, module: nn.Module, arguments: tuple) -> None:
    """Raise ExportError where a graph has the two rows of the trace built in: three must come out as the model's."""
    three = [torch.cat([t, t[:1]]) for t in arguments]
    try:
        got, expected = program.exported_program.module(check_guards=False)(*three), module(*three)
    except (AssertionError, RuntimeError):
        return  # torch also bounds sizes where it took one of two equal ways; onnxruntime knows no such bounds
    one, other = (x if isinstance(x, Tensor) else x[0] for x in (got, expected))  # of a step: its logits
    if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
        raise ExportError("the graph of this model gives other numbers for another number of rows")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _translations() -> dict[Any, Callable]:
    """Operators that torch's exporter does not know."""
    aten = torch.ops.aten
    return {
        aten.cummax.default: _cummax, aten.sort.stable: _stable_sort, aten.searchsorted.Tensor: _searchsorted,
    }  # fmt: skip


def _searchsorted(line: Any, values: Any, out_int32: bool = False, right: bool = False, **unused: Any) -> Any:
    """How many numbers of a sorted line are below each value, or not above it."""
    op = _opset()
    last = op.Constant(value_ints=[-1])
    compare = op.LessOrEqual if right else op.Less
    below = op.Cast(compare(line, op.Unsqueeze(values, last)), to=6 if out_int32 else 7)  # int32, int64
    return op.ReduceSum(below, last, keepdims=0)


def _opset() -> Any:
    import onnxscript

    return onnxscript.opset18


def _cummax(x: Any, dim: int) -> Any:
    """The largest so far along an axis, and where it stood: all pairs, of which the later ones count as the lowest."""
    op = _opset()
    rank, whole = len(x.shape), not x.dtype.is_floating_point()
    order = [d for d in range(rank) if d != dim % rank] + [dim % rank]
    back = [order.index(d) for d in range(rank)]
    x = op.Transpose(x, perm=order)
    n = op.Squeeze(op.Shape(x, start=rank - 1, end=rank), op.Constant(value_ints=[0]))
    index = op.Range(op.Constant(value_int=0), n, op.Constant(value_int=1))
    one, two = op.Constant(value_ints=[-1]), op.Constant(value_ints=[-2])
    seen = op.LessOrEqual(op.Unsqueeze(index, op.Constant(value_ints=[0])), op.Unsqueeze(index, one))
    lowest = op.CastLike(op.Constant(value_int=-(2**31)) if whole else op.Constant(value_float=-math.inf), x)
    pairs = op.Where(seen, op.Unsqueeze(x, two), lowest)
    values = op.Transpose(op.ReduceMax(pairs, one, keepdims=0), perm=back)
    places = op.Transpose(op.ArgMax(pairs, axis=-1, keepdims=0, select_last_index=1), perm=back)
    return values, places


def _stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """TopK of all, whose ties keep their order."""
    op = _opset()
    rank = len(x.shape)
    n = op.Shape(x, start=dim % rank, end=dim % rank + 1)
    return op.TopK(x, n, axis=dim % rank, largest=int(descending), sorted=1)
