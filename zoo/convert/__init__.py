"""From a pretrained Transformer to an efficient model.

`zoo.convert` is this package and the function `zoo.convert.api.convert` at once, so that `zoo.convert(...)` works
whichever of the two was imported first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from zoo.convert.api import convert

        return convert(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
