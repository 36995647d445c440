"""Every pretrained tag, against a Hub that holds a small checkpoint of its layout under the real repository's name."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch
from peers import PEERS, Peer
from typer.testing import CliRunner

import zoo
from zoo import registry
from zoo.cli.list import _pretrained
from zoo.cli.main import app
from zoo.convert.layouts import export_model, list_layouts
from zoo.convert.layouts.api import family_for
from zoo.errors import CheckpointError, ConfigError, ExportError, HubError
from zoo.registry import ModelEntry, model_config, model_entry, register_model
from zoo.text import byte_tokenizer

NAMES = zoo.list_models(pretrained=True)
KIN = {"tinybert": "bert", "smollm2": "llama", "pythia": "gpt_neox"}  # families whose checkpoints are those of another


def peer_of(entry: ModelEntry, layout: str) -> Peer:
    """The peer that saves checkpoints as those of a model are: of the family that its config belongs to."""
    names = {entry.family.replace("-", "_"), entry.family.replace("-", ""), KIN.get(entry.family, "")}
    with contextlib.suppress(ExportError):  # a layout that is only read
        names = {family_for(model_config(entry.name), layout)[0].name}
    found = [peer for peer in PEERS if peer.layout == layout and peer.family in names]
    assert found, f"{entry.name}: no peer of {layout} saves {names}; there are {[p.family for p in PEERS]}"
    return next((peer for peer in found if peer.label == entry.family), found[0])


def small_tokenizer():
    """Of three words: the peers have small vocabularies."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A function: the folder of a peer's checkpoint and the original model, made once."""
    made = {}

    def make(peer: Peer):
        if peer.package and importlib.util.find_spec(peer.package) is None:
            pytest.skip(f"needs the package {peer.package}")
        if str(peer) not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("peer")
            made[str(peer)] = folder, peer.save(folder)
        return made[str(peer)]

    return make


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_tag_gives_the_model_of_its_repository(hub, checkpoints, tmp_path, name):
    entry = model_entry(name)
    source = entry.tags[name[len(entry.name) + 1 :]]
    peer = peer_of(entry, source.layout)
    folder, original = checkpoints(peer)
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    if source.file is not None:
        files[source.file] = files.pop(peer.file)
    sha = hub.publish(source.repo, {**files, "stray.bin": b"x" * 2000}, sha=source.revision)
    if source.revision is not None:
        hub.publish(source.repo, {"config.json": b"{}"})  # what came later is not asked for
    if source.tokenizer is not None:
        small_tokenizer().save_pretrained(tmp_path)
        hub.publish_folder(source.tokenizer, tmp_path)
    model = zoo.create_model(name, pretrained=True, dtype=torch.float32, **hub.nobody)
    assert model.config.origin["hub"] == {"repo": source.repo, "revision": sha}
    assert model.config.origin["layout"] == source.layout
    assert hub.count("GET", "stray") == 0
    if source.tokenizer is not None:
        assert model.tokenizer("b").input_ids == [2]
    inputs = peer.inputs()
    expected, got = peer.logits(original, inputs), model(**inputs)
    got = got.logits if "logits" in got else got[0]
    assert (got[..., : expected.shape[-1]] - expected).abs().max() <= peer.tolerance * expected.abs().max()


def test_tags_name_what_there_is():
    for row in _pretrained("*", None, None):
        assert row["layout"] in list_layouts()
        assert row["name"].startswith(tuple(zoo.list_models()))


@pytest.fixture
def tagged(monkeypatch, hub, tmp_path):
    """A model with a tag of the test's own, published as Mamba's class saves it."""
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    facts = {"layout": "transformers", "licence": "MIT", "paper": "https://arxiv.org/abs/1", "parameters": 1}
    tags = {"one": {"repo": "a/one", "tokenizer": "a/bytes", **facts}, "two": {"repo": "a/two", **facts}}
    register_model("tagged-tiny", model_entry("mamba-tiny").config, tags=tags)
    model = zoo.create_model("tagged-tiny", vocab_size=300)
    export_model(model, "transformers", tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    hub.publish_folder("a/one", tmp_path / "model")
    hub.publish_folder("a/bytes", tmp_path / "bytes")
    hub.publish("a/bytes", {**{n: b.data for n, b in hub.repos["a/bytes"].files.items()}, "model.safetensors": b"x"})
    return model


def test_by_tag_and_by_first_tag(hub, tagged, logits):
    for name in ("tagged-tiny.one", "tagged-tiny"):
        model = zoo.create_model(name, pretrained=True, **hub.nobody)
        assert torch.equal(logits(model), logits(tagged))
        assert model.tokenizer("abc").input_ids == byte_tokenizer()("abc").input_ids
        assert not model.training
    assert hub.count("GET", "a/bytes/resolve/.*safetensors") == 0
    half = zoo.create_model("tagged-tiny", pretrained=True, dtype=torch.bfloat16, **hub.nobody)
    assert half.dtype == torch.bfloat16


def test_a_tag_that_means_a_commit(hub, tagged, logits, monkeypatch, tmp_path):
    """`revision` of a tag is asked for by create_model and `zoo import`, and recorded; another one can be asked for."""
    old, new = hub.repos["a/one"].branches["main"], hub.publish("a/one", {"config.json": b"{}"})
    facts = registry._MODELS["tagged-tiny"].tags["one"].plain()
    register_model("pinned-tiny", model_entry("mamba-tiny").config, tags={"then": {**facts, "revision": old}})
    model = zoo.create_model("pinned-tiny.then", pretrained=True, **hub.nobody)
    assert model.config.origin["hub"] == {"repo": "a/one", "revision": old}
    assert torch.equal(logits(model), logits(tagged))
    assert hub.count("GET", f"a/one/resolve/{old}/") > 0
    assert hub.count("GET", f"a/one/resolve/{new}/") == 0
    with pytest.raises(HubError, match=f"a/one: holds no model at {new}"):
        zoo.create_model("pinned-tiny.then", pretrained=True, revision="main", **hub.nobody)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    made = CliRunner().invoke(app, ["import", "pinned-tiny.then", "--out", str(tmp_path / "imported")])
    assert made.exit_code == 0, made.output
    imported = zoo.create_model(str(tmp_path / "imported"))
    assert imported.config.origin["hub"] == {"repo": "a/one", "revision": old}
    assert torch.equal(logits(imported), logits(tagged))
    refused = CliRunner().invoke(app, ["import", "pinned-tiny.then", "--layout", "fla", "--out", "x"])
    assert (refused.exit_code, refused.stderr) == (2, "error: --layout: pinned-tiny.then says that itself\n")
    refused = CliRunner().invoke(app, ["import", "pinned-tiny.than", "--out", "x"])
    assert refused.exit_code == 2
    assert "unknown tag of pinned-tiny 'than'; did you mean 'then'" in refused.stderr


def test_what_a_tag_does_not_take(hub, tagged):
    with pytest.raises(HubError, match="a/two: no such repository"):
        zoo.create_model("tagged-tiny.two", pretrained=True, **hub.nobody)
    with pytest.raises(ConfigError, match=r"vocab_size: published weights have their own config"):
        zoo.create_model("tagged-tiny.one", pretrained=True, vocab_size=7, **hub.nobody)
    with pytest.raises(ConfigError, match=r"endpoit: .*did you mean 'endpoint'"):
        zoo.create_model("tagged-tiny.one", pretrained=True, endpoit="x")
    hub.publish("a/one", {"config.json": b"{}", "model.safetensors": b"x" * 3000})
    with pytest.raises(CheckpointError):
        zoo.create_model("tagged-tiny.one", pretrained=True, **hub.nobody)


def test_the_table(tagged):
    row = next(row for row in _pretrained("tagged*", None, None) if row["name"] == "tagged-tiny.one")
    assert row["repo"] == "a/one"
    assert (row["licence"], row["parameters"], row["layout"]) == ("MIT", 1, "transformers")
    assert zoo.list_models("tagged*", pretrained=True) == ["tagged-tiny.one", "tagged-tiny.two"]
