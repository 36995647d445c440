"""Documents to batches of packed tokens, as a stream that goes on exactly where it stopped.

A row is full: documents follow each other, each ended by the tokenizer's end-of-text token, and a document that does
not fit goes on in the next row. `segment_ids` keep documents in a row from seeing each other. Without packing ("none")
a row is one document, cut at `length`, and rows of about the same length make a batch, padded on the right: what a
sentence encoder reads. The place in the stream is a few numbers; going back to it reads the source again without
encoding it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.text import Documents, Source, describe, encode

SHUFFLE_DOCUMENTS = 4096
SHUFFLE_CHARACTERS = 1 << 25
BATCHES_AT_ONCE = 16  # without packing, documents of so many batches are put in order of their length
PIECE_CHARACTERS = 1 << 20  # longer documents are cut, so that a file of a gigabyte is never encoded as a whole


class Batch(NamedTuple):
    """What a model reads and what it should answer; a batch of rows of text or of images.

    inputs: token ids (B, L), or pixels (B, channels, rows, columns). targets: of text (B, L), the next token of the
    same document, or -100; of images (B,), labels. segment_ids (B, L), or None for one document a row. mask (B, L):
    False at padding, or None where there is none.
    """

    inputs: Tensor
    targets: Tensor
    segment_ids: Tensor | None
    mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens of text there are, padding not counted."""
        return self.inputs.numel() if self.mask is None else int(self.mask.sum())

    def to(self, device: Any) -> Batch:
        """The same batch on a device."""
        return Batch(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]


def shuffled(documents: Documents, seed: int) -> Iterator[str]:
    """The documents in an order given by `seed`: each is drawn from a buffer of bounded size."""
    rng = random.Random(seed)
    buffer: list[str] = []
    size = 0
    for text in (piece for document in documents for piece in pieces(document)):
        buffer.append(text)
        size += len(text)
        while len(buffer) > SHUFFLE_DOCUMENTS or (size > SHUFFLE_CHARACTERS and len(buffer) > 1):
            i = rng.randrange(len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            size -= len(buffer[-1])
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def pieces(text: str) -> Iterator[str]:
    """A document in pieces of bounded size, cut at white space where there is some."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = max(text.rfind(" ", start, start + PIECE_CHARACTERS), text.rfind("\n", start, start + PIECE_CHARACTERS))
        end = start + PIECE_CHARACTERS if end <= start else end
        yield text[start:end]
        start = end
    yield text[start:] if start else text


class PackedBatches:
    """An endless iterator of `Batch`es; the source is shuffled anew each time it has been gone through.

    Args:
        source: what `zoo.text.read_documents` takes.
        tokenizer: a transformers tokenizer.
        batch_size, length: rows and tokens in a row.
        seed: decides the order.
        packing: "separate" (segments), "joined" (documents in a row see each other) or "none" (one document a row).
        rank, world: this process takes the `rank`-th of every `world` batches.
        restart_after: batches after which the stream begins again from the first, in the same order.

    Raises DataError where the source has no text.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        *,
        batch_size: int,
        length: int,
        seed: int = 0,
        packing: str = "separate",
        rank: int = 0,
        world: int = 1,
        restart_after: int | None = None,
    ) -> None:
        self.documents = source if isinstance(source, Documents) else Documents(source)
        self.tokenizer, self.batch_size, self.length = tokenizer, batch_size, length
        self.seed, self.packing, self.rank, self.world = seed, packing, rank, world
        self.restart_after = restart_after
        self._start()

    def _start(self) -> None:
        self.index = 0  # batches given since the start
        self.passes = 0  # times the whole source was read
        self.begun = (0, 0)  # without packing: passes and taken before the documents of `waiting` were read
        self.taken = 0  # documents taken in this pass
        self.ids: list[int] = []  # the document that is being cut into rows
        self.offset = 0  # how many of its tokens were given; without packing, how many batches of `waiting`
        self.waiting: list[list[list[int]]] = []  # without packing: the batches made of the documents read last
        self._stream: Iterator[str] | None = None

    def __iter__(self) -> PackedBatches:
        return self

    def __next__(self) -> Batch:
        if self.restart_after is not None and self.index == self.restart_after:
            self._start()
        self.index += 1
        if self.packing == "none":
            return self._unpacked()
        rows = [self._row() for _ in range(self.batch_size * self.world)]
        rows = rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return make_batch([ids for ids, _ in rows], [starts for _, starts in rows], self.packing)

    def _row(self) -> tuple[list[int], list[int]]:
        """One row of tokens, and where in it documents begin."""
        row: list[int] = []
        starts: list[int] = []
        while len(row) < self.length:
            starts.append(len(row))
            if self.offset == len(self.ids):
                self.ids, self.offset = encode(self.tokenizer, self._next_document()), 0
            room = self.length - len(row)
            row += self.ids[self.offset : self.offset + room]
            self.offset = min(self.offset + room, len(self.ids))
        return row, starts

    def _unpacked(self) -> Batch:
        """The next batch of one document a row."""
        if self.offset == len(self.waiting):
            self._fill()
        rows = self.waiting[self.offset][self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        self.offset += 1
        return padded_batch(rows, self.tokenizer)

    def _fill(self) -> None:
        """Read documents for some batches, those of one length together; the batches come in a random order."""
        self.begun, size = (self.passes, self.taken), self.batch_size * self.world
        rows = [encode_row(self.tokenizer, self._next_document(), self.length) for _ in range(BATCHES_AT_ONCE * size)]
        rows.sort(key=len)
        self.waiting, self.offset = [rows[i : i + size] for i in range(0, len(rows), size)], 0
        random.Random(f"{self.seed} {self.begun}").shuffle(self.waiting)

    def _next_document(self) -> str:
        for _ in range(2):
            if self._stream is None:
                self._stream = shuffled(self.documents, self.seed * 1_000_003 + self.passes)
            text = next(self._stream, None)
            if text is not None:
                self.taken += 1
                return text
            if self.taken == 0:
                break
            self._stream, self.taken, self.passes = None, 0, self.passes + 1
        raise DataError(f"{describe(self.documents)}: there is no text to train on")

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, as JSON types."""
        passes, taken = self.begun if self.waiting else (self.passes, self.taken)
        return {"index": self.index, "passes": passes, "taken": taken, "offset": self.offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place in the stream. Raises DataError where the source has become shorter."""
        self._start()
        self.index, self.passes = state["index"], state["passes"]
        self._stream = shuffled(self.documents, self.seed * 1_000_003 + self.passes)
        last = ""
        for _ in range(state["taken"]):
            last = next(self._stream, "")
            if not last:
                raise DataError(f"{describe(self.documents)}: shorter than when the run was started; it cannot resume")
        self.taken = state["taken"]
        if self.packing == "none":
            if state["index"]:
                self._fill()
        else:
            self.ids = encode(self.tokenizer, last) if last else []
        self.offset = state["offset"]


def make_batch(rows: list[list[int]], starts: list[list[int]], packing: str) -> Batch:
    """Rows of ids and the places where documents begin in them -> tensors."""
    ids_BL = torch.tensor(rows, dtype=torch.long)
    targets_BL = torch.full_like(ids_BL, -100)
    targets_BL[:, :-1] = ids_BL[:, 1:]
    if packing == "joined":
        return Batch(ids_BL, targets_BL, None)
    segments_BL = torch.zeros_like(ids_BL)
    for b, places in enumerate(starts):
        segments_BL[b, places] = 1
        targets_BL[b, [p - 1 for p in places if p > 0]] = -100
    segments_BL = segments_BL.cumsum(1)
    return Batch(ids_BL, targets_BL, segments_BL if max(map(len, starts)) > 1 else None)


def encode_row(tokenizer: Any, text: str, length: int) -> list[int]:
    """Token ids of a document, cut at `length`; a special token that ends it still does."""
    ids = encode(tokenizer, text)
    if len(ids) <= length:
        return ids
    end = ids[-1:] if ids[-1] in tokenizer.all_special_ids else []
    return ids[: length - len(end)] + end


def padded_batch(rows: list[list[int]], tokenizer: Any) -> Batch:
    """Rows of ids of any length -> tensors padded on the right, with a mask where there is padding."""
    longest, pad = max(map(len, rows)), getattr(tokenizer, "pad_token_id", None) or 0
    ids_BL = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], dtype=torch.long)
    mask_BL = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    targets_BL = torch.full_like(ids_BL, -100)
    targets_BL[:, :-1] = ids_BL[:, 1:].masked_fill(~mask_BL[:, 1:], -100)
    return Batch(ids_BL, targets_BL, None, None if bool(mask_BL.all()) else mask_BL)


def evaluation_batches(
    source: Source, tokenizer: Any, *, tokens: int, batch_size: int, length: int, packing: str = "separate"
) -> list[Batch]:
    """The first `tokens` (rounded up to a batch) of a source in a fixed order; [] where it has no text."""
    stream = PackedBatches(source, tokenizer, batch_size=batch_size, length=length, packing=packing)
    try:
        return [next(stream) for _ in range(-(-tokens // (batch_size * length)))]
    except DataError as error:
        if "no text" in str(error):
            return []
        raise
