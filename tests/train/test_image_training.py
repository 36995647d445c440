"""Images in the one training loop: batches, losses of classes, stages, the held-out part, recipes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_images import SIZE, make_classifier, make_images, make_scan_student, write_idx

import zoo
from zoo.config import ImageOptions
from zoo.errors import ConfigError, DataError
from zoo.images import open_images, split_images
from zoo.train.api import train_recipe
from zoo.train.data import Batch
from zoo.train.image_data import ImageBatches, varied
from zoo.train.recipe import Augment, Recipe, Stage, list_recipes, load_recipe
from zoo.train.stages import Objective, converted_layers

OPTIONS = ImageOptions.parse(SIZE)
IMAGES = make_images()
STAGE = {"budget": {"images": 320}, "batch_size": 16, "lr": 3e-3, "precision": "fp32"}


def numbered(count):
    """Images that tell their number, by their brightness and their label."""
    return open_images(
        (torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(count))
    )


def stream(count=20, **values):
    return ImageBatches(numbered(count), OPTIONS, **{"batch_size": 3, "augment": Augment(), **values})


def test_every_image_comes_once_a_turn_in_a_new_order():
    labels = [i for _, batch in zip(range(20), stream(), strict=False) for i in batch.targets.tolist()]
    turns = [labels[:20], labels[20:40], labels[40:60]]
    assert all(sorted(turn) == list(range(20)) for turn in turns)
    assert turns[0] != turns[1] != turns[2]
    batch = next(stream(seed=5))
    torch.testing.assert_close(batch.inputs[:, 0, 0, 0], (batch.targets / 255 - 0.5) / 0.25)
    assert batch.targets.tolist() != labels[:3]


def test_processes_share_the_images_of_a_turn():
    parts = [stream(count=24, rank=rank, world=2) for rank in (0, 1)]
    labels = [i for _ in range(4) for part in parts for i in next(part).targets.tolist()]
    assert sorted(labels) == list(range(24))
    assert labels == [i for _, b in zip(range(8), stream(count=24), strict=False) for i in b.targets.tolist()]


@pytest.mark.parametrize("restart_after", [None, 4])
def test_the_stream_goes_on_where_it_was(restart_after):
    options = {"augment": Augment(crop=2, flip=True), "restart_after": restart_after}
    whole = [next(batches) for batches in [stream(**options)] for _ in range(11)]
    for place in (0, 5, 8):
        first = stream(**options)
        for _ in range(place):
            next(first)
        again = stream(**options)
        again.load_state_dict(first.state_dict())
        for expected in whole[place:]:
            got = next(again)
            assert torch.equal(got.inputs, expected.inputs)
            assert torch.equal(got.targets, expected.targets)
    if restart_after:
        assert torch.equal(whole[0].inputs, whole[4].inputs)


def test_images_are_cut_and_mirrored():
    x_BCHW = torch.rand(64, 2, 4, 5) + 1
    generator = torch.Generator().manual_seed(0)
    cut = varied(x_BCHW, Augment(crop=1), generator)
    padded = F.pad(x_BCHW, [1] * 4)
    places = list(itertools.product(range(3), range(3)))
    found = set()
    for b in range(64):
        fits = [(r, c) for r, c in places if torch.equal(cut[b], padded[b, :, r : r + 4, c : c + 5])]
        assert len(fits) == 1
        found.update(fits)
    assert found == set(places)
    flipped = varied(x_BCHW, Augment(flip=True), generator)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, x_BCHW, strict=True)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, x_BCHW, strict=True))
    assert 16 < sum(mirrored) < 48
    assert torch.equal(varied(x_BCHW, Augment(), generator), x_BCHW)


def batch_of(images=IMAGES, count=10):
    pixels, labels = images
    return Batch(((pixels[:count] / 255) - 0.5) / 0.25, labels[:count], None)


TWO = {"image": {"distillation_token": True, "distillation_head": True}, "pooling": "cls"}


def test_the_losses_of_classes():
    teacher, student, batch = make_classifier(), make_classifier(1), batch_of()
    with torch.no_grad():
        t_BC, s_BC = (model(pixel_values=batch.inputs).logits for model in (teacher, student))
    plain = {
        "kl": 4 * F.kl_div((s_BC / 2).log_softmax(-1), (t_BC / 2).softmax(-1), reduction="batchmean"),
        "ce": F.cross_entropy(s_BC, batch.targets, label_smoothing=0.1),
        "hard": F.cross_entropy(s_BC, t_BC.argmax(-1)),
    }
    weights = {"kl": 2.0, "ce": 0.5, "hard": 0.25}
    stage = {**STAGE, "kind": "distill", "loss": weights, "temperature": 2, "label_smoothing": 0.1, "train": "all"}
    objective = Objective(student, teacher, Stage.parse(stage), [])
    loss, terms = objective(batch, objective.teach(batch))
    for name, value in plain.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(loss, sum(weights[n] * v for n, v in plain.items()))
    assert float(terms["accuracy"]) == pytest.approx(float((s_BC.argmax(-1) == batch.targets).float().mean()))


@pytest.mark.parametrize("teacher_heads", [1, 2])
@pytest.mark.parametrize("labels", [True, False])
def test_two_heads_share_what_is_learned(teacher_heads, labels):
    """DeiT's hard distillation: the class head learns labels, the other one what the teacher answers."""
    teacher, student = make_classifier(**(TWO if teacher_heads == 2 else {})), make_classifier(1, **TWO)
    batch = batch_of()
    with torch.no_grad():
        t, s = teacher(pixel_values=batch.inputs), student(pixel_values=batch.inputs)
    mine = [s.class_logits, s.distillation_logits]
    if teacher_heads == 2:
        pairs = list(zip(mine, [t.class_logits, t.distillation_logits], strict=True))
    else:
        pairs = [(m, t.logits) for m in (mine[1:] if labels else mine)]
    expected = sum(F.cross_entropy(a, b.argmax(-1)) for a, b in pairs) / len(pairs)
    if labels:
        expected = expected + F.cross_entropy(mine[0], batch.targets)
    loss = {"hard": 1.0, **({"ce": 1.0} if labels else {})}
    objective = Objective(student, teacher, Stage.parse({**STAGE, "kind": "distill", "loss": loss}), [])
    torch.testing.assert_close(objective(batch, objective.teach(batch))[0], expected)
    if labels and teacher_heads == 1:  # as the model's own loss, which halves both
        own = student(pixel_values=batch.inputs, labels=batch.targets, teacher_labels=t.logits.argmax(-1)).loss
        torch.testing.assert_close(2 * own, expected)
    alone = Objective(student, None, Stage.parse({**STAGE, "kind": "pretrain"}), [])
    torch.testing.assert_close(alone(batch, {})[0], student(pixel_values=batch.inputs, labels=batch.targets).loss)


def accuracy(model, images):
    with torch.no_grad():
        return float(
            (model.eval()(pixel_values=batch_of(images, 500).inputs).logits.argmax(-1) == images[1]).float().mean()
        )


def test_from_nothing_to_a_distilled_student(tmp_path):
    """A teacher learns the images; its student, converted to a scan that needs the grid, is aligned and distilled."""
    teacher, fresh = make_classifier(), make_images(seed=1)
    stage = {**STAGE, "kind": "pretrain", "budget": {"images": 1600}, "augment": {"crop": 1}, "label_smoothing": 0.05}
    first = zoo.distill(
        teacher, None, data=IMAGES, stages=[stage], eval_tokens=80, held_out=0.2, out=tmp_path, progress=False
    )
    assert (first.tokens, len([row for row in first.log if "loss" in row])) == (1600 * 5, 100)
    assert accuracy(teacher, fresh) > 0.9
    held = [row for row in first.log if "held_out_loss" in row]
    assert held[-1]["held_out_accuracy"] > 0.8
    assert zoo.create_model(str(tmp_path)).config.spec.image == OPTIONS
    assert not list(tmp_path.glob("tokenizer*"))

    student = make_scan_student(teacher)
    before = accuracy(student, fresh)
    align = {**STAGE, "kind": "align"}
    both = [align, {**align, "kind": "distill", "loss": {"kl": 1.0, "mixer": 1.0}}]
    result = zoo.distill(student, teacher, data=IMAGES, stages=both, progress=False)
    aligned, distilled = ([row for row in result.log if row["stage"] == i] for i in (0, 1))
    assert aligned[-1]["mixer"] < 0.9 * aligned[0]["mixer"]
    assert distilled[-1]["kl"] < distilled[0]["kl"] < aligned[0]["mixer"] * 100
    assert accuracy(student, fresh) >= max(before, 0.8)


def test_the_shared_layers_run_once_and_give_the_same():
    """The student goes on from the teacher's equal layers; a scan behind them still knows the grid."""
    teacher = make_classifier()
    student, batch = make_scan_student(teacher), batch_of()
    losses = []
    for changed in (False, True):
        if changed:  # a layer that is not equal to the teacher's any more, but computes the same
            teacher.config.layers[0]["ffn"]["hidden_size"] += 1
        stage = Stage.parse({**STAGE, "kind": "distill", "loss": {"kl": 1.0, "hidden": 1.0, "mixer": 1.0}})
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(".layers.1.mixer." in name)
        objective = Objective(student, teacher, stage, converted_layers(student, teacher))
        assert objective.shared == (0 if changed else 1)
        losses.append(objective(batch, objective.teach(batch))[0])
    torch.testing.assert_close(*losses)


def test_what_is_held_out_is_never_trained_on(monkeypatch):
    seen = []
    monkeypatch.setattr("zoo.train.image_data.varied", lambda x, *_: seen.extend(x) or x)
    zoo.distill(make_classifier(), None, data=IMAGES, stages=[{**STAGE, "kind": "pretrain"}], held_out=0.3, seed=2,
                progress=False)  # fmt: skip
    train, held = split_images(open_images(IMAGES), 0.3, 2)
    wanted = [{x.numpy().tobytes() for x in part.pixels(range(len(part)), OPTIONS)} for part in (train, held)]
    assert {x.numpy().tobytes() for x in seen} == wanted[0]
    assert wanted[0].isdisjoint(wanted[1])


def test_epochs_repeat_the_batches_and_keep_the_teacher(tmp_path, monkeypatch):
    teacher, calls = make_classifier(), []
    student = make_scan_student(teacher)
    run = teacher.model.patches.forward
    monkeypatch.setattr(teacher.model.patches, "forward", lambda x: calls.append(1) or run(x))
    stage = {**STAGE, "kind": "distill", "epochs": 4, "augment": {"crop": 2, "flip": True}}
    result = zoo.distill(student, teacher, data=IMAGES, stages=[stage], out=tmp_path, progress=False)
    assert (len(result.log), len(calls)) == (20, 5)


def test_a_recipe_from_images_to_a_student(tmp_path):
    images = tmp_path / "train-images-idx3-ubyte"
    write_idx(images, IMAGES[0][:, 0])
    write_idx(tmp_path / "train-labels-idx1-ubyte", IMAGES[1].to(torch.uint8))
    common = {"data": str(images), "held_out": 0.1}
    student = zoo.convert(make_classifier(), "linear_attention", data=str(images), progress=False)
    assert (student.report.data, student.report.measure) == (str(images), "KL, nats/image")
    stage = {**STAGE, "kind": "pretrain", "budget": {"images": 64}}
    make_classifier().save_pretrained(tmp_path / "start")
    made = Recipe.parse(
        {**common, "model": str(tmp_path / "start"), "stages": [stage], "out": str(tmp_path / "teacher")}
    )
    train_recipe(made, progress=False)
    converted = {**common, "teacher": str(tmp_path / "teacher"), "mixer": "linear_attention", "keep": "none"}
    stages = [{**stage, "kind": "align"}, {**stage, "kind": "distill"}]
    result = train_recipe(Recipe.parse({**converted, "stages": stages, "out": str(tmp_path / "s")}), progress=False)
    assert result.model.config.mixer_names == ["linear_attention"] * 2
    assert [stage["tokens"] for stage in result.stages] == [320, 320]
    assert (tmp_path / "s" / "initial" / "config.json").is_file()


def test_what_does_not_fit_is_refused():
    student, stage = make_classifier(), {**STAGE, "kind": "pretrain"}
    pixels, labels = IMAGES
    with pytest.raises(DataError, match=r"labels up to 12, but the model has 3 classes"):
        zoo.distill(student, None, data=(pixels, labels + 10), stages=[stage])
    for loss in ({"embedding": 1.0}, {"kl": 1.0}):
        kind = {"kind": "distill", "packing": "none", "loss": loss}
        other = make_classifier(num_labels=4)
        with pytest.raises(ConfigError, match=r"no sentence embedding|has 3 classes, the teacher 4"):
            zoo.distill(student, other, data=IMAGES, stages=[{**STAGE, **kind}])
    teacher = make_classifier(image={"mean": [0.4]})
    with pytest.raises(ConfigError, match=r"image\.mean: student and teacher read images differently"):
        zoo.distill(student, teacher, data=IMAGES, stages=[{**STAGE, "kind": "distill"}])


def test_the_recipes_run(tmp_path):
    names = [name for name in list_recipes() if name.startswith("fashion-mnist-")]
    assert names == ["fashion-mnist-linear-attention", "fashion-mnist-mamba2", "fashion-mnist-teacher"]
    pixels = torch.randint(256, (24, 28, 28), dtype=torch.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte", pixels)
    write_idx(tmp_path / "train-labels-idx1-ubyte", torch.arange(24).to(torch.uint8) % 10)
    for name in sorted(names, reverse=True):
        changes = [f"data={tmp_path}/train-images-idx3-ubyte", f"out={tmp_path}/{name}", "eval_tokens=0"]
        changes += [] if "teacher" in name else [f"teacher={tmp_path}/fashion-mnist-teacher", "calibrate=false"]
        stages = range(1 if "teacher" in name else 2)
        changes += [f"stages.{i}.{key}" for i in stages for key in ("budget={images: 8}", "batch_size=4")]
        result = train_recipe(load_recipe(name, changes), progress=False)
        assert [stage["steps"] for stage in result.stages] == [2 for _ in stages]
        assert result.model.config.spec.image.mean == [0.286]
    assert set(result.model.config.mixer_names) == {"linear_attention"}
