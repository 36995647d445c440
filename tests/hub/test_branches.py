"""A push to another branch, and as a pull request."""

from __future__ import annotations

import shutil

import pytest
import torch

import zoo
from zoo.errors import HubError

NAME = "alice/retnet"


@pytest.fixture
def better(saved, other, tmp_path):
    """The folder of the next version."""
    folder = shutil.copytree(saved, tmp_path / "better")
    other.save_pretrained(folder)
    return folder


def test_a_branch_is_made_and_moves_on(hub, saved, better, other, logits):
    zoo.push(saved, NAME, **hub.alice)
    main = hub.repos[NAME].branches["main"]
    pushed = zoo.push(better, NAME, revision="half", max_shard_size="100KB", **hub.alice)
    assert (pushed.revision, pushed.tag, pushed.pull_request) == ("half", None, None)
    assert pushed.removed == ["model.safetensors"]  # of the branch
    assert hub.repos[NAME].branches == {"main": main, "half": pushed.commit}
    assert set(hub.repos[NAME].tags) == {"v1"}
    loaded = zoo.create_model(f"hf-hub:{NAME}@half", **hub.alice)
    assert torch.equal(logits(loaded), logits(other))
    again = zoo.push(saved, NAME, revision="half", tag="half-1", message="back", **hub.alice)
    assert hub.repos[NAME].tags["half-1"] == again.commit
    assert hub.repos[NAME].messages[-1] == "back"
    assert hub.repos[NAME].branches["main"] == main


def test_a_branch_of_a_new_repository(hub, saved):
    pushed = zoo.push(saved, NAME, revision="try", **hub.alice)
    assert hub.repos[NAME].branches["try"] == pushed.commit
    assert set(hub.repos[NAME].commits[hub.repos[NAME].branches["main"]]) == {".gitattributes"}


def test_a_pull_request(hub, saved, better, other, logits):
    """Also to what one may only read; the owner's branch and tags stay; a second push goes on with it."""
    zoo.push(saved, NAME, private=False, **hub.alice)
    main = hub.repos[NAME].branches["main"]
    pushed = zoo.push(better, NAME, private=False, create_pr=True, **hub.bob)
    assert pushed.pull_request == f"{hub.url}/{NAME}/discussions/1"
    assert (pushed.tag, pushed.commit) == (None, hub.repos[NAME].branches["refs/pr/1"])
    assert hub.repos[NAME].branches["main"] == main
    assert set(hub.repos[NAME].tags) == {"v1"}
    loaded = zoo.create_model(f"hf-hub:{NAME}@refs/pr/1", **hub.bob)
    assert torch.equal(logits(loaded), logits(other))
    more = zoo.push(better, NAME, private=False, revision="refs/pr/1", max_shard_size="100KB", **hub.alice)
    assert hub.repos[NAME].branches["refs/pr/1"] == more.commit != pushed.commit
    assert more.removed == ["model.safetensors"]


def test_by_the_model_itself(hub, saved, other):
    zoo.push(saved, NAME, **hub.alice)
    url = other.push_to_hub(NAME, create_pr=True, private=None, commit_message="mine", **hub.alice)
    assert url == f"{hub.url}/{NAME}/discussions/1"
    assert hub.repos[NAME].messages[-1] == "mine"


def test_by_save_pretrained(hub, saved, other, tmp_path):
    zoo.push(saved, NAME, **hub.alice)
    other.save_pretrained(tmp_path / "m", push_to_hub=True, repo_id=NAME, revision="next", **hub.alice)
    assert "next" in hub.repos[NAME].branches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": "v1"}, "'v1' is a tag, which stays where it is"),
        ({"revision": "a" * 40}, "is a commit; give the branch that is to move on"),
        ({"revision": "../x"}, "is not a revision of alice/retnet"),
        ({"revision": "none", "create_pr": True}, "has no branch 'none'"),
        ({"create_pr": True, "tag": "v2"}, "a pull request has no tag of its own"),
    ],
)
def test_what_is_no_branch(hub, saved, better, options, message):
    zoo.push(saved, NAME, **hub.alice)
    with pytest.raises(HubError, match=message):
        zoo.push(better, NAME, **options, **hub.alice)
    assert len(hub.repos[NAME].commits) == 2


def test_who_may_not_propose(hub, saved):
    with pytest.raises(HubError, match="alice/none: no such repository"):
        zoo.push(saved, "alice/none", create_pr=True, **hub.alice)
    assert not hub.repos
    zoo.push(saved, NAME, private=False, **hub.alice)
    with pytest.raises(HubError, match="is public; say that the model may be"):
        zoo.push(saved, NAME, create_pr=True, **hub.bob)
    with pytest.raises(HubError, match="forbidden; you need a token that may write there"):
        zoo.push(saved, NAME, private=False, revision="mine", **hub.bob)
