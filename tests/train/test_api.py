"""Runs as users start them: folders, refusals, recipes, what is left at the end."""

import errno
import json

import pytest
import torch
from tiny_runs import TOKENIZER, make_student, make_teacher, make_texts, parameters

import zoo
from zoo.errors import CheckpointError, ConfigError, DataError, TrainingError
from zoo.text import byte_tokenizer, split_documents
from zoo.train import checkpoint
from zoo.train.api import train_recipe
from zoo.train.recipe import Recipe

TEXTS = make_texts()
STAGE = {"kind": "distill", "budget": {"tokens": 96}, "length": 16, "precision": "fp32"}


def run(student, teacher, out=None, stages=(STAGE,), **options):
    options = {"data": TEXTS, "tokenizer": TOKENIZER, "progress": False, **options}
    return zoo.distill(student, teacher, stages=list(stages), out=out, **options)


@pytest.fixture
def pair():
    teacher = make_teacher()
    return make_student(teacher), teacher


def test_the_folder_is_a_model_with_its_costs(pair, tmp_path):
    result = run(*pair, tmp_path / "a" / "run")
    loaded = zoo.create_model(str(result.out))
    torch.testing.assert_close(parameters(loaded), parameters(result.model), rtol=0, atol=0)
    info = json.loads((result.out / "train.json").read_text())
    assert info["tokens"] == result.tokens == 96
    assert info["cpu_seconds"] == pytest.approx(result.cpu_seconds, abs=0.01)
    assert [s["kind"] for s in info["stages"]] == ["distill"]
    assert (result.out / "tokenizer.json").is_file()


def test_a_complete_run_is_not_run_again(pair, tmp_path, monkeypatch):
    student, teacher = pair
    first = run(student, teacher, tmp_path / "run")
    monkeypatch.setattr("zoo.train.api.run_stages", None)
    again = run(make_student(teacher), teacher, tmp_path / "run")
    torch.testing.assert_close(parameters(again.model), parameters(first.model), rtol=0, atol=0)
    assert (again.tokens, len(again.log), again.stages) == (96, 3, first.stages)


def test_another_runs_folder_is_refused_and_kept(pair, tmp_path):
    student, teacher = pair
    out = tmp_path / "run"
    run(student, teacher, out)
    before = (out / "model.safetensors").read_bytes()
    other = [{**STAGE, "lr": 1e-5}]
    with pytest.raises(CheckpointError, match=r"another run \(its stages differs at 0\.lr: 0\.0003 there, 1e-05 here"):
        run(make_student(teacher), teacher, out, other)
    with pytest.raises(CheckpointError, match="its student differs"):
        run(make_student(teacher, layers=(0,)), teacher, out)
    with pytest.raises(CheckpointError, match="its data differs"):
        run(make_student(teacher), teacher, out, data=TEXTS[:-1])
    with pytest.raises(CheckpointError, match="holds a run already"):
        run(make_student(teacher), teacher, out, resume=False)
    assert (out / "model.safetensors").read_bytes() == before
    run(make_student(teacher), teacher, out, other, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before


def test_a_folder_of_something_else_is_never_emptied(pair, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a run"):
        run(*pair, tmp_path)
    (tmp_path / "model.safetensors").write_text("a model")
    with pytest.raises(CheckpointError, match=r"'thesis\.tex', which no run has written"):
        run(*pair, tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").read_text() == "a model"
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(CheckpointError, match="is a file"):
        run(*pair, tmp_path / "thesis.tex")


def test_a_truncated_checkpoint_and_no_other_is_an_error(pair, tmp_path, monkeypatch):
    student, teacher = pair
    with monkeypatch.context() as patch:
        patch.setattr("zoo.train.api.save_result", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(student, teacher, tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints").glob("*/model.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"truncated, 100 of \d+ bytes.*overwrite"):
        run(make_student(teacher), teacher, tmp_path / "run")
    result = run(make_student(teacher), teacher, tmp_path / "run", overwrite=True)
    torch.testing.assert_close(parameters(result.model), parameters(student), rtol=0, atol=0)


def test_a_full_disk_is_said_and_the_run_goes_on_later(pair, tmp_path, monkeypatch):
    student, teacher = pair
    want = parameters(run(make_student(teacher), teacher).model)
    with monkeypatch.context() as patch:

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(TrainingError, match="no space left on the disk"):
            run(student, teacher, tmp_path / "run")
    result = run(make_student(teacher), teacher, tmp_path / "run")
    torch.testing.assert_close(parameters(result.model), want, rtol=0, atol=0)


def test_held_out_documents_are_never_seen(pair, monkeypatch):
    seen = []
    monkeypatch.setattr("zoo.train.data.encode", lambda tokenizer, text: seen.append(text) or [1, 2, 3])
    run(*pair, held_out=0.4, seed=3)
    train, held = split_documents(TEXTS, 0.4, 3)
    assert set(seen) <= set(train)
    assert not set(seen) & set(held)
    assert len(seen) > 20


def test_a_tokenizer_that_does_not_fit_is_refused(pair):
    student, teacher = pair
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["one more"])
    with pytest.raises(DataError, match="257 words and the model a vocabulary of 256"):
        run(student, teacher, tokenizer=tokenizer)
    with pytest.raises(DataError, match="no tokenizer comes with the model"):
        run(student, teacher, tokenizer=None)


def test_bad_data_is_said(pair, tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        run(*pair, data=str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="byte 3"):
        run(*pair, data=str(tmp_path / "*.txt"))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return str(path)


def test_a_recipe_trains_a_model_from_nothing(tmp_path, text_file):
    values = {
        "model": "transformer-tiny",
        "tokenizer": "bytes",
        "data": text_file,
        "out": str(tmp_path / "run"),
        "stages": [{**STAGE, "kind": "pretrain"}],
    }
    result = train_recipe(Recipe.parse(values), progress=False)
    assert result.tokens == 96
    again = train_recipe(Recipe.parse(values), progress=False)
    torch.testing.assert_close(parameters(again.model), parameters(result.model), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"its recipe differs at seed: 0 there, 1 here"):
        train_recipe(Recipe.parse({**values, "seed": 1}), progress=False)
    with pytest.raises(ConfigError, match="data: this key is needed"):
        train_recipe(Recipe.parse({**values, "data": None}), progress=False)


def test_a_recipe_converts_once_and_distills(tmp_path, text_file, monkeypatch):
    teacher = make_teacher()
    teacher.save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    values = {
        "teacher": str(tmp_path / "teacher"),
        "mixer": "linear_attention",
        "keep": [0],
        "calibrate": False,
        "data": [text_file],
        "out": str(tmp_path / "run"),
        "stages": [STAGE],
    }
    with monkeypatch.context() as patch:
        patch.setattr("zoo.train.api.save_result", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_recipe(Recipe.parse(values), progress=False)
    monkeypatch.setattr("zoo.convert.api.convert", None)  # the second time the student is there already
    result = train_recipe(Recipe.parse(values), progress=False)
    assert result.model.config.mixer_names == ["attention", "linear_attention", "linear_attention"]
    assert zoo.create_model(str(result.out)).config.mixer_names == result.model.config.mixer_names
