"""Whether an imported model computes what the original computes: the largest difference on random tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zoo.convert.teachers.adapter import TeacherAdapter
from zoo.errors import ConversionError

TOLERANCE = 1e-4
# Exact evaluations in float32 differ by rounding, which grows with the numbers: 1e-6 of the largest, if that is more.
RELATIVE_TOLERANCE = 1e-6
LENGTH = 32


@torch.no_grad()
def check_parity(ours: Any, original: Any, adapter: TeacherAdapter) -> float:
    """The largest difference of logits (of hidden states, for a bare encoder) on two rows, one of them padded.

    Both models are in float32 on one device. Raises ConversionError above the tolerance, naming the first layer that
    deviates.
    """
    ids_BL, mask_BL = random_rows(original.config, adapter.padding)
    device = next(original.parameters()).device
    inputs = adapter.inputs(ids_BL.to(device), mask_BL.to(device))
    mine = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    if ours.config.token_types:
        types_BL = torch.arange(ids_BL.shape[1], device=device).expand_as(ids_BL) % ours.config.token_types
        inputs["token_type_ids"] = mine["token_type_ids"] = types_BL
    with evaluating(original), evaluating(ours):
        theirs = original(**inputs, output_hidden_states=True)
        out = ours(**mine, output_hidden_states=True)
    real_BL = mask_BL.bool().to(device)
    field = "logits" if hasattr(theirs, "logits") else "last_hidden_state"
    a, b = getattr(theirs, field), getattr(out, field)
    if a.dim() == 3:
        a, b = a[real_BL], b[real_BL]
    error = difference(a, b)
    tolerance = max(TOLERANCE, RELATIVE_TOLERANCE * a.abs().max().item())
    if not error <= tolerance:
        where = first_deviation(theirs.hidden_states, out.hidden_states, real_BL)
        raise ConversionError(
            f"{type(original).__name__}: imported {field} differ by {error:.2e} (at most {tolerance:.0e} is allowed); "
            f"the first deviation is in {where}"
        )
    return error


def random_rows(config: Any, padding: str) -> tuple[Tensor, Tensor]:
    """Token ids (2, L) that hold the padding id nowhere but at padding, and their mask."""
    L = min(LENGTH, config.max_position_embeddings - 2)
    pad = getattr(config, "pad_token_id", None)
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(0, config.vocab_size - (pad is not None), (2, L), generator=generator)
    mask_BL = torch.ones(2, L, dtype=torch.long)
    if padding == "left":
        mask_BL[1, : L // 4] = 0
    else:
        mask_BL[1, L - L // 4 :] = 0
    if pad is not None:
        ids_BL = ids_BL + (ids_BL >= pad)
    return ids_BL.masked_fill(mask_BL == 0, 0 if pad is None else pad), mask_BL


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ, NaN where either holds one."""
    return (a.double() - b.double()).abs().max().item() if a.shape == b.shape else float("inf")


def first_deviation(theirs: Any, ours: Any, real_BL: Tensor) -> str:
    """The part of the model in which two tuples of hidden states part. The last entry is after the final norm."""
    for i, (a, b) in enumerate(zip(theirs[:-1], ours[:-1], strict=False)):
        a, b = a[real_BL], b[real_BL]
        if not difference(a, b) <= max(TOLERANCE, RELATIVE_TOLERANCE * a.abs().max().item()):
            return "the embedding" if i == 0 else f"layer {i - 1}"
    return f"layer {len(ours) - 2}, the final norm or the head"


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode; every module is put back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
