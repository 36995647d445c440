"""BigBird: the laws in its variants, transformers' model with the same random blocks, and where a conversion starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from formulas import BERT_NAMES, align, convert, relative_error, renamed, shaken, teacher

import zoo
from zoo.config import ZooConfig
from zoo.errors import ConfigError, TraitError
from zoo.mixers.big_bird import BigBird, BigBirdOptions
from zoo.models.heads import ZooForMaskedLM
from zoo.registry import model_config
from zoo.testing import check_mixer

D, BLOCK, LISTED = 32, 4, 2
VARIANTS = {
    "larger blocks": {"block_size": 3, "num_random_blocks": 2, "rotary": {"theta": 100.0}, "num_kv_heads": 1},
    "no random blocks": {"block_size": 5, "num_random_blocks": 0, "value_head_dim": 6},
    "all short": {"block_size": 64},
    "a copy of the first block": {"random_pattern": "first_block", "num_random_blocks": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_obeys_all_laws(variant):
    check_mixer("big_bird", config={"causal": False, **VARIANTS[variant]}, seed=1)


# --- transformers' model ----------------------------------------------------------------------------------------------


def peer(layers=3, listed=LISTED, block=BLOCK, length=128):
    """Their model with random weights everywhere, so that no part is hidden behind a zero."""
    from transformers import BigBirdConfig, BigBirdForMaskedLM

    config = BigBirdConfig(
        vocab_size=64, hidden_size=D, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=length, block_size=block, num_random_blocks=listed, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = shaken(BigBirdForMaskedLM(config), 0.1)
    return theirs.double().train()  # only in training do they draw blocks; there is no dropout here


NAMES = {
    **{f"bert.{theirs}": f"model.{ours}" for theirs, ours in BERT_NAMES.items() if theirs.startswith("e")},
    **BERT_NAMES,
    "cls.predictions.transform.dense": "transform.dense",
    "cls.predictions.transform.LayerNorm": "transform.norm",
    "cls.predictions.decoder": "lm_head",
    "cls.predictions.bias": "lm_head.bias",
}


def ours_like(theirs, **options):
    base, c = model_config("big-bird-tiny").spec.plain(), theirs.config
    mixer = {
        "name": "big_bird", "num_heads": 4, "head_dim": D // 4, "qkv_bias": True, "out_bias": True,
        "block_size": c.block_size, "num_random_blocks": c.num_random_blocks, "max_length": c.max_position_embeddings,
        **options,
    }  # fmt: skip
    ffn = {"name": "mlp", "hidden_size": 48, "activation": "gelu_new"}
    layers = [{"mixer": {**mixer, "seed": i}, "ffn": ffn} for i in range(c.num_hidden_layers)]
    sizes = {"vocab_size": 64, "hidden_size": D, "max_position_embeddings": c.max_position_embeddings, "layers": layers}
    ours = ZooForMaskedLM(ZooConfig(**{**base, **sizes})).double().eval()
    ours.load_state_dict(renamed(theirs.state_dict(), NAMES), strict=True)
    return ours


@pytest.mark.parametrize("length", [70, 96, 36])
def test_all_hidden_states_and_gradients_are_transformers(length):
    """Lengths that end inside a block, at its end, and the longest with full attention; with padding in one row."""
    theirs = peer()
    ours = ours_like(theirs)
    ids_BL = torch.randint(3, 64, (3, length))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, -1:] = 0  # they count blocks of the padded length, so less than a block of it
    a = theirs(ids_BL, attention_mask=mask_BL, output_hidden_states=True)
    b = ours.model(ids_BL, attention_mask=mask_BL, output_hidden_states=True)
    real = mask_BL.bool()
    assert len(a.hidden_states) == len(b.hidden_states) == 4
    for got, expected in zip(b.hidden_states, a.hidden_states, strict=True):
        torch.testing.assert_close(got[real], expected[:, :length][real], rtol=1e-8, atol=1e-8)
    logits = ours(ids_BL, attention_mask=mask_BL).logits
    for y in (logits, a.logits[:, :length]):
        y[real].square().mean().backward()
    own = dict(ours.named_parameters())
    compared = 0
    for name, p in renamed(dict(theirs.named_parameters()), NAMES).items():
        if p.grad is not None and "embed_tokens" not in name:  # their embedding of the padding id takes no gradient
            scale = p.grad.abs().max().clamp(min=1e-3)
            assert ((own[name].grad - p.grad).abs().max() / scale).item() < 1e-4, name
            compared += 1
    assert compared > 40


def test_outside_training_transformers_repeats_the_first_block():
    theirs = peer(layers=1).eval()
    ids_BL = torch.randint(3, 64, (2, 80))
    with torch.no_grad():
        expected = theirs(ids_BL).logits
        got = ours_like(theirs, random_pattern="first_block")(ids_BL).logits
        other = ours_like(theirs)(ids_BL).logits
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("length", "max_length", "block", "listed"),
    [(70, 128, 4, 2), (1024, 4096, 64, 3), (3072, 4096, 64, 3), (4096, 4096, 64, 3), (2048, 4096, 64, 3)],
)
def test_random_blocks_are_those_of_transformers(length, max_length, block, listed):
    """Three lengths have a plan of their own there."""
    theirs = peer(1, listed, block, max_length).bert.encoder.layer[0].attention.self
    options = {"block_size": block, "num_random_blocks": listed, "max_length": max_length, "seed": 5}
    ours = BigBird(BigBirdOptions(num_heads=4, head_dim=8, **options), D)
    blocks = -(-length // block)
    np.random.seed(5)
    if length in (1024, 3072, 4096):
        plan = [
            theirs._bigbird_block_rand_mask(max_length, max_length, block, block, listed, last_idx=1024)
            for _ in range(4)
        ]
        expected = np.stack(plan)[:, : blocks - 2]
    else:
        plan = theirs._get_rand_attn_plan(blocks * block, block, listed)
        expected = np.stack(theirs._bigbird_block_rand_mask_with_head(*[blocks * block] * 2, block, block, 4, *plan))
    assert torch.equal(ours.random_blocks(length)[0, :, 1:-1], torch.from_numpy(expected).long())
    mask_BL = torch.arange(length + 9)[None] >= 9  # padding does not change them
    padded = ours.random_blocks(length + 9, mask_BL)[0, :, 1 : blocks - 1]
    assert torch.equal(padded, ours.random_blocks(length)[0, :, 1:-1])


def test_values_made_with_transformers():
    """The same layer on numbers from a formula, for where transformers changes."""
    options = {"block_size": 2, "num_random_blocks": 1, "seed": 4, "qkv_bias": True, "max_length": 64}
    mixer = BigBird(BigBirdOptions(num_heads=2, head_dim=4, **options), 8).double()
    mixer.load_state_dict(formula_weights(mixer.state_dict()))
    y_BLD, _ = mixer(formula((1, 21, 8), 0.3))
    expected = torch.tensor(EXPECTED, dtype=torch.double)
    torch.testing.assert_close(y_BLD[0, [0, 5, 12, 18], :2], expected, rtol=1e-6, atol=1e-7)


def formula(shape, frequency):
    n = torch.Size(shape).numel()
    return torch.sin(frequency * torch.arange(n, dtype=torch.double) ** 1.1).view(shape)


def formula_weights(state):
    return {name: 0.5 * formula(x.shape, 0.7 + 0.1 * i) for i, (name, x) in enumerate(sorted(state.items()))}


# BigBirdBlockSparseAttention of transformers 5.23 in training, then W_o: positions 0, 5, 12 and 18, two channels
EXPECTED = [
    [0.13154263, -0.29263104],
    [0.09503445, -0.30218678],
    [0.11723491, -0.29144778],
    [0.1043898, -0.27445667],
]


# --- sizes, initialisation, conversion --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["big-bird-base-128m", "big-bird-large-359m"])
def test_the_parameters_are_as_many_as_transformers_has(name):
    from transformers import BigBirdConfig, BigBirdForMaskedLM

    spec = model_config(name).spec
    config = BigBirdConfig(
        hidden_size=spec.hidden_size, num_hidden_layers=len(spec.layers), num_attention_heads=spec.hidden_size // 64,
        intermediate_size=4 * spec.hidden_size, vocab_size=spec.vocab_size,
    )  # fmt: skip
    with torch.device("meta"):
        theirs, ours = BigBirdForMaskedLM(config), ZooForMaskedLM(model_config(name))
    count = sum(p.numel() for name, p in theirs.named_parameters() if "pooler" not in name)
    assert sum(p.numel() for p in ours.parameters()) == count


def test_projections_start_as_published():
    model = zoo.create_model("big-bird-tiny")
    for name, p in model.named_parameters():
        if "_proj.weight" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.1)
        elif "_proj.bias" in name:
            assert not p.any()


def test_every_layer_of_the_published_sizes_has_its_own_seed():
    for name, layers in (("big-bird-base-128m", 12), ("big-bird-large-359m", 24)):
        assert [layer.mixer.seed for layer in model_config(name).spec.layers] == list(range(layers))


def test_layers_with_other_seeds_look_elsewhere():
    tables = [BigBird(BigBirdOptions(num_heads=2, head_dim=4, seed=s), 8).random_blocks(2048) for s in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert not torch.equal(tables[0][:, 0], tables[0][:, 1])  # and so do heads


def test_what_cannot_be_is_refused():
    with pytest.raises(TraitError, match="no causal form"):
        BigBird(BigBirdOptions(num_heads=2, head_dim=4, causal=True), 8)
    with pytest.raises(ConfigError, match="block_size"):
        BigBirdOptions.parse({"num_heads": 2, "head_dim": 4, "block_size": 0})
    with pytest.raises(ConfigError, match="did you mean 'num_random_blocks'"):
        BigBirdOptions.parse({"num_heads": 2, "head_dim": 4, "num_rand_blocks": 2})


def test_conversion_starts_at_attention_and_improves_with_training():
    attention = teacher(causal=False, kv_heads=2)
    student = convert(attention, "big_bird", block_size=2, num_random_blocks=1)
    assert relative_error(student, attention, length=14) < 1e-6  # full up to 7 blocks
    before = relative_error(student, attention)
    assert before > 1e-3
    align(student, attention, steps=24)
    assert relative_error(student, attention) < 0.9 * before
