"""create_model: by name, by folder; damaged and foreign folders are refused with one line."""

from __future__ import annotations

import json

import pytest
import torch

import zoo
from zoo.errors import CheckpointError, UnknownNameError
from zoo.models.create import read_config


@pytest.fixture
def saved(tmp_path):
    model = zoo.create_model("retnet-tiny")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder) -> str:
    with pytest.raises(CheckpointError) as info:
        zoo.create_model(str(folder))
    assert "\n" not in str(info.value)
    return str(info.value)


def test_by_folder(saved, monkeypatch):
    assert zoo.create_model(str(saved)).config.mixer_names == ["retention"] * 2
    monkeypatch.chdir(saved.parent)
    assert zoo.create_model("model").config.mixer_names == ["retention"] * 2
    assert zoo.create_model("./model").config.mixer_names == ["retention"] * 2


def test_a_missing_folder(saved):
    assert refused(saved.parent / "modle") == f"{saved.parent}/modle: no such folder; did you mean 'model'?"
    with pytest.raises(UnknownNameError):
        zoo.create_model("modle")


def test_a_repository_instead_of_a_folder():
    assert refused("org/name").endswith("org/name: no such folder; a model of the Hub is written hf-hub:org/name")
    with pytest.raises(
        CheckpointError, match=r"hf-hub:org/name: no such folder here; take it first: zoo pull org/name"
    ):
        read_config("hf-hub:org/name")


def test_an_empty_folder(tmp_path):
    assert "no config.json in it" in refused(tmp_path)


def test_a_truncated_checkpoint(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert refused(saved).startswith(f"{path}: the weights are truncated or damaged")


def test_an_empty_weights_file(saved):
    (saved / "model.safetensors").write_bytes(b"")
    assert refused(saved).startswith(str(saved))


def test_no_weights_file(saved):
    (saved / "model.safetensors").unlink()
    assert refused(saved).startswith(f"{saved}: no weights in it")


@pytest.mark.parametrize("text", ["{", "[]", "null", "\udce9"])
def test_a_broken_config(saved, text):
    (saved / "config.json").write_text(text, errors="surrogateescape")
    assert refused(saved).startswith(f"{saved}/config.json")


def test_a_foreign_model(saved):
    (saved / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "model_type is 'llama', not 'zoo'; `zoo convert" in refused(saved)


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"vocab_size": 8}])
def test_weights_that_do_not_fit_the_config(saved, change):
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**values, **change}))
    assert refused(saved).startswith(f"{saved}: weights do not fit the config, first 'model.")


def test_weights_of_another_architecture(saved, tmp_path):
    zoo.create_model("gla-tiny").save_pretrained(tmp_path / "other")
    (saved / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    assert "weights do not fit the config" in refused(saved)


def test_an_index_that_points_outside_is_refused(saved):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../etc/passwd"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lies outside the folder" in refused(saved)


def test_pickles_are_never_read(saved):
    weights = zoo.create_model("retnet-tiny").state_dict()
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    assert refused(saved).startswith(str(saved))
