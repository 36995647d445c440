"""`zoo show`: what a model is made of, without making it: its layers, parameters, FLOPs, state bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.common import JsonOption, print_json, print_table

if TYPE_CHECKING:
    from zoo.config import ZooConfig

LENGTHS = (512, 2048, 8192)


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A registered name, or the folder of a saved model.")],
    length: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, max=1 << 24, help="State and FLOPs at this length; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Layers, parameters, FLOPs and state bytes of a model. Nothing is downloaded and no weights are made."""
    info = describe(name, length or LENGTHS)
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
        *([("active, a token", f"{info['active_parameters']:,}")] * (info["active_parameters"] != info["parameters"])),
        ("without embeddings", f"{info['parameters_without_embeddings']:,}"),
        *([] if info["image"] else [("vocabulary", f"{info['vocab_size']:,}")]),
        ("width", f"{info['hidden_size']:,}"),
        ("block", f"{info['block']}, {info['norm']}"),
        ("positions", info["positions"]),
    ]
    if info["origin"]:
        facts.insert(0, ("made from", info["origin"]))
    if info["hub"]:
        facts.insert(0, ("from the Hub", info["hub"]))
    for at, size in info["state_bytes"].items():
        flops = info["flops_per_token"][at]
        facts.append((f"FLOPs a token at {int(at):,}", "not counted" if flops is None else f"{flops:,.0f}"))
        facts.append((f"state bytes at {int(at):,}", "none" if size is None else f"{size:,}"))
    print_table((), facts)
    print()
    rows = [(g["layers"], g["mixer"], g["options"], g["ffn"], f"{g['parameters']:,}") for g in info["layers"]]
    print_table(("layer", "mixer", "options", "channel mixer", "parameters each"), rows, right=("layer",))


def describe(name: str, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """The facts about a model, by registered name or folder. Sizes are counted on weights that take no memory."""
    from zoo.models.costs import active_parameters, empty_model, flops_per_token, parameter_counts, state_bytes

    entry, config = _find(name)
    model = empty_model(config)
    total, without = parameter_counts(model)
    return {
        "name": name,
        "about": entry.about if entry else "",
        "paper": entry.paper if entry else "",
        "origin": str((config.origin or {}).get("source", "")),
        "hub": "@".join((config.origin or {}).get("hub", {}).values()),
        "task": config.task,
        "parameters": total,
        "active_parameters": active_parameters(model),
        "parameters_without_embeddings": without,
        "flops_per_token": {str(length): flops_per_token(model, length) for length in lengths},
        **{key: getattr(config, key) for key in ("vocab_size", "hidden_size", "block", "norm")},
        "image": config.image,
        "positions": _positions(config),
        "state_bytes": {str(length): state_bytes(model, length) for length in lengths},
        "layers": _layers(model, config),
    }


def _find(name: str) -> tuple[Any, ZooConfig]:
    from zoo.models.create import read_config
    from zoo.registry import model_config, model_entry

    if Path(name).is_dir() or "/" in name:
        return None, read_config(name)
    entry = model_entry(name)
    return entry, model_config(entry.name)


def _positions(config: ZooConfig) -> str:
    if config.image is not None and config.image["positions"]:
        side = config.spec.image.grid  # type: ignore[union-attr]
        return f"learned, of {side} x {side} patches"
    if config.positions == "learned":
        return f"learned, up to {config.max_position_embeddings:,}"
    rotary = [_has_rotary(layer["mixer"]) for layer in config.layers]
    return "rotary" if all(rotary) else "rotary in some layers" if any(rotary) else "none"


def _has_rotary(options: dict[str, Any]) -> bool:
    """Whether a mixer, or a mixer inside it, turns its queries and keys."""
    return bool(options.get("rotary")) or any(_has_rotary(v) for v in options.values() if isinstance(v, dict))


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
                "options": _options(spec.mixer)
                + ("" if spec.same_as is None else f" same_as={spec.same_as}")
                + ("" if spec.memory is None else f" memory of {_owner(spec, first)}")
                + ("" if spec.depth is None else f" capacity={spec.depth.capacity:g}"),
                "ffn": "none" if spec.ffn is None else f"{spec.ffn.name} {spec.ffn.hidden_size}",
                "parameters": 0 if spec.same_as is not None else sum(p.numel() for p in run[0][1][1].parameters()),
            }
        )
    return groups


def _owner(spec: Any, layer: int) -> int:
    """The layer that holds the memory block which `layer` reads."""
    return layer if spec.memory.same_as is None else spec.memory.same_as


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
