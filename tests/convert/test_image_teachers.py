"""Teachers of images: the same logits, hidden states and gradients, the same tensors on the way back, conversions."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

import zoo
from zoo.convert.teachers import load_teacher, save_original, write_back
from zoo.convert.teachers.adapter import adapter_for
from zoo.errors import ConversionError, TraitError
from zoo.models.create import load_folder

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 5,
}
HF = {
    "vit": ("ViTForImageClassification", VIT),
    "vit-one-channel": (
        "ViTForImageClassification",
        VIT | {"num_channels": 1, "qkv_bias": False, "hidden_act": "relu"},
    ),
    "deit": ("DeiTForImageClassificationWithTeacher", VIT),
    "deit-class-head": ("DeiTForImageClassification", VIT | {"image_size": [32, 32]}),
    "swin": ("SwinForImageClassification", SWIN),
}
WRAPPER = "TimmWrapperForImageClassification"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SMALL_SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
SMALL_SWIN |= {"window_size": 4, "num_classes": 5}
TIMM = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "vit-mean": ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "deit": ("deit_tiny_distilled_patch16_224", SMALL),
    "swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
}


def away_from_defaults(model):
    """Every tensor random, so that nothing rests on weights of zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if p.dim() == 1 else 0.0))
    return model.eval()


def original(name: str):
    cls, values = HF[name]
    return away_from_defaults(getattr(hf, cls)(getattr(hf, cls).config_class(**values)))


def timm_model(name: str, arguments: dict | None = None):
    timm = pytest.importorskip("timm")
    known, values = TIMM.get(name, (name, {}))
    return away_from_defaults(timm.create_model(known, pretrained=False, **values, **(arguments or {})))


def pixels_of(teacher, size: int | None = None) -> torch.Tensor:
    options = teacher.model.config.spec.image
    size = size or options.image_size
    return torch.randn(2, options.channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", HF)
def test_transformers_gives_the_same(name):
    model = original(name)
    other = copy.deepcopy(model)  # a Swin forgets a shift once it has seen an image that fits a window
    teacher = load_teacher(model)
    assert teacher.max_logit_error < 1e-4
    assert teacher.task == "image-classification"
    pixels = pixels_of(teacher).requires_grad_()
    theirs = model(pixels, output_hidden_states=True)
    ours = teacher.model(pixels, output_hidden_states=True)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    mine = ours.hidden_states[::2] if name == "swin" else ours.hidden_states  # theirs are those of the stages
    for a, b in zip(mine[:-1], theirs.hidden_states[:-1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if name == "deit":
        torch.testing.assert_close(ours.class_logits, theirs.cls_logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.distillation_logits, theirs.distillation_logits, atol=1e-5, rtol=1e-5)
    (g,) = torch.autograd.grad(ours.logits.square().sum(), pixels)
    (expected,) = torch.autograd.grad(theirs.logits.square().sum(), pixels)
    torch.testing.assert_close(g, expected, atol=1e-4, rtol=1e-4)
    larger = pixels_of(teacher, 64)
    theirs = other(larger, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(teacher.model(larger).logits, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TIMM)
def test_timm_gives_the_same(name):
    model = timm_model(name, {} if name == "swin" else {"dynamic_img_size": True})
    teacher = load_teacher(model)
    assert teacher.max_logit_error < 1e-4
    pixels = pixels_of(teacher).requires_grad_()
    theirs, ours = model(pixels), teacher.model(pixels)
    torch.testing.assert_close(ours.logits, theirs, atol=1e-5, rtol=1e-5)
    hidden = teacher.model.model(pixel_values=pixels).last_hidden_state
    expected = model.forward_features(pixels)
    torch.testing.assert_close(hidden, expected.reshape(hidden.shape), atol=1e-5, rtol=1e-5)
    (g,) = torch.autograd.grad(ours.logits.square().sum(), pixels)
    (expected,) = torch.autograd.grad(theirs.square().sum(), pixels)
    torch.testing.assert_close(g, expected, atol=1e-4, rtol=1e-4)
    if name == "swin":
        return
    larger = pixels_of(teacher, 48)  # timm resizes positions with antialiasing
    torch.testing.assert_close(teacher.model(larger).logits, model(larger), atol=1e-5, rtol=1e-5)


PUBLISHED = {
    "vit_tiny_patch16_224": "vit-tiny-patch16-224",
    "deit_tiny_distilled_patch16_224": "deit-tiny-distilled-patch16-224",
    "swin_tiny_patch4_window7_224": "swin-tiny-patch4-window7-224",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_those_of_timm(name):
    """A registered model with timm's weights: the same tensors fit, and give the same logits and gradients."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    imported = load_teacher(model).model
    ours = zoo.create_model(PUBLISHED[name]).eval()
    ours.load_state_dict(imported.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters())
    pixels = torch.randn(1, 3, 224, 224)
    theirs, mine = model(pixels), ours(pixels).logits
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    theirs.square().sum().backward()
    mine.square().sum().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    found = adapter_for("timm_wrapper").export_tensors(wrapper_config(model), WRAPPER, gradients)
    for name, p in model.named_parameters():
        expected = p.grad
        difference = (found[f"timm_model.{name}"] - expected).abs().max()
        assert difference <= 1e-4 * expected.abs().max() + 1e-9, name


def wave(shape: torch.Size, step: float) -> torch.Tensor:
    """Numbers in [-1, 1] that anybody can make again."""
    places = torch.arange(1, shape.numel() + 1, dtype=torch.double)
    return torch.sin(step * places**1.5).view(shape).float()


@torch.no_grad()
def by_formula(model):
    """Weights of a zoo model from a formula, in the order of their names."""
    for i, (_, p) in enumerate(sorted(model.named_parameters())):
        p.copy_(wave(p.shape, 0.3 + 0.01 * i) * (0.5 if p.dim() > 1 else 0.2) + (p.dim() == 1))
    return model.eval()


# What timm 1.0.31 is called with, its logits on `wave((2, 3, 32, 32), 0.7)`, and on images of 48 where it takes them.
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
TINY["dynamic_img_size"] = True
RECORDED: dict[str, tuple] = {
    "vit-tiny": (
        "vit_tiny_patch16_224",
        TINY,
        [0.52963, 1.81321, 9.25084, 1.31904, -2.10761, 2.36687, 8.9179, -1.85393],
        [0.43469, 1.41735, 11.14904, -1.82367, 1.06737, 0.84909, 7.03547, 0.70752],
    ),
    "deit-tiny": (
        "deit_tiny_distilled_patch16_224",
        TINY,
        [1.58379, -0.12319, 9.85344, 0.18082, 2.329, -0.45886, 9.44755, 0.34156],
        [0.84625, -0.18166, 9.55319, 0.58906, 2.09673, -0.49224, 7.87371, 0.88863],
    ),
    "swin-tiny": (
        "swin_tiny_patch4_window7_224",
        SMALL_SWIN | {"embed_dim": 32, "num_classes": 10},
        [1.52613, 2.76245, 4.38679, 6.19543, 1.66715, 2.81306, 4.45686, 6.30085],
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_logits_that_timm_gave(name):
    model = by_formula(zoo.create_model(name, image={"interpolation": "bicubic_antialias"}))
    for size, expected in zip((32, 48), RECORDED[name][2:], strict=False):
        with torch.no_grad():
            logits = model(wave(torch.Size([2, 3, size, size]), 0.7)).logits
        torch.testing.assert_close(logits[:, :4].flatten(), torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", RECORDED)
def test_the_recorded_logits_are_those_of_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(RECORDED[name][0], **RECORDED[name][1])
    ours = by_formula(zoo.create_model(name))
    tensors = adapter_for("timm_wrapper").export_tensors(wrapper_config(model), WRAPPER, ours.state_dict())
    model.load_state_dict({key.removeprefix("timm_model."): t for key, t in tensors.items()})
    for size, expected in zip((32, 48), RECORDED[name][2:], strict=False):
        with torch.no_grad():
            logits = model.eval()(wave(torch.Size([2, 3, size, size]), 0.7))
        torch.testing.assert_close(logits[:, :4].flatten(), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def both_ways(model, tmp_path):
    before = copy.deepcopy(model.state_dict())
    teacher = load_teacher(model, check=False)
    again = write_back(teacher.model)
    tensors = again.state_dict()
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[key], before[key]) for key in before)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in teacher.model.parameters()}
    teacher.model.save_pretrained(tmp_path / "zoo")
    save_original(load_folder(tmp_path / "zoo"), tmp_path / "back")
    loaded = load_teacher(tmp_path / "back")
    ours = teacher.model.state_dict()
    assert all(torch.equal(t, ours[key]) for key, t in loaded.model.state_dict().items())
    assert loaded.model.config.layers == teacher.model.config.layers
    assert loaded.model.config.image == teacher.model.config.image
    return again


@pytest.mark.parametrize("name", HF)
def test_write_back_to_transformers(name, tmp_path):
    model = original(name)
    assert type(both_ways(model, tmp_path)) is type(model)


@pytest.mark.parametrize("name", TIMM)
def test_write_back_to_timm(name, tmp_path):
    model = timm_model(name)
    wrapper = hf.TimmWrapperForImageClassification(wrapper_config(model))
    wrapper.timm_model = model
    again = both_ways(wrapper, tmp_path)
    assert type(again.timm_model) is type(model)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.timm_model.eval()(pixels), model(pixels))


def wrapper_config(model):
    from zoo.convert.teachers.timm_models import arguments

    name = model.pretrained_cfg["architecture"]
    return hf.TimmWrapperConfig(architecture=name, num_labels=model.num_classes, model_args=arguments(model))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_tiny_patch16_224", SMALL | {"init_values": 0.1}, "has no place in a zoo model"),
        ("vit_tiny_patch16_224", SMALL | {"reg_tokens": 2}, "has no place in a zoo model"),
        (
            "vit_tiny_patch16_224",
            SMALL | {"global_pool": "avg"},
            "fc_norm.weight.* has no place in a zoo model",
        ),
        ("vit_tiny_patch16_224", SMALL | {"no_embed_class": True}, "no_embed_class=True cannot be imported"),
        ("vit_tiny_patch16_224", SMALL | {"img_size": (32, 64)}, "sizes must be square, got 32 x 64"),
        ("swin_tiny_patch4_window7_224", SMALL_SWIN | {"window_size": 7}, "window_size=.4, 4. cannot be imported"),
        ("resnet18", {}, "timm's ResNet is not supported; supported: VisionTransformer"),
    ],
)
def test_other_models_of_timm_are_refused(name, arguments, message):
    with pytest.raises(ConversionError, match=message):
        load_teacher(timm_model(name, arguments))


def test_other_models_of_transformers_are_refused():
    with pytest.raises(ConversionError, match=r"image_size=.32, 64. cannot be imported: images must be square"):
        load_teacher(hf.ViTForImageClassification(hf.ViTConfig(**VIT | {"image_size": [32, 64]})))
    with pytest.raises(ConversionError, match="window_size=7 cannot be imported: its last stage has only 4 x 4"):
        load_teacher(hf.SwinForImageClassification(hf.SwinConfig(**SWIN | {"window_size": 7})))
    with pytest.raises(ConversionError, match="use_absolute_embeddings=True cannot be imported exactly"):
        load_teacher(hf.SwinForImageClassification(hf.SwinConfig(**SWIN | {"use_absolute_embeddings": True})))
    with pytest.raises(ConversionError, match="ViTModel is not supported; supported for vit: ViTForImage"):
        load_teacher(hf.ViTModel(hf.ViTConfig(**VIT)))


def test_a_wrong_import_is_refused(monkeypatch):
    from zoo.convert.teachers.vit import ViT

    model = original("vit")
    swapped = dict(ViT.modules(ViT(), model.config, "ViTForImageClassification"))
    swapped["vit.layers.{i}.attention.q_proj"], swapped["vit.layers.{i}.attention.k_proj"] = (
        swapped["vit.layers.{i}.attention.k_proj"],
        swapped["vit.layers.{i}.attention.v_proj"],
    )
    swapped["vit.layers.{i}.attention.v_proj"] = "model.layers.{i}.mixer.q_proj"
    monkeypatch.setattr(ViT, "modules", lambda *_: swapped)
    with pytest.raises(ConversionError, match=r"deviates by .*, first in layer 0"):
        load_teacher(model)


# --- Conversion ----------------------------------------------------------------------------------------------------


@pytest.fixture
def vit():
    return load_teacher(original("vit"))


@pytest.fixture
def images():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))


TWO_SIDED = [
    name
    for name in zoo.list_mixers()
    if zoo.registry.mixer_class(name).traits.bidirectional and name not in ("attention", "windowed_linear")
]


@pytest.mark.parametrize("mixer", TWO_SIDED)
def test_every_two_sided_mixer_takes_the_place_of_attention(mixer, vit, images, tmp_path):
    options = {"linformer": {"max_length": 17}, "scan": {"inner": "linear_attention"}}.get(mixer, {})
    student = zoo.convert(vit, mixer, data=images, mixer_options=options, out=tmp_path / "student")
    assert student.config.mixer_names == [mixer] * 3
    assert student.report.measure == "KL, nats/image"
    assert student.report.tokens == 8 * 17
    assert 0 <= student.report.distance <= student.report.distance_before + 1e-6
    again = zoo.create_model(str(tmp_path / "student")).eval()
    torch.testing.assert_close(again(images).logits, student(images).logits)


def test_mixers_as_wide_as_the_image_convert_exactly(vit, images):
    """The class token is global for Longformer; a window that reaches over all patches is attention."""
    expected = vit.model(images).logits
    for mixer, options in (("longformer", {"window": 17}), ("sliding_window", {"window": 17}), ("attention", {})):
        student = zoo.convert(vit, mixer, mixer_options=options, calibrate=False)
        torch.testing.assert_close(student(images).logits, expected, atol=1e-5, rtol=1e-5)
    longformer = zoo.convert(vit, "longformer", mixer_options={"window": 3}, calibrate=False)
    assert longformer.config.layers[0]["mixer"]["global_tokens"] == 1
    deit = zoo.convert(load_teacher(original("deit")), "longformer", mixer_options={"window": 3}, calibrate=False)
    assert deit.config.layers[0]["mixer"]["global_tokens"] == 2
    pixels = images[:1].requires_grad_()
    hidden_BLD = longformer.model(pixel_values=pixels).last_hidden_state
    (gradient,) = torch.autograd.grad(hidden_BLD[:, 0].square().sum(), pixels)
    assert (gradient.abs() > 0).all(), "the class token sees every pixel"


def test_a_swin_is_imported_but_not_converted(images):
    teacher = load_teacher(original("swin"))
    assert set(teacher.model.config.mixer_names) == {"shifted_window"}
    student = zoo.convert(teacher)
    assert torch.equal(student(images).logits, teacher.model(images).logits)
    with pytest.raises(ConversionError, match="no layer of this model is softmax attention"):
        zoo.convert(teacher, "linear_attention", data=images)


def test_layers_are_chosen_on_images(vit, images):
    student = zoo.convert(vit, "linear_attention", keep="sensitivity:1/3", data=images)
    assert student.config.mixer_names.count("attention") == 1
    assert student.report.agreement is not None


def test_what_conversion_needs(vit, images):
    with pytest.raises(ConversionError, match="cannot write its own calibration"):
        zoo.convert(vit, "linear_attention")
    with pytest.raises(ConversionError, match=r"calibration data: images must be \(batch, 3, rows, columns\)"):
        zoo.convert(vit, "linear_attention", data=torch.ones(4, 8, dtype=torch.long))
    with pytest.raises(TraitError, match="cannot replace attention in a two-sided encoder"):
        zoo.convert(vit, "mamba2", data=images)


def test_a_converted_model_learns_what_its_teacher_answers(vit, images):
    """Distillation in a few lines: the student's divergence from the teacher falls."""
    student = zoo.convert(vit, "linear_attention", data=images, calibrate=False).train()
    target = vit.model(images).logits.detach().log_softmax(-1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        out = student(images).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(out, target, log_target=True, reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
