"""Training mixtures of experts: the auxiliary loss counts; the balancing bias moves, is saved and comes back."""

import os
import signal

import pytest
import torch
from tiny_runs import TOKENIZER, make_texts

import zoo
from zoo.train.data import PackedBatches
from zoo.train.guards import Interrupted
from zoo.train.loop import StageLoop, saved_buffers
from zoo.train.recipe import Stage
from zoo.train.stages import Objective

STAGE = {
    "kind": "pretrain",
    "budget": {"tokens": 32 * 8},
    "length": 16,
    "batch_size": 2,
    "lr": 1e-3,
    "precision": "fp32",
}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_stage_trains_on_the_auxiliary_loss(checkpointed):
    student = zoo.create_model("olmoe-tiny").train()
    if checkpointed:
        student.gradient_checkpointing_enable()
    batch = next(PackedBatches(make_texts(), TOKENIZER, batch_size=2, length=16))
    objective = Objective(student, None, Stage.parse(STAGE), [])
    loss, terms = objective(batch, {})
    parts = sum(block.ffn.auxiliary_loss for block in student.model.layers)
    torch.testing.assert_close(terms["auxiliary"], parts.detach())
    torch.testing.assert_close(loss, terms["ce"] + parts)
    loss.backward()
    got = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    out = student(batch.inputs, segment_ids=batch.segment_ids)
    ce = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch.targets.flatten())
    (ce + student.model.auxiliary_loss()).backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-7)
    loss, terms = objective.eval()(batch, {})
    assert "auxiliary" not in terms
    assert Objective(student, None, Stage.parse(STAGE), []).student.model.auxiliary_loss() is None


def make():
    torch.manual_seed(4)
    return zoo.create_model("deepseek-v3-tiny", initializer_range=0.1)


def train(student, out=None, **values):
    options = {"data": make_texts(), "tokenizer": TOKENIZER, "progress": False}
    return zoo.distill(student, None, stages=[{**STAGE, **values}], out=out, **options)


def test_the_bias_moves_is_saved_and_a_run_goes_on_with_it(tmp_path, monkeypatch):
    whole = make()
    train(whole, tmp_path / "whole")
    (name,) = saved_buffers(whole)
    bias_E = saved_buffers(whole)[name]
    assert name == "model.layers.1.ffn.balance_E"
    steps = (bias_E / 0.001).round()
    assert torch.allclose(bias_E, 0.001 * steps, atol=1e-6)
    assert 2 <= steps.abs().max() <= 8
    assert torch.equal(zoo.create_model(str(tmp_path / "whole")).model.layers[1].ffn.balance_E, bias_E)

    step = StageLoop._step

    def interrupted(self, share):
        step(self, share)
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StageLoop, "_step", interrupted)
    with pytest.raises(Interrupted):
        train(make(), tmp_path / "run")
    monkeypatch.undo()
    again = make()
    train(again, tmp_path / "run")
    for key, t in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], t), key


def test_accumulated_batches_move_the_bias_once():
    student = make()
    train(student, accumulate=2, gradient_checkpointing=True)
    bias_E = student.model.layers[1].ffn.balance_E
    assert 0.001 <= bias_E.abs().max().item() <= 0.0041  # four steps of two batches
