"""H3: the authors' values in both forms, the S4D within, initialisation, sizes, its start from attention.

Recorded values come from the authors' layer, with every weight from a formula:
    git clone https://github.com/HazyResearch/H3; pip install einops opt_einsum; python tests/mixers/test_h3.py H3
"""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from formulas import align, convert, corners, largest_error, measured, parameters, relative_error, teacher, wave

import zoo
from zoo.errors import ConfigError, ConversionError, TraitError
from zoo.mixers.h3 import H3, H3Config
from zoo.mixers.s4d import S4D, S4DConfig
from zoo.testing import check_mixer

B, L, D, N = 2, 19, 6, 8

# The class H3 of HazyResearch/H3 at 5c4d06b5 (src/models/ssm/h3.py) in float64, heads of one and of three channels:
# the output, and gradients of the sum of its squares.
RECORDED = {
    1: {
        "y": [0.8464254, -0.8334439, -0.5497951, 0.1056601, -1.0642313, 0.3615556],
        "x": [204.438558, -180.320126, 225.9296254, 7.6866046, 11.8270884, 1.6559626],
        "q_proj.weight": [1623.2597652, -1528.9893957, 48.7209958, -8.4060854],
        "shift_C": [1033.156189, 3202.1178591, 30.3019025, -46.0488645],
        "shift_B": [3466.0301373, 5363.1400838, -70.6351169, -74.7744951],
        "log_dt": [-1065.6562198, 32.730144, 20.0263574, -21.376166],
        "B": [1722.162389, -1160.0775214, -14.7358742, -75.6310812],
        "A_imag": [-391.0515247, 390.994998, 31.7252012, -51.6104113],
        "D": [5861.233576, -53.9956025, 250.1223112, -50.307752],
    },
    3: {
        "y": [0.4709969, 1.4122022, -1.1348506, 3.200822, 5.401209, 3.6564555],
        "x": [133.7409184, 184.3538407, 77.5935081, -39.3727053, -93.3431122, 82.5202163],
        "q_proj.weight": [2285.5821106, -1548.868666, 155.6657337, 461.893107],
        "shift_C": [1046.8796395, 3335.0577177, 485.1507992, -619.916148],
        "shift_B": [3227.8476734, 5505.3531775, -1174.9239753, -1451.9707282],
        "log_dt": [-2104.3339965, 1520.4252121, -2104.3339965, 1520.4252121],
        "B": [2077.3312227, -1748.9784797, -810.1847361, -2653.9368629],
        "A_imag": [-466.6777399, 362.5764159, -175.0836162, -871.6908507],
        "D": [7631.4854022, -4327.1319304, 7631.4854022, -4327.1319304],
    },
}
NAMES = ("x", "q_proj.weight", "shift_C", "shift_B", "log_dt", "B", "A_imag", "D")


def by_formula(head_dim: int) -> H3:
    """A layer whose every weight is a formula."""
    mixer = H3(H3Config(head_dim=head_dim, state_dim=N), D).double()
    with torch.no_grad():
        for i, (name, p) in enumerate(mixer.named_parameters()):
            p.copy_(
                0.8 * wave(*p.shape, step=0.3 + 0.11 * i) + {"log_dt": -2, "A_imag": 2, "log_A_real": -1}.get(name, 0)
            )
    return mixer


def values(run, weights: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Corners of the output of `run` and of gradients of the sum of its squares, by our names."""
    x_BLD = wave(B, L, D, step=0.7).requires_grad_()
    y_BLD = run(x_BLD)
    tensors = {"x": x_BLD, **weights}
    found = {"y": corners(y_BLD)}
    for name, g in zip(NAMES, torch.autograd.grad(y_BLD.square().sum(), [tensors[n] for n in NAMES]), strict=True):
        found[name] = corners(g) if name == "x" else [*g.flatten()[:2].tolist(), *g.flatten()[-2:].tolist()]
    return found


@pytest.mark.parametrize("head_dim", RECORDED)
def test_layer_is_the_authors(head_dim):
    mixer = by_formula(head_dim)
    found = values(lambda x: mixer(x)[0], dict(mixer.named_parameters()))
    for name, expected in RECORDED[head_dim].items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim", RECORDED)
@torch.no_grad()
def test_the_recurrence_gives_the_same_values(head_dim):
    mixer, x_BLD = by_formula(head_dim), wave(B, L, D, step=0.7)
    state, outputs = mixer.init_state(B), []
    for t in range(L):
        y, state = mixer(x_BLD[:, t : t + 1], state=state)
        outputs.append(y)
    torch.testing.assert_close(
        torch.tensor(corners(torch.cat(outputs, 1))), torch.tensor(RECORDED[head_dim]["y"]), rtol=1e-5, atol=1e-6
    )


@torch.no_grad()
def test_a_sequential_reading_of_the_formula():
    """Both models as their recurrences, entry by entry, for heads of two channels."""
    mixer, x_BLD, P = by_formula(2), wave(1, L, D, step=0.7), 2
    q, k, v = (getattr(mixer, f"{n}_proj")(x_BLD)[0] for n in "qkv")
    dtA = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag) * mixer.log_dt.exp()[:, None]
    z, taken = (1 + dtA / 2) / (1 - dtA / 2), mixer.log_dt.exp()[:, None] / (1 - dtA / 2)
    B_HN, C_HN = torch.view_as_complex(mixer.B), torch.view_as_complex(mixer.C)
    shift_EN = torch.zeros(D, N).double()
    state_EPN = torch.zeros(D, P, N // 2, dtype=torch.complex128)  # by key channel and value channel of its head
    expected = torch.zeros(L, D).double()
    for t in range(L):
        shift_EN = torch.cat([torch.zeros(D, 1), shift_EN[:, :-1]], 1) + mixer.shift_B * k[t, :, None]
        k_E = (shift_EN * mixer.shift_C).sum(1) + mixer.shift_D * k[t]
        for e in range(D):
            h, own = e // P, slice(e // P * P, e // P * P + P)
            kv_P = k_E[e] * v[t, own]
            state_EPN[e] = z[h] * state_EPN[e] + taken[h] * B_HN[h] * kv_P[:, None]
            expected[t, own] += q[t, e] * (2 * (C_HN[h] * state_EPN[e]).sum(-1).real + mixer.D[h] * kv_P)
    assert largest_error(mixer(x_BLD)[0][0], mixer.o_proj(expected)) < 1e-10


@torch.no_grad()
def test_with_open_gates_it_is_the_ssm_of_s4d():
    mixer, x_BLD = by_formula(1), wave(B, L, D, step=0.7)
    s4d = S4D(S4DConfig(state_dim=N, discretization="bilinear"), D).double()
    for name in ("log_dt", "log_A_real", "A_imag", "C", "D"):
        getattr(s4d, name).copy_(getattr(mixer, name))
    mixer.B.copy_(torch.tensor([1.0, 0.0]))
    mixer.shift_C.zero_()
    mixer.shift_D.fill_(1)
    for name, weight, bias in (("q", 0.0, 1.0), ("k", 0.0, 1.0), ("v", 1.0, 0.0), ("o", 1.0, 0.0)):
        getattr(mixer, f"{name}_proj").weight.copy_(weight * torch.eye(D))
        getattr(mixer, f"{name}_proj").bias.fill_(bias)
    expected = s4d.ssm(x_BLD, None, None, None)[0] + s4d.D * x_BLD
    assert largest_error(mixer(x_BLD)[0], expected) < 1e-10


@pytest.mark.parametrize("options", [
    {"head_dim": 4, "inner_size": 8, "state_dim": 6}, {"discretization": "zoh", "init": "legs", "state_dim": 128},
], ids=str)  # fmt: skip
def test_variants_obey_the_laws(options):
    check_mixer("h3", config=options, seed=2)


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="their number is even; 7 is not"):
        H3Config.parse({"state_dim": 7})
    with pytest.raises(ConfigError, match="head_dim: 6 channels do not divide into heads of 4"):
        H3(H3Config(head_dim=4), D)
    with pytest.raises(TraitError, match="no two-sided form"):
        H3(H3Config(causal=False), D)


def test_initialisation_by_its_statistics():
    torch.manual_seed(0)
    mixer = H3(H3Config(), 256)
    assert torch.equal(mixer.shift_B, torch.eye(64)[0].expand(256, 64))
    assert mixer.shift_C.std().item() == pytest.approx(64**-0.5 / 3**0.5, rel=0.02)  # torch.nn.Conv1d's
    assert mixer.shift_C.abs().max() <= 64**-0.5
    assert torch.allclose(mixer.log_A_real.exp(), torch.tensor(0.5))
    assert torch.allclose(mixer.A_imag, math.pi * torch.arange(32.0).expand(256, 32))
    assert torch.equal(mixer.B, torch.tensor([1.0, 0.0]).expand(256, 32, 2))
    assert mixer.C.square().sum(-1).mean().item() == pytest.approx(1, abs=0.05)
    for skip in (mixer.D, mixer.shift_D):
        assert skip.std().item() == pytest.approx(1, abs=0.15)
    assert math.log(0.001) <= mixer.log_dt.min() < mixer.log_dt.max() <= math.log(0.1)
    assert mixer.log_dt.mean().item() == pytest.approx(math.log(0.01), abs=0.3)


def test_sizes():
    """The README of HazyResearch/H3: widths, layers and heads; examples/README.md: which layers are attention."""
    attention, ffn = 4 * 769 * 768, 768 * 3072 * 2 + 3072 + 768 + 4 * 768
    h3 = attention + 768 * (2 * 64 + 1) + 768 * (1 + 32 + 32 + 64 + 64 + 1)
    assert parameters("h3-125m")[0] == 50264 * 768 + 11 * h3 + attention + 12 * ffn + 2 * 768
    for name, places in {"h3-355m": [8, 16], "h3-1.3b": [8, 16], "h3-2.7b": [8, 16, 24]}.items():
        names = zoo.registry.model_config(name).mixer_names
        assert [i for i, mixer in enumerate(names) if mixer == "attention"] == places


# --- From attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
@torch.no_grad()
def test_starts_as_the_softmax_to_first_order(discretization):
    """With as many ranks as the logits have: sum_s (1 - z) z^(t-s) (1 + logit_ts) v_s."""
    attention = teacher(causal=True)
    half_life_H, weights = torch.tensor([1.0, 3.0, 9.0, 30.0]), attention.attention_weights()
    # Rank 7 of the 8: so let the heads' products have no more.
    for h in range(4):
        weights.q_HKD[8 * h] = 0
        weights.q_bias[8 * h] = 0
    config = H3.config_from_attention(weights, discretization=discretization)
    student = H3.from_attention(config, weights, measured(half_life_H))
    assert student.config.head_dim == 8
    x_BLD = torch.randn(2, 40, 32)
    q, k, v = (getattr(attention, f"{n}_proj")(x_BLD).unflatten(-1, (4, 8)).transpose(1, 2) for n in "qkv")
    q[..., 0] = 0
    logits = (q @ (k - attention.k_proj.bias.view(4, 1, 8)).mT) * 8**-0.5
    age_LL = torch.arange(40)[:, None] - torch.arange(40)
    z_H11 = 2 ** (-1 / half_life_H)[:, None, None]
    fading = torch.where(age_LL >= 0, (1 - z_H11) * z_H11 ** age_LL.clamp(min=0), 0.0)
    expected = attention.o_proj(((fading * (1 + logits)) @ v).transpose(1, 2).flatten(2))
    assert largest_error(student(x_BLD)[0], expected) < 1e-4


@pytest.mark.parametrize("head_dim", [8, 2])
def test_alignment_improves_the_start(head_dim):
    attention = teacher(causal=True)
    student = convert(attention, "h3", head_dim=head_dim, state_dim=8)
    start = relative_error(student, attention)
    assert start < 1
    align(student, attention, steps=15)
    assert relative_error(student, attention) < 0.9 * start


def test_what_a_conversion_needs():
    weights = teacher(causal=True).attention_weights()
    with pytest.raises(ConversionError, match="a head_dim that divides 8, and bias; got inner_size 32, head_dim 16"):
        H3.from_attention(H3.config_from_attention(weights, head_dim=16), weights)


# --- The authors' file ---------------------------------------------------------------------------------------------


def main(repository: str) -> None:
    """Print the recorded values anew."""
    sys.path[:0] = [repository]
    stubs = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.utilities", "scipy")}
    stubs["pytorch_lightning.utilities"].rank_zero_only = lambda function: function  # wanted for a logger only
    stubs["scipy"].special = None  # wanted for other starts only
    sys.modules |= stubs
    from src.models.ssm.h3 import H3 as Theirs

    for head_dim in RECORDED:
        ours, theirs = by_formula(head_dim), Theirs(D, d_state=N, head_dim=head_dim, measure="diag-lin").double()
        shift, diagonal = theirs.ssm_k_kernel.kernel, theirs.kernel.kernel
        named = {"shift_B": shift.B, "shift_C": shift.C, "shift_D": theirs.ssm_k_D, "D": theirs.D}
        named |= {"log_dt": diagonal.log_dt, "log_A_real": diagonal.inv_A_real, "A_imag": diagonal.A_imag}
        named |= {"B": diagonal.B, "C": diagonal.C}
        for n, linear in (
            ("q", theirs.q_proj),
            ("k", theirs.k_proj),
            ("v", theirs.v_proj),
            ("o", theirs.output_linear),
        ):
            named |= {f"{n}_proj.weight": linear.weight, f"{n}_proj.bias": linear.bias}
        with torch.no_grad():
            for name, p in ours.named_parameters():
                if name == "o_proj.weight":  # which reads channels before heads there
                    p = p.unflatten(1, (-1, head_dim)).mT.flatten(1)
                named[name].copy_(p.reshape(named[name].shape))
        print(head_dim, {name: [round(v, 7) for v in found] for name, found in values(theirs, named).items()})


if __name__ == "__main__":
    main(sys.argv[1])
