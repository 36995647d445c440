"""Names of older files: what a tensor is called today, from what it was called when its file was written.

Declared by each family and applied only to names that have no place as they are, so that a file of today is read as
it stands. Three things happened to files that are published:

    older      names that were changed, such as `LayerNorm.gamma` (BERT of 2018), now `LayerNorm.weight`
    root       a backbone saved by itself has no `bert.` before its names; or has one, where the class has none
    aliases    of two names of one tensor (`cls.predictions.bias`, `cls.predictions.decoder.bias`) either is stored
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from zoo.config import ZooConfig
from zoo.convert.layouts.family import Family
from zoo.convert.layouts.files import Checkpoint
from zoo.errors import CheckpointError

_HEADS = {  # what names of a task's head begin with
    "masked-lm": ("cls.predictions.", "lm_head.", "predictions.", "vocab_projector."),
    "sequence-classification": ("classifier.", "pre_classifier."),
}
LAYER_NORM = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def in_todays_names(family: Family, config: ZooConfig, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose tensors have the names of the family's entries, wherever one of theirs is an older name.

    Raises CheckpointError where two tensors of a file are the same one under an older and a newer name.
    """
    aliases = family.aliases(config)
    places = {name for entry in family.entries_of(config, checkpoint) for name in entry.theirs} | set(aliases)
    names = {name: _today(name, places, family) for name in checkpoint.shapes if name not in places}
    names = {old: new for old, new in names.items() if new != old}
    if names:
        checkpoint = checkpoint.renamed(names)
    swapped = {a: b for a, b in aliases.items() if a in checkpoint.shapes and b not in checkpoint.shapes}
    return checkpoint.renamed(swapped) if swapped else checkpoint


def _today(name: str, places: set[str], family: Family) -> str:
    new = name
    for pattern, replacement in family.older:
        new = re.sub(pattern, replacement, new)
    other = new.removeprefix(family.root) if new.startswith(family.root) else family.root + new
    return next((n for n in (new, other) if n in places), name)


def class_of(checkpoint: Checkpoint, classes: Mapping[str, str], read_as: Mapping[str, str] | None = None) -> str:
    """Which class of a family a checkpoint is of, by its config; where an older one does not say, by its head.

    Args:
        classes: the classes and their tasks; a backbone without a head has the task `sentence-embedding`.
        read_as: other classes -> the one of `classes` that reads them, such as one with a second pretraining task.

    Raises CheckpointError for a class that is neither.
    """
    named = (checkpoint.config.get("architectures") or [None])[0]
    if named is not None:
        named = (read_as or {}).get(named, named)
        if named not in classes:
            listing = ", ".join(classes)
            raise CheckpointError(f"{checkpoint.path}: architectures.0 is {named!r}; supported: {listing}")
        return named
    bare = [name for name, task in classes.items() if task == "sentence-embedding" or len(classes) == 1]
    for name, task in classes.items():
        if any(tensor.startswith(_HEADS.get(task, ())) for tensor in checkpoint.shapes):
            return name
    if not bare:
        raise CheckpointError(f"{checkpoint.path}: config: architectures is missing; one of {', '.join(classes)}")
    return bare[0]
