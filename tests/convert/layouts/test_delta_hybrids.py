"""Qwen3-Next beyond its peers: its norms at their precision, what is left out, models without experts, refusals."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peers.qwen3_next import SIZES
from safetensors.torch import load_file, save_file

import zoo
from tests.convert.layouts.test_out import moved, teacher
from zoo.config import ZooConfig
from zoo.convert.layouts import export_model, import_checkpoint
from zoo.errors import CheckpointError, ExportError
from zoo.linear import ZeroCenteredRMSNorm
from zoo.models.heads import TASK_CLASSES
from zoo.registry import model_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder that their class wrote in bfloat16, and the model."""
    torch.manual_seed(0)
    model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**SIZES))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("qwen3_next")
    model.eval().bfloat16().save_pretrained(folder)
    return folder, model


@torch.no_grad()
def test_norms_keep_small_weights_in_bfloat16(checkpoint):
    folder, theirs = checkpoint
    ours = import_checkpoint(folder).model
    norm = ours.model.layers[0].mixer_norm
    norm.weight.fill_(1e-3)  # 1.001 is 1 in bfloat16
    x_LD = torch.randn(5, 32).bfloat16() * 30
    expected = theirs.model.layers[0].input_layernorm
    expected.weight.fill_(1e-3)
    assert torch.equal(norm(x_LD), expected(x_LD))
    assert norm(x_LD).dtype == torch.bfloat16
    assert not torch.equal(norm(x_LD), torch.nn.functional.rms_norm(x_LD, [32], eps=1e-6))


def test_norms_start_at_the_plain_norm():
    model = zoo.create_model("qwen3-next-tiny")
    norms = [m for m in model.modules() if isinstance(m, ZeroCenteredRMSNorm)]
    assert len(norms) == 4 * 2 + 1 + 2
    assert not any(norm.weight.any() for norm in norms)
    assert model.model.layers[0].mixer.head_norm.weight.eq(1).all()


def test_what_predicts_further_tokens_is_passed_over(checkpoint, tmp_path):
    tensors = load_file(checkpoint[0] / "model.safetensors")
    more = {"mtp.fc.weight": torch.zeros(32, 64), "mtp.layers.0.self_attn.q_proj.weight": torch.zeros(128, 32)}
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint[0] / "config.json").read_text())
    state = import_checkpoint(tmp_path).model.state_dict()
    expected = import_checkpoint(checkpoint[0]).model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*fp8"),
        ({"layer_types": ["full_attention"]}, r"layer_types is \['full_attention'\], of 4 layers"),
        ({"architectures": ["Qwen3NextForTokenClassification"]}, "supported: Qwen3NextForCausalLM"),
    ],
)
def test_options_without_a_place_are_refused(checkpoint, tmp_path, options, message):
    config = json.loads((checkpoint[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **options}))
    (tmp_path / "model.safetensors").write_bytes((checkpoint[0] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(tmp_path)


@torch.no_grad()
def test_a_model_without_experts_goes_out(tmp_path):
    fields = model_config("qwen3-next-tiny").spec.plain()
    fields["layers"] = [{**layer, "ffn": {"name": "gated_mlp", "hidden_size": 48}} for layer in fields["layers"]]
    model = TASK_CLASSES["causal-lm"](ZooConfig(**fields)).eval()
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    assert export_model(model, "transformers", tmp_path).name == "qwen3_next"
    cls = transformers.AutoModelForCausalLM
    theirs, info = cls.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen3NextForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids_BL = torch.randint(0, 256, (2, 19))
    expected = theirs(ids_BL).logits
    assert (model(ids_BL).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_both_classes_with_delta_net_say_why_not(tmp_path):
    layers = {"mixers": {"attention": {"gate_activation": "silu"}}}
    with pytest.raises(ExportError) as refused:
        export_model(zoo.create_model("qwen3-next-tiny", layers=layers), "transformers", tmp_path / "out")
    assert "qwen3_next: layers.3.mixer.gate_activation: 'silu', where the layout has 'sigmoid'" in str(refused.value)
    assert "olmo_hybrid: layers.0.ffn is moe" in str(refused.value)
    plain = {"mixers": {"attention": {"qk_norm": False}}}
    with pytest.raises(ExportError, match=r"qwen3_next: layers\.3\.mixer\.qk_norm: its attention has norms"):
        export_model(zoo.create_model("qwen3-next-tiny", layers=plain), "transformers", tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_students_of_qwen3_go_out(tmp_path, bias):
    """Attention without a gate and plain norms: in another form, that computes the same."""
    source = teacher("Qwen3", head_dim=16, attention_bias=bias, rms_norm_eps=1e-5)
    student = zoo.convert(source, "gated_delta_net", keep=[1], target="transformers", calibrate=False)
    assert not student.model.layers[1].mixer.config.gate
    moved(student, 0.2)
    written = export_model(student, "transformers", tmp_path)
    assert written.name == "qwen3_next"
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "Qwen3NextForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids_BL = torch.randint(0, 97, (2, 23))
    expected = student(ids_BL).logits
    for again in (theirs.eval(), import_checkpoint(tmp_path).model):
        assert (again(ids_BL).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert import_checkpoint(tmp_path).model.model.layers[1].mixer.config.gate_activation == "sigmoid"
    student.model.norm.weight.fill_(0.1)
    with pytest.raises(ExportError, match=r"model\.norm\.weight: its norm adds 1 .* 1\.\de-03 in bfloat16"):
        export_model(student.bfloat16(), "transformers", tmp_path / "half")


def test_a_student_of_qwen3_that_was_calibrated_goes_out(tmp_path):
    source = teacher("Qwen3", head_dim=16)
    student = zoo.convert(source, "gated_delta_net", keep=[0], target="transformers", tokens=64, length=16)
    assert export_model(student, "transformers", tmp_path).name == "qwen3_next"
