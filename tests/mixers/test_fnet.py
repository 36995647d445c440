"""FNet: parity with transformers for every hidden state, logits and gradients; padding; sizes; what it refuses."""

from __future__ import annotations

import pytest
import torch
from formulas import BERT_NAMES, convert, largest_error, parameters, relative_error, renamed, shaken, teacher

import zoo
from zoo.convert.surgery import layer_options
from zoo.errors import ConfigError, TraitError
from zoo.mixers.fnet import FNet, FNetConfig
from zoo.registry import model_config

B, L, D, LAYERS = 2, 33, 32, 3
NAMES = {
    **{f"fnet.{theirs}": f"model.{ours}" for theirs, ours in BERT_NAMES.items() if theirs.startswith("e")},
    "fnet.embeddings.projection": "model.project_in",
    "fourier.output.LayerNorm": "mixer_norm",
    **BERT_NAMES,
    "cls.predictions.transform.dense": "transform.dense",
    "cls.predictions.transform.LayerNorm": "transform.norm",
    "cls.predictions.decoder": "lm_head",
    "cls.predictions.bias": "lm_head.bias",
}


@pytest.fixture(scope="module")
def pair():
    """transformers' model and ours with its weights."""
    from transformers import FNetConfig as TheirConfig
    from transformers import FNetForMaskedLM

    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=99, hidden_size=D, num_hidden_layers=LAYERS, intermediate_size=64, max_position_embeddings=40,
        hidden_dropout_prob=0.0,
    )  # fmt: skip
    theirs = shaken(FNetForMaskedLM(config), 0.2).eval()
    layers = {"num_hidden_layers": LAYERS, "ffn": {"hidden_size": 64}}
    sizes = {"vocab_size": 99, "hidden_size": D, "embedding_size": D, "max_position_embeddings": 40}
    ours = zoo.create_model("fnet-tiny", **sizes, layers=layers).eval()
    ours.load_state_dict(renamed(theirs.state_dict(), NAMES))
    return theirs, ours


def test_hidden_states_logits_and_gradients_are_those_of_transformers(pair):
    theirs, ours = pair
    tokens_BL, types_BL = torch.randint(4, 99, (B, L)), torch.randint(0, 4, (B, L))
    inputs = {"token_type_ids": types_BL, "labels": tokens_BL, "output_hidden_states": True}
    expected, got = theirs(tokens_BL, **inputs), ours(tokens_BL, **inputs)
    assert len(got.hidden_states) == LAYERS + 1
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert largest_error(a, b) < 1e-5
    assert largest_error(got.logits, expected.logits) < 1e-5
    expected.loss.backward()
    got.loss.backward()
    own = dict(ours.named_parameters())
    compared = renamed({n: p.grad for n, p in theirs.named_parameters()}, NAMES)
    assert compared.keys() == own.keys()
    for name, gradient in compared.items():
        assert largest_error(own[name].grad, gradient) < 1e-4, name


@torch.no_grad()
def test_padding_changes_nothing_which_it_does_there(pair):
    theirs, ours = pair
    tokens_BL, mask_BL = torch.randint(4, 99, (B, L)), torch.ones(B, L, dtype=torch.long)
    mask_BL[0, 20:] = 0
    alone = ours(tokens_BL[:1, :20]).logits
    assert largest_error(ours(tokens_BL, attention_mask=mask_BL).logits[:1, :20], alone) < 1e-5
    assert largest_error(theirs(tokens_BL[:1, :20]).logits, alone) < 1e-5
    assert largest_error(theirs(tokens_BL, attention_mask=mask_BL).logits[:1, :20], alone) > 0.1


def test_sizes():
    """The configs of google/fnet-base and google/fnet-large; with the head and the pooler the paper's 83M and 238M."""
    for name, hidden, layers in (("fnet-base-83m", 768, 12), ("fnet-large-238m", 1024, 24)):
        embeddings = (32000 + 512 + 4) * hidden + 2 * hidden + hidden * (hidden + 1)
        layer = 8 * hidden * hidden + 5 * hidden + 4 * hidden
        assert parameters(name)[0] == embeddings + layers * layer
        whole = parameters(name)[0] + 2 * hidden * (hidden + 1) + 2 * hidden + 32000
        assert round(whole / 1e6) == int(name.split("-")[-1][:-1])
        spec = model_config(name).spec
        assert (spec.positions, spec.block, spec.norm_eps) == ("learned", "post_norm", 1e-12)


def test_what_it_refuses():
    with pytest.raises(TraitError, match=r"'fnet' has no causal form \(traits.causal is False\)"):
        FNet(FNetConfig(causal=True), 8)
    with pytest.raises(TraitError, match="cannot replace attention in a causal language model"):
        layer_options({"name": "fnet"}, teacher(causal=True).attention_weights())
    with pytest.raises(ConfigError, match="num_heads: unknown key"):
        FNetConfig.parse({"num_heads": 2})
    mixer = FNet(FNetConfig(), 8)
    with pytest.raises(TraitError, match=r"two-sided here .*, so there is no state to carry"):
        mixer(torch.zeros(1, 3, 8), state=mixer.init_state(1))


def test_a_conversion_carries_nothing_over():
    """Only that it works: the layer has no weights, and is far from any attention."""
    attention = teacher(causal=False)
    student = convert(attention, "fnet")
    assert not list(student.parameters())
    assert relative_error(student, attention) > 1


def test_a_mixer_without_tensors_of_its_own_is_asked_to_initialise(monkeypatch):
    """transformers passes over modules whose tensors all sit further down; the model's own rule does not."""
    asked = []
    monkeypatch.setattr(FNet, "reset_parameters", lambda self, std: asked.append(std))
    zoo.create_model("fnet-tiny", initializer_range=0.03)
    assert asked == [0.03, 0.03]
