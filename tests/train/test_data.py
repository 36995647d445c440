"""Packing: nothing lost, nothing seen across documents, and a stream that goes on exactly where it stopped."""

import pytest
import torch

from zoo.errors import DataError
from zoo.text import byte_tokenizer
from zoo.train import data
from zoo.train.data import PackedBatches, evaluation_batches, pieces

TEXTS = ["".join(chr(97 + i % 26) for _ in range(3 + 7 * i % 23)) + str(i) for i in range(60)]
TOKENIZER = byte_tokenizer()


def stream(**options):
    options = {"batch_size": 2, "length": 16, "seed": 5, **options}
    return PackedBatches(TEXTS, TOKENIZER, **options)


def test_one_pass_holds_every_document_once():
    total = sum(len(t) + 1 for t in TEXTS)
    batches = stream(batch_size=1, length=total)
    first, second = next(batches), next(batches)
    assert sorted(bytes(first.inputs[0].tolist()).decode().split("\0")[:-1]) == sorted(TEXTS)
    assert first.inputs[0].tolist() != second.inputs[0].tolist()
    assert sorted(first.inputs[0].tolist()) == sorted(second.inputs[0].tolist())


def test_segments_and_targets_end_at_documents():
    for _, batch in zip(range(20), stream(), strict=False):
        segments_BL = torch.ones(2, 16) if batch.segment_ids is None else batch.segment_ids
        for ids, targets, segments in zip(batch.inputs, batch.targets, segments_BL, strict=True):
            ends = [i for i, token in enumerate(ids.tolist()) if token == 0]
            for i in range(15):
                same = i not in ends
                assert (segments[i] == segments[i + 1]) == same
                assert targets[i] == (ids[i + 1] if same else -100)
            assert targets[15] == -100


def test_joined_rows_have_no_segments():
    batch = next(stream(packing="joined"))
    assert batch.segment_ids is None
    assert torch.equal(batch.targets[:, :-1], batch.inputs[:, 1:])


@pytest.mark.parametrize("stop", [0, 1, 7, 23, 60])
def test_resume_is_exact(monkeypatch, stop):
    monkeypatch.setattr(data, "SHUFFLE_DOCUMENTS", 9)
    one, two = stream(), stream()
    for _ in range(stop):
        next(one)
    two.load_state_dict(one.state_dict())
    for _ in range(30):
        a, b = next(one), next(two)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)


def test_without_packing_a_row_is_a_document(monkeypatch):
    monkeypatch.setattr(data, "BATCHES_AT_ONCE", 20)
    batches = stream(packing="none", batch_size=3)
    rows = []
    for _ in range(20):
        batch = next(batches)
        mask_BL = torch.ones_like(batch.inputs).bool() if batch.mask is None else batch.mask
        assert batch.tokens == int(mask_BL.sum())
        assert bool(mask_BL.any(0).all())  # no wider than the longest
        rows += [ids[mask].tolist() for ids, mask in zip(batch.inputs, mask_BL, strict=True)]
        inside_BL = mask_BL[:, 1:]
        assert torch.equal(batch.targets[:, :-1][inside_BL], batch.inputs[:, 1:][inside_BL])
        assert bool((batch.targets[:, :-1][~inside_BL] == -100).all())
    whole = [[*text.encode(), 0] for text in TEXTS]
    assert sorted(rows) == sorted(row if len(row) <= 16 else [*row[:15], 0] for row in whole)


def test_without_packing_batches_have_rows_of_about_one_length(monkeypatch):
    widths = []
    for at_once in (1, 10):
        monkeypatch.setattr(data, "BATCHES_AT_ONCE", at_once)
        batches = stream(packing="none", batch_size=3, length=32)
        taken = [next(batches) for _ in range(20)]
        widths.append(sum(batch.inputs.numel() for batch in taken) / sum(batch.tokens for batch in taken))
    assert widths[1] < 1.1 < widths[0]


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 21, 47])
def test_resume_without_packing_is_exact(monkeypatch, stop):
    monkeypatch.setattr(data, "SHUFFLE_DOCUMENTS", 9)
    monkeypatch.setattr(data, "BATCHES_AT_ONCE", 4)
    one, two = stream(packing="none"), stream(packing="none")
    for _ in range(stop):
        next(one)
    two.load_state_dict(one.state_dict())
    for _ in range(40):
        a, b = next(one), next(two)
        assert torch.equal(a.inputs, b.inputs)
        assert (a.mask is None) == (b.mask is None)


def test_restart_gives_the_same_batches_again():
    batches = stream(restart_after=3)
    ids = [next(batches).inputs for _ in range(9)]
    assert torch.equal(ids[0], ids[3])
    assert torch.equal(ids[2], ids[8])
    assert not torch.equal(ids[0], ids[1])


def test_ranks_share_a_batch_without_overlap():
    whole = next(stream(batch_size=4))
    parts = [next(stream(batch_size=2, rank=r, world=2)) for r in range(2)]
    assert torch.equal(whole.inputs, torch.cat([p.inputs for p in parts]))
    whole = next(stream(batch_size=4, packing="none"))
    parts = [next(stream(batch_size=2, packing="none", rank=r, world=2)) for r in range(2)]
    assert whole.tokens == sum(part.tokens for part in parts)


def test_long_documents_are_cut_without_loss(monkeypatch):
    monkeypatch.setattr(data, "PIECE_CHARACTERS", 50)
    text = " ".join(["word"] * 100) + "x" * 200
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 50
    assert list(pieces("short")) == ["short"]


def test_a_source_that_became_shorter_cannot_resume():
    batches = stream()
    for _ in range(20):
        next(batches)
    shorter = PackedBatches(TEXTS[:3], TOKENIZER, batch_size=2, length=16, seed=5)
    with pytest.raises(DataError, match="shorter"):
        shorter.load_state_dict(batches.state_dict())


def test_no_text_is_an_error_and_no_evaluation():
    with pytest.raises(DataError, match="no text"):
        next(PackedBatches([" "], TOKENIZER, batch_size=1, length=4))
    assert evaluation_batches([], TOKENIZER, tokens=10, batch_size=1, length=4) == []
    assert len(evaluation_batches(TEXTS, TOKENIZER, tokens=10, batch_size=1, length=4)) == 3
