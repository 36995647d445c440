"""The pull side through `olah`, a mirror that somebody else wrote, in front of the double."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

import zoo
from zoo.errors import HubError
from zoo.hub.weights import weights_hash

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("olah") is None, reason="needs the package olah"),
]
NAME = "zoo-org/retnet"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def mirror(hub, tmp_path):
    """The address of a mirror whose Hub is the double."""
    port = free_port()
    here, there = f"127.0.0.1:{port}", hub.url.removeprefix("http://")
    options = {
        "host": "127.0.0.1", "port": str(port), "hf-scheme": "http", "hf-netloc": there, "hf-lfs-netloc": there,
        "mirror-netloc": here, "mirror-lfs-netloc": here, "repos-path": str(tmp_path / "repos"),
        "log-path": str(tmp_path / "logs"), "metadata-cache-ttl": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "olah.server", *(part for k, v in options.items() for part in (f"--{k}", v))]
    with (tmp_path / "said").open("w") as said:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said)
        try:
            for _ in range(600):
                assert server.poll() is None, (tmp_path / "said").read_text()
                try:
                    urllib.request.urlopen(f"http://{here}/", timeout=5)
                except urllib.error.HTTPError:
                    break
                except OSError:
                    time.sleep(0.2)
                else:
                    break
            yield f"http://{here}"
        finally:
            server.terminate()
            server.wait()


def test_a_pull_through_a_mirror(hub, mirror, saved, tmp_path, logits):
    pushed = zoo.push(saved, NAME, private=False, max_shard_size="100KB", **hub.alice)
    there = {"endpoint": mirror, "token": False}
    taken = zoo.pull(f"{NAME}@v1", tmp_path / "out", **there)
    assert taken.revision == pushed.commit
    assert weights_hash(tmp_path / "out") == weights_hash(saved)
    model = zoo.create_model(f"hf-hub:{NAME}@{pushed.commit}", **there)
    assert torch.equal(logits(model), logits(zoo.create_model(str(saved))))
    with pytest.raises(HubError, match="zoo-org/none: "):
        zoo.pull("zoo-org/none", tmp_path / "none", **there)
    with pytest.raises(HubError, match=f"{NAME}: "):
        zoo.pull(f"{NAME}@v9", tmp_path / "none", **there)
