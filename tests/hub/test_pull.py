"""`zoo.pull` and loading from the Hub: whole or not at all, from one commit, never out of the folder."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import constants

import zoo
from zoo.errors import CheckpointError, ConversionError, HubError
from zoo.hub.client import check_revision
from zoo.hub.weights import weights_hash

NAME = "zoo-org/retnet"
KEPT = ("README.md", "config.json", "curve.png", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def published(hub, saved):
    """The double with a public model; `sha` is its commit."""
    hub.sha = hub.publish_folder(NAME, saved)
    return hub


def test_the_whole_cycle(hub, saved, tmp_path, logits):
    pushed = zoo.push(saved, NAME, max_shard_size="100KB", **hub.alice)
    taken = zoo.pull(f"{NAME}@v1", tmp_path / "out", **hub.alice)
    assert taken.revision == pushed.commit
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == set(pushed.files)
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert weights_hash(tmp_path / "out") == weights_hash(saved)
    model = zoo.create_model(str(tmp_path / "out"))
    assert torch.equal(logits(model), logits(zoo.create_model(str(saved))))
    assert model.config.origin == {"hub": {"repo": NAME, "revision": pushed.commit}}
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc") == AutoTokenizer.from_pretrained(saved)("abc")


def test_only_what_a_model_needs(published, tmp_path):
    zoo.pull(NAME, tmp_path / "out", **published.nobody)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted((*KEPT, "model.safetensors", "secret.png"))
    assert published.count("GET", r"resolve.*(\.bin|\.pt|optimizer|\.env)") == 0


def test_create_model_by_name_and_revision(published, saved, logits):
    new = published.publish(NAME, {"config.json": b"{}"})
    model = zoo.create_model(f"hf-hub:{NAME}@{published.sha}", **published.nobody)
    assert model.config.origin == {"hub": {"repo": NAME, "revision": published.sha}}
    assert torch.equal(logits(model), logits(zoo.create_model(str(saved))))
    assert new != published.sha
    again = zoo.create_model(f"hf-hub:{NAME}", revision=published.sha, **published.nobody)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(HubError, match="two revisions are given"):
        zoo.create_model(f"hf-hub:{NAME}@main", revision=published.sha, **published.nobody)
    half = zoo.create_model(f"hf-hub:{NAME}@{published.sha}", dtype=torch.bfloat16, **published.nobody)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_commit_in_the_cache_costs_no_request(published, monkeypatch):
    zoo.create_model(f"hf-hub:{NAME}@{published.sha}", **published.nobody)
    published.requests.clear()
    zoo.create_model(f"hf-hub:{NAME}@{published.sha}", **published.nobody)
    assert published.requests == []
    zoo.create_model(f"hf-hub:{NAME}", **published.nobody)  # a name is asked for, and nothing else
    assert [r[0:2] for r in published.requests] == [("GET", f"/api/models/{NAME}")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = zoo.create_model(f"hf-hub:{NAME}", **published.nobody)
    assert model.config.origin["hub"]["revision"] == published.sha
    with pytest.raises(HubError, match=r"zoo-org/none: not, or not whole, in the cache"):
        zoo.create_model("hf-hub:zoo-org/none", **published.nobody)


def test_a_download_that_breaks_off_goes_on(published, saved, tmp_path):
    size = (saved / "model.safetensors").stat().st_size
    fault = published.fail("GET", "resolve/.*/model.safetensors", drop_after=size // 3, times=100)
    with pytest.raises(HubError, match=r"no connection .* then run the same command again"):
        zoo.pull(NAME, tmp_path / "out", **published.nobody)
    assert not (tmp_path / "out").exists()
    fault.times = 0
    offline = {**published.nobody, "local_files_only": True}
    with pytest.raises(HubError, match="not whole, in the cache"):
        zoo.create_model(f"hf-hub:{NAME}", **offline)
    fetched = published.count("GET", "resolve/.*/tokenizer.json")
    zoo.pull(NAME, tmp_path / "out", **published.nobody)
    assert weights_hash(tmp_path / "out") == weights_hash(saved)
    assert published.count("GET", "resolve/.*/tokenizer.json") == fetched == 1  # what had arrived is not loaded again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out"]


def test_a_pull_takes_its_room_once(published, tmp_path):
    """Nothing goes into the cache; what is there already is used, and stays as it is when the folder is edited."""
    zoo.pull(NAME, tmp_path / "out", **published.nobody)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size > 100]
    zoo.create_model(f"hf-hub:{NAME}", **published.nobody)
    published.served.clear()
    zoo.pull(NAME, tmp_path / "copy", **published.nobody)
    assert not [path for path, _ in published.served if "safetensors" in path]
    before = weights_hash(tmp_path / "copy")
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as file:  # in place, as through a hard link
        file.seek(-1, 2)
        file.write(b"\xff")
    assert weights_hash(tmp_path / "copy") != before
    zoo.pull(NAME, tmp_path / "again", **published.nobody)
    assert weights_hash(tmp_path / "again") == before


def test_copies_where_the_file_system_cannot_share(published, tmp_path, monkeypatch):
    zoo.create_model(f"hf-hub:{NAME}", **published.nobody)
    calls = []

    def refused(*args):
        calls.append(args)
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.copy_file_range", refused)
    zoo.pull(NAME, tmp_path / "out", **published.nobody)
    assert calls
    assert weights_hash(tmp_path / "out") == weights_hash(next(tmp_path.glob("cache/models--*/snapshots/*")))


def test_a_download_that_broke_off_does_not_end_in_another_commit(published, saved, tmp_path):
    fault = published.fail("GET", "resolve/.*/model.safetensors", drop_after=10, times=100)
    with pytest.raises(HubError, match="no connection"):
        zoo.pull(NAME, tmp_path / "out", **published.nobody)
    fault.times = 0
    files = {n: b.data for n, b in published.repos[NAME].files.items() if n not in ("curve.png", "tokenizer.json")}
    new = published.publish(NAME, {**files, "README.md": b"# New\n"})
    assert zoo.pull(NAME, tmp_path / "out", **published.nobody).revision == new
    assert (tmp_path / "out" / "README.md").read_text() == "# New\n"
    assert not (tmp_path / "out" / "curve.png").exists()
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_two_pulls_to_one_folder(published, tmp_path):
    import threading

    fault = published.fail("GET", "resolve/.*/model.safetensors", drop_after=10, wait=True)
    first = threading.Thread(target=zoo.pull, args=(NAME, tmp_path / "out"), kwargs=published.nobody)
    first.start()
    assert fault.reached.wait(60)
    with pytest.raises(HubError, match="out: another process is pulling to it"):
        zoo.pull(NAME, tmp_path / "out", **published.nobody)
    fault.go.set()
    first.join()
    zoo.create_model(str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_other_bytes_than_the_hub_lists(published, saved, tmp_path, name):
    """Of the same length, on the way or by a server in between: it is found, and loaded again by the next call."""
    published.fail("GET", f"resolve/.*/{name}", corrupt=True)
    with pytest.raises(CheckpointError, match=f"{name}: is damaged as it arrived; it was removed there"):
        zoo.pull(NAME, tmp_path / "out", **published.nobody)
    assert not (tmp_path / "out").exists()
    zoo.pull(NAME, tmp_path / "out", **published.nobody)
    assert (tmp_path / "out" / name).read_bytes() == (saved / name).read_bytes()
    assert published.count("GET", f"resolve/.*/{name}") == 2
    assert published.count("GET", "resolve/.*/config.json") == 1


def test_damage_is_found(published, saved, tmp_path):
    zoo.create_model(f"hf-hub:{NAME}", **published.nobody)
    (blob,) = (p for p in tmp_path.glob("cache/**/blobs/*") if p.stat().st_size > 10_000 and len(p.name) == 64)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged in the cache; it was removed there"):
        zoo.pull(NAME, tmp_path / "out", **published.nobody)
    assert not (tmp_path / "out").exists()
    zoo.pull(NAME, tmp_path / "out", **published.nobody)
    assert weights_hash(tmp_path / "out") == weights_hash(saved)


def test_what_stands_there_is_not_lost(published, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        zoo.pull(NAME, out, **published.nobody)
    with pytest.raises(ConversionError, match="is not the folder of a model, so it is not overwritten"):
        zoo.pull(NAME, out, overwrite=True, **published.nobody)
    assert published.requests == []


def test_files_by_name(hub, tmp_path):
    sha = hub.publish("them/rwkv", {"RWKV-4.pth": b"x" * 5000, "RWKV-5.pth": b"y" * 5000, "README.md": b"# RWKV\n"})
    taken = zoo.pull("them/rwkv", tmp_path / "out", files=["RWKV-4.pth"], **hub.nobody)
    assert (taken.revision, taken.files) == (sha, ("README.md", "RWKV-4.pth"))
    with pytest.raises(HubError, match=rf"them/rwkv: has no file 'RWKV-6\.pth' at {sha}; did you mean"):
        zoo.pull("them/rwkv", tmp_path / "other", files=["RWKV-6.pth"], **hub.nobody)
    with pytest.raises(HubError, match=r"holds no model .*, but RWKV-4\.pth, RWKV-5\.pth; name one with files="):
        zoo.pull("them/rwkv", tmp_path / "other", **hub.nobody)
    assert hub.count("GET", "/RWKV-5") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out"]


def test_old_weights_are_taken_only_where_there_are_no_others(hub, tmp_path):
    old = {"config.json": b"{}", "pytorch_model.bin": b"x" * 2000}
    hub.publish("them/old", old)
    assert zoo.pull("them/old", tmp_path / "a", **hub.nobody).files == ("config.json", "pytorch_model.bin")
    hub.publish("them/both", {**old, "model.safetensors": b"y" * 2000})
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        zoo.pull("them/both", tmp_path / "b", **hub.nobody)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "model-/../../../../x.safetensors", "a\\..\\vocab.txt", "/etc/vocab.txt", "a/./b"]
)
def test_files_that_lead_out_of_the_folder(hub, tmp_path, name):
    hub.publish("them/evil", {"config.json": b"{}", "model.safetensors": b"x" * 2000, name: b"gotcha"})
    with pytest.raises(HubError, match="leads out of its folder; nothing was taken"):
        zoo.pull("them/evil", tmp_path / "out", **hub.nobody)
    assert hub.count("GET", "resolve") == 0
    with pytest.raises(HubError, match="leads out of its folder"):
        zoo.pull("them/fine", tmp_path / "out", files=["../x"], **hub.nobody)


@pytest.mark.parametrize(
    "revision",
    ["", "../main", "a..b", "/main", "main/", "a//b", ".hidden", "a/.b", "-x", "a b", "a\nb", "a@{1}", "x.lock", "a:b"],
)
def test_revisions_that_are_none(hub, revision):
    with pytest.raises(HubError, match="is not a revision of zoo-org/retnet: give a branch, a tag or a commit"):
        zoo.create_model(f"hf-hub:{NAME}@{revision}", **hub.nobody)
    assert hub.requests == []
    for fine in ("main", "v1.0", "refs/pr/3", "a" * 40, "feature/x-1"):
        check_revision(fine)


@pytest.mark.parametrize("name", ["../retnet", "a/b/c", "/etc", "a b/c", "a/b?x=1", "a/b#c", "", "a/..", "é/x"])
def test_repositories_that_are_none(hub, name):
    with pytest.raises(HubError, match="is not a repository: write it as org/name"):
        zoo.create_model(f"hf-hub:{name}", **hub.nobody)
    assert hub.requests == []


def test_what_is_not_there(published, saved, tmp_path):
    hub = published
    hub.publish_folder("alice/secret", saved, private=True)
    hub.publish_folder("them/gated", saved, gated=True)
    hub.repos[NAME].tags["v1"] = hub.sha

    def said(reference, who):
        with pytest.raises(HubError) as caught:
            zoo.pull(reference, tmp_path / "out", **who)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such repository at http" in said("them/none", hub.alice)
    assert "or it is private: then log in with `hf auth login`" in said("alice/secret", hub.nobody)
    assert "or your account may not see it" in said("alice/secret", hub.bob)
    assert "is gated: ask for access at http" in said("them/gated", hub.alice)
    assert said("them/gated", hub.nobody).endswith("and log in with `hf auth login` or set HF_TOKEN")
    assert said(f"{NAME}@v2", hub.alice) == f"{NAME}: has no revision 'v2'; did you mean 'v1'?"
    with pytest.raises(HubError, match="two revisions are given"):
        zoo.pull(f"{NAME}@v1", tmp_path / "out", revision="main", **hub.nobody)
    hub.fail("GET", f"/api/models/{NAME}$", 503, times=100)
    assert "the server has a problem (503)" in said(NAME, hub.alice)
    assert "no connection" in said("them/other", {"endpoint": "http://127.0.0.1:9", "token": False})
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_wait_that_the_hub_asks_for(published, tmp_path):
    published.fail("GET", "resolve/.*/model.safetensors", 429, headers={"Retry-After": "11"})
    zoo.pull(NAME, tmp_path / "out", **published.nobody)
    assert any(11 <= wait < 13 for wait in published.waits)


def test_code_of_a_repository_is_not_run(hub, saved, tmp_path):
    """A model of another type asks for its own code: it is refused, with the reason, and the code is not run."""
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass C: pass\n".encode()
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "modeling_zoo.C", "AutoModel": "modeling_zoo.C"}}
    weights = (saved / "model.safetensors").read_bytes()
    files = {"modeling_zoo.py": code, "model.safetensors": weights}
    hub.publish("them/evil", {**files, "config.json": json.dumps(config).encode()})
    with pytest.raises(HubError, match="holds a model of type 'evil'"):
        zoo.create_model("hf-hub:them/evil", **hub.nobody)
    ours = json.loads((saved / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil--x.C"}}
    hub.publish("them/sly", {**files, "config.json": json.dumps(ours).encode()})
    with pytest.raises(CheckpointError, match=r"asks for code of its own \(auto_map"):
        zoo.create_model("hf-hub:them/sly", **hub.nobody)
    assert not marker.exists()
