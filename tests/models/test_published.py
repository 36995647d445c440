"""Dense models by name: as many parameters as transformers' own classes, and the totals of the released checkpoints."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import zoo
from zoo.registry import model_entry

BERT = {"vocab_size": 30522}
LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8}
TIED = {"tie_word_embeddings": True}


def llama(d: int, layers: int, heads: int, inner: int, **options) -> tuple[str, dict]:
    sizes = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner}
    return "LlamaForCausalLM", {"vocab_size": 32000, **sizes, **options}


def opt(d: int, layers: int, heads: int, **options) -> tuple[str, dict]:
    sizes = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * d}
    return "OPTForCausalLM", {**sizes, **options}


def pythia(d: int, layers: int, heads: int, vocab_size: int = 50304) -> tuple[str, dict]:
    sizes = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * d}
    return "GPTNeoXForCausalLM", {"vocab_size": vocab_size, **sizes}


def gpt2(d: int, layers: int, heads: int) -> tuple[str, dict]:
    return "GPT2LMHeadModel", {"n_embd": d, "n_layer": layers, "n_head": heads}


def bert(d: int, layers: int, heads: int, inner: int) -> tuple[str, dict]:
    sizes = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner}
    return "BertForMaskedLM", {**BERT, **sizes}


def albert(d: int, layers: int, heads: int) -> tuple[str, dict]:
    sizes = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * d}
    return "AlbertForMaskedLM", sizes


def qwen(version: int, d: int, layers: int, heads: int, groups: int, inner: int, **options) -> tuple[str, dict]:
    _, values = llama(d, layers, heads, inner, vocab_size=151936, num_key_value_heads=groups, **options)
    return f"Qwen{version}ForCausalLM", values | ({"head_dim": 128} if version == 3 else {})


# Name: class and sizes in transformers, and the total of the released weights where it is published.
PEERS: dict[str, tuple[tuple[str, dict], int | None]] = {
    "bert-base-110m": (bert(768, 12, 12, 3072), 109_514_298),
    "bert-large-340m": (bert(1024, 24, 16, 4096), 335_174_458),
    "distilbert-66m": (("DistilBertForMaskedLM", {}), 66_985_530),
    "tinybert-4l-14.5m": (bert(312, 4, 12, 1200), None),
    "tinybert-6l-67m": (bert(768, 6, 12, 3072), None),
    "mobilebert-25m": (("MobileBertForMaskedLM", {}), None),
    "albert-base-11m": (albert(768, 12, 12), None),
    "albert-large-17m": (albert(1024, 24, 16), None),
    "albert-xlarge-55m": (albert(2048, 24, 16), None),
    "albert-xxlarge-206m": (("AlbertForMaskedLM", {}), None),
    "gpt2-124m": (gpt2(768, 12, 12), 124_439_808),
    "gpt2-355m": (gpt2(1024, 24, 16), 354_823_168),
    "gpt2-774m": (gpt2(1280, 36, 20), 774_030_080),
    "gpt2-1.5b": (gpt2(1600, 48, 25), 1_557_611_200),
    "opt-125m": (opt(768, 12, 12), 125_239_296),
    "opt-350m": (opt(1024, 24, 16, do_layer_norm_before=False, word_embed_proj_dim=512), 331_196_416),
    "opt-1.3b": (opt(2048, 24, 32), 1_315_758_080),
    "opt-2.7b": (opt(2560, 32, 32), 2_651_596_800),
    "opt-6.7b": (opt(4096, 32, 32), 6_658_473_984),
    "opt-13b": (opt(5120, 40, 40), None),
    "opt-30b": (opt(7168, 48, 56), None),
    "opt-66b": (opt(9216, 64, 72), None),
    "llama-2-7b": (llama(4096, 32, 32, 11008), 6_738_415_616),
    "llama-2-13b": (llama(5120, 40, 40, 13824), 13_015_864_320),
    "llama-2-70b": (llama(8192, 80, 64, 28672, num_key_value_heads=8), 68_976_648_192),
    "llama-3-8b": (llama(4096, 32, 32, 14336, **LLAMA3), 8_030_261_248),
    "llama-3-70b": (llama(8192, 80, 64, 28672, **LLAMA3), 70_553_706_496),
    "llama-3.1-8b": (llama(4096, 32, 32, 14336, **LLAMA3), 8_030_261_248),
    "llama-3.2-1b": (llama(2048, 16, 32, 8192, **LLAMA3, **TIED), 1_235_814_400),
    "llama-3.2-3b": (llama(3072, 28, 24, 8192, **LLAMA3, **TIED), 3_212_749_824),
    "pythia-70m": (pythia(512, 6, 8), 70_426_624),
    "pythia-160m": (pythia(768, 12, 12), 162_322_944),
    "pythia-410m": (pythia(1024, 24, 16), 405_334_016),
    "pythia-1b": (pythia(2048, 16, 8), 1_011_781_632),
    "pythia-1.4b": (pythia(2048, 24, 16), 1_414_647_808),
    "pythia-2.8b": (pythia(2560, 32, 32), 2_775_208_960),
    "pythia-6.9b": (pythia(4096, 32, 32, 50432), 6_857_302_016),
    "pythia-12b": (pythia(5120, 36, 40, 50688), 11_846_072_320),
    "smollm2-135m": (llama(576, 30, 9, 1536, vocab_size=49152, num_key_value_heads=3, **TIED), 134_515_008),
    "smollm2-360m": (llama(960, 32, 15, 2560, vocab_size=49152, num_key_value_heads=5, **TIED), 361_821_120),
    "smollm2-1.7b": (llama(2048, 24, 32, 8192, vocab_size=49152, **TIED), 1_711_376_384),
    "qwen2-0.5b": (qwen(2, 896, 24, 14, 2, 4864, **TIED), 494_032_768),
    "qwen2-1.5b": (qwen(2, 1536, 28, 12, 2, 8960, **TIED), 1_543_714_304),
    "qwen3-0.6b": (qwen(3, 1024, 28, 16, 8, 3072, **TIED), 596_049_920),
    "qwen3-1.7b": (qwen(3, 2048, 28, 16, 8, 6144, **TIED), 1_720_574_976),
    "qwen3-4b": (qwen(3, 2560, 36, 32, 8, 9728, **TIED), 4_022_468_096),
    "qwen3-8b": (qwen(3, 4096, 36, 32, 8, 12288), 8_190_735_360),
}
CLASSIFIERS = ("bert-base-110m", "distilbert-66m", "tinybert-4l-14.5m", "mobilebert-25m", "albert-xlarge-55m")


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def theirs(architecture: str, values: dict) -> torch.nn.Module:
    cls = getattr(hf, architecture)
    return cls(cls.config_class(**values))


@pytest.mark.parametrize("name", PEERS)
def test_as_many_parameters_as_the_original(name):
    (architecture, values), total = PEERS[name]
    with torch.device("meta"):
        expected = count(theirs(architecture, values))
        assert count(zoo.create_model(name)) == expected
    assert total in (None, expected)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_are_those_of_the_original(name):
    (architecture, values), _ = PEERS[name]
    architecture = architecture.replace("MaskedLM", "SequenceClassification")
    with torch.device("meta"):
        expected = count(theirs(architecture, {**values, "num_labels": 3}))
        assert count(zoo.create_model(name, task="sequence-classification", num_labels=3)) == expected


def test_every_name_of_these_families_is_held():
    families = {model_entry(name).family for name in PEERS}
    names = {n for n in zoo.list_models() if model_entry(n).family in families and not n.endswith("-tiny")}
    assert names == {name for name in names if name in PEERS}
