"""`convert(target=...)`: every mixer either has a form there, which is checked in the plain class, or is refused."""

from __future__ import annotations

import pytest
import torch

import zoo
from tests.convert.layouts.test_out import check_written, teacher
from zoo.convert.layouts import export_model, list_layouts
from zoo.errors import ConversionError, UnknownNameError
from zoo.registry import list_mixers, mixer_class

CAUSAL = [n for n in list_mixers() if mixer_class(n).traits.causal]
HAVE = {"transformers": {"attention", "mamba2", "sliding_window"}}


@pytest.mark.parametrize("mixer", CAUSAL)
def test_a_mixer_has_a_form_in_transformers_or_is_refused(tmp_path, mixer):
    source = teacher()
    options = {"mixer_options": {"linear": "retention"}} if mixer == "windowed_linear" else {}
    if mixer not in HAVE["transformers"]:
        with pytest.raises(ConversionError, match=f"mixer '{mixer}' .*mixers that have one: mamba2, sliding_window"):
            zoo.convert(source, mixer, keep=[1], target="transformers", **options)
        return
    student = zoo.convert(source, mixer, keep=[1], target="transformers", calibrate=False)
    expected = {"attention": "Llama", "mamba2": "Bamba", "sliding_window": "Ministral"}[mixer]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    check_written(student, tmp_path / "out", f"{expected}ForCausalLM")


@pytest.mark.parametrize("mixer", ["mamba2", "retention"])
@pytest.mark.parametrize("target", sorted(list_layouts()))
def test_over_all_targets(tmp_path, target, mixer):
    """Whatever is promised for a target can be written there; the rest is refused by name, before any work."""
    student, refused = None, ""
    try:
        student = zoo.convert(teacher(), mixer, keep="none", target=target, calibrate=False)
    except (ConversionError, UnknownNameError) as error:
        refused = str(error)
    if target == "transformers":
        assert bool(refused) == (mixer == "retention")
    if student is None:
        assert refused.startswith((f"target '{target}': mixer '{mixer}' has no form", f"unknown target '{target}'"))
    else:
        if target == "onnx":
            pytest.importorskip("onnxscript", reason="ONNX needs onnx and onnxscript")
        assert export_model(student, target, tmp_path / "out").layout == target


def test_scans_and_given_options(tmp_path):
    options = {"keep": "sensitivity:1", "target": "transformers", "tokens": 64, "length": 16}
    student = zoo.convert(teacher(kind="Qwen3", head_dim=8), "sliding_window", mixer_options={"window": 5}, **options)
    written = check_written(student, tmp_path / "out", "Qwen3ForCausalLM")
    assert sorted(written["layer_types"]) == ["full_attention", *["sliding_attention"] * 2]


def test_refusals_come_before_any_work_and_say_why(monkeypatch):
    monkeypatch.setattr("zoo.convert.api._calibration_tokens", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(ConversionError, match=r"llama: layers\.0\.mixer\.sinks is 2.*have one: mamba2, sliding_window"):
        zoo.convert(teacher(), "sliding_window", mixer_options={"sinks": 2}, target="transformers")
    with pytest.raises(ConversionError, match=r"bamba: .*conv is None.*mixers that have one: mamba2, sliding"):
        zoo.convert(teacher(), "mamba2", mixer_options={"conv": None, "conv_bias": False}, target="transformers")
    with pytest.raises(ConversionError, match=r"no form there.*mixers that have one: gated_delta_net, sliding_window"):
        zoo.convert(teacher(kind="Qwen3", head_dim=16), "mamba2", keep=[0], target="transformers")
    with pytest.raises(UnknownNameError, match="did you mean 'transformers'"):
        zoo.convert("no/such-teacher", "mamba2", target="transformer")


def test_shared_heads_get_copies():
    """A head of Mamba-2 has a state of its own there: keys and values of a group are copied to each of its heads."""
    student = zoo.convert(teacher(), "mamba2", target="transformers", calibrate=False)
    source, mixer = teacher().model.layers[0].self_attn, student.model.layers[0].mixer
    assert (mixer.config.num_kv_heads, mixer.config.head_dim) == (None, 8)
    rows = source.k_proj.weight.unflatten(0, (2, 8))
    assert torch.equal(mixer.k_proj.weight.unflatten(0, (4, 8)), rows[[0, 0, 1, 1]])
    assert torch.equal(mixer.q_proj.weight, source.q_proj.weight)
