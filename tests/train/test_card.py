"""A card says what was measured, of the weights beside it, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from tiny_runs import make_student, make_teacher

import zoo
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.hub.weights import weights_hash
from zoo.train.card import card, read_score, render, verify_card
from zoo.train.card_facts import Facts, found_facts
from zoo.train.card_tasks import ABSENT, CARD_TASKS, NONE, CardTask, number, tables
from zoo.train.score import score


def row(role, **values):
    return {"name": f"the {role}", "role": role, **values}


SCORE = {
    "rows": [
        row(
            "teacher",
            perplexity=29.01,
            kl=0.0,
            top1=1.0,
            state_bytes={"512": 2**21, "8192": 2**25},
            parameters=134515008,
        ),
        row(
            "student",
            perplexity=29.5,
            kl=0.0625,
            kl_standard_error=0.002,
            top1=0.861,
            state_bytes={"512": 2**20, "8192": 2**22},
            decode_tokens_per_s=None,
            mixers={"attention": 6, "windowed_linear": 24},
            train_tokens=30700,
            train_cpu_seconds=300.4,
            passkey={"512": 0.5},
        ),
    ],
    "data": {"source": "reviews/*.csv", "tokens": 20480, "length": 512},
    "command": "zoo score DIR --data 'reviews/*.csv'",
    "versions": {"zoo": "0.1.0"},
    "machine": {"cpu": "A CPU", "threads": 2, "cores": 2, "dtype": "float32"},
}
FACTS = {
    "title": "smol",
    "repo": "org/smol",
    "teacher": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "teacher_revision": "7e27bd9f95328f0f3b08261d1252705110c806f8",
    "teacher_license": "apache-2.0",
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
    "data": "movie reviews, half of them",
    "datasets": ["org/reviews"],
    "stages": [
        {"name": "align", "tokens": 10000, "cpu_seconds": 90.123456},
        {"name": "distill", "tokens": 20700, "lr": 3e-4},
    ],
    "seed": 7,
    "gpu_seconds": 12.4,
    "commit": "0123abc",
    "command": "zoo demo --out DIR",
    "tags": ["english"],
    "limits": ["It is small."],
}


def text_of(values, **facts):
    return render(values, Facts.parse(facts))


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_is_filled_from_what_was_measured_and_recorded():
    text = render(SCORE, Facts.parse(FACTS), ["by_length.png"])
    body = text.split("---\n")[2]
    found = front(text)
    assert (found["license"], found["datasets"]) == ("apache-2.0", ["org/reviews"])
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (found["library_name"], found["pipeline_tag"]) == ("zoo", "text-generation")
    assert found["tags"] == ["english", "zoo", "distillation", "windowed_linear"]
    for part in (
        "# smol",
        'zoo.create_model("hf-hub:org/smol")',
        'from_pretrained("org/smol")',
        "6 of 30 layers are `attention`, 24 of 30 layers are `windowed_linear`",
        "0.062 nats",
        "86.1 %",
        "After 8192 tokens its state has 0.12x the bytes",
        "| perplexity | 29.01 | 29.50 |",
        "| KL to the teacher, nats | 0.0000 | 0.0625 ± 0.0020 |",
        "| passkey, 512 | not measured | 50.0 % |",
        "1.00 MiB",
        "134.5 M",
        "| align | 10000 | 90.12 |  |",
        "| distill | 20700 |  | 0.0003 |",
        "Seed: 7",
        "GPU-seconds: 12",
        "Commit of zoo: 0123abc",
        "Revision of the teacher: 7e27bd9f95328f0f3b08261d1252705110c806f8",
        "Licence of the teacher: apache-2.0",
        "zoo demo --out DIR",
        "zoo score DIR --data",
        "A CPU, 2 threads",
        "(by_length.png)",
        "It is small.",
        "not compared with a sliding window",
        "was not recorded when they were measured",
    ):
        assert part in body, part
    for part in ("by_position.png", "decoding at", "MQAR", "Recall over long distances", "writes"):
        assert part not in body, part
    for leftover in ("$", "None", "nan", "{", "}"):
        assert leftover not in text
    assert "\n\n\n" not in text


def test_a_card_says_first_whose_numbers_are_not_known():
    before = "was not recorded when they were measured"
    assert before in text_of(SCORE).split("## Load")[0]
    named = {**SCORE, "rows": [SCORE["rows"][0], {**SCORE["rows"][1], "weights_sha256": "0" * 64}]}
    assert before not in text_of(named)
    assert "0" * 64 in text_of(named)


def test_none_takes_a_fact_away():
    facts = Facts(title="a", limits=["It is small."], seed=0)
    assert facts.updated({"limits": None, "title": None}).known() == {"seed": 0}


def test_results_are_in_the_form_that_the_hub_reads():
    from huggingface_hub import ModelCardData, parse_eval_result_entries

    from zoo.train.card import eval_results

    parsed = ModelCardData(**front(text_of(SCORE, title="smol")))
    assert {(r.metric_type, r.metric_value, r.dataset_type) for r in parsed.eval_results} == {
        ("perplexity", 29.5, "unknown"), ("kl", 0.0625, "unknown"), ("agreement", 0.861, "unknown"),
    }  # fmt: skip
    assert parsed.model_name == "smol"
    assert eval_results(SCORE, Facts()) is None
    benchmark = {**SCORE, "data": {**SCORE["data"], "source": "hf:org/bench:test"}, "date": "2026-11-22T12:00:00+00:00"}
    (entry,) = parse_eval_result_entries(yaml.safe_load(eval_results(benchmark, Facts(benchmark_task="text"))))
    assert (entry.dataset_id, entry.task_id, entry.value, entry.date) == (
        "org/bench", "text", 29.5, "2026-11-22T12:00:00+00:00",
    )  # fmt: skip
    assert "Perplexity" in entry.notes
    with pytest.raises(ConfigError, match="needs a score of a data set on the Hub"):
        eval_results(SCORE, Facts(benchmark_task="text"))


def test_a_card_of_next_to_nothing_claims_nothing():
    text = text_of({"rows": [row("student")]})
    assert "$" not in text
    assert "None" not in text
    assert "Recall over long distances was not measured." in text
    assert "The command was not recorded." in text
    assert set(front(text)) == {"library_name", "pipeline_tag", "tags"}
    assert not any(character.isdigit() for character in text.split("## Score")[1].split("## Reproduce")[0])


def test_a_card_says_where_the_window_wins():
    window = row("window_baseline", kl=0.05)
    text = text_of({**SCORE, "rows": [*SCORE["rows"], window]})
    assert "A sliding window of equal state bytes does as well or better on this text (KL 0.050 against 0.062)" in text
    better = text_of({**SCORE, "rows": [*SCORE["rows"], {**window, "kl": 0.09}]})
    assert "does as well" not in better
    assert "It was not compared" not in better


def test_tables_leave_out_what_nobody_measured():
    made = {title.split(" ")[0]: (header, lines) for title, header, lines in tables(SCORE)}
    assert set(made) == {"Quality", "Recall", "Cost"}
    header, lines = made["Cost"]
    assert header == ["", "teacher", "student"]
    assert lines == [
        ["state at 512", "2.00 MiB", "1.00 MiB"],
        ["state at 8192", "32.00 MiB", "4.00 MiB"],
        ["parameters", "134.5 M", ABSENT],
        ["distilled on, tokens", NONE, "30.7 k"],
        ["distilled for, CPU-seconds", NONE, "300"],
    ]
    fast = [row("teacher", decode_tokens_per_s={"8": 10.0}), row("student", decode_tokens_per_s={"8": 15.0})]
    assert tables({"rows": fast})[0][2] == [["decoding at 8, tokens/s", "10.0", "15.0 (1.50x)"]]
    assert tables({"rows": [row("student")]}) == []


def test_a_card_of_a_sentence_encoder_says_what_such_a_score_holds():
    quality = {"cosine": 0.9812, "cosine_standard_error": 0.0007, "spearman": 0.95, "neighbour": 0.873}
    student = row("student", **quality, cosine_by_length={"1-16": 0.99}, mixers={"longformer": 6})
    values = {"rows": [student], "data": {"rows": 7, "tokens": 99, "length": 128, "rows_from": "texts"}}
    text = text_of(values, location="runs/minilm-tiny")
    assert front(text)["pipeline_tag"] == "sentence-similarity"
    for part in (
        "the mean cosine to the teacher's embedding is 0.981",
        "a text's nearest neighbour is the one that the teacher finds 87.3 % of the time",
        "Quality on 7 held-out texts of up to 128 tokens",
        "| cosine to the teacher's embedding | 0.9812 ± 0.0007 |",
        "| cosine, 1-16 tokens | 0.9900 |",
        "| Spearman of pairwise similarities | 0.9500 |",
        "| same nearest neighbour | 87.3 % |",
        "texts of at most 128 tokens",
        'AutoTokenizer.from_pretrained("runs/minilm-tiny")',
        "pooler_output",
    ):
        assert part in text, part
    for part in ("generate", "KL", "sliding window", "Recall"):
        assert part not in text, part


def test_another_task_is_one_entry(monkeypatch):
    groups = [("Accuracy on 10 images", {"accuracy": lambda row: number(row, "accuracy", digits=3)})]
    monkeypatch.setitem(CARD_TASKS, "smelling", CardTask("smell-classification", lambda score: groups))
    values = {"task": "smelling", "rows": [row("teacher", accuracy=0.9), row("student", accuracy=0.8)]}
    assert tables(values)[0][2] == [["model", "the teacher", "the student"], ["accuracy", "0.900", "0.800"]]
    assert "smell-classification" in text_of(values)
    with pytest.raises(DataError, match="no card for the task 'smeling'; did you mean 'smelling'"):
        tables({**values, "task": "smeling"})


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A student that was saved, with its score."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    teacher = make_teacher()
    student = make_student(teacher)
    student.save_pretrained(folder)
    rows_NL = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    from zoo.text import byte_tokenizer

    options = {"tokenizer": byte_tokenizer(), "speed": False, "lengths": (8,), "examples": 1, "scales": (1,)}
    score(student, teacher=teacher, data=rows_NL, out=folder, command="zoo score tiny", **options)
    return folder


@pytest.fixture
def model(scored, tmp_path):
    import shutil

    return shutil.copytree(scored, tmp_path / "tiny")


def test_a_score_and_its_card_name_the_weights(model):
    measured = weights_hash(model)
    values = read_score(model)
    assert next(r for r in values["rows"] if r["role"] == "student")["weights_sha256"] == measured
    assert values["task"] == "causal-lm"
    assert values["date"].startswith("20")
    (model / "train.json").write_text(json.dumps({"seed": 3, "data": "/home/me/text.jsonl", "command": "zoo train t"}))
    text = zoo.card(model, license="mit").read_text()
    assert text.startswith("---\nlicense: mit\n")
    for part in ("# tiny", measured, "Seed: 3", "Trained on: text.jsonl", "zoo train t\nzoo score tiny"):
        assert part in text, part
    assert "/home/me" not in text
    assert {path.name for path in model.glob("*.png")} == {"by_length.png", "by_position.png"}
    assert json.loads((model / "card.json").read_text()) == {
        "given": {"title": "tiny", "license": "mit"},
        "recorded": {"data": "text.jsonl", "seed": 3, "command": "zoo train t"},
    }
    verify_card(model)
    moved = model.rename(model.with_name("elsewhere"))
    verify_card(moved)
    assert card(moved).read_text() == text


def test_a_score_of_other_weights_is_refused(model):
    card(model)
    other = make_student(make_teacher(seed=5))
    other.save_pretrained(model)
    for refused in (card, verify_card):
        with pytest.raises(CheckpointError, match=r"score.json: was measured on other weights .*zoo score"):
            refused(model)
    values = json.loads((model / "score.json").read_text())
    for r in values["rows"]:
        r.pop("weights_sha256")
    (model / "score.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="does not say which weights"):
        card(model)


def test_shards_are_the_same_weights(model):
    card(model)
    zoo.create_model(str(model)).save_pretrained(model, max_shard_size="20KB")
    (model / "model.safetensors").unlink(missing_ok=True)
    assert len(list(model.glob("*.safetensors"))) > 1
    verify_card(model)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("README.md", "| perplexity |", "| perplexity, nearly |"),
        ("score.json", '"perplexity": ', '"perplexity": 1'),
        ("card.json", "tiny", "huge"),
        ("README.md", "zoo score tiny", "zoo score tiny\n<b>best</b>"),
    ],
)
def test_a_card_that_was_changed_is_refused(model, name, old, new):
    card(model)
    text = (model / name).read_text()
    assert old in text
    (model / name).write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=r"README.md:\d+: is not what was measured and recorded here"):
        verify_card(model)


def test_results_of_a_benchmark_lie_in_their_folder(model):
    values = json.loads((model / "score.json").read_text())
    values["data"] = {"source": "hf:org/bench"}
    (model / "score.json").write_text(json.dumps(values))
    card(model, benchmark_task="text")
    path = model / ".eval_results" / "zoo.yaml"
    assert yaml.safe_load(path.read_text())[0]["dataset"] == {"id": "org/bench", "task_id": "text"}
    verify_card(model)
    path.write_text(path.read_text().replace("value: ", "value: 1"))
    with pytest.raises(CheckpointError, match=r"zoo.yaml: is not what was measured"):
        verify_card(model)
    card(model, benchmark_task=None)
    assert not path.exists()


def test_what_is_missing_is_said_with_the_command_that_makes_it(model, tmp_path):
    with pytest.raises(DataError, match=r"no README.md in it; write it: zoo card"):
        verify_card(model)
    (model / "README.md").write_text("# Mine\n")
    with pytest.raises(CheckpointError, match="was not written by zoo card"):
        card(model)
    card(model, overwrite=True)
    (model / "score.json").unlink()
    with pytest.raises(DataError, match=r"a card says only what was measured; first: zoo score .*tiny --data FILES"):
        card(model)
    with pytest.raises(DataError, match="tinny: no such folder; did you mean 'tiny'"):
        card(tmp_path / "tinny")


def test_found_facts_are_those_of_the_run(tmp_path):
    origin = {"source": "org/teacher", "revision": "abc"}
    (tmp_path / "config.json").write_text(json.dumps({"origin": origin}))
    stages = [{"kind": "align", "first_loss": None}]
    run = {"data": "hf:org/data:train", "stages": stages, "tokens": 5, "gpu_seconds": 1.5}
    (tmp_path / "train.json").write_text(json.dumps({**run, "versions": {"zoo": "1", "commit": "c"}}))
    assert found_facts(tmp_path).known() == {
        "teacher": "org/teacher", "base_model": "org/teacher", "teacher_revision": "abc", "data": "hf:org/data:train",
        "datasets": ["org/data"], "stages": stages, "tokens": 5, "gpu_seconds": 1.5, "version": "1", "commit": "c",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"origin": {"source": "org/teacher", "revision": None}}))
    assert found_facts(tmp_path).known()["teacher"] == "teacher"  # a folder of that name, not a repository
    assert found_facts(tmp_path).base_model is None
