"""Names: listing, filters, sizes, deprecations, and what other packages add."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import zoo
from zoo import registry
from zoo.errors import ConfigError, UnknownNameError
from zoo.mixers.attention import Attention
from zoo.registry import ModelEntry, merge, model_config, model_entry, natural_key

# Totals as they are published, for models that transformers has no class for (tests/models/test_published.py has the
# others): in papers, as timm counts them, or as half the bytes of a file of 16-bit weights.
PUBLISHED = {
    "deepseek-moe-16b": "16.4B",
    "deit-base-distilled-patch16-224": "87.34M",
    "deit-small-distilled-patch16-224": "22.44M",
    "deit-tiny-distilled-patch16-224": "5.91M",
    "deltanet-1.3b": "1.37B",
    "expert-choice-16e-548m": "548M",
    "expert-choice-32e-1b": "1.0B",
    "expert-choice-64e-1.9b": "1.9B",
    "expert-choice-64e-143b": "143B",
    "expert-choice-128e-3.7b": "3.7B",
    "gla-1.3b": "1.37B",
    "hyena-dna-6.6m": "6.6M",
    "retnet-fla-1.3b": "1.35B",
    "rwkv6-1.6b": "1.60B",
    "rwkv6-3b": "3.10B",
    "rwkv6-7.6b": "7.64B",
    "rwkv6-14b": "14.1B",
    "rwkv7-168m": "168M",
    "rwkv7-191m": "191M",
    "rwkv7-450m": "451M",
    "rwkv7-1.47b": "1.47B",
    "rwkv7-1.5b": "1.53B",
    "rwkv7-2.9b": "2.95B",
    "sliding-window-7b": "7.24B",  # Mistral-7B-v0.1
    "swin-base-patch4-window7-224": "87.77M",
    "swin-small-patch4-window7-224": "49.61M",
    "swin-tiny-patch4-window7-224": "28.29M",
    "transformer-135m": "135M",  # SmolLM2-135M
    "transformer-360m": "362M",  # SmolLM2-360M
    "transformer-1.1b": "1.10B",  # TinyLlama
    "transformer-7b": "6.74B",  # Llama-2-7B
    "vit-base-patch16-224": "86.57M",
    "vit-large-patch16-224": "304.33M",
    "vit-small-patch16-224": "22.05M",
    "vit-tiny-patch16-224": "5.72M",
}
OF_TRANSFORMERS = ("mixtral-8x7b", "mixtral-8x22b", "olmoe-1b-7b", "qwen2-moe-a2.7b")  # whose names say something else

# Names that their authors chose, with the parameters, in millions, of the model that is made.
NAMED_OTHERWISE = {
    "gated-deltanet-0.4b": 566,  # 468 without the word vectors, in and out
    "gated-deltanet-h-0.4b": 580,
    "llama-3.2-1b": 1236,
    "mobilebert-25m": 36.6,  # 25 million without the output's own part of the word vectors
    "qwen2-7b": 7616,
}


def on_meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return zoo.create_model(name)


@pytest.fixture
def names_restored():
    """What a test registers is gone after it."""
    zoo.list_models()
    tables = [registry._MIXERS, registry._FFNS, registry._MODELS, registry._DEPRECATED]
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def test_wildcards_and_natural_order():
    assert zoo.list_models("gpt2*") == ["gpt2-tiny", "gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1.5b"]
    assert zoo.list_models("mamba2-?.?b") == ["mamba2-1.3b", "mamba2-2.7b"]
    assert zoo.list_models("[bg]e*-tiny")[0] == "bert-tiny"
    assert zoo.list_models("nothing*") == []
    names = ["x-2.7b", "x-tiny", "x-130m", "x-1.3b", "x-900k", "x-h-tiny", "x"]
    assert sorted(names, key=natural_key) == ["x", "x-tiny", "x-900k", "x-130m", "x-1.3b", "x-2.7b", "x-h-tiny"]


def test_filters():
    assert set(zoo.list_models(task="masked-lm")) >= {"bert-tiny", "bert-base-110m", "bert-large-340m"}
    assert "bert-tiny" not in zoo.list_models(task="causal-lm")
    assert zoo.list_models("*-tiny", mixer="sliding_window") == ["gated-deltanet-h-tiny", "sliding-window-tiny"]
    assert zoo.list_mixers("*linear_attention") == ["gated_linear_attention", "linear_attention"]
    assert zoo.list_ffns("*mlp") == ["gated_mlp", "mlp"]


def test_every_mixer_has_a_tiny_model():
    used = {mixer for name in zoo.list_models("*-tiny") for mixer in model_config(name).mixer_names}
    assert used == set(zoo.list_mixers())


def test_every_family_has_a_tiny_model_and_says_where_it_comes_from():
    entries = [model_entry(name) for name in zoo.list_models()]
    for family in {entry.family for entry in entries}:
        assert f"{family}-tiny" in zoo.list_models()
    for entry in entries:
        assert entry.paper.startswith("https://")
        assert entry.about
        assert entry.name.startswith(entry.family)


@pytest.mark.parametrize("name", zoo.list_models("*-tiny"))
def test_tiny_models_are_tiny(name):
    model = on_meta(name)
    assert model.config.vocab_size == 256
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


def as_published(count: int, text: str) -> str:
    """A count with the unit and the digits of `text`."""
    digits, unit = len(text[:-1].partition(".")[2]), {"M": 1e6, "B": 1e9}[text[-1]]
    return f"{count / unit:.{digits}f}{text[-1]}"


@pytest.mark.parametrize("name", [name for name in zoo.list_models() if not name.endswith("-tiny")])
def test_sizes_are_those_that_are_published(name):
    count = sum(p.numel() for p in on_meta(name).parameters())
    if name in PUBLISHED:
        assert as_published(count, PUBLISHED[name]) == PUBLISHED[name]
    if name in NAMED_OTHERWISE or re.search(r"-[\d.]+[kmbt]$", name):  # 8x7b and a2.7b say something else
        stated = NAMED_OTHERWISE.get(name, natural_key(name)[-1][1] / 1e6)
        assert count / 1e6 == pytest.approx(stated, rel=0.08)
    else:
        assert name in (*PUBLISHED, *OF_TRANSFORMERS)
    assert {tag.parameters for tag in model_entry(name).tags.values()} <= {count}


def test_misspelt_names():
    with pytest.raises(UnknownNameError, match=r"unknown model 'retnet-tinny'; did you mean 'retnet-tiny'"):
        zoo.create_model("retnet-tinny")
    with pytest.raises(UnknownNameError, match=r"unknown mixer 'retntion'; did you mean 'retention'"):
        registry.mixer_class("retntion")
    with pytest.raises(KeyError):
        zoo.create_model("retnet-tinny")
    with pytest.raises(ConfigError, match="vocab_siz: unknown key; did you mean 'vocab_size'"):
        zoo.create_model("retnet-tiny", vocab_siz=3)


def test_overrides_are_merged_into_the_registered_config():
    model = zoo.create_model("transformer-tiny", vocab_size=300, layers={"num_hidden_layers": 3})
    assert model.config.vocab_size == 300
    assert model.config.num_hidden_layers == 3
    assert model.lm_head.weight.shape == (300, 64)
    assert merge({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}}


TAG = {"repo": "a/b", "layout": "transformers", "licence": "MIT", "paper": "https://arxiv.org/abs/1", "parameters": 7}


@pytest.mark.parametrize(
    ("tag", "changed", "message"),
    [
        ("v1", {"license": "MIT"}, r"new-tiny\.tags\.v1\.license: unknown key; did you mean 'licence'"),
        ("v1", {"parameters": "7M"}, r"new-tiny\.tags\.v1\.parameters: input should be a valid integer, got '7M'"),
        ("v1", {"repo": "../b"}, r"new-tiny\.tags\.v1\.repo: string should match .* got '\.\./b'"),
        ("v1", {"revision": "main"}, r"new-tiny\.tags\.v1\.revision: string should match"),
        ("v1", {"file": "../b.pth"}, r"new-tiny\.tags\.v1\.file: string should match"),
        ("v1", {"paper": None}, r"new-tiny\.tags\.v1\.paper: input should be a valid string"),
        ("V 1", {}, r"new-tiny\.tags\.V 1: a tag is of small letters"),
    ],
)
def test_tags_are_strict(names_restored, tag, changed, message):
    with pytest.raises(ConfigError, match=message):
        zoo.register_model("new-tiny", {}, tags={tag: {**TAG, **changed}})
    with pytest.raises(ConfigError, match=r"new-tiny\.tags\.v1\.layout: this key is needed"):
        zoo.register_model("new-tiny", {}, tags={"v1": {k: v for k, v in TAG.items() if k != "layout"}})


def test_tags_and_deprecated_names(names_restored):
    config = model_entry("transformer-tiny").config
    tags = {"v1": {**TAG, "repo": "a/b"}, "v2": {**TAG, "repo": "a/c"}}
    zoo.register_model("new-tiny", config, tags=tags, deprecated=["old-tiny"])
    assert zoo.list_models("new*", pretrained=True) == ["new-tiny.v1", "new-tiny.v2"]
    assert "old-tiny" not in zoo.list_models()
    assert model_entry("new-tiny.v2").name == "new-tiny"
    with pytest.raises(UnknownNameError, match="unknown tag of new-tiny 'v3'; did you mean 'v"):
        model_entry("new-tiny.v3")
    with pytest.warns(DeprecationWarning, match="'old-tiny' is deprecated, use 'new-tiny'"):
        assert zoo.create_model("old-tiny").config.hidden_size == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.create_model("new-tiny")


def test_no_weights_yet_is_said():
    with pytest.raises(ConfigError, match="transformer-tiny has no published weights yet"):
        zoo.create_model("transformer-tiny", pretrained=True)


@pytest.mark.parametrize("name", ["Attention", "my mixer", "2mixer", "mixer-x", ""])
def test_names_of_mixers_are_snake_case(name):
    with pytest.raises(ConfigError, match="is not snake case"):
        zoo.register_mixer(name)


@pytest.mark.parametrize("name", ["Model", "my_model", "-x", ""])
def test_names_of_models_are_kebab_case(name):
    with pytest.raises(ConfigError, match="is not kebab case"):
        zoo.register_model(name, {})


def test_a_taken_name_is_refused():
    with pytest.raises(ConfigError, match=r"mixer 'attention' is already registered by zoo\.mixers\.attention"):
        zoo.register_mixer("attention")(type("Other", (), {}))
    assert zoo.register_mixer("attention")(Attention) is Attention  # the same class again: a reload


def test_a_mixer_from_outside(names_restored):
    config = type(
        "Config", (Attention.Config,), {"__annotations__": {"name": str}, "name": "outside", "__module__": __name__}
    )
    mixer = zoo.register_mixer("outside")(type("Outside", (Attention,), {"Config": config}))
    assert "outside" in zoo.list_mixers()
    zoo.register_model(
        "outside-tiny",
        {
            "layers": {
                "pattern": "outside attention",
                "num_hidden_layers": 2,
                "defaults": {"num_heads": 2, "head_dim": 8},
            }
        },
    )
    model = zoo.create_model("outside-tiny")
    assert isinstance(model.model.layers[0].mixer, mixer)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 256)


PLUGIN = """
import zoo

def register():
    zoo.register_model("plugged-tiny", {"hidden_size": 32}, about="from a plugin")
"""


def test_a_plugin_is_found_by_its_entry_point(tmp_path):
    (tmp_path / "zoo_plugin.py").write_text(PLUGIN)
    info = tmp_path / "zoo_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zoo.plugins]\nmine = zoo_plugin:register\n")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import zoo
        assert "zoo_plugin" not in sys.modules
        assert zoo.list_models("plugged*") == ["plugged-tiny"]
        assert zoo.registry.model_config("plugged-tiny").hidden_size == 32
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_broken_family_file_is_refused_with_its_path(tmp_path):
    path = tmp_path / "x.yaml"
    for text, message in [("models: 3", "expected a mapping"), ("modells: {}\nmodels: {}", "modells: unknown key")]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as info:
            registry._read_family(str(path))
        assert str(info.value).startswith(str(path))


def test_entries_are_plain_data():
    entry = model_entry("retnet-tiny")
    assert isinstance(entry, ModelEntry)
    assert (entry.family, entry.paper) == ("retnet", "https://arxiv.org/abs/2307.08621")
