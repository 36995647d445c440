"""What a stage computes, against the whole models run plainly."""

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import TOKENIZER, make_student, make_teacher, make_texts

from zoo.config import ZooConfig
from zoo.convert.surgery import replace_mixers
from zoo.errors import ConfigError
from zoo.models.heads import ZooForSentenceEmbedding
from zoo.train.data import Batch, PackedBatches, padded_batch
from zoo.train.losses import relative_error
from zoo.train.recipe import Stage
from zoo.train.stages import (  # fmt: skip
    Objective,
    check_stage,
    choose_parameters,
    converted_layers,
    first_non_finite,
    make_optimizer,
    shared_layers,
)


def make_stage(kind="distill", **values):
    return Stage.parse({"kind": kind, "budget": {"tokens": 1000}, "precision": "fp32", "length": 24, **values})


def make_objective(student, teacher, stage):
    converted = converted_layers(student, teacher)
    choose_parameters(student, stage, converted)
    teacher = None if teacher is None else teacher.requires_grad_(False)
    return Objective(student, teacher, stage, converted)


@pytest.fixture(scope="module")
def batch():
    return next(PackedBatches(make_texts(), TOKENIZER, batch_size=3, length=24))


@pytest.fixture
def pair():
    teacher = make_teacher()
    return make_student(teacher), teacher


def test_distill_is_kl_and_cross_entropy_of_the_whole_models(pair, batch):
    student, teacher = pair
    objective = make_objective(student, teacher, make_stage(loss={"kl": 0.7, "ce": 0.3}, temperature=2.0))
    assert objective.shared == 1
    loss, terms = objective(batch, objective.teach(batch))
    s, t = (m(batch.inputs, segment_ids=batch.segment_ids, use_cache=False).logits for m in (student, teacher))
    kl = F.kl_div(F.log_softmax(s / 2, -1), F.log_softmax(t / 2, -1), log_target=True, reduction="none").sum(-1).mean()
    ce = F.cross_entropy(s.flatten(0, 1), batch.targets.flatten())
    torch.testing.assert_close(loss, 0.7 * 4 * kl + 0.3 * ce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["kl"], 4 * kl, rtol=1e-4, atol=1e-6)
    want = torch.autograd.grad(0.7 * 4 * kl + 0.3 * ce, (p := student.model.layers[2].mixer.q_proj.weight))[0]
    got = torch.autograd.grad(loss, p)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-7)


def test_the_shared_layers_change_nothing(pair, batch):
    student, teacher = pair
    objective = make_objective(student, teacher, make_stage(loss={"kl": 1.0, "hidden": 0.5, "mixer": 0.5}))
    shared = objective(batch, objective.teach(batch))
    objective.shared = objective.teaching.shared = 0
    plain = objective(batch, objective.teach(batch))
    torch.testing.assert_close(shared, plain, rtol=1e-6, atol=1e-7)


def test_what_is_shared(pair):
    student, teacher = pair
    choose_parameters(student, make_stage(), [1, 2])
    assert shared_layers(student, teacher) == 1
    choose_parameters(student, make_stage(train=["model.layers.2.*"]), [1, 2])
    assert shared_layers(student, teacher) == 1  # layer 1 is frozen, but not the teacher's
    choose_parameters(student, make_stage(train="all"), [1, 2])
    assert shared_layers(student, teacher) == 0
    choose_parameters(student, make_stage(), [1, 2])
    with torch.no_grad():
        student.model.layers[0].ffn.up_proj.weight[0, 0] += 1
    assert shared_layers(student, teacher) == 0
    copy = make_student(teacher, layers=())
    choose_parameters(copy, make_stage(train=["model.norm.*"]), [])
    assert shared_layers(copy, teacher) == 3


def test_align_is_each_mixer_on_the_teachers_input(pair, batch):
    student, teacher = pair
    objective = make_objective(student, teacher, make_stage("align"))
    loss, _ = objective(batch, objective.teach(batch))
    hidden = teacher.model(
        batch.inputs, segment_ids=batch.segment_ids, use_cache=False, output_hidden_states=True
    ).hidden_states
    errors = []
    for i in (1, 2):
        x = teacher.model.layers[i].mixer_norm(hidden[i])
        y, _ = student.model.layers[i].mixer(x, segments_BL=batch.segment_ids)
        errors.append(relative_error(y, teacher.model.layers[i].mixer(x, segments_BL=batch.segment_ids)[0]))
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    loss.backward()
    trained = {n for n, p in student.named_parameters() if p.grad is not None}
    mixers = ("model.layers.1.mixer.", "model.layers.2.mixer.")
    assert trained == {n for n, _ in student.named_parameters() if n.startswith(mixers)}


def test_hidden_term_is_each_layers_relative_error(pair, batch):
    student, teacher = pair
    objective = make_objective(student, teacher, make_stage(loss={"hidden": 2.0}))
    loss, terms = objective(batch, objective.teach(batch))
    outs = []
    for model in pair:
        for i in (1, 2):
            model.model.layers[i].register_forward_hook(lambda m, a, out: outs.append(out[0]))
        model(batch.inputs, segment_ids=batch.segment_ids, use_cache=False)
    want = (relative_error(outs[0], outs[2]) + relative_error(outs[1], outs[3])) / 2
    torch.testing.assert_close(loss, 2 * want)
    torch.testing.assert_close(terms["hidden"], want.detach())


def test_packed_documents_do_not_see_each_other(pair):
    student, teacher = pair
    objective = make_objective(student, teacher, make_stage())
    ids = torch.randint(1, 255, (1, 12))
    changed = ids.clone()
    changed[:, :6] = torch.randint(1, 255, (1, 6))
    segments = torch.tensor([[1] * 6 + [2] * 6])
    targets = torch.full_like(ids, -100)
    outs = [objective.teach(Batch(i, targets, segments))["last"][:, 6:] for i in (ids, changed)]
    torch.testing.assert_close(*outs)
    outs = [objective.teach(Batch(i, targets, None))["last"][:, 6:] for i in (ids, changed)]
    assert not torch.allclose(*outs)


@pytest.fixture
def encoders():
    torch.manual_seed(0)
    mixer = {"name": "attention", "num_heads": 2, "head_dim": 16, "causal": False}
    layers = [{"mixer": mixer, "ffn": {"name": "mlp", "hidden_size": 48}}] * 2
    fields = {"positions": "learned", "max_position_embeddings": 24, "block": "post_norm", "final_norm": False}
    config = ZooConfig(
        vocab_size=256, hidden_size=32, layers=layers, task="sentence-embedding", initializer_range=0.3, **fields
    )
    teacher = ZooForSentenceEmbedding(config).eval()
    return replace_mixers(teacher, dict.fromkeys([0, 1], "linear_attention")), teacher


def test_sentences_are_compared_as_each_is_alone(encoders):
    student, teacher = encoders
    batch = padded_batch([list(range(1, 1 + n)) for n in (24, 9, 1, 17)], TOKENIZER)
    rows = [ids[mask][None] for ids, mask in zip(batch.inputs, batch.mask, strict=True)]
    assert [row.shape[1] for row in rows] == [24, 9, 1, 17]
    weights = {"embedding": 2.0, "hidden": 0.5, "mixer": 0.25}
    objective = make_objective(student, teacher, make_stage(packing="none", loss=weights))
    loss, terms = objective(batch, objective.teach(batch))

    seen = {student: [], teacher: []}

    def keep(model):
        return lambda _, inputs, out: seen[model].append(out[0].detach().double())

    def hidden_error():
        """Of each layer: sums of squares over rows that were run one by one."""
        total = torch.zeros(2, 2, dtype=torch.float64)
        handles = [m.model.layers[i].register_forward_hook(keep(m)) for m in seen for i in range(2)]
        for ids in rows:
            for m in seen:
                seen[m].clear()
                m(ids)
            for i, (y, t) in enumerate(zip(*seen.values(), strict=True)):
                total[i] += torch.stack([(y - t).square().sum(), t.square().sum()])
        for handle in handles:
            handle.remove()
        return (total[:, 0] / total[:, 1]).mean().float()

    with torch.no_grad():
        pairs = [(student(ids).pooler_output, teacher(ids).pooler_output) for ids in rows]
        embedding = 1 - torch.stack([F.cosine_similarity(y, t) for y, t in pairs]).mean()
        torch.testing.assert_close(terms["embedding"], embedding, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(terms["hidden"], hidden_error(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(loss, 2 * terms["embedding"] + 0.5 * terms["hidden"] + 0.25 * terms["mixer"])
    align = make_objective(student, teacher, make_stage("align", packing="none"))
    aligned, _ = align(batch, align.teach(batch))
    longer = [F.pad(x, (0, 3), value=v) for x, v in ((batch.inputs, 7), (batch.targets, -100))]
    padded = Batch(*longer, None, F.pad(batch.mask, (0, 3)))
    torch.testing.assert_close(align(padded, align.teach(padded))[0], aligned)


def test_stages_that_an_encoder_does_not_have(pair, encoders):
    with pytest.raises(ConfigError, match=r"has no distribution over words; use loss\.embedding"):
        check_stage(make_stage(), *encoders)
    embedding = make_stage(packing="none", loss={"embedding": 1.0})
    with pytest.raises(ConfigError, match="a causal-lm, which has no sentence embedding"):
        check_stage(embedding, *pair)
    check_stage(embedding, *encoders)


@pytest.mark.parametrize(
    ("train", "lrs", "included", "excluded"),
    [
        ("mixers", {"mixers": 3e-4}, "model.layers.1.mixer.q_proj.weight", "model.layers.0.mixer.q_proj.weight"),
        ("all", {"all": 3e-4}, "model.embed_tokens.weight", None),
        (["*.2.ffn.*"], {"*.2.ffn.*": 3e-4}, "model.layers.2.ffn.up_proj.weight", "model.layers.2.mixer.q_proj.weight"),
        ({"mixers": 1e-3, "all": 1e-5}, {"mixers": 1e-3, "all": 1e-5}, "model.norm.weight", None),
    ],
)
def test_what_trains(pair, train, lrs, included, excluded):
    student, _ = pair
    stage = make_stage(train=train, weight_decay=0.5)
    groups = choose_parameters(student, stage, [1, 2])
    assert {g.pattern: g.lr for g in groups} == lrs
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert included in trained
    assert excluded not in trained
    assert sorted(n for g in groups for n in g.names) == sorted(trained)
    optimizer = make_optimizer(student, groups, stage)
    for group in optimizer.param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] == 0.5) for p in group["params"])
    assert {g["lr"] for g in optimizer.param_groups} == set(lrs.values())


def test_wrong_stages_are_refused(pair):
    student, teacher = pair
    with pytest.raises(ConfigError, match=r"no parameter fits 'model\.layer\.1.*did you mean"):
        choose_parameters(student, make_stage(train=["model.layer.1.mixer.q_proj.weight"]), [1, 2])
    with pytest.raises(ConfigError, match="nothing to train"):
        choose_parameters(make_student(teacher, layers=()), make_stage(), [])
    with pytest.raises(ConfigError, match="needs a teacher"):
        check_stage(make_stage(), student, None)
    with pytest.raises(ConfigError, match=r"loss\.mixer: the student has 3 layers and the teacher 2"):
        check_stage(make_stage(kind="align"), student, make_teacher(layers=2))
    check_stage(make_stage(), student, make_teacher(layers=2))  # KL alone needs no layer to correspond
    assert converted_layers(student, make_teacher(layers=2)) == [1, 2]
    learned = make_teacher(positions="learned", max_position_embeddings=16)
    with pytest.raises(ConfigError, match="beyond the 16 positions"):
        check_stage(make_stage(), learned, learned)


def test_the_place_of_a_nan_is_found(pair, batch):
    student, teacher = pair
    objective = make_objective(student, teacher, make_stage())
    guide = objective.teach(batch)
    assert first_non_finite(objective, batch, guide) == "the gradient"
    handle = student.model.layers[1].ffn.act.register_forward_hook(lambda m, a, out: out * float("inf"))
    assert first_non_finite(objective, batch, guide) == "model.layers.1.ffn.act"
    handle.remove()
    with torch.no_grad():
        student.model.layers[2].mixer.q_proj.weight[0, 0] = float("nan")
    assert first_non_finite(objective, batch, guide) == "parameter model.layers.2.mixer.q_proj.weight"
