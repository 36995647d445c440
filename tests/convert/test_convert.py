"""`zoo.convert` from end to end on tiny teachers: surgery, reports, errors, the equal-bytes window, saving."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import motif_rows

import zoo
from zoo.convert import api, baseline
from zoo.convert.api import sample_from_teacher
from zoo.convert.baseline import window_baseline, window_of_equal_bytes
from zoo.convert.report import ConversionReport
from zoo.convert.surgery import mixer_spec, replace_mixers
from zoo.convert.teachers import load_teacher
from zoo.errors import ConfigError, ConversionError, DataError, TraitError, UnknownNameError
from zoo.mixers.attention import Attention
from zoo.mixers.base import Traits
from zoo.models.state import state_bytes
from zoo.registry import list_mixers, mixer_class
from zoo.text import byte_tokenizer

IDS = torch.arange(64 * 4).reshape(8, 32) % 37


def storages(model):
    return {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_without_a_mixer_the_import_is_exact(family, request):
    original = request.getfixturevalue(family)
    student = zoo.convert(original)
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)
    assert student.config.mixer_names == ["attention", "attention"]
    assert student.report.max_logit_error < 1e-4
    assert "imported exactly" in str(student.report)
    assert student.report.kept_layers == [0, 1]
    assert student.tokenizer is None


def test_an_import_of_a_zoo_model_is_a_copy(llama):
    model = load_teacher(llama).model
    student = zoo.convert(model)
    assert not storages(student) & storages(model)


@pytest.mark.parametrize("name", list_mixers())
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_mixer_replaces_attention(name, family, request):
    original = request.getfixturevalue(family)
    causal = family != "bert"
    options = {"linear": "linear_attention"} if name == "windowed_linear" else None
    if not getattr(mixer_class(name).traits, "causal" if causal else "bidirectional"):
        with pytest.raises(TraitError, match="choose from"):
            zoo.convert(original, name, mixer_options=options, calibrate=False)
        return
    student = zoo.convert(original, name, keep=[0], mixer_options=options, data=IDS, progress=False)
    assert student.config.mixer_names == ["attention", name]
    assert student.report.parameters == sum(p.numel() for p in student.parameters())
    assert student.report.distance <= student.report.distance_before + 1e-7  # rounding, where both are almost 0
    out = student(IDS, labels=IDS)
    assert out.logits.isfinite().all()
    out.loss.backward()
    gradients = [p.grad for p in student.model.layers[1].mixer.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("keep", ["none", [1], "uniform:1/2", "sensitivity:1"])
def test_a_window_as_long_as_the_text_is_exact(family, keep, request):
    original = request.getfixturevalue(family)
    student = zoo.convert(original, "sliding_window", keep=keep, mixer_options={"window": 32}, data=IDS, progress=False)
    assert student.config.mixer_names.count("sliding_window") == (2 if keep == "none" else 1)
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)
    # Where there is nothing to gain, bf16 noise in the measurement must not talk calibration into a refit.
    assert {layer.refit for layer in student.report.layers} == {"none"}


def test_sensitivity_keeps_the_layer_the_scan_names(trained_llama):
    options = {"window": 4, "sinks": 1}
    student = zoo.convert(
        trained_llama,
        "sliding_window",
        keep="sensitivity:1/3",
        mixer_options=options,
        data=motif_rows(12, 28, seed=3),
        progress=False,
    )
    scans = [layer.scan for layer in student.report.layers]
    assert all(s == r.missed * max(r.restored, 1e-6) for s, r in zip(scans, student.report.layers, strict=True))
    assert student.report.kept_layers == [max(range(3), key=lambda i: scans[i])]
    everything = zoo.convert(
        trained_llama, "sliding_window", mixer_options=options, data=motif_rows(12, 28, seed=3), progress=False
    )
    assert everything.report.kept_layers == []
    assert student.report.distance < 0.5 * everything.report.distance


def test_training_the_student_does_not_touch_the_teacher(llama):
    teacher = load_teacher(llama)
    before = copy.deepcopy(teacher.model.state_dict())
    config = teacher.model.config.to_json_string()
    student = zoo.convert(teacher, "gated_delta_net", keep=[0], data=IDS, progress=False)
    assert not storages(student) & storages(teacher.model)
    assert all(p.requires_grad for p in student.parameters())
    student(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert all(torch.equal(value, before[key]) for key, value in teacher.model.state_dict().items())
    assert all(p.grad is None for p in teacher.model.parameters())
    assert teacher.model.config.to_json_string() == config
    assert student.lm_head.weight is student.model.embed_tokens.weight or not llama.config.tie_word_embeddings


def test_tied_embeddings_stay_tied(gpt2):
    student = zoo.convert(gpt2, "retention", calibrate=False)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_surgery_by_layer(llama):
    teacher = load_teacher(llama).model
    attention = teacher.model.layers[1].mixer.attention_weights()
    options = mixer_class("retention").config_from_attention(attention)
    student = replace_mixers(teacher, {0: {"name": "sliding_window", "window": 5}, 1: options})
    assert student.config.mixer_names == ["sliding_window", "retention"]
    assert student.config.layers[0]["mixer"]["window"] == 5
    assert student.model.config is student.config
    assert student.config.origin["lineage"][-1]["layers"] == {"0": "sliding_window", "1": "retention"}
    assert student.config.origin["architecture"] == "LlamaForCausalLM"
    again = type(student)(student.config)
    again.load_state_dict(student.state_dict())
    again.eval()
    torch.testing.assert_close(again(IDS).logits, student(IDS).logits)
    for layer, says in [(2, "layers 0 to 1"), (-1, "layers 0 to 1"), (True, "layers 0 to 1")]:
        with pytest.raises(ConversionError, match=says):
            replace_mixers(teacher, {layer: "retention"})
    with pytest.raises(ConversionError, match="layer 0 is 'sliding_window', not attention"):
        replace_mixers(student, {0: "retention"})


def test_surgery_keeps_the_dtype(llama):
    teacher = load_teacher(llama).model.to(torch.bfloat16)
    student = replace_mixers(teacher, {0: "mamba2", 1: "gated_delta_net"})
    for name, parameter in student.named_parameters():
        mixer = student.model.layers[int(name.split(".")[2])].mixer if ".mixer." in name else None
        exempt = mixer is not None and name.rsplit(".", 1)[-1] in mixer.keep_float32
        assert parameter.dtype == (torch.float32 if exempt else torch.bfloat16), name


def test_names_of_mixers():
    assert mixer_spec("gated_delta_net+window", {"window": 9}) == {
        "name": "windowed_linear",
        "linear": "gated_delta_net",
        "window": 9,
    }
    assert mixer_spec({"name": "retention", "conv": 4}) == {"name": "retention", "conv": 4}
    with pytest.raises(UnknownNameError, match="did you mean 'gated_delta_net'"):
        mixer_spec("gated_deltanet")
    with pytest.raises(UnknownNameError, match="did you mean 'retention'"):
        mixer_spec("retension+window")
    with pytest.raises(ConfigError, match=r"'M\+window'"):
        mixer_spec("retention+mamba2")
    with pytest.raises(ConfigError, match="a mapping with 'name', got 3"):
        mixer_spec(3)
    with pytest.raises(ConfigError, match="named already"):
        mixer_spec("retention", {"name": "mamba2"})


def test_a_linear_mixer_beside_a_window_starts_at_the_window(llama):
    window = zoo.convert(llama, "sliding_window", mixer_options={"window": 6}, calibrate=False)
    both = zoo.convert(
        llama, "linear_attention+window", mixer_options={"window": 6, "gate_init": -20.0}, calibrate=False
    )
    assert both.report.mixer == "linear_attention+window"
    with torch.no_grad():
        torch.testing.assert_close(both(IDS).logits, window(IDS).logits, rtol=1e-3, atol=1e-5)


def test_report(trained_llama):
    rows = motif_rows(8, 28, seed=3)
    report = zoo.convert(trained_llama, "gated_delta_net", keep="sensitivity:1", data=rows, progress=False).report
    table = report.table()
    assert [row["layer"] for row in table] == [0, 1, 2]
    assert sum(row["kept"] for row in table) == 1
    for row in table:
        if row["kept"]:
            assert row["copied"] == row["new"] == []
            continue
        assert {"q_proj.weight", "k_proj.weight", "v_proj.weight"} <= set(row["copied"])
        assert {"b_proj.weight"} <= set(row["new"])
        assert row["copied_parameters"] in (32 * 32 + 2 * 16 * 32, 2 * 32 * 32 + 2 * 16 * 32)  # with or without W_o
        assert row["new_parameters"] > 0
        assert row["error_before"] > 0
        assert row["missed"] > 0
        assert row["restored"] != 0
    assert (report.tokens, report.held_out_tokens) == (8 * 28, 2 * 28)
    assert report.measure == "KL, nats/token"
    assert 0 <= report.agreement <= 1
    assert set(report.cpu_seconds) == {"load", "data", "teacher", "scan", "calibrate"}
    text = str(report)
    assert "2 of 3 layers converted to gated_delta_net" in text
    assert "attention (kept)" in text
    assert len(text.splitlines()) >= 6
    again = json.loads(report.to_json())
    assert again["layers"][0]["mixer"] == table[0]["mixer"]
    report.distance = float("inf")
    assert json.loads(report.to_json())["distance"] is None


def test_without_data_and_calibration_nothing_is_run(llama, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the teacher was run")

    monkeypatch.setattr(api, "Trace", never)
    monkeypatch.setattr(api, "sample_from_teacher", never)
    report = zoo.convert(llama, "retention", keep="first:1", calibrate=False).report
    assert (report.distance, report.data, report.tokens) == (None, "none", 0)
    assert "distance" not in str(report)


def test_a_causal_teacher_writes_its_own_text(trained_llama):
    report = zoo.convert(trained_llama, "retention", tokens=96, length=24, progress=False).report
    assert report.data == "text that the teacher wrote"
    assert (report.tokens, report.held_out_tokens) == (96, 24)
    one, same, other = (sample_from_teacher(trained_llama.model, 4, 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (4, 20)
    assert set(one[:, 0].tolist()) == {trained_llama.model.config.bos_token_id}
    assert len({tuple(row) for row in one.tolist()}) == 4
    with torch.no_grad():  # the text is likely under the model, as random tokens are not
        logp = trained_llama.model(one).logits.log_softmax(-1)[:, :-1].gather(-1, one[:, 1:, None]).mean()
        noise = torch.randint(0, 32, one.shape)
        logp_noise = trained_llama.model(noise).logits.log_softmax(-1)[:, :-1].gather(-1, noise[:, 1:, None]).mean()
    assert logp > logp_noise + 0.5


def test_text_is_read_with_the_teachers_tokenizer(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    file = tmp_path / "text.txt"
    file.write_text("A window forgets what it cannot see. " * 40, encoding="utf-8")
    teacher = load_teacher(model, tokenizer=tokenizer)
    student = zoo.convert(teacher, "retention", data=str(file), tokens=256, length=32, progress=False)
    assert student.report.data == str(file)
    assert student.report.tokens == 256
    assert student.tokenizer is not None
    with pytest.raises(ConversionError, match="at least 2 rows"), pytest.warns(UserWarning, match="1 of 4 rows"):
        zoo.convert(teacher, "retention", data=str(file), tokens=4000, length=1000, progress=False)
    with pytest.raises(DataError):
        zoo.convert(teacher, "retention", data=str(tmp_path / "missing.txt"), progress=False)


def test_learned_positions_bound_the_length(gpt2):
    report = zoo.convert(gpt2, "retention", tokens=200, length=100, progress=False).report
    assert (report.tokens, report.held_out_tokens) == (3 * 64, 64)
    with pytest.raises(ConversionError, match="beyond the teacher's 64 positions"):
        zoo.convert(gpt2, "retention", data=torch.zeros(4, 65, dtype=torch.long), progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"keep": "none"}, ConversionError, "no mixer is given"),
        ({"keep": [0]}, ConversionError, "no mixer is given"),
        ({"mixer_options": {"window": 3}}, ConversionError, "but no mixer"),
        ({"mixer": "retention", "keep": "all"}, ConversionError, "nothing to convert: keep='all'"),
        ({"mixer": "retention", "keep": [0, 1]}, ConversionError, "nothing to convert"),
        ({"mixer": "retention", "keep": "first:2"}, ConversionError, "nothing to convert"),
        ({"mixer": "retention", "keep": [5]}, ConversionError, "no attention layer 5; the teacher has 0 to 1"),
        ({"mixer": "retention", "keep": "unifrom:1/2"}, ConversionError, "did you mean 'uniform'"),
        ({"mixer": "retnet"}, UnknownNameError, "unknown mixer 'retnet'"),
        ({"mixer": "sliding_window", "mixer_options": {"windw": 3}}, ConfigError, "mixer.windw: unknown key.*'window'"),
        ({"mixer": "sliding_window", "mixer_options": {"window": 0}}, ConfigError, "mixer.window"),
        ({"mixer": "retention", "tokens": 0}, ConversionError, "tokens must be a positive number, got 0"),
        ({"mixer": "retention", "length": 1.5}, ConversionError, "length must be a positive number, got 1.5"),
        ({"mixer": "retention", "data": ["some text"]}, ConversionError, "the teacher has no tokenizer"),
        ({"mixer": "retention", "data": IDS[:1]}, ConversionError, "at least 2 rows"),
        ({"mixer": "retention", "data": IDS.float()}, ConversionError, "must be integers"),
        (
            {"mixer": "retention", "data": IDS + 30},
            ConversionError,
            "token id 66 is outside the teacher's vocabulary of 40",
        ),
    ],
)
def test_wrong_requests_are_refused(llama, arguments, error, says):
    with pytest.raises(error, match=says):
        zoo.convert(llama, **arguments, progress=False)


def test_an_encoder_needs_data(bert):
    with pytest.raises(ConversionError, match="cannot write its own calibration text: give data"):
        zoo.convert(bert, "sliding_window")
    with pytest.raises(ConversionError, match="cannot write its own"):
        zoo.convert(bert, "sliding_window", keep="sensitivity:1", calibrate=False)
    assert zoo.convert(bert, "sliding_window", calibrate=False).config.mixer_names == ["sliding_window"] * 2


def test_a_mixer_in_the_wrong_direction_is_refused_with_alternatives(bert, monkeypatch):
    monkeypatch.setattr(mixer_class("mamba2"), "traits", Traits(causal=True, bidirectional=False))
    with pytest.raises(TraitError, match=r"'mamba2' cannot replace .* two-sided encoder .*choose from.*sliding_window"):
        zoo.convert(bert, "mamba2", data=IDS)


def test_sentence_embeddings_are_compared_by_angle(bert):
    from zoo.models.heads import ZooForSentenceEmbedding

    masked = load_teacher(bert).model
    config = copy.deepcopy(masked.config)
    config.task = "sentence-embedding"
    model = ZooForSentenceEmbedding(config)
    model.model.load_state_dict(masked.model.state_dict())
    with torch.no_grad():
        for block in model.model.layers:
            block.mixer.q_proj.weight.mul_(20)
            block.mixer.v_proj.weight.mul_(20)
    options = {"window": 3, "sinks": 0}
    student = zoo.convert(model, "sliding_window", mixer_options=options, data=IDS, calibrate=False, progress=False)
    assert (student.report.measure, student.report.agreement) == ("1 - cosine", None)
    with torch.no_grad():
        a, b = (m(IDS).pooler_output for m in (model.eval(), student))
    assert student.report.distance == pytest.approx(float(1 - (a * b).sum(-1).mean()), rel=0.1)
    assert student.report.distance > 1e-4


@torch.no_grad()
def decoded_bytes(model, length=200):
    """Bytes of all states after `length` tokens, by really running the model."""
    return state_bytes(model(torch.ones(1, length, dtype=torch.long), use_cache=True).past_key_values)


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("gated_delta_net", {}),
        ("retention", {}),
        ("mamba2", {}),
        ("linear_attention", {}),
        ("gated_delta_net+window", {"window": 9, "sinks": 3}),
        ("sliding_window", {"window": 11, "sinks": 2}),
    ],
)
def test_the_baseline_has_the_students_bytes(llama, mixer, options):
    teacher = load_teacher(llama).model
    student = zoo.convert(teacher, mixer, keep=[1], mixer_options=options, calibrate=False)
    other = window_baseline(teacher, student)
    window = window_of_equal_bytes(student)
    assert other.config.mixer_names == ["sliding_window", "attention"]
    assert other.config.layers[0]["mixer"]["window"] == window
    assert other.config.layers[0]["mixer"]["sinks"] == options.get("sinks", 4)
    of_student, of_baseline = decoded_bytes(student), decoded_bytes(other)
    token = 2 * 2 * 8 * 4  # keys and values, kv heads, head size, bytes
    if window > 1:
        assert of_student <= of_baseline < of_student + token
    else:
        assert of_student <= of_baseline  # one position is the smallest window there is
    if mixer == "sliding_window":
        assert window == 11


def test_a_byte_more_is_rounded_up_to_a_position_more(llama, monkeypatch):
    student = zoo.convert(llama, "retention", keep=[1], calibrate=False)
    window, measured = window_of_equal_bytes(student), baseline.final_state_bytes
    monkeypatch.setattr(baseline, "final_state_bytes", lambda mixer: measured(mixer) + 1)
    assert window_of_equal_bytes(student) == window + 1


def test_bytes_that_cannot_be_matched(llama, bert):
    teacher = load_teacher(llama).model
    with pytest.raises(ConversionError, match="no layer of this student is converted"):
        window_of_equal_bytes(teacher)
    with pytest.raises(ConversionError, match="an encoder carries no state"):
        window_of_equal_bytes(zoo.convert(bert, "retention", calibrate=False))
    student = zoo.convert(llama, "retention", calibrate=False)
    student.model.layers[0].mixer.__class__ = type(
        "Growing", (type(student.model.layers[0].mixer),), {"traits": Attention.traits}
    )
    with pytest.raises(ConversionError, match="grows with the length"):
        window_of_equal_bytes(student)


def test_an_empty_report_prints():
    report = ConversionReport(
        teacher="t", family="f", task="causal-lm", mixer=None, keep="all", kept_layers=[], layers=[], parameters=1,
        teacher_parameters=1,
    )  # fmt: skip
    assert "imported exactly" in str(report)
