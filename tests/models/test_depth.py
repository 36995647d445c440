"""Blocks that only some tokens take: the formula, the dense block as a case, a causal choice, work that is saved."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.config import ModelSpec
from zoo.errors import ConfigError
from zoo.models.backbone import Block, make_block
from zoo.models.depth import RoutedBlock, add_routers, largest_share, routed_blocks
from zoo.models.heads import ZooForCausalLM

ATTENTION = {"name": "attention", "num_heads": 2, "head_dim": 8, "rotary": {}}
MAMBA = {"name": "mamba2", "num_heads": 2, "num_groups": 1, "head_dim": 8, "value_head_dim": 16}
FFN = {"name": "gated_mlp", "hidden_size": 24}
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def block_of(mixer=ATTENTION, order="pre_norm", **depth):
    torch.manual_seed(0)
    spec = ModelSpec.parse(
        {"hidden_size": 16, "block": order, "layers": [{"mixer": mixer, "ffn": FFN, "depth": depth}]}
    )
    block = make_block(spec, spec.layers[0]).double().eval()
    assert isinstance(block, RoutedBlock)
    return block


def model_of(pattern="attention", **depth):
    torch.manual_seed(0)
    mixers = {n: {k: v for k, v in o.items() if k != "name"} for n, o in (("attention", ATTENTION), ("mamba2", MAMBA))}
    layers = {"pattern": pattern, "num_hidden_layers": 4, "ffn": FFN, "depth": depth}
    layers["mixers"] = {name: mixers[name] for name in pattern.split()}
    config = zoo.ZooConfig(hidden_size=16, vocab_size=64, layers=layers, initializer_range=0.2)
    return ZooForCausalLM(config).double().eval()


def x_of(B=2, L=23):
    return torch.randn(B, L, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("mixer", [ATTENTION, MAMBA], ids=["attention", "mamba2"])
def test_the_formula(mixer):
    block, x_BLD = block_of(mixer, capacity=0.3), x_of()
    block.select = "top"
    y_BLD, _ = block(x_BLD, None, None, None)
    k = math.ceil(0.3 * 23)
    for b, row_LD in enumerate(x_BLD):
        r_L = row_LD @ block.router.weight[0]
        chosen = sorted(r_L.argsort(descending=True)[:k].tolist())
        f_1CD = Block.forward(block, row_LD[None, chosen], None, None, None)[0] - row_LD[None, chosen]
        expected_LD = row_LD.clone()
        for place, t in enumerate(chosen):
            expected_LD[t] += r_L[t] * f_1CD[0, place]
        torch.testing.assert_close(y_BLD[b], expected_LD, **CLOSE)
        assert block.chosen_BL[b].nonzero()[:, 0].tolist() == chosen


@pytest.mark.parametrize("order", ["pre_norm", "parallel"])
def test_the_dense_block_is_the_case_of_all_tokens_with_weight_one(order):
    block, x_BLD = block_of(order=order, capacity=1.0, bias=True, predictor=None), x_of()
    with torch.no_grad():
        block.router.weight.zero_()
        block.router.bias.fill_(1.0)
    expected, _ = Block.forward(block, x_BLD, None, None, None)
    for block.training in (True, False):
        torch.testing.assert_close(block(x_BLD, None, None, None)[0], expected, **CLOSE)
        assert block.chosen_BL.all()


def test_the_share_of_each_sequence():
    generator = torch.Generator().manual_seed(0)
    score_BL = torch.randn(3, 40, generator=generator)
    score_BL[0, 5:9] = 0.5  # ties go to the earlier
    mask_BL = torch.rand(3, 40, generator=generator) > 0.3
    segments_BL = torch.tensor([[0] * 7 + [1] * 1 + [0] * 20 + [2] * 12, [3] * 40, [0] * 39 + [1]])
    for capacity in (0.1, 0.5, 1.0):
        chosen_BL = largest_share(score_BL, capacity, mask_BL, segments_BL)
        expected_BL = torch.zeros_like(mask_BL)
        for b in range(3):
            ids, start = segments_BL[b].tolist(), 0
            real = [t for t in range(40) if mask_BL[b, t]]
            runs: list[list[int]] = []
            for t in real:
                if not runs or ids[runs[-1][-1]] != ids[t]:
                    runs.append([])
                runs[-1].append(t)
            for run in runs:
                best = sorted(run, key=lambda t: (-score_BL[b, t].item(), t))
                expected_BL[b, best[: math.ceil(capacity * len(run) - 1e-6)]] = True
            assert start == 0
        assert torch.equal(chosen_BL, expected_BL)
    assert largest_share(score_BL, 0.125, None, None).sum(1).tolist() == [5, 5, 5]


@pytest.mark.parametrize("mixer", [ATTENTION, MAMBA], ids=["attention", "mamba2"])
def test_padding_and_packing_in_training(mixer):
    block, x_BLD = block_of(mixer, capacity=0.4).train(), x_of(1, 20)
    segments_BL = torch.tensor([[4] * 8 + [7] * 12])
    packed, _ = block(x_BLD, None, segments_BL, None)
    apart = [block(part, None, None, None)[0] for part in x_BLD.split([8, 12], 1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), **CLOSE)
    mask_BL = torch.ones(1, 25, dtype=torch.bool)
    mask_BL[0, [0, 1, 7, 15, 24]] = False
    padded_BLD = torch.full((1, 25, 16), torch.nan, dtype=torch.double)
    padded_BLD[mask_BL] = x_BLD[0]
    out, _ = block(padded_BLD, mask_BL, None, None)
    torch.testing.assert_close(out[mask_BL], block(x_BLD, None, None, None)[0][0], **CLOSE)


@pytest.mark.parametrize("pattern", ["attention", "attention mamba2"])
def test_decoding_is_one_pass(pattern):
    model = model_of(pattern, capacity=0.5)
    ids_BL = torch.randint(1, 64, (2, 17), generator=torch.Generator().manual_seed(2))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, :4] = 0
    expected = model(ids_BL, attention_mask=mask_BL, use_cache=False).logits
    taken = [block.chosen_BL.float().mean().item() for block in routed_blocks(model)]
    assert all(0 < share < 1 for share in taken)
    out = model(ids_BL[:, :6], attention_mask=mask_BL[:, :6])
    pieces, cache = [out.logits], out.past_key_values
    for t in range(6, 17):
        out = model(ids_BL[:, t : t + 1], attention_mask=mask_BL[:, : t + 1], past_key_values=cache)
        pieces.append(out.logits)
    assert cache.get_seq_length(1) == 17
    real = mask_BL.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], expected[real], **CLOSE)


def test_work_is_done_for_the_chosen_alone():
    model, lengths = model_of(capacity=0.25), []
    assert [type(block) for block in model.model.layers] == [Block, RoutedBlock] * 2
    for block in routed_blocks(model):
        block.mixer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    ids_BL = torch.randint(1, 64, (2, 16))
    model.train()(ids_BL, labels=ids_BL)
    assert lengths == [4, 4]
    for block in routed_blocks(model.eval()):
        block.predictor[-1].bias.data.fill_(-1e4)  # nobody
    out = model(ids_BL)
    assert lengths == [4, 4]
    assert out.past_key_values.get_seq_length(1) == 16
    passed = model.model.layers[2](
        model.model.layers[0](model.model.embed_tokens(ids_BL), None, None, None)[0], None, None, None
    )
    torch.testing.assert_close(out.logits, model.lm_head(model.model.norm(passed[0])), **CLOSE)


@pytest.mark.parametrize("predictor", [8, None])
def test_the_predictor_learns_the_choice_and_disturbs_nothing(predictor):
    block, x_BLD = (
        block_of(capacity=0.25, predictor=predictor, loss_weight=0.5, bias=predictor is None).train(),
        x_of(4, 24).requires_grad_(),
    )
    block(x_BLD, None, None, None)
    said_BL = block.router(x_BLD)[..., 0] if predictor is None else block.predictor(x_BLD)[..., 0]
    top_BL = largest_share(block.router(x_BLD)[..., 0], 0.25, None, None)
    expected = 0.5 * F.binary_cross_entropy_with_logits(said_BL, top_BL.double())
    torch.testing.assert_close(block.auxiliary_loss, expected, **CLOSE)
    gradients = torch.autograd.grad(block.auxiliary_loss, [x_BLD, block.router.weight], allow_unused=True)
    assert all((g is not None and g.abs().max() > 0) == (predictor is None) for g in gradients)
    optimizer = torch.optim.Adam(block.parameters() if predictor is None else block.predictor.parameters(), lr=0.03)
    for _ in range(60):
        block(x_BLD.detach(), None, None, None)
        block.auxiliary_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    top_BL = block.chosen_BL
    block.eval()(x_BLD, None, None, None)
    assert (block.chosen_BL == top_BL).double().mean() > 0.95
    assert block.auxiliary_loss is None


def test_the_loss_of_a_model_has_the_predictors(tmp_path):
    model = model_of(capacity=0.5).train()
    ids_BL = torch.randint(1, 64, (2, 16))
    out = model(ids_BL, labels=ids_BL)
    parts = [block.auxiliary_loss for block in routed_blocks(model)]
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten())
    torch.testing.assert_close(out.loss.double(), plain + sum(parts), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = zoo.create_model(str(tmp_path), dtype=torch.float64).eval()
    assert again.config.layers == model.config.layers
    torch.testing.assert_close(again(ids_BL).logits, model.eval()(ids_BL).logits, **CLOSE)


def test_a_shared_block_learns_from_each_run():
    layers = [{"mixer": ATTENTION, "ffn": FFN, "depth": {"capacity": 0.5}}, {"same_as": 0}]
    torch.manual_seed(0)
    model = ZooForCausalLM(zoo.ZooConfig(hidden_size=16, vocab_size=64, layers=layers)).double()
    own = zoo.models.unshare(model)
    ids_BL = torch.randint(1, 64, (2, 16))
    for one in (model, own):
        one.train()(ids_BL, labels=ids_BL)
    assert len(routed_blocks(own)) == 2
    torch.testing.assert_close(model.model.auxiliary_loss(), own.model.auxiliary_loss(), **CLOSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": {"capacity": 0.0}}, "layers.0.depth.capacity: "),
        ({"depth": {"capacty": 0.1}}, "layers.0.depth.capacty: unknown key; did you mean 'capacity'"),
        ({"depth": {"predictor": None}}, "layers.0.depth: predictor: null decides by the sign"),
        ({"block": "post_norm"}, "depth: a post_norm block has no residual to pass by"),
    ],
)
def test_wrong_options_are_refused(change, message):
    layer = {"mixer": ATTENTION, "ffn": FFN, "depth": change.pop("depth", {})}
    with pytest.raises(ConfigError, match=message):
        ZooForCausalLM(zoo.ZooConfig(hidden_size=16, vocab_size=64, layers=[layer], **change))


def test_which_layers_of_a_pattern_are_routed():
    layers = {"pattern": "attention", "num_hidden_layers": 6, "defaults": {"num_heads": 2, "head_dim": 8}}
    spec = ModelSpec.parse({"layers": {**layers, "depth": {"every": 3, "capacity": 0.2}}})
    assert [layer.depth and layer.depth.capacity for layer in spec.layers] == [None, None, 0.2, None, None, 0.2]
    assert ModelSpec.parse(spec.plain()) == spec
    with pytest.raises(ConfigError, match=r"layers\.depth\.every: must be a number of layers, got 0"):
        ModelSpec.parse({"layers": {**layers, "depth": {"every": 0}}})


def test_routers_in_a_pretrained_model(tmp_path):
    torch.manual_seed(0)
    dense = zoo.create_model("transformer-tiny").double().eval()
    ids_BL = torch.randint(1, 256, (2, 16))
    model = add_routers(dense, every=2, capacity=1.0, predictor=None)
    assert [type(block) for block in model.model.layers] == [Block, RoutedBlock][: len(dense.model.layers)]
    for block in routed_blocks(model):
        assert block.router.bias.item() == 1
        block.router.weight.data.zero_()
    torch.testing.assert_close(model(ids_BL).logits, dense(ids_BL).logits, **CLOSE)
    assert "depth" not in dense.config.layers[1]
    model.save_pretrained(tmp_path)
    assert zoo.create_model(str(tmp_path)).config.layers[1]["depth"]["capacity"] == 1.0
    with pytest.raises(ConfigError, match=r"depth\.bias: a pretrained block needs bias: true"):
        add_routers(dense, bias=False)
