"""Killed in the middle (SIGKILL: nothing can be tidied up): nothing is taken for whole, and the next call goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

import zoo
from zoo.errors import HubError
from zoo.hub.weights import weights_hash

pytestmark = pytest.mark.slow
NAME = "alice/retnet"
SHARDS = "100KB"
PUSH = "import sys, zoo; zoo.push(sys.argv[1], 'alice/retnet', max_shard_size='100KB')"
PULL = "import sys, zoo; zoo.pull('alice/retnet', sys.argv[1])"
LOAD = "import zoo; zoo.create_model('hf-hub:alice/retnet')"


def killed(hub, fault, tmp_path, code, *args, ready=lambda: True):
    """Run code in a process of its own, and kill it at the fault, once the rest of it is `ready`."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_alice", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    env = {**os.environ, **settings, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    ran = subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=env, stderr=subprocess.PIPE, text=True)
    if not fault.reached.wait(120):
        ran.kill()
        pytest.fail(f"the fault was not reached: {ran.communicate()[1][-2000:]}")
    for _ in range(1200):
        if ready():
            break
        time.sleep(0.05)
    ran.send_signal(signal.SIGKILL)
    ran.communicate()
    fault.times = 0
    fault.go.set()
    assert ran.returncode == -signal.SIGKILL


def sent(hub):
    """Bytes that came in with each LFS object, also of those that did not arrive whole."""
    return [(path.rsplit("/", 1)[-1], size) for method, path, _, size in list(hub.requests) if method == "PUT"]


def test_a_push_killed_between_its_shards(hub, saved, tmp_path):
    """Of several shards some have arrived: they are not sent again, and the rest is, each once."""
    fault = hub.fail("PUT", "/lfs/[0-7]", drop_after=1000, wait=True, times=100)
    killed(hub, fault, tmp_path, PUSH, saved)
    arrived = dict(hub.stored)
    assert sorted(hub.repos[NAME].files) == [".gitattributes"]
    assert not hub.repos[NAME].tags
    with pytest.raises(HubError, match="holds no model at"):
        zoo.pull(NAME, tmp_path / "early", **hub.alice)
    hub.requests.clear()
    pushed = zoo.push(saved, NAME, max_shard_size=SHARDS, **hub.alice)
    oids = sent(hub)
    assert oids
    assert not {oid for oid, _ in oids} & set(arrived)
    assert len({oid for oid, _ in oids}) == len(oids)
    large = {blob.oid: len(blob.data) for blob in hub.repos[NAME].files.values() if blob.lfs}
    assert sum(size for _, size in oids) == sum(large.values()) - sum(len(data) for data in arrived.values())
    assert hub.repos[NAME].tags == {"v1": pushed.commit}
    zoo.pull(NAME, tmp_path / "out", **hub.alice)
    assert weights_hash(tmp_path / "out") == weights_hash(saved)


@pytest.mark.parametrize(
    ("method", "path", "how", "commits"),
    [
        ("POST", r"\.git/info/lfs/", {"lost": True}, 1),
        ("POST", "/commit/main", {"drop_after": 100}, 1),
        ("POST", "/commit/main", {"lost": True}, 2),  # it is published, and nobody heard of it
        ("POST", "/tag/", {"lost": True}, 2),
    ],
)
def test_a_push_killed_at_other_moments(hub, saved, tmp_path, method, path, how, commits):
    fault = hub.fail(method, path, wait=True, **how)
    killed(hub, fault, tmp_path, PUSH, saved)
    assert len(hub.repos[NAME].commits) == commits
    hub.requests.clear()
    pushed = zoo.push(saved, NAME, max_shard_size=SHARDS, **hub.alice)
    assert len(hub.repos[NAME].commits) == 2
    assert hub.repos[NAME].tags == {"v1": pushed.commit}
    if commits == 2 or path == "/commit/main":
        assert sent(hub) == []


def test_a_pull_killed_in_the_middle(hub, saved, tmp_path):
    """In the middle of a shard: no folder, no leftovers, and of what had arrived whole no byte comes again."""
    zoo.push(saved, NAME, max_shard_size=SHARDS, **hub.alice)
    shards = sorted(n for n in hub.repos[NAME].files if n.endswith(".safetensors"))
    fault = hub.fail("GET", f"resolve/.*/{shards[-1]}", drop_after=1000, wait=True, times=100)
    part = tmp_path / ".out.zoo-pull"

    def ready():
        return len(list(part.glob("model-*.safetensors"))) == len(shards) - 1

    killed(hub, fault, tmp_path, PULL, tmp_path / "out", ready=ready)
    assert ready()
    assert not (tmp_path / "out").exists()
    hub.served.clear()
    hub.requests.clear()
    zoo.pull(NAME, tmp_path / "out", **hub.alice)
    again = [(path.split("/")[-1], size) for path, size in hub.served if path.endswith(".safetensors")]
    assert again == [(shards[-1], len(hub.repos[NAME].files[shards[-1]].data))]
    assert weights_hash(tmp_path / "out") == weights_hash(saved)
    assert not list(tmp_path.glob(".out*"))
    assert not list((tmp_path / "out").rglob("*.incomplete"))


def test_a_load_killed_in_the_middle(hub, saved, tmp_path, logits):
    """Through the cache, as `create_model` goes: the half file is not taken for one."""
    import torch

    zoo.push(saved, NAME, max_shard_size=SHARDS, **hub.alice)
    shard = sorted(n for n in hub.repos[NAME].files if n.endswith(".safetensors"))[1]
    fault = hub.fail("GET", f"resolve/.*/{shard}", drop_after=1000, wait=True, times=100)
    killed(hub, fault, tmp_path, LOAD)
    with pytest.raises(HubError, match="not, or not whole, in the cache"):
        zoo.create_model(f"hf-hub:{NAME}", local_files_only=True, **hub.alice)
    loaded = zoo.create_model(f"hf-hub:{NAME}", **hub.alice)
    assert torch.equal(logits(loaded), logits(zoo.create_model(str(saved))))
