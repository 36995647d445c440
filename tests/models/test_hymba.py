"""Hymba: the whole model beside one written down from NVIDIA's modelling code, meta tokens, shared keys and values.

The released code (`modeling_hymba.py` of nvidia/Hymba-1.5B-Base) needs CUDA kernels, so `reference` is a plain one of
the same tensors: one fused projection a layer (queries, keys, values, Mamba's input and gate), loops over time.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.errors import ConfigError, ConversionError
from zoo.models.costs import size_of
from zoo.registry import model_config

V, D, H, G, K, N, R, M, FF, W = 61, 24, 4, 2, 6, 3, 2, 3, 20, 5
E = 2 * D  # channels of Mamba, and H heads of values
WINDOWS, BACK = [None, W, W, W, None], [None, None, 1, 2, None]
IDS = torch.randint(0, V, (2, 19), generator=torch.Generator().manual_seed(3))
DOUBLE = {"dtype": torch.double}


def theirs() -> dict[str, torch.Tensor]:
    """Random tensors under the names of the released checkpoints."""
    generator, out = torch.Generator().manual_seed(0), {}

    def add(name: str, *shape: int, norm: bool = False) -> None:
        out[name] = (0.3 * torch.randn(*shape, generator=generator, **DOUBLE) + norm).requires_grad_()

    add("model.embed_tokens.weight", V, D)
    add("model.memory_tokens", M, D)
    add("model.final_layernorm.weight", D, norm=True)
    for i in range(5):
        a, m = f"model.layers.{i}", f"model.layers.{i}.mamba"
        own = 0 if BACK[i] else G * K + G * (E // H)
        add(f"{m}.in_proj.weight", H * K + own + 2 * E, D)
        add(f"{m}.out_proj.weight", D, E)
        add(f"{m}.conv1d.weight", E, 1, 4)
        add(f"{m}.conv1d.bias", E)
        add(f"{m}.x_proj.0.weight", R + 2 * N, E)
        add(f"{m}.dt_proj.0.weight", E, R)
        add(f"{m}.dt_proj.0.bias", E)
        add(f"{m}.A_log.0", E, N)
        add(f"{m}.D.0", E)
        for name, size in (("dt", R), ("B", N), ("C", N)):
            add(f"{m}.{name}_layernorm.weight", size, norm=True)
        for name, size in (("mamba.pre_avg_layernorm1", E), ("mamba.pre_avg_layernorm2", E)):
            add(f"{a}.{name}.weight", size, norm=True)
        add(f"{a}.input_layernorm.weight", D, norm=True)
        add(f"{a}.pre_moe_layernorm.weight", D, norm=True)
        for name, shape in (("gate", (FF, D)), ("up", (FF, D)), ("down", (D, FF))):
            add(f"{a}.moe.experts.0.{name}_proj.weight", *shape)
    return out


def to_ours(get) -> dict[str, torch.Tensor]:
    out = {"model.embed_tokens.weight": get("model.embed_tokens.weight")}
    out["lm_head.weight"] = out["model.embed_tokens.weight"]
    out["model.meta_tokens.weight"] = get("model.memory_tokens")
    out["model.norm.weight"] = get("model.final_layernorm.weight")
    for i in range(5):
        a, m, b = f"model.layers.{i}", f"model.layers.{i}.mamba", f"model.layers.{i}.mixer"
        sizes = [H * K] + ([] if BACK[i] else [G * K, G * (E // H)]) + [2 * E]
        parts = get(f"{m}.in_proj.weight").split(sizes)
        names = ["q_proj"] + ([] if BACK[i] else ["k_proj", "v_proj"]) + ["mamba.in_proj"]
        out |= {f"{b}.{name}.weight": part for name, part in zip(names, parts, strict=True)}
        out[f"{b}.o_proj.weight"] = get(f"{m}.out_proj.weight")
        out[f"{b}.mamba.conv.weight"] = get(f"{m}.conv1d.weight").flatten(1)
        out[f"{b}.mamba.conv.bias"] = get(f"{m}.conv1d.bias")
        out[f"{b}.mamba.x_proj.weight"] = get(f"{m}.x_proj.0.weight")
        out[f"{b}.mamba.dt_proj.weight"] = get(f"{m}.dt_proj.0.weight")
        out[f"{b}.mamba.dt_bias"] = get(f"{m}.dt_proj.0.bias")
        out |= {f"{b}.mamba.{n}": get(f"{m}.{n}.0") for n in ("A_log", "D")}
        out |= {f"{b}.mamba.bcdt_norms.{n}.weight": get(f"{m}.{n}_layernorm.weight") for n in ("dt", "B", "C")}
        out[f"{b}.attention_norm.weight"] = get(f"{m}.pre_avg_layernorm1.weight")
        out[f"{b}.mamba_norm.weight"] = get(f"{m}.pre_avg_layernorm2.weight")
        out[f"{a}.mixer_norm.weight"] = get(f"{a}.input_layernorm.weight")
        out[f"{a}.ffn_norm.weight"] = get(f"{a}.pre_moe_layernorm.weight")
        out |= {f"{a}.ffn.{n}_proj.weight": get(f"{a}.moe.experts.0.{n}_proj.weight") for n in ("gate", "up", "down")}
    return out


def rms(x, weight):
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def rotate(x_HLK):
    inverse = 10000 ** (-torch.arange(0, K, 2, **DOUBLE) / K)
    angle = torch.cat([torch.arange(x_HLK.shape[1], **DOUBLE)[:, None] * inverse] * 2, -1)
    half = torch.cat([-x_HLK[..., K // 2 :], x_HLK[..., : K // 2]], -1)
    return x_HLK * angle.cos() + half * angle.sin()


def scan(get, m, x_LE, z_LE):
    padded = F.pad(x_LE.T[None], (3, 0))
    x_LE = F.silu(F.conv1d(padded, get(f"{m}.conv1d.weight"), get(f"{m}.conv1d.bias"), groups=E))[0].T
    dt, B, C = (x_LE @ get(f"{m}.x_proj.0.weight").T).split([R, N, N], -1)
    dt, B, C = (rms(t, get(f"{m}.{n}_layernorm.weight")) for n, t in (("dt", dt), ("B", B), ("C", C)))
    dt = F.softplus(dt @ get(f"{m}.dt_proj.0.weight").T + get(f"{m}.dt_proj.0.bias"))
    A, h, out = -get(f"{m}.A_log.0").exp(), torch.zeros(E, N, **DOUBLE), []
    for t in range(len(x_LE)):
        h = h * (dt[t, :, None] * A).exp() + dt[t, :, None] * B[t] * x_LE[t, :, None]
        out.append(h @ C[t] + get(f"{m}.D.0") * x_LE[t])
    return torch.stack(out) * F.silu(z_LE)


def reference(get, ids_L):
    """Logits (L, V) of one row."""
    x_LD = torch.cat([get("model.memory_tokens"), get("model.embed_tokens.weight")[ids_L]])
    L, kept = len(x_LD), {}
    t, s = torch.arange(L)[:, None], torch.arange(L)
    for i in range(5):
        a, m = f"model.layers.{i}", f"model.layers.{i}.mamba"
        u = rms(x_LD, get(f"{a}.input_layernorm.weight")) @ get(f"{m}.in_proj.weight").T
        q, rest = rotate(u[:, : H * K].unflatten(-1, (H, K)).transpose(0, 1)), u[:, H * K : -2 * E]
        if BACK[i]:
            k, v = kept[i - BACK[i]]
        else:
            k = rotate(rest[:, : G * K].unflatten(-1, (G, K)).transpose(0, 1)).repeat_interleave(H // G, 0)
            v = rest[:, G * K :].unflatten(-1, (G, -1)).transpose(0, 1).repeat_interleave(H // G, 0)
        kept[i] = k, v
        near = (s <= t) if WINDOWS[i] is None else (s <= t) & ((t - s < WINDOWS[i]) | (s < M))
        weight = (q @ k.transpose(1, 2) * K**-0.5).masked_fill(~near, -torch.inf).softmax(-1)
        y = (weight @ v).transpose(0, 1).flatten(1)
        y = rms(y, get(f"{m}.pre_avg_layernorm1.weight"))
        y = (y + rms(scan(get, m, *u[:, -2 * E :].chunk(2, -1)), get(f"{m}.pre_avg_layernorm2.weight"))) / 2
        x_LD = x_LD + y @ get(f"{m}.out_proj.weight").T
        u = rms(x_LD, get(f"{a}.pre_moe_layernorm.weight"))
        gate, up, down = (get(f"{a}.moe.experts.0.{n}_proj.weight") for n in ("gate", "up", "down"))
        x_LD = x_LD + (F.silu(u @ gate.T) * (u @ up.T)) @ down.T
    return rms(x_LD[M:], get("model.final_layernorm.weight")) @ get("model.embed_tokens.weight").T


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
