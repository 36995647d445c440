"""What stands in tests/peers/fla.py about flash-linear-attention, compared with the package where it is there."""

from __future__ import annotations

import pytest
from peers.fla import CONFIGS, LAYERS, SHAPES, D, E, H, V

CLASSES = {
    "retnet": "RetNet", "gla": "GLA", "gated_deltanet": "GatedDeltaNet", "delta_net": "DeltaNet", "rwkv6": "RWKV6",
    "rwkv7": "RWKV7",
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_names_are_those_of_the_package(name):
    models = pytest.importorskip("fla.models", reason="flash-linear-attention is not on the Python path")
    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "intermediate_size": E, "num_heads": H}
    config = getattr(models, f"{CLASSES[name]}Config")(**{**sizes, **CONFIGS[name]})
    theirs = getattr(models, f"{CLASSES[name]}ForCausalLM")(config).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in theirs.items()} == SHAPES[name]
