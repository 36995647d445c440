"""GGUF files as other versions of llama.cpp's converter write them, and what is refused in them and for them."""

from __future__ import annotations

import pytest
import torch
from peers import PEERS
from peers import gguf as made

import zoo
from zoo.convert.layouts import export_model, import_checkpoint
from zoo.errors import CheckpointError, ExportError

pytest.importorskip("gguf")


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_shares_of_rwkv6_in_tensors_of_their_own(tmp_path):
    for name, single in (("fused", False), ("single", True)):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        made.save_rwkv6(0, single)(tmp_path / name)
    one, other = (import_checkpoint(tmp_path / name / "model.gguf").model for name in ("fused", "single"))
    assert same(one.state_dict(), other.state_dict())


def test_gates_and_ups_of_experts_in_one_tensor(tmp_path):
    (tmp_path / "fused").mkdir()
    model = zoo.create_model("qwen2-moe-tiny", max_position_embeddings=128)
    export_model(model, "gguf", tmp_path / "out")
    import gguf

    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    found = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("ffn_gate_exps.weight"):
            del found[name]
            up = found.pop(name.replace("gate", "up"))
            found[name.replace("gate", "gate_up")] = torch.cat([tensor, up], 1)
    writer = gguf.GGUFWriter(tmp_path / "fused" / "model.gguf", "qwen2moe")
    for key, field in reader.fields.items():
        if key.startswith("qwen2moe."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for name, tensor in found.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert same(import_checkpoint(tmp_path / "fused" / "model.gguf").model.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("peer", "key", "value"),
    [
        ("llama", "rope.scaling.type", "yarn"),
        ("llama", "rope.dimension_count", 4),
        ("llama", "attention.value_length", 4),
        ("mixtral", "expert_weights_scale", 2.5),
        ("bamba", "residual_scale", 0.22),
        ("bamba", "expert_count", 8),
        ("rwkv7", "token_shift_count", 1),
        ("bert", "pooling_type", 0),
    ],
)
def test_what_is_not_known_is_refused_by_name(peer, key, value, tmp_path, monkeypatch):
    written = made.write

    def with_key(folder, architecture, keys, tensors, blocks=2):
        written(folder, architecture, {**keys, key: value}, tensors, blocks)

    monkeypatch.setattr(made, "write", with_key)
    next(p for p in PEERS if (p.layout, p.family, p.label) == ("gguf", peer, "")).save(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{key} is {value!r}; only"):
        import_checkpoint(tmp_path / "model.gguf")


def test_a_part_of_a_file_says_so(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"one of 3 parts; join them"):
        import_checkpoint(tmp_path / "model-00001-of-00003.gguf")


def layers(**defaults):
    return {"layers": {"defaults": defaults}}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("qwen2-tiny", layers(head_dim=24), "do not fill the width"),
        ("mamba-tiny", layers(inner_dim=192), "twice the width only"),
        ("falcon-mamba-tiny", {}, "has one epsilon"),
        ("qwen2-moe-tiny", {"layers": {"ffn": {"normalize": True}}}, "normalize: True"),
        ("rwkv6-tiny", {"tie_word_embeddings": True}, "weights of its own"),
        ("gpt2-tiny", {"layers": {"ffn": {"activation": "relu"}}}, "activation: 'relu'"),
    ],
)
def test_what_llama_cpp_has_not_is_refused_by_name(name, options, reason, tmp_path):
    with pytest.raises(ExportError, match=reason):
        export_model(zoo.create_model(name, **options), "gguf", tmp_path / "out")
