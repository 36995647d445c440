"""BigBird's attention (Zaheer et al. 2020, arXiv 2007.14062), in the ITC form: sparse in blocks of `block_size` tokens.

    y_t = sum_s softmax_s(scale * q_t . k_s) v_s

over all s for t in the first and the last block of the sequence, and else over the first and the last block, the block
of t and its two neighbours, and `num_random_blocks` blocks drawn once per head and block. Two-sided only. A sequence of
at most (5 + 2 * num_random_blocks) * block_size tokens gets full attention, as the authors' code has it.

The random blocks are those which the authors' code draws for a layer with this `seed` (there: the number of the layer),
with numpy's legacy generator, whose numbers are fixed for ever. Conversion is a copy: exact up to the length above.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from zoo.mixers.base import Traits
from zoo.mixers.qkv import Inputs, QKVMixer, QKVOptions
from zoo.ops.block_sparse import block_sparse_attention, separate_segments
from zoo.registry import register_mixer

FIRST_PLAN = (1024, 3072, 4096)  # lengths with a plan of their own: those the authors pretrained with
REACH = 1024  # tokens within which that plan draws


class BigBirdOptions(QKVOptions):
    """Options of `big_bird`, sizes in tokens.

    seed: of the random blocks; give each layer another. max_length: of the model, on which the blocks for 1024, 3072
    and 4096 tokens depend. random_pattern: "first_block" lists the first block `num_random_blocks` times more instead,
    which is what transformers does outside training.
    """

    name: Literal["big_bird"] = "big_bird"
    causal: bool = False
    block_size: int = Field(64, ge=1, le=1 << 16)
    num_random_blocks: int = Field(3, ge=0, le=256)
    seed: int = Field(0, ge=0, le=(1 << 32) - 1)
    max_length: int = Field(4096, ge=1, le=1 << 24)
    random_pattern: Literal["seeded", "first_block"] = "seeded"

    @property
    def full_up_to(self) -> int:
        """Up to how many tokens attention is full."""
        return (5 + 2 * self.num_random_blocks) * self.block_size


@register_mixer("big_bird")
class BigBird(QKVMixer):
    """Block-sparse attention with global and random blocks; see the module docstring."""

    Config = BigBirdOptions
    traits = Traits(causal=False, bidirectional=True, state="none")
    config: BigBirdOptions

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """Sizes with which the laws' short inputs are sparse."""
        return {"block_size": 2, "num_random_blocks": 1, "seed": 3}

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        if inputs.segments_BL is None:
            return self._attend(q_BHLK, k_BGLK, v_BGLV, inputs.mask_BL), {}
        index_QL, mask_QL = separate_segments(inputs.segments_BL, inputs.mask_BL)
        B, H, L, _ = q_BHLK.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1)[index_QL].transpose(1, 2) for x in (q_BHLK, k_BGLK, v_BGLV))
        y_BLHV = q_BHLK.new_zeros(B * L, H, v_BGLV.shape[-1])
        if mask_QL.any():
            y_QLHV = self._attend(q, k, v, mask_QL).transpose(1, 2)
            y_BLHV = y_BLHV.to(y_QLHV.dtype).index_put((index_QL[mask_QL],), y_QLHV[mask_QL])
        return y_BLHV.view(B, L, H, -1).transpose(1, 2), {}

    def _attend(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, mask_BL: Tensor | None) -> Tensor:
        c = self.config
        return block_sparse_attention(
            q_BHLK,
            k_BGLK,
            v_BGLV,
            block=c.block_size,
            random_BHNR=self.random_blocks(q_BHLK.shape[2], mask_BL).to(q_BHLK.device),
            full_up_to=c.full_up_to,
            scale=c.softmax_scale,
            mask_BL=mask_BL,
        )

    def random_blocks(self, length: int, mask_BL: Tensor | None = None) -> Tensor:
        """The key blocks listed for each head and query block of rows of `length` positions: int64, (B or 1, H, N, R).

        A row's blocks depend on the number of its real tokens only.
        """
        c = self.config
        if torch.compiler.is_exporting():  # rows of all lengths read one table, in which those of the longest stand
            length = c.max_length
        N = -(-length // c.block_size)
        if c.random_pattern == "first_block" or length <= c.full_up_to:
            return torch.zeros(1, c.num_heads, N, c.num_random_blocks, dtype=torch.long)
        sizes = (c.num_heads, N, c.block_size, c.num_random_blocks, c.seed)
        special = [n for n in FIRST_PLAN if n <= min(N * c.block_size, c.max_length) and n % c.block_size == 0]
        if _end(c.max_length, c.block_size) - 3 < c.num_random_blocks:
            special = []  # more than that plan has to choose from
        if mask_BL is None:
            return _blocks(*sizes, c.max_length if N * c.block_size in special else 0)[None]
        if not special:
            return _blocks(*sizes, 0)[None]
        tables = torch.stack([_blocks(*sizes, 0), _blocks(*sizes, c.max_length)]).to(mask_BL.device)
        whole_B = -(-mask_BL.sum(1) // c.block_size) * c.block_size
        return tables[sum((whole_B == n).long() for n in special)]

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}


@torch.compiler.assume_constant_result
@functools.lru_cache(maxsize=64)
def _blocks(heads: int, blocks: int, size: int, listed: int, seed: int, max_length: int) -> Tensor:
    """Random key blocks, (H, N, R). `max_length` > 0 asks for the plan of that length; 0 for the general one.

    Rows are drawn in order, so those of a shorter sequence are the first ones of a longer one.
    """
    table_HNR = np.zeros((heads, blocks, listed), dtype=np.int64)
    draw = np.random.RandomState(seed).permutation
    if not max_length:
        span = 2 * listed + 5  # all are drawn among the first blocks
        for i in range(1, blocks):
            hidden = {0, i - 1, i, i + 1, span - 1} | ({span - 2} if i == 1 else set())
            hidden |= {1} if i == span - 2 else set()
            for h in range(heads):
                table_HNR[h, i] = [j for j in draw(span) if j not in hidden][:listed]
        return torch.from_numpy(table_HNR)
    whole = max_length // size
    inner = np.arange(1, whole - 1)
    end = _end(max_length, size)
    for h in range(heads):
        for i in range(1, whole - 1):
            row = draw(_candidates(inner, i, whole, end))[:listed]
            if i < blocks:
                table_HNR[h, i] = row
    return torch.from_numpy(table_HNR)


def _end(max_length: int, size: int) -> int:
    """The block before which the plan of the pretraining lengths draws."""
    return (REACH if 2 * size < REACH else max_length) // size - 1


def _candidates(inner: np.ndarray, i: int, whole: int, end: int) -> np.ndarray:
    """Blocks among which the plan of the pretraining lengths draws for query block i of `whole`."""
    if i <= 2:
        return inner[i + 1 : end]
    if i >= whole - 3 or i - 2 > end:
        return inner[:end]  # near the end of the longest text the window is not left out
    if i + 1 == end:
        return inner[: i - 2]
    return np.concatenate([inner[: i - 2], inner[i + 1 : end]])
