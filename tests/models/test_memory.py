"""Memory blocks (Zamba2): transformers' whole models from the same weights, sizes, states, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Zamba2Config, Zamba2ForCausalLM

import zoo
from zoo.cli.show import describe
from zoo.config import ModelSpec
from zoo.convert.layouts.family import families
from zoo.errors import ConfigError
from zoo.models.costs import empty_model, flops_per_token, size_of, state_bytes
from zoo.models.memory import MemoryBlock
from zoo.registry import model_config

V, D, F, N, M, P, H, R = 61, 32, 48, 16, 8, 8, 4, 6  # M heads of size P with a state of N in Mamba-2; rank R
READERS = [1, 3, 4, 6]
IDS = torch.randint(1, V, (2, 21), generator=torch.Generator().manual_seed(3))


def both(blocks: int, adapt: bool, rope: bool, groups: int):
    """(their model, ours, a function from their parameters or gradients to ours)."""
    config = Zamba2Config(
        vocab_size=V, hidden_size=D, num_hidden_layers=7, mamba_d_state=N, mamba_ngroups=groups, n_mamba_heads=M,
        chunk_size=8, intermediate_size=F, num_attention_heads=H, num_mem_blocks=blocks, adapter_rank=R,
        use_shared_attention_adapter=adapt, use_mem_rope=rope, initializer_range=0.2, time_step_min=0.3,
        layers_block_type=["hybrid" if i in READERS else "linear_attention" for i in range(7)], pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    head = 2 * D // H
    attention = {"num_heads": H, "head_dim": head, "scale": (head / 2) ** -0.5}
    memory = {"layers": READERS, "blocks": blocks, "rank": R, "adapt_attention": adapt, "attention": attention}
    memory["ffn"] = {"hidden_size": F, "activation": "gelu"}
    if rope:
        attention["rotary"] = {"theta": 10000.0}
    mamba = {"num_heads": M, "num_groups": groups, "head_dim": N, "value_head_dim": P, "dt_floor": 0.3}
    layers = {"pattern": "mamba2", "num_hidden_layers": 7, "defaults": mamba, "memory": memory}
    ours = zoo.models.heads.ZooForCausalLM(zoo.ZooConfig(vocab_size=V, hidden_size=D, norm_eps=1e-5, layers=layers))
    return Zamba2ForCausalLM(config), ours, lambda get: to_ours(get, ours.config)


def to_ours(get, config):
    """By the layout of its checkpoints; `get` gives parameters or gradients."""
    family = next(f for f in families("transformers") if f.name == "zamba2")
    out = {"lm_head.weight": get("model.embed_tokens.weight")}
    for entry in family.entries(config):
        out |= dict(zip(entry.ours, entry.read([get(name) for name in entry.theirs]), strict=True))
    return out


@pytest.fixture(scope="module", params=["1.2b", "2.7b", "7b"])
def pair(request):
    """Their kinds: one block with adapted attention; two without positions; two with, and two groups of keys."""
    kinds = {"1.2b": (1, True, True, 1), "2.7b": (2, False, False, 1), "7b": (2, False, True, 2)}
    torch.manual_seed(0)
    theirs, ours, fold = both(*kinds[request.param])
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.dim() == 1 and "A_log" not in name:
                p.add_(0.2 * torch.randn_like(p))
        ours.load_state_dict(fold(dict(theirs.named_parameters()).__getitem__))
    return theirs.eval(), ours.eval(), fold


@torch.no_grad()
def test_logits_are_those_of_transformers(pair):
    theirs, ours, _ = pair
    mask_BL = torch.ones_like(IDS)
    mask_BL[1, :6] = 0
    real = mask_BL.bool()
    for mask in (None, mask_BL):
        expected = theirs(IDS, attention_mask=mask, use_cache=False).logits
        got = ours(IDS, attention_mask=mask).logits
        assert (got - expected)[real].abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_are_those_of_transformers(pair):
    theirs, ours, fold = pair
    parameters = dict(theirs.named_parameters())
    expected = torch.autograd.grad(theirs(IDS, labels=IDS, use_cache=False).loss, list(parameters.values()))
    weights = fold(parameters.__getitem__)
    out = torch.func.functional_call(ours, weights, (IDS,), {"labels": IDS, "use_cache": False})
    got = torch.autograd.grad(out.loss, list(parameters.values()))
    for name, a, b in zip(parameters, got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7, name


@torch.no_grad()
def test_decoding_step_by_step_is_the_forward_pass(pair):
    """Ours: transformers leaves out the floor of dt when it decodes a single token."""
    ours = pair[1]
    whole = ours(IDS).logits
    out = ours(IDS[:, :9], use_cache=True)
    parts = [out.logits]
    for t in range(9, 21):
        parts.append(ours(IDS[:, t : t + 1], past_key_values=out.past_key_values).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert "memory.k" in out.past_key_values.layers[1].state


KEYS = ("hidden_size", "num_hidden_layers", "mamba_d_state", "n_mamba_heads", "num_mem_blocks", "mamba_ngroups")
SIZES = {  # as in Zyphra's configs on the Hub, and the layers that read a memory block
    "zamba2-1.2b": ((2048, 38, 128, 64, 1, 1), [5, 11, 17, 23, 29, 35]),
    "zamba2-2.7b": ((2560, 54, 64, 80, 2, 1), [6, 12, 18, 24, 30, 36, 42, 47, 51]),
    "zamba2-7b": ((3584, 81, 64, 112, 2, 2), [6, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77]),
}


@pytest.mark.parametrize("name", SIZES)
def test_as_many_parameters_as_transformers(name):
    sizes, readers = SIZES[name]
    options = dict(zip(KEYS, sizes, strict=True), use_shared_attention_adapter=name == "zamba2-1.2b")
    kinds = ["hybrid" if i in readers else "linear_attention" for i in range(options["num_hidden_layers"])]
    with torch.device("meta"):
        theirs = Zamba2ForCausalLM(Zamba2Config(vocab_size=32000, layers_block_type=kinds, **options))
    theirs.tie_weights()
    config = model_config(name)
    assert [i for i, layer in enumerate(config.layers) if "memory" in layer] == readers
    assert size_of(config)[0] == theirs.num_parameters() == pytest.approx(float(name[7:-1]) * 1e9, rel=0.06)


def tiny():
    torch.manual_seed(0)
    return zoo.create_model("zamba2-tiny", initializer_range=0.1).double().eval()


def test_a_memory_is_held_once_and_every_use_trains_it(tmp_path):
    model = tiny()
    blocks = [model.model.layers[i] for i in (0, 1, 3)]
    assert all(type(block) is MemoryBlock for block in blocks)
    assert blocks[2].read is blocks[0].memory
    assert blocks[1].read is blocks[1].memory is not blocks[0].memory
    assert blocks[2].memory is None
    ids = torch.randint(1, 256, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    again = copy.deepcopy(model)
    assert again.model.layers[3].read is again.model.layers[0].memory is not blocks[0].memory
    model.save_pretrained(tmp_path)
    loaded = zoo.create_model(str(tmp_path), dtype=torch.double).eval()
    assert loaded.model.layers[3].read is loaded.model.layers[0].memory
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.train().gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-12)


def test_what_a_memory_costs_is_counted():
    model, info = tiny().float(), describe("zamba2-tiny", lengths=[16])
    assert info["parameters"] == sum(p.numel() for p in model.parameters())
    keys_and_values = 3 * 2 * 4 * 32 * 4  # layers, both, heads, size, bytes
    assert state_bytes(model, 30) - state_bytes(model, 20) == 10 * keys_and_values
    uses = 3 * (3 * 64 * 128 + 4 * 128 * 128 - 64 * 128 + 64 * 64 + 8 * (64 + 256) + 3 * 8 * (128 + 128))
    plain = model_config("zamba2-tiny", layers={"memory": {"layers": []}})
    more = info["flops_per_token"]["16"] - flops_per_token(empty_model(plain), 16)
    assert more == 2 * uses + 3 * 2 * 2 * 16 * 128  # and the map of attention as a square


MAMBA = {"name": "mamba2", "num_heads": 2, "num_groups": 1, "head_dim": 8, "value_head_dim": 16}
MEMORY = {"attention": {"num_heads": 2, "head_dim": 8}, "ffn": {"hidden_size": 24}}
LAYER = {"mixer": MAMBA, "memory": MEMORY}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [LAYER, {"mixer": MAMBA, "memory": {**MEMORY, "same_as": 1}}]}, "layer 1 has no memory block of"),
        ({"layers": [{"mixer": MAMBA}, {"mixer": MAMBA, "memory": {**MEMORY, "same_as": 0}}]}, "layer 0 has no memory"),
        (
            {"layers": [LAYER, {"mixer": MAMBA, "memory": {**MEMORY, "ffn": {"hidden_size": 8}, "same_as": 0}}]},
            "layers.1.memory: differs from that of layer 0",
        ),
        (
            {"layers": [{"mixer": MAMBA, "memory": {**MEMORY, "rnk": 3}}]},
            "memory.rnk: unknown key; did you",
        ),
        ({"layers": [{"mixer": MAMBA, "memory": {**MEMORY, "ffn": {"name": "mlp", "hidden_size": 4}}}]}, "'gated_mlp'"),
        ({"layers": [LAYER], "block": "parallel"}, "memory: belongs to block: pre_norm"),
        ({"layers": [{**LAYER, "depth": {}}]}, "memory: belongs to block: pre_norm of a model of text, and not"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        zoo.models.heads.ZooForCausalLM(zoo.ZooConfig(hidden_size=16, vocab_size=8, **options))


def test_patterns_with_memory():
    layers = {"pattern": "mamba2", "num_hidden_layers": 4, "defaults": {k: v for k, v in MAMBA.items() if k != "name"}}
    spec = ModelSpec.parse({"layers": {**layers, "memory": {"layers": [0, 2, 3], "blocks": 2, **MEMORY}}})
    assert [layer.memory and layer.memory.same_as for layer in spec.layers] == [None, None, None, 0]
    assert [layer.memory is None for layer in spec.layers] == [False, True, False, False]
    assert ModelSpec.parse(spec.plain()) == spec
    with pytest.raises(ConfigError, match=r"layers.memory.layers: must be indices of layers, got \[-1\]"):
        ModelSpec.parse({"layers": {**layers, "memory": {"layers": [-1], **MEMORY}}})
    with pytest.raises(ConfigError, match=r"layers.memory.blocks: must be a number of memory blocks, got 0"):
        ModelSpec.parse({"layers": {**layers, "memory": {"layers": [1], "blocks": 0, **MEMORY}}})
