"""Students and models by name, written as classes of transformers: same logits and tokens without this package."""

from __future__ import annotations

import json

import pytest
import torch

import zoo
from zoo.convert.layouts import export_model, import_checkpoint
from zoo.errors import ExportError


def moved(model, std=0.05):
    """With every parameter away from the value that it starts from."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn_like(p))
    return model.eval()


def teacher(kind="Llama", **options):
    """A small model of transformers."""
    import transformers

    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, "tie_word_embeddings": False, **options})
    return moved(getattr(transformers, f"{kind}ForCausalLM")(config))


@torch.no_grad()
def check_written(model, out, expected):
    """The folder is a model of the class `expected`, with no name too many or too few, that computes the same."""
    from transformers import AutoModelForCausalLM

    export_model(model, "transformers", out)
    theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == expected
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids_BL = torch.randint(0, model.config.vocab_size, (2, 23))
    got, wanted = theirs.eval()(ids_BL).logits, model(ids_BL).logits
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    again = import_checkpoint(out).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    tokens_BL = ids_BL[:, :9]
    for _ in range(12):  # theirs without a cache, in which a short window is soon full
        tokens_BL = torch.cat([tokens_BL, theirs(tokens_BL).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours = model.generate(ids_BL[:, :9], attention_mask=torch.ones_like(ids_BL[:, :9]), **options)
    assert torch.equal(ours, tokens_BL)
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(("name", "expected"), [("llama-tiny", "LlamaForCausalLM"), ("gpt2-tiny", "GPT2LMHeadModel")])
def test_models_by_name(tmp_path, name, expected):
    check_written(moved(zoo.create_model(name)), tmp_path / "out", expected)


@pytest.mark.parametrize(
    ("source", "keep", "expected"),
    [
        ({}, "none", "MistralForCausalLM"),
        ({}, [1], "MinistralForCausalLM"),
        ({"attention_bias": True, "mlp_bias": True}, [0], "SmolLM3ForCausalLM"),
        ({"kind": "Qwen2"}, [2], "Qwen2ForCausalLM"),
        ({"kind": "Qwen3", "head_dim": 16}, "none", "Qwen3ForCausalLM"),
        ({"kind": "Mistral", "sliding_window": 6}, [1], "MistralForCausalLM"),
    ],
)
def test_windows_are_the_teachers_own_class(tmp_path, source, keep, expected):
    options = {"window": 6, "sinks": 0}
    student = zoo.convert(teacher(**source), "sliding_window", keep=keep, mixer_options=options, calibrate=False)
    assert "sliding_window" in student.config.mixer_names
    written = check_written(student, tmp_path / "out", expected)
    assert written["sliding_window"] == 6


@pytest.mark.parametrize(
    ("mixer", "options", "reason"),
    [
        ("sliding_window", {"window": 6}, r"llama: layers\.0\.mixer\.sinks is 4"),
        ("retention+window", {}, "nothing there has layers of .*windowed_linear"),
        ("retention", {}, "nothing there has layers of attention, retention"),
    ],
)
def test_what_no_class_has_is_refused(tmp_path, mixer, options, reason):
    student = zoo.convert(teacher(), mixer, keep=[1], mixer_options=options, calibrate=False)
    with pytest.raises(ExportError, match=reason):
        export_model(student, "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_that_no_class_has_are_named(tmp_path):
    layers = {"num_hidden_layers": 2, "defaults": {"rotary": {"theta": 1e4, "dim": 8}}}
    with pytest.raises(ExportError, match=r"llama: layers.0.mixer.rotary.dim: these classes turn whole heads"):
        export_model(zoo.create_model("llama-tiny", layers=layers), "transformers", tmp_path / "out")
    with pytest.raises(ExportError, match=r"gpt2: .*block: 'parallel', where the layout has 'pre_norm'"):
        export_model(zoo.create_model("gpt2-tiny", block="parallel"), "transformers", tmp_path / "out")
