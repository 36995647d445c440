"""What a conversion did, layer by layer, in numbers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

COLUMNS = ("layer", "mixer", "copied", "new", "missed", "restored", "error before", "error after", "refit")


def need_of_attention(missed: float, restored: float) -> float:
    """The number by which layers rank; where restoring gains nothing, a millionth of what is missed."""
    return missed * max(restored, 1e-6)


@dataclass(kw_only=True)
class LayerReport:
    """One layer of a student.

    kept: whether it still is the teacher's. copied, new: names of the mixer's parameters that are the teacher's, and
    of those that attention does not have; with the numbers in them. missed: distance from the teacher when only this
    layer is converted. restored: how much closer the fully converted student comes when only this layer is attention
    again. Both where layers were chosen by a scan. error_before, error_after: squared error of the mixer's output,
    relative to the teacher's, on the student's own inputs, before and after its output projection was refitted.
    refit: "none", "scale", "plain" or "weighted". tried: the whole student's distance with each refit that was tried,
    and with none.
    """

    layer: int
    mixer: str
    kept: bool
    copied: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    copied_parameters: int = 0
    new_parameters: int = 0
    missed: float | None = None
    restored: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    refit: str = "none"
    tried: dict[str, float] = field(default_factory=dict)

    @property
    def scan(self) -> float | None:
        """What layers are ranked by where a scan chooses: how much this one needs to keep attention."""
        return None if self.missed is None or self.restored is None else need_of_attention(self.missed, self.restored)


@dataclass(kw_only=True)
class ConversionReport:
    """What `convert` did.

    measure: what the distances are: "KL, nats/token" for models with a vocabulary. distance, distance_before: of the
    student from the teacher, and before calibration; on `held_out_tokens` that no refit was fitted to, though it was
    chosen on them: an estimate for the user, not a score. agreement: share of positions with the teacher's first
    choice. All None where no tokens were run. data: where the tokens came from. ffn: how MLPs became experts, if they
    did; `distance` is then of the whole student on all tokens, and `distance_before` before that step.
    """

    teacher: str
    family: str
    task: str
    mixer: str | None
    keep: str
    kept_layers: list[int]
    layers: list[LayerReport]
    parameters: int
    teacher_parameters: int
    ffn: str | None = None
    max_logit_error: float | None = None
    measure: str = ""
    distance_before: float | None = None
    distance: float | None = None
    agreement: float | None = None
    data: str = "none"
    tokens: int = 0
    held_out_tokens: int = 0
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    def table(self) -> list[dict[str, Any]]:
        """One dictionary a layer, for tables and JSON."""
        return [asdict(layer) for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; what is not finite becomes None."""
        return _finite(asdict(self))

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        rows = [COLUMNS, *(self._row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.summary(), "", *lines])

    def summary(self) -> str:
        """The whole student in a few lines."""
        if self.mixer is None and self.ffn is None:
            error = "" if self.max_logit_error is None else f", logits within {self.max_logit_error:.1e}"
            return f"{self.teacher}: imported exactly{error}; {len(self.layers)} layers, {self.parameters:,} parameters"
        converted = len(self.layers) - len(self.kept_layers)
        mixers = f"{converted} of {len(self.layers)} layers converted to {self.mixer}, keep={self.keep}"
        done = [mixers] * (self.mixer is not None) + [f"MLPs to experts by {self.ffn}"] * (self.ffn is not None)
        sizes = f"{self.parameters:,} parameters (teacher {self.teacher_parameters:,})"
        lines = [f"{self.teacher}: {', '.join(done)}; {sizes}"]
        if self.distance is not None:
            tokens = f"{self.held_out_tokens:,} held-out tokens of {self.data}"
            if self.ffn is not None:
                tokens = f"{self.tokens:,} tokens of {self.data}"
            before = ""
            if self.distance_before is not None and self.distance_before != self.distance:
                step = "calibration" if self.ffn is None else "that step"
                before = f" (before {step} {self.distance_before:.4g})"
            same = "" if self.agreement is None else f", same first choice {100 * self.agreement:.1f} %"
            lines.append(f"distance from the teacher: {self.distance:.4g} {self.measure}{before}{same}, on {tokens}")
        return "\n".join(lines)

    @staticmethod
    def _row(layer: LayerReport) -> tuple[str, ...]:
        def number(value: float | None) -> str:
            return "" if value is None else f"{value:.4g}"

        scans = (number(layer.missed), number(layer.restored))
        if layer.kept:
            return (str(layer.layer), f"{layer.mixer} (kept)", "", "", *scans, "", "", "")
        counts = (f"{layer.copied_parameters:,}", f"{layer.new_parameters:,}")
        errors = (number(layer.error_before), number(layer.error_after))
        return (str(layer.layer), layer.mixer, *counts, *scans, *errors, layer.refit)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
