"""Large checkpoints: shard by shard, without a second copy in memory, in and out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from zoo.convert.layouts import import_checkpoint
from zoo.convert.layouts.files import open_checkpoint
from zoo.convert.layouts.writing import TensorStream, save_safetensors
from zoo.errors import CheckpointError, ExportError

SCRIPT = Path(__file__).parent / "peak_memory.py"
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def run(*arguments):
    """The last line that the script prints, from a process of its own."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    run("make", folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_reading_needs_little_more_than_the_weights(large, form, dtype):
    assert len(list((large / form).glob("*-of-*"))) > 4
    found = run("read", large / form, dtype)
    assert found["weights"] > 300e6 / (2 if dtype == "bfloat16" else 1)
    assert found["weights"] <= found["peak"] <= 1.2 * found["weights"]


@pytest.mark.slow
@needs_proc
def test_writing_needs_little_beside_the_weights(large):
    found = run("write", large / "safetensors", large / "written")
    assert found["peak"] <= 0.2 * found["weights"]
    before, after = open_checkpoint(large / "safetensors"), open_checkpoint(large / "written" / "out")
    assert before.shapes == after.shapes
    for name in ("model.embed_tokens.weight", "model.layers.7.block_sparse_moe.experts.7.w2.weight"):
        assert torch.equal(before.get(name), after.get(name))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two layers of GPT-2 in float32, one tensor in float16."""
    from safetensors.torch import save_model
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("small")
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, architectures=["GPT2LMHeadModel"]
    )
    model = GPT2LMHeadModel(config)
    model.transformer.ln_f.half()
    save_model(model, str(folder / "model.safetensors"))
    config.save_pretrained(folder)
    return folder


def test_places_and_dtypes(small):
    whole = import_checkpoint(small).model
    assert {p.dtype for p in whole.parameters()} == {torch.float32}  # that of the largest tensor
    half = import_checkpoint(small, dtype=torch.float16).model
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    for name, p in whole.named_parameters():
        assert torch.equal(half.get_parameter(name), p.half()), name
    split = import_checkpoint(small, device_map={"": "cpu", "model.layers.1": "meta"}).model
    assert {n for n, p in split.named_parameters() if p.is_meta} == {
        n for n, _ in whole.named_parameters() if n.startswith("model.layers.1.")
    }
    assert all(p.is_meta for p in import_checkpoint(small, device_map="meta").model.parameters())
    assert not any(p.is_meta for p in import_checkpoint(small, device_map="cpu").model.parameters())
    for wrong in ("disk", {"": "cpu", "lm_head": "disk"}, {"model.layers": "cpu"}):
        with pytest.raises(CheckpointError, match="device_map"):
            import_checkpoint(small, device_map=wrong)


def tensors():
    return {
        "a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.0),
        "c": torch.arange(6).view(2, 3), "d": torch.randn(4, 4).T,
    }  # fmt: skip


@pytest.mark.parametrize(("limit", "files"), [(10**6, 1), (70, 3)])
def test_what_is_written_is_what_the_library_reads(tmp_path, limit, files):
    held = tensors()
    (tmp_path / "model.safetensors.index.json").write_text("{}")  # of another export into the same folder
    save_safetensors(tmp_path, {"model_type": "x"}, iter(held.items()), max_shard=limit)
    found = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    assert found.keys() == held.keys() == open_checkpoint(tmp_path).shapes.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in held.items())


def test_an_interrupted_export_is_not_taken_for_whole(tmp_path):
    held = tensors()

    def stops():
        yield from list(held.items())[:3]
        raise KeyboardInterrupt

    described = {name: t.to("meta") for name, t in held.items()}
    with pytest.raises(KeyboardInterrupt):
        save_safetensors(tmp_path, {}, TensorStream(described, stops()))
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".json", ".safetensors")]


def test_a_stream_that_is_not_as_described_is_refused(tmp_path):
    stream = TensorStream({"a": torch.empty(3, 5, device="meta")}, iter([("a", torch.zeros(3, 4))]))
    with pytest.raises(ExportError, match="not as described"):
        save_safetensors(tmp_path, {}, stream)
