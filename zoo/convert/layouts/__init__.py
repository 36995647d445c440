"""Other people's checkpoints, in and out: one file a family, which knows its names, shapes and conventions.

family.py     the contract: a config read and written, and one list of entries for both directions
mapping.py    an entry: their tensors, ours, and how one becomes the other
names.py      names that tensors had in older files, and which class a file is of
files.py      tensors in safetensors and in torch's files, read one at a time, nothing in them trusted
loading.py    from entries to a model: on the meta device first, then tensor by tensor
api.py        `import_checkpoint`, `export_model`, and the guess which layout a checkpoint has
"""

from __future__ import annotations

import importlib
import pkgutil

from zoo.convert.layouts.api import Imported, export_model, guess_layout, import_checkpoint, list_layouts
from zoo.convert.layouts.family import Family, register_family

__all__ = [
    "Family",
    "Imported",
    "export_model",
    "guess_layout",
    "import_checkpoint",
    "list_layouts",
    "register_family",
]

for _module in pkgutil.iter_modules(__path__):  # each file of a family registers itself
    importlib.import_module(f"{__name__}.{_module.name}")
