"""Layers written as a pattern, and expanded once: see the example in `zoo.config`."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field

from zoo.config import MAX_LAYERS, Options
from zoo.errors import ConfigError, did_you_mean


class Pattern(Options):
    """A compact list of layers; see the module docstring."""

    pattern: str
    num_hidden_layers: int = Field(ge=1, le=MAX_LAYERS)
    mixers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    defaults: dict[str, Any] = Field(default_factory=dict)
    at: dict[str, dict[str, Any]] = Field(default_factory=dict)  # mixer options of single layers, such as "0 15 31"
    ffn: dict[str, Any] | None = None
    depth: dict[str, Any] | None = None  # options of blocks that only some tokens take, and `every`: how many layers
    blocks: dict[str, str] = Field(default_factory=dict)  # by mixer, the order of norms where it is not the model's
    memory: dict[str, Any] | None = None  # options of a memory block, `layers` that read it, `blocks`: how many in turn
    ffn_pattern: str | None = None  # with several channel mixers: "gated_mlp moe*27", and `ffns` in place of `ffn`
    ffns: dict[str, dict[str, Any]] = Field(default_factory=dict)


def expand_pattern(values: dict[str, Any]) -> list[dict[str, Any]]:
    """`{"pattern": "a*2 b", "num_hidden_layers": 5, ...}` -> a list of layers a, a, b, a, a.

    Layers with the same label share their weights: with "a*2 b@x" every b has those of the first b.
    """
    pattern = Pattern.parse(values, "layers")
    words, count = _words(pattern.pattern, "pattern", pattern.mixers, "mixers"), pattern.num_hidden_layers
    ffns: list[dict[str, Any] | None] = [pattern.ffn]
    if (pattern.ffns and pattern.ffn_pattern is None) or (pattern.ffn and pattern.ffn_pattern is not None):
        raise ConfigError("layers.ffns: ffn_pattern and ffns go together, in place of ffn")
    if pattern.ffn_pattern is not None:
        names = _words(pattern.ffn_pattern, "ffn_pattern", pattern.ffns, "ffns")
        ffns = [{"name": name, **pattern.ffns.get(name, {})} for name, _ in names]
    depth = {"every": 2, **(pattern.depth or {})}
    if not isinstance(every := depth.pop("every"), int) or not 1 <= every <= MAX_LAYERS:
        raise ConfigError(f"layers.depth.every: must be a number of layers, got {every!r}")
    if unused := set(pattern.blocks) - (there := {name for name, _ in words}):
        raise ConfigError(f"layers.blocks.{min(unused)}: not in the pattern{did_you_mean(min(unused), there)}")
    memory = dict(pattern.memory or {})
    readers = _memories(memory, count)
    single = _single_layers(pattern.at)
    layers: list[dict[str, Any]] = []
    first: dict[str, int] = {}
    for i in range(count):
        (name, label), ffn = words[i % len(words)], ffns[i % len(ffns)]
        layers.append(
            {
                "mixer": {"name": name, **pattern.defaults, **pattern.mixers.get(name, {}), **single.get(i, {})},
                "ffn": None if ffn is None else dict(ffn),
            }
        )
        if pattern.depth is not None and i % every == every - 1:
            layers[i]["depth"] = dict(depth)
        if name in pattern.blocks:
            layers[i]["block"] = pattern.blocks[name]
        if i in readers:
            layers[i]["memory"] = {**memory, **readers[i]}
        if label is not None and first.setdefault(label, i) != i:
            layers[i]["same_as"] = first[label]
    return layers


def _words(pattern: str, key: str, options: dict[str, Any], options_key: str) -> list[tuple[str, str | None]]:
    """The names of a pattern with their labels, repeats written out; `options` may only be of names that are in it."""
    words: list[tuple[str, str | None]] = []
    for word in re.split(r"[\s,]+", pattern.strip()):
        match = re.fullmatch(r"([A-Za-z_][\w-]*)(?:@(\w+))?(?:\*(\d{1,4}))?", word)
        if not match or (match[2] and key != "pattern"):  # labels are of whole layers
            raise ConfigError(
                f"layers.{key}: cannot read {word!r}; write names with repeats, such as 'mamba2*3 attention'"
            )
        words += [(match[1], match[2])] * int(match[3] or 1)
    if not words:
        raise ConfigError(f"layers.{key}: no layer in it")
    names = {name for name, _ in words}
    if unused := set(options) - names:
        raise ConfigError(f"layers.{options_key}.{min(unused)}: not in the pattern{did_you_mean(min(unused), names)}")
    return words


def _single_layers(at: dict[str, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Mixer options by layer, of keys that are numbers of layers. Layers that the model does not have are left out."""
    options: dict[int, dict[str, Any]] = {}
    for key, values in at.items():
        if not re.fullmatch(r"\d+( \d+)*", key):
            raise ConfigError(f"layers.at: cannot read {key!r}; write numbers of layers, such as '0 15 31'")
        for i in map(int, key.split()):
            options[i] = {**options.get(i, {}), **values}
    return options


def _memories(memory: dict[str, Any], count: int) -> dict[int, dict[str, Any]]:
    """Which of `count` layers read a memory block, and whose; takes `layers` and `blocks` out of the options."""
    readers, blocks = memory.pop("layers", []), memory.pop("blocks", 1)
    if not isinstance(readers, list) or any(not isinstance(i, int) or i < 0 for i in readers):
        raise ConfigError(f"layers.memory.layers: must be indices of layers, got {readers!r}")
    if not isinstance(blocks, int) or blocks < 1:
        raise ConfigError(f"layers.memory.blocks: must be a number of memory blocks, got {blocks!r}")
    return {i: {} if j < blocks else {"same_as": readers[j % blocks]} for j, i in enumerate(readers) if i < count}
