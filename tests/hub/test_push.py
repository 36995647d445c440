"""`zoo.push`: what goes, what stays, one commit and one tag; interrupted, it goes on; errors say what to do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import zoo
from zoo.errors import CheckpointError, ConfigError, DataError, HubError
from zoo.hub.push import _free_tag
from zoo.hub.weights import weights_hash
from zoo.train.card import card

NAME = "alice/retnet"


@pytest.fixture
def model_folder(saved, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(saved, tmp_path / "model")


def test_what_goes_and_what_stays(hub, saved):
    plan = zoo.push(saved, NAME, dry_run=True, **hub.alice)
    assert sorted(plan.files) == [
        "README.md", "config.json", "curve.png", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    stays = [".env", "checkpoints/", "log.jsonl", "notes.txt", "optimizer.pt", "pytorch_model.bin", "secret.png"]
    assert plan.stays == stays
    assert plan.size == sum((saved / name).stat().st_size for name in plan.files)
    assert (plan.commit, plan.private) == (None, True)
    assert hub.requests == []


def test_one_commit_and_a_tag(hub, saved):
    pushed = zoo.push(saved, NAME, **hub.alice)
    repo = hub.repos[NAME]
    assert repo.private
    assert repo.messages == ["initial commit", "zoo push: v1"]
    assert repo.tags == {"v1": pushed.commit}
    assert repo.branches == {"main": pushed.commit}
    assert {n: b.data for n, b in repo.files.items() if n != ".gitattributes"} == {
        name: (saved / name).read_bytes() for name in pushed.files
    }
    assert repo.files["model.safetensors"].lfs


def test_the_same_again_sends_nothing(hub, saved):
    first = zoo.push(saved, NAME, **hub.alice)
    uploads = hub.count("PUT", "/lfs/")
    again = zoo.push(saved, NAME, **hub.alice)
    assert (again.commit, again.tag) == (first.commit, "v1")
    assert hub.count("PUT", "/lfs/") == uploads
    assert len(hub.repos[NAME].commits) == 2


def test_a_new_version_replaces_the_weights_whole(hub, model_folder, other):
    zoo.push(model_folder, NAME, max_shard_size="100KB", **hub.alice)
    old = {name for name in hub.repos[NAME].files if name.endswith(("safetensors", "index.json"))}
    assert len(old) > 2
    other.save_pretrained(model_folder)
    pushed = zoo.push(model_folder, NAME, message="better", **hub.alice)
    assert set(pushed.removed) == old
    assert pushed.tag == "v2"
    assert hub.repos[NAME].messages[-1] == "better"
    assert "model.safetensors" in hub.repos[NAME].files
    assert not old & set(hub.repos[NAME].files)


def test_shards_hold_the_same_weights(hub, saved, tmp_path):
    zoo.push(saved, NAME, max_shard_size="100KB", **hub.alice)
    for name, blob in hub.repos[NAME].files.items():
        (tmp_path / name).write_bytes(blob.data)
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    assert weights_hash(tmp_path) == weights_hash(saved)
    with pytest.raises(ConfigError, match="max_shard_size: expected a size such as '5GB'"):
        zoo.push(saved, NAME, max_shard_size="many", **hub.alice)


def test_a_model_object(hub, logits, tmp_path):
    model = zoo.create_model("retnet-tiny")
    assert model.push_to_hub(NAME, **hub.alice).startswith(f"{hub.url}/{NAME}/commit/")
    assert hub.repos[NAME].private
    loaded = zoo.create_model(f"hf-hub:{NAME}", **hub.alice)
    assert torch.equal(logits(loaded), logits(model))
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="alice/saved", **hub.alice)
    assert hub.repos["alice/saved"].files["model.safetensors"].data == (tmp_path / "model.safetensors").read_bytes()


def test_a_name_alone_is_ones_own(hub, saved, tmp_path):
    assert zoo.push(saved, "retnet", dry_run=True, **hub.bob).repo == "bob/retnet"
    pushed = zoo.push(saved, "retnet", **hub.alice)
    assert (pushed.repo, pushed.changed) == (NAME, True)
    assert not zoo.push(saved, "retnet", **hub.alice).changed
    zoo.create_model("retnet-tiny").save_pretrained(tmp_path / "mine", push_to_hub=True, **hub.alice)
    assert "alice/mine" in hub.repos


def test_public_must_be_said(hub, saved):
    zoo.push(saved, "alice/open", private=False, **hub.alice)
    assert not hub.repos["alice/open"].private
    with pytest.raises(HubError, match=r"alice/open: is public; say that the model may be, with private=False"):
        zoo.push(saved, "alice/open", **hub.alice)


def test_an_upload_that_breaks_off_goes_on(hub, saved):
    """Two shards, the second breaks off each time: nothing is visible, and the first is not sent again."""
    hub.fail("PUT", "/lfs/", drop_after=1000, times=1)
    zoo.push(saved, "alice/lucky", **hub.alice)  # one drop is repaired within the call
    hub.stored.clear()
    first, *_ = [asked for asked in hub.requests if asked[0] == "PUT"]
    assert first[2:] == (0, 1000)

    fault = hub.fail("PUT", "/lfs/[0-7]", drop_after=1000, times=100)
    with pytest.raises(HubError, match=r"no connection .* then run the same command again"):
        zoo.push(saved, NAME, max_shard_size="20KB", **hub.alice)
    assert sorted(hub.repos[NAME].files) == [".gitattributes"]
    assert not hub.repos[NAME].tags
    with pytest.raises(HubError, match="holds no model at"):
        zoo.create_model(f"hf-hub:{NAME}", **hub.alice)
    arrived = set(hub.stored)
    assert arrived
    fault.times = 0
    before = len(hub.requests)
    zoo.push(saved, NAME, max_shard_size="20KB", **hub.alice)
    sent = {path.rsplit("/", 1)[-1] for method, path, _, _ in hub.requests[before:] if method == "PUT"}
    assert sent
    assert not sent & arrived


def test_a_full_hub_is_waited_for(hub, saved):
    hub.fail("PUT", "/lfs/", 429, headers={"Retry-After": "7"})
    zoo.push(saved, NAME, **hub.alice)
    assert any(7 <= wait < 9 for wait in hub.waits)
    assert hub.repos[NAME].tags


def test_somebody_else_in_between(hub, saved, model_folder, other, monkeypatch):
    zoo.push(saved, NAME, **hub.alice)
    other.save_pretrained(model_folder)

    def meanwhile(*args):
        hub.publish(NAME, {"README.md": b"theirs"})
        return _free_tag(*args)

    monkeypatch.setattr("zoo.hub.push._free_tag", meanwhile)
    with pytest.raises(HubError, match=r"somebody else changed it meanwhile; nothing was published"):
        zoo.push(model_folder, NAME, **hub.alice)
    assert set(hub.repos[NAME].files) == {"README.md"}
    assert set(hub.repos[NAME].tags) == {"v1"}


def test_a_tag_that_did_not_arrive_comes_with_the_next_call(hub, saved):
    fault = hub.fail("POST", "/tag/", 503, times=100)
    with pytest.raises(HubError, match=r"the server has a problem \(503\)"):
        zoo.push(saved, NAME, **hub.alice)
    fault.times = 0
    pushed = zoo.push(saved, NAME, **hub.alice)
    assert hub.repos[NAME].tags == {"v1": pushed.commit}
    assert len(hub.repos[NAME].commits) == 2


@pytest.mark.parametrize(
    ("who", "name", "message"),
    [
        ("nobody", NAME, "not logged in; log in with `hf auth login` or set HF_TOKEN"),
        ("bob", NAME, r"alice/retnet: forbidden; you need a token that may write there \(You don't have the rights"),
        ("alice", "alice/../x", "is not a repository: write it as org/name"),
        ("alice", "alice/a--b", "is not a repository"),
        ("alice", "alice/a b", "is not a repository"),
        ("alice", "alice/a\n", "is not a repository"),
        ("alice", "https://huggingface.co/alice/a", "is not a repository: .*; did you mean 'alice/a'?"),
        ("alice", "https://huggingface.co/alice/a/tree/dev", "did you mean 'alice/a@dev'?"),
        ("nobody", "retnet", "not logged in; log in with `hf auth login`"),
    ],
)
def test_who_may_not_and_what_is_no_name(hub, saved, who, name, message):
    with pytest.raises(HubError, match=message) as caught:
        zoo.push(saved, name, **getattr(hub, who))
    assert "\n" not in str(caught.value)
    assert not hub.repos


def test_a_token_that_is_wrong(hub, saved):
    with pytest.raises(HubError, match="the token is not valid; log in"):
        zoo.push(saved, NAME, endpoint=hub.url, token="hf_old")


def test_tags(hub, saved, model_folder, other):
    assert zoo.push(saved, NAME, tag="first", **hub.alice).tag == "first"
    assert zoo.push(saved, NAME, tag="first", **hub.alice).tag == "first"
    with pytest.raises(HubError, match=r"'\.\./x' is not a revision of alice/retnet"):
        zoo.push(saved, NAME, tag="../x", **hub.alice)
    other.save_pretrained(model_folder)
    zoo.push(model_folder, NAME, **hub.alice)
    with pytest.raises(HubError, match="tag 'first' names an earlier version; give a new one"):
        zoo.push(model_folder, NAME, tag="first", **hub.alice)


def test_no_network(hub, saved, monkeypatch):
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:9: no connection"):
        zoo.push(saved, NAME, endpoint="http://127.0.0.1:9", token="hf_alice")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="switched off by HF_HUB_OFFLINE=1"):
        zoo.push(saved, NAME, **hub.alice)


def test_folders_that_are_not_pushed(hub, model_folder, tmp_path):
    with pytest.raises(CheckpointError, match="modl: no such folder; did you mean 'model'"):
        zoo.push(tmp_path / "modl", NAME, **hub.alice)
    with pytest.raises(CheckpointError, match=r"no config\.json in it; push the folder of a saved model"):
        zoo.push(tmp_path, NAME, **hub.alice)
    (model_folder / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the training run in it is not finished"):
        zoo.push(model_folder, NAME, **hub.alice)
    (model_folder / "train.json").write_text("{}")
    (tmp_path / "outside.txt").write_text("private")
    (model_folder / "vocab.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: is a link that leads out of the folder"):
        zoo.push(model_folder, NAME, **hub.alice)
    (model_folder / "vocab.txt").unlink()
    (model_folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not valid JSON"):
        zoo.push(model_folder, NAME, **hub.alice)
    (model_folder / "generation_config.json").unlink()
    values = json.loads((model_folder / "config.json").read_text())
    values |= {"model_type": "foreign", "auto_map": {"AutoModel": "code.Model"}}
    (model_folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"asks for code of its own \(auto_map\)"):
        zoo.push(model_folder, NAME, **hub.alice)
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights in it"):
        zoo.push(model_folder, NAME, **hub.alice)
    assert not hub.repos


def score(weights: str | None) -> str:
    """A score of weights with this hash."""
    row = {"role": "student", "name": "m", "kl": 0.5, **({} if weights is None else {"weights_sha256": weights})}
    return json.dumps({"rows": [{"role": "teacher", "name": "t"}, row]})


def test_numbers_that_belong_to_other_weights(hub, model_folder, tmp_path):
    own, foreign = weights_hash(model_folder), "0" * 64
    marked = f"# A card\n\nThese are the numbers of the weights whose SHA-256 is `{foreign}`.\n"
    beside = tmp_path / "card"
    (beside / ".eval_results").mkdir(parents=True)

    def refused(text: str, scored: str | None, message: str) -> None:
        (beside / "README.md").write_text(text)
        (beside / "score.json").unlink(missing_ok=True)
        if scored is not None:
            (beside / "score.json").write_text(scored)
        with pytest.raises((CheckpointError, DataError), match=message) as caught:
            zoo.push(model_folder, NAME, card=beside, **hub.alice)
        assert "zoo-push" not in str(caught.value)  # paths are those of the user

    refused("# A card\n", score(foreign), r"score\.json: was measured on other weights \(sha256 000000000000")
    refused("# A card\n", score(None), r"score\.json: does not say which weights it was measured on")
    refused("# A card\n", "{}", r"score\.json: not a score")
    refused("# A card\n", score(own), r"README\.md:1: is not what was measured and recorded here")
    refused(marked, None, r"README\.md: was measured on other weights")
    refused("---\nlicense: mit\ntags: [a\n---\n", None, r"README\.md:3: its front matter is not valid YAML")
    refused("---\nmodel-index: [{name: m}]\n---\n# A card\n", None, "which weights its results .model-index. belong to")
    (beside / ".eval_results" / "zoo.yaml").write_text("[]")
    refused("# A card\n", None, r"zoo\.yaml: no score\.json says which weights these results belong to")
    assert hub.requests == []


def test_a_measured_card_goes_with_its_weights(hub, model_folder, other, tmp_path):
    (model_folder / "score.json").write_text(score(weights_hash(model_folder)))
    card(model_folder, overwrite=True, repo=NAME, license="apache-2.0")
    pushed = zoo.push(model_folder, NAME, max_shard_size="100KB", **hub.alice)
    assert {"score.json", "card.json", "README.md"} <= set(pushed.files)
    zoo.pull(NAME, tmp_path / "out", **hub.alice)
    zoo.push(tmp_path / "out", "alice/copy", **hub.alice)  # it is whole: the card still stands for its weights
    with (model_folder / "README.md").open("a") as file:
        file.write("\nIt beats everything.\n")
    with pytest.raises(CheckpointError, match=r"README\.md:\d+: is not what was measured"):
        zoo.push(model_folder, NAME, **hub.alice)
    card(model_folder)
    other.save_pretrained(model_folder)
    with pytest.raises(CheckpointError, match="was measured on other weights"):
        zoo.push(model_folder, NAME, **hub.alice)


def test_a_card_that_stays_behind_must_fit_too(hub, model_folder, other):
    text = f"These are the numbers of the weights whose SHA-256 is `{weights_hash(model_folder)}`."
    (model_folder / "README.md").write_text(text)
    zoo.push(model_folder, NAME, **hub.alice)
    other.save_pretrained(model_folder)
    (model_folder / "README.md").unlink()
    with pytest.raises(HubError, match="its card has the numbers of the weights before"):
        zoo.push(model_folder, NAME, **hub.alice)
    assert len(hub.repos[NAME].commits) == 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"status": 401, "error": "expired"}, "the token is not valid; log in"),
        ({"status": 403, "error": "read only"}, r"forbidden; you need a token that may write there \(read only\)"),
        ({"status": 409, "error": "a rebase"}, r"in conflict with what is there \(a rebase\)"),
        ({"status": 412, "error": "stale"}, "somebody else changed it meanwhile; nothing was published"),
        ({"status": 429, "error": "slow"}, "too many requests; wait some minutes, then run the same command again"),
        ({"status": 500, "error": "oops"}, r"the server has a problem \(500\); try later"),
        ({"drop_after": 50}, "no connection"),
    ],
)
def test_a_commit_that_is_refused(hub, saved, how, message):
    """Nothing is published, and the same call goes on: what was uploaded is not sent again."""
    hub.fail("POST", "/commit/", **how)
    with pytest.raises(HubError, match=message) as caught:
        zoo.push(saved, NAME, **hub.alice)
    assert "\n" not in str(caught.value)
    assert (len(hub.repos[NAME].commits), hub.repos[NAME].tags) == (1, {})
    uploads = hub.count("PUT", "/lfs/")
    assert uploads
    pushed = zoo.push(saved, NAME, **hub.alice)
    assert hub.repos[NAME].tags == {"v1": pushed.commit}
    assert hub.count("PUT", "/lfs/") == uploads


def test_a_commit_whose_answer_is_lost(hub, saved):
    """It is published: the next call sees that, and gives it its tag."""
    hub.fail("POST", "/commit/", lost=True)
    with pytest.raises(HubError, match="no connection"):
        zoo.push(saved, NAME, **hub.alice)
    assert len(hub.repos[NAME].commits) == 2
    pushed = zoo.push(saved, NAME, **hub.alice)
    assert not pushed.changed
    assert (len(hub.repos[NAME].commits), hub.repos[NAME].tags) == (2, {"v1": pushed.commit})


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_server_that_stumbles_while_files_go_up(hub, saved, status):
    hub.fail("PUT", "/lfs/", status, times=2)
    assert zoo.push(saved, NAME, **hub.alice).tag == "v1"
