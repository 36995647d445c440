"""Norms behind the outputs of mixer and MLP, in a whole model or in some of its layers."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.errors import ConfigError

ATTENTION = {"mixer": {"name": "attention", "num_heads": 2, "head_dim": 8}, "ffn": {"name": "mlp", "hidden_size": 32}}


def model_of(**fields):
    torch.manual_seed(0)
    model = zoo.create_model("transformer-tiny", hidden_size=16, **fields)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"block": "output_norm", "layers": [ATTENTION, {**ATTENTION, "block": "pre_norm"}]},
        {"layers": [{**ATTENTION, "block": "output_norm"}, ATTENTION]},
    ],
)
def test_blocks_are_their_formulas(fields):
    model = model_of(**fields)
    first, second = model.model.layers
    x_BLD = torch.randn(2, 7, 16)
    y_BLD = x_BLD + first.mixer_norm(first.mixer(x_BLD)[0])
    y_BLD = y_BLD + first.ffn_norm(first.ffn(y_BLD))
    torch.testing.assert_close(first(x_BLD, None, None, None)[0], y_BLD)
    z_BLD = y_BLD + second.mixer(second.mixer_norm(y_BLD))[0]
    z_BLD = z_BLD + second.ffn(second.ffn_norm(z_BLD))
    torch.testing.assert_close(second(y_BLD, None, None, None)[0], z_BLD)
    assert zoo.ZooConfig(**model.config.spec.plain()).spec == model.config.spec


def test_a_conversion_reads_what_the_mixer_reads():
    """Windows as long as the text are attention, so a conversion that traces the right inputs finds no distance."""
    tokens = torch.randint(0, 256, (4, 16))
    options = {"mixer_options": {"window": 32, "sinks": 0}, "data": tokens, "length": 16}
    student = zoo.convert(model_of(block="output_norm", layers=[ATTENTION] * 2), "sliding_window", **options)
    assert student.report.distance_before < 1e-6
    assert all(row.error_before < 1e-5 for row in student.report.layers)


def test_orders_are_checked():
    layers = [{**ATTENTION, "block": "output_norm"}]
    with pytest.raises(ConfigError, match="a model of reversible blocks has no other ones"):
        zoo.create_model("transformer-tiny", block="reversible", tie_word_embeddings=False, layers=layers)
    values = {"pattern": "attention", "num_hidden_layers": 1, "blocks": {"atention": "output_norm"}}
    with pytest.raises(ConfigError, match=r"layers\.blocks\.atention: not in the pattern; did you mean 'attention'"):
        zoo.ZooConfig(layers=values)
