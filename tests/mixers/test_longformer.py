"""Longformer: the laws in its variants, transformers' model from the same weights, and where a conversion starts."""

from __future__ import annotations

import pytest
import torch
from formulas import BERT_NAMES, align, convert, relative_error, renamed, shaken

import zoo
from zoo.config import ZooConfig
from zoo.errors import ConfigError
from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.longformer import Longformer, LongformerOptions
from zoo.models.heads import ZooForMaskedLM
from zoo.ops.rotary import RotaryConfig
from zoo.registry import model_config
from zoo.testing import check_mixer

D = 32
VARIANTS = {
    "gaps": {"dilation": 3, "global_tokens": 3, "window": 4},
    "gaps per head": {"dilation": [1, 1, 2, 5], "rotary": {"theta": 100.0}},
    "gaps per head in groups": {"dilation": [4, 1, 4, 1], "num_kv_heads": 2, "global_tokens": 0},
    "two-sided gaps": {"dilation": [1, 3, 1, 3], "causal": False, "global_tokens": 9, "window": 3, "qk_norm": True},
    "two-sided, no globals": {"dilation": 2, "causal": False, "global_tokens": 0, "conv": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_obeys_all_laws(variant):
    check_mixer("longformer", config=VARIANTS[variant], seed=1)


# --- transformers' model ----------------------------------------------------------------------------------------------


def peer(window=8, **options):
    """Their model with random weights everywhere, so that no part is hidden behind a zero."""
    from transformers import LongformerConfig, LongformerForMaskedLM

    config = LongformerConfig(
        vocab_size=64, hidden_size=D, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        attention_window=window, max_position_embeddings=130, type_vocab_size=1, layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    return shaken(LongformerForMaskedLM(config), 0.1).double().eval()


NAMES = {
    **{f"longformer.{theirs}": f"model.{ours}" for theirs, ours in BERT_NAMES.items() if theirs.startswith("e")},
    "attention.self.query_global": "mixer.q_global_proj",
    "attention.self.key_global": "mixer.k_global_proj",
    "attention.self.value_global": "mixer.v_global_proj",
    **BERT_NAMES,
    "lm_head.dense": "transform.dense",
    "lm_head.layer_norm": "transform.norm",
    "lm_head.decoder": "lm_head",
}


def ours_like(theirs, global_tokens, window):
    base = model_config("longformer-tiny").spec.plain()
    layer = {
        "mixer": {
            "name": "longformer", "num_heads": 4, "head_dim": D // 4, "window": window // 2 + 1, "causal": False,
            "qkv_bias": True, "out_bias": True, "global_tokens": max(global_tokens, 1),
        },
        "ffn": {"name": "mlp", "hidden_size": 48, "activation": "gelu"},
    }  # fmt: skip
    sizes = {"vocab_size": 64, "hidden_size": D, "max_position_embeddings": 128, "layers": [layer] * 3}
    ours = ZooForMaskedLM(ZooConfig(**{**base, **sizes})).double().eval()
    ours.load_state_dict(renamed(theirs.state_dict(), NAMES), strict=True)
    return ours


@pytest.mark.parametrize(("length", "global_tokens", "padded"), [(70, 1, False), (70, 5, True), (24, 3, True)])
def test_all_hidden_states_and_gradients_are_transformers(length, global_tokens, padded):
    theirs = peer()
    ours = ours_like(theirs, global_tokens, 8)
    ids_BL = torch.randint(3, 64, (3, length))
    mask_BL = torch.ones_like(ids_BL)
    if padded:
        mask_BL[1, length - 7 :] = 0
        mask_BL[2, 6:] = 0
    ids_BL = ids_BL.masked_fill(mask_BL == 0, 1)  # their padding has an id of its own, which gives it position 1
    global_BL = (torch.arange(length) < global_tokens).long().expand_as(ids_BL)
    a = theirs(ids_BL, attention_mask=mask_BL, global_attention_mask=global_BL, output_hidden_states=True)
    b = ours.model(ids_BL, attention_mask=mask_BL, output_hidden_states=True)
    real = mask_BL.bool()
    assert len(a.hidden_states) == len(b.hidden_states) == 4
    for got, expected in zip(b.hidden_states, a.hidden_states, strict=True):
        torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-6)  # their softmax is float32
    logits = ours(ids_BL, attention_mask=mask_BL).logits
    torch.testing.assert_close(logits[real], a.logits[real], rtol=1e-5, atol=1e-5)
    for y in (logits, a.logits):
        y[real].square().mean().backward()
    own = dict(ours.named_parameters())
    for name, p in renamed(dict(theirs.named_parameters()), NAMES).items():
        if p.grad is not None and "embed" not in name:  # their embedding of the padding id takes no gradient
            scale = p.grad.abs().max().clamp(min=1e-3)
            assert ((own[name].grad - p.grad).abs().max() / scale).item() < 1e-4, name


def test_values_made_with_transformers():
    """The same layer on numbers from a formula, for where transformers changes."""
    mixer = Longformer(
        LongformerOptions(num_heads=2, head_dim=4, window=3, global_tokens=2, causal=False, qkv_bias=True), 8
    ).double()
    mixer.load_state_dict(formula_weights(mixer.state_dict()))
    y_BLD, _ = mixer(formula((1, 16, 8), 0.3), mask_BL=torch.arange(16)[None] < 13)
    expected = torch.tensor(EXPECTED, dtype=torch.double)
    torch.testing.assert_close(y_BLD[0, [0, 1, 5, 12], :2], expected, rtol=1e-6, atol=1e-7)


def formula(shape, frequency):
    n = torch.Size(shape).numel()
    return torch.sin(frequency * torch.arange(n, dtype=torch.double) ** 1.1).view(shape)


def formula_weights(state):
    return {name: 0.5 * formula(x.shape, 0.7 + 0.1 * i) for i, (name, x) in enumerate(sorted(state.items()))}


# LongformerSelfAttention of transformers 5.23, attention_window 4, then W_o: positions 0, 1, 5 and 12, two channels
EXPECTED = [
    [-0.13633705, -0.53851459],
    [-0.13916066, -0.54157177],
    [0.01445552, -0.19862089],
    [-0.04628439, -0.24084022],
]


# --- sizes, initialisation, conversion --------------------------------------------------------------------------------


def test_the_parameters_are_as_many_as_transformers_has():
    from transformers import LongformerConfig, LongformerForMaskedLM

    config = LongformerConfig(
        vocab_size=50265, max_position_embeddings=4098, type_vocab_size=1, attention_window=512, layer_norm_eps=1e-5
    )
    with torch.device("meta"):
        theirs = LongformerForMaskedLM(config)
        ours = ZooForMaskedLM(model_config("longformer-base-149m"))
    count = sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in ours.parameters()) == count == 148711257


def test_global_projections_start_as_copies():
    model = zoo.create_model("longformer-tiny")
    for layer in model.model.layers:
        for letter in "qkv":
            own, local = (getattr(layer.mixer, f"{letter}{kind}_proj") for kind in ("_global", ""))
            assert torch.equal(own.weight, local.weight)
            assert own.weight.data_ptr() != local.weight.data_ptr()
            assert own.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not own.bias.any()


def test_conv_and_lists_that_do_not_fit_are_refused():
    for options, message in [
        ({"dilation": [1, 2]}, r"dilation has 2 numbers for num_heads \(4\)"),
        ({"dilation": 0}, "dilation"),
        ({"conv": 4}, "projections of global tokens have no convolution"),
        ({"global_token": 1}, "did you mean 'global_tokens'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            LongformerOptions.parse({"num_heads": 4, "head_dim": 4, **options})


def original(causal=False):
    """Attention with all that a conversion has to copy."""
    config = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=True, rotary=RotaryConfig(theta=500.0),
        causal=causal,
    )  # fmt: skip
    return shaken(Attention(config, D), 0.2)


@pytest.mark.parametrize("causal", [True, False])
def test_conversion_is_exact_within_the_window(causal):
    attention = original(causal)
    student = convert(attention, "longformer", window=40)
    assert student.config.global_tokens == (4 if causal else 1)
    assert relative_error(student, attention, length=40) < 1e-5
    assert relative_error(convert(attention, "longformer", window=6), attention) > 1e-3


def test_conversion_improves_with_training():
    attention = original()
    student = convert(attention, "longformer", window=6, global_tokens=2)
    before, moved = relative_error(student, attention), student.q_global_proj.weight.clone()
    align(student, attention, steps=24)
    assert relative_error(student, attention) < 0.9 * before
    assert not torch.equal(student.q_global_proj.weight, moved)
    assert not torch.equal(student.q_global_proj.weight, student.q_proj.weight)  # copies, not the same tensor
