"""Word vectors of another size than the model, in training and conversion: the parts give what the whole gives."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.convert.layerwise import before_head, embed, run_layers
from zoo.train.heads import finish
from zoo.train.losses import head_loss

OPT_350M = {"embedding_size": 24, "embedding_projection_bias": False, "embedding_output": "project"}
MODELS = {
    "opt as 350m": ("opt-tiny", {**OPT_350M, "block": "post_norm", "final_norm": False}),
    "opt, narrow": ("opt-tiny", OPT_350M),
    "wide words": ("transformer-tiny", {"embedding_size": 80, "embedding_output": "project"}),
    "albert": ("albert-tiny", {}),
    "mobilebert": ("mobilebert-tiny", {}),
    "mobilebert, untied": ("mobilebert-tiny", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("which", MODELS)
def test_the_parts_give_what_the_whole_gives(which, make, ids_BL):
    name, fields = MODELS[which]
    model = make(name, **fields)
    with torch.no_grad():
        out = model(ids_BL, output_hidden_states=True)
        x_BLD = run_layers(model.model.layers, embed(model, ids_BL))
    for end in (before_head(model, x_BLD), finish(model, x_BLD)):
        torch.testing.assert_close(model.lm_head(end), out.logits, rtol=1e-10, atol=1e-10)
        flat = torch.nn.functional.linear(end, model.lm_head.weight, model.lm_head.bias)
        torch.testing.assert_close(flat, out.logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", MODELS)
def test_losses_on_the_whole_map_reach_every_part_of_a_head(which, make, ids_BL):
    name, fields = MODELS[which]
    model = make(name, **fields)
    h_ND = finish(model, run_layers(model.model.layers, embed(model, ids_BL))).flatten(0, 1)
    loss, _ = head_loss(h_ND, model.lm_head.weight, model.lm_head.bias, targets_N=ids_BL.flatten(), ce=1.0)
    loss.backward()
    ours = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    torch.nn.functional.cross_entropy(model(ids_BL).logits.flatten(0, 1), ids_BL.flatten()).backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(ours[key], p.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("which", ["opt as 350m", "wide words"])
def test_a_teacher_with_narrow_words_is_converted(which, make, ids_BL):
    name, fields = MODELS[which]
    teacher = make(name, torch.float32, **fields)
    student = zoo.convert(teacher, "sliding_window", keep=[0], mixer_options={"window": 21}, data=ids_BL)
    assert student.config.mixer_names == ["attention", "sliding_window"]
    with torch.no_grad():
        torch.testing.assert_close(student(ids_BL).logits, teacher(ids_BL).logits, rtol=1e-4, atol=1e-4)


def test_saved_and_untied(make, ids_BL, tmp_path):
    model = make("mobilebert-tiny", torch.float32, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    again = zoo.create_model(str(tmp_path)).eval()
    assert again.lm_head.words.weight is not again.model.embed_tokens.weight
    assert torch.equal(again(ids_BL).logits, model(ids_BL).logits)


def test_state_sizes(make, ids_BL):
    model = make("opt-tiny", **OPT_350M)
    assert model.model.embed_tokens.weight.shape == (256, 24)
    assert model.model.embed_positions.weight.shape == (2050, 64)
    assert model.model(ids_BL).last_hidden_state.shape == (2, 21, 24)
    classifier = make("opt-tiny", **OPT_350M, task="sequence-classification", pooling="last")
    assert classifier(ids_BL).logits.shape == (2, 2)
    model = make("albert-tiny")
    assert model.model.embed_positions.weight.shape == (512, 32)
    assert model.model(ids_BL).last_hidden_state.shape == (2, 21, 64)
