"""Reformer: transformers' models with the same hash seed, decoding, published sizes, and where a conversion starts."""

from __future__ import annotations

import pytest
import torch
from formulas import align, convert, largest_error, parameters, relative_error, teacher, wave
from transformers import ReformerConfig, ReformerForMaskedLM, ReformerModelWithLMHead

import zoo
from zoo.config import ZooConfig
from zoo.errors import ConfigError
from zoo.mixers.lsh_attention import LSHAttention, LSHAttentionConfig, shared_projection
from zoo.models.heads import ZooForCausalLM, ZooForMaskedLM
from zoo.registry import model_config
from zoo.testing import check_mixer

D, H, K, CHUNK = 32, 2, 8, 8
LAYERS = ["local", "lsh", "lsh", "local"]


def peer(*, causal=True, layers=LAYERS, shape=(8, 8), seed=3, **options):
    """Their model with random weights everywhere, in float64."""
    config = ReformerConfig(
        attn_layers=layers, attention_head_size=K, hidden_size=D, feed_forward_size=48, num_attention_heads=H,
        axial_pos_shape=shape, axial_pos_embds_dim=(12, 20), max_position_embeddings=shape[0] * shape[1],
        local_attn_chunk_length=CHUNK, lsh_attn_chunk_length=CHUNK, hash_seed=seed,
        hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0,
        vocab_size=64, is_decoder=causal, pad_token_id=0, eos_token_id=None,
        **{"num_hashes": 2, "num_buckets": 8, **options},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = (ReformerModelWithLMHead if causal else ReformerForMaskedLM)(config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name != "lm_head.bias":  # which they do not add
                p.add_(0.2 * torch.randn_like(p))
    return theirs.double().eval()


def renamed(state):
    """Their names as ours."""
    names = {
        "reformer.embeddings.word_embeddings": "model.embed_tokens",
        "reformer.embeddings.position_embeddings.weights": "model.embed_positions.axes",
        "reformer.encoder.layers": "model.layers",
        "reformer.encoder.layer_norm": "model.norm",
        "attention.layer_norm": "mixer_norm",
        "attention.self_attention.query_key": "mixer.q_proj",
        "attention.self_attention.query": "mixer.q_proj",
        "attention.self_attention.key": "mixer.k_proj",
        "attention.self_attention.value": "mixer.v_proj",
        "attention.output.dense": "mixer.o_proj",
        "feed_forward.layer_norm": "ffn_norm",
        "feed_forward.dense.dense": "ffn.up_proj",
        "feed_forward.output.dense": "ffn.down_proj",
        "lm_head.decoder": "lm_head",
    }
    out = {}
    for key, tensor in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        if "mask_value" not in key and key != "lm_head.bias":
            out[key] = tensor.flatten(0, 1) if ".axes." in key else tensor
    return out


def ours_like(theirs, **more):
    c = theirs.config
    shared = {"num_heads": H, "head_dim": K, "causal": c.is_decoder, "chunk": CHUNK}
    local = {"name": "local_attention", **shared, "chunks_after": c.local_num_chunks_after}
    local["chunks_before"] = c.local_num_chunks_before
    lsh = {
        "name": "lsh_attention", **shared, "num_buckets": c.num_buckets, "num_hashes": c.num_hashes,
        "seed": c.hash_seed, "chunks_before": c.lsh_num_chunks_before, "chunks_after": c.lsh_num_chunks_after, **more,
    }  # fmt: skip
    ffn = {"name": "mlp", "hidden_size": 48, "activation": "relu"}
    spec = {
        **model_config("reformer-tiny").spec.plain(), "task": "causal-lm" if c.is_decoder else "masked-lm",
        "vocab_size": 64, "hidden_size": D, "max_position_embeddings": c.max_position_embeddings,
        "axial_shape": list(c.axial_pos_shape), "axial_dims": [12, 20],
        "layers": [{"mixer": {"local": local, "lsh": lsh}[kind], "ffn": ffn} for kind in c.attn_layers],
    }  # fmt: skip
    ours = (ZooForCausalLM if c.is_decoder else ZooForMaskedLM)(ZooConfig(**spec)).double().eval()
    missing, unexpected = ours.load_state_dict(renamed(theirs.state_dict()), strict=False)
    assert not missing
    assert not unexpected
    return ours


@pytest.fixture
def single_rotations(monkeypatch):
    """They draw rotations in the dtype of the model: in float64 other ones than in float32, which ours are."""
    draw = torch.randn

    def randn(*shape, dtype=None, **options):
        return draw(*shape, dtype=torch.float32, **options).to(dtype or torch.float32)

    monkeypatch.setattr(torch, "randn", randn)


@pytest.mark.parametrize("options", [
    {}, {"causal": False}, {"causal": False, "lsh_num_chunks_after": 1, "local_num_chunks_after": 1},
    {"num_hashes": 1, "lsh_num_chunks_before": 2, "local_num_chunks_before": 2},
    {"num_buckets": [4, 6], "num_hashes": 3},
], ids=str)  # fmt: skip
def test_all_hidden_states_and_gradients_are_transformers(options, single_rotations):
    theirs = peer(**options).train()  # without dropout; only in training do they have gradients
    ours = ours_like(theirs)
    tokens_BL = torch.randint(1, 64, (2, 64))
    a = theirs(tokens_BL, output_hidden_states=True)
    b = ours.model(tokens_BL, output_hidden_states=True)
    assert len(a.hidden_states) == len(b.hidden_states) == 5  # the last ones are before and after the norm
    for got, expected in zip(b.hidden_states[:-1], a.hidden_states, strict=False):
        torch.testing.assert_close(got[..., D:], expected, rtol=1e-9, atol=1e-9)
    ours.train()
    logits = ours(tokens_BL).logits
    assert largest_error(logits, a.logits) < 1e-10
    for y in (a.logits, logits):
        y.square().mean().backward()
    own = dict(ours.named_parameters())
    expected = renamed({n: p.grad for n, p in theirs.named_parameters()})
    assert expected.keys() == own.keys()
    for name, gradient in expected.items():
        assert largest_error(own[name].grad, gradient) < 1e-6, name


@pytest.mark.parametrize("causal", [True, False])
def test_lengths_that_end_inside_a_chunk_and_padding_are_transformers(causal, single_rotations):
    theirs = peer(causal=causal)
    ours = ours_like(theirs)
    for length, padding in ((5, 0), (8, 3), (13, 3), (50, 0), (54, 3)):
        tokens_BL = torch.randint(1, 64, (2, length))
        mask_BL = torch.ones_like(tokens_BL)
        mask_BL[1, length - padding :] = 0  # they count chunks of the padded length: as many, if padding fills none
        with torch.no_grad():
            expected = theirs(tokens_BL, attention_mask=mask_BL).logits
            got = ours(tokens_BL, attention_mask=mask_BL).logits
        real = mask_BL.bool()
        assert largest_error(got[real], expected[real]) < 1e-10, length


def test_single_precision_is_their_double_precision(single_rotations):
    """Their own single precision has two decimals where a token meets only itself: beside -1e5 no more are left."""
    theirs = peer()
    ours = ours_like(theirs).float()
    tokens_BL = torch.randint(1, 64, (2, 64))
    with torch.no_grad():
        expected = theirs(tokens_BL).logits
        assert largest_error(ours(tokens_BL).logits.double(), expected) < 1e-5
        assert 1e-5 < largest_error(theirs.float()(tokens_BL).logits.double(), expected) < 1e-2


@pytest.mark.parametrize(("prompt", "hashes"), [(3, 2), (24, 2), (21, 1)])
def test_generation_with_cache_is_transformers(prompt, hashes, single_rotations):
    """One row: theirs takes the keys of all rows from the first. (It also counts the padding of a prompt that ends
    inside a chunk in all rounds but the first, and sees all for one step more after a prompt of exactly one chunk.)
    """
    theirs = peer(shape=(8, 16), num_hashes=hashes)
    ours = ours_like(theirs)
    tokens_1L = torch.randint(1, 64, (1, prompt))
    step, theirs_so_far, ours_so_far = tokens_1L, None, None
    with torch.no_grad():
        for _ in range(24):
            a = theirs(step, past_buckets_states=theirs_so_far, use_cache=True)
            b = ours(step, past_key_values=ours_so_far, use_cache=True)
            theirs_so_far, ours_so_far = a.past_buckets_states, b.past_key_values
            assert largest_error(b.logits[:, -1], a.logits[:, -1]) < 1e-10
            step = a.logits[:, -1:].argmax(-1)
        options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(ours.generate(tokens_1L, **options), theirs.generate(tokens_1L, **options))


VALUES = {"num_heads": 2, "head_dim": 4, "chunk": 4, "num_buckets": 4, "num_hashes": 2, "seed": 5}


def test_values_made_with_transformers():
    """The same layer on numbers from a formula, for where transformers changes."""
    mixer = LSHAttention(LSHAttentionConfig(**VALUES), 8).double()
    mixer.load_state_dict(formula_weights())
    y_BLD, _ = mixer(wave(1, 22, 8, step=0.3))
    torch.testing.assert_close(y_BLD[0, [0, 5, 12, 21], :2], EXPECTED, rtol=1e-6, atol=1e-7)


def formula_weights():
    names = ("q_proj.weight", "v_proj.weight", "o_proj.weight")
    return {name: wave(8, 8, step=0.7 + 0.1 * i) for i, name in enumerate(names)}


# LSHSelfAttention of transformers 5.23 (with two masked positions behind), then W_o: four positions, two channels
EXPECTED = torch.tensor([
    [0.04619191, -3.81009725],
    [5.00855356, -4.84301602],
    [-0.32067471, 3.58228838],
    [-1.53591018, 1.86623423],
], dtype=torch.double)  # fmt: skip


# --- the laws, and what holds where they do not -----------------------------------------------------------------------

VARIANTS = {
    "several chunks to either side": {"causal": False, "chunks_before": 2, "chunks_after": 1, "num_hashes": 3},
    "within buckets": {"across_buckets": False, "num_buckets": [2, 4], "chunk": 7, "rotary": {"theta": 100.0}},
    "no neighbours": {"chunks_before": 0, "chunk": 11, "num_hashes": 1, "value_head_dim": 6},
    "own keys": {"shared_qk": False, "qk_norm": True, "chunk": 7, "rotary": {"theta": 100.0}},
    "own keys, two-sided": {"shared_qk": False, "causal": False, "chunks_after": 1, "across_buckets": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_lsh_variant_obeys_the_laws(variant):
    check_mixer("lsh_attention", config=VARIANTS[variant], seed=1)


@pytest.mark.parametrize("options", [
    {"chunk": 3, "chunks_before": 3, "num_kv_heads": 1}, {"chunk": 9, "chunks_before": 0, "qk_norm": True},
    {"chunk": 4, "causal": False, "chunks_after": 2, "rotary": {"theta": 100.0}},
], ids=str)  # fmt: skip
def test_local_variant_obeys_the_laws(options):
    check_mixer("local_attention", config=options, seed=1)


def lsh(**options):
    torch.manual_seed(4)
    config = LSHAttentionConfig(
        **{"num_heads": H, "head_dim": K, "chunk": 4, "num_buckets": 4, "num_hashes": 2, **options}
    )
    mixer = LSHAttention(config, D).double().eval()
    with torch.no_grad():
        for p in mixer.parameters():
            p.normal_(std=0.3)
    return mixer


def run(mixer, x_BLD, sizes, mask_BL=None):
    """The outputs of consecutive pieces with the state carried."""
    state, parts, start = mixer.init_state(len(x_BLD)), [], 0
    for size in sizes:
        at = slice(start, start + size)
        y, state = mixer(x_BLD[:, at], mask_BL=None if mask_BL is None else mask_BL[:, at], state=state)
        parts.append(y)
        start += size
    return torch.cat(parts, 1)


@pytest.mark.parametrize("shared", [True, False])
def test_what_follows_the_first_piece_does_not_depend_on_how_it_is_cut(shared):
    mixer, x_BLD = lsh(shared_qk=shared), torch.randn(2, 30, D, dtype=torch.double)
    with torch.no_grad():
        steps = run(mixer, x_BLD, [9] + [1] * 21)
        for sizes in ([9, 21], [9, 1, 13, 7]):
            torch.testing.assert_close(run(mixer, x_BLD, sizes), steps, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(steps[:, :9], mixer(x_BLD[:, :9])[0], rtol=1e-10, atol=1e-10)
        assert largest_error(steps, mixer(x_BLD)[0]) > 1e-3  # the whole is sorted in another way
        assert largest_error(run(mixer, x_BLD, [1] * 30), steps) > 1e-3


@pytest.mark.parametrize("shared", [True, False])
def test_padded_rows_go_on_as_they_do_alone(shared):
    mixer, x_BLD = lsh(shared_qk=shared), torch.randn(2, 26, D, dtype=torch.double)
    mask_BL = torch.ones(2, 26, dtype=torch.bool)
    mask_BL[0, :6], mask_BL[1, 3:5], mask_BL[1, 20] = False, False, False
    poisoned = x_BLD.masked_fill(~mask_BL[..., None], torch.nan)
    with torch.no_grad():
        y_BLD = run(mixer, poisoned, [14] + [1] * 12, mask_BL)
        for row in range(2):
            real = mask_BL[row]
            alone = run(mixer, x_BLD[row : row + 1, real], [int(real[:14].sum())] + [1] * int(real[14:].sum()))
            torch.testing.assert_close(y_BLD[row : row + 1, real], alone, rtol=1e-10, atol=1e-10)


def test_training_draws_rotations_only_where_asked():
    x_BLD = torch.randn(1, 40, D, dtype=torch.double)
    for redraw in (False, True):
        mixer = lsh(redraw=redraw)
        expected = mixer(x_BLD)[0]
        assert torch.equal(mixer(x_BLD)[0], expected)
        mixer.train()
        torch.manual_seed(0)
        first = mixer(x_BLD)[0]
        assert torch.equal(first, expected) != redraw
        assert torch.equal(mixer(x_BLD)[0], first) != redraw
        torch.manual_seed(0)
        assert torch.equal(mixer(x_BLD)[0], first)


def test_seeds_hash_differently_and_rotations_are_not_saved():
    one, other = lsh(seed=1), lsh(seed=2)
    assert not torch.equal(one.rotations_HKRM, other.rotations_HKRM)
    assert torch.equal(one.rotations_HKRM, lsh(seed=1).rotations_HKRM)
    assert one.rotations_HKRM.std().item() == pytest.approx(1, rel=0.2)
    assert set(one.state_dict()) == {"q_proj.weight", "v_proj.weight", "o_proj.weight"}


@pytest.mark.parametrize(("name", "options", "message"), [
    ("lsh_attention", {"num_buckets": 7}, "num_buckets: 7 must be an even number"),
    ("lsh_attention", {"num_buckets": [4, 0]}, "num_buckets: 0 must be an even number"),
    ("lsh_attention", {"num_buckets": []}, "one to eight numbers"),
    ("lsh_attention", {"chunks_after": 1}, r"chunks_after \(1\) must be 0 in the causal form"),
    ("local_attention", {"chunks_after": 2}, r"chunks_after \(2\) must be 0 in the causal form"),
    ("lsh_attention", {"num_kv_heads": 1}, "num_kv_heads"),
    ("lsh_attention", {"qk_norm": True}, "qk_norm needs shared_qk: false"),
    ("lsh_attention", {"num_bucket": 8}, "did you mean 'num_buckets'"),
])  # fmt: skip
def test_impossible_options_are_refused(name, options, message):
    from zoo.registry import mixer_class

    with pytest.raises(ConfigError, match=message):
        mixer_class(name).Config.parse({"num_heads": 2, "head_dim": 4, **options})


# --- sizes, initialisation, conversion --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "their_options"), [
    ("reformer-crime-and-punishment-2.7m", {
        "attn_layers": ["local", "lsh"] * 3, "attention_head_size": 64, "hidden_size": 256, "feed_forward_size": 512,
        "num_attention_heads": 2, "axial_pos_shape": [512, 1024], "axial_pos_embds_dim": [64, 192], "vocab_size": 320,
        "num_buckets": [64, 128],
    }),
    ("reformer-enwik8-149m", {
        "attn_layers": ["local", "local", "lsh", "local"] * 3, "attention_head_size": 128, "hidden_size": 1024,
        "feed_forward_size": 4096, "num_attention_heads": 8, "axial_pos_shape": [128, 512],
        "axial_pos_embds_dim": [256, 768], "vocab_size": 258, "num_buckets": 512,
    }),
])  # fmt: skip
def test_published_sizes(name, their_options):
    """Every tensor has the shape that transformers gives it; their output bias is never added, so it is left out."""
    with torch.device("meta"):
        theirs = ReformerModelWithLMHead(ReformerConfig(is_decoder=True, **their_options))
        ours = ZooForCausalLM(model_config(name))
    expected = {key: tuple(p.shape) for key, p in renamed(dict(theirs.named_parameters())).items()}
    assert {key: tuple(p.shape) for key, p in ours.named_parameters()} == expected
    million = float(name.rsplit("-", 1)[1][:-1])
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(million, rel=0.02)


def test_initialisation_is_the_published_one():
    model = zoo.create_model("reformer-tiny")
    for name, p in model.named_parameters():
        if "axes" in name:
            assert p.std().item() == pytest.approx(1, rel=0.1), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert torch.equal(p, torch.ones_like(p) if name.endswith("norm.weight") else torch.zeros_like(p)), name
    assert parameters("reformer-tiny")[0] < 1e6


@pytest.mark.parametrize("causal", [True, False])
def test_local_conversion_is_exact_within_a_chunk_and_improves(causal):
    attention = teacher(causal=causal)
    student = convert(attention, "local_attention", chunk=8)
    assert relative_error(student, attention, length=8) < 1e-6
    start = relative_error(student, attention)
    assert 1e-3 < start < 1
    align(student, attention, steps=40)
    assert relative_error(student, attention) < 0.9 * start


def shared_teacher(causal, asymmetry):
    """Attention whose keys are its queries, as far as `asymmetry` allows."""
    attention = teacher(causal=causal, sharpness=2.0)
    with torch.no_grad():
        attention.k_proj.weight.lerp_(attention.q_proj.weight, 1 - asymmetry)
        attention.k_proj.bias.lerp_(attention.q_proj.bias, 1 - asymmetry)
    return attention


@pytest.mark.parametrize("causal", [True, False])
def test_with_own_keys_a_conversion_is_exact_within_a_chunk_and_more_hashes_miss_less(causal):
    attention = teacher(causal=causal, sharpness=2.0)
    exact, one, eight = (
        convert(attention, "lsh_attention", chunk=16, num_buckets=8, num_hashes=n) for n in (4, 1, 8)
    )  # fmt: skip
    assert relative_error(exact, attention, length=16) < 1e-5
    errors = [relative_error(student, attention) for student in (eight, exact, one)]
    assert 1e-3 < errors[0] < errors[1] < errors[2] < 0.7
    paper = convert(attention, "lsh_attention", chunk=16, num_buckets=8, shared_qk=True)
    assert errors[1] < 0.6 * relative_error(paper, attention)
    align(exact, attention, steps=40)
    assert relative_error(exact, attention) < 0.98 * errors[1]


@pytest.mark.parametrize("causal", [True, False])
def test_shared_lsh_conversion_starts_near_and_improves(causal):
    attention = shared_teacher(causal, 0.3)
    student = convert(attention, "lsh_attention", chunk=16, num_buckets=8, shared_qk=True)
    untaught = convert(attention, "lsh_attention", chunk=16, num_buckets=8, shared_qk=True)
    torch.manual_seed(0)
    torch.nn.init.normal_(untaught.q_proj.weight, std=D**-0.5)
    start = relative_error(student, attention)
    assert start < 0.93 * relative_error(untaught, attention)
    align(student, attention, steps=40)
    assert relative_error(student, attention) < 0.9 * start


def test_the_shared_projection_is_the_best_symmetric_one():
    """For queries that are keys it is W_q up to a rotation of the head; in general nearer than the mean of both."""

    def distance(attention, shared_HKE):
        a = attention.attention_weights()
        q, k = (
            torch.cat([w, b[:, None]], 1).unflatten(0, (4, -1)) for w, b in ((a.q_HKD, a.q_bias), (a.k_GKD, a.k_bias))
        )
        m_HEE = q.mT @ k
        product = shared_HKE.mT @ shared_HKE
        scale = (product * m_HEE).sum((1, 2), keepdim=True) / product.square().sum((1, 2), keepdim=True)
        return ((scale * product - m_HEE).norm() / m_HEE.norm()).item(), ((q + k) / 2)

    same, different = shared_teacher(True, 0.0), shared_teacher(True, 0.7)
    error, _ = distance(same, shared_projection(same.attention_weights()))
    assert error < 1e-3
    error, mean = distance(different, shared_projection(different.attention_weights()))
    assert error < 0.98 * distance(different, mean)[0]


def test_grouped_heads_rotary_and_qk_norm_convert():
    from zoo.mixers.attention import Attention, AttentionConfig
    from zoo.ops.rotary import RotaryConfig

    for options in ({"rotary": RotaryConfig(theta=100.0)}, {"qk_norm": True}, {"qkv_bias": True, "out_bias": True}):
        torch.manual_seed(0)
        attention = Attention(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, **options), D)
        student = convert(attention, "lsh_attention", chunk=64)
        assert student.v_proj.weight.shape == student.k_proj.weight.shape == (32, D)
        assert relative_error(student, attention) < 1e-5
        shared = convert(attention, "lsh_attention", chunk=64, shared_qk=True)
        assert shared.v_proj.weight.shape == (32, D)
        assert relative_error(shared, attention) < 0.7
