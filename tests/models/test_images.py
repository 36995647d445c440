"""Every tiny model of images in the registry: training, saving, precision, other sizes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification

import zoo
from zoo.config import ModelSpec
from zoo.errors import ConfigError
from zoo.mixers.base import SequenceMixer
from zoo.models.heads import ZooForImageClassification

TINY = zoo.list_models("*-tiny", task="image-classification")
LABELS = torch.tensor([3, 7])
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("name", TINY)
def test_one_step_of_training_lowers_the_loss(name, make, images):
    model = make(name, torch.float32).train()
    assert type(model) is ZooForImageClassification
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        out = model(images(model), labels=LABELS)
        assert out.logits.shape == (2, 10)
        out.loss.backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", TINY)
def test_save_and_load(name, make, images, tmp_path):
    model = make(name, torch.float32)
    model.save_pretrained(tmp_path)
    expected = model(images(model)).logits
    for again in (zoo.create_model(str(tmp_path)), AutoModelForImageClassification.from_pretrained(tmp_path)):
        assert type(again) is type(model)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        assert torch.equal(again.eval()(images(model)).logits, expected)
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    hidden = model.model(pixel_values=images(model)).last_hidden_state
    assert torch.equal(backbone(pixel_values=images(model)).last_hidden_state, hidden)
    low = zoo.create_model(str(tmp_path), dtype=torch.bfloat16).eval()
    kept = {n for m in low.modules() if isinstance(m, SequenceMixer) for n in m.keep_float32}
    for key, value in low.state_dict().items():
        assert value.dtype == (torch.float32 if key.rsplit(".", 1)[-1] in kept else torch.bfloat16), key
    assert low(images(model)).logits.isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_gives_the_same_gradients(name, make, images):
    model = make(name).train()
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(images(model), labels=LABELS).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_autocast_is_finite_and_near(name, make, images):
    model = make(name, torch.float32).train()
    expected = model(images(model), labels=LABELS).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(model), labels=LABELS).loss
    loss.backward()
    assert abs(loss.item() - expected.item()) < 0.05 * expected.item()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", TINY)
def test_images_do_not_see_each_other_and_every_patch_counts(name, make, images):
    model = make(name)
    pixels = images(model).requires_grad_()
    out = model(pixels)
    torch.testing.assert_close(out.logits[1:], model(pixels[1:]).logits, **CLOSE)
    (gradient,) = torch.autograd.grad(out.logits[0].square().sum(), pixels)
    assert not gradient[1].any()
    assert (gradient[0].abs() > 0).all()


@pytest.mark.parametrize("name", TINY)
def test_hidden_states_are_the_inputs_of_the_blocks(name, make, images):
    model = make(name)
    out = model(images(model), output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    shared = model.model.embed(images(model))[1]
    x_BLD, _ = model.model.layers[0](out.hidden_states[0], None, None, None, shared)
    torch.testing.assert_close(out.hidden_states[1], x_BLD, **CLOSE)


@pytest.mark.parametrize("name", TINY)
def test_other_sizes_of_images(name, make, images):
    model = make(name)
    larger = model(images(model, scale=2)).logits
    assert larger.shape == (2, 10)
    assert larger.isfinite().all()
    wide = images(model, scale=2)[:, :, : model.config.image["image_size"]]
    assert model(wide).logits.isfinite().all()
    fixed = make(name, image={"interpolation": None})
    torch.testing.assert_close(fixed(images(model)).logits, model(images(model)).logits, **CLOSE)
    with pytest.raises(ValueError, match="images are 64 x 64 pixels, but the model is for 32 x 32"):
        fixed(images(model, scale=2))


def test_wrong_images_are_refused(make, images):
    model = make("vit-tiny")
    pixels = images(model)
    with pytest.raises(ValueError, match=r"images must be \(batch, 3, rows, columns\), got \(2, 1, 32, 32\)"):
        model(pixels[:, :1])
    with pytest.raises(ValueError, match="images of 32 x 31 pixels do not divide into patches of 8"):
        model(pixels[..., 1:])
    with pytest.raises(ValueError, match="exactly one of"):
        model()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": {"image_size": 30, "patch_size": 8}}, r"image_size \(30\) is not a multiple of patch_size \(8\)"),
        ({"image": {"distillation_head": True}}, "set distillation_token"),
        ({"image": {"class_token": False, "distillation_token": True}}, "set class_token"),
        ({"image": {"class_token": False}, "pooling": "cls"}, "use 'mean'"),
        ({"image": {"patch": 8}}, r"image\.patch: unknown key; did you mean 'patch_size'"),
        ({"image": {"channels": 0}}, r"image\.channels: input should be greater than or equal to 1"),
        ({"task": "causal-lm", "image": {}}, "belongs to the task image-classification"),
        ({}, "belongs to the task image-classification"),
    ],
)
def test_impossible_configs(values, message):
    with pytest.raises(ConfigError, match=message):
        ModelSpec.parse({"task": "image-classification", **values})


def test_both_heads_learn_from_their_own_labels(make, images):
    model = make("deit-tiny")
    pixels, teacher = images(model), torch.tensor([1, 1])
    out = model(pixels, labels=LABELS, teacher_labels=teacher)
    torch.testing.assert_close(out.logits, (out.class_logits + out.distillation_logits) / 2, **CLOSE)
    entropy = torch.nn.functional.cross_entropy
    halves = entropy(out.class_logits, LABELS) + entropy(out.distillation_logits, teacher)
    torch.testing.assert_close(out.loss, halves / 2, **CLOSE)
    assert make("vit-tiny")(pixels).distillation_logits is None


def test_pooling_reads_the_patches_only(make, images):
    torch.manual_seed(0)
    for pooling, expected in (("mean", slice(2, None)), ("last", slice(-1, None)), ("cls", slice(0, 1))):
        model = make("deit-tiny", pooling=pooling, image={"distillation_head": False})
        hidden_BLD = model.model(pixel_values=images(model)).last_hidden_state
        wanted = model.classifier(hidden_BLD[:, expected].mean(1))
        torch.testing.assert_close(model(images(model)).logits, wanted, **CLOSE)


def test_initial_weights():
    """Tokens and positions as DeiT; the patches' projection scaled by what it sums, as ViT."""
    torch.manual_seed(0)
    model = zoo.create_model("deit-tiny-distilled-patch16-224", layers={"num_hidden_layers": 1})
    patches = model.model.patches
    assert patches.projection.weight.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.02)
    assert not patches.projection.bias.any()
    for tokens in (patches.position_table, patches.class_token, patches.distillation_token):
        assert tokens.std().item() == pytest.approx(0.02, rel=0.15)


def test_a_stem_is_its_convolutions(make):
    model = make("vit-tiny", image={"image_size": 16, "patch_size": 8, "stem": [6, 5]})
    x_BCHW = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    convs = [m.weight for m in model.model.patches.projection if isinstance(m, torch.nn.Conv2d)]
    assert [tuple(w.shape) for w in convs] == [(6, 3, 3, 3), (5, 6, 3, 3), (64, 5, 3, 3)]
    y = x_BCHW
    for weight in convs:
        y = torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(y, weight, padding=1).relu(), 3, 2, 1)
    sequence, shared = model.model.embed(x_BCHW)
    assert shared["grid_RC"].shape == (2, 3)
    patches = model.model.patches
    expected = y.flatten(2).mT + patches.positions(2, 3)[:, 1:]
    torch.testing.assert_close(sequence[:, 1:], expected, **CLOSE)
    fresh = zoo.create_model("vit-tiny", image={"image_size": 32, "patch_size": 4, "stem": [64]}, hidden_size=128)
    last = fresh.model.patches.projection[3].weight
    assert float(last.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    with pytest.raises(ConfigError, match=r"stem: 2 convolutions make patches of 4 pixels, so patch_size cannot be 8"):
        zoo.create_model("vit-tiny", image={"image_size": 16, "patch_size": 8, "stem": [6]})
