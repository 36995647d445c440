"""zoo: turn a pretrained Transformer into a cheaper model that still knows what it knew.

The public names are below; each is imported when it is first used, so that `import zoo` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "ZooConfig",
    "ZooError",
    "__version__",
    "backends",
    "card",
    "convert",
    "create_model",
    "distill",
    "list_ffns",
    "list_mixers",
    "list_models",
    "pull",
    "push",
    "register_ffn",
    "register_mixer",
    "register_model",
    "score",
]

_HOME = {
    "ZooConfig": "zoo.config",
    "ZooError": "zoo.errors",
    "backends": "zoo.ops.backends",
    "card": "zoo.train.card",
    "convert": "zoo.convert.api",
    "create_model": "zoo.models.create",
    "distill": "zoo.train.api",
    "list_ffns": "zoo.registry",
    "list_mixers": "zoo.registry",
    "list_models": "zoo.registry",
    "pull": "zoo.hub.pull",
    "push": "zoo.hub.push",
    "register_ffn": "zoo.registry",
    "register_mixer": "zoo.registry",
    "register_model": "zoo.registry",
    "score": "zoo.train.score",
}

if TYPE_CHECKING:
    from zoo.config import ZooConfig
    from zoo.convert.api import convert
    from zoo.errors import ZooError
    from zoo.hub.pull import pull
    from zoo.hub.push import push
    from zoo.models.create import create_model
    from zoo.ops.backends import backends
    from zoo.registry import list_ffns, list_mixers, list_models, register_ffn, register_mixer, register_model
    from zoo.train.api import distill
    from zoo.train.card import card
    from zoo.train.score import score


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
