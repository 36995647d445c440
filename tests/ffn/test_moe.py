"""Mixtures of experts: against a plain loop, the laws of a mixer, capacity, expert choice, balance of the load."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import zoo
from zoo.errors import ConfigError, TraitError
from zoo.ffn.moe import MoE, MoEConfig
from zoo.ffn.routing import balance_loss, capacity_of, chosen, z_loss

B, L, D, E = 3, 23, 12, 8
BASE = {"num_experts": E, "hidden_size": 10, "top_k": 3}
VARIANTS = {
    "mixtral": {},
    "olmoe": {"normalize": False, "scale": 1.7},
    "qwen2": {"normalize": False, "shared_size": 14, "shared_gate": True},
    "deepseek_v3": {"scores": "sigmoid", "groups": 4, "top_groups": 2, "bias_rate": 0.1, "shared_size": 9},
    "biased": {"gated": False, "activation": "gelu", "bias": True, "router_bias": True},
    "capacity": {"capacity": 4},
    "one": {"scores": "one"},
    "expert_choice": {"chooser": "experts"},
    "by_choice": {"capacity": 4, "priority": "choice"},
    "by_score": {"capacity": 4, "priority": "score", "normalize": False},
}
WHOLE = ("expert_choice", "by_choice", "by_score")  # who looks at the whole sequence
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def make(name, **options):
    moe = MoE(MoEConfig(**{**BASE, **VARIANTS[name], **options}), D).double()
    with torch.no_grad():
        for t in moe.state_dict().values():
            t.add_(0.6 * torch.randn_like(t))
    return moe.eval()


def inputs():
    return torch.randn(B, L, D, dtype=torch.double)


def expert(moe, e, x):
    """One expert by itself."""
    w = moe.experts
    bias = [0 if (b := getattr(w, f"{n}_bias_EO", None)) is None else b[e] for n in ("up", "down")]
    h = x @ w.up_EIO[e] + bias[0]
    h = w.act(x @ w.gate_EIO[e]) * h if w.gated else w.act(h)
    return h @ w.down_EIO[e] + bias[1]


def token_choice(moe, x_LD):
    """One sequence token by token, as it is written in the papers."""
    c, taken, out = moe.config, [0] * E, []
    for x in x_LD:
        logits = moe.router(x)
        scores = {"softmax": logits.softmax(0), "sigmoid": logits.sigmoid(), "one": logits}[c.scores]
        wish = scores + (moe.balance_E if c.bias_rate else 0)
        allowed = list(range(E))
        if c.groups > 1:
            size = E // c.groups
            value = [sorted(wish[g * size : (g + 1) * size].tolist())[-2:] for g in range(c.groups)]
            best = sorted(range(c.groups), key=lambda g: -sum(value[g]))[: c.top_groups]
            allowed = [e for e in allowed if e // size in best]
        chosen = sorted(allowed, key=lambda e: -wish[e].item())[: c.top_k]
        total = sum(scores[e] for e in chosen)
        y = torch.zeros_like(x)
        for e in chosen:
            taken[e] += 1
            if c.capacity is None or taken[e] <= c.capacity:
                weight = 1.0 if c.scores == "one" else scores[e] / (total if c.normalize else 1)
                y = y + weight * c.scale * expert(moe, e, x)
        if c.shared_size:
            y = y + moe.shared(x) * (moe.shared_gate(x).sigmoid() if c.shared_gate else 1)
        out.append(y)
    return torch.stack(out)


def ranked_choice(moe, x_LD):
    """One sequence, all first choices before the second ones; tokens in their order or that of their highest score."""
    scores_LE = moe.router(x_LD).softmax(-1)
    best_LK = scores_LE.topk(moe.config.top_k).indices
    order = range(len(x_LD))
    if moe.config.priority == "score":
        order = sorted(order, key=lambda t: -scores_LE[t].max().item())
    y, taken = torch.zeros_like(x_LD), [0] * E
    for k in range(moe.config.top_k):
        for t in order:
            e = best_LK[t, k].item()
            taken[e] += 1
            if taken[e] <= moe.config.capacity:
                weight = scores_LE[t, e] / (scores_LE[t, best_LK[t]].sum() if moe.config.normalize else 1)
                y[t] = y[t] + weight * expert(moe, e, x_LD[t])
    return y


def expert_choice(moe, x_LD):
    scores_LE = moe.router(x_LD).softmax(-1)
    y = torch.zeros_like(x_LD)
    for e in range(E):
        for t in scores_LE[:, e].topk(-(-moe.config.top_k * len(x_LD) // E)).indices:
            y[t] = y[t] + scores_LE[t, e] * expert(moe, e, x_LD[t])
    return y


@pytest.mark.parametrize("name", VARIANTS)
def test_is_the_sum_over_the_chosen_experts(name):
    moe, x_BLD = make(name), inputs()[:2, :13].clone()
    leaves = [x_BLD.requires_grad_(), *moe.parameters()]
    plain = {"expert_choice": expert_choice, "by_choice": ranked_choice, "by_score": ranked_choice}.get(
        name, token_choice
    )
    got, expected = moe(x_BLD)[0], torch.stack([plain(moe, x) for x in x_BLD])
    torch.testing.assert_close(got, expected, **CLOSE)
    rows = torch.randn_like(got)
    grads = [torch.autograd.grad((y * rows).sum(), leaves, allow_unused=True) for y in (got, expected)]
    for a, b in zip(*grads, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(*(zero if g is None or not g.any() else g for g in (a, b)), **CLOSE)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in WHOLE])
@torch.no_grad()
def test_splitting_with_the_state_changes_nothing(name):
    moe, x_BLD = make(name), inputs()
    mask_BL = torch.rand(B, L) > 0.3
    expected = moe(x_BLD, mask_BL=mask_BL)[0]
    state, parts, start = moe.init_state(B), [], 0
    for size in (1, 1, 9, 1, 11):
        stop = start + size
        y, state = moe(x_BLD[:, start:stop], mask_BL=mask_BL[:, start:stop], state=state)
        parts.append(y)
        start = stop
    assert state.length == L
    torch.testing.assert_close(torch.cat(parts, 1)[mask_BL], expected[mask_BL], **CLOSE)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*VARIANTS, "capacity_factor"])
@torch.no_grad()
def test_padding_and_packing_change_nothing(name, training):
    moe = make("olmoe", capacity_factor=1.1) if name == "capacity_factor" else make(name)
    moe, x_BLD = moe.train(training), inputs()
    mask_BL = torch.rand(B, L) > 0.3
    got = moe(x_BLD.masked_fill(~mask_BL[..., None], torch.nan), mask_BL=mask_BL)[0]
    for row in range(B):
        alone = moe(x_BLD[row : row + 1, mask_BL[row]])[0][0]
        torch.testing.assert_close(got[row, mask_BL[row]], alone, **CLOSE)
    segments_BL = torch.tensor([[4] * 9 + [1] * 13 + [4], [0] * L, [7, 8] + [9] * (L - 2)])
    for mask in (None, mask_BL):
        got = moe(x_BLD, mask_BL=mask, segments_BL=segments_BL)[0]
        real_BL = torch.ones_like(mask_BL) if mask is None else mask
        for row, start, stop in ((0, 0, 9), (0, 9, 22), (0, 22, 23), (1, 0, 23), (2, 0, 1), (2, 1, 2), (2, 2, 23)):
            keep = real_BL[row, start:stop]
            if keep.any():
                alone = moe(x_BLD[row : row + 1, start:stop][:, keep])[0][0]
                torch.testing.assert_close(got[row, start:stop][keep], alone, **CLOSE)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_no_output_depends_on_a_later_token(name):
    moe, x_BLD = make(name), inputs()
    changed = x_BLD.clone()
    changed[:, 13:] = torch.randn(B, L - 13, D).double()
    same = torch.allclose(moe(x_BLD)[0][:, :13], moe(changed)[0][:, :13], rtol=1e-10, atol=1e-10)
    assert same == moe.causal == (name not in WHOLE)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2"])
def test_router_and_shared_expert_are_called_as_modules(name):
    moe, called = make(name), []
    for key, module in moe.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, key=key: called.append(key))
    moe(inputs())
    gates = ["shared_gate"] * moe.config.shared_gate
    assert sorted(called) == sorted(["router", "shared.gate_proj", "shared.up_proj", "shared.down_proj", *gates])


def test_capacity_is_of_each_sequence_and_drops_the_last():
    moe = make("mixtral", top_k=1, normalize=False, capacity_factor=1.0).train()
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2, 0] = 1.0
    x_BLD = inputs()
    x_BLD[..., 0] = 5.0  # all want expert 2, which has ceil(23 / 8) = 3 places in each sequence
    y_BLD = moe(x_BLD)[0]
    assert y_BLD[:, :3].abs().amin(1).amin() > 0
    assert not y_BLD[:, 3:].any()
    assert moe.eval()(x_BLD)[0].abs().amax(-1).amin() > 0  # in evaluation nothing is dropped
    assert capacity_of(1.2, 1, 4, torch.tensor([10, 11])).tolist() == [3, 4]


def test_expert_choice_is_even_and_looks_at_the_whole_sequence():
    moe, x_BLD = make("expert_choice", top_k=2), torch.randn(2, 24, D).double()
    pairs, _ = moe._route(moe.logits(x_BLD), None, None, None)
    for row in range(2):
        mine = pairs.expert_P[pairs.token_P // 24 == row]
        assert mine.bincount(minlength=E).tolist() == [6] * E
    with pytest.raises(TraitError, match="chooser: experts looks at a whole sequence"):
        moe(x_BLD, state=moe.init_state(2))
    layers = {"ffn": {"chooser": "experts", "balance_loss": 0.0}}
    with pytest.raises(TraitError, match="a causal LM needs causal layers"):
        zoo.create_model("mixtral-tiny", layers=layers)
    with pytest.raises(TraitError, match=r"layers.0.ffn looks at the whole sequence \(chooser: experts\)"):
        zoo.create_model("mixtral-tiny", layers=layers)
    ranked = {"ffns": {"moe": {"capacity": 8, "capacity_factor": None}}}
    with pytest.raises(TraitError, match=r"layers.1.ffn looks at the whole sequence \(priority: choice\)"):
        zoo.create_model("gshard-tiny", layers=ranked)
    layers["defaults"] = {"causal": False}
    encoder = zoo.create_model("mixtral-tiny", layers=layers, task="masked-lm")
    out = encoder(torch.ones(1, 9, dtype=torch.long), labels=torch.ones(1, 9, dtype=torch.long))
    out.loss.backward()
    assert encoder.model.layers[0].ffn.router.weight.grad.any()


def test_the_second_expert_is_kept_with_twice_its_weight(monkeypatch):
    """In training only; and one that is dropped takes no place."""
    moe, x_BLD = make("mixtral", top_k=2, random_second=True), torch.randn(1, 4000, D).double()
    pairs = [moe.train(training)._route(moe.logits(x_BLD), None, None, None)[0] for training in (False, True)]
    weight, kept = pairs[0].weight_P.view(-1, 2), (pairs[1].expert_P < E).view(-1, 2)
    assert kept[:, 0].all()
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.5)):
        among = (weight[:, 1] > low) & (weight[:, 1] <= high)
        assert kept[among, 1].double().mean().item() == pytest.approx(2 * weight[among, 1].mean().item(), abs=0.06)
    moe = make("mixtral", top_k=2, random_second=True, capacity_factor=0.75, priority="choice").train()
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)  # drops all second choices
    pairs = moe._route(moe.logits(x_BLD), None, None, None)[0]
    first = pairs.expert_P.view(-1, 2)[:, 0]
    wanted = moe.logits(x_BLD)[0].argmax(-1).bincount(minlength=E).clamp(max=750)
    assert first.bincount(minlength=E + 1)[:E].tolist() == wanted.tolist()
    assert (pairs.expert_P.view(-1, 2)[:, 1] == E).all()


# --- Losses and load -----------------------------------------------------------------------------------------------


def test_losses_do_not_count_padding():
    moe = make("mixtral", balance_loss=0.3, z_loss=0.1).train()
    x_BLD, mask_BL = inputs(), torch.rand(B, L) > 0.4
    moe(x_BLD.masked_fill(~mask_BL[..., None], torch.nan), mask_BL=mask_BL)
    padded = moe.auxiliary_loss
    moe(x_BLD[mask_BL][None])
    torch.testing.assert_close(padded, moe.auxiliary_loss, **CLOSE)
    padded.backward()
    assert moe.router.weight.grad.any()
    moe.eval()(x_BLD)
    assert moe.auxiliary_loss is None


def test_losses_by_hand():
    p_BLE = torch.tensor([[[0.5, 0.5, 0, 0], [0.7, 0.1, 0.1, 0.1]]])
    chosen_BLE = chosen(torch.tensor([[[0, 1], [0, 2]]]), 4, None)
    # f = (1, 1/2, 1/2, 0), P = (.6, .3, .05, .05), E = 4
    assert balance_loss(p_BLE, chosen_BLE, None).item() == pytest.approx(4 * (0.6 + 0.15 + 0.025))
    even = torch.full((1, 4, 4), 0.25)
    assert balance_loss(even, chosen(torch.arange(4).view(1, 4, 1), 4, None), None).item() == pytest.approx(1.0)
    mask = torch.tensor([[True, False]])
    assert balance_loss(p_BLE, chosen_BLE & mask[..., None], mask).item() == pytest.approx(4 * (0.5 + 0.5))
    logits = torch.tensor([[[0.0, 0.0], [3.0, 3.0]]])
    assert z_loss(logits, mask).item() == pytest.approx(0.6931472**2)


def test_loss_of_a_model_includes_the_auxiliary_loss():
    model = zoo.create_model("olmoe-tiny").train()
    ids_BL = torch.randint(1, 256, (2, 17))
    out = model(ids_BL, labels=ids_BL)
    plain = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten())
    parts = [block.ffn.auxiliary_loss for block in model.model.layers]
    assert all(part > 0 for part in parts)
    torch.testing.assert_close(out.loss, plain + sum(parts))
    torch.testing.assert_close(model.eval()(ids_BL, labels=ids_BL).loss, plain)
    assert model.model.auxiliary_loss() is None


def test_a_model_can_be_copied_after_a_step():
    model = zoo.create_model("mixtral-tiny").train()
    ids_BL = torch.randint(1, 256, (2, 5))
    model(ids_BL, labels=ids_BL)
    assert copy.deepcopy(model).model.layers[0].ffn.auxiliary_loss is None
    assert pickle.loads(pickle.dumps(model.model.layers[0].ffn)).auxiliary_loss is None
    assert model.model.layers[0].ffn.auxiliary_loss is not None


def test_the_bias_evens_the_load_without_a_loss():
    torch.manual_seed(2)
    moe = MoE(MoEConfig(**BASE, scores="sigmoid", bias_rate=0.02), D).train()
    with torch.no_grad():
        moe.router.weight.copy_(0.3 * torch.randn(E, D))
    generator, loads = torch.Generator().manual_seed(0), []
    for _ in range(80):
        moe(1.0 + torch.randn(4, 32, D, generator=generator))
        loads.append(moe._load_E.float())
        before = moe.balance_E.clone()
        moe.after_step()
        step = moe.balance_E - before
        assert torch.equal(step.sign(), (loads[-1].mean() - loads[-1]).sign())
        assert step.abs().max().item() == pytest.approx(0.02)
    assert moe.auxiliary_loss is None
    worst = [(load / load.mean()).max().item() for load in loads]
    assert worst[0] > 2.0
    assert sum(worst[-10:]) / 10 < 1.35


def test_the_bias_chooses_but_does_not_weigh():
    moe, x_BLD = make("deepseek_v3", groups=1, top_groups=1, shared_size=None, top_k=E), inputs()
    expected = moe(x_BLD)[0]
    moe.balance_E.normal_(std=10.0)
    torch.testing.assert_close(moe(x_BLD)[0], expected, **CLOSE)


def test_the_bias_is_saved_stays_float32_and_counts_real_tokens_only(tmp_path):
    model = zoo.create_model("deepseek-v3-tiny").train()
    ids_BL, mask_BL = torch.randint(1, 256, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask_BL[0, :4] = 0
    model(ids_BL, attention_mask=mask_BL)
    moe = model.model.layers[1].ffn
    assert moe._load_E.sum() == 14 * moe.config.top_k
    model.model.after_step()
    assert moe._load_E is None
    assert moe.balance_E.abs().max().item() == pytest.approx(0.001)
    model.save_pretrained(tmp_path)
    again = zoo.create_model(str(tmp_path), dtype=torch.bfloat16)
    assert torch.equal(again.model.layers[1].ffn.balance_E, moe.balance_E)
    assert again.model.layers[1].ffn.balance_E.dtype == torch.float32
    model.to(torch.bfloat16)
    model(ids_BL)
    model.model.after_step()
    assert moe.balance_E.dtype == torch.float32
    for p in model.parameters():
        p.requires_grad_(False)
    model(ids_BL)
    assert moe._load_E is None  # a layer that does not train keeps its bias


@pytest.mark.parametrize("name", ["mixtral-tiny", "deepseek-v3-tiny", "switch-tiny"])
def test_gradient_checkpointing_routes_the_same_again(name):
    ids_BL, results = torch.randint(1, 256, (2, 21)), []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = zoo.create_model(name, initializer_range=0.2).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        for _ in range(2):  # the second step with a bias that has moved
            torch.manual_seed(5)
            loss = model(ids_BL, labels=ids_BL).loss
            loss.backward()
            model.model.after_step()
        results.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
        results[-1] |= dict(model.named_buffers())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-10, atol=1e-12)


# --- Sizes, initialisation, options --------------------------------------------------------------------------------

SIZES = {  # billions: in all, and those that one token meets (model cards, and the papers in the YAMLs)
    "mixtral-8x7b": (46.7, 12.9), "mixtral-8x22b": (140.6, 39.1), "olmoe-1b-7b": (6.92, 1.28),
    "qwen2-moe-a2.7b": (14.3, 2.7), "deepseek-moe-16b": (16.4, 2.8), "deepseek-v3-671b": (671, 37),
    "expert-choice-64e-143b": (143, 9.8),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_parameters_in_all_and_active_are_the_published(name):
    from zoo.cli.show import describe

    info = describe(name)
    assert info["parameters"] / 1e9 == pytest.approx(SIZES[name][0], rel=0.005)
    assert info["active_parameters"] / 1e9 == pytest.approx(SIZES[name][1], rel=0.02)
    # what a token meets are matrix products, but for its row of the embedding; the map of attention is small at 512
    assert info["flops_per_token"]["512"] / 2e9 == pytest.approx(SIZES[name][1], rel=0.13)


@pytest.mark.parametrize(("name", "total"), [("16e-548m", 0.548), ("64e-1.9b", 1.9), ("128e-3.7b", 3.7)])
def test_parameters_of_expert_choice_are_the_published(name, total):
    from zoo.cli.show import describe

    assert describe(f"expert-choice-{name}")["parameters"] / 1e9 == pytest.approx(total, rel=0.006)


def test_switch_starts_with_small_cut_normals():
    model = zoo.create_model("switch-tiny", hidden_size=256)
    moe = model.model.layers[1].ffn
    for weight, fan_in in ((moe.router.weight, 256), (moe.experts.up_EIO, 256), (moe.experts.down_EIO, 128)):
        std = (0.1 / fan_in) ** 0.5
        assert weight.abs().max().item() <= 2 * std
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.05)  # of a normal cut at two deviations
    for name, std in (("mixtral-tiny", 0.02), ("deepseek-moe-tiny", 0.006)):
        experts = zoo.create_model(name).model.layers[1].ffn.experts
        for weight in experts.parameters():
            assert weight.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, r"top_k \(9\) is more than num_experts \(8\)"),
        ({"groups": 3}, r"num_experts \(8\) is not a multiple of groups \(3\)"),
        ({"groups": 4, "top_groups": 1}, r"top_k \(3\) experts out of top_groups \(1\) of groups \(4\) with 2 each"),
        ({"shared_gate": True}, "shared_gate without shared_size"),
        ({"capacity": 2, "capacity_factor": 1.5}, r"capacity \(2\) and capacity_factor \(1.5\) exclude each other"),
        ({"chooser": "experts", "balance_loss": 0.1}, "balance_loss has no meaning with chooser: experts"),
        ({"priority": "score"}, r"priority \('score'\) without capacity or capacity_factor"),
        ({"random_second": True}, "random_second needs top_k 2"),
        ({"chooser": "experts", "top_k": 2, "random_second": True}, "random_second has no meaning with chooser"),
        ({"activation": "sillu"}, "unknown activation 'sillu'; did you mean 'silu'"),
        ({"experts": 4}, "experts: unknown key; did you mean 'num_experts'"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig.parse({**BASE, **options})


def test_patterns_of_channel_mixers():
    layers = zoo.create_model("deepseek-moe-tiny", layers={"num_hidden_layers": 3}).config.layers
    assert [layer["ffn"]["name"] for layer in layers] == ["gated_mlp", "moe", "moe"]
    with pytest.raises(ConfigError, match=r"layers.ffns.mo: not in the pattern; did you mean 'moe'"):
        zoo.create_model("deepseek-moe-tiny", layers={"ffns": {"mo": {}}})
    with pytest.raises(ConfigError, match=r"layers.ffns: ffn_pattern and ffns go together"):
        zoo.create_model("deepseek-moe-tiny", layers={"ffn": {"name": "moe"}})
    with pytest.raises(ConfigError, match=r"layers.ffns: ffn_pattern and ffns go together"):
        zoo.create_model("mixtral-tiny", layers={"ffns": {"moe": {}}})
    with pytest.raises(ConfigError, match=r"layers.ffn_pattern: cannot read 'moe@a'"):
        zoo.create_model("deepseek-moe-tiny", layers={"ffn_pattern": "gated_mlp moe@a"})
    with pytest.raises(ConfigError, match=r"layers.ffn_pattern: cannot read 'moe\*x'"):
        zoo.create_model("deepseek-moe-tiny", layers={"ffn_pattern": "moe*x"})
