"""Rotary positions as transformers' configs say them: `rope_parameters`, before `rope_theta` and `rope_scaling`.

Read from and written to plain JSON values, for families that have no teacher adapter.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from zoo.errors import CheckpointError, ConfigError, ExportError
from zoo.ops.rotary import RotaryConfig


def read_rope(c: dict[str, Any], head_dim: int, *, theta: float = 10000.0, interleaved: bool = False) -> RotaryConfig:
    """The rotary positions of a config, for heads of size `head_dim`; `theta` where it names none.

    Raises CheckpointError for a scaling that is not known, or values that it cannot have.
    """
    found = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in found.values()):
        raise CheckpointError(f"rope_parameters is {found!r}: one set for each kind of layer is not known")
    found.setdefault("rope_theta", c.get("rope_theta") or theta)
    options = {key: c[key] for key in ("max_position_embeddings", "partial_rotary_factor") if key in c}
    try:
        return RotaryConfig.from_transformers(SimpleNamespace(rope_parameters=found, **options), head_dim, interleaved)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(f"rope_parameters.{where}: {problem['msg']}, got {problem['input']!r}") from None
    except ConfigError as error:
        raise CheckpointError(f"rope_parameters: {error}") from None


def write_rope(rotary: RotaryConfig | None, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of rotary positions. Raises ExportError where there are none."""
    if rotary is None:
        raise ExportError("a layer has no rotary positions, which the class always has")
    return rotary.to_transformers(head_dim)
