"""Synthetic recall: a passkey in filler text, and multi-query associative recall (MQAR).

Both ask for something that stood in the text once, far back: what a state of fixed size loses first.

Passkey (Mohtashami and Jaggi 2023, arXiv 2305.16300): a number stands at some depth of filler text and is asked for at
the end. `exact`: the greedy continuation is the number. `choice`: the number is likelier than nine other numbers of as
many tokens (chance 10 %), which tells small models apart where none is exact.

MQAR (Arora et al. 2023, arXiv 2312.04927): pairs of a key and a value, then keys again in another order, each followed
by its value. The prediction after a repeated key counts, among the values of the task. Chance is one in the number of
values (64 words); a model that knows which were there, but not whose they are, gets one in `pairs`. `mqar_batch` makes
training data too.

Everything is made of token ids: words that are one token each where there is a tokenizer, raw ids where there is none.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import DataError
from zoo.train.evaluation import evaluating

IGNORED = -100
CANDIDATES = 10
INTRODUCTION = "One number is hidden in the text below. Read on and remember it."
FILLER = (
    " The river runs down to the sea. The wind comes from the hills. A bird sits on the wall."
    " The road goes past the mill and back again."
)
BEFORE, AFTER, QUESTION = "\nThe pass key is", ". Remember the pass key.\n", "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Symbols:
    """What MQAR is made of: disjoint ids of keys and values, what stands between pairs and queries, and punctuation.

    A pair is written `key link value end`. `filler` is a text that is repeated where `running`, else it is drawn from.
    """

    keys: Tensor
    values: Tensor
    filler: Tensor
    running: bool = False
    link: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    @property
    def unit(self) -> int:
        """Tokens of one pair."""
        return 2 + len(self.link) + len(self.end)


def raw_symbols(vocab_size: int) -> Symbols:
    """Symbols for models without a tokenizer: ids 1 to a quarter are filler, then keys, then values; 0 is not used."""
    if vocab_size < 16:
        raise DataError(f"recall tasks need a vocabulary of at least 16 ids, got {vocab_size}")
    a, b = vocab_size // 4, vocab_size // 4 + (vocab_size - vocab_size // 4) // 2
    return Symbols(torch.arange(a, b), torch.arange(b, vocab_size), torch.arange(1, a))


def word_symbols(tokenizer: Any, number: int = 64, seed: int = 0) -> Symbols:
    """Symbols of a pretrained tokenizer: `number` keys and values, common words of one token; lines of ` key: value`.

    Vocabularies are ordered by frequency, or by the merges that made them, so common words come first. On SmolLM2-135M
    this form finds 0.91 of 16 pairs over 512 tokens; without punctuation it is 0.41, with random filler too 0.02.
    Raises DataError for a tokenizer with too few words.
    """
    texts = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), 16384))))
    for form in (r"[Ġ▁][a-z]{5,}", r"[a-z]{5,}"):  # the second has no mark at the start of a word: WordPiece
        words = [i for i, text in enumerate(texts) if isinstance(text, str) and re.fullmatch(form, text)]
        if len(words) >= 2 * number:
            break
    else:
        raise DataError(
            f"MQAR needs {2 * number} words of one token, the tokenizer has {len(words)}; "
            "for byte and character tokenizers use raw symbols"
        )
    chosen = torch.tensor(words[: 2 * number])
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    keys, values = chosen.split(number)
    return Symbols(keys, values, torch.tensor(ids(FILLER)), running=True, link=ids(":"), end=ids("\n"))


def symbols(tokenizer: Any, vocab_size: int) -> Symbols:
    """Words of the tokenizer; raw ids where there is none, or where it has no words."""
    if tokenizer is not None:
        try:
            return word_symbols(tokenizer)
        except DataError:
            vocab_size = min(vocab_size, len(tokenizer))
    return raw_symbols(vocab_size)


def mqar_batch(
    examples: int,
    length: int,
    *,
    symbols: Symbols | int,
    pairs: int = 16,
    queries: int | None = None,
    spread: bool = False,
    seed: int | torch.Generator = 0,
) -> tuple[Tensor, Tensor]:
    """Sequences of multi-query associative recall.

    Args:
        examples, length: shape of the batch.
        symbols: the ids to use, or a vocabulary size for raw ids.
        pairs: key-value pairs at the beginning of a sequence; keys and values of one sequence are all different.
        queries: how many of the keys come again; all by default.
        spread: queries anywhere after the pairs (for training); otherwise all at the end (for scoring: the distance is
            then about `length`). Between pairs and queries stand filler tokens.
        seed: a number, or a generator to draw on.

    Returns:
        (input_ids, labels), int64 (examples, length). Labels are the input ids where a value is asked for, else -100:
        as a causal LM's `labels`, shifted inside the model.

    Raises:
        DataError: a sequence too short for its pairs and queries, or more pairs than symbols.
    """
    symbols = raw_symbols(symbols) if isinstance(symbols, int) else symbols
    queries = pairs if queries is None else queries
    limit = min(len(symbols.keys), len(symbols.values))
    if not 1 <= queries <= pairs <= limit:
        raise DataError(f"MQAR needs 1 <= queries <= pairs <= {limit} (the symbols), got {queries} and {pairs}")
    unit = symbols.unit
    free = length - unit * (pairs + queries)
    if free < 0:
        raise DataError(f"{pairs} pairs and {queries} queries need {unit * (pairs + queries)} tokens, got {length}")
    g = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    key_BP = symbols.keys[torch.rand(examples, len(symbols.keys), generator=g).argsort(1)[:, :pairs]]
    value_BP = symbols.values[torch.rand(examples, len(symbols.values), generator=g).argsort(1)[:, :pairs]]
    again_BQ = torch.rand(examples, pairs, generator=g).argsort(1)[:, :queries]
    # Filler tokens and queries in a row of `free + queries` slots; a query then takes the place of `unit` tokens.
    slot_BQ = torch.arange(free, free + queries).expand(examples, -1)
    if spread:
        slot_BQ = torch.rand(examples, free + queries, generator=g).argsort(1)[:, :queries].sort(1).values
    start_BQ = unit * pairs + slot_BQ + (unit - 1) * torch.arange(queries)
    if symbols.running:
        fill_BL = symbols.filler.repeat(length // len(symbols.filler) + 1)[:length].expand(examples, -1)
    else:
        fill_BL = symbols.filler[torch.randint(len(symbols.filler), (examples, length), generator=g)]
    ids_BL = torch.cat([_pairs(symbols, key_BP, value_BP), fill_BL[:, : length - unit * pairs]], 1)
    query_BT = _pairs(symbols, key_BP.gather(1, again_BQ), value_BP.gather(1, again_BQ))
    ids_BL.scatter_(1, (start_BQ[:, :, None] + torch.arange(unit)).flatten(1), query_BT)
    labels_BL = torch.full_like(ids_BL, IGNORED)
    labels_BL.scatter_(1, start_BQ + 1 + len(symbols.link), value_BP.gather(1, again_BQ))
    return ids_BL, labels_BL


def _pairs(symbols: Symbols, key_BP: Tensor, value_BP: Tensor) -> Tensor:
    """`key link value end`, one pair after the other (B, P * unit)."""
    fixed = [torch.tensor(ids, dtype=torch.long).expand(*key_BP.shape, -1) for ids in (symbols.link, symbols.end)]
    return torch.cat([key_BP[..., None], fixed[0], value_BP[..., None], fixed[1]], 2).flatten(1)


def mqar_accuracy(
    model: Any,
    length: int,
    *,
    symbols: Symbols | int,
    examples: int = 4,
    pairs: int = 16,
    seed: int = 0,
    batch_tokens: int = 2048,
) -> float:
    """Share of repeated keys after which the right value is the likeliest of all values of the task."""
    symbols = raw_symbols(symbols) if isinstance(symbols, int) else symbols
    ids_BL, labels_BL = mqar_batch(examples, length, symbols=symbols, pairs=pairs, seed=seed)
    size = max(1, batch_tokens // length)
    right = total = 0
    with evaluating(model):
        for start in range(0, examples, size):
            part_BL, asked_BL = ids_BL[start : start + size], labels_BL[start : start + size]
            keep = symbols.unit * pairs  # the queries stand at the end
            logits_BTV = model(part_BL.to(model.device), use_cache=False, logits_to_keep=keep).logits.cpu()
            wanted_BT = torch.cat([asked_BL[:, -keep + 1 :], asked_BL.new_full((len(part_BL), 1), IGNORED)], 1)
            best_BT = symbols.values[logits_BTV[..., symbols.values].argmax(-1)]
            counted_BT = wanted_BT != IGNORED
            right += int((best_BT == wanted_BT)[counted_BT].sum())
            total += int(counted_BT.sum())
    return right / total


@dataclass(frozen=True)
class PasskeyParts:
    """The token ids a passkey prompt is made of. `numbers` (C, n): the right number and the others, n tokens each."""

    introduction: tuple[int, ...]
    filler: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    question: tuple[int, ...]
    numbers: Tensor


def passkey_parts(tokenizer: Any, vocab_size: int, generator: torch.Generator) -> PasskeyParts:
    """Parts in words where there is a tokenizer; raw ids (single ids for the phrases, five for a number) where not."""
    if tokenizer is None:
        raw = raw_symbols(vocab_size)
        digits = raw.values[:10]
        numbers = digits[_different(len(digits), 5, generator)]
        marks = raw.keys[:3].tolist()
        return PasskeyParts(
            (marks[0],), tuple(raw.filler[:16].tolist()), (marks[1],), (marks[2],), (marks[1],), numbers
        )

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    start = tuple(tokenizer("a")["input_ids"])
    bos = start[:1] if start and start[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else ()
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for _ in range(1000):  # numbers of five digits, until ten different ones have as many tokens
        number = ids(" " + str(int(torch.randint(10000, 100000, (), generator=generator))))
        same = by_length.setdefault(len(number), [])
        if number not in same:
            same.append(number)
        if len(same) == CANDIDATES:
            introduction, numbers = bos + ids(INTRODUCTION), torch.tensor(same)
            return PasskeyParts(introduction, ids(FILLER), ids(BEFORE), ids(AFTER), ids(QUESTION), numbers)
    raise DataError("this tokenizer does not tell numbers apart, so no passkey can be asked for")


def _different(base: int, digits: int, generator: torch.Generator) -> Tensor:
    """CANDIDATES different rows of digits."""
    codes = torch.randperm(base**digits, generator=generator)[:CANDIDATES]
    return torch.stack([codes // base**i % base for i in range(digits)], 1)


def passkey_prompt(parts: PasskeyParts, length: int, depth: float) -> Tensor:
    """A prompt of exactly `length` tokens with the right number near `depth` (0 begin, 1 end) of the filler.

    Raises DataError where `length` leaves no room.
    """
    needle = (*parts.before, *parts.numbers[0].tolist(), *parts.after)
    room = length - len(parts.introduction) - len(needle) - len(parts.question)
    if room < 0:
        raise DataError(f"a passkey prompt needs at least {length - room} tokens, got {length}")
    filler = (parts.filler * (room // len(parts.filler) + 1))[:room]
    period = len(parts.filler)
    at = min(round(depth * room / period), room // period) * period  # between two rounds of the filler
    return torch.tensor([*parts.introduction, *filler[:at], *needle, *filler[at:], *parts.question])


def passkey_scores(
    model: Any, length: int, *, tokenizer: Any = None, examples: int = 4, seed: int = 0
) -> dict[str, float]:
    """{"exact", "choice"}: shares of prompts answered; see the module docstring. Depths are spread evenly.

    One prompt is read once; each of the ten numbers goes on from a copy of its state.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = choice = 0
    with evaluating(model):
        for i in range(examples):
            parts = passkey_parts(tokenizer, model.config.vocab_size, generator)
            depth = (i + float(torch.rand((), generator=generator))) / examples
            prompt_L = passkey_prompt(parts, length, depth)
            logp_C, greedy = _continue_with(model, prompt_L, parts.numbers)
            exact += greedy
            choice += bool((logp_C[0] > logp_C[1:]).all())
    return {"exact": exact / examples, "choice": choice / examples}


def _continue_with(model: Any, prompt_L: Tensor, numbers_Cn: Tensor) -> tuple[Tensor, bool]:
    """Log-probabilities of the numbers after the prompt, and whether the first is the greedy continuation."""
    out = model(prompt_L[None].to(model.device), use_cache=True, logits_to_keep=1)
    logp_C, greedy = [], False
    for i, number_n in enumerate(numbers_Cn.to(model.device)):
        logits_nV = out.logits[0, -1:]
        if len(number_n) > 1:
            cache = copy.deepcopy(out.past_key_values)
            more = model(number_n[None, :-1], past_key_values=cache, use_cache=True).logits[0]
            logits_nV = torch.cat([logits_nV, more])
        logp_nV = F.log_softmax(logits_nV.float(), -1)
        logp_C.append(logp_nV.gather(1, number_n[:, None]).sum())
        if i == 0:
            greedy = bool((logp_nV.argmax(-1) == number_n).all())
    return torch.stack(logp_C).cpu(), greedy


def usable_lengths(length: int, scales: Sequence[int], limit: int | None) -> list[int]:
    """`length` times each scale, without those beyond `limit`."""
    return [length * s for s in scales if limit is None or length * s <= limit]
