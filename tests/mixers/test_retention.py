"""Retention: the authors' values in all three forms, both sides, positions, decays, initialisation, sizes.

Recorded values come from torchscale 0.3.0 and yet-another-retnet 0.5.1, with every weight from a formula:
    pip install --no-deps --target peers torchscale yet-another-retnet einops
    PYTHONPATH=peers python tests/mixers/test_retention.py
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from formulas import corners, largest_error, parameters, wave

import zoo
from zoo.mixers.retention import Retention, RetentionConfig, published_rotary
from zoo.ops.rotary import rotary_tables
from zoo.registry import model_config

B, L, D, H, K, CHUNK = 2, 20, 32, 4, 8, 5
NAMES = ("x", "q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight", "o_proj.weight")

# The output and gradients of the sum of its squares, in float64.
TORCHSCALE = {
    "y": [0.1552963, -0.2781242, 0.6429199, -0.3470718, 0.1018792, -0.4809215],
    "x": [11.0257262, 28.8938011, -1.4194306, -6.9232468],
    "q_proj.weight": [-4.4242611, 3.5116755, 28.4349224, -16.1614912],
    "k_proj.weight": [19.1222221, 22.4936472, -110.2540781, 128.4166882],
    "v_proj.weight": [0.0480279, -8.6806352, -2.7310466, -6.8737362],
    "g_proj.weight": [2.2481677, 0.3359551, -0.6412004, -0.310939],
    "o_proj.weight": [1.6141153, 0.0079924, 1.7284661, 0.3558063],
}
YET_ANOTHER = {
    "y": [-0.1835542, 0.147771, -0.2339682, -1.590935, 0.8731658, 0.5740359],
    "x": [-5.1220251, 28.8019789, -1.7812252, -8.7480205],
    "q_proj.weight": [-2.7007074, -9.1435534, 79.7342803, 31.3025849],
    "k_proj.weight": [4.4841508, 17.0522494, 129.2368054, -79.4073272],
    "v_proj.weight": [-0.276066, -23.9738937, -79.4516049, 27.4828311],
    "g_proj.weight": [2.9219031, 7.9555174, -58.5675515, -3.8063473],
    "o_proj.weight": [-1.9388322, 5.2257752, -23.3575617, 46.317513],
}


def by_formula(**options) -> Retention:
    """The published block, every weight a formula."""
    config = RetentionConfig(num_heads=H, head_dim=K, rotary=published_rotary(K), **options)
    mixer = Retention(config, D).double()
    with torch.no_grad():
        for i, p in enumerate(mixer.parameters()):
            p.copy_(0.3 * wave(*p.shape, step=0.3 + 0.11 * i))
    return mixer


def torchscale_block() -> Retention:
    return by_formula(value_head_dim=2 * K, head_norm_eps=1e-12)


def yet_another_block() -> Retention:
    """Its decays are spread evenly between 1 - 1/32 and 1 - 1/512, and its norm is centred."""
    mixer = by_formula(head_norm_centered=True, head_norm_eps=1e-6)
    gamma_H = 1 - torch.exp(-torch.linspace(5, 9, H, dtype=torch.double) * torch.tensor(2.0, dtype=torch.double).log())
    mixer.decay_logit_G.copy_(torch.logit(gamma_H))
    return mixer


def parallel(mixer, x_BLD):
    return mixer(x_BLD)[0]


def in_pieces(size):
    def run(mixer, x_BLD):
        state, outputs = mixer.init_state(len(x_BLD)), []
        for piece in x_BLD.split(size, 1):
            y, state = mixer(piece, state=state)
            outputs.append(y)
        return torch.cat(outputs, 1)

    return run


FORMS = {"parallel": parallel, "recurrent": in_pieces(1), "chunkwise": in_pieces(CHUNK)}


def values(run, weights: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Corners of the output of `run` and of gradients of the sum of its squares, by our names."""
    x_BLD = wave(B, L, D, step=0.7).requires_grad_()
    y_BLD = run(x_BLD)
    gradients = torch.autograd.grad(y_BLD.square().sum(), [{"x": x_BLD, **weights}[name] for name in NAMES])
    found = {
        name: [*g.flatten()[:2].tolist(), *g.flatten()[-2:].tolist()] for name, g in zip(NAMES, gradients, strict=True)
    }
    return {"y": corners(y_BLD), **found}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("make", "recorded"), [(torchscale_block, TORCHSCALE), (yet_another_block, YET_ANOTHER)],
    ids=["torchscale", "yet another retnet"],
)  # fmt: skip
def test_every_form_gives_the_recorded_values(make, recorded, form):
    mixer = make()
    found = values(lambda x: FORMS[form](mixer, x), dict(mixer.named_parameters()))
    for name, expected in recorded.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_two_sided_it_decays_to_both_sides():
    """norm((Q K^T * gamma^|t - s|) V), positions as in the causal form."""
    mixer, x_BLD = by_formula(causal=False, value_head_dim=2 * K), wave(B, L, D, step=0.7)
    q, k, v = (getattr(mixer, f"{n}_proj")(x_BLD).unflatten(-1, (H, -1)).transpose(1, 2) for n in "qkv")
    sin, cos = tables()
    q, k = (x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k))
    distance_LL = (torch.arange(L)[:, None] - torch.arange(L)).abs()
    gamma_H11 = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.double))[:, None, None]
    y = (q @ k.mT * K**-0.5 * gamma_H11**distance_LL) @ v
    y = F.rms_norm(y, (2 * K,), eps=1e-5).transpose(1, 2).flatten(2)
    expected = mixer.o_proj(y * F.silu(mixer.g_proj(x_BLD)))
    assert largest_error(mixer(x_BLD)[0], expected) < 1e-5


def tables():
    """Sines and cosines as RetNetRelPos in torchscale/architecture/retnet.py makes them."""
    angle_K = (1.0 / 10000 ** torch.linspace(0, 1, K // 2)).repeat_interleave(2)
    angle_LK = torch.arange(L)[:, None] * angle_K
    return angle_LK.sin().double(), angle_LK.cos().double()


def test_positions_and_decays_are_the_published_ones():
    sin_LK, cos_LK = tables()
    cos, sin = rotary_tables(published_rotary(K), K, torch.arange(L)[None])
    torch.testing.assert_close(cos[0].double(), cos_LK, rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[0, :, 1::2].double(), sin_LK[:, 1::2], rtol=0, atol=1e-5)
    for name in set(zoo.list_models("retnet-*")) - {"retnet-fla-1.3b"}:  # which has Llama's
        mixer = model_config(name).spec.layers[0].mixer
        assert mixer.rotary == published_rotary(mixer.head_dim), name
    decay = Retention(RetentionConfig(num_heads=8, head_dim=4), 8).decay_logit_G.double().sigmoid()
    torch.testing.assert_close(decay, 1 - 2.0 ** (-5 - torch.arange(8, dtype=torch.double)), rtol=1e-6, atol=0)


def test_initialisation_is_that_of_the_published_code():
    """Xavier uniform; the projections into the block with a gain of 2 ** -2.5."""
    mixer = zoo.create_model("retnet-tiny").model.layers[0].mixer
    for name in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"):
        weight = getattr(mixer, name).weight
        std = (1.0 if name == "o_proj" else 2**-2.5) * (2 / sum(weight.shape)) ** 0.5
        assert weight.std().item() == pytest.approx(std, rel=0.05), name
        assert weight.abs().max() <= std * 3**0.5


def test_sizes():
    """Table 2 of the paper; a block holds 8 D^2 and its channel mixer 4 D^2."""
    for name, width, layers in (("retnet-1.3b", 2048, 24), ("retnet-2.7b", 2560, 32), ("retnet-6.7b", 4096, 32)):
        heads = width // 256
        assert model_config(name).spec.layers[0].mixer.num_heads == heads
        assert parameters(name)[1] == layers * (12 * width**2 + 4 * width) + 2 * width
        assert parameters(name)[1] == pytest.approx(float(name.split("-")[1][:-1]) * 1e9, rel=0.1)


# --- The peers themselves ------------------------------------------------------------------------------------------


def torchscale_forms(peer, ours: Retention):
    """Their layer with our weights, in its three forms, and its weights by our names."""
    theirs = peer.MultiScaleRetention(SimpleNamespace(layernorm_eps=1e-12, multiway=False), D, 2 * D, H).double()
    named = {f"{n}_proj.weight": getattr(theirs, f"{n}_proj").weight for n in "qkvg"}
    named["o_proj.weight"] = theirs.out_proj.weight
    with torch.no_grad():
        for name, p in ours.named_parameters():
            named[name].copy_(p)
    (sin, cos), decay_H = tables(), ours.decay_logit_G.sigmoid()

    def fading(length):
        age_LL = torch.arange(length)[:, None] - torch.arange(length)
        return torch.where(age_LL >= 0, decay_H[:, None, None] ** age_LL.clamp(min=0), 0.0)

    def recurrent(x_BLD):
        carried: dict = {}
        steps = [theirs(x_BLD[:, t : t + 1], ((sin[t], cos[t]), decay_H), incremental_state=carried) for t in range(L)]
        return torch.cat(steps, 1)

    def chunkwise(x_BLD):
        mask = fading(CHUNK)
        last, scale = mask[:, -1], mask.sum(-1, keepdim=True).sqrt()
        reach = decay_H[:, None] ** (torch.arange(CHUNK) + 1)
        query = reach[:, :, None] / (scale / last.sum(-1)[:, None, None])
        inner = (mask / scale, (decay_H**CHUNK)[:, None, None], query, (last / last.sum(-1, keepdim=True))[..., None])
        return theirs(x_BLD, ((sin, cos), inner), chunkwise_recurrent=True)

    mask = fading(L)
    mask = mask / mask.sum(-1, keepdim=True).sqrt()
    return {"parallel": lambda x: theirs(x, ((sin, cos), mask)), "recurrent": recurrent, "chunkwise": chunkwise}, named


def yet_another_forms(peer, ours: Retention):
    """The same for yet-another-retnet."""
    theirs = peer.MultiScaleRetention(D, H, bias=False, dtype=torch.double).eval()
    named = {f"{n}_proj.weight": getattr(theirs, f"{n}_proj").weight for n in "qkvg"}
    named["o_proj.weight"] = theirs.out_proj.weight
    with torch.no_grad():
        for name, p in ours.named_parameters():
            named[name].copy_(p)

    def recurrent(x_BLD):
        state, outputs = None, []
        for t in range(L):
            y, state = theirs.forward_recurrent(*(x_BLD[:, t],) * 3, seq_idx=t, prev_state=state)
            outputs.append(y)
        return torch.stack(outputs, 1)

    def chunkwise(x_BLD):
        state, outputs = None, []
        for start in range(0, L, CHUNK):
            piece = x_BLD[:, start : start + CHUNK]
            y, state = theirs.forward_chunkwise(piece, piece, piece, start_idx=start, prev_state=state)
            outputs.append(y)
        return torch.cat(outputs, 1)

    forms = {"parallel": lambda x: theirs.forward_parallel(x, x, x)[0], "recurrent": recurrent, "chunkwise": chunkwise}
    return forms, named


PEERS = {
    "torchscale": ("torchscale.component.multiscale_retention", torchscale_forms, torchscale_block),
    "yet another retnet": ("yet_another_retnet.retention", yet_another_forms, yet_another_block),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PEERS)
def test_every_form_is_that_of_the_peer(name, form):
    module, forms, make = PEERS[name]
    peer = pytest.importorskip(module, reason=f"{name} (with einops) is not installed")
    ours = make()
    theirs, named = forms(peer, ours)
    outputs = []
    for run, weights in ((theirs[form], named), (lambda x: FORMS[form](ours, x), dict(ours.named_parameters()))):
        x_BLD = wave(B, L, D, step=0.7).requires_grad_()
        y_BLD = run(x_BLD)
        tensors = [{"x": x_BLD, **weights}[n] for n in NAMES]
        outputs.append([y_BLD, *torch.autograd.grad((y_BLD * wave(B, L, D, step=0.4)).sum(), tensors)])
    for expected, got in zip(*outputs, strict=True):
        assert largest_error(got, expected) < 1e-5


def main() -> None:
    """Print the recorded values anew."""
    import importlib

    for name, (module, forms, make) in PEERS.items():
        theirs, named = forms(importlib.import_module(module), make())
        found = values(theirs["parallel"], named)
        print(name, {key: [round(v, 7) for v in numbers] for key, numbers in found.items()})


if __name__ == "__main__":
    main()
