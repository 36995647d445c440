"""MobileBERT's layer: parity with transformers, conversion from attention, initial weights, what it refuses."""

from __future__ import annotations

import pytest
import torch
from formulas import align, largest_error, relative_error, teacher, wave
from transformers import MobileBertConfig as PeerConfig
from transformers.models.mobilebert.modeling_mobilebert import MobileBertLayer

import zoo
from zoo.config import ModelSpec
from zoo.errors import ConfigError, ConversionError, TraitError
from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.mobile_bert import MobileBert, MobileBertConfig, shared_factors
from zoo.models.backbone import Block
from zoo.ops.rotary import RotaryConfig

B, L, D, H, K = 2, 11, 40, 4, 6
NAMES = {
    "mixer.residual_proj": "bottleneck.input.dense",
    "mixer.residual_norm": "bottleneck.input.LayerNorm",
    "mixer.shared_proj": "bottleneck.attention.dense",
    "mixer.shared_norm": "bottleneck.attention.LayerNorm",
    "mixer.q_proj": "attention.self.query",
    "mixer.k_proj": "attention.self.key",
    "mixer.v_proj": "attention.self.value",
    "mixer.o_proj": "attention.output.dense",
    "mixer.o_norm": "attention.output.LayerNorm",
    "mixer.ffn.0.up_proj": "ffn.0.intermediate.dense",
    "mixer.ffn.0.down_proj": "ffn.0.output.dense",
    "mixer.ffn_norm.0": "ffn.0.output.LayerNorm",
    "mixer.ffn.1.up_proj": "intermediate.dense",
    "mixer.ffn.1.down_proj": "output.dense",
    "mixer.ffn_norm.1": "output.LayerNorm",
    "mixer.y_proj": "output.bottleneck.dense",
    "mixer_norm": "output.bottleneck.LayerNorm",
}


@pytest.mark.parametrize("source", ["own", "residual"])
def test_a_block_is_the_layer_of_transformers(source):
    mixer = {"name": "mobile_bert", "num_heads": H, "head_dim": K, "feed_forwards": 2, "inner_size": 20}
    layer = {"mixer": {**mixer, "attention_input": source}, "ffn": None}
    spec = ModelSpec(task="masked-lm", hidden_size=D, block="post_norm", norm="no_norm", layers=[layer])
    block = Block(spec, spec.layers[0]).double()
    peer_config = PeerConfig(
        hidden_size=D, num_attention_heads=H, intra_bottleneck_size=H * K, num_feedforward_networks=2,
        intermediate_size=20,
        use_bottleneck_attention=source == "residual", key_query_shared_bottleneck=source == "own",
        attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    peer = MobileBertLayer(peer_config).double()
    state = {name: 0.3 * wave(*t.shape, step=0.1 + 0.01 * i) for i, (name, t) in enumerate(peer.state_dict().items())}
    peer.load_state_dict(state)
    ours = {}
    for key in block.state_dict():
        module, _, parameter = key.rpartition(".")
        ours[key] = state.pop(f"{NAMES[module]}.{parameter}")
    block.load_state_dict(ours)
    assert not state
    x_BLD = wave(B, L, D, step=0.9).requires_grad_()
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    mask_BL[1, 8:] = False
    hidden_B11L = torch.zeros(B, 1, 1, L, dtype=torch.double).masked_fill(~mask_BL[:, None, None], -torch.inf)
    expected, got = peer(x_BLD, hidden_B11L)[mask_BL], block(x_BLD, mask_BL, None, None)[0][mask_BL]
    assert largest_error(got, expected) < 1e-12
    weights = wave(*got.shape, step=0.2)
    gradients = [torch.autograd.grad((y * weights).sum(), x_BLD)[0] for y in (got, expected)]
    assert largest_error(*gradients) < 1e-12


def test_published_options_are_the_defaults():
    config = MobileBertConfig(num_heads=4, head_dim=32)
    assert (config.bottleneck, config.feed_forwards, config.inner_size, config.activation) == (128, 4, 512, "relu")


def test_it_starts_as_attention_and_learns():
    attention = teacher(causal=False)
    weights = attention.attention_weights()
    mixer = MobileBert.from_attention(MobileBert.config_from_attention(weights), weights)
    assert relative_error(mixer, attention) < 1e-5
    # A bottleneck that is too narrow for queries and keys of so many heads: close, and closer after alignment.
    wide = Attention(AttentionConfig(num_heads=2, head_dim=8, causal=False, qkv_bias=True), 32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in wide.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    weights = wide.attention_weights()
    mixer = MobileBert.from_attention(MobileBert.config_from_attention(weights), weights)
    start = relative_error(mixer, wide)
    assert 0.1 < start < 0.6
    align(mixer, wide, steps=40, rate=2e-3)
    assert relative_error(mixer, wide) < 0.88 * start


def test_grouped_heads_biases_and_scale_are_carried_over():
    torch.manual_seed(0)
    config = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, causal=False, qkv_bias=True, out_bias=True, scale=0.9
    )
    attention = Attention(config, 32)
    weights = attention.attention_weights()
    mixer = MobileBert.from_attention(MobileBert.config_from_attention(weights), weights)
    assert relative_error(mixer, attention) < 1e-5


def test_factors_are_the_best_of_their_rank():
    torch.manual_seed(0)
    q_ED, k_ED = torch.randn(6, 10), torch.randn(6, 10)
    q_EE, k_EE, shared_ED = shared_factors(q_ED, k_ED, 6)
    product = torch.cat([q_EE, k_EE]) @ shared_ED
    both = torch.cat([q_ED, k_ED]).double()
    lost = (product - both).norm()
    torch.testing.assert_close(lost, torch.linalg.svdvals(both)[6:].norm())


def test_initial_weights():
    torch.manual_seed(0)
    model = zoo.create_model("mobilebert-tiny", hidden_size=256)
    mixer = model.model.layers[0].mixer
    for linear in (mixer.shared_proj, mixer.v_proj, mixer.y_proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not linear.bias.any()
    for norm in (mixer.o_norm, mixer.ffn_norm[1], model.model.layers[1].mixer_norm, model.model.embed_norm):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert not norm.bias.any()


def test_what_it_refuses():
    weights = teacher(causal=False).attention_weights()
    with pytest.raises(ConversionError, match="4 heads of 4 cannot copy attention with 4 heads of 8"):
        MobileBert.from_attention(MobileBert.config_from_attention(weights, head_dim=4), weights)
    with pytest.raises(ConversionError, match="take 'own'"):
        MobileBert.from_attention(MobileBert.config_from_attention(weights, attention_input="residual"), weights)
    turned = Attention(AttentionConfig(num_heads=2, head_dim=8, causal=False, rotary=RotaryConfig()), 16)
    with pytest.raises(ConversionError, match="has no rotary positions"):
        MobileBert.config_from_attention(turned.attention_weights())
    with pytest.raises(TraitError, match="no causal form"):
        MobileBert(MobileBertConfig(num_heads=2, head_dim=8, causal=True), 16)
    mixer = MobileBert(MobileBertConfig(num_heads=2, head_dim=8), 16)
    with pytest.raises(TraitError, match="no state to carry"):
        mixer(torch.zeros(1, 2, 16), state=mixer.init_state(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_size": None}, "embedding_context: says nothing without embedding_size"),
        ({"embedding_context": 2}, "embedding_context: 2 neighbours: must be odd"),
        ({"embedding_projection": "sum"}, "embedding_context: 3 neighbours"),
        ({"embedding_size": 64}, "'extend' needs fewer than hidden_size, got 64"),
        ({"embedding_output": "transform", "mlm_transform": False}, "a masked-lm without mlm_transform needs"),
        ({"embedding_output": "transform", "task": "causal-lm"}, "a causal-lm without mlm_transform needs"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        zoo.create_model("mobilebert-tiny", **change)


def test_neighbours_need_an_encoder():
    with pytest.raises(TraitError, match="neighbours are partly later ones"):
        zoo.create_model("opt-tiny", embedding_size=16, embedding_context=3, embedding_output="project")
