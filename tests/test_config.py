"""The description of a model: what is refused and how, patterns, exact round trips."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from transformers import AutoConfig

import zoo
import zoo.models  # registers the Auto classes
from zoo.config import ModelSpec, ZooConfig
from zoo.errors import ConfigError, UnknownNameError
from zoo.registry import model_config, parse_mixer
from zoo.yaml_files import load_yaml

ATTENTION = {"name": "attention", "num_heads": 4, "head_dim": 16}
MLP = {"name": "mlp", "hidden_size": 64}
LAYER = {"mixer": ATTENTION, "ffn": MLP}


def attention(**options):
    return {"layers": [{"mixer": {**ATTENTION, **options}, "ffn": MLP}]}


def refused(values: dict) -> str:
    with pytest.raises(ConfigError) as info:
        ZooConfig(**values)
    message = str(info.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("values", "path", "nearest"),
    [
        ({"hiden_size": 64}, "hiden_size", "'hidden_size'"),
        ({"vocabulary_size": 64}, "vocabulary_size", "'vocab_size'"),
        ({"layers": [{**LAYER, "mixr": {}}]}, "layers.0.mixr", "'mixer'"),
        ({"layers": [LAYER, {"mixer": {**ATTENTION, "num_head": 4}}]}, "layers.1.mixer.num_head", "'num_heads'"),
        ({"layers": [{"mixer": ATTENTION, "ffn": {**MLP, "hidden": 4}}]}, "layers.0.ffn.hidden", "'hidden_size'"),
        (attention(rotary={"theta": 1e4, "scalling": None}), "layers.0.mixer.rotary.scalling", "'scaling'"),
        ({"layers": {"patern": "attention", "num_hidden_layers": 2}}, "layers.patern", "'pattern'"),
        (
            {"layers": {"pattern": "attention", "num_hidden_layers": 1, "defaults": {**ATTENTION, "windw": 3}}},
            "layers.0.mixer.windw",
            "'window'",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_one(values, path, nearest):
    message = refused(values)
    assert message.startswith(f"{path}: unknown key")
    assert nearest in message


@pytest.mark.parametrize(
    ("values", "path", "shown"),
    [
        ({"hidden_size": "64"}, "hidden_size", "'64'"),
        ({"hidden_size": 64.0}, "hidden_size", "64.0"),
        ({"hidden_size": True}, "hidden_size", "True"),
        ({"norm_eps": "1e-5"}, "norm_eps", "'1e-5'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "'yes'"),
        ({"norm": "rmsnorm"}, "norm", "'rmsnorm'"),
        ({"task": "causal_lm"}, "task", "'causal_lm'"),
        ({"layers": "attention"}, "layers", "'attention'"),
        ({"layers": ["attention"]}, "layers.0", "'attention'"),
        ({"layers": [{"mixer": 3}]}, "layers.0.mixer", "3"),
        (attention(num_heads="4"), "layers.0.mixer.num_heads", "'4'"),
        (attention(causal=1), "layers.0.mixer.causal", "1"),
        (attention(rotary=10000), "layers.0.mixer.rotary", "10000"),
        (
            {"layers": [{"mixer": ATTENTION, "ffn": {"name": "mlp", "hidden_size": []}}]},
            "layers.0.ffn.hidden_size",
            "[]",
        ),
    ],
)
def test_a_wrong_type_is_refused_with_its_path_and_the_value(values, path, shown):
    message = refused(values)
    assert message.startswith(f"{path}: ")
    assert shown in message


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"vocab_size": 1}, "vocab_size"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"norm_eps": math.nan}, "norm_eps"),
        ({"initializer_range": math.inf}, "initializer_range"),
        ({"embedding_dropout": 1.0}, "embedding_dropout"),
        ({"layers": []}, "layers"),
        ({"layers": [LAYER] * 1025}, "layers"),
        ({"layers": {"pattern": "attention", "num_hidden_layers": 10**9}}, "layers.num_hidden_layers"),
        (attention(num_heads=10**6), "layers.0.mixer.num_heads"),
        (attention(head_dim=0), "layers.0.mixer.head_dim"),
        (attention(window=0), "layers.0.mixer.window"),
        (attention(num_kv_heads=3), "layers.0.mixer"),
        (
            {"layers": [{"mixer": ATTENTION, "ffn": {"name": "mlp", "hidden_size": 1 << 30}}]},
            "layers.0.ffn.hidden_size",
        ),
    ],
)
def test_an_absurd_size_is_refused_before_anything_is_allocated(values, path):
    assert refused(values).startswith(f"{path}: ")


def test_the_message_says_what_is_wrong_with_a_combination():
    assert "num_heads (4) is not a multiple of num_kv_heads (3)" in refused(attention(num_kv_heads=3))
    assert "unknown activation 'silo'; did you mean 'silu'" in refused(
        {"layers": [{"mixer": ATTENTION, "ffn": {**MLP, "activation": "silo"}}]}
    )
    assert refused({"layers": [{"mixer": {"name": "attention", "num_heads": 2}}]}) == (
        "layers.0.mixer.head_dim: this key is needed"
    )


def test_a_misspelt_mixer_is_answered_with_the_nearest_one():
    message = refused({"layers": [{"mixer": "atention"}]})
    assert message.startswith("layers.0.mixer: unknown mixer 'atention'; did you mean 'attention'")
    with pytest.raises(UnknownNameError, match="unknown channel mixer 'gatedmlp'; did you mean 'gated_mlp'"):
        zoo.registry.parse_ffn("gatedmlp")


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        ("attention", 3, "aaa"),
        ("attention*2 sliding_window", 7, "aasaasa"),
        ("sliding_window*3, attention", 8, "sssassssa"[:4] * 2),
        ("sliding_window attention", 1, "s"),
    ],
)
def test_patterns(pattern, layers, expected):
    config = ZooConfig(
        layers={
            "pattern": pattern,
            "num_hidden_layers": layers,
            "defaults": {"num_heads": 2, "head_dim": 8},
            "mixers": {"sliding_window": {"window": 5}} if "sliding" in pattern else {},
            "ffn": MLP,
        }
    )
    assert "".join(name[0] for name in config.mixer_names) == expected
    assert config.num_hidden_layers == layers
    for layer in config.spec.layers:
        assert layer.mixer.num_heads == 2
        assert layer.ffn.hidden_size == 64
        if layer.mixer.name == "sliding_window":
            assert layer.mixer.window == 5


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"pattern": "attention*", "num_hidden_layers": 2}, "layers.pattern: cannot read 'attention*'"),
        ({"pattern": "", "num_hidden_layers": 2}, "layers.pattern: cannot read ''"),
        ({"pattern": "2*attention", "num_hidden_layers": 2}, "layers.pattern: cannot read '2*attention'"),
        ({"pattern": "attention"}, "layers.num_hidden_layers: this key is needed"),
        (
            {"pattern": "attention", "num_hidden_layers": 2, "mixers": {"atention": {}}},
            "layers.mixers.atention: not in the pattern; did you mean 'attention'?",
        ),
    ],
)
def test_an_unreadable_pattern(layers, message):
    assert refused({"layers": layers}).startswith(message)


def test_a_repeat_of_zero_leaves_no_layer():
    assert refused({"layers": {"pattern": "attention*0", "num_hidden_layers": 2}}) == "layers.pattern: no layer in it"


@pytest.mark.parametrize("name", zoo.list_models())
def test_json_and_yaml_round_trip_exactly(name):
    plain = model_config(name).spec.plain()
    assert json.loads(json.dumps(plain)) == plain
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert ModelSpec.parse(json.loads(json.dumps(plain))) == model_config(name).spec
    assert ModelSpec.parse(plain).plain() == plain


@pytest.mark.parametrize("name", zoo.list_models("*-tiny"))
def test_save_and_load_by_the_auto_class(name, tmp_path):
    config = model_config(name, vocab_size=100, origin={"family": "llama", "config": {"a": [1, None, 0.5]}})
    config.pad_token_id = 7
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is ZooConfig
    assert again.spec == config.spec
    assert again.pad_token_id == 7
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()


def test_a_saved_config_with_a_foreign_key_is_refused(tmp_path):
    model_config("transformer-tiny").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "hidden_sizes": 3}))
    with pytest.raises(ConfigError, match="hidden_sizes: unknown key; did you mean 'hidden_size'"):
        ZooConfig.from_pretrained(tmp_path)


def test_labels_of_a_classifier_survive(tmp_path):
    config = model_config("bert-tiny", task="sequence-classification")
    config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    config.save_pretrained(tmp_path)
    again = ZooConfig.from_pretrained(tmp_path)
    assert again.num_labels == 3
    assert again.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert ZooConfig(num_labels=5).num_labels == 5


def test_configs_do_not_share_what_is_mutable():
    one, two = ZooConfig(), ZooConfig()
    one.layers[0]["mixer"]["num_heads"] = 1
    one.origin["family"] = "x"
    assert two.layers[0]["mixer"]["num_heads"] == 4
    assert two.origin == {}
    base = model_config("transformer-tiny")
    base.layers[0]["mixer"]["num_heads"] = 1
    assert model_config("transformer-tiny").layers[0]["mixer"]["num_heads"] == 4


def test_options_are_frozen():
    options = parse_mixer(ATTENTION)
    with pytest.raises(ValueError, match="frozen"):
        options.num_heads = 2
    assert parse_mixer(options) is options


def test_the_spec_follows_the_attributes():
    config = model_config("transformer-tiny")
    config.hidden_size = 32
    assert config.spec.hidden_size == 32
    config.hidden_size = "32"
    with pytest.raises(ConfigError, match="hidden_size"):
        _ = config.spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("\tb: 1", "not valid YAML"),
    ],
)
def test_bad_yaml_is_refused_with_the_file_and_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as info:
        load_yaml(path)
    assert str(info.value).startswith(f"{path}:")
    assert message in str(info.value)


def test_yaml_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_yaml(tmp_path)


def test_yaml_numbers_read_as_people_expect(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1e-5\nb: 3e4\nc: 1.5e+3\nd: 10\ne: 1_000\nf: .5\ng: text\nh: 1.0e-12\n")
    assert load_yaml(path) == {
        "a": 1e-5, "b": 3e4, "c": 1500.0, "d": 10, "e": 1000, "f": 0.5, "g": "text", "h": 1e-12,
    }  # fmt: skip
