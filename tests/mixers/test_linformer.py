"""Linformer: parity with the package of that name, sharing, lengths, what it refuses, conversion."""

from __future__ import annotations

import pytest
import torch
from formulas import align, convert, corners, largest_error, parameters, relative_error, teacher, text_like, wave

import zoo
from zoo.convert.surgery import layer_options
from zoo.errors import ConfigError, TraitError
from zoo.mixers.linformer import Linformer, LinformerConfig, stretched_rows, tokens_per_piece
from zoo.models.backbone import ZooModel
from zoo.testing import check_mixer

B, D, H, K, N, M = 2, 32, 4, 8, 70, 12
# Options here, what the peer is called with, the length, and `corners` of what linformer 0.2.3 gives.
KINDS = {
    "heads": ({}, {}, N, [-2.440756862, 1.41989765, -3.424504113, -0.593578503, 1.610878947, 0.624230917]),
    "heads, shorter": ({}, {}, 41, [-1.398652496, 2.609611229, -2.144472742, 0.656148887, 2.597415595, 0.826743623]),
    "multi-query": (
        {"num_kv_heads": 1},
        {"one_kv_head": True},
        N,
        [0.069590487, -1.807701433, 3.470007845, 1.302980581, 1.606473198, 4.168761007],
    ),
    "kv": (
        {"share": "kv"},
        {"share_kv": True},
        N,
        [-2.373982465, -0.190746571, 2.709817454, -2.142989718, 1.380956819, 1.155872377],
    ),
}


def weights(options) -> dict[str, torch.Tensor]:
    rows = K if "num_kv_heads" in options else D
    state = {"q_proj.weight": 0.4 * wave(D, D, step=0.1), "k_proj.weight": 0.4 * wave(rows, D, step=0.3)}
    state |= {"v_proj.weight": 0.4 * wave(rows, D, step=0.7), "o_proj.weight": 0.4 * wave(D, D, step=0.9)}
    state |= {"o_proj.bias": wave(D, step=0.3), "k_sums": 0.3 * wave(N, M, step=0.2)}
    if options.get("share") == "kv":  # the package then takes the projected keys for values, too
        return {**state, "v_proj.weight": state["k_proj.weight"]}
    return {**state, "v_sums": 0.3 * wave(N, M, step=1.1)}


def ours(options) -> Linformer:
    config = LinformerConfig(num_heads=H, head_dim=K, max_length=N, projected_length=M, out_bias=True, **options)
    mixer = Linformer(config, D).double()
    mixer.load_state_dict(weights(options))
    return mixer


def theirs(options, peer_options):
    peer = pytest.importorskip("linformer.linformer", reason="linformer is not installed")
    layer = peer.LinformerSelfAttention(D, N, k=M, heads=H, **peer_options).double()
    names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out"}
    names |= {"k_sums": "proj_k", "v_sums": "proj_v"}
    state = {}
    for name, weight in weights(options).items():
        first, *rest = name.split(".")
        state[".".join([names[first], *rest])] = weight
    if "share_kv" in peer_options:
        del state["to_v.weight"]
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_the_package(kind):
    options, peer_options, length, _ = KINDS[kind]
    peer, mixer = theirs(options, peer_options), ours(options)
    x_BLD = wave(B, length, D, step=0.9).requires_grad_()
    expected, got = peer(x_BLD), mixer(x_BLD)[0]
    assert largest_error(got, expected) < 1e-10
    gradients = [torch.autograd.grad(y, x_BLD, wave(B, length, D, step=0.2))[0] for y in (got, expected)]
    assert largest_error(*gradients) < 1e-9
    with torch.no_grad():
        single = x_BLD.float()
        assert largest_error(mixer.float()(single)[0], peer.float()(single)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_values_of_the_package(kind):
    options, _, length, values = KINDS[kind]
    with torch.no_grad():
        y_BLD, _ = ours(options)(wave(B, length, D, step=0.9))
    assert corners(y_BLD) == pytest.approx(values, rel=1e-6, abs=1e-8)


# Our name of a sharing, linformer-pytorch's, and `corners` of two whole layers of linformer-pytorch 0.19.3.
SHARINGS = {
    "none": ("none", [0.83231747, -0.272601172, 0.654121416, 0.929260213, -0.287881375, 0.667673952]),
    "heads": ("headwise", [0.718666875, -0.251975685, 0.581608265, 0.771476175, -0.224287502, 0.606097795]),
    "kv": ("kv", [1.090786336, -0.179878951, 0.189354375, 0.997833603, -0.213619176, 0.167306975]),
    "layers": ("layerwise", [1.025909427, -0.115529431, 0.077726915, 0.985067015, -0.141696195, 0.077975881]),
}


def encoder(share: str) -> ZooModel:
    """Two post-norm layers whose weights are made from a formula."""
    options = {"num_heads": H, "head_dim": K, "max_length": N, "projected_length": M, "out_bias": True, "share": share}
    layer = {"mixer": {"name": "linformer", **options}, "ffn": {"name": "mlp", "hidden_size": 48, "activation": "gelu"}}
    config = zoo.ZooConfig(
        task="masked-lm", hidden_size=D, block="post_norm", norm="layer_norm", final_norm=False, layers=[layer, layer]
    )
    model = ZooModel(config).double().eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.3 * wave(*p.shape, step=0.11 + 0.05 * i))
    return model


def copy_to_linformer_pytorch(model: ZooModel, peer) -> None:
    """Our heads, side by side, into theirs, a module a head; their E and F have biases, which the paper has not."""
    for i, block in enumerate(model.layers):
        attention, feed, ours = peer.seq[2 * i], peer.seq[2 * i + 1], block.mixer
        for h, head in enumerate(attention.fn.heads):
            k_sums = ours.holder.k_sums
            v_sums = ours.v_sums if ours.separate else k_sums
            for projection, sums in ((head.E, k_sums), (head.F, v_sums)):
                projection.weight.copy_((sums[h] if sums.dim() == 3 else sums).T)
                projection.bias.zero_()
            for name in "qkv":
                rows = getattr(ours, f"{name}_proj").weight[h * K : (h + 1) * K]
                getattr(attention.fn, f"to_{name}")[h].weight.copy_(rows)
        pairs = [(attention.fn.w_o, ours.o_proj), (attention.norm, block.mixer_norm), (feed.norm, block.ffn_norm)]
        for theirs, mine in [*pairs, (feed.fn.w_1, block.ffn.up_proj), (feed.fn.w_2, block.ffn.down_proj)]:
            theirs.load_state_dict(mine.state_dict())


@pytest.mark.parametrize("share", SHARINGS)
def test_every_sharing_is_that_of_linformer_pytorch(share):
    peers = pytest.importorskip("linformer_pytorch.linformer_pytorch", reason="linformer-pytorch is not installed")
    sharing, values = SHARINGS[share]
    peer = peers.Linformer(N, D, M, dim_ff=48, nhead=H, depth=2, parameter_sharing=sharing).double().eval()
    model, x_BLD = encoder(share), wave(B, N, D, step=0.9).requires_grad_()
    with torch.no_grad():
        copy_to_linformer_pytorch(model, peer)
    expected, got = peer(x_BLD), model(inputs_embeds=x_BLD).last_hidden_state
    assert largest_error(got, expected) < 1e-10
    gradients = [torch.autograd.grad(y, x_BLD, wave(B, N, D, step=0.2))[0] for y in (got, expected)]
    assert largest_error(*gradients) < 1e-9
    assert corners(expected) == pytest.approx(values, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("share", SHARINGS)
def test_recorded_values_of_linformer_pytorch(share):
    with torch.no_grad():
        y_BLD = encoder(share)(inputs_embeds=wave(B, N, D, step=0.9)).last_hidden_state
    assert corners(y_BLD) == pytest.approx(SHARINGS[share][1], rel=1e-6, abs=1e-8)


def test_projections_of_every_head_are_its_own():
    """With "none", equal E and F in all heads are the shared ones, and one head's changes only that head."""
    shared, own = ours({}), ours({}).config.model_copy(update={"share": "none"})
    mixer = Linformer(own, D).double()
    state = weights({})
    mixer.load_state_dict({**state, **{n: state[n].expand(H, -1, -1) for n in ("k_sums", "v_sums")}})
    x_BLD = wave(B, N, D, step=0.9)
    with torch.no_grad():
        shared.o_proj.weight.copy_(torch.eye(D))
        mixer.o_proj.weight.copy_(torch.eye(D))
        expected = shared(x_BLD)[0]
        torch.testing.assert_close(mixer(x_BLD)[0], expected)
        mixer.v_sums[1].mul_(-1)
        changed = (mixer(x_BLD)[0] - expected).abs().amax((0, 1)).unflatten(0, (H, K)).amax(1) > 1e-6
    assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("options", [
    {"share": "none", "num_kv_heads": 2}, {"share": "kv", "rotary": {"theta": 100.0}}, {"projected_length": 90},
    {"by_length": True}, {"by_length": True, "num_kv_heads": 2, "projected_length": 90},
    {"by_length": True, "contiguous": True, "share": "none", "num_kv_heads": 2},
    {"by_length": True, "contiguous": True, "projected_length": 90},
], ids=str)  # fmt: skip
def test_variants_obey_the_laws(options):
    check_mixer("linformer", config={"causal": False, **options}, seed=2)


# --- What it refuses -----------------------------------------------------------------------------------------------


def test_causal_use_is_refused():
    with pytest.raises(TraitError, match=r"'linformer' has no causal form \(traits.causal is False\)"):
        Linformer(LinformerConfig(num_heads=2, head_dim=4, causal=True), 8)
    with pytest.raises(TraitError, match=r"cannot replace attention in a causal language model .* choose from"):
        layer_options({"name": "linformer"}, teacher(causal=True).attention_weights())


def test_a_state_is_refused():
    mixer = Linformer(LinformerConfig(num_heads=2, head_dim=4), 8)
    with pytest.raises(TraitError, match="two-sided here"):
        mixer(torch.zeros(1, 3, 8), state=mixer.init_state(1))


def test_only_tokens_count_towards_the_length():
    mixer = Linformer(LinformerConfig(num_heads=2, head_dim=4, max_length=6, projected_length=3), 8)
    x_BLD = torch.randn(1, 9, 8)
    with pytest.raises(ConfigError, match="a sequence of 9 tokens, but linformer's max_length is 6"):
        mixer(x_BLD)
    mask_BL = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1]]).bool()
    torch.testing.assert_close(mixer(x_BLD, mask_BL=mask_BL)[0][mask_BL], mixer(x_BLD[:, mask_BL[0]])[0][0])
    segments_BL = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(mixer(x_BLD, segments_BL=segments_BL)[0][:, 4:], mixer(x_BLD[:, 4:])[0])
    with pytest.raises(ConfigError, match="a sequence of 7 tokens"):
        mixer(x_BLD, segments_BL=torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]]))


# --- Start, conversion, names --------------------------------------------------------------------------------------


def test_projections_start_as_in_the_theorems():
    torch.manual_seed(0)
    mixer = zoo.create_model("linformer-tiny").model.layers[1].mixer
    for sums in (mixer.k_sums, mixer.v_sums):
        assert sums.shape == (128, 32)
        assert sums.std().item() == pytest.approx(32**-0.5, rel=0.05)
        assert abs(sums.mean().item()) < 0.01


@pytest.mark.parametrize("share", SHARINGS)
def test_conversion_is_exact_without_a_projection_and_close_with_one(share):
    attention = teacher(causal=False)
    options = {"max_length": 48, "share": share}
    whole, half, few = (
        convert(attention, "linformer", projected_length=m, by_length=False, **options) for m in (48, 24, 6)
    )
    assert relative_error(whole, attention) < 1e-5
    start = relative_error(half, attention)
    assert 1e-3 < start < relative_error(few, attention)
    align(half, attention, steps=60, rate=1e-3)
    # Inputs without any structure: nothing makes sums of their keys good.
    assert relative_error(half, attention) < 0.95 * start


def test_by_length_is_the_formula():
    """Sums of T tokens over those that there are, each in place of as many keys as it holds."""
    mixer, T = ours({"by_length": True}), 29  # sums of 3 and of 2 tokens
    x_BLD = wave(B, T, D, step=0.9)
    q, k, v = (p(x_BLD).unflatten(-1, (H, K)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    count = [len(range(j, T, M)) for j in range(M)]
    assert set(count) == {2, 3}
    outputs = torch.zeros(B, H, T, K, dtype=torch.double)
    weights = torch.zeros(B, H, T, dtype=torch.double)
    for j in range(M):
        key, value = (sum(e[t, j] * x[:, :, t] for t in range(T)) / count[j] for e, x in
                      ((mixer.k_sums, k), (mixer.v_sums, v)))  # fmt: skip
        weight = count[j] * (K**-0.5 * (q * key[:, :, None]).sum(-1)).exp()
        outputs, weights = outputs + weight[..., None] * value[:, :, None], weights + weight
    expected = mixer.o_proj((outputs / weights[..., None]).transpose(1, 2).flatten(2))
    assert largest_error(mixer(x_BLD)[0], expected) < 1e-10


@pytest.mark.parametrize(
    ("length", "n", "sums"), [(7, 80, 9), (9, 80, 9), (5, 11, 9), (30, 80, 9), (80, 80, 9), (6, 8, 20)]
)
def test_stretched_rows_make_pieces_of_neighbours(length, n, sums):
    """Each token in a piece of its own as long as there are pieces; beyond, pieces of about the same size, in order."""
    rows_RT = stretched_rows(torch.tensor([length, 0]), length + 3, n, sums)
    piece_T = rows_RT[0, :length] * sums // n
    assert rows_RT.min() >= 0
    assert rows_RT.max() < n
    assert (rows_RT[0, :length].diff() > 0).all()
    assert (piece_T.diff() >= 0).all()
    count_RM = tokens_per_piece(rows_RT, torch.tensor([length, 0]), n, sums)
    assert count_RM[0].sum() == length
    assert count_RM[1].tolist() == [1] + [0] * (sums - 1)
    if length <= min(n, sums):
        assert count_RM[0].max() == 1
    else:
        assert count_RM[0].max() - count_RM[0].min() <= 1


def test_contiguous_sums_start_nearer_where_neighbours_resemble_each_other():
    attention, x_BLD = teacher(causal=False), text_like(8)
    options = {"max_length": 96, "projected_length": 12}
    near, far = (convert(attention, "linformer", **options, contiguous=c) for c in (True, False))
    assert relative_error(near, attention, x_BLD=x_BLD) < 0.3 * relative_error(far, attention, x_BLD=x_BLD)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("share", SHARINGS)
def test_conversion_by_length_is_exact_up_to_the_number_of_sums(share, contiguous):
    """Also for rows of several lengths in one batch, where the paper's form is far off."""
    attention = teacher(causal=False)
    student, paper = (
        convert(attention, "linformer", projected_length=24, max_length=96, share=share, **o)
        for o in ({"contiguous": contiguous}, {"by_length": False})
    )
    x_BLD = torch.randn(3, 40, attention.width)
    mask_BL = torch.arange(40) < torch.tensor([24, 7, 1])[:, None]
    with torch.no_grad():
        expected = attention(x_BLD, mask_BL=mask_BL)[0][mask_BL]
        torch.testing.assert_close(student(x_BLD, mask_BL=mask_BL)[0][mask_BL], expected, atol=1e-5, rtol=0)
        assert largest_error(paper(x_BLD, mask_BL=mask_BL)[0][mask_BL], expected) > 0.1
    assert relative_error(student, attention, 24) < 1e-5
    start = relative_error(student, attention, 48)
    assert 1e-3 < start < 1.2 * relative_error(paper, attention, 48)
    align(student, attention, steps=60, rate=1e-3)
    assert relative_error(student, attention, 48) < start


@pytest.mark.parametrize(
    ("name", "millions"), [("linformer-128m", 127.2), ("linformer-126m", 125.6), ("linformer-124m", 124.2)]
)
def test_sizes(name, millions):
    """RoBERTa-base has 124.05 million without head and pooler (with 512 positions, one token type); E and F add."""
    assert parameters(name)[0] / 1e6 == pytest.approx(millions, rel=2e-3)


def test_the_tiny_model_trains():
    assert parameters("linformer-tiny")[0] < 1e6
    model = zoo.create_model("linformer-tiny")
    tokens_BL = torch.randint(0, 256, (2, 12))
    loss = model(tokens_BL, labels=tokens_BL).loss
    loss.backward()
    assert loss.isfinite()
