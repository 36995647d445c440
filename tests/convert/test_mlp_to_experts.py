"""MLPs to experts: upcycling changes nothing, all parts give the MLP, the fitted router beats a random one."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.config import ZooConfig
from zoo.convert.experts import balanced_assignment, balanced_split, fit_routers, moefy, upcycle
from zoo.errors import ConfigError, ConversionError
from zoo.models.heads import ZooForCausalLM, ZooForMaskedLM


def make(kind="gated_mlp", layers=2, seed=0, task=ZooForCausalLM, **ffn):
    torch.manual_seed(seed)
    causal = task is ZooForCausalLM
    layer = {
        "mixer": {"name": "attention", "num_heads": 2, "head_dim": 16, "causal": causal},
        "ffn": {"name": kind, "hidden_size": 96, **ffn},
    }
    config = ZooConfig(
        vocab_size=256, hidden_size=32, layers=[layer] * layers, initializer_range=0.2,
        task="causal-lm" if causal else "masked-lm",
    )  # fmt: skip
    model = task(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def grouped(layers=2):
    """A model whose neurons fire in eight groups, in a shuffled order: each group looks along one direction."""
    model = make("mlp", layers, activation="relu", bias=True)
    with torch.no_grad():
        for block in model.model.layers:
            directions = torch.linalg.qr(torch.randn(32, 8))[0].T.repeat_interleave(12, 0)
            order = torch.randperm(96)
            block.ffn.up_proj.weight.copy_((directions + 0.02 * torch.randn(96, 32))[order])
            block.ffn.up_proj.bias.fill_(-0.3)
    return model


IDS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(5))
FORMS = [("gated_mlp", {}), ("gated_mlp", {"bias": True}), ("mlp", {"activation": "gelu"}), ("mlp", {"bias": False})]


def close(got, expected, tolerance=1e-6):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("kind", "ffn"), FORMS)
@torch.no_grad()
def test_upcycling_changes_nothing(kind, ffn):
    teacher = make(kind, **ffn)
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    student = upcycle(teacher, num_experts=4, top_k=2, balance_loss=0.01)
    close(student(IDS).logits, teacher(IDS).logits)
    assert [layer["ffn"]["name"] for layer in student.config.layers] == ["moe", "moe"]
    assert student.config.origin["lineage"][-1] == {"step": "upcycle", "layers": {"0": "moe", "1": "moe"}}
    moe = student.model.layers[0].ffn
    assert moe.router.weight.std().item() == pytest.approx(0.02, rel=0.2)
    student.model.layers[0].ffn.experts.up_EIO.zero_()  # no memory is shared
    assert all(torch.equal(p, before[n]) for n, p in teacher.named_parameters())


def test_upcycled_experts_part_when_they_train_and_start_apart_with_noise(tmp_path):
    teacher = make()
    student = upcycle(teacher, [1], num_experts=4, top_k=1).train()
    assert [layer["ffn"]["name"] for layer in student.config.layers] == ["gated_mlp", "moe"]
    student(IDS, labels=IDS).loss.backward()
    gradient = student.model.layers[1].ffn.experts.up_EIO.grad
    assert not torch.equal(gradient[0], gradient[1])
    noisy = upcycle(teacher, num_experts=4, top_k=2, noise=0.1).eval()
    for block, old in zip(noisy.model.layers, teacher.model.layers, strict=True):
        change = block.ffn.experts.gate_EIO - old.ffn.gate_proj.weight.T
        assert change.std().item() == pytest.approx(0.1 * old.ffn.gate_proj.weight.std().item(), rel=0.05)
    noisy.save_pretrained(tmp_path)
    again = zoo.create_model(str(tmp_path)).eval()
    close(again(IDS).logits, noisy(IDS).logits)


@pytest.mark.parametrize(("kind", "ffn"), FORMS)
@torch.no_grad()
def test_all_parts_are_the_mlp(kind, ffn):
    teacher = make(kind, **ffn)
    student = moefy(teacher, IDS, num_experts=8, top_k=8)
    close(student(IDS).logits, teacher(IDS).logits)
    for block, old in zip(student.model.layers, teacher.model.layers, strict=True):
        x_BLD = torch.randn(2, 5, 32)
        close(block.ffn(x_BLD)[0], old.ffn(x_BLD))
    fewer = moefy(teacher, IDS, num_experts=8, top_k=2)
    expected, got = (sum(p.numel() for p in m.parameters()) for m in (teacher, fewer))
    routers, biases = 2 * (32 * 8 + 8), 2 * 7 * 32 * bool(old.ffn.config.bias)
    assert got == expected + routers + biases
    assert fewer.model.layers[0].ffn.flops_per_token < 0.4 * sum(2 * p.numel() for p in old.ffn.parameters())


@torch.no_grad()
def ffn_error(student, teacher, ids_BL):
    """Squared error of each converted channel mixer on the teacher's own inputs, relative; the mean over layers."""
    errors = []
    for i, block in enumerate(teacher.model.layers):
        seen = []
        handle = block.ffn.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0], out)))
        teacher(ids_BL)
        handle.remove()
        x_BLD, y_BLD = seen[0]
        errors.append((student.model.layers[i].ffn(x_BLD)[0] - y_BLD).square().sum() / y_BLD.square().sum())
    return float(sum(errors) / len(errors))


@pytest.mark.parametrize(("make_teacher", "share"), [(grouped, 0.25), (make, 0.85)])
@torch.no_grad()
def test_the_fitted_router_beats_a_random_one(make_teacher, share):
    teacher = make_teacher()
    fit = torch.randint(0, 256, (24, 32), generator=torch.Generator().manual_seed(6))
    student = moefy(teacher, fit, num_experts=8, top_k=4)
    fitted = ffn_error(student, teacher, IDS)
    for block in student.model.layers:
        block.ffn.router.weight.normal_()
        block.ffn.router.bias.zero_()
    chance = ffn_error(student, teacher, IDS)
    assert fitted < share * chance


@torch.no_grad()
def test_neurons_that_fire_together_come_together():
    teacher = grouped(1)
    student = moefy(teacher, IDS, num_experts=8, top_k=2)
    up_EIO = student.model.layers[0].ffn.experts.up_EIO
    for weight_DF in up_EIO:
        directions = torch.nn.functional.normalize(weight_DF, dim=0)
        assert (directions.T @ directions).min() > 0.9


def test_the_router_is_the_ridge_regression():
    teacher, split = make(layers=1), torch.arange(96).view(8, 12)
    seen = []
    teacher.model.layers[0].ffn.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1).double()))
    weight_ED, bias_E = fit_routers(teacher, {0: split}, IDS, 0.1)[0]
    x_TD, ffn = torch.cat(seen), teacher.model.layers[0].ffn.double()
    mass_TF = (ffn.act(ffn.gate_proj(x_TD)) * ffn.up_proj(x_TD)).abs() * ffn.down_proj.weight.norm(dim=0)
    mass_TE = mass_TF.unflatten(-1, (8, 12)).sum(-1)
    lift = 0.1 * x_TD.var(0, correction=0).mean()
    weight, bias = weight_ED.clone().requires_grad_(), bias_E.clone().requires_grad_()
    loss = (x_TD @ weight.T + bias - mass_TE).square().sum(1).mean() + lift * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-4 * loss.item()


def test_splits_are_even_and_no_pair_wants_to_swap():
    rows = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
    split = balanced_split(rows, 8)
    assert split.shape == (8, 12)
    assert split.flatten().sort().values.tolist() == list(range(96))
    cost = torch.rand(24, 3, generator=torch.Generator().manual_seed(1))
    found = balanced_assignment(cost)
    total = sum(cost[found[e], e].sum() for e in range(3))
    chance = cost.view(3, 8, 3).diagonal(dim1=0, dim2=2).sum()
    assert total < 0.6 * chance

    def spread(parts):
        return sum((rows[p] - rows[p].mean(0)).square().sum() for p in parts)

    assert spread(split) < 0.75 * spread(torch.arange(96).view(8, 12))


@torch.no_grad()
def test_encoders():
    teacher = make("mlp", task=ZooForMaskedLM)
    for student in (upcycle(teacher, num_experts=3, top_k=2), moefy(teacher, IDS, num_experts=4, top_k=4)):
        assert type(student) is ZooForMaskedLM
        close(student(IDS).logits, teacher(IDS).logits)


def test_what_cannot_be_converted():
    teacher = make()
    with pytest.raises(ConversionError, match=r"layer 0: 96 neurons are not 10 equal parts; nearest is (8|12)"):
        moefy(teacher, IDS, num_experts=10)
    with pytest.raises(ConversionError, match="layer 2 does not exist; the teacher has layers 0 to 1"):
        upcycle(teacher, [2])
    student = upcycle(teacher, [0], num_experts=2)
    with pytest.raises(ConversionError, match="layer 0: its channel mixer is moe; only gated_mlp and mlp"):
        upcycle(student, [0])
    with pytest.raises(ConversionError, match="no layer of this model has a dense MLP"):
        upcycle(upcycle(student))
    with pytest.raises(ConfigError, match=r"layers.0.ffn.balanced: unknown key"):
        upcycle(teacher, balanced=1)
    with pytest.raises(ConversionError, match="token id 300 is outside"):
        moefy(teacher, torch.full((1, 4), 300))
