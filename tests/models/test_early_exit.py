"""Early exit: the dense model as a case, a slow evaluation token by token, filled states, the loss of all heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.config import ModelSpec
from zoo.errors import ConfigError
from zoo.models.early_exit import add_exits
from zoo.models.heads import ZooForCausalLM

MIXERS = {
    "attention": {"num_heads": 2, "head_dim": 8, "rotary": {}},
    "mamba2": {"num_heads": 2, "num_groups": 1, "head_dim": 8, "value_head_dim": 16},
}
CLOSE = {"rtol": 1e-10, "atol": 1e-11}
IDS = torch.randint(1, 48, (2, 15), generator=torch.Generator().manual_seed(2))


def model_of(pattern="attention", own_norms=True, **exits):
    torch.manual_seed(0)
    layers = {"pattern": pattern, "num_hidden_layers": 4, "ffn": {"name": "gated_mlp", "hidden_size": 24}}
    layers["mixers"] = {name: MIXERS[name] for name in pattern.split()}
    spec = {"layers": layers, "exits": {"layers": [0, 2], "own_norms": own_norms, **exits}}
    model = ZooForCausalLM(zoo.ZooConfig(hidden_size=16, vocab_size=48, initializer_range=0.3, **spec)).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


@torch.no_grad()
def slow(model, ids_L, confidence, threshold):
    """Logits and layers used of one row: all layers over the whole row, where a token that has left stays as it is."""
    x_LD = model.model.embed_tokens(ids_L)
    left: dict[int, tuple[torch.Tensor, int]] = {}
    for i, block in enumerate(model.model.layers):
        y_LD = block(x_LD[None], None, None, None)[0][0]
        x_LD = torch.stack([x_LD[t] if t in left else y_LD[t] for t in range(len(ids_L))])
        for t in range(len(ids_L)):
            if i not in (0, 2) or t in left:
                continue
            logits_V = model.lm_head(model.exits.norms[str(i)](x_LD[t]))
            p = logits_V.softmax(0)
            first, second = p.topk(2).values.tolist()
            entropy = -sum(q * torch.tensor(q).log().item() for q in p.tolist())
            sure = {"max": first >= threshold, "margin": first - second >= threshold, "entropy": entropy <= threshold}
            if sure[confidence]:
                left[t] = logits_V, i + 1
    last_LV = model.lm_head(model.model.norm(x_LD))
    pairs = [left.get(t, (last_LV[t], 4)) for t in range(len(ids_L))]
    return torch.stack([logits for logits, _ in pairs]), [used for _, used in pairs]


@pytest.mark.parametrize("pattern", ["attention", "attention mamba2"])
def test_without_a_threshold_it_is_the_dense_model(pattern):
    model = model_of(pattern)
    config = zoo.ZooConfig(**{**model.config.spec.plain(), "exits": None})
    dense = ZooForCausalLM(config).double().eval()
    dense.load_state_dict({n: t for n, t in model.state_dict().items() if "exits" not in n})
    out = model(IDS)
    assert out.layers_used is None
    assert torch.equal(out.logits, dense(IDS).logits)
    model.exits.threshold = 1.1  # nobody is as sure as this
    out = model(IDS)
    assert torch.equal(out.logits, dense(IDS).logits)
    assert (out.layers_used == 4).all()


@pytest.mark.parametrize(("confidence", "threshold"), [("max", 0.3), ("margin", 0.1), ("entropy", 3.0)])
def test_each_token_leaves_where_it_is_sure(confidence, threshold):
    model = model_of(confidence=confidence, threshold=threshold)
    out = model(IDS)
    assert set(out.layers_used.unique().tolist()) == {1, 3, 4}  # all kinds occur
    for b in range(2):
        logits_LV, used = slow(model, IDS[b], confidence, threshold)
        assert out.layers_used[b].tolist() == used
        torch.testing.assert_close(out.logits[b], logits_LV, **CLOSE)


@pytest.mark.parametrize("pattern", ["attention", "attention mamba2"])
def test_states_are_filled_so_that_later_tokens_go_deeper(pattern):
    model = model_of(pattern, threshold=0.3)
    mask_BL = torch.ones_like(IDS)
    mask_BL[1, :3] = 0
    whole = model(IDS, attention_mask=mask_BL, use_cache=False)
    cache, pieces, used = None, [], []
    for t in range(15):
        out = model(IDS[:, t : t + 1], attention_mask=mask_BL[:, : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
        used.append(out.layers_used)
        assert [cache.get_seq_length(i) for i in range(4)] == [t + 1] * 4
    real = mask_BL.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole.logits[real], **CLOSE)
    assert torch.equal(torch.cat(used, 1)[real], whole.layers_used[real])
    alone = [model(IDS[:1, :n], use_cache=False).layers_used[0, -1] for n in (3, 9)]
    assert alone == [whole.layers_used[0, 2], whole.layers_used[0, 8]]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


def test_a_state_holds_the_hidden_state_in_which_a_token_left():
    model = model_of(threshold=0.0)  # everybody leaves at once
    layers = model.model.layers
    calls = []
    for i in range(4):
        layers[i].ffn.register_forward_hook(lambda *_, i=i: calls.append(i))
    out = model(IDS)
    assert calls == [0]
    assert (out.layers_used == 1).all()
    x_BLD = layers[0](model.model.embed_tokens(IDS), None, None, None)[0]
    torch.testing.assert_close(out.logits, model.lm_head(model.exits.norms["0"](x_BLD)), **CLOSE)
    for i in (1, 2, 3):
        v_BLE = layers[i].mixer.v_proj(layers[i].mixer_norm(x_BLD))
        state = out.past_key_values.layers[i].state
        torch.testing.assert_close(state["v"].transpose(1, 2).flatten(2), v_BLE, **CLOSE)


def test_the_report_of_a_generation():
    model = model_of(threshold=0.3)
    assert model.exits.mean_layers != model.exits.mean_layers  # nan: nothing yet
    model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    counts = model.exits.counts
    assert sum(counts) == 12
    assert counts[0] == counts[2] == 0
    assert model.exits.mean_layers == pytest.approx((counts[1] + 3 * counts[3] + 4 * counts[4]) / 12)
    model.exits.reset()
    assert sum(model.exits.counts) == 0


def test_the_loss_is_the_mean_of_all_heads_by_depth(tmp_path):
    model = model_of(threshold=0.3)
    states = model.model(IDS, output_hidden_states=True).hidden_states  # inputs of the blocks, then the normed end
    ends = [model.exits.norms["0"](states[1]), model.exits.norms["2"](states[3]), states[4]]
    losses = [F.cross_entropy(model.lm_head(h)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()) for h in ends]
    expected = (1 * losses[0] + 3 * losses[1] + 4 * losses[2]) / 8
    out = model.train()(IDS, labels=IDS)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logits, model.lm_head(states[4]), **CLOSE)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = zoo.create_model(str(tmp_path), dtype=torch.float64).eval()
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_the_last_norm_can_serve_all_heads():
    model = model_of(own_norms=False, threshold=0.0)
    assert not list(model.exits.parameters())
    x_BLD = model.model.layers[0](model.model.embed_tokens(IDS), None, None, None)[0]
    torch.testing.assert_close(model(IDS).logits, model.lm_head(model.model.norm(x_BLD)), **CLOSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits": {"layers": [1]}}, "exits.layers: the last layer is 0, got 1"),
        ({"exits": {"layers": [0, 0]}}, "must be indices of layers in rising order"),
        ({"exits": {"layers": [0], "confidence": "sure"}}, "exits.confidence: "),
        ({"exits": {"layers": [0], "threshold": -1.0}}, "exits.threshold: "),
        ({"exits": {"layers": [0]}, "task": "masked-lm"}, "exits: only a causal-lm predicts token by token"),
    ],
)
def test_wrong_options_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelSpec.parse(change)


def test_exits_in_a_pretrained_model(tmp_path):
    torch.manual_seed(0)
    dense = zoo.create_model("transformer-tiny", initializer_range=0.2).eval()
    ids_BL = torch.randint(1, 256, (2, 12))
    model = add_exits(dense, [0], confidence="margin")
    assert torch.equal(model(ids_BL).logits, dense(ids_BL).logits)
    assert dense.exits is None
    assert dense.config.exits is None
    model.exits.threshold = 0.0
    x_BLD = dense.model.layers[0](dense.model.embed_tokens(ids_BL), None, None, None)[0]
    torch.testing.assert_close(model(ids_BL).logits, dense.lm_head(dense.model.norm(x_BLD)))
    model.save_pretrained(tmp_path)
    again = zoo.create_model(str(tmp_path)).eval()
    assert again.config.exits == {"layers": [0], "confidence": "margin", "threshold": None, "own_norms": True}
    assert torch.equal(again(ids_BL).logits, dense(ids_BL).logits)
    with pytest.raises(ConfigError, match=r"exits\.layers: the last layer is 1, got 5"):
        add_exits(dense, [5])
