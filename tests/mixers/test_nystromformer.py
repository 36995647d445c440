"""Nystromformer: parity with transformers (layer and whole model), landmarks of ragged sequences, conversion."""

from __future__ import annotations

import pytest
import torch
from formulas import align, convert, largest_error, parameters, relative_error, teacher

import zoo
from zoo.convert.surgery import layer_options
from zoo.errors import ConfigError, TraitError
from zoo.mixers.nystromformer import Nystromformer, NystromformerConfig
from zoo.testing import check_mixer

B, L, D, H, M, TAPS = 2, 48, 32, 4, 8, 7


def their_config(layers=1, **options):
    from transformers import NystromformerConfig as TheirConfig

    return TheirConfig(
        vocab_size=99, hidden_size=D, num_attention_heads=H, num_hidden_layers=layers, intermediate_size=64,
        num_landmarks=M, segment_means_seq_len=L, conv_kernel_size=TAPS, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_position_embeddings=L, **options,
    )  # fmt: skip


def shake(module):
    """Weights away from their start, and the coefficient of Z_0 from each matrix, not the largest of the batch."""
    torch.manual_seed(0)
    for part in module.modules():
        if hasattr(part, "init_option"):
            part.init_option = "exact"
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module.eval()


def names(layer: str) -> dict[str, str]:
    """Theirs to ours, below one layer."""
    theirs = {"attention.self.query": "q_proj", "attention.self.key": "k_proj", "attention.self.value": "v_proj"}
    theirs |= {"attention.self.conv": "skip_HT", "attention.output.dense": "o_proj"}
    rest = {"attention.output.LayerNorm": "mixer_norm", "intermediate.dense": "ffn.up_proj"}
    rest |= {"output.dense": "ffn.down_proj", "output.LayerNorm": "ffn_norm"}
    return {layer + n: f"mixer.{ours}" for n, ours in theirs.items()} | {layer + n: ours for n, ours in rest.items()}


def our_name(name: str, table: dict[str, str], prefix: str = "") -> str:
    stem, _, leaf = name.rpartition(".")
    return prefix + table[stem] + ("" if table[stem].endswith("_HT") else f".{leaf}")


def test_layer_is_transformers():
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    theirs = shake(NystromformerSelfAttention(their_config())).double()
    config = NystromformerConfig(num_heads=H, head_dim=D // H, landmarks=M, skip_taps=TAPS, qkv_bias=True)
    ours = Nystromformer(config, D).double()
    table = {n.removeprefix("attention.self."): t.removeprefix("mixer.") for n, t in names("").items()}
    state = {our_name(name, table): w for name, w in theirs.state_dict().items()}
    state["skip_HT"] = state["skip_HT"][:, 0, :, 0]
    ours.load_state_dict({**state, "o_proj.weight": torch.eye(D)})
    x_BLD = torch.randn(B, L, D, dtype=torch.double, requires_grad=True)
    expected, got = theirs(x_BLD)[0], ours(x_BLD)[0]
    assert largest_error(got, expected) < 1e-10
    gradients = [torch.autograd.grad(y.square().sum(), x_BLD)[0] for y in (got, expected)]
    assert largest_error(*gradients) < 1e-9
    with torch.no_grad():
        single = x_BLD.float()
        assert largest_error(ours.float()(single)[0], theirs.float()(single)[0]) < 1e-5


def test_model_is_transformers():
    from transformers import NystromformerModel

    theirs = shake(NystromformerModel(their_config(layers=2)))
    ours = zoo.create_model(
        "nystromformer-tiny", vocab_size=99, hidden_size=D, max_position_embeddings=L,
        layers={
            "num_hidden_layers": 2, "ffn": {"hidden_size": 64},
            "defaults": {"num_heads": H, "head_dim": D // H, "landmarks": M, "skip_taps": TAPS},
        },
    ).model.eval()  # fmt: skip
    embed = {"word_embeddings": "embed_tokens", "position_embeddings": "embed_positions"}
    embed |= {"token_type_embeddings": "embed_token_types", "LayerNorm": "embed_norm"}
    state = {}
    for name, weight in theirs.state_dict().items():
        if name.startswith("embeddings."):
            state[our_name(name.removeprefix("embeddings."), embed)] = weight
        elif name.startswith("encoder.layer."):
            i, rest = name.removeprefix("encoder.layer.").split(".", 1)
            state[our_name(rest, names(""), f"layers.{i}.")] = weight[:, 0, :, 0] if weight.dim() == 4 else weight
    ours.load_state_dict(state)
    tokens_BL = torch.randint(2, 99, (B, L))
    with torch.no_grad():
        expected = theirs(tokens_BL).last_hidden_state
        assert largest_error(ours(tokens_BL).last_hidden_state, expected) < 1e-5


@pytest.mark.parametrize("options", [
    {"skip_taps": None}, {"landmarks": 200}, {"landmarks": 1, "num_kv_heads": 1},
    {"rotary": {"theta": 100.0}, "value_head_dim": 6, "skip_taps": 1}, {"landmarks": 40, "iterations": 3},
], ids=str)  # fmt: skip
def test_variants_obey_the_laws(options):
    check_mixer("nystromformer", config={"causal": False, **options}, seed=2)


def test_what_it_refuses():
    with pytest.raises(TraitError, match=r"'nystromformer' has no causal form \(traits.causal is False\)"):
        Nystromformer(NystromformerConfig(num_heads=2, head_dim=4, causal=True), 8)
    with pytest.raises(TraitError, match="cannot replace attention in a causal language model"):
        layer_options({"name": "nystromformer"}, teacher(causal=True).attention_weights())
    with pytest.raises(ConfigError, match=r"skip_taps \(8\) must be odd, to have a middle; try 9"):
        NystromformerConfig.parse({"num_heads": 2, "head_dim": 4, "skip_taps": 8})


def test_the_convolution_starts_as_the_other_weights():
    torch.manual_seed(0)
    skips = [b.mixer.skip_HT for b in zoo.create_model("nystromformer-tiny").model.layers]
    skips += [Nystromformer(NystromformerConfig(num_heads=40, head_dim=4), 8).skip_HT]
    assert torch.cat([s.flatten() for s in skips]).std().item() == pytest.approx(0.02, rel=0.05)


def test_conversion_is_exact_for_short_sequences_and_close_with_many_landmarks():
    attention = teacher(causal=False)
    options = ({"landmarks": 48}, {"landmarks": 24, "iterations": 12}, {"landmarks": 8})
    whole, many, few = (convert(attention, "nystromformer", **o) for o in options)
    assert relative_error(whole, attention) < 1e-5
    start = relative_error(few, attention)
    assert relative_error(many, attention) > 1e-3
    assert start < 1
    align(few, attention, steps=60, rate=1e-3)
    assert relative_error(few, attention) < 0.97 * start  # inputs without any structure: means say little of tokens


def test_sizes():
    """uw-madison/nystromformer-512: BERT-base with 30,000 words, 510 + 2 positions and the convolutions."""
    embeddings = (30000 + 512 + 2) * 768 + 2 * 768  # the last for their norm
    assert parameters("nystromformer-110m")[0] == embeddings + 12 * 7087872 + 12 * 12 * 65
    assert parameters("nystromformer-tiny")[0] < 1e6


def test_the_tiny_model_trains():
    model = zoo.create_model("nystromformer-tiny")
    tokens_BL = torch.randint(0, 256, (2, 20))
    loss = model(tokens_BL, labels=tokens_BL).loss
    loss.backward()
    assert loss.isfinite()
