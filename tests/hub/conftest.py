"""A Hub on loopback, with a cache of its own, and waits that do not wait."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hub_double import HubDouble

ALICE, BOB = "hf_alice", "hf_bob"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The double; `hub.alice` and `hub.bob` are options under which functions go there, `hub.nobody` has no token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    double = HubDouble()
    double.waits = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=double.waits.append))
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=double.waits.append))
    double.alice = {"endpoint": double.url, "token": ALICE}
    double.bob = {"endpoint": double.url, "token": BOB}
    double.nobody = {"endpoint": double.url, "token": False}
    yield double
    double.close()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder of a model with a tokenizer, and beside them what a training run leaves."""
    import torch

    import zoo
    from zoo.text import byte_tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "retnet"
    tokenizer = byte_tokenizer()
    zoo.create_model("retnet-tiny", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: zoo\n---\n# A model\n\n![curve](curve.png)\n")
    (folder / "curve.png").write_bytes(b"\x89PNG" + bytes(50))
    (folder / "checkpoints" / "step-10").mkdir(parents=True)
    (folder / "checkpoints" / "step-10" / "optimizer.safetensors").write_bytes(b"x" * 100)
    for stray in ("optimizer.pt", "pytorch_model.bin", "log.jsonl", "notes.txt", "secret.png", ".env"):
        (folder / stray).write_text("stays at home")
    return folder


@pytest.fixture
def other():
    """A model of the same kind with other weights."""
    import torch

    import zoo

    torch.manual_seed(1)
    return zoo.create_model("retnet-tiny")


@pytest.fixture
def logits():
    """A function: what a model says about a fixed row of tokens."""
    import torch

    @torch.no_grad()
    def of(model):
        return model.eval()(torch.arange(12).reshape(1, 12)).logits

    return of
