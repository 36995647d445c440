"""A saved model that somebody changed loads with the weights in its file, or is refused with one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

import zoo
from zoo.errors import CheckpointError, ConfigError, ZooError

LONGEST = 700
MODELS = ("retnet-tiny", "windowed-linear-h-tiny", "bert-tiny")
# What config.json may have beside the fields of a model, and a few that it may not.
KEYS = (
    "_attn_implementation", "_commit_hash", "_x", "__class__", "architectures", "attn_implementation", "auto_map",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "is_encoder_decoder", "label2id", "layers",
    "model_type", "name_or_path", "num_labels", "output_attentions", "pad_token_id", "problem_type", "return_dict",
    "spec", "torch_dtype", "transformers_version", "use_cache", "quantization_config",
)  # fmt: skip
VALUES = st.sampled_from(
    [
        None, True, False, -1, 0, 1, 2, 3, 7, 64, 10**6, 2**40, 2**70, 1.5, float("inf"), float("nan"), "", "x",
        "../x", "float16", "<b>", "a" * 300, "hub/kernels", [], [1], ["x"], [[1]], {}, {"a": 1}, {"0": "a"},
        {"name": "attention"},
    ]
)  # fmt: skip
QUICKLY = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def paths(value, at=()):
    """The place of everything in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*at, key)
        yield from paths(value[key], (*at, key))


def holder(value, path):
    for key in path[:-1]:
        value = value[key]
    return value


class Saved(dict):
    """Saved models by name: the folder, what config.json says, the weights."""

    def __repr__(self) -> str:  # hypothesis shows it
        return f"Saved({list(self)})"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = Saved()
    for name in MODELS:
        folder = tmp_path_factory.mktemp("models") / name
        torch.manual_seed(0)
        zoo.create_model(name).save_pretrained(folder)
        weights = {key: t.clone() for key, t in load_file(folder / "model.safetensors").items()}
        found[name] = (folder, json.loads((folder / "config.json").read_text()), weights)
    return found


def loads_or_is_refused(folder: Path, weights) -> str | None:
    """The message of a refusal; None where the model loads, whose weights are then those in the file."""
    try:
        model = zoo.create_model(str(folder))
    except ZooError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        assert len(message) < LONGEST
        return message
    state = model.state_dict()
    assert weights.keys() <= state.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(state[name], tensor.to(state[name].dtype), rtol=0, atol=0)
    for name in state.keys() - weights.keys():
        assert name in model.all_tied_weights_keys, name
    return None


@settings(max_examples=100, **QUICKLY)
@given(data=st.data(), name=st.sampled_from(MODELS), value=VALUES, how=st.sampled_from(["set", "set", "remove", "add"]))
def test_a_changed_config(folders, data, name, value, how):
    folder, config, weights = folders[name]
    changed = json.loads(json.dumps(config))
    path = data.draw(st.sampled_from(list(paths(changed))))
    if how == "add":
        changed[data.draw(st.sampled_from(KEYS))] = value
    elif how == "set":
        holder(changed, path)[path[-1]] = value
    else:
        del holder(changed, path)[path[-1]]
    (folder / "config.json").write_text(json.dumps(changed))
    try:
        loads_or_is_refused(folder, weights)
    finally:
        (folder / "config.json").write_text(json.dumps(config))


ENTRIES = st.sampled_from(
    [None, -1, 0, 1.5, "x", "I32", "F16", "F64", "C64", [], [0], [0, 0], [1, 64], [5, 1], [0, 2**63], [2**70], {}, True]
)


@settings(max_examples=100, **QUICKLY)
@given(
    data=st.data(),
    name=st.sampled_from(MODELS[::2]),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "name", "entry", "gone", "twice", "metadata", "length"]),
    value=ENTRIES,
)
def test_a_changed_header(folders, data, name, field, value):
    folder, _, weights = folders[name]
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    tensor = data.draw(st.sampled_from(sorted(weights)))
    end, length = "}", None
    if field in header[tensor]:
        header[tensor][field] = value
    elif field == "name":
        header[data.draw(st.sampled_from(["x", "", "../x", "lm_head.weight", tensor.upper()]))] = header.pop(tensor)
    elif field == "entry":
        header[tensor] = value
    elif field == "gone":
        del header[tensor]
    elif field == "twice":
        end = f", {json.dumps(tensor)}: {json.dumps(header[data.draw(st.sampled_from(sorted(weights)))])}}}"
    elif field == "metadata":
        header["__metadata__"] = value
    else:
        length = data.draw(st.sampled_from([0, 1, size - 1, size + 1, 10**8, 2**63, 2**64 - 1]))
    text = (json.dumps(header)[:-1] + end).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + raw[8 + size :])
    try:
        said = loads_or_is_refused(folder, weights)
        assert said is not None or field in ("shape", "data_offsets", "metadata", "dtype")
    finally:
        path.write_bytes(raw)


@settings(max_examples=40, **QUICKLY)
@given(data=st.data(), name=st.sampled_from(MODELS[::2]), count=st.integers(1, 4))
def test_bytes_that_fell_over(folders, data, name, count):
    """In the header every byte counts; a file that ends early is never taken for whole."""
    folder, _, weights = folders[name]
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    changed = bytearray(raw)
    for _ in range(count):
        changed[data.draw(st.integers(0, 7 + size))] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(bytes(changed))
        try:
            read = {key: t.clone() for key, t in load_file(path).items()}
        except SafetensorError:
            read = None
        said = loads_or_is_refused(folder, read or weights)
        assert said is not None or read is not None
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        assert loads_or_is_refused(folder, weights) is not None
    finally:
        path.write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1 << 22, "hidden_size": 1 << 17}, "weights do not fit the config"),  # 2 TB, had it been made
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings: "),
        ({"num_labels": 2**70}, "num_labels: "),
        ({"attn_implementation": "evil/kernels"}, "attn_implementation: "),
        ({"_attn_implementation": "evil/kernels"}, "_attn_implementation: "),
        ({"_secret": 1}, "_secret: unknown key"),
        ({"hiden_size": 1}, "hiden_size: unknown key; did you mean 'hidden_size'"),
        ({"dtype": "int8"}, "dtype: expected a type of floating numbers"),
        ({"pad_token_id": "<b>"}, "pad_token_id"),
        ({"id2label": {"a": "b"}}, "id2label"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "asks for code of its own"),
        ({"auto_map": 3}, "asks for code of its own"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config: unknown key"),
        ({"mlm_activation": "__import__"}, "mlm_activation: unknown activation"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_what_a_config_may_not_ask_for(folders, change, message):
    folder, config, weights = folders["bert-tiny"]
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    try:
        assert message in loads_or_is_refused(folder, weights)
    finally:
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"max_length": "x"}', '{"num_beams": 1e400}', "[" * 50_000])
def test_a_generation_config_that_is_none(folders, tmp_path, text):
    import shutil

    folder, _, weights = folders["retnet-tiny"]
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "generation_config.json").write_text(text)
    loads_or_is_refused(copy, weights)


def test_numbers_of_another_kind_are_not_read_as_weights(folders, tmp_path):
    import shutil

    folder, _, _ = folders["retnet-tiny"]
    copy = shutil.copytree(folder, tmp_path / "model")
    raw = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(raw.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(CheckpointError, match="is of type I32, by the config float32"):
        zoo.create_model(str(copy))


def test_a_name_that_is_there_twice(folders, tmp_path):
    """The usual reader takes the last of the two in silence."""
    folder, _, weights = folders["retnet-tiny"]
    raw = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    name = "model.embed_tokens.weight"
    text = f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()
    assert f"{name!r} is in the header twice" in loads_or_is_refused(tmp_path, weights)


def test_a_config_checks_what_is_for_transformers_too():
    with pytest.raises(ConfigError, match="eos_token_id"):
        zoo.ZooConfig(eos_token_id="the end")
    assert zoo.ZooConfig(dtype=torch.bfloat16, eos_token_id=[1, 2], id2label={0: "no", 1: "yes"}).num_labels == 2
