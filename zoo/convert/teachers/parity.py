"""Whether an imported model computes what the original computes: the largest difference on random inputs.

Exact evaluations in float32 differ by rounding. It is about 1e-6 for most models, but 1e-4 where the residual stream
holds numbers in the ten thousands, as in SmolLM2 (transformers' own attention kernels differ by as much there). So what
differs by more than the tolerance in float32 is compared again in float64, where only a mistake remains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zoo.convert.teachers.adapter import TeacherAdapter
from zoo.errors import ConversionError

TOLERANCE = 1e-4
LENGTH = 32


def check_parity(ours: Any, original: Any, adapter: TeacherAdapter) -> float:
    """The largest difference of logits (of hidden states, for a bare encoder).

    Measured on two rows of tokens, one of them padded, or on what the adapter gives as its `probe`.
    Both models are on one device; neither is changed. Raises ConversionError above 1e-4, naming the part of the model
    that deviates first.
    """
    inputs, mine = _inputs(ours, original, adapter)
    for dtype in (torch.float32, torch.float64):
        theirs = outputs(original, inputs, dtype)
        found = outputs(ours, mine, dtype)
        error = difference(theirs[-1], found[-1])
        if error <= TOLERANCE:
            return error
    raise ConversionError(
        f"{type(original).__name__}: the imported model deviates by {error:.1e} (at most {TOLERANCE:.0e} is allowed), "
        f"first in {first_deviation(theirs, found)}"
    )


def _inputs(ours: Any, original: Any, adapter: TeacherAdapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments for the original and for our model."""
    probe = adapter.probe(original.config)
    if probe is not None:
        probe = {name: tensor.to(original.device) for name, tensor in probe.items()}
        return probe, probe
    ids_BL, mask_BL = random_rows(original.config, adapter.padding)
    ids_BL, mask_BL = ids_BL.to(original.device), mask_BL.to(original.device)
    inputs = adapter.inputs(ids_BL, mask_BL)
    mine = {"input_ids": ids_BL, "attention_mask": mask_BL}
    if ours.config.token_types:
        types_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL) % ours.config.token_types
        inputs["token_type_ids"] = mine["token_type_ids"] = types_BL
    return inputs, mine


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Hidden states by layer and, last, the result, at real positions, evaluated in a dtype."""
    if any(p.dtype != dtype for p in model.parameters()):
        model = copy.deepcopy(model).to(dtype)
    with evaluating(model):
        out = model(**inputs, output_hidden_states=True)
    result = out.logits if hasattr(out, "logits") else out.last_hidden_state
    states = (*out.hidden_states[:-1], result)  # the last one is that after the final norm; it belongs to the result
    if "attention_mask" not in inputs:
        return list(states)
    real_BL = inputs["attention_mask"].bool()
    return [x[real_BL] if x.dim() == 3 else x for x in states]


def random_rows(config: Any, padding: str) -> tuple[Tensor, Tensor]:
    """Token ids (2, L) that hold the padding id nowhere but at padding, and their mask."""
    L = max(1, min(LENGTH, config.max_position_embeddings - 2))
    pad = getattr(config, "pad_token_id", None)
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(0, config.vocab_size - (pad is not None), (2, L), generator=generator)
    mask_BL = torch.ones(2, L, dtype=torch.long)
    if padding == "left":
        mask_BL[1, : L // 4] = 0
    elif padding == "right":
        mask_BL[1, L - L // 4 :] = 0
    if pad is not None:
        ids_BL = ids_BL + (ids_BL >= pad)
    return ids_BL.masked_fill(mask_BL == 0, 0 if pad is None else pad), mask_BL


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ, NaN where either holds one."""
    return (a.double() - b.double()).abs().max().item() if a.shape == b.shape else float("inf")


def first_deviation(theirs: list[Tensor], ours: list[Tensor]) -> str:
    """The part of the model in which two lists of `outputs` part."""
    if len(theirs) != len(ours):  # they give their hidden states in another way
        return "one of its layers"
    for i, (a, b) in enumerate(zip(theirs[:-1], ours[:-1], strict=False)):
        if not difference(a, b) <= TOLERANCE:
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
