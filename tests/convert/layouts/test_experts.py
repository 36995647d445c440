"""Experts that are stored as stacks, and upcycled students as classes that transformers has."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from zoo.convert.experts import upcycle
from zoo.convert.layouts import export_model, import_checkpoint
from zoo.convert.layouts.files import open_checkpoint
from zoo.convert.teachers import load_teacher
from zoo.errors import ExportError

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {
    "MixtralForCausalLM": {"num_local_experts": 4},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 2},
    "Qwen2MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
}


def original(architecture, **options):
    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("architecture", EXPERTS)
def test_stacks_as_transformers_has_them_in_memory(tmp_path, architecture):
    model = original(architecture, **EXPERTS[architecture])
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in open_checkpoint(tmp_path).shapes)
    ids_BL = torch.randint(0, 97, (2, 20))
    with torch.no_grad():
        expected = model(ids_BL).logits
        assert (import_checkpoint(tmp_path).model(ids_BL).logits - expected).abs().max() < 1e-4 * expected.abs().max()


def saved_teacher(folder, architecture="LlamaForCausalLM", **options):
    model = original(architecture, **options)
    model.save_pretrained(folder)
    return model, load_teacher(str(folder)).model


def loaded(folder, architecture):
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(("teacher", "options", "layers", "expected"), [
    ("LlamaForCausalLM", {}, None, "MixtralForCausalLM"),
    ("LlamaForCausalLM", {"tie_word_embeddings": True}, [1], "Qwen2MoeForCausalLM"),
    ("Qwen2ForCausalLM", {}, None, "Qwen2MoeForCausalLM"),
])  # fmt: skip
def test_an_upcycled_student_is_a_class_of_transformers(tmp_path, teacher, options, layers, expected):
    theirs, model = saved_teacher(tmp_path / "teacher", teacher, **options)
    student = upcycle(model, layers, num_experts=4, top_k=2, noise=0.02, balance_loss=0.01).eval()
    export_model(student, "transformers", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [expected]
    ids_BL = torch.randint(0, 97, (2, 20))
    logits = student(ids_BL).logits
    assert (loaded(tmp_path / "out", expected)(ids_BL).logits - logits).abs().max() < 1e-5 * logits.abs().max() + 1e-6
    assert (logits - theirs(ids_BL).logits).abs().max() > 1e-4  # the noise: experts differ, so routing matters
    again = import_checkpoint(tmp_path / "out").model
    assert torch.equal(again(ids_BL).logits, logits)


def test_experts_that_no_class_has_are_refused_with_the_reason(tmp_path):
    _, model = saved_teacher(tmp_path / "teacher")
    student = upcycle(model, None, num_experts=4, top_k=2, scores="sigmoid")
    with pytest.raises(ExportError, match=r"layers\.0\.ffn\.scores: 'sigmoid', where the layout has 'softmax'"):
        export_model(student, "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()
