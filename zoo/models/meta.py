"""Meta tokens: learned vectors in front of every sequence (Hymba, Dong et al. 2024, arXiv 2411.13676).

    x = [meta_1 ... meta_M; x_1 ... x_L] through all layers, and what comes out at the meta tokens is left away

They come first and every layer is causal, so what they become does not depend on the text: each block computes them
for a pass and hands them to the next one in `shared`, as "meta.i". Packed sequences each have theirs. In decoding they
are part of the first call and live in the states; a cache does not count them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import ModelSpec
from zoo.errors import ConfigError
from zoo.mixers.base import State
from zoo.ops.padding import segment_runs, take


class MetaTokens(nn.Module):
    """M learned vectors (M, D)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def reset_parameters(self, std: float) -> None:
        """Standard normal, whatever `std`, as published."""
        init.normal_(self.weight)


def check_meta(spec: ModelSpec) -> None:
    """Raise ConfigError where a model with meta tokens has what does not go with them."""
    if not spec.meta_tokens:
        return
    unfit = {
        "block: reversible": spec.block == "reversible", "image": spec.image is not None,
        "positions: learned": spec.positions == "learned",
        **{key: any(getattr(x, key) is not None for x in spec.layers) for key in ("depth", "memory")},
    }  # fmt: skip
    if wrong := [key for key, has in unfit.items() if has]:
        raise ConfigError(f"meta_tokens: a model with them has no {wrong[0]}")


def behind_meta(
    block: Any,
    place: int,
    x_BLD: Tensor,
    mask_BL: Tensor | None,
    segments_BL: Tensor | None,
    state: State | None,
    shared: dict[str, Tensor],
) -> tuple[Tensor, State | None]:
    """The block at `place` on the sequences behind the meta tokens, which it hands on."""
    meta_MD = shared[f"meta.{place}"].to(x_BLD.dtype)
    B, M = x_BLD.shape[0], len(meta_MD)
    if block.runs_as is not None:
        raise ConfigError("meta_tokens: a model with them has no same_as, for a block must know where it stands")
    all_BSD = torch.cat([meta_MD.expand(B, -1, -1), x_BLD], 1)
    if segments_BL is None:
        if mask_BL is not None:
            mask_BL = torch.cat([mask_BL.new_ones(B, M), mask_BL], 1)
        y_BSD, state = block.run(all_BSD, mask_BL, None, state, shared)
        y_BLD = y_BSD[:, M:]
    else:
        index_BS, run_BS, text_BL = _before_each(segments_BL, mask_BL, M)
        if mask_BL is not None:
            mask_BL = torch.cat([mask_BL.new_ones(B, M), mask_BL], 1).gather(1, index_BS)
        y_BSD, _ = block.run(take(all_BSD, index_BS, 1), mask_BL, run_BS, None, shared)
        y_BLD = take(y_BSD, text_BL, 1)
    shared[f"meta.{place + 1}"] = y_BSD[0, :M]  # the same in every row
    return y_BLD, state


def _before_each(segments_BL: Tensor, mask_BL: Tensor | None, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with the meta tokens before each sequence: where each place is in [meta; x] (B, S), the number of its
    sequence (B, S), and where each position of x now is (B, L)."""
    B, L = segments_BL.shape
    run_BL = segment_runs(segments_BL, mask_BL)
    if mask_BL is not None:  # padding belongs to the sequence before it
        run_BL = run_BL.masked_fill(~mask_BL, 0).cummax(1).values
    R, device = int(run_BL.max()) + 1, run_BL.device
    here_L = torch.arange(L, device=device)
    text_BL = here_L + M * (run_BL + 1)
    lengths_BR = torch.zeros(B, R, dtype=torch.long, device=device).scatter_add(1, run_BL, torch.ones_like(run_BL))
    start_BR = lengths_BR.cumsum(1) - lengths_BR + M * torch.arange(R, device=device)
    meta_BRM = start_BR[..., None] + torch.arange(M, device=device)
    index_BS = torch.empty(B, L + M * R, dtype=torch.long, device=device)
    index_BS.scatter_(1, text_BL, (M + here_L).expand(B, L))
    index_BS.scatter_(1, meta_BRM.flatten(1), torch.arange(M, device=device).repeat(B, R))
    run_BS = torch.empty_like(index_BS).scatter_(1, text_BL, run_BL)
    runs = torch.arange(R, device=device).repeat_interleave(M).expand(B, -1)
    return index_BS, run_BS.scatter_(1, meta_BRM.flatten(1), runs), text_BL
