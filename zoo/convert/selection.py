"""Which layers keep attention: a list, a rule, or a scan that changes one layer at a time.

What a layer is worth depends on what the others are, so it is asked from both ends: how far the teacher moves away
when only that layer is converted ("missed"), and how much closer the fully converted student comes when only that
layer is attention again ("restored"). Layers rank by the product. Either number alone can mislead: in SmolLM2-135M
with a window of 64, the early layers are missed most alone, but restoring them in a converted student gains nothing.
Six layers of 30, chosen on 2048 tokens of film reviews, without any training, KL on 2048 other tokens: none kept
0.152 (on the tokens of the choice), by "missed" 0.146, by "restored" 0.080, by the product 0.068, which are also the
six that a greedy search finds. Published KL-guided selections train a student for each layer; here nothing is
trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from zoo.convert.layerwise import Trace, fast_autocast, mixer_swapped, run_layers, track
from zoo.convert.report import need_of_attention
from zoo.convert.surgery import MixerSpec, attention_layers, make_mixer
from zoo.errors import ConversionError, did_you_mean
from zoo.mixers.base import AttentionStats
from zoo.models.backbone import ZooPreTrainedModel

FORMS = "'all', 'none', a list of layers, 'first:K', 'last:K', 'uniform:K', 'sensitivity:K' or 'sensitivity:K,rounds=R'"
KeepSpec = str | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Keep:
    """A parsed `keep`: `layers` that keep attention, or None where a scan is to choose `count` of them."""

    layers: tuple[int, ...] | None
    count: int
    rounds: int = 1


def parse_keep(spec: KeepSpec, layers: int | Sequence[int]) -> Keep:
    """Read which layers keep attention.

    Args:
        spec: ``"all"``, ``"none"``, a list of layer indices (or text such as ``"0,8,17"``), ``"first:K"``,
            ``"last:K"``, ``"uniform:K"`` (every n/K-th from the first), ``"sensitivity:K"`` or
            ``"sensitivity:K,rounds=R"``. K is a number of layers or a share of them, such as ``1/3`` or ``0.2``: at
            most that share, at least one.
        layers: how many attention layers the teacher has, or their indices.

    Raises ConversionError naming the value and the forms that exist.
    """
    have = list(range(layers)) if isinstance(layers, int) else list(layers)
    if isinstance(spec, str) and not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", spec):
        return _parse_text(spec, have)
    if isinstance(spec, str):
        spec = [int(part) for part in spec.split(",")]
    if not isinstance(spec, Sequence) or any(isinstance(i, bool) or not isinstance(i, int) for i in spec):
        raise ConversionError(f"keep: cannot read {spec!r}; write {FORMS}")
    for i in spec:
        if i not in have:
            exist = f"0 to {have[-1]}" if have == list(range(len(have))) else ", ".join(map(str, have))
            raise ConversionError(f"keep: there is no attention layer {i}; the teacher has {exist}")
    if len(set(spec)) != len(spec):
        raise ConversionError(f"keep: a layer is named twice in {list(spec)}")
    return Keep(layers=tuple(sorted(map(int, spec))), count=len(spec))


def _parse_text(spec: str, have: list[int]) -> Keep:
    words = {"all": have, "none": []}
    if spec in words:
        return Keep(layers=tuple(words[spec]), count=len(words[spec]))
    match = re.fullmatch(r"(\w+):([\d./]+)(?:,\s*rounds=(\d+))?", spec.strip())
    rules = ("first", "last", "uniform", "sensitivity")
    if not match:
        hint = did_you_mean(spec.split(":")[0], [*words, *rules]) if spec.split(":")[0] not in rules else ""
        raise ConversionError(f"keep: cannot read {spec!r}{hint}; write {FORMS}")
    rule, number, rounds = match[1], match[2], match[3]
    if rule not in rules:
        raise ConversionError(f"keep: unknown rule {rule!r}{did_you_mean(rule, rules)}; write {FORMS}")
    if rounds is not None and (rule != "sensitivity" or not 1 <= int(rounds) <= 100):
        raise ConversionError(f"keep: rounds={rounds} in {spec!r}: a number from 1 to 100, and only with 'sensitivity'")
    count, n = _count(number, len(have), spec), len(have)
    chosen = {"first": have[:count], "last": have[n - count :], "uniform": [have[i * n // count] for i in range(count)]}
    picked = chosen.get(rule)
    return Keep(layers=None if picked is None else tuple(picked), count=count, rounds=int(rounds or 1))


def _count(number: str, n: int, spec: str) -> int:
    try:
        value = Fraction(number)
    except (ValueError, ZeroDivisionError):
        raise ConversionError(
            f"keep: {number!r} in {spec!r} is not a number of layers or a share such as 1/3"
        ) from None
    share = "/" in number or "." in number
    if not 0 < value <= (1 if share else n):
        raise ConversionError(f"keep: {number} in {spec!r}: a share from 0 to 1 or a number of layers from 1 to {n}")
    return max(1, int(value * n)) if share else int(value)


def sensitivity_scan(
    teacher: ZooPreTrainedModel,
    candidate: MixerSpec,
    tokens_NL: Tensor | None = None,
    stats: Mapping[int, AttentionStats] | None = None,
    *,
    trace: Trace | None = None,
    progress: bool = False,
) -> list[float]:
    """How much each attention layer is missed alone: the distance from the teacher when only that layer is `candidate`.

    Args:
        teacher: a zoo model with attention layers.
        candidate: the mixer that would replace them: name, options or complete options.
        tokens_NL: calibration tokens, whole rows; or their `trace`, where there is one already.
        stats: per layer, for mixers that start better with them; by default the trace's own.

    Returns one number a layer, in the unit of `layerwise.MEASURES` (KL in nats a token for language models); 0.0 for
    layers that are not attention. Costs half a forward pass of all tokens a layer. The teacher is not changed.
    """
    if trace is None:
        if tokens_NL is None:
            raise ConversionError("sensitivity_scan needs tokens or a trace of them")
        trace = Trace(teacher, tokens_NL, with_stats=stats is None)
    stats = trace.stats if stats is None else stats
    rows, blocks = range(len(trace.tokens_NL)), list(teacher.model.layers)
    scores = [0.0] * len(blocks)
    with torch.no_grad(), fast_autocast(teacher, trace.fast):  # one context, so that weights are cast once
        for i in track(attention_layers(teacher), "which layers need attention", progress):
            with mixer_swapped(blocks[i], make_mixer(teacher, i, candidate, stats.get(i))):
                scores[i] = trace.distance(i, trace.inputs[i], rows, blocks)
    return scores


@torch.no_grad()
def restore_scan(
    teacher: ZooPreTrainedModel,
    mixers: Mapping[int, nn.Module],
    trace: Trace,
    *,
    progress: bool = False,
) -> list[float]:
    """How much closer the student with all of `mixers` comes when only one layer is the teacher's attention again.

    The counterpart of `sensitivity_scan`, in its unit and at its cost; negative where a layer's attention would do
    harm among converted ones. 0.0 for layers without a mixer, and where distances are not finite.
    """
    with fast_autocast(teacher, trace.fast):
        now, alone = _toggled(teacher, mixers, [], trace, progress=progress)
    gains = {i: now - distance for i, distance in alone.items()}
    return [g if math.isfinite(g := gains.get(i, 0.0)) else 0.0 for i in range(len(teacher.model.layers))]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The layers that keep attention, and for every layer the numbers of the two scans."""

    kept: list[int]
    missed: list[float]
    restored: list[float]


def select_layers(
    teacher: ZooPreTrainedModel,
    candidate: MixerSpec,
    count: int,
    trace: Trace,
    *,
    rounds: int = 1,
    stats: Mapping[int, AttentionStats] | None = None,
    progress: bool = False,
) -> Selection:
    """The `count` layers that keep attention when the others become `candidate`; see the module docstring.

    The first round is the two scans. Every further round scans from where the choice stands, exchanges the converted
    layer that would gain most for the kept one that would lose least, and keeps the exchange if the student as a whole
    comes closer; the rounds end where no exchange helps. A further round costs as much as one scan.
    """
    stats = trace.stats if stats is None else stats
    have = attention_layers(teacher)
    missed = sensitivity_scan(teacher, candidate, stats=stats, trace=trace, progress=progress)
    mixers = {i: make_mixer(teacher, i, candidate, stats.get(i)) for i in have}
    restored = restore_scan(teacher, mixers, trace, progress=progress)
    best = sorted(have, key=lambda i: need_of_attention(missed[i], restored[i]), reverse=True)
    kept = sorted(best[:count])
    for _ in track(range(rounds - 1 if 0 < count < len(have) else 0), "exchanging layers", progress):
        better = _exchange(teacher, mixers, kept, trace)
        if better is None:
            break
        kept = better
    return Selection(kept=kept, missed=missed, restored=restored)


@torch.no_grad()
def _exchange(
    teacher: ZooPreTrainedModel, mixers: Mapping[int, nn.Module], kept: list[int], trace: Trace
) -> list[int] | None:
    """`kept` with one layer exchanged for a better one; None where the best exchange makes the student no better."""
    with fast_autocast(teacher, trace.fast):
        now, alone = _toggled(teacher, mixers, kept, trace)
        gains = {i: alone[i] for i in mixers if i not in kept}
        losses = {i: alone[i] for i in kept}
        enter, leave = min(gains, key=lambda i: gains[i]), min(losses, key=lambda i: losses[i])
        proposal = sorted({*kept, enter} - {leave})
        after, _ = _toggled(teacher, mixers, proposal, trace, each=False)
    return proposal if after < now else None


def _toggled(
    teacher: ZooPreTrainedModel,
    mixers: Mapping[int, nn.Module],
    kept: list[int],
    trace: Trace,
    *,
    each: bool = True,
    progress: bool = False,
) -> tuple[float, dict[int, float]]:
    """The student's distance, and for each layer the distance if only that layer were the other of its two forms."""
    blocks, rows = list(teacher.model.layers), range(len(trace.tokens_NL))
    old = {i: blocks[i].mixer for i in mixers}
    distances: dict[int, float] = {}
    try:
        for i in mixers:
            blocks[i].mixer = old[i] if i in kept else mixers[i]
        x_NLD = trace.inputs[0]
        for i in track(range(len(blocks)), "which layers gain from attention", progress):
            block = blocks[i]
            if each and i in mixers:
                with mixer_swapped(block, mixers[i] if i in kept else old[i]):
                    distances[i] = trace.distance(i, x_NLD, rows, blocks)
            x_NLD = torch.cat([run_layers([block], x_NLD[group], trace.shared) for group in trace.groups(rows)])
        return trace.distance(len(blocks), x_NLD, rows, blocks), distances
    finally:
        for i, mixer in old.items():
            blocks[i].mixer = mixer
