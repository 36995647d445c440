"""ONNX: a causal model as two graphs, of a prompt and of a step, any other model as one pass.

Both graphs of a causal model take `input_ids` and `attention_mask` and every tensor of the state by name, and give
`logits` and the new state under the same names with "new." in front. `step.onnx` takes one token of each row, which is
the cheapest way to decode; `prefill.onnx` takes as many as there are and gives the logits behind the last of each row.
A masked token (0) changes nothing, so rows of different lengths are fed together, padded anywhere. The weights are in
one file that both read. Which axes are free, and the state before the first token, stand beside the graphs in
`zoo_onnx.json` and `initial_state.safetensors` (one row; repeat it for more).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family, register_family
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.mapping import Entry
from zoo.convert.layouts.onnx_graph import WEIGHTS, check, need_packages, save, trace
from zoo.errors import ExportError
from zoo.mixers.base import State
from zoo.models.backbone import ZooPreTrainedModel
from zoo.models.depth import DepthState, routed_blocks
from zoo.models.state import state_cache
from zoo.ops.padding import right_align
from zoo.registry import list_mixers, mixer_class

FORMAT = 2
FREE = torch.export.Dim.AUTO
TRACED = 5  # rows in a trace: no size that models have, for sizes which are equal there are taken for one
logger = logging.getLogger(__name__)


@register_family
class Onnx(Family):
    """Any model that can be traced; read by onnxruntime and whatever else reads ONNX, not by this package."""

    layout = name = "onnx"
    about = "ONNX graphs: a prompt and a step with the state, or one pass"
    reads = False

    @property
    def mixers(self) -> tuple[str, ...]:  # type: ignore[override]
        """All of them."""
        return tuple(list_mixers())

    def recognises(self, checkpoint: Checkpoint) -> bool:
        return False

    def fields(self, checkpoint: Checkpoint) -> dict[str, Any]:
        raise NotImplementedError("graphs are not read")

    def entries(self, config: ZooConfig) -> Iterator[Entry]:
        return iter(())

    def config(self, config: ZooConfig) -> dict[str, Any]:
        return {"format": FORMAT, "task": config.task, "vocab_size": config.vocab_size}

    def write(self, model: Any, folder: Path, config: dict[str, Any], tokenizer: Any = None) -> None:
        need_packages()
        try:
            if config["task"] == "causal-lm" and model.base_model.is_causal:
                config |= export_steps(model, folder)
            else:
                config |= export_pass(model, folder)
        except ExportError:  # nothing stays that does not work
            for name in ("step.onnx", "prefill.onnx", "model.onnx", WEIGHTS, "initial_state.safetensors"):
                (folder / name).unlink(missing_ok=True)
            raise
        (folder / "zoo_onnx.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Step(nn.Module):
    """A model whose state is a flat list of tensors; `names` are "layer.name", in the order of the arguments."""

    def __init__(self, model: ZooPreTrainedModel, names: list[str], grows: dict[str, list[int]]) -> None:
        super().__init__()
        self.model, self.names, self.grows = model, names, grows

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Logits and the new state."""
        _alike(input_ids, attention_mask, *tensors)
        layers: dict[int, dict[str, Tensor]] = {}
        lengths: dict[int, Any] = {}
        for name, tensor in zip(self.names, tensors, strict=True):
            i, part = _split(name)
            layers.setdefault(i, {})[part] = tensor
            if self.grows[name]:
                lengths[i] = tensor.shape[self.grows[name][0]]
        base: Any = self.model.base_model
        cache: Any = state_cache(max(1 + max(layers), len(base.layers)))
        for i in range(len(cache.layers)):
            state = State(layers.get(i, {}), lengths.get(i, 1))
            routed = i < len(base.layers) and getattr(base.layers[i], "depth", None) is not None
            cache.layers[i].set(DepthState({}, state.length, state) if routed else state)
        out = self.run(input_ids, attention_mask, cache)
        states = [_tensors(layer.state) for layer in cache.layers]
        return out.logits, *(states[i][part] for i, part in map(_split, self.names))

    def run(self, input_ids: Tensor, attention_mask: Tensor, cache: Any) -> Any:
        """What the model makes of one token of each row."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)


class Prefill(Step):
    """Any number of tokens; the logits are those behind the last real token of each row."""

    def run(self, input_ids: Tensor, attention_mask: Tensor, cache: Any) -> Any:
        """What the model makes of the rows, whose padding is moved to the front."""
        order_BL = right_align(attention_mask.bool())
        input_ids, attention_mask = input_ids.gather(1, order_BL), attention_mask.gather(1, order_BL)
        model: Any = self.model
        return model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        )


class Pass(nn.Module):
    """The first output of a model, from its arguments in order."""

    def __init__(self, model: ZooPreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits or embeddings."""
        _alike(*tensors)
        return self.model(**dict(zip(self.names, tensors, strict=True)))[0]


def _alike(inputs: Tensor, *others: Tensor) -> None:
    """Tell the tracer that there are as many rows of everything, and as many places in the mask as tokens."""
    for i, tensor in enumerate(others):
        torch._check(tensor.shape[0] == inputs.shape[0])
        if i == 0 and tensor.dim() == 2:
            torch._check(tensor.shape[1] == inputs.shape[1])


def _split(name: str) -> tuple[int, str]:
    i, _, part = name.partition(".")
    return int(i), part


def _tensors(state: State) -> dict[str, Tensor]:
    return state.inner.tensors if isinstance(state, DepthState) else state.tensors


@torch.no_grad()
def export_steps(model: ZooPreTrainedModel, folder: Path) -> dict[str, Any]:
    """Write the graphs of a step and of a prompt, and `initial_state.safetensors`; returns what their user must know.

    A model whose prompts cannot be traced gets the graph of a step alone, and the reason is kept.
    """
    from safetensors.torch import save_file

    model = model.eval()
    state, grown = _states(model, TRACED, 3), _states(model, TRACED, 5)
    grows = {k: [d for d in range(1, t.dim()) if t.shape[d] != grown[k].shape[d]] for k, t in state.items()}
    start = _initial(model, state, grows)
    names, outputs = ["input_ids", "attention_mask", *state], ["logits", *(f"new.{name}" for name in state)]
    modules = {"step.onnx": Step(model, list(state), grows), "prefill.onnx": Prefill(model, list(state), grows)}

    def traced(name: str, length: int) -> Any:
        free = {0: FREE, 1: FREE} if length > 1 else {0: FREE}
        axes = (free, free, tuple({0: FREE, **dict.fromkeys(grows[name], FREE)} for name in state))
        return trace(modules[name], (*_tokens(model, TRACED, length), *state.values()), axes, names, outputs)

    def tried(name: str, *sizes: tuple[int, int]) -> None:
        begins = [[t.repeat(rows, *[1] * (t.dim() - 1)) for t in start.values()] for rows, _ in sizes]
        examples = [(*_tokens(model, *size), *begin) for size, begin in zip(sizes, begins, strict=True)]
        later = [t.contiguous() for t in _states(model, 3, 7).values()]
        check(folder / name, modules[name], names, [*examples, (*_tokens(model, 3, sizes[0][1]), *later)])

    why, programs = None, {"step.onnx": traced("step.onnx", 1)}
    try:
        _refuse_whole_choices(model)
        programs["prefill.onnx"] = traced("prefill.onnx", 11)
    except ExportError as error:
        why = str(error)
    save(programs, folder)
    save_file(start, folder / "initial_state.safetensors")
    tried("step.onnx", (1, 1))
    try:
        if why is None:
            tried("prefill.onnx", (1, 2), (2, _longer(model, 150)))
    except ExportError as error:
        (folder / "prefill.onnx").unlink()
        why = str(error)
    told = {"graph": "step.onnx", "prefill": "prefill.onnx" if why is None else None, "inputs": names, "grows": grows}
    if why is not None:
        logger.warning("no graph for whole prompts, feed them token by token: %s", why)
        told["why_no_prefill"] = why
    return {**told, "initial_state": "initial_state.safetensors"}


def _refuse_whole_choices(model: Any) -> None:
    for i, layer in enumerate(model.config.spec.layers):
        cls: Any = mixer_class(layer.mixer.name)
        if cls.traits.splits != "anywhere":
            raise ExportError(
                f"who sees whom in layers.{i} ({layer.mixer.name}) depends on the whole prompt, not on a state; "
                "step.onnx takes it token by token, as this model decodes in torch"
            )


def _tokens(model: ZooPreTrainedModel, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids, and a mask that hides some of them in every second row (all other rows are whole)."""
    ids_BL = (7 * torch.arange(rows * length).view(rows, length) + 3) % model.config.vocab_size
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1::2, : length // 3] = 0
    return ids_BL.to(model.device), mask_BL.to(model.device)


def _longer(model: ZooPreTrainedModel, length: int) -> int:
    """`length`, or less where the model has fewer positions (half of them, for there may be a state already)."""
    config: Any = model.config
    limits = [getattr(layer.mixer, "max_length", None) for layer in config.spec.layers]
    limits += [config.max_position_embeddings if config.positions == "learned" else None]
    return min([length, *(n for n in limits if n is not None)])


def _states(model: ZooPreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    """The state behind `length` tokens of some rows; one of them is masked, so that all parts of it are there."""
    ids_BL, mask_BL = _tokens(model, rows, length)
    mask_BL[0, 0] = 0
    for block in routed_blocks(model):
        block.as_padding = True
    try:
        cache: Any = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=True).past_key_values
    finally:
        for block in routed_blocks(model):
            block.as_padding = False
    return {
        f"{i}.{name}": t.clone() for i, layer in enumerate(cache.layers) for name, t in _tensors(layer.state).items()
    }


def _initial(model: ZooPreTrainedModel, like: dict[str, Tensor], grows: dict[str, list[int]]) -> dict[str, Tensor]:
    """The state before the first token, of one row.

    Where meta tokens come before it, or windows are full by then, that is the state behind tokens of padding.
    """
    found: dict[str, Tensor] = {}
    backbone: Any = model.base_model
    for i, block in enumerate(backbone.layers):
        state = block.init_state(1, device=model.device, dtype=model.dtype)
        found |= {f"{i}.{name}": tensor for name, tensor in _tensors(state).items()}
    for name, tensor in like.items():  # masks and counts, which come with the first padding
        shape = [0 if d in grows[name] else n for d, n in enumerate(tensor.shape)]
        found.setdefault(name, torch.zeros(1, *shape[1:], dtype=tensor.dtype, device=tensor.device))
    if model.config.meta_tokens or any(not _fits(found[n], t, grows[n]) for n, t in like.items()):
        nothing_BL = torch.zeros(1, 3, dtype=torch.long, device=model.device)
        cache: Any = model(input_ids=nothing_BL, attention_mask=nothing_BL, use_cache=True).past_key_values
        found = {f"{i}.{n}": t for i, layer in enumerate(cache.layers) for n, t in _tensors(layer.state).items()}
    for name, tensor in like.items():
        if not _fits(found[name], tensor, grows[name]):
            raise ExportError(
                f"the state {name} starts as {tuple(found[name].shape)} and becomes {(1, *tensor.shape[1:])} while the "
                "model runs; a graph needs one shape from the first token on. Keep this model in torch"
            )
    return {name: found[name].contiguous() for name in like}


def _fits(start: Tensor, later: Tensor, grows: list[int]) -> bool:
    """Whether a state of one row has the sizes that it has later, but for those that grow."""
    return all(d in grows or a == b for d, (a, b) in enumerate(zip(start.shape, later.shape, strict=True)) if d)


@torch.no_grad()
def export_pass(model: ZooPreTrainedModel, folder: Path) -> dict[str, Any]:
    """Write `model.onnx`, a whole pass with free batch size and length (images: free batch size)."""
    model = model.eval()
    image = model.config.spec.image

    def inputs(rows: int, length: int) -> tuple[Tensor, ...]:
        if image is None:
            return _tokens(model, rows, length)
        pixels = torch.linspace(-1, 1, rows * image.channels * image.image_size**2, device=model.device)
        return (pixels.view(rows, image.channels, image.image_size, -1).to(model.dtype),)

    names = ["pixel_values"] if image is not None else ["input_ids", "attention_mask"]
    axes = ({0: FREE},) if image is not None else ({0: FREE, 1: FREE},) * 2
    module = Pass(model, names)
    longer = _longer(model, 150)
    # Long enough that there are several of whatever blocks and chunks there are: one of something is never free.
    example = inputs(TRACED, _longer(model, 301))
    save({"model.onnx": trace(module, example, (axes,), names, ["output"])}, folder)
    check(folder / "model.onnx", module, names, [inputs(3, 5), inputs(1, longer)])
    return {"graph": "model.onnx", "inputs": names}
