"""Linformer: attention to a fixed number of weighted sums of keys and values (Wang et al. 2020, arXiv 2006.04768).

    y_t = sum_j softmax_j(scale * q_t . k'_j) v'_j,    k'_j = sum_s E_sj k_s,    v'_j = sum_s F_sj v_s,    j = 1 .. M

E and F (n, M) are learned, n is the longest sequence. The paper's sharing (section 4): E and F for every head ("none"),
for all heads ("heads", its headwise sharing), one matrix for all heads and for keys and values ("kv", key-value
sharing), or that same matrix for all layers as well ("layers", layerwise sharing): the first layer of a model holds it
for those with equal options. Time and memory grow with L * M.

There is no causal form: each k'_j holds all positions, also later ones. Nor can a position be hidden behind the sums,
so padding is taken out before them. Rows of E belong to the tokens of a sequence, counted from its own first token: a
masked position adds nothing and takes up no row, and a packed sequence starts at row 0 as it would alone.

In a sequence of T < n tokens many sums hold little or nothing, and their zero keys still draw weight. `by_length`,
which is not in the paper, deals the sums to the tokens that there are. c_j counts the tokens t = j, j + M, ..; then

    y_t = sum_j softmax_j(scale * q_t . k'_j / c_j + ln c_j) v'_j / c_j,    j = 1 .. min(T, M)

With E_tj = F_tj = 1 for t = j mod M and 0 elsewhere a sum is the mean of c_j tokens, which stands for c_j of them, and
up to M tokens this is attention itself. With `contiguous` a sum gets neighbours, which resemble each other more than
every M-th token does: E is stretched over the sequence, so that token t of T reads row r_t = floor(t n / T) (or the
first one of its piece, where n / M is no whole number), and c_j counts the tokens with floor(r_t M / n) = j. So a
conversion starts, with ones there: the means of M pieces of whatever length there is, and attention itself up to M
tokens. Without `by_length` it starts from the means of M equal pieces of n positions, attention itself for n = M only.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import MixerOptions
from zoo.errors import ConfigError
from zoo.mixers.base import AttentionStats, AttentionWeights, Traits
from zoo.mixers.qkv import Inputs, QKVMixer, QKVOptions
from zoo.ops.sequences import find_sequences
from zoo.registry import register_mixer


class LinformerConfig(QKVOptions):
    """Options of `linformer`.

    max_length: n, the most tokens a sequence may have. projected_length: M. share, by_length, contiguous (which needs
    by_length): see the module docstring.
    """

    name: Literal["linformer"] = "linformer"
    causal: bool = False
    max_length: int = Field(512, ge=1, le=1 << 20)
    projected_length: int = Field(256, ge=1, le=1 << 16)
    share: Literal["none", "heads", "kv", "layers"] = "heads"
    by_length: bool = False
    contiguous: bool = False

    @model_validator(mode="after")
    def _dealt_by_length(self) -> LinformerConfig:
        if self.contiguous and not self.by_length:
            raise ValueError("contiguous needs by_length: true, for it says how the tokens that there are are dealt")
        return self


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
        self.separate = config.share in ("none", "heads")
        if self.separate:
            self.v_sums = nn.Parameter(torch.empty(shape))  # F
        if config.share == "layers":
            self.common = ("k_sums",)
        self.reset_parameters(0.02)

    def mix(self, q_BHLK: Tensor, k_BGLK: Tensor, v_BGLV: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        B, L = q_BHLK.shape[0], q_BHLK.shape[2]
        sequences = find_sequences((B, L), inputs.mask_BL, inputs.segments_BL)
        if sequences is None:
            return self._attend(q_BHLK, k_BGLK, v_BGLV), {}
        q_RHTK, k_RGTK, v_RGTV = (sequences.split_heads(x) for x in (q_BHLK, k_BGLK, v_BGLV))
        # Under compile a look at the lengths would be a graph break: rows, padding included, must fit then.
        longest = None if torch.compiler.is_compiling() else int(sequences.length_R.max())
        return sequences.join_heads(self._attend(q_RHTK, k_RGTK, v_RGTV, sequences.length_R, longest)), {}

    def _attend(
        self,
        q_RHTK: Tensor,
        k_RGTK: Tensor,
        v_RGTV: Tensor,
        length_R: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """Sequences that start at 0, zeros behind their ends (None: no ends); the longest has `longest` tokens."""
        T, n = q_RHTK.shape[2], self.config.max_length
        if (T if longest is None else longest) > n:
            raise ConfigError(f"a sequence of {longest or T} tokens, but linformer's max_length is {n}")
        if n < T:  # padding only
            k_RGTK, v_RGTV, T = k_RGTK[:, :, :n], v_RGTV[:, :, :n], n
        k_sums = self.holder.k_sums
        v_sums = self.v_sums if self.separate else k_sums
        M, bias_R11M, rows_RT = self.config.projected_length, None, None
        length_R = torch.tensor([T], device=k_RGTK.device) if length_R is None else length_R
        if self.config.contiguous:
            rows_RT = stretched_rows(length_R, T, n, M)
        k_RGMK = _sums(k_sums, T, rows_RT).mT.to(k_RGTK.dtype) @ k_RGTK
        v_RGMV = _sums(v_sums, T, rows_RT).mT.to(v_RGTV.dtype) @ v_RGTV
        if self.config.by_length:
            count_RM = tokens_per_sum(length_R, M) if rows_RT is None else tokens_per_piece(rows_RT, length_R, n, M)
            count_R1M1 = count_RM[:, None, :, None].to(k_RGMK.dtype)
            k_RGMK, v_RGMV = (x / count_R1M1.clamp(min=1) for x in (k_RGMK, v_RGMV))
            bias_R11M = count_R1M1.mT.log()
        q_RHTK = q_RHTK.to(k_RGMK.dtype)
        grouped = q_RHTK.shape[1] != k_RGMK.shape[1]
        return F.scaled_dot_product_attention(
            q_RHTK, k_RGMK, v_RGMV, attn_mask=bias_R11M, scale=self.config.softmax_scale, enable_gqa=grouped
        )

    def mix_state(self, batch_size: int, device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def reset_parameters(self, std: float) -> None:
        """E and F normal with variance 1 / M, as in the paper's theorems."""
        for name in ("k_sums", "v_sums"):
            if hasattr(self, name):
                init.normal_(getattr(self, name), std=self.config.projected_length**-0.5)

    @classmethod
    def config_from_attention(cls, attention: AttentionWeights, **options: Any) -> MixerOptions:
        """Sums by length: exact for texts of up to `projected_length` tokens, and of neighbours beyond."""
        defaults = {"by_length": True, "contiguous": options.get("by_length", True)}
        return super().config_from_attention(attention, **{**defaults, **options})

    def start_from(self, attention: AttentionWeights, stats: AttentionStats | None) -> None:
        start = every_mth if self.config.by_length else segment_means
        if self.config.contiguous:
            start = segments
        for name in ("k_sums", "v_sums"):
            if hasattr(self, name):
                sums = getattr(self, name)
                sums.copy_(start(self.config.max_length, self.config.projected_length).expand_as(sums))

    @classmethod
    def example_options(cls) -> dict[str, Any]:
        """Room for the sequences of `zoo.testing`."""
        return {"max_length": 80, "projected_length": 9}


def _sums(sums_nM: Tensor, length: int, rows_RT: Tensor | None) -> Tensor:
    """The rows of E that the tokens read: the first `length`, or of each sequence its own, (R, 1 or G, T, M)."""
    if rows_RT is None:
        return sums_nM[..., :length, :]
    rows_RTM = sums_nM[..., rows_RT, :]
    return rows_RTM.transpose(0, 1) if rows_RTM.dim() == 4 else rows_RTM[:, None]


def stretched_rows(length_R: Tensor, longest: int, n: int, sums: int) -> Tensor:
    """(R, T): the row of n that each of `longest` tokens reads where n rows are stretched over a sequence.

    Up to `sums` tokens each is in a piece of its own. Behind a sequence's end rows have no meaning.
    """
    t_T, length_R1 = torch.arange(longest, device=length_R.device), length_R[:, None].clamp(min=1)
    rows_RT = t_T * n // length_R1
    if sums <= n:
        rows_RT = rows_RT.maximum(-(-(t_T * sums // length_R1 * n) // sums))
    return rows_RT.clamp(max=n - 1)


def tokens_per_piece(rows_RT: Tensor, length_R: Tensor, n: int, sums: int) -> Tensor:
    """(R, sums): how many tokens of each sequence read a row of each piece; at least 1 for the first piece."""
    real_RT = (torch.arange(rows_RT.shape[1], device=rows_RT.device) < length_R[:, None]).long()
    count_RM = rows_RT.new_zeros(len(rows_RT), sums).scatter_add(1, rows_RT * sums // n, real_RT)
    return torch.cat([count_RM[:, :1].clamp(min=1), count_RM[:, 1:]], 1)


def segments(length: int, pieces: int) -> Tensor:
    """(length, pieces): column j has ones at the j-th of `pieces` pieces, whose sizes differ by at most one."""
    return F.one_hot(torch.arange(length) * pieces // length, pieces).float()


def segment_means(length: int, pieces: int) -> Tensor:
    """(length, pieces): `segments` over their sizes."""
    taken = segments(length, pieces)
    return taken / taken.sum(0).clamp(min=1)


def every_mth(length: int, sums: int) -> Tensor:
    """(length, sums): column j has ones at the rows j, j + sums, j + 2 sums, .."""
    return torch.eye(sums).repeat(-(-length // sums), 1)[:length]


def tokens_per_sum(length_R: Tensor, sums: int) -> Tensor:
    """(R, sums): how many of the tokens 0 .. length - 1 are j, j + sums, j + 2 sums, ..; at least 1 for j = 0."""
    count_RM = (length_R[:, None] - torch.arange(sums, device=length_R.device) + sums - 1) // sums
    return torch.cat([count_RM[:, :1].clamp(min=1), count_RM[:, 1:].clamp(min=0)], 1)
