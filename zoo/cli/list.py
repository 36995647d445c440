"""`zoo list`: the models and mixers there are."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from zoo.cli.common import JsonOption, print_json, print_table

MIXER_COLUMNS = {"mixer": "name", "direction": "direction", "state": "state", "about": "about"}
LAYOUT_COLUMNS = {"layout": "layout", "family": "family", "direction": "direction", "about": "about"}
MODEL_COLUMNS = {
    "model": "name", "task": "task", "layers": "layers", "width": "hidden_size", "parameters": "parameters",
    "state": "state", "mixers": "mixers", "weights": "pretrained",
}  # fmt: skip
PRETRAINED_COLUMNS = {
    "model": "name", "repository": "repo", "licence": "licence", "parameters": "parameters", "layout": "layout",
}  # fmt: skip


def list_(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="A name, a part of one, or wildcards: 'mamba2-*'.")
    ] = "*",
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="Only models of this task, such as causal-lm.")
    ] = None,
    mixer: Annotated[str | None, typer.Option(metavar="MIXER", help="Only models with a layer of this mixer.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only models with published weights.")] = False,
    mixers: Annotated[bool, typer.Option("--mixers", help="List the sequence mixers instead of the models.")] = False,
    layouts: Annotated[bool, typer.Option("--layouts", help="List whose checkpoints come in and go out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The models that can be created by name, or with [bold]--mixers[/bold] what attention can be replaced with."""
    wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    if layouts:
        keys, rows = LAYOUT_COLUMNS, _layouts(wild)
    elif mixers:
        keys, rows = MIXER_COLUMNS, _mixers(wild)
    elif pretrained:
        keys, rows = PRETRAINED_COLUMNS, _pretrained(wild, task, mixer)
    else:
        keys, rows = MODEL_COLUMNS, _models(wild, task, mixer)
    if not rows:
        _say_what_is_near(pattern, mixers, layouts)
    if as_json:
        print_json(rows)
        return
    shown = [[_shown(key, row[key]) for key in keys.values()] for row in rows]
    print_table(list(keys), shown, right=("layers", "width", "parameters"))


def _shown(key: str, value: Any) -> Any:
    from zoo.models.costs import short_bytes, short_count

    if key == "parameters":
        return short_count(value)
    if key == "pretrained":
        return ", ".join(value) or "none"
    if key == "state" and not isinstance(value, str):
        parts = [(value or {}).get("constant", 0), (value or {}).get("per_token", 0)]
        words = [f"{short_bytes(n)}{end}" for n, end in zip(parts, ("", " a token"), strict=True) if n]
        return " + ".join(words) or "none"
    return value


def _layouts(pattern: str) -> list[dict[str, Any]]:
    import fnmatch

    from zoo.convert.layouts import list_layouts
    from zoo.convert.layouts.family import families

    directions = list_layouts()
    return [
        {"layout": f.layout, "family": f.name, "direction": directions[f.layout][f.name], "about": f.about}
        for f in families()
        if fnmatch.fnmatch(f.layout, pattern) or fnmatch.fnmatch(f.name, pattern)
    ]


def _checked(task: str | None, mixer: str | None) -> dict[str, Any]:
    """The filters of `list_models`; raises where one names nothing."""
    from typing import get_args

    from zoo.config import Task
    from zoo.errors import unknown_name
    from zoo.registry import mixer_class

    if task is not None and task not in get_args(Task):
        raise unknown_name("task", task, get_args(Task))
    if mixer is not None:
        mixer_class(mixer)
    return {"task": task, "mixer": mixer}


def _pretrained(pattern: str, task: str | None, mixer: str | None) -> list[dict[str, Any]]:
    from zoo.registry import list_models, model_entry

    rows = []
    for name in list_models(pattern, pretrained=True, **_checked(task, mixer)):
        entry = model_entry(name)
        rows.append({"name": name, "family": entry.family, **entry.tags[name[len(entry.name) + 1 :]].plain()})
    return rows


def _models(pattern: str, task: str | None, mixer: str | None) -> list[dict[str, Any]]:
    from zoo.registry import list_models, model_config, model_entry

    rows = []
    for name in list_models(pattern, **_checked(task, mixer)):
        entry = model_entry(name)
        config = model_config(entry.name)
        counts = Counter(config.mixer_names)
        rows.append(
            {
                "name": name,
                "family": entry.family,
                "task": config.task,
                "layers": config.num_hidden_layers,
                "hidden_size": config.hidden_size,
                "vocab_size": config.vocab_size,
                **_costs(config),
                "mixers": next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {m}" for m, n in counts.items()),
                "about": entry.about,
                "paper": entry.paper,
                "pretrained": list(entry.tags),
            }
        )
    return rows


def _costs(config: Any) -> dict[str, Any]:
    """Parameters and float32 state of a model, counted on one layer of each kind."""
    from dataclasses import asdict

    from zoo.models.costs import size_of

    parameters, state = size_of(config)
    return {"parameters": parameters, "state": None if state is None else asdict(state)}


def _mixers(pattern: str) -> list[dict[str, Any]]:
    from zoo.registry import list_mixers, mixer_class

    rows = []
    for name in list_mixers(pattern):
        cls: Any = mixer_class(name)
        module_doc = (__import__(cls.__module__, fromlist=["x"]).__doc__ or cls.__doc__ or "").strip()
        traits = cls.traits
        directions = [w for w, has in (("causal", traits.causal), ("two-sided", traits.bidirectional)) if has]
        rows.append(
            {
                "name": name,
                "direction": ", ".join(directions),
                "state": traits.state,
                "exact": traits.exact,
                "about": " ".join(module_doc.split("\n\n")[0].split()),
            }
        )
    return rows


def _say_what_is_near(pattern: str, mixers: bool, layouts: bool) -> None:
    from zoo.convert.layouts import list_layouts
    from zoo.errors import unknown_name
    from zoo.registry import list_mixers, list_models

    if not any(c in pattern for c in "*?["):
        kind = "layout" if layouts else "mixer" if mixers else "model"
        known = list(list_layouts()) if layouts else list_mixers() if mixers else list_models()
        if not any(pattern in name for name in known):
            raise unknown_name(kind, pattern, known)
