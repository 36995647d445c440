"""Rotary positions against transformers' own, for every scaling."""

import json

import pytest
import torch
from pydantic import ValidationError
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as apply_neox
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as apply_gptj
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from zoo.errors import ConfigError
from zoo.ops.rotary import RotaryConfig, apply_rotary, rotary_tables

HEAD = 16
SHORT = [1.0 + 0.1 * i for i in range(HEAD // 2)]
LONG = [1.0 + 0.7 * i for i in range(HEAD // 2)]
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.2,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def llama(scaling: dict) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 5000.0, **scaling},
    )


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [40, 64, 65, 300, 4000])
def test_agrees_with_llama(name, length):
    config = llama(SCALINGS[name])
    positions = torch.arange(length)[None]
    q, k = torch.randn(2, 4, length, HEAD), torch.randn(2, 2, length, HEAD)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    expected = apply_rotary_pos_emb(q, k, cos, sin)

    mine = RotaryConfig.from_transformers(config, HEAD)
    my_cos, my_sin = rotary_tables(mine, HEAD, positions)
    assert my_cos.dtype == my_sin.dtype == torch.float32
    torch.testing.assert_close(my_cos, cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(my_sin[..., HEAD // 2 :], sin[..., HEAD // 2 :], atol=1e-6, rtol=0)
    for x, y in zip((q, k), expected, strict=True):
        torch.testing.assert_close(apply_rotary(x, my_cos, my_sin), y, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_growing_text_agrees_with_the_stateful_module(name):
    """Decoding token by token past the original length: transformers keeps state, we do not need it."""
    config = llama({**SCALINGS[name]})
    config.max_position_embeddings = 64
    theirs, mine = LlamaRotaryEmbedding(config), RotaryConfig.from_transformers(config, HEAD)
    x = torch.zeros(1, 1, 1, HEAD)
    for position in (10, 62, 63, 64, 65, 100, 101):
        at = torch.tensor([[position]])
        torch.testing.assert_close(rotary_tables(mine, HEAD, at)[0], theirs(x, at)[0], atol=1e-6, rtol=0)


def test_partial_rotary_agrees_with_gpt_neox():
    config = GPTNeoXConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )
    positions = torch.randint(0, 500, (2, 9))
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)
    expected = apply_neox(q, k, *GPTNeoXRotaryEmbedding(config)(q, positions))
    mine = RotaryConfig.from_transformers(config, 16)
    assert mine.dim == 4
    tables = rotary_tables(mine, 16, positions)
    torch.testing.assert_close(apply_rotary(q, *tables), expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(apply_rotary(k, *tables), expected[1], atol=1e-6, rtol=0)
    assert torch.equal(apply_rotary(q, *tables)[..., 4:], q[..., 4:])


def test_interleaved_agrees_with_gptj():
    positions = torch.arange(30)[None]
    q = torch.randn(2, 30, 4, 16)
    sin, cos = create_sinusoidal_positions(64, 8)[positions].split(4, -1)
    expected = torch.cat([apply_gptj(q[..., :8], sin, cos), q[..., 8:]], -1).transpose(1, 2)
    mine = RotaryConfig(dim=8, interleaved=True)
    got = apply_rotary(q.transpose(1, 2), *rotary_tables(mine, 16, positions), interleaved=True)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_only(interleaved):
    config = RotaryConfig(interleaved=interleaved)
    q, k = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.randn(1, 2, 5, 8, dtype=torch.float64)
    scores = []
    for start in (0, 70):
        cos, sin = rotary_tables(config, 8, start + torch.arange(5)[None])
        scores.append(apply_rotary(q, cos, sin, interleaved) @ apply_rotary(k, cos, sin, interleaved).mT)
    torch.testing.assert_close(*scores, atol=2e-5, rtol=0)
    assert not torch.allclose(scores[0], q @ k.mT, atol=1e-2)


def test_gradient_and_dtypes():
    cos, sin = rotary_tables(RotaryConfig(dim=4), 6, torch.arange(3)[None])
    x = torch.randn(1, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), x)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert apply_rotary(x.detach().to(dtype), cos, sin).dtype == dtype


@pytest.mark.parametrize("name", SCALINGS)
def test_round_trip(name):
    config = RotaryConfig.from_transformers(llama(SCALINGS[name]), HEAD)
    plain = json.loads(json.dumps(config.model_dump(mode="json")))
    assert RotaryConfig(**plain) == config
    assert hash(RotaryConfig(**plain)) == hash(config)


@pytest.mark.parametrize(
    "bad",
    [
        {"theta": "10000"},
        {"theta": 0.0},
        {"theta": float("nan")},
        {"dim": 3},
        {"dims": 4},
        {"scaling": {"rope_type": "linear"}},
        {"scaling": {"rope_type": "linear", "factor": 0.5}},
        {"scaling": {"rope_type": "lineal", "factor": 2.0}},
        {"scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}},
        {"scaling": {**SCALINGS["llama3"], "high_freq_factor": 0.5}},
        {"scaling": {**SCALINGS["longrope"], "long_factor": [1.0]}},
        {"scaling": {**SCALINGS["yarn"], "beta_fast": 0.5}},
    ],
)
def test_refuses_bad_values(bad):
    with pytest.raises(ValidationError):
        RotaryConfig(**bad)


def test_refuses_what_does_not_fit_the_head():
    with pytest.raises(ConfigError, match="rotary dim is 32"):
        rotary_tables(RotaryConfig(dim=32), 16, torch.arange(3)[None])
    with pytest.raises(ConfigError, match="longrope has 8 factors, but 4"):
        rotary_tables(RotaryConfig(scaling=SCALINGS["longrope"]), 8, torch.arange(3)[None])
    config = llama(SCALINGS["default"])
    config.rope_parameters["rope_type"] = "yarm"
    with pytest.raises(ConfigError, match="did you mean 'yarn'"):
        RotaryConfig.from_transformers(config, HEAD)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "dynamic", "longrope"])
def test_compiles_without_breaks(name):
    config = RotaryConfig.from_transformers(llama(SCALINGS[name]), HEAD)

    def turn(x, positions):
        return apply_rotary(x, *rotary_tables(config, HEAD, positions))

    x, positions = torch.randn(1, 2, 80, HEAD), torch.arange(80)[None]
    compiled = torch.compile(turn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, positions), turn(x, positions), atol=1e-4, rtol=0)
