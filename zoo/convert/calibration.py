"""Closed-form calibration: refit each converted mixer's output projection, and keep a refit only where it helps.

Layer by layer from the bottom, on what the student itself computes below. With E the features before the output
projection W (one row a token), y* what the teacher's mixer put out for the same tokens, and w_t a weight a token:

    plain, weighted    min_W  sum_t w_t |W E_t - y*_t|^2  +  lam |W - W_0|^2     w_t = 1, or 1 / mean(x_t^2)
    scale              the same with one number per head, W = W_0 diag(a), pulled towards a = 1

x_t is the layer's input: with the weights an error counts relative to the residual stream that it is added to, without
them tokens with massive activations decide. Either can be right or ruinous (weights help a delta rule and destroy a
window that started well), and layers that were refitted independently explode when composed. Hence the guards: fits
use one part of the rows, `lam` is the one that does best on the others, and of {none, scale, plain, weighted} the one
is kept that brings the outputs of the whole student, with the refitted layers below and the others above as they are,
closest to the teacher's on those other rows. So with every layer the student comes closer or stays as it is. (With the
teacher's layers above in place of the student's the result is as good, but has no such guarantee: SmolLM2-135M, KL
0.056 against 0.054 for windows in 24 layers and 2.32 against 2.28 for Gated DeltaNet there, 2.60 against 2.65 for it in
all 30.)

Shapes: T tokens (rows times length), E features, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.convert.layerwise import (
    Given,
    Shared,
    Trace,
    fast_autocast,
    mixer_output,
    mixer_swapped,
    run_layers,
    track,
)
from zoo.errors import ConversionError
from zoo.models.backbone import Block, ZooPreTrainedModel

CANDIDATES = ("scale", "plain", "weighted")
GAIN = 1e-3  # a refit must bring the student closer by this share: less is noise of bf16
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # in units of the mean eigenvalue of E^T E


@dataclass
class LayerCalibration:
    """What was tried and kept in one layer.

    error_before, error_after: squared error of the mixer's output relative to the teacher's, on the held-out rows and
    on the student's own inputs. distances: of the whole student, with each candidate that was tried.
    """

    kept: str = "none"
    error_before: float = float("nan")
    error_after: float = float("nan")
    distances: dict[str, float] = field(default_factory=dict)


@dataclass
class CalibrationResult:
    """The outcome: per layer, and of the whole student on the held-out rows before and after."""

    layers: dict[int, LayerCalibration]
    distance_before: float
    distance_after: float
    agreement: float | None
    held_out_rows: list[int]


def split_rows(count: int) -> tuple[list[int], list[int]]:
    """Rows to fit on, and rows held out: the last quarter. Raises ConversionError for fewer than two rows."""
    if count < 2:
        raise ConversionError(
            f"calibration needs at least 2 rows of tokens, one of them held out, got {count}; "
            "give more data or tokens, a shorter length, or calibrate=False"
        )
    cut = count - max(1, count // 4)
    return list(range(cut)), list(range(cut, count))


@torch.no_grad()
def calibrate(
    student: ZooPreTrainedModel,
    trace: Trace,
    layers: Sequence[int],
    *,
    candidates: Sequence[str] = CANDIDATES,
    progress: bool = False,
) -> CalibrationResult:
    """Refit the output projections of `layers` of `student` in place; see the module docstring.

    Args:
        student: made by `replace_mixers` from the trace's teacher.
        trace: the teacher's pass over the calibration tokens.
        layers: the converted layers. Mixers without an `o_proj` as their last step are measured and left alone.
        candidates: which refits to try. With none, everything is only measured, on all rows.

    Never leaves the student further from the teacher on the held-out rows than it was. Distances are in the unit of
    `layerwise.MEASURES`.
    """
    rows = list(range(len(trace.tokens_NL)))
    fit, held = split_rows(len(rows)) if candidates else ([], rows)
    blocks, wanted = list(student.model.layers), set(layers)
    before = now = trace.distance(0, trace.inputs[0][held], held, blocks)
    found: dict[int, LayerCalibration] = {}
    x_NLD = trace.inputs[0]
    for i in track(range(len(blocks)), "calibrating" if candidates else "measuring", progress):
        if i in wanted:
            found[i] = _layer(blocks, i, x_NLD, trace, (fit, held), candidates, now)
            now = found[i].distances.get(found[i].kept, now)
        with fast_autocast(student, trace.fast):
            x_NLD = torch.cat([run_layers([blocks[i]], x_NLD[group], trace.shared) for group in trace.groups(rows)])
    with fast_autocast(student, trace.fast):
        after = trace.distance(len(blocks), x_NLD[held], held, blocks)
        return CalibrationResult(found, before, after, trace.agreement(x_NLD[held], held), held)


def relative_error(y: Tensor, target: Tensor) -> float:
    """|y - target|^2 / |target|^2 over everything."""
    return float((y - target).square().sum() / target.square().sum().clamp(min=1e-30))


def _layer(
    blocks: list[Block],
    i: int,
    x_NLD: Tensor,
    trace: Trace,
    rows: tuple[list[int], list[int]],
    candidates: Sequence[str],
    now: float,
) -> LayerCalibration:
    """Calibrate one layer in place. `x_NLD` is its input, `now` the student's distance with the layer as it is."""
    block, teacher_block, (fit, held) = blocks[i], trace.model.model.layers[i], rows
    with fast_autocast(trace.model, trace.fast):
        groups = trace.groups(range(len(x_NLD)))
        pairs = [output_features(block, x_NLD[group], trace.shared) for group in groups]
        target = [mixer_output(teacher_block, trace.inputs[i][group], trace.shared) for group in groups]
        target_NLD = torch.cat(target)
    y_NLD = torch.cat([y for _, y in pairs])
    result = LayerCalibration(error_before=relative_error(y_NLD[held], target_NLD[held]))
    result.error_after = result.error_before
    if not candidates or any(e is None for e, _ in pairs):
        return result
    e_NLE = torch.cat([e for e, _ in pairs])  # type: ignore[misc]
    found = fit_candidates(block.mixer, e_NLE, y_NLD, target_NLD, x_NLD, fit, held, candidates)
    if not found:
        return result
    outputs = {name: F.linear(e_NLE[held], w, b) for name, (w, b) in found.items()}
    result.distances = {"none": now, **_distances(blocks, i, x_NLD[held], outputs, trace, held)}
    best = min(found, key=lambda name: result.distances[name])
    if result.distances[best] < (1 - GAIN) * now:
        result.kept, projection = best, block.mixer.o_proj
        for parameter, new in zip((projection.weight, projection.bias), found[result.kept], strict=True):
            if parameter is not None:
                parameter.copy_(new)
        result.error_after = relative_error(outputs[result.kept], target_NLD[held])
    return result


def _distances(
    blocks: list[Block], i: int, x_NLD: Tensor, outputs: dict[str, Tensor], trace: Trace, rows: list[int]
) -> dict[str, float]:
    """How far the student is from the teacher on `rows` with each of the outputs of the mixer of layer i."""
    distances = {}
    with fast_autocast(trace.model, trace.fast):  # one context, so that weights are cast once
        for name, y_NLD in outputs.items():
            with mixer_swapped(blocks[i], Given(y_NLD)):
                after_NLD = run_layers([blocks[i]], x_NLD, trace.shared)
            distances[name] = trace.distance(i + 1, after_NLD, rows, blocks)
    return distances


def output_features(block: Block, x_NLD: Tensor, shared: Shared | None = None) -> tuple[Tensor | None, Tensor]:
    """What a mixer's `o_proj` reads (None where the mixer has none, or does more after it), and the mixer's output."""
    projection = getattr(block.mixer, "o_proj", None)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = None
    if isinstance(projection, nn.Linear):
        handle = projection.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    try:
        y_NLD = mixer_output(block, x_NLD, shared)
    finally:
        if handle is not None:
            handle.remove()
    last = len(seen) == 1 and seen[0][1].shape == y_NLD.shape and torch.equal(seen[0][1].float(), y_NLD)
    return (seen[0][0].float() if last else None), y_NLD


def fit_candidates(
    mixer: nn.Module,
    e_NLE: Tensor,
    y_NLD: Tensor,
    target_NLD: Tensor,
    x_NLD: Tensor,
    fit: list[int],
    held: list[int],
    candidates: Sequence[str],
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The refits of a mixer's `o_proj` (weight, bias) that lower its own weighted error on the held-out rows."""
    projection: nn.Linear = mixer.o_proj  # type: ignore[assignment]
    W_DE, bias = projection.weight.detach().double(), projection.bias
    residual = target_NLD.double() - y_NLD.double()
    weight_NL = 1 / x_NLD.double().square().mean(-1).clamp(min=1e-12)
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    if not (e_NLE.isfinite().all() and residual.isfinite().all()):
        return found
    for name in candidates:
        w_NL = weight_NL / weight_NL[fit].mean() if name == "weighted" else torch.ones_like(weight_NL)
        e = e_NLE.double()
        if name == "scale":
            change = _fit_scale(mixer, e, residual, W_DE, fit, held)
        else:
            if bias is not None:  # the bias is one more column, with the feature 1
                e = torch.cat([e, e.new_ones(*e.shape[:-1], 1)], -1)
            change = _fit_ridge(e, residual, w_NL, fit, held)
        if change is not None:
            new_bias = None if bias is None else bias.detach().double()
            if new_bias is not None and change.shape[1] > W_DE.shape[1]:
                new_bias = new_bias + change[:, -1]
            new_W_DE = W_DE + change[:, : W_DE.shape[1]]
            found[name] = (new_W_DE.float(), None if new_bias is None else new_bias.float())
    return found


def _fit_ridge(e_NLE: Tensor, r_NLD: Tensor, w_NL: Tensor, fit: list[int], held: list[int]) -> Tensor | None:
    """The change of W (D, E) with the ridge that does best on the held-out rows; None where no change does best."""
    root_TE = (e_NLE[fit] * w_NL[fit].sqrt()[..., None]).flatten(0, 1)
    right_ED = root_TE.T @ (r_NLD[fit] * w_NL[fit].sqrt()[..., None]).flatten(0, 1)
    values_E, vectors_EE = torch.linalg.eigh(root_TE.T @ root_TE)
    turned_ED, unit = vectors_EE.T @ right_ED, values_E.mean().clamp(min=1e-30)
    # float32 is enough to compare errors, and half the time.
    held_TE = (e_NLE[held] * w_NL[held].sqrt()[..., None]).flatten(0, 1).float() @ vectors_EE.float()
    wanted_TD = (r_NLD[held] * w_NL[held].sqrt()[..., None]).flatten(0, 1).float()
    best, best_error = None, wanted_TD.square().sum()
    for ridge in RIDGES:
        solution_ED = turned_ED / (values_E.clamp(min=0) + ridge * unit)[:, None]
        error = (held_TE @ solution_ED.float() - wanted_TD).square().sum()
        if error < best_error:
            best, best_error = solution_ED, error
    return None if best is None else (vectors_EE @ best).T


def _fit_scale(
    mixer: nn.Module, e_NLE: Tensor, r_NLD: Tensor, W_DE: Tensor, fit: list[int], held: list[int], ridge: float = 1e-2
) -> Tensor | None:
    """The change of W that multiplies each head by the best number; None where that does not help, or without heads."""
    heads = getattr(mixer.config, "num_heads", 0)
    if not heads or W_DE.shape[1] % heads:
        return None
    size = W_DE.shape[1] // heads
    e_TE, r_TD = e_NLE[fit].flatten(0, 1), r_NLD[fit].flatten(0, 1)
    # Head h gives c_h = W_h e_h; sums over tokens of c_h . c_k and c_h . r, without ever making the (T, D, H) of them.
    gram_EE = (e_TE.T @ e_TE) * (W_DE.T @ W_DE)
    gram_HH = gram_EE.unflatten(0, (heads, size)).unflatten(-1, (heads, size)).sum((1, 3))
    right_H = ((e_TE.T @ r_TD) * W_DE.T).sum(-1).unflatten(0, (heads, size)).sum(1)
    unit = gram_HH.diagonal().mean().clamp(min=1e-30)
    gram_HH = gram_HH + ridge * unit * torch.eye(heads, dtype=gram_HH.dtype, device=gram_HH.device)
    change_DE = W_DE * torch.linalg.solve(gram_HH, right_H).repeat_interleave(size)
    wanted_NLD = r_NLD[held]
    lower = (F.linear(e_NLE[held], change_DE) - wanted_NLD).square().sum() < wanted_NLD.square().sum()
    return change_DE if lower else None
