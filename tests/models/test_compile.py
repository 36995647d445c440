"""torch.compile: one graph for the forward, with and without a mask; a training step where it is quick to compile."""

from __future__ import annotations

import pytest
import torch

import zoo

pytestmark = pytest.mark.slow
IMAGES = zoo.list_models("*-tiny", task="image-classification")
TEXT = [name for name in zoo.list_models("*-tiny") if not name.endswith("-h-tiny") and name not in IMAGES]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", TEXT)
def test_the_forward_has_no_graph_break(name, masked, make, ids_BL):
    model = make(name, layers={"num_hidden_layers": 1})  # compiling takes as long as there are layers
    mask_BL = None
    if masked:
        mask_BL = torch.ones_like(ids_BL)
        mask_BL[0, :5] = 0
    expected = model(ids_BL, attention_mask=mask_BL, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled(ids_BL, attention_mask=mask_BL, use_cache=False).logits
    real = slice(None) if mask_BL is None else mask_BL.bool()
    torch.testing.assert_close(out[real], expected[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", IMAGES)
def test_the_forward_of_images_has_no_graph_break(name, make, images):
    model = make(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images(model)).logits, model(images(model)).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["transformer-tiny", "sliding-window-tiny", "retnet-tiny"])
def test_a_training_step_compiles(name, make, ids_BL):
    model = make(name).train()
    model(ids_BL, labels=ids_BL).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(ids_BL, labels=ids_BL).loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-6, atol=1e-8)
