"""Linformer: attention to a fixed number of weighted sums of keys and values (Wang et al. 2020, arXiv 2006.04768).

    y_t = sum_j softmax_j(scale * q_t . k'_j) v'_j,    k'_j = sum_s E_sj k_s,    v'_j = sum_s F_sj v_s,    j = 1 .. M

E and F (n, M) are learned, n is the longest sequence. The paper's sharing (section 4): E and F for every head ("none"),
for all heads ("heads", its headwise sharing), or one matrix for all heads and for keys and values ("kv", key-value
sharing). Time and memory grow with L * M.

There is no causal form: each k'_j holds all positions, also later ones. Nor can a position be hidden behind the sums,
so padding is taken out before them. Rows of E belong to the tokens of a sequence, counted from its own first token: a
masked position adds nothing and takes up no row, and a packed sequence starts at row 0 as it would alone.

Conversion: E = F are the means of M equal pieces of n positions, so M = n is exact for sequences of n tokens. Shorter
sequences leave pieces empty, whose zero keys still draw weight: set max_length to the length that is used.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import initialization as init

from zoo.errors import ConfigError
from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs, QKVMixer, QKVOptions
from zoo.ops.sequences import find_sequences
from zoo.registry import register_mixer


class LinformerConfig(QKVOptions):
    """Options of `linformer`.

    max_length: n, the most tokens a sequence may have. projected_length: M. share: see the module docstring.
    """

    name: Literal["linformer"] = "linformer"
    causal: bool = False
    max_length: int = Field(512, ge=1, le=1 << 20)
    projected_length: int = Field(256, ge=1, le=1 << 16)
    share: Literal["none", "heads", "kv"] = "heads"


@register_mixer("linformer")
class Linformer(QKVMixer):
    """Attention to projected keys and values; see the module docstring."""

    Config = LinformerConfig
    traits = Traits(causal=False, bidirectional=True, state="none")
    config: LinformerConfig

    def __init__(self, config: LinformerConfig, width: int, own_projections: bool = True) -> None:
        super().__init__(config, width, own_projections)
        heads = (config.kv_heads,) if config.share == "none" else ()
        shape = (*heads, config.max_length, config.projected_length)
        self.k_sums = nn.Parameter(torch.empty(shape))  # E (n, M) or (G, n, M)
        if config.share != "kv":
            self.v_sums = nn.Parameter(torch.empty(shape))  # F
        self.reset_parameters(0.02)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        B, L = q_BHLK.shape[0], q_BHLK.shape[2]
        sequences = find_sequences((B, L), inputs.mask_BL, inputs.segments_BL)
        if sequences is None:
            return self._attend(q_BHLK, k_BGLK, v_BGLV), {}
        q_RHTK, k_RGTK, v_RGTV = (sequences.split_heads(x) for x in (q_BHLK, k_BGLK, v_BGLV))
        # Under compile a look at the lengths would be a graph break: rows, padding included, must fit then.
        longest = None if torch.compiler.is_compiling() else int(sequences.length_R.max())
        return sequences.join_heads(self._attend(q_RHTK, k_RGTK, v_RGTV, longest)), {}

    def _attend(self, q_RHTK: Tensor, k_RGTK: Tensor, v_RGTV: Tensor, longest: int | None = None) -> Tensor:
        """Sequences that start at 0, zeros behind their ends; `longest` is the most tokens one of them has."""
        T, n = q_RHTK.shape[2], self.config.max_length
        if (T if longest is None else longest) > n:
            raise ConfigError(f"a sequence of {longest or T} tokens, but linformer's max_length is {n}")
        if n < T:  # padding only
            k_RGTK, v_RGTV, T = k_RGTK[:, :, :n], v_RGTV[:, :, :n], n
        v_sums = self.k_sums if self.config.share == "kv" else self.v_sums
        k_RGMK = self.k_sums[..., :T, :].mT.to(k_RGTK.dtype) @ k_RGTK
        v_RGMV = v_sums[..., :T, :].mT.to(v_RGTV.dtype) @ v_RGTV
        q_RHTK = q_RHTK.to(k_RGMK.dtype)
        grouped = q_RHTK.shape[1] != k_RGMK.shape[1]
        return F.scaled_dot_product_attention(
            q_RHTK, k_RGMK, v_RGMV, scale=self.config.softmax_scale, enable_gqa=grouped
        )

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def reset_parameters(self, std: float) -> None:
        """E and F normal with variance 1 / M, as in the paper's theorems."""
        for name in ("k_sums", "v_sums"):
            if hasattr(self, name):
                init.normal_(getattr(self, name), std=self.config.projected_length**-0.5)

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        for name in ("k_sums", "v_sums"):
            if hasattr(self, name):
                sums = getattr(self, name)
                sums.copy_(segment_means(self.config.max_length, self.config.projected_length).expand_as(sums))

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """Room for the sequences of `zoo.testing`."""
        return {"max_length": 80, "projected_length": 9}


def segment_means(length: int, pieces: int) -> Tensor:
    """(length, pieces): column j is the mean over the j-th of `pieces` pieces, whose sizes differ by at most one."""
    piece_n = torch.arange(length) * pieces // length
    taken = F.one_hot(piece_n, pieces).float()
    return taken / taken.sum(0).clamp(min=1)
