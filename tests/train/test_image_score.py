"""Scores of image classifiers against plain sums, from images to a card."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_images import make_classifier, make_images, make_scan_student, write_idx
from typer.testing import CliRunner

import zoo
from zoo.cli.main import app
from zoo.errors import ConfigError, DataError
from zoo.images import open_images
from zoo.train.card import verify_card
from zoo.train.image_score import compare_images, image_speed
from zoo.train.score import Score, score

IMAGES = make_images(230)


@pytest.fixture(scope="module")
def models():
    teacher = make_classifier()
    student = make_scan_student(teacher)
    with torch.no_grad():
        student.classifier.bias += torch.tensor([0.6, 0.0, -0.3])
    return teacher, student


def test_the_numbers_are_the_plain_ones(models):
    teacher, student = models
    pixels, labels = IMAGES
    with torch.no_grad():
        x_BCHW = (pixels / 255 - 0.5) / 0.25
        p, q = (model(pixel_values=x_BCHW).logits.double().log_softmax(-1) for model in models)
    told = []
    images = open_images(IMAGES)
    found = compare_images(teacher, {"student": student}, images, on_batch=told.append)
    row = found["student"].row()
    assert told == [100, 200, 230]
    assert row["accuracy"] == pytest.approx(float((q.argmax(-1) == labels).double().mean()))
    assert row["top1"] == pytest.approx(float((q.argmax(-1) == p.argmax(-1)).double().mean()))
    assert 0 < row["top1"] < 1
    kl_N = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert row["kl"] == pytest.approx(float(kl_N.mean()), rel=1e-4)
    assert row["kl_standard_error"] == pytest.approx(float(kl_N.std()) / 230**0.5, rel=1e-3)
    assert found["teacher"].row() | {"accuracy": 0} == {"accuracy": 0, "kl": 0, "kl_standard_error": 0, "top1": 1}
    assert compare_images(None, {"student": student}, images)["student"].row() == {"accuracy": row["accuracy"]}
    assert all(value > 0 for value in image_speed({"student": student})["student"].values())


def test_from_a_run_to_a_card(models, tmp_path):
    """A model trained from nothing is scored alone, on what its run held out; its student against it."""
    runner, out = CliRunner(), tmp_path / "student"
    write_idx(tmp_path / "images-idx3-ubyte", IMAGES[0][:, 0])
    write_idx(tmp_path / "labels-idx1-ubyte", IMAGES[1].to(torch.uint8))
    make_classifier().save_pretrained(tmp_path / "start")
    stage = "{kind: pretrain, budget: {images: 64}, batch_size: 16, precision: fp32}"
    common = f"data: {tmp_path}/images-idx3-ubyte\nheld_out: 0.2\n"
    (tmp_path / "a.yaml").write_text(f"model: {tmp_path}/start\n{common}stages: [{stage}]\n")
    teacher = tmp_path / "teacher"
    (tmp_path / "b.yaml").write_text(
        f"teacher: {teacher}\nmixer: linear_attention\nkeep: none\n{common}"
        f"stages: [{stage.replace('pretrain', 'distill')}]\n"
    )
    for command in (
        ["train", f"{tmp_path}/a.yaml", f"out={teacher}"], ["score", str(teacher)],
        ["distill", f"{tmp_path}/b.yaml", f"out={out}"],
        ["score", str(out), "--data", f"{tmp_path}/images-idx3-ubyte", "--no-speed"],
        ["card", str(teacher)], ["card", str(out), "--license", "mit"],
    ):  # fmt: skip
        done = runner.invoke(app, command)
        assert done.exit_code == 0, (command, done.output, done.exception)
    alone, both = Score.load(teacher), Score.load(out)
    assert [row["role"] for row in alone.rows] == ["student"]
    assert 30 < alone.data["rows"] < 62
    assert alone.rows[0]["images_per_s"] > 0
    assert (alone.rows[0]["kl"], alone.rows[0]["top1"]) == (None, None)
    assert [row["role"] for row in both.rows] == ["teacher", "untrained", "student"]
    assert (both.data["rows"], both.data["source"], both.task) == (230, "images-idx3-ubyte", "image-classification")
    assert both.row("student")["images_per_s"] is None
    assert both.row("student")["kl"] < both.row("untrained")["kl"]
    assert both.row("student")["train_tokens"] == 64 * 5
    verify_card(teacher)
    verify_card(out)
    first, second = ((folder / "README.md").read_text() for folder in (teacher, out))
    assert "Trained from nothing: 2 of 2 layers are `attention`." in first
    assert "its teacher" not in first
    assert "| accuracy |" in second
    assert "tokenizer" not in second
    assert "pipeline_tag: image-classification" in second
    accuracy = both.row("student")["accuracy"]
    assert f"It is right about {100 * accuracy:.2f} % of the images" in second
    assert json.loads((out / "score.json").read_text())["rows"][2]["accuracy"] == accuracy


def test_what_cannot_be_scored_is_said(models):
    teacher, student = models
    pixels, labels = IMAGES
    with pytest.raises(DataError, match=r"labels up to 3, but the teacher has 3 classes"):
        score(student, teacher=teacher, data=(pixels, labels + 1))
    causal = zoo.create_model("retnet-tiny")
    with pytest.raises(ConfigError, match="a causal-lm is scored against its teacher; name one"):
        score(causal, teacher=None, data=torch.zeros(2, 8, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"the student is a 'causal-lm' model"):
        score(causal, teacher=teacher, data=IMAGES)
