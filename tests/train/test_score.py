"""Scores against direct computations in float64, and what a score looks like."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from zoo.config import ZooConfig
from zoo.errors import ConfigError, DataError
from zoo.models.heads import TASK_CLASSES
from zoo.text import byte_tokenizer
from zoo.train.evaluation import (
    Ablated,
    buckets,
    compare,
    evaluating,
    greedy_agreement,
    masked_positions,
)
from zoo.train.measure import measure_speed, state_bytes_at
from zoo.train.score import ROW_KEYS, Score, score

ATTENTION = {"name": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
WINDOW = {"name": "sliding_window", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 8, "sinks": 2}
BRANCHES = {**WINDOW, "name": "windowed_linear", "linear": {"name": "linear_attention"}, "gate_init": 0.0}


def tiny(mixer, seed=0, **values):
    torch.manual_seed(seed)
    causal = values.get("task", "causal-lm") == "causal-lm"
    mixer = {**mixer, "causal": causal, "rotary": {}}
    layers = [{"mixer": mixer, "ffn": {"name": "mlp", "hidden_size": 64}}] * 2
    config = ZooConfig(hidden_size=32, initializer_range=0.3, layers=layers, **values)
    return TASK_CLASSES[config.task](config).eval()


@pytest.fixture(scope="module")
def teacher():
    return tiny(ATTENTION)


@pytest.fixture(scope="module")
def student():
    return tiny(WINDOW, seed=1)


@pytest.fixture(scope="module")
def rows_NL():
    return torch.randint(1, 256, (5, 96), generator=torch.Generator().manual_seed(3))


def test_a_model_is_its_own_equal(teacher, rows_NL):
    c = compare(teacher, {"same": teacher}, rows_NL)["same"]
    assert (c.kl, c.top1) == (0.0, 1.0)
    assert greedy_agreement(teacher, {"same": teacher}, rows_NL[:, :8], tokens=12) == {"teacher": 12.0, "same": 12.0}


def test_numbers_are_those_of_a_direct_float64_computation(teacher, student, rows_NL, monkeypatch):
    monkeypatch.setattr("zoo.train.evaluation.LOGITS_AT_ONCE", 256 * 37)  # slices that divide nothing
    got = compare(teacher, {"s": student}, rows_NL, batch_tokens=200)
    with torch.no_grad():
        logp = F.log_softmax(teacher.double()(rows_NL).logits[:, :-1], -1)
        logq = F.log_softmax(student.double()(rows_NL).logits[:, :-1], -1)
    teacher.float(), student.float()
    kl_NP = (logp.exp() * (logp - logq)).sum(-1)
    nll_NP = -logq.gather(-1, rows_NL[:, 1:, None])[..., 0]
    assert got["s"].kl == pytest.approx(float(kl_NP.mean()), rel=1e-5)
    assert got["s"].kl > 0.01
    assert got["s"].top1 == pytest.approx(float((logp.argmax(-1) == logq.argmax(-1)).double().mean()))
    assert got["s"].perplexity == pytest.approx(math.exp(float(nll_NP.mean())), rel=1e-5)
    assert got["s"].tokens == 5 * 95
    assert got["s"].kl_standard_error == pytest.approx(float(kl_NP.mean(1).std() / 5**0.5), rel=1e-4)
    # position p predicts the token at p + 1
    assert got["s"].by_position("kl")["64-96"] == pytest.approx(float(kl_NP[:, 63:].mean()), rel=1e-5)


def test_perplexity_is_exp_of_the_models_own_loss(student, teacher, rows_NL):
    with torch.no_grad():
        loss = student(rows_NL, labels=rows_NL).loss
    assert compare(teacher, {"s": student}, rows_NL)["s"].perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_position_buckets_average_back_to_the_total(teacher, student, rows_NL):
    c = compare(teacher, {"s": student}, rows_NL)["s"]
    counts = {"0-64": 63, "64-96": 32}
    parts = c.by_position("perplexity")
    assert list(parts) == list(counts)
    mean = sum(n * math.log(parts[b]) for b, n in counts.items()) / 95
    assert mean == pytest.approx(c.nll, rel=1e-9)
    assert sum(n * c.by_position("top1")[b] for b, n in counts.items()) / 95 == pytest.approx(c.top1)
    assert buckets(3000) == [(0, 64), (64, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 3000)]


def test_padded_vocabularies_are_compared_on_the_shared_tokens(teacher, rows_NL):
    padded = tiny(ATTENTION, vocab_size=320)
    with torch.no_grad():
        for name, value in teacher.state_dict().items():
            padded.state_dict()[name][: len(value)].copy_(value)
    tokenizer = byte_tokenizer()
    assert compare(teacher, {"s": padded}, rows_NL, tokenizer=tokenizer)["s"].kl == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(ConfigError, match=r"teacher 256, s 320"):
        compare(teacher, {"s": padded}, rows_NL)
    with pytest.raises(DataError, match="token id 300"):
        compare(teacher, {"s": teacher}, torch.full((1, 8), 300))


def test_greedy_agreement_counts_tokens_until_the_texts_part(teacher, student, rows_NL):
    """Against writing both continuations out."""
    prompt_BP = rows_NL[:, :8]
    got = greedy_agreement(teacher, {"s": student}, prompt_BP, tokens=12)
    texts = [
        m.generate(prompt_BP, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)[:, 8:]
        for m in (teacher, student)
    ]
    expected = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), 12) for pair in zip(*texts, strict=True)
    ]
    assert got["s"] == pytest.approx(sum(expected) / len(expected))
    end_id = int(texts[0][0, 2])
    first = [next((i + 1 for i, token in enumerate(text) if token == end_id), 12) for text in texts[0]]
    with_end = greedy_agreement(teacher, {"s": teacher}, prompt_BP, tokens=12, end_id=end_id)
    assert with_end["teacher"] == with_end["s"] == pytest.approx(sum(first) / len(first))
    assert min(first) <= 3


def test_a_masked_lm_is_scored_on_what_was_masked():
    class Tokenizer:
        mask_token_id, all_special_ids = 255, [0, 255]

    teacher, student = (tiny(ATTENTION, seed=s, task="masked-lm") for s in (0, 1))
    rows_NL = torch.randint(1, 255, (3, 40), generator=torch.Generator().manual_seed(0))
    rows_NL[:, 0] = 0
    c = compare(teacher, {"s": student}, rows_NL, tokenizer=Tokenizer())["s"]
    masked_NL = masked_positions(rows_NL, [0, 255])
    assert masked_NL.sum(1).tolist() == [6, 6, 6]
    assert not masked_NL[:, 0].any()
    few = masked_positions(torch.tensor([[0] * 38 + [7, 255]]), [0, 255])  # fewer tokens than would be masked
    assert few.nonzero()[:, 1].tolist() == [38]
    inputs = rows_NL.masked_fill(masked_NL, 255)
    with torch.no_grad():
        loss = student(inputs, labels=rows_NL.masked_fill(~masked_NL, -100)).loss
        logp, logq = (F.log_softmax(m(inputs).logits[masked_NL].double(), -1) for m in (teacher, student))
    assert c.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert c.kl == pytest.approx(float((logp.exp() * (logp - logq)).sum(-1).mean()), rel=1e-5)
    with pytest.raises(DataError, match="mask token"):
        compare(teacher, {"s": student}, rows_NL)


def test_state_bytes_are_those_counted_by_hand(teacher, student):
    counter = 8  # a layer may count its positions as well
    assert 0 <= state_bytes_at(teacher, 512) - 2 * (2 * 2 * 8 * 512 * 4) <= 2 * counter
    assert 0 <= state_bytes_at(tiny(ATTENTION).bfloat16(), 512) - 2 * (2 * 2 * 8 * 512 * 2) <= 2 * counter
    # a window of 8 carries 7 positions, the eighth is the new one; and two sinks
    assert 0 <= state_bytes_at(student, 512) - 2 * (2 * 2 * 8 * (7 + 2) * 4) <= 2 * counter
    assert state_bytes_at(student, 2048) == state_bytes_at(student, 64)
    assert state_bytes_at(tiny(ATTENTION, task="masked-lm"), 8) is None


@pytest.mark.parametrize("mixer", [ATTENTION, WINDOW, BRANCHES])
def test_state_bytes_are_those_of_a_cache_after_a_prefill(mixer):
    from zoo.models.state import state_bytes

    model = tiny(mixer, positions="learned", max_position_embeddings=64)
    with torch.no_grad():
        cache = model(torch.ones(1, 50, dtype=torch.long), use_cache=True).past_key_values
    assert state_bytes_at(model, 50) == state_bytes(cache)
    assert state_bytes_at(model, 65) is None


def test_speed_is_measured_at_each_length_a_model_takes(teacher):
    short = tiny(ATTENTION, positions="learned", max_position_embeddings=64)
    calls = []
    hook = teacher.register_forward_pre_hook(lambda m, args, kwargs: calls.append(args[0].shape[1]), with_kwargs=True)
    times = measure_speed({"a": teacher, "b": short}, (32, 80), steps=4, piece=16)
    hook.remove()
    assert list(times["a"].decode_tokens_per_s()) == [32, 80]
    assert list(times["b"].decode_tokens_per_s()) == [32]
    assert all(v > 0 for v in times["a"].prefill_tokens_per_s().values())
    assert len(times["a"].steps_at[80]) == 4
    # warm-up, two pieces, seven steps, then what is missing to 80 in pieces, seven steps: nothing is read twice
    assert calls == [16, 1, 16, 16, *[1] * 7, 16, 16, 9, *[1] * 7]
    assert times["a"].prefill_at[80][0] == 73
    times["a"].steps_at, times["b"].steps_at = (
        {32: [(2.0, 1), (4.0, 1), (6.0, 1)]},
        {32: [(1.0, 1), (1.0, 1), (6.0, 1)]},
    )
    assert times["b"].decode_speedup(times["a"]) == {32: 2.0}
    assert times["a"].decode_tokens_per_s() == {32: 0.25}


def test_a_branch_that_is_switched_off_is_switched_on_again(teacher, rows_NL):
    both = tiny(BRANCHES, seed=2)
    variants = {name: Ablated(both, name) for name in ("linear", "window")}
    got = compare(teacher, {"both": both, **variants}, rows_NL)
    for mixer in (layer.mixer for layer in both.model.layers):
        assert mixer.ablate is None
        mixer.ablate = "linear"
    direct = compare(teacher, {"s": both}, rows_NL)["s"]
    for mixer in (layer.mixer for layer in both.model.layers):
        mixer.ablate = None
    assert got["linear"].kl == direct.kl
    assert len({got["both"].kl, got["linear"].kl, got["window"].kl}) == 3


def test_evaluation_leaves_training_flags_alone(student):
    student.train()
    student.model.layers[0].eval()
    with evaluating(student):
        assert not student.training
    assert student.training
    assert not student.model.layers[0].training
    student.eval()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """One score with every row, of text, saved."""
    models = {"teacher": tiny(ATTENTION), "untrained": tiny(BRANCHES, seed=1)}
    models |= {"student": tiny(BRANCHES, seed=2), "window_baseline": tiny(WINDOW, seed=3)}
    folder = tmp_path_factory.mktemp("score")
    text = ["".join(chr(97 + (i * i * j) % 26) for i in range(900)) for j in range(1, 9)]
    result = score(
        models["student"],
        **{role: model for role, model in models.items() if role != "student"},
        data=text,
        tokenizer=byte_tokenizer(),
        length=128,
        tokens=512,
        lengths=(32, 64),
        scales=(1, 2),
        examples=2,
        train_info={"student": {"tokens": 1000, "cpu_seconds": 2.5}},
        out=folder,
        command="zoo score DIR",
    )
    return result, folder, models


def test_a_score_is_json_of_the_agreed_shape(full):
    result, folder, _ = full
    values = json.loads((folder / "score.json").read_text())
    assert values == result.to_json()
    assert {"rows", "data", "command", "versions", "machine"} <= set(values)
    assert [row["role"] for row in values["rows"]] == ["teacher", "untrained", "student", "window_baseline"]
    for row in values["rows"]:
        assert set(row) == set(ROW_KEYS)
        assert set(row["state_bytes"]) == {"32", "64"}
        assert set(row["mqar"]) == {"128", "256"}
        assert set(row["passkey"]) == set(row["passkey_choice"]) == {"256"}  # 128 bytes are too few for the prompt
        assert row["perplexity"] > 1
        assert set(row["perplexity_by_position"]) == {"0-64", "64-128"}
    by_role = {row["role"]: row for row in values["rows"]}
    assert by_role["teacher"]["kl"] == 0
    assert by_role["teacher"]["branches"] is None
    assert set(by_role["student"]["branches"]) == {"tokens", "both_on", "linear_off", "window_off"}
    assert by_role["untrained"]["decode_tokens_per_s"] is None  # not timed, so not claimed
    for key in ("decode_tokens_per_s", "decode_speedup", "prefill_tokens_per_cpu_s"):
        assert set(by_role["student"][key]) == {"32", "64"}
    assert (by_role["student"]["train_tokens"], by_role["student"]["train_cpu_seconds"]) == (1000, 2.5)
    assert by_role["window_baseline"]["train_tokens"] is None
    assert by_role["student"]["parameters"] == by_role["untrained"]["parameters"] > 0
    assert (values["data"]["rows"], values["data"]["rows_from"]) == (4, "documents")
    assert values["command"] == "zoo score DIR"
    assert ["passkey prompt needs at least" in note for note in values["notes"]] == [True]
    assert Score.load(folder).to_json() == values


def test_rows_hold_what_compare_measures(full):
    result, _, models = full
    data = result.data
    from zoo.text import sample_tokens

    text = ["".join(chr(97 + (i * i * j) % 26) for i in range(900)) for j in range(1, 9)]
    rows_NL = sample_tokens(text, byte_tokenizer(), tokens=512, length=128, whole_documents=True)
    assert rows_NL.numel() == data["tokens"]
    direct = compare(models["teacher"], {"s": models["student"]}, rows_NL)["s"]
    assert result.row("student")["kl"] == pytest.approx(direct.kl)
    assert result.row("student")["perplexity"] == pytest.approx(direct.perplexity)


def test_the_table_and_the_pictures(full):
    from io import StringIO

    from rich.console import Console

    result, folder, _ = full
    console = Console(file=StringIO(), width=200)
    result.table(console)
    text = console.file.getvalue()
    for word in ("perplexity", "window baseline", "linear off", "decoding at 64", f"{result.row('student')['kl']:.4f}"):
        assert word in text
    pytest.importorskip("matplotlib")
    for name in ("by_position.png", "by_length.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_there_is_a_note_and_no_picture(full, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = Score(rows=full[0].rows)
    assert [path.name for path in result.save(tmp_path)] == ["score.json"]
    assert "matplotlib" in result.notes[0]


def test_tradeoff_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from zoo.train.plots import tradeoff_plot

    points = [{"keep": k, "kl": 0.3 / (1 + k), "trained": t, "label": "x"} for k in (0, 6, 10) for t in (False, True)]
    assert tradeoff_plot(points, tmp_path / "a" / "t.png", layers=30).stat().st_size > 5000
    with pytest.raises(DataError, match="'kl'"):
        tradeoff_plot([{"keep": 1, "trained": True, "label": "x"}], tmp_path / "t.png")


def test_bad_input_is_refused_with_what_is_needed(teacher, student, tmp_path):
    short = ["word " * 20]
    with pytest.raises(DataError, match=r"3 rows of 64 tokens \(192 in all\).*has 1; .*tokens=64"):
        score(student, teacher=teacher, data=short, tokenizer=byte_tokenizer(), length=64, tokens=192)
    with pytest.raises(DataError, match="no tokenizer"):
        score(student, teacher=teacher, data=short)
    with pytest.raises(ConfigError, match="'masked-lm' model"):
        score(tiny(ATTENTION, task="masked-lm"), teacher=teacher, data=torch.ones(2, 8, dtype=torch.long))
    other = tiny(ATTENTION, task="sequence-classification")
    with pytest.raises(ConfigError, match="no score for task 'sequence-classification'"):
        score(other, teacher=other, data=torch.ones(2, 8, dtype=torch.long))
    with pytest.raises(ConfigError, match="dtype must be one of"):
        score(student, teacher=teacher, data=torch.ones(2, 8, dtype=torch.long), dtype="int4")
    with pytest.raises(DataError, match="integers of shape"):
        score(student, teacher=teacher, data=torch.ones(2, 8))
    student.tokenizer = byte_tokenizer()
    other = byte_tokenizer()
    other.add_tokens(["zebra"])
    with pytest.raises(ConfigError, match=r"different tokenizers.*'zebra'"):
        score(student, teacher=teacher, data=short, tokenizer=other)
    del student.tokenizer
    (tmp_path / "score.json").write_text("[1]")
    with pytest.raises(DataError, match="not a score"):
        Score.load(tmp_path)


def test_numbers_that_are_not_finite_are_null():
    assert Score(rows=[{"role": "student", "kl": math.inf, "mqar": {512: math.nan}}]).to_json()["rows"] == [
        {"role": "student", "kl": None, "mqar": {"512": None}}
    ]
