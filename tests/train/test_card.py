"""A card says what was measured, and nothing else."""

from __future__ import annotations

import pytest
import yaml

from zoo.errors import DataError
from zoo.train.card import ABSENT, NONE, markdown_table, tables, write_card
from zoo.train.score import Score


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
LINEAGE = {
    "teacher": "SmolLM2-135M-Instruct",
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
    "data": "movie reviews, half of them",
    "stages": [
        {"name": "align", "tokens": 10000, "cpu_seconds": 90.123456},
        {"name": "distill", "tokens": 20700, "lr": 3e-4},
    ],
    "seed": 7,
    "command": "zoo demo --out DIR",
}


def test_a_card_is_filled_from_what_was_measured(tmp_path):
    (tmp_path / "by_length.png").write_bytes(b"")
    text = write_card(tmp_path, SCORE, LINEAGE, title="smol", location="org/smol", limits=["It is small."]).read_text()
    head, body = text.split("---\n")[1:3]
    front = yaml.safe_load(head)
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (front["library_name"], front["pipeline_tag"]) == ("zoo", "text-generation")
    assert {"zoo", "windowed_linear"} <= set(front["tags"])
    for part in (
        "# smol",
        'zoo.create_model("org/smol")',
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
        "zoo demo --out DIR",
        "zoo score DIR --data",
        "A CPU, 2 threads",
        "(by_length.png)",
        "It is small.",
        "not compared with a sliding window",
    ):
        assert part in body, part
    for part in ("by_position.png", "decoding at", "MQAR", "Recall over long distances", "writes"):
        assert part not in body, part
    for leftover in ("$", "None", "nan", "{", "}"):
        assert leftover not in text
    assert "\n\n\n" not in text


def test_a_card_of_next_to_nothing_claims_nothing(tmp_path):
    text = write_card(tmp_path, {"rows": [row("student")]}, {}).read_text()
    assert "$" not in text
    assert "None" not in text
    assert "Recall over long distances was not measured." in text
    assert "The command was not recorded." in text
    assert set(yaml.safe_load(text.split("---\n")[1])) == {"library_name", "pipeline_tag", "tags"}
    assert not any(character.isdigit() for character in text.split("## Score")[1].split("## Reproduce")[0])
    with pytest.raises(DataError, match="row for the student"):
        write_card(tmp_path, {"rows": [row("teacher")]}, {})


def test_a_card_says_where_the_window_wins(tmp_path):
    window = row("window_baseline", kl=0.05)
    text = write_card(tmp_path, {"rows": [*SCORE["rows"], window]}, {}).read_text()
    assert "A sliding window of equal state bytes does as well or better on this text (KL 0.050 against 0.062)" in text
    better = write_card(tmp_path, {"rows": [*SCORE["rows"], {**window, "kl": 0.09}]}, {}).read_text()
    assert "does as well" not in better
    assert "It was not compared" not in better


def test_a_score_object_and_a_file_give_the_same_card(tmp_path):
    score = Score(**SCORE)
    score.save(tmp_path / "s")
    first = write_card(tmp_path / "m", score, LINEAGE).read_text()
    assert write_card(tmp_path / "m", tmp_path / "s", LINEAGE).read_text() == first


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


def test_cells_cannot_break_a_table():
    assert markdown_table(["a", "b"], [["x|y", "1\n2"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 2 |"


def test_a_card_of_a_sentence_encoder_says_what_such_a_score_holds(tmp_path):
    quality = {"cosine": 0.9812, "cosine_standard_error": 0.0007, "spearman": 0.95, "neighbour": 0.873}
    student = row("student", **quality, cosine_by_length={"1-16": 0.99}, mixers={"longformer": 6})
    values = {"rows": [student], "data": {"rows": 7, "tokens": 99, "length": 128, "rows_from": "texts"}}
    text = write_card(tmp_path, values, LINEAGE, location="minilm-tiny", task="sentence-embedding").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "sentence-similarity"
    for part in (
        "the mean cosine to the teacher's embedding is 0.981",
        "a text's nearest neighbour is the one that the teacher finds 87.3 % of the time",
        "Quality on 7 held-out texts of up to 128 tokens",
        "| cosine to the teacher's embedding | 0.9812 ± 0.0007 |",
        "| cosine, 1-16 tokens | 0.9900 |",
        "| Spearman of pairwise similarities | 0.9500 |",
        "| same nearest neighbour | 87.3 % |",
        "texts of at most 128 tokens",
        'AutoTokenizer.from_pretrained("minilm-tiny")',
        "pooler_output",
    ):
        assert part in text, part
    for part in ("generate", "KL", "sliding window", "Recall"):
        assert part not in text, part
