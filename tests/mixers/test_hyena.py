"""Hyena: the authors' values, causal and two-sided, its filters, decoding, initialisation, its start from attention.

Recorded values come from the authors' files, with every weight from a formula:
    git clone https://github.com/HazyResearch/safari; git clone https://github.com/HazyResearch/m2
    pip install einops opt_einsum; python tests/mixers/test_hyena.py safari m2
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from formulas import (
    align,
    convert,
    corners,
    fading_average,
    largest_error,
    measured,
    parameters,
    relative_error,
    teacher,
    wave,
)

import zoo
from zoo.errors import ConfigError, ConversionError, TraitError
from zoo.mixers.hyena import Hyena, HyenaConfig
from zoo.testing import check_mixer

B, L, D, T = 2, 20, 6, 32
SIZES = {"window": T, "filter_size": 5, "filter_features": 7, "frequency": 2.0}

# HyenaOperator of standalone_hyena.py of safari at 02220c69, order 3, in float64: output, gradients of its square.
SAFARI = {
    "y": [0.5959117, -0.6008264, 0.2570912, 0.6861457, -0.507149, 0.2694198],
    "x": [0.363447, -1.2065826, -0.5436421, -0.0024436, -0.0723055, -0.061911],
    "filter.last_weight": [2.2894375, 38.127683, 58.1885884, 0.0090987, -0.0385801, 0.0283897],
    "filter.frequency": [-27.1193155, 20.9273847, 15.865569, 15.865569, 25.5410063, 11.0044023],
    "positions": [46.5901277, 22.8677872, -4.2671138, 0.0, 0.0, 0.0],
}
# MonarchMixerSequenceMixing of m2 at 7d359e8c, bidirectional.
M2 = {
    "y": [0.493698, 0.3581508, -0.0557185, 0.4418644, 0.3760149, -0.1296285],
    "x": [7.8038069, 10.0494559, 3.5810802, -0.8966999, 0.7099219, 1.0196387],
    "filter_back.last_weight": [60.4453002, -102.5512392, -91.8004912, 0.6164361, 0.0068091, -0.259534],
    "skip": [-11.5875255, -0.7424244, -4.4786037, 7.3533285, -2.2987695, 1.1337191],
}


def by_formula(**options) -> Hyena:
    """A layer whose every weight is a formula; positions and decays are those it starts with."""
    mixer = Hyena(HyenaConfig(**SIZES, **options), D).double()
    with torch.no_grad():
        for i, (name, p) in enumerate(mixer.named_parameters()):
            if name != "positions":
                p.copy_(0.6 * wave(*p.shape, step=0.3 + 0.11 * i) + 2.0 * name.endswith("frequency"))
        if mixer.filter_back is not None:
            mixer.filter_back.frequency.copy_(mixer.filter.frequency)  # M2's two networks share their sines
    return mixer


def values(run, weights: dict[str, torch.Tensor], names) -> dict[str, list[float]]:
    """Corners of the output of `run` and of gradients of the sum of its squares, by our names."""
    x_BLD = wave(B, L, D, step=0.7).requires_grad_()
    y_BLD = run(x_BLD)
    tensors = {"x": x_BLD, **weights}
    wanted = [name for name in names if name != "y"]
    gradients = torch.autograd.grad(y_BLD.square().sum(), [tensors[name] for name in wanted])
    found = {"y": corners(y_BLD)}
    for name, g in zip(wanted, gradients, strict=True):
        found[name] = corners(g) if name == "x" else [*g.flatten()[:3].tolist(), *g.flatten()[-3:].tolist()]
    return found


@pytest.mark.parametrize(
    ("recorded", "options"), [(SAFARI, {"order": 3}), (M2, {"causal": False})], ids=["safari", "m2"]
)
def test_layer_is_the_authors(recorded, options):
    mixer = by_formula(**options)
    found = values(lambda x: mixer(x)[0], dict(mixer.named_parameters()), recorded)
    for name, expected in recorded.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_filters_are_their_formula():
    """One tap of one channel, written out."""
    mixer = by_formula(order=3)
    kernel_NET, back = mixer.kernels(L)
    assert back is None
    assert kernel_NET.shape == (2, D, L)
    n, e, t = 1, 4, 13
    bands = torch.tensor([1e-4, 1.00005, 2.0])
    angle_F = 2 * math.pi * t / T * bands
    z_F = torch.cat([torch.tensor([t / (T - 1)]), angle_F.cos(), -angle_F.sin()])
    net = mixer.filter
    h = (net.frequency * (net.first_weight @ z_F.double() + net.first_bias)).sin()
    for weight, bias in zip(net.inner_weight, net.inner_bias, strict=True):
        h = (net.frequency * (weight @ h + bias)).sin()
    channel = n * D + e
    rate = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, 2 * D)[channel].item()
    expected = (net.last_weight[channel] @ h) * math.exp(-rate * t / (T - 1))
    assert kernel_NET[n, e, t].item() == pytest.approx(expected.item(), rel=1e-5)
    assert mixer.kernels(5 * T)[0].shape[2] == T
    plain = by_formula(order=3, modulate=False).kernels(L)[0]
    assert plain[n, e, t].item() == pytest.approx((net.last_weight[channel] @ h).item(), rel=1e-5)


@torch.no_grad()
def test_a_text_longer_than_the_filters_is_seen_as_far_as_they_reach():
    mixer = by_formula()
    x_BLD = wave(1, 3 * T, D, step=0.7)
    y_BLD = mixer(x_BLD)[0]
    assert largest_error(mixer(x_BLD[:, :T])[0], y_BLD[:, :T]) < 1e-10
    recent = mixer(x_BLD[:, 2 * T - 2 :])[0]  # two more, for the short convolution
    assert largest_error(recent[:, -1], y_BLD[:, -1]) < 1e-10


@torch.no_grad()
def test_decoding_keeps_filters_until_a_weight_changes():
    mixer = by_formula()
    x_BLD = wave(B, L, D, step=0.7)

    def steps(state, places):
        outputs = []
        for t in places:
            y, state = mixer(x_BLD[:, t : t + 1], state=state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    whole = mixer(x_BLD)[0]
    first, state = steps(mixer.init_state(B).map(torch.Tensor.double), range(9))
    kept = mixer._kept[1]
    second, state = steps(state, range(9, 12))
    assert largest_error(torch.cat([first, second], 1), whole[:, :12]) < 1e-10
    assert mixer._kept[1] is kept
    mixer.filter.last_weight.mul_(2)
    changed = mixer(x_BLD)[0]
    mixer.filter.last_weight.mul_(0.5)
    steps(state.clone(), range(12, 13))
    mixer.filter.last_weight.mul_(2)
    assert largest_error(steps(state, range(12, 13))[0], changed[:, 12:13]) < 1e-10


@pytest.mark.parametrize("options", [
    {"order": 3, "filter_layers": 0, "inner_size": 12, "learn_decay": True}, {"window": 1, "conv": 1},
    {"window": 200, "causal": False, "order": 4, "decay_shift": 0.1},
], ids=str)  # fmt: skip
def test_variants_obey_the_laws(options):
    check_mixer("hyena", config=options, seed=2)


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="make an odd number; 8 is not, try 9"):
        HyenaConfig.parse({"filter_features": 8})
    with pytest.raises(ConfigError, match="order: input should be greater than or equal to 2"):
        HyenaConfig.parse({"order": 1})
    mixer = by_formula(causal=False)
    with pytest.raises(TraitError, match="two-sided"):
        mixer(torch.zeros(1, 3, D).double(), state=mixer.init_state(1))


def test_initialisation_by_its_statistics():
    torch.manual_seed(0)
    mixer = zoo.create_model(
        "hyena-tiny", layers={"num_hidden_layers": 1, "defaults": {"filter_size": 64, "out_init": 0.25}}
    ).model.layers[0].mixer  # fmt: skip
    net = mixer.filter
    for weight, std in ((net.first_weight, 0.02), (net.inner_weight, 0.02), (net.last_weight, 0.02), (mixer.skip, 1.0)):
        assert weight.std().item() == pytest.approx(std, rel=0.2)
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.o_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)
    for weight in (mixer.conv.weight, mixer.conv.bias):  # uniform in 1 / sqrt(3)
        assert weight.std().item() == pytest.approx(1 / 3, rel=0.1)
        assert weight.abs().max() <= 3**-0.5
    assert not net.first_bias.any()
    assert not net.inner_bias.any()
    assert (net.frequency == 14).all()
    assert mixer.decay[[0, -1]].tolist() == pytest.approx([math.log(100) / 1.5, math.log(100) / 0.3])


def test_sizes():
    """safari's README: 153M for the small model; HyenaDNA's configs, layer by layer."""
    inside = 864 * (3 * 864 + 1) + 2 * 864 + 3 * 864 * 5 - 864  # in_proj, its bias, short filter, long filter's skip
    network = 34 * 64 + 2 * 65 * 64 + 64 + 64 * 864 + 2048 * 33
    layer = inside + 864 * 864 + network + 864 * 1728 * 2 + 1728 + 864 + 4 * 864
    assert parameters("hyena-153m")[0] == pytest.approx(50264 * 864 + 18 * layer + 2 * 864, rel=1e-3)
    assert parameters("hyena-153m")[0] == pytest.approx(153e6, rel=0.01)
    assert parameters("hyena-dna-6.6m")[0] == 16 * 256 + 8 * 818240 + 512


# --- From attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_starts_as_a_fading_average_of_the_values(causal, order):
    attention, half_life_H = teacher(causal=causal, kv_heads=2), torch.tensor([1.0, 3.0, 9.0, 30.0])
    attention.v_proj.bias.zero_()  # which would be averaged too, over fewer tokens at the start of a text
    student = convert(attention, "hyena", measured(half_life_H), window=64, order=order)
    x_BLD = torch.randn(2, 40, 32)
    assert largest_error(student(x_BLD)[0], fading_average(attention, x_BLD, half_life_H)) < 1e-4


@pytest.mark.parametrize("causal", [True, False])
def test_alignment_improves_the_start(causal):
    attention = teacher(causal=causal)
    student = convert(attention, "hyena", window=64)
    start = relative_error(student, attention)
    assert start < 1
    align(student, attention, steps=25)
    assert relative_error(student, attention) < 0.9 * start


def test_what_a_conversion_needs():
    weights = teacher(causal=True).attention_weights()
    with pytest.raises(ConversionError, match="needs inner_size 32, modulate and decay_shift 0; got inner_size 16"):
        Hyena.from_attention(Hyena.config_from_attention(weights, inner_size=16), weights)


# --- The authors' files --------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(theirs, ours: Hyena, filter_fn, tables, order=None) -> dict[str, torch.Tensor]:
    """Our weights in their layer; theirs by our names. `order` permutes the blocks of the input projection."""
    rows = torch.arange(ours.in_proj.out_features).unflatten(0, (-1, D))[order or slice(None)].flatten()
    linear_in, linear_out = tables
    for theirs_p, ours_p in (
        (linear_in.weight, ours.in_proj.weight[rows]),
        (linear_in.bias, ours.in_proj.bias[rows]),
        (theirs.short_filter.weight, ours.conv.weight[rows, None]),
        (theirs.short_filter.bias, ours.conv.bias[rows]),
        (linear_out.weight, ours.o_proj.weight),
        (linear_out.bias, ours.o_proj.bias),
        (filter_fn.bias, ours.skip.flatten()),
    ):
        theirs_p.copy_(theirs_p.new_tensor(ours_p.numpy()))
    named = {"positions": filter_fn.pos_emb.z, "skip": filter_fn.bias}
    for name, net in (("filter", "implicit_filter"), ("filter_back", "implicit_filter_rev")):
        if getattr(ours, name) is None or not hasattr(filter_fn, net):
            continue
        own, layers = getattr(ours, name), getattr(filter_fn, net)
        layers[0].weight.copy_(own.first_weight)
        layers[0].bias.copy_(own.first_bias)
        layers[1].freq.copy_(own.frequency)
        for i in range(2):
            layers[2 + 2 * i].weight.copy_(own.inner_weight[i])
            layers[2 + 2 * i].bias.copy_(own.inner_bias[i])
        layers[-1].weight.copy_(own.last_weight)
        named |= {f"{name}.last_weight": layers[-1].weight, f"{name}.frequency": layers[1].freq}
    assert largest_error(filter_fn.pos_emb.z[0], ours.positions) < 1e-5
    return named


def main(safari: str, m2: str) -> None:
    """Print the recorded values anew."""
    sys.path[:0] = [safari, str(Path(m2) / "bert")]
    from src.mm.monarch_mixer_sequence_mixer import MonarchMixerSequenceMixing
    from standalone_hyena import HyenaOperator

    ours = by_formula(order=3)
    theirs = HyenaOperator(D, T, order=3, filter_order=5, emb_dim=7).double()
    named = fill(theirs, ours, theirs.filter_fn, (theirs.in_proj, theirs.out_proj))
    found = values(theirs, named, SAFARI)
    print({name: [round(v, 7) for v in numbers] for name, numbers in found.items()})
    ours = by_formula(causal=False)
    theirs = MonarchMixerSequenceMixing(
        D, T, bidirectional=True, hyena_filter_order=5, hyena_emb_dim=7, hyena_kernel_lr=1e-3
    ).double()
    named = fill(theirs, ours, theirs.filter_fn, (theirs.in_linear, theirs.out_linear), [1, 0, 2])
    found = values(lambda x: theirs(x)[0], named, M2)
    print({name: [round(v, 7) for v in numbers] for name, numbers in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
