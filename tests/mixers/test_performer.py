"""Performer: parity with performer-pytorch, the features' statistics, stabilisers, redraw, conversion."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from formulas import align, convert, corners, largest_error, parameters, relative_error, teacher, wave

import zoo
from zoo.errors import ConfigError
from zoo.mixers.performer import Performer, PerformerConfig, orthogonal_features
from zoo.testing import check_mixer

B, L, D, H, K, M = 2, 70, 32, 4, 8, 20
# Ours, what the peer is called with, and `corners` of what performer-pytorch 1.1.4 gives with the weights below.
KINDS = {
    "softmax, two-sided": (
        {"causal": False}, {},
        [0.391442761, 0.915576663, 0.824105677, -0.119929124, 0.959049949, 0.96455419],
    ),
    "softmax, two-sided, no eps": (
        {"causal": False, "eps": 0.0}, {"eps": 0.0},
        [0.489218937, 0.900493051, 0.872638168, -0.294280488, 1.059394582, 1.011895816],
    ),
    "softmax, causal": (
        {"causal": True}, {"eps": 0.0},
        [1.711233598, -0.562625682, 2.289922925, -0.294280488, 1.059394582, 1.011895816],
    ),
    "relu, two-sided": (
        {"causal": False, "kernel": "relu"}, {"generalized_attention": True},
        [0.957050834, 1.02796989, 0.760412882, -0.413482348, 1.453322227, 1.459620605],
    ),
    "relu, causal": (
        {"causal": True, "kernel": "relu"}, {"generalized_attention": True},
        [1.711233598, -0.562625682, 2.289922925, -0.413482348, 1.453322227, 1.459620605],
    ),
}  # fmt: skip


def weights() -> dict[str, torch.Tensor]:
    names = {f"{n}_proj.weight": 0.4 * wave(D, D, step=0.1 + i / 7) for i, n in enumerate("qkvo")}
    return {**names, "o_proj.bias": wave(D, step=0.3), "projection_MK": 1.4 * wave(M, K, step=0.7)}


def ours(options) -> Performer:
    mixer = Performer(PerformerConfig(num_heads=H, head_dim=K, num_features=M, out_bias=True, **options), D).double()
    mixer.load_state_dict(weights())
    return mixer


def theirs(options, peer_options, monkeypatch):
    """performer-pytorch's layer with the same weights. Its eps is no option there, so it is bound to the kernel."""
    peer = pytest.importorskip("performer_pytorch.performer_pytorch", reason="performer-pytorch is not installed")
    peer_options = dict(peer_options)
    if "eps" in peer_options:
        monkeypatch.setattr(peer, "softmax_kernel", partial(peer.softmax_kernel, eps=peer_options.pop("eps")))
    layer = peer.SelfAttention(D, heads=H, dim_head=K, nb_features=M, causal=options["causal"], **peer_options)
    if options["causal"]:  # the one in plain torch, whatever is installed; and no eps in its denominator
        layer.fast_attention.causal_linear_fn = partial(peer.causal_linear_attention_noncuda, eps=0.0)
    names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out"}
    own = {name: weight for name, weight in weights().items() if name != "projection_MK"}
    state = {names[name.split(".")[0]] + "." + name.split(".")[1]: weight for name, weight in own.items()}
    state["fast_attention.projection_matrix"] = weights()["projection_MK"]
    layer.double().load_state_dict(state)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_performer_pytorch(kind, monkeypatch):
    options, peer_options, _ = KINDS[kind]
    peer, mixer = theirs(options, peer_options, monkeypatch), ours(options)
    x_BLD = wave(B, L, D, step=0.9).requires_grad_()
    expected, got = peer(x_BLD), mixer(x_BLD)[0]
    assert largest_error(got, expected) < 1e-10
    if kind != "softmax, two-sided":  # the peer's gradient leaves the stabilisers out, which with eps do not cancel
        gradients = [torch.autograd.grad(y, x_BLD, wave(B, L, D, step=0.2))[0] for y in (got, expected)]
        assert largest_error(*gradients) < 1e-9
    with torch.no_grad():
        single = x_BLD.float()
        assert largest_error(mixer.float()(single)[0], peer.float()(single)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_values_of_performer_pytorch(kind):
    options, _, values = KINDS[kind]
    with torch.no_grad():
        y_BLD, _ = ours(options)(wave(B, L, D, step=0.9))
    assert corners(y_BLD) == pytest.approx(values, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("options", [
    {"row_norms": "fixed", "rotary": {"theta": 100.0}}, {"kernel": "relu", "num_kv_heads": 1}, {"eps": 0.0},
    {"causal": False, "eps": 0.0}, {"causal": False, "kernel": "relu"}, {"num_features": 70, "value_head_dim": 6},
], ids=str)  # fmt: skip
def test_variants_obey_the_laws(options):
    check_mixer("performer", config=options, seed=2)


# --- Features ------------------------------------------------------------------------------------------------------


def test_features_are_orthogonal_in_blocks_and_gaussian_in_length():
    torch.manual_seed(0)
    w_MK = orthogonal_features(4000, 16)
    block = torch.nn.functional.normalize(w_MK[:16], dim=1)
    torch.testing.assert_close(block @ block.mT, torch.eye(16), atol=1e-5, rtol=0)
    squares = w_MK.square().sum(1)  # chi-squared with 16 degrees of freedom: mean 16, variance 32
    assert squares.mean().item() == pytest.approx(16, abs=0.4)
    assert squares.var().item() == pytest.approx(32, rel=0.15)
    assert w_MK.mean(0).abs().max() < 0.08  # directions have no preferred sign
    assert (w_MK.mT @ w_MK / 4000 - torch.eye(16)).abs().max() < 0.1
    fixed = orthogonal_features(24, 16, "fixed").square().sum(1)
    torch.testing.assert_close(fixed, torch.full((24,), 16.0))


def test_features_are_an_unbiased_softmax_kernel():
    """Lemma 1: the mean of phi(q) . phi(k) over draws is exp(q . k)."""
    torch.manual_seed(0)
    q_K, k_K = 0.4 * torch.randn(2, 8, dtype=torch.double)
    w_MK = torch.cat([orthogonal_features(8, 8) for _ in range(10000)]).double()
    phi_q, phi_k = (torch.exp(w_MK @ x - x.square().sum() / 2) for x in (q_K, k_K))
    assert (phi_q * phi_k).mean().item() == pytest.approx(torch.exp(q_K @ k_K).item(), rel=0.05)


def test_a_new_model_draws_features_for_each_layer():
    torch.manual_seed(0)
    model = zoo.create_model("performer-tiny").model
    one, two = (block.mixer.projection_MK for block in model.layers)
    assert one.shape == (44, 16)  # int(16 ln 16)
    assert not torch.equal(one, two)
    assert one.square().sum(1).mean().item() == pytest.approx(16, rel=0.25)
    assert model.layers[0].mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("causal", [True, False])
def test_keys_of_any_size_stay_finite(causal):
    """exp(w . k - |k|^2 / 2) of such keys is 0 even in float64 without the stabilisers."""
    torch.manual_seed(0)
    mixer = Performer(PerformerConfig(num_heads=2, head_dim=8, causal=causal, eps=0.0), 16)
    with torch.no_grad():
        mixer.q_proj.weight.mul_(0.1)
        mixer.k_proj.weight.mul_(200)
    x_BLD = torch.randn(1, 40, 16).requires_grad_()
    y_BLD, _ = mixer(x_BLD)
    assert y_BLD.isfinite().all()
    assert torch.autograd.grad(y_BLD.sum(), x_BLD)[0].isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_long_keys_keep_their_weights(causal):
    """Adding the same large number to every exponent of a key changes nothing."""
    torch.manual_seed(0)
    mixer = Performer(PerformerConfig(num_heads=2, head_dim=8, causal=causal, eps=0.0, qkv_bias=True), 16)
    x_BLD = torch.randn(1, 40, 16)
    with torch.no_grad():
        mixer.k_proj.bias.fill_(25.0)  # |k|^2 / 2 is above 800: exp(-800) is 0
        y_BLD = mixer(x_BLD)[0]
        exact = mixer.double()(x_BLD.double())[0]
    assert exact.abs().max() > 0.1
    assert largest_error(y_BLD, exact) < 1e-3


def test_eps_in_causal_softmax_is_refused():
    with pytest.raises(ConfigError, match=r"eps \(0.001\) would let early positions see late keys"):
        PerformerConfig.parse({"num_heads": 2, "head_dim": 8, "eps": 1e-3})


def test_features_are_drawn_again():
    mixer = Performer(PerformerConfig(num_heads=2, head_dim=8, redraw_every=3), 16)
    x_BLD, before = torch.randn(1, 5, 16), mixer.projection_MK.clone()
    changed = []
    for _ in range(8):
        mixer(x_BLD)
        changed.append(not torch.equal(mixer.projection_MK, before))
        before = mixer.projection_MK.clone()
    assert changed == [False, False, False, True, False, False, True, False]
    mixer.eval()
    for _ in range(8):
        mixer(x_BLD)
    assert torch.equal(mixer.projection_MK, before)
    mixer.redraw()
    assert not torch.equal(mixer.projection_MK, before)


def test_recomputed_activations_are_not_a_step():
    mixer = Performer(PerformerConfig(num_heads=2, head_dim=8, redraw_every=5), 16)
    x_BLD = torch.randn(1, 5, 16).requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda x: mixer(x)[0], x_BLD, use_reentrant=False).sum().backward()
    assert int(mixer.steps) == 1


# --- From attention and names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_conversion_comes_closer_with_more_features_and_with_training(causal):
    attention = teacher(causal=causal, sharpness=0.4)
    few, default, many = (
        convert(attention, "performer", **o) for o in ({"num_features": 8}, {}, {"num_features": 4096})
    )
    errors = [relative_error(student, attention) for student in (few, default, many)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.1
    align(default, attention)
    assert relative_error(default, attention) < 0.8 * errors[1]


@pytest.mark.parametrize(("name", "millions"), [("performer-25m", 18.9), ("performer-76m", 75.6)])
def test_sizes_of_the_paper(name, millions):
    assert parameters(name)[1] / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", ["performer-tiny", "performer-encoder-tiny"])
def test_tiny_models_train(name):
    assert parameters(name)[0] < 1e6
    model = zoo.create_model(name)
    tokens_BL = torch.randint(0, 256, (2, 12))
    loss = model(tokens_BL, labels=tokens_BL).loss
    loss.backward()
    assert loss.isfinite()
