"""RWKV-4: against transformers and a published file, its initialisation, its sizes, where a conversion starts."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from formulas import align, convert, parameters, relative_error, teacher

import zoo
from zoo.convert.layouts import import_checkpoint
from zoo.convert.stats import StatsSum
from zoo.errors import CheckpointError, ConfigError, ConversionError
from zoo.mixers.base import AttentionStats
from zoo.mixers.recurrent import half_life_of_average
from zoo.mixers.rwkv4 import RWKV4, RWKV4Config
from zoo.registry import list_models

V, D, E, F = 53, 32, 48, 80


def largest(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


# --- transformers ---------------------------------------------------------------------------------------------------


def ours_from(key, weight):
    """The name and the value here of a parameter of transformers' RwkvForCausalLM."""
    names = {"blocks.": "layers.", "layers.0.pre_ln": "embed_norm", "attention": "mixer", "feed_forward": "ffn"}
    names |= {"ln1": "mixer_norm", "ln2": "ffn_norm", "ln_out": "norm", "embeddings": "embed_tokens", "head": "lm_head"}
    names |= {"rwkv.": "model.", "time_decay": "log_rate", "time_first": "bonus", "time_mix_": "shift_"}
    for old, new in names.items():
        key = key.replace(old, new)
    for letter, old in {"k": "key", "v": "value", "r": "receptance"}.items():
        key = key.replace(f"shift_{old}", f"shift_{letter}").replace(f"mixer.{old}.", f"mixer.{letter}_proj.")
    return key.replace("mixer.output", "mixer.o_proj"), (weight.flatten() if "shift" in key else weight)


def pair(inner=E):
    """transformers' RWKV and ours with its weights."""
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=V, hidden_size=D, attention_hidden_size=inner, intermediate_size=F, num_hidden_layers=3,
        rescale_every=0, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
    layers = {"num_hidden_layers": 3, "defaults": {"inner_dim": inner}, "ffn": {"hidden_size": F}}
    ours = zoo.create_model("rwkv4-tiny", vocab_size=V, hidden_size=D, layers=layers).eval()
    ours.load_state_dict(dict(ours_from(k, w) for k, w in theirs.state_dict().items()))
    return theirs, ours


def test_hidden_states_logits_and_gradients_are_those_of_transformers():
    theirs, ours = pair()
    ids_BL = torch.randint(0, V, (2, 41))
    expected = theirs(ids_BL, labels=ids_BL, output_hidden_states=True, use_cache=False)  # whose state is D wide
    got = ours(ids_BL, labels=ids_BL, output_hidden_states=True)
    assert largest(got.logits, expected.logits) < 1e-5
    # Theirs are the outputs of the blocks and the final norm, ours the inputs of the blocks and the final norm.
    assert len(got.hidden_states) == len(expected.hidden_states) == 4
    for a, b in zip(got.hidden_states[1:], [*expected.hidden_states[:2], expected.hidden_states[3]], strict=True):
        assert largest(a, b) < 1e-5
    expected.loss.backward()
    got.loss.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    for key, p in theirs.named_parameters():
        name, _ = ours_from(key, p)
        assert largest(grads[name], p.grad.view_as(grads[name])) < 1e-4, key


@torch.no_grad()
def test_generation_with_a_state_is_that_of_transformers():
    """Of one row: for more, a single step of theirs mixes the rows (the shifted input has no axis for positions)."""
    theirs, ours = pair(D)
    ids_BL = torch.randint(0, V, (1, 9))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(ids_BL, **options)
    assert torch.equal(ours.generate(ids_BL, **options), expected)
    state = theirs(expected, use_cache=True).state
    cache = ours(expected, use_cache=True).past_key_values
    for i, tensor in enumerate(state[2:]):  # numerator, denominator and exponent
        assert largest(cache.layers[1].state["wkv"][:, i], tensor[:, :, 1]) < 1e-4


# --- rwkv.cpp -------------------------------------------------------------------------------------------------------

FILES = Path(__file__).parents[3] / "shared" / "data" / "rwkv"
PUBLISHED = pytest.mark.skipif(not FILES.is_dir(), reason="the published file (../shared/data/rwkv) is not here")


@PUBLISHED
@torch.no_grad()
def test_a_published_file_gives_its_published_logits():
    model = import_checkpoint(FILES / "tiny-rwkv-4v0-660K-FP32.bin").model
    raw = (FILES / "expected-logits-4v0-660K.bin").read_bytes()
    expected = torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw))
    ids_BL = torch.tensor([list(b'"in')])
    assert (model(ids_BL).logits[0, -1] - expected).abs().max() < 1e-3
    cache = None
    for token in ids_BL[0]:
        out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    assert (out.logits[0, -1] - expected).abs().max() < 1e-3


def write(path, tensors, *, header=(0x67676D66, 101, V, D, 1, 0), kind=0):
    """A file of rwkv.cpp."""
    data = struct.pack("<6i", *header)
    for name, x in tensors.items():
        data += struct.pack("<3i", x.dim(), len(name), kind) + struct.pack(f"<{x.dim()}i", *reversed(x.shape))
        data += name.encode() + (x.half() if kind == 1 else x.float()).numpy().tobytes()
    path.write_bytes(data)
    return path


def file_tensors():
    """An RWKV-4 of one layer under the names of the file."""
    shapes = {"emb.weight": (V, D), "head.weight": (V, D), "blocks.0.att.time_decay": (E,)}
    shapes |= {f"{n}.{w}": (D,) for n in ("blocks.0.ln0", "blocks.0.ln1", "blocks.0.ln2", "ln_out") for w in NORM}
    shapes |= {f"blocks.0.att.time_mix_{n}": (D,) for n in "kvr"} | {"blocks.0.att.time_first": (E,)}
    shapes |= {f"blocks.0.att.{n}.weight": (E, D) for n in ("key", "value", "receptance")}
    shapes |= {"blocks.0.att.output.weight": (D, E), "blocks.0.ffn.receptance.weight": (D, D)}
    shapes |= {"blocks.0.ffn.key.weight": (F, D), "blocks.0.ffn.value.weight": (D, F)}
    shapes |= {f"blocks.0.ffn.time_mix_{n}": (D,) for n in "kr"}
    return {k: -torch.rand(s) - 0.1 if "decay" in k else torch.randn(s) for k, s in shapes.items()}


NORM = ("weight", "bias")


@pytest.mark.parametrize("kind", [0, 1])
def test_what_was_written_is_read(tmp_path, kind):
    tensors = file_tensors()
    model = import_checkpoint(write(tmp_path / "m.bin", tensors, kind=kind), dtype=torch.float32).model
    mixer, tolerance = model.model.layers[0].mixer, 1e-6 if kind == 0 else 2e-3
    torch.testing.assert_close(
        mixer.log_rate.exp(), -tensors["blocks.0.att.time_decay"], rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(mixer.shift_r, tensors["blocks.0.att.time_mix_r"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(model.lm_head.weight, tensors["head.weight"], rtol=tolerance, atol=tolerance)
    assert model.config.mixer_names == ["rwkv4"]
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


def damaged(case, path):
    tensors = file_tensors()
    if case == "newer":
        tensors["blocks.0.att.ln_x.weight"] = torch.ones(E)
    if case == "lacking":
        del tensors["head.weight"]
    if case == "too much":
        tensors["blocks.1.ln1.weight"] = torch.ones(D)
    if case == "misshapen":
        tensors["ln_out.bias"] = torch.ones(D + 1)
    header = (1, 2, V, D, 1, 0) if case == "other" else (0x67676D66, 101, V, D, -1 if case == "no layers" else 1, 0)
    write(path, tensors, header=header)
    if case == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    if case == "quantised":
        data = bytearray(path.read_bytes())
        data[32:36] = struct.pack("<i", 3)
        path.write_bytes(bytes(data))
    return path


DAMAGES = {
    "newer": "ln_x.weight shows a version of RWKV above 4", "lacking": "head.weight is missing",
    "too much": "blocks.1.ln1.weight has no place", "misshapen": r"ln_out.bias is \(33,\), expected \(32,\)",
    "other": "not a file of rwkv.cpp", "no layers": "layers is -1, expected 1 to 1024",
    "cut": "goes beyond the end of the file", "quantised": r"emb.weight is quantised \(type 3\)",
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_other_files_are_refused_in_one_line(case, tmp_path):
    with pytest.raises(CheckpointError, match=DAMAGES[case]) as caught:
        import_checkpoint(damaged(case, tmp_path / "m.bin"), layout="rwkv_cpp")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "m.bin") in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        import_checkpoint(tmp_path / "none.bin")


# --- Sizes and initial weights --------------------------------------------------------------------------------------

PARAMETERS = {  # Peng et al. 2023, the table of model sizes
    "rwkv4-169m": 1.693e8, "rwkv4-430m": 4.304e8, "rwkv4-1.5b": 1.515e9, "rwkv4-3b": 2.985e9, "rwkv4-7b": 7.393e9,
    "rwkv4-14b": 1.415e10,
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in list_models("rwkv4-*") if not n.endswith("-tiny")])
def test_sizes_are_those_of_the_paper(name):
    backbone, inner = parameters(name)
    assert 2 * backbone - inner == pytest.approx(PARAMETERS[name], rel=5e-4)  # the head is as large as the embedding


def test_initialisation_is_that_of_the_authors():
    model = zoo.create_model("rwkv4-tiny", hidden_size=128, vocab_size=512, layers={"num_hidden_layers": 4})
    blocks = model.model.layers
    first, last = blocks[0].mixer, blocks[3].mixer
    assert [b.mixer.place for b in blocks] == [b.ffn.place for b in blocks] == [(i, 4) for i in range(4)]
    n = torch.arange(128)
    torch.testing.assert_close(first.shift_k, n / 128)
    torch.testing.assert_close(last.shift_v, (n / 128) ** 0.25 + 0.3)
    torch.testing.assert_close(last.shift_r, (n / 128) ** 0.125)
    torch.testing.assert_close(first.log_rate, -5 + 8 * (n / 127) ** 0.7)
    torch.testing.assert_close(last.log_rate, -5 + 8 * (n / 127) ** 2.0)
    torch.testing.assert_close(last.bonus[:3], math.log(0.3) + torch.tensor([0.0, 0.5, -0.5]))
    for block in blocks:
        torch.testing.assert_close(block.mixer.v_proj.weight @ block.mixer.v_proj.weight.T, torch.eye(128))
        torch.testing.assert_close(block.ffn.key.weight.T @ block.ffn.key.weight, 4 * torch.eye(128), atol=1e-5, rtol=0)
        for linear in (block.mixer.k_proj, block.mixer.r_proj, block.mixer.o_proj):
            assert not linear.weight.any()
        assert not block.ffn.value.weight.any()
        assert not block.ffn.receptance.weight.any()
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1e-4 / 3**0.5, rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.02)


def test_options_out_of_bounds_are_refused():
    with pytest.raises(ConfigError, match="inner_dim"):
        RWKV4Config.parse({"inner_dim": 0})
    with pytest.raises(ConfigError, match="did you mean 'inner_dim'"):
        RWKV4Config.parse({"inner_dm": 4})


# --- From attention -------------------------------------------------------------------------------------------------


def stats(lookback, heads=4):
    ones = torch.ones(heads)
    return AttentionStats(lookback_H=lookback * ones, q_norm_H=ones, k_norm_H=ones, out_rms_H=ones)


def test_uniform_attention_is_met_exactly():
    attention = teacher(causal=True)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.zero_()
    weights = attention.attention_weights()
    student = RWKV4.from_attention(RWKV4.config_from_attention(weights), weights, stats(1e7))
    assert relative_error(student, attention) < 1e-5


def test_scores_of_the_keys_alone_are_met_exactly():
    """Without weights the queries are their bias: the scores are those of the keys."""
    attention = teacher(causal=True)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
    assert attention.q_proj.bias.any()
    weights = attention.attention_weights()
    student = RWKV4.from_attention(RWKV4.config_from_attention(weights), weights, stats(1e7))
    assert relative_error(student, attention) < 1e-4


def measured(attention, x_BLD):
    total = StatsSum()
    total.add(attention, x_BLD)
    return total.result()


def test_measured_uniform_attention_is_met_almost_exactly():
    """It looks back a quarter of the text, for there is no more: as a half-life that would forget the rest."""
    attention = teacher(causal=True)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.zero_()
    x_BLD = torch.randn(4, 48, 32)
    found = measured(attention, x_BLD)
    torch.testing.assert_close(found.lookback_H, torch.full((4,), 47 / 4))
    assert found.length == 48
    assert relative_error(convert(attention, "rwkv4", found), attention, x_BLD=x_BLD) < 0.02
    short = replace(found, length=None)
    assert relative_error(convert(attention, "rwkv4", short), attention, x_BLD=x_BLD) > 0.1


def test_measured_lookback_of_a_fading_average_gives_its_half_life():
    age_L = torch.arange(64.0)
    half_life_H = torch.tensor([1.0, 2.0, 8.0, 50.0])
    weight_HL = 2 ** (-age_L / half_life_H[:, None])
    lookback_H = ((weight_HL * age_L).cumsum(1) / weight_HL.cumsum(1)).mean(1)
    torch.testing.assert_close(half_life_of_average(lookback_H, 64), half_life_H, rtol=1e-3, atol=0)
    assert half_life_of_average(torch.tensor([40.0, 0.0]), 64).tolist() == pytest.approx([16 * 64, 1.0])


def test_what_all_queries_look_at_has_its_weight():
    """With inputs that have a mean in common, as behind a norm, queries have a mean without any bias."""
    attention, x_BLD = teacher(causal=True), torch.randn(16, 48, 32)
    with torch.no_grad():
        for name in "qkvo":
            if (bias := getattr(attention, f"{name}_proj").bias) is not None:
                bias.zero_()
    x_BLD[:, :, 0] += 5
    found = measured(attention, x_BLD)
    torch.testing.assert_close(found.x_mean_D, x_BLD.mean((0, 1)))
    start = relative_error(convert(attention, "rwkv4", found), attention, x_BLD=x_BLD)
    blind = relative_error(convert(attention, "rwkv4", replace(found, x_mean_D=None)), attention, x_BLD=x_BLD)
    assert start < 0.85 * blind


def test_half_lives_are_the_measured_lookback():
    weights = teacher(causal=True).attention_weights()
    student = RWKV4.from_attention(RWKV4.config_from_attention(weights), weights, stats(torch.tensor([1.0, 2, 8, 50])))
    half_life = math.log(2) / student.log_rate.exp()
    torch.testing.assert_close(half_life.view(4, 8), torch.tensor([1.0, 2, 8, 50])[:, None].expand(4, 8))
    torch.testing.assert_close(student.bonus, student.log_rate.exp())


def test_a_conversion_starts_near_and_comes_nearer():
    """What it can learn from the teacher is its scale and look-back; here the look-back is wrong at the start."""
    attention = teacher(causal=True, sharpness=0.5)
    assert relative_error(convert(attention, "rwkv4"), attention) < 0.45
    weights = attention.attention_weights()
    student = RWKV4.from_attention(RWKV4.config_from_attention(weights), weights, stats(4.0))
    start = relative_error(student, attention)
    align(student, attention, steps=40, rate=0.03)
    assert relative_error(student, attention) < 0.8 * start


def test_a_width_that_does_not_fit_is_refused():
    attention = teacher(causal=True)
    with pytest.raises(ConversionError, match="needs inner_dim 32 and out_bias; got inner_dim 16"):
        convert(attention, "rwkv4", inner_dim=16)
