"""Checkpoints that somebody else's class writes: small, random weights, saved the way that class saves them.

One file a family. Each peer is tried by tests/convert/layouts/test_peers.py (in, out, damaged) and its kind of
checkpoint stands behind the pretrained tags in tests/hub.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """How to make one checkpoint and what it must compute.

    save: writes a checkpoint into an empty folder and returns the original model in eval mode (or whatever `logits`
    takes). logits: the original's answer to `inputs`. load: an exported folder in the original's class, returned with
    the names that were missing or not expected; None where the class is not installed or the layout is only read.
    file: the checkpoint where it is a file in the folder and not the folder. greedy: whether it generates.
    package: what must be installed to make it. tolerance: relative, of the logits. folds: constants that stand beside
    the weights are multiplied into them, so that what is written has other tensors and computes the same.
    """

    layout: str
    family: str
    save: Callable[[Path], Any]
    logits: Callable[[Any, dict[str, Tensor]], Tensor]
    inputs: Callable[[], dict[str, Tensor]]
    load: Callable[[Path], tuple[Any, list[str]]] | None = None
    label: str = ""
    file: str | None = None
    greedy: bool = True
    package: str | None = None
    tolerance: float = 1e-4
    folds: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join(part for part in (self.layout, self.family, self.label) if part)


PEERS: list[Peer] = []


def peer(made: Peer) -> Peer:
    """Add to the list."""
    PEERS.append(made)
    return made


def tokens(vocab_size: int, length: int = 21) -> Callable[[], dict[str, Tensor]]:
    """Two rows of random tokens."""
    return lambda: {"input_ids": torch.randint(0, vocab_size, (2, length))}


def random_weights(model: Any, std: float = 0.05) -> Any:
    """The model in eval mode with every parameter moved, so that none is at a value that hides a mistake."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(std * torch.randn_like(p))
    return model.eval()


def transformers_peer(
    family: str, config_class: str, model_class: str, *, layout: str = "transformers", prepare: Any = None,
    label: str = "", greedy: bool = True, inputs: Any = None, output: str = "logits", std: float = 0.05,
    options: dict[str, Any] | None = None, forward: Any = None, folds: bool = False, saved: Any = None,
    **sizes: Any,
) -> Peer:  # fmt: skip
    """A class of transformers by its names. prepare(model), saved(folder): called before and after
    saving. forward(model, inputs): its logits,
    where the class needs more than the inputs of ours."""

    def save(folder: Path) -> Any:
        import transformers

        config = getattr(transformers, config_class)(**sizes)
        model = random_weights(getattr(transformers, model_class)(config), std)
        if prepare is not None:
            prepare(model)
        model.save_pretrained(folder, **(options or {}))
        if saved is not None:
            saved(folder)
        return model

    def load(folder: Path) -> tuple[Any, list[str]]:
        import transformers

        model, info = getattr(transformers, model_class).from_pretrained(folder, output_loading_info=True)
        return model.eval(), [str(k) for key in ("missing_keys", "unexpected_keys") for k in info[key]]

    def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
        return model(**given)[output]

    made = inputs or tokens(sizes.get("vocab_size", 97))
    return peer(Peer(layout, family, save, forward or logits, made, load, label, greedy=greedy, folds=folds))


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
