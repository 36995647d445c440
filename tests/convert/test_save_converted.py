"""Saving a student: loaded again by path, nothing half written, nothing lost."""

from __future__ import annotations

import json
import os

import pytest
import torch

import zoo
from zoo.convert import api
from zoo.convert.api import save_converted
from zoo.convert.teachers import load_teacher
from zoo.errors import ConversionError
from zoo.text import byte_tokenizer

IDS = torch.arange(64 * 4).reshape(8, 32) % 37


def test_saved_and_loaded_again(llama, tmp_path):
    out = tmp_path / "deep" / "student"
    teacher = load_teacher(llama, tokenizer=None)
    student = zoo.convert(teacher, "mamba2", keep=[0], data=IDS, out=out, progress=False)
    again = zoo.create_model(str(out))
    assert again.config.mixer_names == ["attention", "mamba2"]
    assert again.config.origin == student.config.origin
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, student(IDS).logits)
    stored = json.loads((out / "conversion.json").read_text(encoding="utf-8"))
    assert stored["mixer"] == "mamba2"
    assert stored["distance"] == student.report.distance
    assert [p.name for p in out.parent.iterdir()] == ["student"]  # nothing is left beside it


def test_the_tokenizer_is_saved_with_it(llama, tmp_path):
    from transformers import AutoTokenizer

    student = zoo.convert(llama, "retention", calibrate=False)
    student.tokenizer = byte_tokenizer()
    save_converted(student, tmp_path / "student")
    again = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert again.encode("zoo") == student.tokenizer.encode("zoo")


def test_what_is_there_is_not_overwritten(llama, tmp_path, monkeypatch):
    student = zoo.convert(llama, "retention", calibrate=False)
    out = save_converted(student, tmp_path / "student")
    with pytest.raises(ConversionError, match="exists and is not empty; give overwrite=True"):
        save_converted(student, out)
    monkeypatch.setattr(api, "load_teacher", lambda *a, **k: pytest.fail("work was done first"))
    with pytest.raises(ConversionError, match="exists and is not empty"):
        zoo.convert(llama, "retention", out=out)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(ConversionError, match="is not the folder of a model"):
        save_converted(student, photos, overwrite=True)
    file = tmp_path / "file"
    file.write_text("hello")
    with pytest.raises(ConversionError, match="is not a folder"):
        save_converted(student, file, overwrite=True)
    student.config.origin["note"] = "second"
    save_converted(student, out, overwrite=True)
    assert zoo.create_model(str(out)).config.origin["note"] == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "photos", "student"]


def test_a_failure_while_saving_leaves_what_was_there(llama, tmp_path, monkeypatch):
    student = zoo.convert(llama, "retention", calibrate=False)
    out = save_converted(student, tmp_path / "student")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(student), "save_pretrained", full)
    with pytest.raises(ConversionError, match="cannot be written: No space left on device"):
        save_converted(student, out, overwrite=True)
    with pytest.raises(ConversionError, match="No space left"):
        save_converted(student, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    assert zoo.create_model(str(out)).config.mixer_names == ["retention", "retention"]
    monkeypatch.undo()
    replace = os.replace

    def fails_once(source, target, tries=[]):  # noqa: B006
        tries.append(target)
        if len(tries) == 2:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(api.os, "replace", fails_once)
    with pytest.raises(ConversionError, match="Input/output error"):
        save_converted(student, out, overwrite=True)
    monkeypatch.undo()
    assert zoo.create_model(str(out)).config.mixer_names == ["retention", "retention"]
