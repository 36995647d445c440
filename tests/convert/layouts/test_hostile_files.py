"""Checkpoints that somebody made to do harm, or that broke: one clear line, nothing run, no weight silently wrong."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import PEERS
from safetensors.torch import save_file

from zoo.convert.layouts import import_checkpoint
from zoo.convert.layouts.files import SafetensorsFile, open_checkpoint
from zoo.errors import CheckpointError, ZooError

MAMBA = next(peer for peer in PEERS if str(peer) == "transformers-mamba")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    MAMBA.save(folder)
    return folder


def raw(header, data=b"", length=None):
    """The bytes of a safetensors file with a header that is given as text or as values."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


TWICE = b'{"a":' + json.dumps(entry(0, 4)).encode() + b',"a":' + json.dumps(entry(4, 8)).encode() + b"}"
FILES = {
    "empty": (b"", "header says"),
    "cut in the header": (raw({"a": entry(0, 4)}, bytes(4))[:20], "header says"),
    "huge header": (raw({}, length=1 << 62), "header says"),
    "no JSON": (raw(b"{nonsense"), "not valid JSON"),
    "deep JSON": (raw(b"[" * 100_000), "header is not|not valid JSON"),
    "a list": (raw(b"[1, 2]"), "not a mapping"),
    "a name twice": (raw(TWICE, bytes(8)), "a is there twice"),
    "overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "b overlaps"),
    "hole": (raw({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "b leaves a hole"),
    "cut": (raw({"a": entry(0, 8)}, bytes(4)), "truncated or too long"),
    "bytes behind": (raw({"a": entry(0, 4)}, bytes(40)), "truncated or too long"),
    "shape": (raw({"a": entry(0, 8, [3])}, bytes(8)), "does not fit its 8 bytes"),
    "absurd shape": (raw({"a": entry(0, 8, [1 << 60, 1 << 60])}, bytes(8)), "no readable entry"),
    "negative": (raw({"a": entry(0, 8, [-2, -1])}, bytes(8)), "no readable entry"),
    "dtype": (raw({"a": entry(0, 8, dtype="F4096")}, bytes(8)), "no readable entry"),
    "true for a number": (raw({"a": {**entry(0, 4), "shape": [True]}}, bytes(4)), "no readable entry"),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_safetensors_are_refused(case, tmp_path):
    data, message = FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as refused:
        SafetensorsFile(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


class Program:
    """What a pickle runs when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_is_not_run(inside, tmp_path, whole):
    program = Program(tmp_path / "ran")
    torch.save({"backbone.norm_f.weight": program} if inside else program, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    with pytest.raises(CheckpointError, match="could run a program"):
        import_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/../../x.bin", "..", ""])
def test_an_index_does_not_lead_out_of_the_folder(file, tmp_path, whole):
    (tmp_path / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text((whole / "config.json").read_text())
    index = {"metadata": {}, "weight_map": {"backbone.embeddings.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the folder"):
        import_checkpoint(folder)


def test_a_link_does_not_lead_out_of_the_folder(tmp_path, whole):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text((whole / "config.json").read_text())
    (folder / "model.safetensors").symlink_to(whole / "model.safetensors")
    with pytest.raises(CheckpointError, match="link that leads out"):
        import_checkpoint(folder)


def test_a_link_of_a_cache_is_followed(tmp_path, whole):
    """huggingface_hub keeps blobs once, and links to them from snapshots."""
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "blobs" / name).write_bytes((whole / name).read_bytes())
        (folder / name).symlink_to(f"../../blobs/{name}")
    assert import_checkpoint(folder).family == "mamba"


def test_a_name_in_two_files_is_refused(tmp_path):
    for shard in ("a", "b"):
        save_file({"x": torch.zeros(2)}, tmp_path / f"{shard}.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"x is in a\.safetensors and in b\.safetensors"):
        open_checkpoint(tmp_path)


SAFE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def tried(folder):
    """What comes in, or None where it was refused in one line of reasonable length."""
    try:
        return import_checkpoint(folder)
    except ZooError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 2000
    return None


@SAFE
@given(data=st.data())
def test_changed_configs_end_in_a_model_or_one_line(data, whole, tmp_path):
    values = json.loads((whole / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(values)))
    if data.draw(st.booleans()):
        del values[key]
    else:
        values[key] = data.draw(JSON)
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    found = tried(tmp_path)
    if found is None:
        return
    state = found.model.state_dict()
    original = open_checkpoint(whole)
    for name in original.shapes:  # whatever the config says, weights are those of the file
        if name.endswith("in_proj.weight"):
            ours = name.replace("backbone", "model")
            assert torch.equal(state[ours], original.get(name))


@SAFE
@given(data=st.data())
def test_changed_bytes_end_in_the_file_s_numbers_or_one_line(data, whole, tmp_path):
    content = bytearray((whole / "model.safetensors").read_bytes())
    header = struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 7 + header))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(bytes(content))
    found = tried(tmp_path)
    if found is None:
        return
    again = SafetensorsFile(tmp_path / "model.safetensors")
    embedding = found.model.get_input_embeddings().weight
    assert torch.equal(embedding, again.get("backbone.embeddings.weight").to(embedding.dtype))
