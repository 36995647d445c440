"""`zoo push` and `zoo pull`, in a process that finds the Hub as users' processes do, by HF_ENDPOINT and HF_TOKEN."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import snapshot_download

import zoo
from zoo.hub.weights import weights_hash

# One process runs several commands: each start imports torch.
RUN = """
import json, sys
from typer.testing import CliRunner
from zoo.cli.main import app
out = []
for args in json.loads(sys.argv[1]):
    ran = CliRunner().invoke(app, args)
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    out.append([ran.exit_code, ran.stdout, ran.stderr])
print(json.dumps(out), file=sys.__stdout__)
"""


def zoo_commands(hub, tmp_path, *commands: list[str], **env: str):
    """Exit code, stdout and stderr of each command."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    ran = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "COLUMNS": "200", **settings, **env},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_cycle_by_commands(hub, saved, tmp_path):
    push = ["push", str(saved), "alice/retnet"]
    dry, pushed, pulled, again, shown, missing = zoo_commands(
        hub,
        tmp_path,
        [*push, "--dry-run"],
        [*push, "--public", "--tag", "v7", "--json"],
        ["pull", "alice/retnet", "--revision", "v7", "--out", "out", "--json"],
        ["pull", "alice/retnet", "--out", "out"],
        ["show", "out", "--json"],
        ["pull", "alice/retnt", "--out", "x"],
        HF_TOKEN="hf_alice",
    )
    assert dry[0] == 0
    assert "model.safetensors" in dry[1]
    assert "stays here: .env, checkpoints/, log.jsonl" in dry[2]
    assert f"would go to {hub.url}/alice/retnet (private): 7 files" in dry[2]
    published = json.loads(pushed[1])
    assert (published["tag"], published["private"]) == ("v7", False)
    assert published["commit"] == json.loads(pulled[1])["revision"] == hub.repos["alice/retnet"].tags["v7"]
    assert again[0] == 2
    assert again[2].startswith("error: out: exists and is not empty")
    assert json.loads(shown[1])["hub"] == f"alice/retnet@{published['commit']}"
    assert missing[0] == 2
    assert missing[1] == ""
    assert missing[2].startswith(f"error: alice/retnt: no such repository at {hub.url}")
    assert missing[2].count("\n") == 1
    # With the Hub switched off: what the cache has, and a push that says so.
    snapshot_download("alice/retnet", revision="v7", cache_dir=tmp_path / "hf" / "hub", **hub.alice)
    pull = ["pull", "alice/retnet@v7", "--out", "x"]
    pulled, none, pushed = zoo_commands(
        hub, tmp_path, pull, ["pull", "alice/none", "--out", "y"], push, HF_HUB_OFFLINE="1"
    )
    assert pulled[0] == 0
    assert none[0] == pushed[0] == 2
    assert "alice/none: not, or not whole, in the cache" in none[2]
    assert "switched off by HF_HUB_OFFLINE=1" in pushed[2]
    assert weights_hash(tmp_path / "x") == weights_hash(saved)


@pytest.mark.slow
def test_a_repository_is_imported(hub, tmp_path):
    from zoo.convert.layouts import export_model

    export_model(zoo.create_model("mamba-tiny"), "transformers", tmp_path / "model")
    sha = hub.publish_folder("them/mamba", tmp_path / "model")
    imported, shown, none = zoo_commands(
        hub,
        tmp_path,
        ["import", "them/mamba@main", "--out", "out", "--json"],
        ["show", "out", "--json"],
        ["import", "them/none", "--out", "x"],
    )
    assert json.loads(imported[1])["layout"] == "transformers"
    assert json.loads(shown[1])["hub"] == f"them/mamba@{sha}"
    assert none[2].startswith(f"error: them/none: no such repository at {hub.url}, or it is private")
