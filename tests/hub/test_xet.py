"""Large files by Xet, the Hub's own store: with hf_xet itself, into a store that it keeps in a folder."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from huggingface_hub import constants

pytest.importorskip("hf_xet")

from xet_store import XetStore

import zoo
from zoo.errors import CheckpointError, HubError
from zoo.hub.weights import weights_hash

NAME = "alice/retnet"


@pytest.fixture
def xet(hub, monkeypatch, tmp_path):
    """The double with a store, and a client that uses it; without progress bars of its own."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = XetStore(tmp_path / "store")
    return hub


@pytest.mark.parametrize("read_by_xet", [True, False])
def test_there_and_back(xet, saved, tmp_path, monkeypatch, read_by_xet):
    pushed = zoo.push(saved, NAME, max_shard_size="100KB", **xet.alice)
    assert xet.count("PUT", "/lfs/") == 0
    blob = next(b for n, b in xet.repos[NAME].files.items() if n.endswith(".safetensors"))
    assert blob.xet is not None
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not read_by_xet)
    taken = zoo.pull(f"{NAME}@v1", tmp_path / "out", **xet.alice)
    assert taken.revision == pushed.commit
    assert weights_hash(tmp_path / "out") == weights_hash(saved)
    assert bool(xet.count("GET", "resolve/.*safetensors")) is not read_by_xet
    assert bool(xet.count("GET", "xet-read-token")) is read_by_xet


def test_a_new_version_sends_what_is_new(xet, saved, tmp_path):
    """Of a file in which a little changed only the chunks around it are stored again."""
    zoo.push(saved, NAME, **xet.alice)

    def stored():
        return sum(p.stat().st_size for p in xet.xet.folder.rglob("xorbs/default.*") if p.suffix != ".tagset")

    first = stored()
    folder = shutil.copytree(saved, tmp_path / "next")
    model = zoo.create_model(str(folder))
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(folder)
    pushed = zoo.push(folder, NAME, **xet.alice)
    assert pushed.tag == "v2"
    assert first > 200_000
    assert stored() - first < first / 2
    zoo.pull(NAME, tmp_path / "out", **xet.alice)
    assert weights_hash(tmp_path / "out") == weights_hash(folder)


def test_damage_is_found_in_the_cache_that_repositories_share(xet, saved, tmp_path):
    """With Xet, huggingface_hub names files of its cache by another hash, which cannot be had from their bytes."""
    zoo.push(saved, NAME, **xet.alice)
    zoo.create_model(f"hf-hub:{NAME}", **xet.alice)
    (snapshot,) = (tmp_path / "cache").glob("models--*/snapshots/*")
    blob = (snapshot / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    os.chmod(blob, 0o644)
    blob.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged in the cache; it was removed there"):
        zoo.pull(NAME, tmp_path / "out", **xet.alice)
    zoo.pull(NAME, tmp_path / "out", **xet.alice)
    assert weights_hash(tmp_path / "out") == weights_hash(saved)


def test_published_weights_load_from_the_cache_that_repositories_share(xet, tmp_path):
    """There a snapshot's file leads out of the repository's folder, into the store beside it."""
    from zoo.convert.layouts import export_model, import_checkpoint
    from zoo.hub.pull import snapshot

    model = zoo.create_model("mamba-tiny")
    export_model(model, "transformers", tmp_path / "model")
    zoo.push(tmp_path / "model", "alice/mamba", **xet.alice)
    folder = snapshot("alice/mamba", **xet.alice).folder
    weights = (folder / "model.safetensors").resolve()
    assert not weights.is_relative_to(folder.parents[1])
    found = import_checkpoint(folder).model
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    (folder / "model.safetensors").unlink()
    (tmp_path / "cache" / "elsewhere").mkdir()
    (folder / "model.safetensors").symlink_to(shutil.copy(weights, tmp_path / "cache" / "elsewhere" / "x"))
    with pytest.raises(CheckpointError, match="link that leads out"):
        import_checkpoint(folder)


def test_without_the_package(xet, saved, tmp_path, monkeypatch):
    """hf_xet not installed: LFS up, plain HTTP down, also of what somebody else sent by Xet."""
    zoo.push(saved, NAME, **xet.alice)
    monkeypatch.setattr("huggingface_hub.utils._runtime.is_package_available", lambda name: name != "hf_xet")
    zoo.pull(NAME, tmp_path / "out", **xet.alice)
    assert xet.count("GET", "xet-read-token") == 0
    zoo.push(tmp_path / "out", "alice/copy", **xet.alice)
    assert weights_hash(tmp_path / "out") == weights_hash(saved)
    assert xet.repos["alice/copy"].files["model.safetensors"].data == (saved / "model.safetensors").read_bytes()


def test_a_server_without_xet(hub, saved, monkeypatch):
    """A mirror, an older server: there is no way around Xet in huggingface_hub, but a setting, which is named."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match=r"moving files by Xet failed \(.*404.*set HF_HUB_DISABLE_XET=1"):
        zoo.push(saved, NAME, **hub.alice)
    assert sorted(hub.repos[NAME].files) == [".gitattributes"]
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert zoo.push(saved, NAME, **hub.alice).tag == "v1"
