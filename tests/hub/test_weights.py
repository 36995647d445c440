"""The hash of weights: of what is in them, not of how they are stored."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import zoo
from zoo.errors import CheckpointError
from zoo.hub.weights import weights_hash

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7)}


def write(folder, shards, metadata=None):
    folder.mkdir()
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata)
        return folder
    names = [f"model-{i}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata)
    index = {"weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_the_hash_is_of_the_tensors_alone(tmp_path):
    whole = weights_hash(write(tmp_path / "whole", [TENSORS]))
    # As the definition says it: names in order, each with dtype and shape as JSON, then the bytes.
    import hashlib

    by_hand = hashlib.sha256(
        b'["a", "BF16", [3]]\n' + TENSORS["a"].view(torch.int16).numpy().tobytes()
        + b'["b", "F32", [2, 3]]\n' + TENSORS["b"].numpy().tobytes()
        + b'["n", "I64", []]\n' + TENSORS["n"].numpy().tobytes()
    )  # fmt: skip
    assert whole == by_hand.hexdigest()
    shards = [{"n": TENSORS["n"]}, {k: TENSORS[k] for k in "ab"}]
    assert weights_hash(write(tmp_path / "sharded", shards, {"format": "pt"})) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"b": TENSORS["b"].reshape(3, 2)},
        {"a": TENSORS["a"].half()},
        {"b": TENSORS["b"] + torch.tensor([1e-7, 0.0, 0.0])},
        {"c": torch.zeros(0)},
    ],
)
def test_any_change_of_a_tensor_changes_it(tmp_path, change):
    before = weights_hash(write(tmp_path / "before", [TENSORS]))
    assert weights_hash(write(tmp_path / "after", [{**TENSORS, **change}])) != before


def test_a_saved_model_has_the_same_hash_in_shards(tmp_path):
    model = zoo.create_model("retnet-tiny")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert weights_hash(tmp_path / "one") == weights_hash(tmp_path / "many")


def test_what_is_not_whole_has_no_hash(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights in it: neither model\.safetensors nor"):
        weights_hash(tmp_path)
    folder = write(tmp_path / "twice", [TENSORS, {"n": TENSORS["n"]}])
    with pytest.raises(CheckpointError, match="tensor 'n' is also in model-0"):
        weights_hash(folder)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing"):
        weights_hash(folder)
    for outside in ("../x.safetensors", "/x.safetensors", "a/../../x"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(CheckpointError, match="lies outside the folder"):
            weights_hash(folder)
    for broken in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (folder / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(CheckpointError, match="not an index of weights"):
            weights_hash(folder)
    data = (write(tmp_path / "cut", [TENSORS]) / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        weights_hash(tmp_path / "cut")
