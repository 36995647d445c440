"""Recall tasks: well-formed, and scored right for a model that looks things up and for one that knows nothing."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zoo.config import ZooConfig
from zoo.errors import DataError
from zoo.models.heads import TASK_CLASSES
from zoo.text import byte_tokenizer
from zoo.train.tasks import (
    AFTER,
    BEFORE,
    QUESTION,
    Symbols,
    _continue_with,
    mqar_accuracy,
    mqar_batch,
    passkey_parts,
    passkey_prompt,
    passkey_scores,
    raw_symbols,
    symbols,
    usable_lengths,
    word_symbols,
)


class Lookup(nn.Module):
    """After a token that came before, predicts what followed the longest and latest match of the text's end."""

    def __init__(self, vocab_size: int, knows: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.device, self.knows = torch.device("cpu"), knows

    def forward(self, input_ids, past_key_values=None, use_cache=False, logits_to_keep=0):
        text_BS = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        B, L = input_ids.shape
        logits = torch.zeros(B, L, self.config.vocab_size)
        if self.knows:
            for b, text in enumerate(text_BS.tolist()):
                for i in range(L if not logits_to_keep else min(L, logits_to_keep)):
                    end = len(text) - i
                    logits[b, L - 1 - i, self.predict(text[:end])] = 10.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], past_key_values=text_BS)

    @staticmethod
    def predict(text: list[int]) -> int:
        best, after = 0, 0
        for i in range(len(text) - 2, -1, -1):
            n = 0
            while n <= i and n < 12 and text[i - n] == text[-1 - n]:
                n += 1
            if n > best:
                best, after = n, text[i + 1]
        return after


def words_tokenizer(words):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["[UNK]", *words])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")))


@pytest.mark.parametrize("spread", [False, True])
def test_mqar_batches_are_well_formed(spread):
    raw = raw_symbols(256)
    ids_BL, labels_BL = mqar_batch(6, 96, symbols=raw, pairs=8, queries=5, spread=spread, seed=1)
    assert ids_BL.shape == labels_BL.shape == (6, 96)
    for ids, labels in zip(ids_BL.tolist(), labels_BL.tolist(), strict=True):
        keys, values = ids[:16:2], ids[1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert set(keys) <= set(raw.keys.tolist())
        assert set(values) <= set(raw.values.tolist())
        asked = [i for i, label in enumerate(labels) if label != -100]
        assert len(asked) == 5
        assert len({ids[i - 1] for i in asked}) == 5  # every key is asked for once
        for i in asked:
            assert labels[i] == ids[i] == dict(zip(keys, values, strict=True))[ids[i - 1]]
        assert asked[0] > 16
        between = [ids[i] for i in range(16, 96) if i not in asked and i + 1 not in asked]
        assert set(between) <= set(raw.filler.tolist())
        if not spread:
            assert asked == [87, 89, 91, 93, 95]
    places = {tuple((row != -100).nonzero()[:, 0].tolist()) for row in labels_BL}
    assert (len(places) > 1) == spread


def test_mqar_spread_reaches_every_place():
    _, labels_BL = mqar_batch(400, 24, symbols=64, pairs=4, queries=2, spread=True)
    assert ((labels_BL != -100).any(0).nonzero()[:, 0] == torch.arange(9, 24)).all()


def test_mqar_with_punctuation_and_running_text():
    made = Symbols(torch.arange(10, 20), torch.arange(20, 30), torch.tensor([1, 2, 3]), True, link=(4,), end=(5, 6))
    ids_BL, labels_BL = mqar_batch(3, 64, symbols=made, pairs=4, queries=2, spread=True)
    for ids, labels in zip(ids_BL.tolist(), labels_BL.tolist(), strict=True):
        units = [ids[i : i + 5] for i in (0, 5, 10, 15)]
        assert all((u[1], *u[3:]) == (4, 5, 6) and 10 <= u[0] < 20 <= u[2] < 30 for u in units)
        asked = [i for i, label in enumerate(labels) if label != -100]
        assert [ids[i - 2 : i + 3] in units for i in asked] == [True, True]
        inside = {j for i in asked for j in range(i - 2, i + 3)}
        assert {ids[i] for i in range(20, 64) if i not in inside} <= {1, 2, 3}
    assert mqar_accuracy(Lookup(32), 80, symbols=made, pairs=8, examples=2) == 1.0
    end = mqar_batch(1, 64, symbols=made, pairs=4)[1][0]
    assert (end != -100).nonzero()[:, 0].tolist() == [46, 51, 56, 61]


def test_mqar_is_seeded():
    first, again = (mqar_batch(2, 64, symbols=128, pairs=4, seed=5)[0] for _ in range(2))
    other = mqar_batch(2, 64, symbols=128, pairs=4, seed=6)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(mqar_batch(2, 64, symbols=128, pairs=4, seed=generator)[0], first)
    assert not torch.equal(mqar_batch(2, 64, symbols=128, pairs=4, seed=generator)[0], first)


def test_mqar_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="need 64 tokens, got 63"):
        mqar_batch(1, 63, symbols=256)
    with pytest.raises(DataError, match="pairs <= 12"):
        mqar_batch(1, 64, symbols=32, pairs=13)
    with pytest.raises(DataError, match="at least 16 ids, got 8"):
        raw_symbols(8)


def test_mqar_labels_are_those_of_a_causal_lm():
    """The loss of a model on a batch is the loss at the repeated keys only."""
    model = TASK_CLASSES["causal-lm"](ZooConfig())
    ids_BL, labels_BL = mqar_batch(3, 64, symbols=256, pairs=4, spread=True)
    with torch.no_grad():
        out = model(ids_BL, labels=labels_BL)
    logp = out.logits[:, :-1].log_softmax(-1).gather(-1, ids_BL[:, 1:, None])[..., 0]
    assert float(out.loss) == pytest.approx(-float(logp[labels_BL[:, 1:] != -100].mean()), rel=1e-5)


def test_who_looks_up_recalls_everything_and_who_guesses_is_at_chance():
    assert mqar_accuracy(Lookup(256), 128, symbols=256, examples=4) == 1.0
    chance = mqar_accuracy(Lookup(256, knows=False), 128, symbols=Symbols(*torch.arange(1, 49).split(16)), examples=64)
    assert chance == pytest.approx(1 / 16)  # always the first of 16 values, each asked for once in a sequence
    assert passkey_scores(Lookup(256), 200, examples=6) == {"exact": 1.0, "choice": 1.0}
    guess = passkey_scores(Lookup(256, knows=False), 200, examples=6)
    assert guess == {"exact": 0.0, "choice": 0.0}  # ties are not won


def test_a_guesser_wins_one_choice_in_ten():
    class Noise(Lookup):
        def forward(self, input_ids, **kwargs):
            out = super().forward(input_ids, **kwargs)
            out.logits = torch.randn(out.logits.shape, generator=self.generator)
            return out

    noise = Noise(64, knows=False)
    noise.generator = torch.Generator().manual_seed(0)
    scores = passkey_scores(noise, 32, examples=300)
    assert scores["exact"] < 0.02
    assert 0.05 < scores["choice"] < 0.16


def test_every_number_goes_on_from_the_prompt():
    """Log-probabilities from a carried state are those of prompt and number in one piece."""
    model = TASK_CLASSES["causal-lm"](ZooConfig(initializer_range=0.3)).eval()
    prompt_L, numbers_Cn = torch.randint(256, (20,)), torch.randint(256, (10, 5))
    with torch.no_grad():
        logp_C, greedy = _continue_with(model, prompt_L, numbers_Cn)
        whole = torch.cat([prompt_L.expand(10, -1), numbers_Cn], 1)
        direct = model(whole).logits[:, 19:-1].log_softmax(-1).gather(-1, numbers_Cn[..., None]).sum((1, 2))
        best_n = model.generate(prompt_L[None], max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 20:]
        assert _continue_with(model, prompt_L, best_n[None])[1]
    torch.testing.assert_close(logp_C, direct, rtol=1e-4, atol=1e-4)
    assert not greedy


def test_passkeys_in_text():
    tokenizer = byte_tokenizer()
    parts = passkey_parts(tokenizer, 256, torch.Generator().manual_seed(0))
    assert parts.numbers.shape == (10, 6)
    assert len({tuple(n) for n in parts.numbers.tolist()}) == 10
    number = tokenizer.decode(parts.numbers[0])
    assert re.fullmatch(r" [1-9]\d{4}", number)
    for depth in (0.0, 0.5, 1.0):
        ids = passkey_prompt(parts, 500, depth)
        text = tokenizer.decode(ids)
        assert len(ids) == 500
        assert text.endswith(QUESTION)
        assert text.count(number) == 1
        assert f"{BEFORE}{number}{AFTER}" in text
    places = [tokenizer.decode(passkey_prompt(parts, 500, d)).index(number) for d in (0.0, 0.5, 1.0)]
    assert places == sorted(places)
    assert places[2] - places[0] > 80
    with pytest.raises(DataError, match="at least"):
        passkey_prompt(parts, 50, 0.5)
    assert passkey_scores(Lookup(256), 300, tokenizer=tokenizer, examples=2) == {"exact": 1.0, "choice": 1.0}


def test_a_prompt_begins_as_the_tokenizer_begins_its_texts():
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert passkey_parts(tokenizer, 257, torch.Generator()).introduction[0] != 256
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    parts = passkey_parts(tokenizer, 257, torch.Generator())
    assert parts.introduction[0] == 256
    assert 256 not in (*parts.introduction[1:], *parts.filler, *parts.question)


def test_a_tokenizer_without_numbers_is_refused():
    with pytest.raises(DataError, match="does not tell numbers apart"):
        passkey_parts(words_tokenizer(["sea"]), 16, torch.Generator())


def test_symbols_are_common_words_of_one_token():
    letters = [f"{a}{b}{c}st" for a in "abcdefgh" for b in "abcdefgh" for c in "abcdefgh"]
    tokenizer = words_tokenizer(["ab", "##cd", "9", *letters])
    made = word_symbols(tokenizer, number=20)
    everything = torch.cat([made.keys, made.values]).tolist()
    assert len(set(everything)) == 40
    assert sorted(tokenizer.convert_ids_to_tokens(everything)) == letters[:40]
    marked = words_tokenizer([*letters, *(f"Ġ{word}" for word in letters)])
    assert all(t.startswith("Ġ") for t in marked.convert_ids_to_tokens(word_symbols(marked, number=20).keys.tolist()))
    with pytest.raises(DataError, match="128 words"):
        word_symbols(byte_tokenizer())
    assert torch.equal(symbols(byte_tokenizer(), 300).values, raw_symbols(256).values)
    assert torch.equal(symbols(None, 300).values, raw_symbols(300).values)


def test_lengths_end_where_positions_do():
    assert usable_lengths(512, (1, 2, 4), None) == [512, 1024, 2048]
    assert usable_lengths(512, (1, 2, 4), 1024) == [512, 1024]
