"""`zoo import` and `zoo export`: the files they leave, and what a wrong word is answered with."""

from __future__ import annotations

import pytest
import torch
from peers import PEERS

import zoo

MAMBA = next(peer for peer in PEERS if str(peer) == "transformers-mamba")


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    return folder, MAMBA.save(folder)


@torch.no_grad()
def test_in_and_out(run, saved, tmp_path):
    folder, model = saved
    report = run("import", folder, "--out", tmp_path / "ours", "--json").json()
    assert report["layout"] == "transformers"
    assert report["family"] == "mamba"
    inputs = MAMBA.inputs()
    expected = MAMBA.logits(model, inputs)
    got = zoo.create_model(str(tmp_path / "ours")).eval()(**inputs).logits
    assert torch.allclose(got, expected, atol=1e-5)
    ran = run("export", tmp_path / "ours", "--layout", "mamba_ssm", "--out", tmp_path / "ssm")
    assert ran.code == 0
    assert "mamba_ssm" in ran.err
    assert run("import", tmp_path / "ssm", "--out", tmp_path / "again", "--json").json()["layout"] == "mamba_ssm"
    again = zoo.create_model(str(tmp_path / "again")).eval()(**inputs).logits
    assert torch.equal(again, got)


def test_wrong_words(run, saved, tmp_path):
    folder, _ = saved
    assert "did you mean 'mamba_ssm'" in run("import", folder, "--layout", "mamba-ssm", "--out", "x").error
    assert "no such file or folder" in run("import", "nowhere", "--out", "x").error
    assert "exists already" in run("import", folder, "--out", folder).error
    assert "float32" in run("import", folder, "--out", "x", "--dtype", "floot32").error
    zoo.create_model("retnet-tiny").save_pretrained(tmp_path / "retnet")
    error = run("export", tmp_path / "retnet", "--layout", "mamba_ssm", "--out", "x").error
    assert "nothing there has layers of retention" in error
    assert not (tmp_path / "x").exists()


def test_layouts_are_listed(run):
    rows = run("list", "--layouts", "--json").json()
    assert {"layout": "mamba_ssm", "family": "mamba", "direction": "in and out"} in [
        {k: row[k] for k in ("layout", "family", "direction")} for row in rows
    ]
    assert "mamba_ssm" in run("list", "--layouts").out
