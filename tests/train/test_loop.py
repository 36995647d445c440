"""The loop: budgets, precision, accumulation, averages, and every way a run stops."""

import json
import math
import os
import signal

import pytest
import torch
from tiny_runs import TOKENIZER, make_student, make_teacher, make_texts, parameters

import zoo
from zoo.errors import ConfigError, TrainingError
from zoo.train.guards import Interrupted, LossWatch
from zoo.train.loop import StageLoop

TEXTS = make_texts()


def distill(student, teacher, *stages, **options):
    stages = [{"kind": "distill", "budget": {"tokens": 640}, "length": 16, "precision": "fp32", **s} for s in stages]
    return zoo.distill(
        student, teacher, data=TEXTS, tokenizer=TOKENIZER, stages=stages, **{"progress": False, **options}
    )


@torch.no_grad()
def distance(student, teacher):
    """KL(teacher || student) on text that is not trained on."""
    ids = torch.tensor([list(text.encode())[:16] for text in make_texts(200, seed=9) if len(text) >= 16])
    p, q = (model(ids, use_cache=False).logits.log_softmax(-1) for model in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def pair():
    teacher = make_teacher()
    return make_student(teacher), teacher


def test_dropout_is_off_where_a_teacher_is_followed():
    """An equal student is at no distance from it; without a teacher dropout is on as ever."""
    teacher = make_teacher(embedding_dropout=0.5)
    student = make_student(teacher, layers=())
    stage = {"train": "all", "lr": 1e-12, "budget": {"tokens": 32}}
    assert distill(student, teacher, {**stage, "loss": {"hidden": 1.0}}).log[0]["loss"] < 1e-9
    losses = []
    for student.model.dropout.p in (0.5, 0.0):
        losses.append(distill(student, None, {**stage, "kind": "finetune"}).log[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_align_then_distill_bring_the_student_nearer(pair, precision):
    student, teacher = pair
    before, teachers = parameters(student), parameters(teacher)
    distances = [distance(student, teacher)]
    align = {"kind": "align", "budget": {"tokens": 1600}, "lr": 3e-3, "precision": precision}
    first = distill(student, teacher, align)
    distances.append(distance(student, teacher))
    result = distill(student, teacher, {"budget": {"tokens": 1600}, "lr": 1e-3, "precision": precision})
    distances.append(distance(student, teacher))
    assert distances[1] < 0.8 * distances[0]
    assert distances[2] < 0.95 * distances[1]
    assert first.stages[0]["last_loss"] < 0.8 * first.stages[0]["first_loss"]
    assert first.stages[0]["tokens"] == first.tokens == result.tokens == 1600
    assert result.cpu_seconds > 0
    after = parameters(student)
    for name, p in after.items():
        converted = name.startswith(("model.layers.1.mixer.", "model.layers.2.mixer."))
        assert torch.equal(p, before[name]) == (not converted)
        assert p.dtype == torch.float32
    assert all(torch.equal(p, teachers[n]) for n, p in parameters(teacher).items())
    assert not student.training
    assert all(p.requires_grad for p in student.parameters())
    rows = [row for row in result.log if "loss" in row]
    assert len(rows) == 50
    assert {"step", "kind", "loss", "kl", "lr", "grad_norm", "tokens_per_second"} <= rows[-1].keys()
    assert rows[49]["lr"] < rows[25]["lr"] > rows[0]["lr"]


@pytest.mark.parametrize("unit", ["seconds", "cpu_seconds"])
def test_a_budget_in_time_ends(pair, unit):
    result = distill(*pair, {"budget": {unit: 0.3}})
    record = result.stages[0]
    assert record[unit] >= 0.3
    assert record["tokens"] == record["steps"] * 32 > 0


def test_accumulation_is_a_larger_batch(pair):
    student, teacher = pair
    other = make_student(teacher)
    stage = {"train": "all", "budget": {"tokens": 192}, "packing": "joined", "lr": 1e-2}
    distill(student, teacher, {**stage, "batch_size": 4})
    distill(other, teacher, {**stage, "batch_size": 2, "accumulate": 2})
    torch.testing.assert_close(parameters(student), parameters(other), rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(pair):
    student, teacher = pair
    other = make_student(teacher)
    distill(student, teacher, {"train": "all"})
    distill(other, teacher, {"train": "all", "gradient_checkpointing": True})
    torch.testing.assert_close(parameters(student), parameters(other), rtol=1e-5, atol=1e-6)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in other.modules())


def test_average_of_weights(pair, monkeypatch):
    student, teacher = pair
    seen, step = [], StageLoop._step

    def watched(self, share):
        step(self, share)
        seen.append(self.trained["model.layers.1.mixer.q_proj.weight"].detach().clone())

    monkeypatch.setattr(StageLoop, "_step", watched)
    want = parameters(student)["model.layers.1.mixer.q_proj.weight"]
    distill(student, teacher, {"ema": 0.7})
    for value in seen:
        want = 0.7 * want + 0.3 * value
    torch.testing.assert_close(parameters(student)["model.layers.1.mixer.q_proj.weight"], want)


def test_epochs_go_over_the_same_text_and_read_the_teacher_from_disk(pair, tmp_path):
    student, teacher = pair
    other = make_student(teacher)
    calls = []
    teacher.model.layers[2].register_forward_hook(lambda *a: calls.append(1))
    stage = {"budget": {"tokens": 960}, "epochs": 3}
    distill(student, teacher, stage, out=tmp_path / "run")
    assert len(calls) == 10
    assert not (tmp_path / "run" / "teacher_cache").exists()
    distill(other, teacher, {**stage, "cache_teacher": False})
    assert len(calls) == 40
    torch.testing.assert_close(parameters(student), parameters(other), rtol=0, atol=0)


def test_finetune_and_pretrain_need_no_teacher():
    model = make_teacher(layers=2, initializer_range=0.02)
    stages = [{"kind": "pretrain", "budget": {"tokens": 6400}, "lr": 1e-2}, {"kind": "finetune", "train": ["*.ffn.*"]}]
    result = distill(model, None, *stages, eval_tokens=128)
    assert result.stages[0]["first_loss"] == pytest.approx(math.log(256), rel=0.1)
    assert result.stages[0]["last_loss"] < 3
    assert [row["held_out_loss"] for row in result.log if "held_out_loss" in row] == []  # nothing is saved without out


def test_a_nan_stops_the_stage_and_names_the_layer(pair):
    student, teacher = pair
    calls = []

    def poison(module, args, out):
        calls.append(1)
        return out * float("nan") if len(calls) > 3 else out

    student.model.layers[1].ffn.down_proj.register_forward_hook(poison)
    with pytest.raises(TrainingError, match=r"step 4, stage 1 .*layers\.1\.ffn\.down_proj.*lower lr.*clip"):
        distill(student, teacher, {})


def test_a_diverging_loss_stops_the_stage(pair):
    student, teacher = pair
    with pytest.raises(TrainingError, match=r"the loss diverges.*lower lr than 3"):
        distill(student, teacher, {"lr": 3.0, "budget": {"tokens": 32 * 200}, "train": "all", "clip": None})


def test_loss_watch():
    watch = LossWatch(patience=3)
    assert not any(watch.update(1.0) for _ in range(20))
    assert [watch.update(x) for x in (4.0, 4.0, 1.0, 4.0, 4.0, 4.0)] == [False, False, False, False, False, True]
    early = LossWatch(patience=3)
    assert not any(early.update(10.0 - i) for i in range(10))


def test_ctrl_c_saves_and_the_same_command_goes_on(pair, tmp_path, monkeypatch):
    student, teacher = pair
    other = make_student(teacher)
    distill(other, teacher, {})
    step = StageLoop._step

    def interrupted(self, share):
        step(self, share)
        if self.state.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StageLoop, "_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped at step 7, saved in .*same command"):
        distill(student, teacher, {}, out=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert issubclass(Interrupted, KeyboardInterrupt)
    monkeypatch.undo()
    again = make_student(teacher)
    result = distill(again, teacher, {}, out=tmp_path / "run")
    assert [row["step"] for row in result.log] == list(range(1, 21))
    torch.testing.assert_close(parameters(again), parameters(other), rtol=0, atol=0)


def test_held_out_loss_is_logged_and_decides_what_is_best(pair, tmp_path):
    checkpoints = zoo.train.recipe.Checkpoints(every_steps=5, keep=1)
    distill(*pair, {"lr": 3e-3}, out=tmp_path / "run", eval_tokens=64, held_out=0.3, checkpoints=checkpoints)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    assert sorted(losses) == [5, 10, 15, 20]
    best = min(losses, key=losses.get)
    kept = {int(p.name[-9:]) for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {best, 20}


def test_what_cannot_be_trained_is_said_before_it_starts(pair):
    student, teacher = pair
    with pytest.raises(ConfigError, match="needs a teacher"):
        distill(student, None, {})
    with pytest.raises(ConfigError, match=r"stages\.0\.lrr: unknown key"):
        distill(student, teacher, {"lrr": 1})
