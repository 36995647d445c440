"""Checkpoints that the authors' own classes built, ran and saved: tests/peers/official, made by make.py there.

For the packages that do not run here. Peers that do are in tests/peers and made anew by every run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file

from zoo.convert.layouts import export_model, import_checkpoint
from zoo.convert.layouts.files import open_checkpoint
from zoo.errors import CheckpointError

FOLDERS = sorted(path for path in (Path(peers.__file__).parent / "official").iterdir() if path.is_dir())
FOLDERS = [path for path in FOLDERS if path.with_name(f"{path.name}.safetensors").is_file()]


def test_every_package_that_does_not_run_here_is_among_them():
    assert {path.name.partition("-")[0] for path in FOLDERS} == {"fla", "mamba_ssm", "rwkv", "torchscale"}
    assert len(FOLDERS) == 14


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def found(request):
    """The checkpoint, its model here, and what the package computed."""
    folder = request.param
    place = next(folder.glob("*.pth"), folder)
    return place, import_checkpoint(place), load_file(folder.with_name(f"{folder.name}.safetensors"))


@torch.no_grad()
def test_logits_and_tokens_are_the_packages(found):
    place, imported, answers = found
    folder = place if place.is_dir() else place.parent
    assert f"{imported.layout}-{imported.family}" == folder.name
    ids_BL, expected = answers["input_ids"], answers["logits"]
    logits = imported.model(ids_BL).logits
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    steps = answers["greedy"].shape[1]
    tokens = imported.model.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(tokens[:, -steps:], answers["greedy"])


def test_what_goes_out_has_the_packages_names_and_tensors(found, tmp_path):
    """Then it loads there; make.py has shown that with the packages themselves."""
    place, imported, _ = found
    export_model(imported.model, imported.layout, tmp_path / "out")
    before = open_checkpoint(place)
    after = open_checkpoint(tmp_path / "out" / place.name if place.is_file() else tmp_path / "out")
    assert before.shapes == after.shapes
    for name in before.shapes:
        assert torch.equal(before.get(name), after.get(name)), name


@pytest.mark.parametrize(
    ("name", "option", "value", "said"),
    [
        ("fla-retnet", "num_kv_heads", 1, "num_kv_heads is 1, num_heads 2; only equal ones"),
        ("fla-gated_deltanet", "num_v_heads", 1, "num_v_heads is 1, num_heads 2; fewer value heads"),
        ("torchscale-retnet", "layernorm_embedding", True, "layernorm_embedding is True; only False"),
    ],
)
def test_options_that_compute_something_else_are_refused(tmp_path, name, option, value, said):
    shutil.copytree(FOLDERS[0].with_name(name), tmp_path / name)
    config = tmp_path / name / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), option: value}))
    with pytest.raises(CheckpointError, match=said):
        import_checkpoint(tmp_path / name)
