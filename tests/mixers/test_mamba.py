"""Mamba-1: against the implementation in transformers, its initialisation, its sizes, its start from attention."""

from __future__ import annotations

import math

import pytest
import torch

import zoo
from zoo.errors import ConfigError, ConversionError
from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.base import AttentionStats
from zoo.mixers.mamba import Mamba, MambaConfig
from zoo.registry import list_models, model_config


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def pair():
    """transformers' Mamba and ours with its weights, both in float32."""
    from transformers import MambaConfig as TheirConfig
    from transformers import MambaForCausalLM

    config = TheirConfig(
        vocab_size=97, hidden_size=32, state_size=8, num_hidden_layers=3, expand=2, conv_kernel=4, time_step_rank=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    theirs = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    layers = {"num_hidden_layers": 3, "defaults": {"state_dim": 8, "dt_rank": 3}}
    ours = zoo.create_model("mamba-tiny", vocab_size=97, hidden_size=32, layers=layers).eval()
    ours.load_state_dict({rename(k): reshape(v) for k, v in theirs.state_dict().items()})
    return theirs, ours


def rename(name):
    name = name.replace("backbone.embeddings", "model.embed_tokens").replace("backbone.norm_f", "model.norm")
    name = name.replace("backbone", "model").replace(".norm.", ".mixer_norm.") if ".layers." in name else name
    return name.replace("conv1d", "conv").replace("dt_proj.bias", "dt_bias")


def reshape(weight):
    return weight.squeeze(1) if weight.ndim == 3 else weight  # a convolution's


def test_logits_and_gradients_are_those_of_transformers():
    theirs, ours = pair()
    ids_BL = torch.randint(0, 97, (2, 75))
    expected, got = theirs(ids_BL, labels=ids_BL), ours(ids_BL, labels=ids_BL)
    assert relative(got.logits, expected.logits) < 1e-5
    expected.loss.backward()
    got.loss.backward()
    grads = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        assert relative(grads[rename(name)].grad, reshape(p.grad)) < 1e-4, name


def test_greedy_generation_is_that_of_transformers():
    theirs, ours = pair()
    ids_BL = torch.randint(0, 97, (2, 9))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(ids_BL, **options), theirs.generate(ids_BL, **options))


@pytest.mark.parametrize("name", [n for n in list_models("mamba-*") if not n.endswith("-tiny")])
def test_sizes_are_those_of_the_released_checkpoints(name):
    """Parameters of state-spaces/mamba-*-hf, counted on transformers' class with the config of the release."""
    from transformers import MambaConfig as TheirConfig
    from transformers import MambaForCausalLM

    ours = model_config(name)
    config = TheirConfig(
        vocab_size=50280, hidden_size=ours.hidden_size, num_hidden_layers=len(ours.mixer_names), state_size=16
    )
    with torch.device("meta"):
        counts = [sum(p.numel() for p in m.parameters()) for m in (MambaForCausalLM(config), zoo.create_model(name))]
    assert counts[0] == counts[1]
    published = {"mamba-130m": 129_135_360, "mamba-2.8b": 2_768_345_600}  # as the Hub states them
    assert counts[1] == published.get(name, counts[1])


def test_initialisation_is_that_of_the_paper():
    torch.manual_seed(0)
    mixer = Mamba(MambaConfig(out_init=0.25), 256)
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    assert (mixer.D == 1).all()
    steps = torch.nn.functional.softplus(mixer.dt_bias).log()
    low, high = math.log(0.001), math.log(0.1)
    assert low - 1e-3 < steps.min() < steps.max() < high + 1e-3
    assert abs(steps.mean() - (low + high) / 2) < 0.2  # even on a logarithmic scale
    assert abs(steps.std() - (high - low) / 12**0.5) < 0.1
    assert mixer.rank == 16
    for linear, bound in ((mixer.dt_proj, 1 / 4), (mixer.in_proj, 1 / 16), (mixer.out_proj, 0.25 * 512**-0.5)):
        assert linear.weight.abs().max() <= bound
        assert abs(linear.weight.std() - bound / 3**0.5) < 0.02 * bound


def test_options_out_of_bounds_are_refused():
    with pytest.raises(ConfigError, match="state_dim"):
        MambaConfig.parse({"state_dim": 0})
    with pytest.raises(ConfigError, match="did you mean 'state_dim'"):
        MambaConfig.parse({"state_dm": 4})


# --- From attention ------------------------------------------------------------------------------------------------

H, G, K, D, L = 4, 2, 8, 32, 48


def teacher_of(kv_heads=G):
    torch.manual_seed(1)
    attention = Attention(AttentionConfig(num_heads=H, num_kv_heads=kv_heads, head_dim=K, qkv_bias=True), D)
    with torch.no_grad():
        for p in attention.parameters():
            p.copy_(torch.randn_like(p) * D**-0.5)
    return attention


def error(student, teacher, x_BLD):
    y, expected = student(x_BLD)[0], teacher(x_BLD)[0]
    return ((y - expected).square().sum() / expected.square().sum()).sqrt()


def converted(teacher, lookback=L / 3, **options):
    stats = AttentionStats(
        lookback_H=torch.full((H,), lookback), q_norm_H=torch.ones(H), k_norm_H=torch.ones(H), out_rms_H=torch.ones(H)
    )
    weights = teacher.attention_weights()
    return Mamba.from_attention(Mamba.config_from_attention(weights, **options), weights, stats)


@torch.no_grad()
def test_starts_as_a_fading_average_of_the_values():
    """Without the first order, each head is exactly sum_s (1 - a) a^(t-s) v_s with the half-life that was measured."""
    teacher = teacher_of()
    student = converted(teacher, lookback=5.0, state_dim=1)
    x_BLD = torch.randn(2, L, D)
    v_BLHK = teacher.v_proj(x_BLD).unflatten(-1, (G, K)).repeat_interleave(H // G, 2)
    age_LL = torch.arange(L)[:, None] - torch.arange(L)
    a = 2 ** (-1 / 5)
    weights_LL = torch.where(age_LL >= 0, (1 - a) * a ** age_LL.clamp(min=0), 0.0)
    expected = teacher.o_proj(torch.einsum("ts,bshk->bthk", weights_LL, v_BLHK).flatten(-2))
    assert relative(student(x_BLD)[0], expected) < 1e-4


@torch.no_grad()
def test_the_first_order_is_that_of_the_softmax():
    """Where values show all of the input and N - 1 is the full rank: weights a^(t-s) (1 + mean over heads of q . k)."""
    teacher = teacher_of(kv_heads=H)
    for p in (teacher.q_proj.bias, teacher.k_proj.bias, teacher.v_proj.bias):
        p.zero_()
    torch.nn.init.orthogonal_(teacher.v_proj.weight)
    student = converted(teacher, lookback=5.0, state_dim=D + 1)
    x_BLD = torch.randn(2, L, D)
    q, k, v = (f(x_BLD).unflatten(-1, (H, K)) for f in (teacher.q_proj, teacher.k_proj, teacher.v_proj))
    scores_BTS = torch.einsum("bthk,bshk->bts", q, k) * K**-0.5 / H
    age_LL = torch.arange(L)[:, None] - torch.arange(L)
    a = 2 ** (-1 / 5)
    weights = torch.where(age_LL >= 0, (1 - a) * a ** age_LL.clamp(min=0), 0.0) * (1 + scores_BTS)
    expected = teacher.o_proj(torch.einsum("bts,bshk->bthk", weights, v).flatten(-2))
    assert relative(student(x_BLD)[0], expected) < 1e-4


def text_like(rows):
    """Inputs whose neighbours resemble each other."""
    x_BLD = torch.randn(rows, L, D)
    for t in range(1, L):
        x_BLD[:, t] = 0.9 * x_BLD[:, t - 1] + 0.19**0.5 * x_BLD[:, t]
    return x_BLD


def test_alignment_improves_the_start():
    teacher = teacher_of()
    student = converted(teacher)
    fresh = text_like(16)
    with torch.no_grad():
        start = error(student, teacher, fresh).item()
    assert start < 0.75  # a layer with random weights is at one
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(25):
        optimizer.zero_grad()
        error(student, teacher, text_like(32)).backward()
        optimizer.step()
    with torch.no_grad():
        assert error(student, teacher, fresh).item() < 0.96 * start


def test_too_narrow_a_layer_is_refused():
    weights = teacher_of().attention_weights()
    config = Mamba.config_from_attention(weights, inner_dim=64)
    with pytest.raises(ConversionError, match=r"4 heads of 8 needs inner_dim >= 65.* got inner_dim 64"):
        Mamba.from_attention(config, weights)
