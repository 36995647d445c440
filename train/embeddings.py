"""Sentence embeddings of a teacher and its students: how near they are, and whether they order sentences alike.

    cosine       mean over sentences of the cosine between the student's embedding and the teacher's
    Spearman     rank correlation of the similarities of all pairs of sentences, the student's with the teacher's
    neighbour    share of sentences whose nearest neighbour among the others is the one the teacher finds

Every model compares its own embeddings with each other in the last two: a student whose space is turned as a whole
has a low cosine and yet finds the same neighbours. Sentences are padded on the right, those of one length together;
embeddings are compared in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import DataError
from zoo.train.data import padded_batch
from zoo.train.evaluation import EDGES, OnBatch, autocast, evaluating, shared_vocabulary

COMPARED = 4096  # sentences of which all pairs are compared: 8 million similarities


@dataclass(frozen=True)
class EmbeddingComparison:
    """One model's embeddings against the teacher's. `cosine_N`: of each sentence; `length_N`: its tokens."""

    cosine_N: Tensor
    length_N: Tensor
    spearman: float | None
    neighbour: float | None

    @property
    def cosine(self) -> float:
        """The mean over sentences."""
        return float(self.cosine_N.mean())

    @property
    def standard_error(self) -> float | None:
        """Of `cosine`, over sentences; None for a single one."""
        return float(self.cosine_N.std() / len(self.cosine_N) ** 0.5) if len(self.cosine_N) > 1 else None

    def by_length(self) -> dict[str, float]:
        """The mean cosine of sentences by their number of tokens, such as {"1-32": ..., "33-64": ...}."""
        edges = sorted({0, 16, 32, 128, *EDGES})
        out = {}
        for low, high in pairwise(edges):
            inside_N = (self.length_N > low) & (self.length_N <= high)
            if bool(inside_N.any()):
                out[f"{low + 1}-{high}"] = float(self.cosine_N[inside_N].mean())
        return out


@torch.no_grad()
def embed_rows(
    model: Any,
    rows: Sequence[Sequence[int]],
    tokenizer: Any = None,
    *,
    batch_tokens: int = 4096,
    dtype: torch.dtype = torch.float32,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """The embeddings (N, D), float64, of rows of token ids of any length; `on_batch` is told how many are done."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts, done = [], 0
    while done < len(order):
        count = 1
        while done + count < len(order) and (count + 1) * len(rows[order[done + count]]) <= batch_tokens:
            count += 1
        batch = padded_batch([list(rows[i]) for i in order[done : done + count]], tokenizer).to(model.device)
        with autocast(model, dtype):
            parts.append(model(batch.inputs, attention_mask=batch.mask).pooler_output.double().cpu())
        done += count
        if on_batch is not None:
            on_batch(done)
    return torch.cat(parts)[torch.tensor(order).argsort()]


def compare_embeddings(
    teacher: Any,
    students: Mapping[str, Any],
    rows: Sequence[Sequence[int]],
    *,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int = 4096,
    on_batch: OnBatch | None = None,
) -> dict[str, EmbeddingComparison]:
    """The teacher and every student on rows of token ids, one sentence each; "teacher" is the teacher with itself.

    Spearman and neighbours are of the first `COMPARED` sentences, and None for fewer than three. `on_batch` is told how
    many sentences all models together have read.

    Raises DataError where there is no sentence, or an empty one; ConfigError where vocabularies do not fit together.
    """
    if not rows or not all(rows):
        raise DataError("there is no sentence to compare" if not rows else "a sentence without tokens has no embedding")
    models = {"teacher": teacher, **students}
    shared_vocabulary(models, torch.tensor([[min(map(min, rows)), max(map(max, rows))]]), tokenizer)
    length_N = torch.tensor([len(row) for row in rows])
    found: dict[str, Tensor] = {}
    with evaluating(*models.values()):
        for name, model in models.items():
            before = len(found) * len(rows)
            told = None if on_batch is None else (lambda done, b=before: on_batch(b + done))
            found[name] = embed_rows(model, rows, tokenizer, batch_tokens=batch_tokens, dtype=dtype, on_batch=told)
    teacher_NN = similarities(found["teacher"][:COMPARED])
    out = {}
    for name, y_ND in found.items():
        own_NN = similarities(y_ND[:COMPARED])
        out[name] = EmbeddingComparison(
            F.cosine_similarity(y_ND, found["teacher"], dim=-1),
            length_N,
            spearman(pairs(own_NN), pairs(teacher_NN)) if len(own_NN) > 2 else None,
            same_neighbours(own_NN, teacher_NN) if len(own_NN) > 2 else None,
        )
    return out


def similarities(y_ND: Tensor) -> Tensor:
    """Cosines of all pairs (N, N)."""
    y_ND = F.normalize(y_ND, dim=-1)
    return y_ND @ y_ND.T


def pairs(x_NN: Tensor) -> Tensor:
    """The entries above the diagonal, one a pair."""
    return x_NN[torch.ones_like(x_NN, dtype=torch.bool).triu_(1)]


def ranks(x_N: Tensor) -> Tensor:
    """Ranks from 1, float64; equal values share the mean of theirs."""
    _, place_N, count = x_N.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place_N].double()


def spearman(x_N: Tensor, y_N: Tensor) -> float:
    """Rank correlation; NaN where all of one side are equal."""
    both_2N = torch.stack([ranks(x_N), ranks(y_N)])
    return float(torch.corrcoef(both_2N)[0, 1])


def same_neighbours(own_NN: Tensor, teacher_NN: Tensor) -> float:
    """Share of rows with the same largest entry outside the diagonal."""
    nearest = [x.clone().fill_diagonal_(-torch.inf).argmax(1) for x in (own_NN, teacher_NN)]
    return float((nearest[0] == nearest[1]).double().mean())
