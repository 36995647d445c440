"""Hymba: the whole model beside one written down from NVIDIA's modelling code, meta tokens, shared keys and values.

The released code (`modeling_hymba.py` of nvidia/Hymba-1.5B-Base) needs CUDA kernels, so a plain one of the same
tensors stands for it: tests/peers/hymba.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peers.hymba import FF, D, E, G, H, K, M, N, R, V, W, reference, theirs

import zoo
from zoo.convert.layouts.family import families
from zoo.errors import ConfigError, ConversionError
from zoo.models.costs import size_of
from zoo.registry import model_config

IDS = torch.randint(0, V, (2, 19), generator=torch.Generator().manual_seed(3))


def to_ours(get) -> dict[str, torch.Tensor]:
    """By the layout of its checkpoints; `get` gives parameters."""
    family = next(f for f in families("transformers") if f.name == "hymba")
    out = {"lm_head.weight": get("model.embed_tokens.weight")}
    for entry in family.entries(ours().config):
        out |= dict(zip(entry.ours, entry.read([get(name) for name in entry.theirs]), strict=True))
    return out


def ours():
    heads = {"num_heads": H, "num_kv_heads": G, "head_dim": K, "value_head_dim": E // H, "rotary": {"theta": 10000.0}}
    options = {**heads, "window": W, "sinks": M, "state_dim": N, "dt_rank": R}
    layers = {"pattern": "hymba", "num_hidden_layers": 5, "defaults": options, "ffn": {"name": "gated_mlp"}}
    layers["ffn"]["hidden_size"] = FF
    layers["at"] = {"0 4": {"window": None, "sinks": 0}, "2": {"kv_back": 1}, "3": {"kv_back": 2}}
    config = zoo.ZooConfig(vocab_size=V, hidden_size=D, norm_eps=1e-6, meta_tokens=M, layers=layers)
    return zoo.models.heads.ZooForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def pair():
    weights, model = theirs(), ours()
    with torch.no_grad():
        model.load_state_dict(to_ours(weights.__getitem__))
    return weights, model


@torch.no_grad()
def test_logits_are_those_of_the_released_code(pair):
    weights, model = pair
    expected = torch.stack([reference(weights.__getitem__, ids_L) for ids_L in IDS])
    assert (model(IDS).logits - expected).abs().max() <= 1e-6 * expected.abs().max()  # rotary tables are float32


def test_gradients_are_those_of_the_released_code(pair):
    weights, model = pair
    loss = F.cross_entropy(torch.cat([reference(weights.__getitem__, x)[:-1] for x in IDS]), IDS[:, 1:].flatten())
    expected = torch.autograd.grad(loss, list(weights.values()))
    folded = to_ours(weights.__getitem__)
    out = torch.func.functional_call(model, folded, (IDS,), {"labels": IDS, "use_cache": False})
    got = torch.autograd.grad(out.loss, list(weights.values()))
    for name, a, b in zip(weights, got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[7, 1, 1, 6, 4], [1] * 19, [12, 7]])
def test_any_split_is_the_whole(pair, sizes):
    """Past the window, with a padded row; readers keep no keys; a cache does not count the meta tokens."""
    model = pair[1]
    mask_BL = torch.ones_like(IDS)
    mask_BL[1, :4] = 0
    whole, cache, parts, start = model(IDS, attention_mask=mask_BL).logits, None, [], 0
    for size in sizes:
        stop = start + size
        out = model(IDS[:, start:stop], attention_mask=mask_BL[:, :stop], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, stop
        parts.append(out.logits)
        assert cache.get_seq_length() == stop
    real = mask_BL.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-8, atol=1e-8)
    assert not any(name.startswith("attention.") for name in cache.layers[2].state.tensors)
    assert cache.layers[1].state["attention.k"].shape[2] == W - 1


@torch.no_grad()
def test_packed_and_padded_rows_each_have_the_meta_tokens(pair):
    model = pair[1]
    segments_BL = torch.tensor([[3] * 6 + [5] * 12 + [3], [0] * 19])
    mask_BL = torch.ones_like(IDS)
    mask_BL[0, [2, 8, 9]] = 0
    got = model(IDS, attention_mask=mask_BL, segment_ids=segments_BL).logits
    for row, start, stop in ((0, 0, 6), (0, 6, 18), (0, 18, 19), (1, 0, 19)):
        keep = mask_BL[row, start:stop].bool()
        alone = model(IDS[row : row + 1, start:stop][:, keep]).logits[0]
        torch.testing.assert_close(got[row, start:stop][keep], alone, rtol=1e-8, atol=1e-8)


def test_checkpointed_gradients_go_through_shared_keys(pair):
    model, found = pair[1].train(), []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.gradient_checkpointing_disable()
    model.eval()
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert all(gradient.any() for gradient in found[0].values())


def test_published_size():
    config = model_config("hymba-1.5b")
    assert size_of(config)[0] == pytest.approx(1.52e9, rel=0.003)  # table 1 of the paper
    mixers = [layer["mixer"] for layer in config.layers]
    assert [i for i, m in enumerate(mixers) if m["window"] is None] == [0, 15, 31]
    readers = [i for i, m in enumerate(mixers) if m["kv_back"]]
    assert len(readers) == 15
    assert all(mixers[i - mixers[i]["kv_back"]]["window"] == 1024 for i in readers)
    assert not any(mixers[i - mixers[i]["kv_back"]]["kv_back"] for i in readers)


HEADS = {"name": "hymba", "num_heads": 2, "head_dim": 8}
LAYER = {"mixer": {**HEADS, "window": 4}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [{"mixer": {**HEADS, "kv_back": 1}}]}, "kv_back: keys and values are shared between windows"),
        ({"layers": [LAYER], "meta_tokens": 2, "positions": "learned"}, "meta_tokens: a model with them has no posi"),
        ({"layers": [{**LAYER, "depth": {}}], "meta_tokens": 2}, "meta_tokens: a model with them has no depth"),
        ({"layers": {"pattern": "hymba", "num_hidden_layers": 2, "at": {"x": {}}}}, r"layers.at: cannot read 'x'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises((ConfigError, ConversionError), match=message):
        zoo.models.heads.ZooForCausalLM(zoo.ZooConfig(hidden_size=16, vocab_size=8, **options))


def test_a_reader_needs_a_layer_that_hands_on():
    layers = [{"mixer": {**HEADS, "window": None}}, {"mixer": {**HEADS, "window": 4, "kv_back": 1}}]
    model = zoo.models.heads.ZooForCausalLM(zoo.ZooConfig(hidden_size=16, vocab_size=8, meta_tokens=1, layers=layers))
    with pytest.raises(ValueError, match="kv_back: layer 0 hands on no keys and values"):
        model(torch.ones(1, 3, dtype=torch.long))
    shared = zoo.ZooConfig(hidden_size=16, vocab_size=8, meta_tokens=1, layers=[LAYER, {"same_as": 0}])
    with pytest.raises(ConfigError, match="meta_tokens: a model with them has no same_as"):
        zoo.models.heads.ZooForCausalLM(shared)(torch.ones(1, 3, dtype=torch.long))
