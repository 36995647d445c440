"""`zoo show`: what a model is made of, without making it: its layers, parameters, state bytes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.common import JsonOption, print_json, print_table

if TYPE_CHECKING:
    from zoo.config import ZooConfig

LENGTHS = (512, 2048, 8192)


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A registered name, or the folder of a saved model.")],
    as_json: JsonOption = False,
) -> None:
    """Layers, parameters and state bytes of a model. Nothing is downloaded and no weights are made."""
    info = describe(name)
    if as_json:
        print_json(info)
        return
    print(info["name"] + (f"  ({info['about']})" if info["about"] else ""))
    if info["paper"]:
        print(info["paper"])
    print()
    facts = [
        ("task", info["task"]),
        ("parameters", f"{info['parameters']:,}"),
        ("without embeddings", f"{info['parameters_without_embeddings']:,}"),
        ("linear layers, FLOPs a token", f"{info['linear_flops_per_token']:,}"),
        ("vocabulary", f"{info['vocab_size']:,}"),
        ("width", f"{info['hidden_size']:,}"),
        ("block", f"{info['block']}, {info['norm']}"),
        ("positions", info["positions"]),
    ]
    if info["origin"]:
        facts.insert(0, ("made from", info["origin"]))
    for length, size in info["state_bytes"].items():
        facts.append((f"state bytes at {int(length):,} tokens", "none" if size is None else f"{size:,}"))
    print_table((), facts)
    print()
    rows = [(g["layers"], g["mixer"], g["options"], g["ffn"], f"{g['parameters']:,}") for g in info["layers"]]
    print_table(("layer", "mixer", "options", "channel mixer", "parameters each"), rows, right=("layer",))


def describe(name: str) -> dict[str, Any]:
    """The facts about a model, by registered name or folder. Sizes are counted on weights that take no memory."""
    import torch
    from torch import nn

    from zoo.models.heads import TASK_CLASSES
    from zoo.models.shared import repeated_blocks

    entry, config = _find(name)
    with torch.device("meta"):
        model = TASK_CLASSES[config.task](config)
    embeddings = sum(p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    output = getattr(model, "lm_head", None)
    if output is not None and not config.tie_word_embeddings:
        embeddings += output.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    runs = itertools.chain(model.modules(), *(block.modules() for block in repeated_blocks(model)))
    linear = sum(2 * m.weight.numel() for m in runs if isinstance(m, nn.Linear))
    return {
        "name": name,
        "about": entry.about if entry else "",
        "paper": entry.paper if entry else "",
        "origin": str((config.origin or {}).get("source", "")),
        "task": config.task,
        "parameters": total,
        "parameters_without_embeddings": total - embeddings,
        "linear_flops_per_token": linear,
        **{key: getattr(config, key) for key in ("vocab_size", "hidden_size", "block", "norm")},
        "positions": _positions(config),
        "state_bytes": {str(length): state_bytes(model, length) for length in LENGTHS},
        "layers": _layers(model, config),
    }


def state_bytes(model: Any, length: int) -> int | None:
    """Bytes of the float32 state of one sequence after `length` tokens; None where there is none or it is too long."""
    config = model.config
    learned = config.positions == "learned"
    if not model.model.is_causal or (learned and length > config.max_position_embeddings):
        return None
    total = 8 if learned else 0  # the number of tokens seen
    by_kind: dict[str, int] = {}
    for block in model.model.layers:
        kind = repr(block.mixer.config)
        if kind not in by_kind:
            by_kind[kind] = _mixer_state_bytes(block.mixer, length)
        total += by_kind[kind]
    return total


def _mixer_state_bytes(mixer: Any, length: int) -> int:
    if mixer.traits.state in ("constant", "none"):
        return mixer.init_state(1).nbytes
    from torch._subclasses.fake_tensor import FakeTensorMode

    from zoo.convert.baseline import mixer_state_bytes
    from zoo.mixers.qkv import _shared_tables

    if mixer.traits.state == "window":  # full long before that
        length = min(length, 2 * _largest_window(mixer.config.plain()) + 64)
    # Tensors with a shape and a device but no memory. (Not "meta" ones: autocast does not know that device.)
    _shared_tables.cache_clear()  # of tensors that are real, and afterwards of those that are not
    try:
        with FakeTensorMode():
            return mixer_state_bytes(type(mixer)(mixer.config, mixer.width), length)
    finally:
        _shared_tables.cache_clear()


def _largest_window(options: Any) -> int:
    if not isinstance(options, dict):
        return 0
    return max([options.get("window") or 0, *map(_largest_window, options.values())])


def _find(name: str) -> tuple[Any, ZooConfig]:
    from zoo.models.create import read_config
    from zoo.registry import model_config, model_entry

    if Path(name).is_dir() or "/" in name:
        return None, read_config(name)
    entry = model_entry(name)
    return entry, model_config(entry.name)


def _positions(config: ZooConfig) -> str:
    if config.positions == "learned":
        return f"learned, up to {config.max_position_embeddings:,}"
    rotary = [layer["mixer"].get("rotary") for layer in config.layers]
    return "rotary" if all(rotary) else "rotary in some layers" if any(rotary) else "none"


def _layers(model: Any, config: ZooConfig) -> list[dict[str, Any]]:
    """One entry for each run of equal layers."""
    blocks = enumerate(zip(config.spec.layers, model.model.layers, strict=True))
    groups = []
    for spec, members in itertools.groupby(blocks, key=lambda item: item[1][0]):
        run = list(members)
        first, last = run[0][0], run[-1][0]
        groups.append(
            {
                "layers": str(first) if first == last else f"{first}-{last}",
                "mixer": spec.mixer.name,
                "options": _options(spec.mixer) + ("" if spec.same_as is None else f" same_as={spec.same_as}"),
                "ffn": "none" if spec.ffn is None else f"{spec.ffn.name} {spec.ffn.hidden_size}",
                "parameters": 0 if spec.same_as is not None else sum(p.numel() for p in run[0][1][1].parameters()),
            }
        )
    return groups


def _options(mixer: Any) -> str:
    """The options of a mixer that differ from their defaults, in short."""
    fields = type(mixer).model_fields
    shown = []
    for key, value in mixer.plain().items():
        default = fields[key].default
        default = default.model_dump(mode="json") if hasattr(default, "model_dump") else default
        if key != "name" and value != default:
            shown.append(f"{key}={_short(value)}")
    return " ".join(shown)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        inside = " ".join(f"{k}={_short(v)}" for k, v in value.items() if v is not None and v is not False)
        return f"({inside})"
    return f"{value:g}" if isinstance(value, float) else str(value)
