"""Checkpoints: complete or not there, whatever happens."""

import errno
import json

import pytest
import torch

from zoo.errors import CheckpointError, TrainingError
from zoo.train import checkpoint as module
from zoo.train.checkpoint import CheckpointFolder, load_checkpoint, write_atomically


def save(folder, step, score=None, value=None):
    tensors = {"model": {"w": torch.full((4, 4), float(value if value is not None else step))}, "ema": {}}
    return folder.save(step, tensors, {"note": step}, score)


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints", "me", keep=2)


def names(folder):
    return sorted(p.name for p in folder.folder.iterdir())


def test_round_trip(folder):
    assert folder.newest() is None
    save(folder, 3)
    found = folder.newest()
    assert found.state["note"] == 3
    assert torch.equal(found.tensors("model")["w"], torch.full((4, 4), 3.0))
    assert found.tensors("ema") == {}


def test_the_last_and_the_best_of_the_newest_stage_are_kept(folder):
    for step, score in enumerate([(0, 0.1), (1, 5.0), (1, 2.0), (1, 3.0), (1, 4.0), None]):
        save(folder, step, score)
    assert names(folder) == ["step-000000002", "step-000000004", "step-000000005"]


def test_same_step_again_replaces(folder):
    save(folder, 1, value=1)
    save(folder, 1, value=2)
    assert folder.newest().tensors("model")["w"][0, 0] == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "marker", "manifest", "state"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(folder, damage):
    save(folder, 1)
    path = save(folder, 2)
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-5])
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "gone":
        file.unlink()
    elif damage == "marker":
        (path / "COMPLETE").unlink()
    else:
        name = f"{damage}.json"
        (path / name).write_text((path / name).read_text() + " ")
    with pytest.warns(UserWarning, match="going on from step-000000001"):
        assert folder.newest().state["note"] == 1
    with pytest.raises(CheckpointError, match="step-000000002"):
        load_checkpoint(path)
    (folder.folder / "step-000000001" / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="no older one"):
        folder.newest()


def test_another_runs_checkpoint_is_refused(folder):
    save(folder, 1)
    with pytest.raises(CheckpointError, match="another run"):
        CheckpointFolder(folder.folder, "you").newest()
    assert names(folder) == ["step-000000001"]


@pytest.mark.parametrize("where", ["tensors", "fsync", "rename"])
def test_a_full_disk_loses_nothing(folder, monkeypatch, where):
    save(folder, 1)

    def full(*args, **kwargs):
        if where == "tensors":
            raise module.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"tensors": (module, "save_file"), "fsync": (module, "_fsync"), "rename": (module.os, "rename")}[where]
    monkeypatch.setattr(*target, full)
    with pytest.raises(TrainingError, match="no space left"):
        save(folder, 2)
    monkeypatch.undo()
    assert names(folder) == ["step-000000001"]
    assert folder.newest().state["note"] == 1


def test_what_a_kill_leaves_is_swept(folder):
    save(folder, 1)
    (folder.folder / "tmp-step-000000002").mkdir()
    (folder.folder / "tmp-gone-step-000000000").mkdir()
    assert folder.newest().state["note"] == 1
    assert names(folder) == ["step-000000001"]


def test_atomic_text(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, json.dumps(1))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_fsync", full)
    with pytest.raises(TrainingError, match="no space left"):
        write_atomically(path, json.dumps(2))
    assert path.read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
