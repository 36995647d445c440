"""Scores of sentence encoders against plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import TOKENIZER, make_texts

from zoo.config import ZooConfig
from zoo.errors import DataError
from zoo.models.heads import ZooForSentenceEmbedding
from zoo.train.embeddings import compare_embeddings, embed_rows, ranks, spearman
from zoo.train.score import score


def encoder(seed=0, **values):
    torch.manual_seed(seed)
    mixer = {"name": "attention", "num_heads": 2, "head_dim": 8, "causal": False}
    layers = [{"mixer": mixer, "ffn": {"name": "mlp", "hidden_size": 32}}] * 2
    values = {"task": "sentence-embedding", "positions": "learned", "max_position_embeddings": 64, **values}
    config = ZooConfig(vocab_size=256, hidden_size=16, initializer_range=0.3, layers=layers, **values)
    return ZooForSentenceEmbedding(config).eval()


ROWS = [list(text.encode())[: 5 + 11 * i % 50] for i, text in enumerate(make_texts(12))]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_rows_of_any_length_are_embedded_as_alone(pooling):
    model = encoder(pooling=pooling)
    assert len({len(row) for row in ROWS}) > 5
    with torch.no_grad():
        alone_ND = torch.cat([model(torch.tensor([row])).pooler_output for row in ROWS])
        told = []
        got_ND = embed_rows(model, ROWS, batch_tokens=150, on_batch=told.append)
    torch.testing.assert_close(got_ND.float(), alone_ND, atol=1e-5, rtol=0)
    assert told[-1] == len(ROWS)
    assert len(told) > 2


def test_a_comparison_is_the_plain_one():
    teacher, student = encoder(), encoder(seed=1)
    c = compare_embeddings(teacher, {"s": student}, ROWS)["s"]
    with torch.no_grad():
        t, s = ([m(torch.tensor([row])).pooler_output[0].double() for row in ROWS] for m in (teacher, student))
    assert c.cosine == pytest.approx(sum(float(a @ b) for a, b in zip(t, s, strict=True)) / len(ROWS), abs=1e-6)
    assert sum(c.by_length().values()) / len(c.by_length()) == pytest.approx(c.cosine, abs=0.2)
    x, y = ([float(a @ b) for a, b in itertools.combinations(side, 2)] for side in (s, t))
    place = [[1 + sum(b < a for b in side) for a in side] for side in (x, y)]
    n, square = len(x), sum((a - b) ** 2 for a, b in zip(*place, strict=True))
    assert c.spearman == pytest.approx(1 - 6 * square / (n * (n * n - 1)), abs=1e-6)

    def nearest(side, i):
        return max((j for j in range(len(side)) if j != i), key=lambda j: float(side[i] @ side[j]))

    same = sum(nearest(s, i) == nearest(t, i) for i in range(len(ROWS)))
    assert c.neighbour == pytest.approx(same / len(ROWS))


def test_what_is_equal_and_what_is_turned():
    teacher, turned = encoder(normalize_embeddings=False), encoder(normalize_embeddings=False)
    with torch.no_grad():
        turned.model.norm.weight.neg_()
    found = compare_embeddings(teacher, {"turned": turned}, ROWS)
    assert found["teacher"].cosine == pytest.approx(1.0)
    assert (found["teacher"].spearman, found["teacher"].neighbour) == (pytest.approx(1.0), 1.0)
    assert found["turned"].cosine == pytest.approx(-1.0, abs=1e-6)
    assert found["turned"].spearman == pytest.approx(1.0)
    assert found["turned"].neighbour == 1.0


def test_ties_share_their_rank():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    # 1 - 6 * 2 / 24 without ties; with one, the correlation of the ranks
    x, y = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 3.0, 2.0])
    assert spearman(x, y) == pytest.approx(math.sqrt(3) / 2)


def test_empty_sentences_are_refused():
    with pytest.raises(DataError, match="no sentence"):
        compare_embeddings(encoder(), {}, [])
    with pytest.raises(DataError, match="without tokens"):
        compare_embeddings(encoder(), {}, [[1], []])


def test_a_score_reads_whole_texts():
    teacher, student = encoder(), encoder(seed=1)
    texts = make_texts(40)
    result = score(student, teacher=teacher, untrained=student, data=texts, tokenizer=TOKENIZER, tokens=900, length=512)
    assert result.data["length"] == 64  # the learned positions end there
    assert result.data["rows_from"] == "texts"
    assert 900 <= result.data["tokens"] < 900 + 64
    row = result.row("student")
    assert row["cosine"] == result.row("untrained")["cosine"]
    assert result.row("teacher")["cosine"] == pytest.approx(1.0)
    assert 0 <= row["neighbour"] <= 1
    assert -1 <= row["spearman"] < 0.99
    assert row["kl"] is None
    with pytest.raises(DataError, match=r"there are .* in 40 texts"):
        score(student, teacher=teacher, data=texts, tokenizer=TOKENIZER, tokens=90_000)
    rows_NL = torch.randint(1, 255, (4, 12))
    given = score(student, teacher=teacher, data=rows_NL)
    with torch.no_grad():
        direct = F.cosine_similarity(teacher(rows_NL).pooler_output, student(rows_NL).pooler_output, dim=-1).mean()
    assert given.row("student")["cosine"] == pytest.approx(float(direct), abs=1e-5)
