"""Reversible blocks: gradients of plain autograd, memory that does not grow with depth. Axial positions. Pieces."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.errors import ConfigError
from zoo.models import backbone
from zoo.models.axial import AxialPositions
from zoo.models.reversible import can_recompute


def tiny(depth=4, dtype=torch.double, **options):
    torch.manual_seed(0)
    mixers = {
        "local_attention": {"chunk": 8},
        "lsh_attention": {"chunk": 8, "num_buckets": 8, "num_hashes": 2, "redraw": True},
    }
    options = {"initializer_range": 0.2, "layers": {"num_hidden_layers": depth, "mixers": mixers}, **options}
    return zoo.create_model("reformer-tiny", **options).to(dtype).train()


def tokens(length=40):
    return torch.randint(1, 256, (2, length), generator=torch.Generator().manual_seed(1))


def gradients(model, ids_BL, **inputs):
    model.zero_grad()
    torch.manual_seed(5)
    out = model(ids_BL, labels=ids_BL, **inputs)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def plainly(monkeypatch):
    monkeypatch.setattr(backbone, "can_recompute", lambda blocks: False)


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_gradients_are_those_of_plain_autograd(kind, monkeypatch):
    """With fresh rotations in every pass, which must be the same ones the second time, and so must the buckets."""
    model, ids_BL, inputs = tiny(), tokens(), {}
    if kind == "padded":
        inputs = {"attention_mask": (torch.arange(40) >= torch.tensor([[5], [0]])).long()}
    if kind == "packed":
        inputs = {"segment_ids": (torch.arange(40) >= torch.tensor([[15], [31]])).long()}
    logits, found = gradients(model, ids_BL, **inputs)
    plainly(monkeypatch)
    expected_logits, expected = gradients(model, ids_BL, **inputs)
    assert torch.equal(logits, expected_logits)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10)
    assert sum(g.abs().sum().item() for g in expected.values()) > 1


def test_random_numbers_are_drawn_again_and_go_on_as_without(monkeypatch):
    """Dropout inside a block; after the backward pass the generator stands where plain autograd leaves it."""
    model, ids_BL, ends = tiny(2), tokens(), []
    for block in model.model.layers:
        block.ffn.act = torch.nn.Sequential(block.ffn.act, torch.nn.Dropout(0.3))
    results = []
    for plain in (False, True):
        if plain:
            plainly(monkeypatch)
        results.append(gradients(model, ids_BL))
        ends.append(torch.rand(3))
    assert torch.equal(*ends)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-9, atol=1e-10)


def test_frozen_parameters_and_inputs(monkeypatch):
    model, ids_BL = tiny(2), tokens()
    model.requires_grad_(False)
    trained = model.model.layers[0].mixer.v_proj.weight.requires_grad_()
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found += torch.autograd.grad(model(ids_BL, labels=ids_BL).loss, trained)
        plainly(monkeypatch)
    assert found[0].any()
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_buckets_are_those_of_the_forward_pass(monkeypatch):
    """Inputs found again differ by rounding; a vector between two buckets must not change sides."""
    from zoo.mixers import lsh_attention

    calls, hashed = [], lsh_attention.hash_buckets
    monkeypatch.setattr(lsh_attention, "hash_buckets", lambda *a: calls.append(1) or hashed(*a))
    gradients(tiny(4), tokens())
    assert len(calls) == 2


MOE = {"name": "moe", "num_experts": 4, "hidden_size": 24, "top_k": 2, "jitter": 0.1, "z_loss": 0.5}
EXPERTS = {
    "balanced": {**MOE, "balance_loss": 0.5, "bias_rate": 0.01, "capacity_factor": 1.0},
    "choosing": {**MOE, "chooser": "experts"},
}


def with_experts(which, shared=False, depth=3):
    mixer = {"name": "attention", "num_heads": 2, "head_dim": 8, "causal": which != "choosing"}
    layers = [{"mixer": mixer, "ffn": EXPERTS[which]}] + [{"same_as": 0} if shared else
              {"mixer": mixer, "ffn": EXPERTS[which]} for _ in range(depth - 1)]  # fmt: skip
    task = {"task": "masked-lm"} if which == "choosing" else {}
    return tiny(positions="none", axial_shape=[], axial_dims=[], layers=layers, **task)


@pytest.mark.parametrize(("which", "shared"), [("balanced", False), ("balanced", True), ("choosing", False)])
def test_losses_of_experts_have_their_gradient(which, shared, monkeypatch):
    """Routed as in the first pass, counted once, and balanced by the same gradients; padded rows."""
    ids_BL, results = tokens(), []
    mask = {"attention_mask": (torch.arange(40) >= torch.tensor([[5], [0]])).long()}
    for plain in (False, True):
        if plain:
            plainly(monkeypatch)
        model = with_experts(which, shared)
        assert plain or can_recompute(model.model.layers)
        _, found = gradients(model, ids_BL, **mask)
        own = model.model.auxiliary_loss().detach()
        loads = [block.ffn._load_E for block in model.model.layers if which == "balanced"]
        routers = [p.grad.clone() for name, p in model.named_parameters() if "router" in name]
        model.zero_grad()
        torch.manual_seed(5)
        model.model(ids_BL, **mask)
        model.model.auxiliary_loss().backward()
        alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(gradient.any() for name, gradient in alone.items() if "router.weight" in name)
        results.append([found, own, loads, routers, {k: v for k, v in alone.items() if v.any()}])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_experts_take_the_tokens_of_the_forward_pass(monkeypatch):
    from zoo.ffn import routing

    calls, chosen = [], routing.choose_experts
    monkeypatch.setattr(routing, "choose_experts", lambda *a: calls.append(1) or chosen(*a))
    gradients(with_experts("balanced"), tokens())
    assert len(calls) == 3
    assert saved_bytes(with_experts("balanced", depth=6), tokens()) <= 1.01 * saved_bytes(
        with_experts("balanced", depth=2), tokens()
    )


def saved_bytes(model, ids_BL):
    """Bytes of everything that the forward pass keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.model(ids_BL).last_hidden_state.sum()
    assert loss.requires_grad
    return sum(kept.values())


def test_memory_does_not_grow_with_depth(monkeypatch):
    few, many = tiny(2), tiny(8)
    assert saved_bytes(many, tokens()) == saved_bytes(few, tokens())
    reversible = saved_bytes(many, tokens())
    plainly(monkeypatch)
    assert saved_bytes(many, tokens()) > 3 * saved_bytes(few, tokens())
    assert saved_bytes(many, tokens()) > 20 * reversible


def test_bfloat16_autocast_recomputes_under_autocast():
    model, ids_BL = tiny(2, torch.float32), tokens()
    seen = []
    model.model.layers[0].ffn.up_proj.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids_BL, labels=ids_BL).loss
    loss.backward()
    assert seen == [torch.bfloat16] * 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_any_mixer_can_be_reversible(monkeypatch):
    """One with a state of its own kind; and one whose layers share, which takes plain autograd."""
    options = {"positions": "none", "axial_shape": [], "axial_dims": []}
    heads = {"num_heads": 2, "head_dim": 8}
    layers = [{"mixer": {"name": n, **heads}, "ffn": {"name": "gated_mlp", "hidden_size": 32, "chunk": 7}}
              for n in ("gated_delta_net", "attention")]  # fmt: skip
    model = tiny(**options, layers=layers)
    assert can_recompute(model.model.layers)
    _, found = gradients(model, tokens())
    model.eval()
    with torch.no_grad():
        whole = model(tokens()).logits
        cache = model(tokens()[:, :19], use_cache=True).past_key_values
        torch.testing.assert_close(model(tokens()[:, 19:], past_key_values=cache).logits, whole[:, 19:])
    model.train()
    monkeypatch.setattr(type(model.model.layers[0].mixer), "shares", True)
    assert not can_recompute(model.model.layers)
    monkeypatch.undo()
    plainly(monkeypatch)
    _, expected = gradients(model, tokens())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("task", ["masked-lm", "sequence-classification", "sentence-embedding"])
def test_heads_read_both_streams(task):
    options = {"mlm_transform": True} if task == "masked-lm" else {"pooler": "tanh"} if "class" in task else {}
    model = zoo.create_model("reformer-encoder-tiny", task=task, **options).eval()
    out = model(tokens())
    assert out[0].shape == {"masked-lm": (2, 40, 256), "sequence-classification": (2, 2)}.get(task, (2, 40, 128))


def test_what_does_not_fit_is_refused():
    for options, message in (
        ({"tie_word_embeddings": True}, "tie_word_embeddings: must be false with block: reversible"),
        ({"axial_shape": [32, 31]}, r"axial_shape: \[32, 31\] is 992 positions, not 1024"),
        ({"axial_dims": [16, 40]}, r"axial_dims: \[16, 40\] add up to 56, not to hidden_size \(64\)"),
        ({"axial_dims": [64]}, "must be as many positive numbers"),
        ({"positions": "none"}, "axial_shape: needs positions: learned"),
        ({"layers": {"ffn": None}}, "reversible needs a channel mixer"),
        (
            {"embedding_size": 32, "mlm_transform": True, "task": "masked-lm"},
            "embedding_size: not with block: reversible",
        ),
        ({"layers": {"depth": {}}}, "depth: a block that some tokens pass by cannot be reversible"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.create_model("reformer-tiny", **options)


def test_axial_positions_are_digits():
    axial = AxialPositions([3, 4, 5], [2, 1, 3])
    grid = torch.cat([axis.view(*(n if i == j else 1 for j, n in enumerate((3, 4, 5))), -1).expand(3, 4, 5, -1)
                      for i, axis in enumerate(axial.axes)], -1)  # fmt: skip
    positions_BL = torch.tensor([[0, 7, 59], [20, 4, 5]])
    torch.testing.assert_close(axial(positions_BL), grid.flatten(0, 2)[positions_BL])
    assert len({tuple(row) for row in axial(torch.arange(60)[None])[0].tolist()}) == 60
    with pytest.raises(ValueError, match="beyond the 1024 learned positions"):
        zoo.create_model("reformer-tiny")(torch.ones(1, 1025, dtype=torch.long))


@pytest.mark.parametrize("name", ["mlp", "gated_mlp"])
def test_a_channel_mixer_in_pieces(name):
    """The same outputs and gradients; only inputs are kept of each piece."""
    from zoo.registry import ffn_class

    x_BLD = torch.randn(2, 23, 16, dtype=torch.double, requires_grad=True)
    results, kept = [], []
    for chunk in (None, 5):
        torch.manual_seed(0)
        module = ffn_class(name)(ffn_class(name).Config(hidden_size=64, chunk=chunk), 16).double()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.shape) or t, lambda t: t):
            y = module(x_BLD)
        kept.append(any(64 in s and 16 not in s for s in sizes))
        results.append([y, *torch.autograd.grad(y.square().sum(), [x_BLD, *module.parameters()])])
        torch.testing.assert_close(module(x_BLD.detach()), y.detach())
    torch.testing.assert_close(*results)
    assert kept == [True, False]
