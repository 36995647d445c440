"""Early exits in stages: the loss of each, weighted by depth; frozen layers; exits that get better."""

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import TOKENIZER, make_student, make_teacher, make_texts

import zoo
from zoo.errors import ConfigError
from zoo.models.early_exit import add_exits
from zoo.train.data import PackedBatches
from zoo.train.recipe import Stage
from zoo.train.stages import Objective, check_stage, choose_parameters, converted_layers


def make_stage(kind="distill", **values):
    return Stage.parse({"kind": kind, "budget": {"tokens": 3000}, "precision": "fp32", "length": 24, **values})


@pytest.fixture(scope="module")
def batch():
    return next(PackedBatches(make_texts(), TOKENIZER, batch_size=3, length=24))


def logits_of_all(model, batch):
    """After layers 0 and 1, and at the end."""
    out = model.model(batch.inputs, segment_ids=batch.segment_ids, output_hidden_states=True, use_cache=False)
    early = [model.exits.norms[str(i)](out.hidden_states[i + 1]) for i in (0, 1)]
    return [model.lm_head(h) for h in (*early, out.last_hidden_state)]


def kl(teacher, student):
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()


def test_exits_learn_as_the_last_layer(batch):
    teacher = make_teacher()
    student = add_exits(make_student(teacher), [0, 1])
    stage = make_stage(loss={"kl": 0.6, "ce": 0.4}, train="all")
    choose_parameters(student, stage, converted_layers(student, teacher))
    objective = Objective(student, teacher.requires_grad_(False), stage, [1, 2])
    loss, terms = objective(batch, objective.teach(batch))
    target = teacher(batch.inputs, segment_ids=batch.segment_ids, use_cache=False).logits
    every = [
        0.6 * kl(target, x) + 0.4 * F.cross_entropy(x.flatten(0, 1), batch.targets.flatten())
        for x in logits_of_all(student, batch)
    ]
    torch.testing.assert_close(loss, (every[0] + 2 * every[1] + 3 * every[2]) / 6, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["exits"], ((every[0] + 2 * every[1]) / 3).detach(), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.exits.parameters())


def test_exits_learn_from_the_last_layer(batch):
    student = add_exits(make_teacher(), [0, 1])
    stage = make_stage("finetune", exits="from_last", train=["exits.*"])
    choose_parameters(student, stage, [])
    loss, terms = Objective(student, None, stage, [])(batch, {})
    first, second, last = logits_of_all(student, batch)
    ce = F.cross_entropy(last.flatten(0, 1), batch.targets.flatten())
    expected = (kl(last, first) + 2 * kl(last, second)) / 3
    torch.testing.assert_close(loss, ce + expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["exits"], expected.detach(), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert {n for n, p in student.named_parameters() if p.grad is not None} == {
        "exits.norms.0.weight",
        "exits.norms.1.weight",
    }
    loss, terms = Objective(student, None, make_stage("finetune", exits="none"), [])(batch, {})
    torch.testing.assert_close(loss, ce)
    assert "exits" not in terms


def test_layers_below_the_first_exit_run_in_the_teacher_only(batch):
    teacher = make_teacher()
    student = add_exits(make_student(teacher, layers=(2,)), [1])
    stage = make_stage()
    choose_parameters(student, stage, [2])
    objective = Objective(student, teacher.requires_grad_(False), stage, [2])
    assert objective.shared == 1
    shared = objective(batch, objective.teach(batch))
    objective.shared = objective.teaching.shared = 0
    torch.testing.assert_close(shared, objective(batch, objective.teach(batch)), rtol=1e-6, atol=1e-7)


def test_from_last_needs_exits():
    teacher = make_teacher()
    with pytest.raises(ConfigError, match="exits: this model has no early exits"):
        check_stage(make_stage(exits="from_last"), make_student(teacher), teacher)
    with pytest.raises(ConfigError, match="exits: "):
        make_stage(exits="last")


@pytest.mark.parametrize("exits", ["as_last", "from_last"])
def test_exits_get_better(exits, batch, tmp_path):
    """Only the exits' norms train: the last layer stays what it was, and the first exit comes nearer to it."""
    teacher = make_teacher()
    student = add_exits(teacher, [0, 1])
    before = [kl(logits_of_all(student, batch)[2], x).item() for x in logits_of_all(student, batch)]
    stages = [{"kind": "distill", "budget": {"tokens": 6000}, "length": 24, "batch_size": 4, "lr": 0.03, "exits": exits,
               "train": ["exits.*"], "precision": "fp32"}]  # fmt: skip
    options = {"data": make_texts(), "tokenizer": TOKENIZER, "progress": False}
    zoo.distill(student, teacher, stages=stages, out=tmp_path / "run", **options)
    loaded = zoo.create_model(str(tmp_path / "run"))
    for model in (student, loaded):
        logits = logits_of_all(model, batch)
        torch.testing.assert_close(logits[2], logits_of_all(add_exits(teacher, [0, 1]), batch)[2])
        after = [kl(logits[2], x).item() for x in logits]
        assert after[0] < 0.9 * before[0]
        assert after[1] < 0.9 * before[1]


def test_a_model_that_reads_a_memory_trains_as_it_is(batch):
    """A stage runs the blocks itself: the word vectors go along."""
    student = zoo.create_model("zamba2-tiny")
    loss, _ = Objective(student, None, make_stage("pretrain"), [])(batch, {})
    logits = student(batch.inputs, segment_ids=batch.segment_ids, use_cache=False).logits
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()), rtol=1e-5, atol=1e-6
    )
