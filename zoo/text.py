"""Text from files: documents, a split of them that never leaks, and samples of tokens.

A source is one of
    a file, a glob or a folder      .txt (one document a file), .jsonl (field "text"), .csv and .parquet (column "text")
    "hf:NAME[@CONFIG][:split[:field]]"   a name for the `datasets` package, streamed
    documents                       any iterable of strings; paths and globs among them are read as files

Everything is read as a stream; nothing but `sample_tokens` (a bounded pool) keeps more than a document in memory.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import DataError, did_you_mean

Source = str | Path | Iterable[str | Path]
POOL_CHARACTERS = 1 << 26  # sample_tokens draws from at most this much text
_CSV_FIELD_LIMIT = 1 << 30


def read_documents(source: Source, *, field: str = "text") -> Iterator[str]:
    """The documents of `source`, in a fixed order, blank ones left out.

    Args:
        source: see the module docstring.
        field: the column or key that holds the text.

    Raises:
        DataError: nothing matches, an empty file, text that is not UTF-8 (with file and byte offset), a missing column
            (with the nearest names). Missing files are reported at once, the rest when the reader comes to it.
    """
    if isinstance(source, str | Path):
        return _read_source(str(source), field)
    if isinstance(source, Documents):
        return iter(source)
    return chain.from_iterable(_read_item(item, field) for item in source)


def _read_item(item: str | Path, field: str) -> Iterator[str]:
    if isinstance(item, Path) or _looks_like_a_source(item):
        return _read_source(str(item), field)
    return iter([item] if item.strip() else [])


def _looks_like_a_source(text: str) -> bool:
    """Whether a string in a list is a name of files; a document has spaces in it or no known ending."""
    one_word = len(text) < 4096 and not any(c.isspace() for c in text)
    return one_word and (text.startswith("hf:") or Path(text).suffix.lower() in FORMATS)


def _read_source(source: str, field: str) -> Iterator[str]:
    if source.startswith("hf:"):
        return _read_hub(source, field)
    files = find_files(source)
    return chain.from_iterable(_read_file(path, field) for path in files)


def find_files(source: str) -> list[Path]:
    """The files a name, a glob or a folder stands for, sorted. Raises DataError where there are none."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in FORMATS and p.is_file()]
        if not files:
            raise DataError(f"{source}: no file in this folder ends in {', '.join(FORMATS)}")
        return files
    if path.is_file():
        files = [path]
    else:
        files = [p for name in sorted(glob.glob(str(path), recursive=True)) if (p := Path(name)).is_file()]
    if not files:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = "" if glob.has_magic(source) else did_you_mean(path.name, siblings)
        raise DataError(f"no file matches {source!r}{hint}")
    for file in files:
        if file.suffix.lower() not in FORMATS:
            raise DataError(f"{file}: unknown kind of text file; these are read: {', '.join(FORMATS)}")
    return files


def _read_file(path: Path, field: str) -> Iterator[str]:
    found = False
    try:
        for text in FORMATS[path.suffix.lower()](path, field):
            if not isinstance(text, str):
                raise DataError(f"{path}: {field!r} holds {text!r}, which is not text")
            if text.strip():
                found = True
                yield _clean(text)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text at byte {_first_bad_byte(path)}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if not found:
        raise DataError(f"{path}: there is no text in this file")


def _clean(text: str) -> str:
    """The same text without lone surrogates (JSON can hold them), which no tokenizer takes."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")


def _first_bad_byte(path: Path) -> int:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return done - pending + error.start
            done += len(block)
    return done - len(decoder.getstate()[0])  # the last character is cut off


def _read_txt(path: Path, field: str) -> Iterator[str]:
    yield path.read_bytes().decode("utf-8-sig")


def _read_jsonl(path: Path, field: str) -> Iterator[Any]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not valid JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected an object with the key {field!r}")
            if field not in row:
                raise DataError(f"{path}:{number}: no key {field!r}{did_you_mean(field, row)}")
            yield row[field]


def _read_csv(path: Path, field: str) -> Iterator[Any]:
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_FIELD_LIMIT))
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, None)
            if header is None:
                raise DataError(f"{path}: the file is empty")
            if field not in header:
                raise DataError(f"{path}: no column {field!r}{did_you_mean(field, header)}")
            column = header.index(field)
            for row in reader:
                if len(row) > column:
                    yield row[column]
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _read_parquet(path: Path, field: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise DataError(f"{path}: no column {field!r}{did_you_mean(field, file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from None


FORMATS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(source: str, field: str) -> Iterator[str]:
    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise DataError(f"{source!r}: write hf:NAME[@CONFIG][:split[:field]], such as hf:org/name:train:text")
    split, field = (rest[0] if rest and rest[0] else "train"), (rest[1] if len(rest) == 2 else field)
    name, _, config = name.partition("@")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:  # datasets raises its own, the Hub's and the network's kinds
        raise DataError(f"{source}: cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    return _hub_rows(source, rows, field)


def _hub_rows(source: str, rows: Iterable[dict], field: str) -> Iterator[str]:
    for row in rows:
        if field not in row:
            raise DataError(f"{source}: no column {field!r}{did_you_mean(field, row)}")
        if isinstance(row[field], str) and row[field].strip():
            yield _clean(row[field])


class Documents:
    """A source that can be read again and again, or the part of it that `keep` accepts."""

    def __init__(self, source: Source, keep: Callable[[str], bool] | None = None, *, field: str = "text") -> None:
        self.source = list(source) if isinstance(source, Iterator) else source
        self.keep = keep
        self.field = field

    def __iter__(self) -> Iterator[str]:
        documents = read_documents(self.source, field=self.field)
        return documents if self.keep is None else filter(self.keep, documents)

    def __repr__(self) -> str:
        return f"Documents({describe(self.source)})"


def describe(source: Source) -> str:
    """A short name of a source for messages."""
    if isinstance(source, Documents):
        return describe(source.source)
    if isinstance(source, str | Path):
        return str(source)
    return f"{len(source)} documents" if isinstance(source, Sized) else "documents given by the caller"


def split_documents(source: Source, held_out: float = 0.1, seed: int = 0) -> tuple[Documents, Documents]:
    """(for training, held out): a split by a hash of the document's text, so that equal documents fall on one side.

    The same document falls on the same side for the same `seed` whatever else is in the source. Both parts are streams
    that can be read repeatedly. Raises DataError for a share outside [0, 1).
    """
    if not 0 <= held_out < 1:
        raise DataError(f"held_out must be a share of at least 0 and below 1, got {held_out}")
    key = seed.to_bytes(8, "little", signed=True)
    limit = int(held_out * (1 << 64))

    def is_held_out(text: str) -> bool:
        digest = hashlib.blake2b(text.strip().encode("utf-8", "replace"), digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little") < limit

    whole = Documents(source) if not isinstance(source, Documents) else source
    return Documents(whole, lambda text: not is_held_out(text)), Documents(whole, is_held_out)


def encode(tokenizer: Any, text: str, *, end: bool = True) -> list[int]:
    """Token ids of one document as the tokenizer frames it, ended by its end-of-text token if it has one."""
    ids = list(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    last = tokenizer.eos_token_id
    if end and last is not None and getattr(tokenizer, "sep_token_id", None) is None and ids[-1:] != [last]:
        ids.append(last)
    return ids


def sample_tokens(
    source: Source, tokenizer: Any, *, tokens: int, length: int, seed: int = 0, whole_documents: bool = False
) -> Tensor:
    """A random sample of a source as token ids (N, length), int64, N = tokens // length (at least 1).

    Documents are drawn without repetition from the first `POOL_CHARACTERS` of the source, in an order given by `seed`.

    Args:
        source, tokenizer: what is read, and how.
        tokens, length: how many tokens in all and in a row.
        whole_documents: each row is the beginning of a document of its own that has at least `length` tokens. Otherwise
            rows are contiguous pieces of the documents joined one after the other.

    Raises:
        DataError: no document is long enough, or the text is shorter than one row. With fewer rows than asked for, a
            warning says so and what there is comes back.
    """
    if length < 1 or tokens < 1:
        raise DataError(f"tokens and length must be at least 1, got {tokens} and {length}")
    wanted = max(1, tokens // length)
    pool = _pool(source)
    random.Random(seed).shuffle(pool)
    rows = _rows_of_documents(pool, tokenizer, length) if whole_documents else _rows_joined(pool, tokenizer, length)
    taken = [row for _, row in zip(range(wanted), rows, strict=False)]
    if not taken:
        what = f"no document has {length} tokens" if whole_documents else f"there are fewer than {length} tokens"
        raise DataError(f"{describe(source)}: {what}; choose a smaller length or give more text")
    if len(taken) < wanted:
        warnings.warn(f"{describe(source)}: {len(taken)} of {wanted} rows of {length} tokens found", stacklevel=2)
    return torch.tensor(taken, dtype=torch.long)


def _pool(source: Source) -> list[str]:
    pool, size = [], 0
    for text in read_documents(source):
        pool.append(text)
        size += len(text)
        if size >= POOL_CHARACTERS:
            break
    return pool


def _rows_of_documents(pool: list[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    for text in pool:
        if len(text.encode("utf-8")) + 8 < length:  # a token is at least a byte; a few special ones frame the text
            continue
        ids = encode(tokenizer, text, end=False)
        if len(ids) >= length:
            yield ids[:length]


def _rows_joined(pool: list[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    rest: list[int] = []
    for text in pool:
        rest += encode(tokenizer, text)
        whole = len(rest) - len(rest) % length
        yield from (rest[i : i + length] for i in range(0, whole, length))
        rest = rest[whole:]


def byte_tokenizer() -> Any:
    """A tokenizer whose 256 ids are the bytes of UTF-8 text; byte 0 ends a document. It saves and loads as any other.

    It fits every model with a vocabulary of 256, such as the `-tiny` ones, and needs no training and no download.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's map of bytes to visible characters
    hidden = [b for b in range(256) if b not in set(printable)]
    vocab = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = next(char for char, byte in vocab.items() if byte == 0)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, clean_up_tokenization_spaces=False)
