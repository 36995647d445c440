"""The Triton kernels of flash-linear-attention (pip install flash-linear-attention) as backends of the recurrences.

What they serve, and the way from our conventions to theirs and back: time before heads, a key head for every query
head, packed runs laid end to end in one row with the places where they start. Products are in bfloat16 where the values
are (queries and keys that are wider are rounded), in tf32 where they are float32; decays, states and sums are float32.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

OPTIONS: dict[str, Any] = {"package": "fla", "needs_gpu": True}
LARGEST_KEY = 256
# Decays are differences of sums over a chunk there: beside a stronger one those of its neighbours would lose digits.
# e^-60 of anything is nothing in bfloat16.
STRONGEST = -60.0


def serves(q: Tensor, k: Tensor, v: Tensor, decay_per_step: bool = False) -> bool:
    """Whether the kernels compute these heads: sizes in sixteens, values in bfloat16, or float32 that may be tf32.

    decay_per_step: one number a head and step, whose gradient some compilers get wrong.
    """
    K, V, dtypes = k.shape[-1], v.shape[-1], {q.dtype, k.dtype}
    if K % 16 or V % 16 or K > LARGEST_KEY:
        return False
    if decay_per_step and torch.is_grad_enabled() and _miscompiled(v.device):
        return False
    if v.dtype == torch.bfloat16:
        return dtypes <= {torch.bfloat16, torch.float32}
    return dtypes == {v.dtype} == {torch.float32} and torch.get_float32_matmul_precision() != "highest"


@functools.cache
def _miscompiled(device: torch.device) -> bool:
    """Triton 3.4 to 3.7.0 on Hopper: the package refuses this gradient (flash-linear-attention, issue 640)."""
    from triton import __version__

    version = tuple(int(part) for part in __version__.split("+")[0].split(".")[:3])
    return torch.cuda.get_device_capability(device)[0] == 9 and (3, 4) <= version < (3, 7, 1)


def run(
    kernel: str,
    q_BHLK: Tensor,
    keyed: dict[str, Tensor],
    gates: dict[str, Tensor],
    initial: Tensor | None,
    starts_BL: Tensor | None,
    **options,
) -> tuple[Tensor, Tensor]:
    """Call a kernel ("gla.chunk_gla" is that of `fla.ops.gla`): y_BHLV and the final state (B, G, K, V) in float32.

    keyed: further operands of products, v among them; gates: what is kept in float32; all (B, G, L, ...), by the
    kernel's names. starts_BL: True where a packed run begins, but for a row's first (see `chunks.run_starts`).
    """
    module, name = kernel.split(".")
    function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    low = torch.bfloat16 if keyed["v"].dtype == torch.bfloat16 else torch.float32
    B, H, L, _ = q_BHLK.shape
    R = H // keyed["v"].shape[1]
    tensors = {name: x.to(low) for name, x in keyed.items()} | {name: x.float() for name, x in gates.items()}
    if R > 1:
        tensors = {name: x.repeat_interleave(R, 1) for name, x in tensors.items()}
        initial = None if initial is None else initial.repeat_interleave(R, 1)
    tensors = {name: x.transpose(1, 2) for name, x in {"q": q_BHLK.to(low), **tensors}.items()}
    initial = None if initial is None else initial.float()
    last_B = None
    if starts_BL is not None:
        first_BL = F.pad(starts_BL[:, 1:], (1, 0), value=True)
        runs_B = first_BL.sum(1).cumsum(0)
        places_N = first_BL.flatten().nonzero()[:, 0]
        options["cu_seqlens"] = F.pad(places_N, (0, 1), value=B * L)
        last_B = runs_B - 1
        if initial is not None:
            fresh = initial.new_zeros(len(places_N), *initial.shape[1:])
            initial = fresh.index_copy(0, F.pad(runs_B[:-1], (1, 0)), initial)
        tensors = {name: x.flatten(0, 1)[None] for name, x in tensors.items()}
    y, state = function(**tensors, initial_state=initial, output_final_state=True, **options)
    if last_B is not None:
        y, state = y[0].unflatten(0, (B, L)), state[last_B]
    return y.transpose(1, 2), state[:, ::R]


def bounded(log_decay: Tensor) -> Tensor:
    """Log decays no stronger than the kernels bear."""
    return log_decay.clamp(min=STRONGEST)
