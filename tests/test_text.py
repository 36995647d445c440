"""Reading text: every format, every way it can be wrong, and a split that never leaks."""

import json
import warnings

import pytest
import torch

from zoo.errors import DataError
from zoo.text import Documents, byte_tokenizer, encode, read_documents, sample_tokens, split_documents

TEXTS = ["first document\n\nwith two paragraphs", "zweites — ä", "third, with a comma"]


@pytest.fixture
def folder(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    (tmp_path / "b.txt").write_text(TEXTS[1], encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS) + "\n\n", encoding="utf-8")
    (tmp_path / "d.csv").write_text("label,text\n" + "".join(f'1,"{t}"\n' for t in TEXTS), encoding="utf-8", newline="")
    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": TEXTS}), tmp_path / "e.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["c.jsonl", "d.csv", "e.parquet"])
def test_formats_give_the_same_documents(folder, name):
    assert list(read_documents(folder / name)) == TEXTS


def test_globs_folders_and_lists(folder):
    assert list(read_documents(str(folder / "*.txt"))) == TEXTS[:2]
    assert len(list(read_documents(folder))) == 2 + 3 * 3
    assert list(read_documents([folder / "a.txt", str(folder / "b.txt")])) == TEXTS[:2]
    assert list(read_documents([*TEXTS, "  "])) == TEXTS
    assert list(read_documents(iter(TEXTS))) == TEXTS


def test_documents_can_be_read_twice(folder):
    documents = Documents(iter(TEXTS))
    assert list(documents) == list(documents) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "no text"),
        ("x.csv", b"", "empty"),
        ("x.jsonl", b"\n \n", "no text"),
        ("x.txt", b"abc" * 400_000 + b"\xff" + b"abc", "byte 1200000"),
        ("x.jsonl", b'{"text": "a\xc3"}\n', "byte 11"),
        ("x.csv", b"text\nab\xc3", "byte 7"),
        ("x.csv", b"texts,label\na,b\n", "no column 'text'; did you mean 'texts'"),
        ("x.jsonl", b'{"txt": "a"}\n', "x.jsonl:1: no key 'text'; did you mean 'txt'"),
        ("x.jsonl", b'{"text": "a"}\n{"text" "b"}\n', "x.jsonl:2: not valid JSON"),
        ("x.jsonl", b'{"text": 3}\n', "not text"),
        ("x.parquet", b"PAR1 no", "Parquet"),
        ("x.doc", b"abc", "unknown kind"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path / name))


def test_nothing_matches(tmp_path):
    with pytest.raises(DataError, match=r"no file matches .*\*\.txt"):
        read_documents(str(tmp_path / "*.txt"))
    (tmp_path / "corpus.txt").write_text("a")
    with pytest.raises(DataError, match=r"did you mean 'corpus\.txt'"):
        read_documents(str(tmp_path / "corpsu.txt"))
    with pytest.raises(DataError, match="hf:NAME"):
        read_documents("hf:a:b:c:d")


def test_split_keeps_equal_documents_together_and_is_stable():
    texts = [f"document {i}" for i in range(2000)]
    train, held = split_documents(texts + texts[:50], held_out=0.2, seed=3)
    assert not set(train) & set(held)
    assert set(train) | set(held) == set(texts)
    assert 330 < len(set(held)) < 470
    again, _ = split_documents(reversed(texts), held_out=0.2, seed=3)
    assert set(again) == set(train)
    other, _ = split_documents(texts, held_out=0.2, seed=4)
    assert set(other) != set(train)
    with pytest.raises(DataError, match="held_out"):
        split_documents(texts, held_out=1.0)


def test_byte_tokenizer_is_the_bytes_and_saves(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = byte_tokenizer()
    text = "naïve\n\ttext — 123" + "".join(map(chr, range(1, 200)))
    assert encode(tokenizer, text) == [*text.encode(), 0]
    assert tokenizer.decode(encode(tokenizer, text, end=False)) == text
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(again, text) == encode(tokenizer, text)


def test_sample_rows_are_contiguous_and_seeded():
    texts = [chr(97 + i) * 40 for i in range(20)]
    tokenizer = byte_tokenizer()
    rows = sample_tokens(texts, tokenizer, tokens=320, length=32, seed=1)
    assert rows.shape == (10, 32)
    assert rows.dtype == torch.long
    stream = rows.flatten().tolist()
    runs = "".join(map(chr, stream)).split("\0")
    assert all(len(set(run)) == 1 for run in runs if run)
    assert all(len(run) == 40 for run in runs[:-1])
    assert torch.equal(rows, sample_tokens(texts, tokenizer, tokens=320, length=32, seed=1))
    assert not torch.equal(rows, sample_tokens(texts, tokenizer, tokens=320, length=32, seed=2))


def test_whole_documents_never_mix():
    texts = [chr(97 + i) * (20 + i) for i in range(20)]
    rows = sample_tokens(texts, byte_tokenizer(), tokens=8 * 30, length=30, whole_documents=True)
    assert rows.shape == (8, 30)
    assert all(len(set(row)) == 1 for row in rows.tolist())
    assert len({row[0] for row in rows.tolist()}) == 8
    with pytest.warns(UserWarning, match="5 of 100 rows"):
        assert len(sample_tokens(texts, byte_tokenizer(), tokens=3500, length=35, whole_documents=True)) == 5
    with pytest.raises(DataError, match="no document has 50 tokens"):
        sample_tokens(texts, byte_tokenizer(), tokens=50, length=50, whole_documents=True)
    with warnings.catch_warnings(), pytest.raises(DataError, match="fewer than 5000 tokens"):
        sample_tokens(texts, byte_tokenizer(), tokens=5000, length=5000)
