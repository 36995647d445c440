"""Models by name: as many parameters as transformers' own classes, and the totals of the released checkpoints."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import zoo
from zoo.registry import model_entry

BERT = {"vocab_size": 30522}
LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8}
TIED = {"tie_word_embeddings": True}
LARGE = {"d": 1024, "layers": 24, "heads": 16}
KDA, MLA = ["linear_attention"], ["full_attention"]
LONG = {"vocab_size": 50265, "max_position_embeddings": 4098, "type_vocab_size": 1}


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
    vocab_size = 152064 if (version, d) == (2, 3584) else 151936
    _, values = llama(d, layers, heads, inner, vocab_size=vocab_size, num_key_value_heads=groups, **options)
    return f"Qwen{version}ForCausalLM", values | ({"head_dim": 128} if version == 3 else {})


def encoder(name: str, d: int = 768, layers: int = 12, heads: int = 12, **options) -> tuple[str, dict]:
    sizes = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * d}
    return f"{name}ForMaskedLM", {**sizes, **options}


def state_space(name: str, d: int, layers: int, **options) -> tuple[str, dict]:
    return f"{name}ForCausalLM", {"hidden_size": d, "num_hidden_layers": layers, **options}


def mamba2(d: int, layers: int) -> tuple[str, dict]:
    return state_space("Mamba2", d, layers, vocab_size=50288, num_heads=d // 32, n_groups=1, **TIED)


def falcon_h1(
    d: int, layers: int, heads: int, inner: int, vocab_size: int, mamba: tuple, **options
) -> tuple[str, dict]:
    """`mamba`: heads, their size, the size of the state."""
    count, size, state = mamba
    _, values = llama(d, layers, heads, inner, vocab_size=vocab_size, num_key_value_heads=2, head_dim=128)
    values |= {"mamba_n_heads": count, "mamba_d_head": size, "mamba_d_ssm": count * size, "mamba_d_state": state}
    return "FalconH1ForCausalLM", {**values, "mamba_n_groups": 1, "mamba_rms_norm": False, **options}


def zamba2(d: int, layers: int, hybrid: tuple, state: int, **options) -> tuple[str, dict]:
    kinds = ["hybrid" if i in hybrid else "mamba" for i in range(layers)]
    sizes = {"hidden_size": d, "num_hidden_layers": layers, "intermediate_size": 4 * d, "mamba_d_state": state}
    return "Zamba2ForCausalLM", {**sizes, "layers_block_type": kinds, "n_mamba_heads": d // 32, **options}


def reformer(d: int, heads: int, inner: int, layers: list, grid: tuple, parts: tuple, **options) -> tuple[str, dict]:
    sizes = {"hidden_size": d, "num_attention_heads": heads, "feed_forward_size": inner, "attn_layers": layers}
    places = {"axial_pos_shape": grid, "axial_pos_embds_dim": parts, "max_position_embeddings": grid[0] * grid[1]}
    return "ReformerModelWithLMHead", {**sizes, **places, "is_decoder": True, **options}


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
    "llama-3.1-70b": (llama(8192, 80, 64, 28672, **LLAMA3), 70_553_706_496),
    "llama-3.1-405b": (llama(16384, 126, 128, 53248, **LLAMA3), 405_853_388_800),
    "llama-3.2-1b": (llama(2048, 16, 32, 8192, **LLAMA3, **TIED), 1_235_814_400),
    "llama-3.2-3b": (llama(3072, 28, 24, 8192, **LLAMA3, **TIED), 3_212_749_824),
    "pythia-14m": (pythia(128, 6, 4), 14_067_712),
    "pythia-31m": (pythia(256, 6, 8), 30_494_720),
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
    "qwen2-7b": (qwen(2, 3584, 28, 28, 4, 18944), 7_615_616_512),
    "qwen3-0.6b": (qwen(3, 1024, 28, 16, 8, 3072, **TIED), 596_049_920),
    "qwen3-1.7b": (qwen(3, 2048, 28, 16, 8, 6144, **TIED), 1_720_574_976),
    "qwen3-4b": (qwen(3, 2560, 36, 32, 8, 9728, **TIED), 4_022_468_096),
    "qwen3-8b": (qwen(3, 4096, 36, 32, 8, 12288), 8_190_735_360),
    "qwen3-14b": (qwen(3, 5120, 40, 40, 8, 17408), 14_768_307_200),
    "qwen3-32b": (qwen(3, 5120, 64, 64, 8, 25600), 32_762_123_264),
    "big-bird-base-128m": (encoder("BigBird"), None),
    "big-bird-large-359m": (encoder("BigBird", **LARGE), None),
    "longformer-base-149m": (encoder("Longformer", **LONG), None),
    "longformer-large-435m": (encoder("Longformer", **LARGE, **LONG), None),
    "nystromformer-110m": (encoder("Nystromformer"), None),
    "fnet-base-83m": (("FNetForMaskedLM", {}), None),
    "fnet-large-238m": (
        ("FNetForMaskedLM", {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}),
        None,
    ),
    "reformer-crime-and-punishment-2.7m": (
        reformer(256, 2, 512, ["local", "lsh"] * 3, (512, 1024), (64, 192), attention_head_size=64, vocab_size=320),
        None,
    ),
    "reformer-enwik8-149m": (
        reformer(
            1024,
            8,
            4096,
            ["local", "local", "lsh", "local"] * 3,
            (128, 512),
            (256, 768),
            attention_head_size=128,
            vocab_size=258,
        ),
        None,
    ),
    "mixtral-8x7b": (("MixtralForCausalLM", {}), 46_702_792_704),
    "mixtral-8x22b": (
        ("MixtralForCausalLM", llama(6144, 56, 48, 16384, vocab_size=32768, num_key_value_heads=8)[1]),
        140_630_071_296,
    ),
    "olmoe-1b-7b": (("OlmoeForCausalLM", {"intermediate_size": 1024}), 6_919_161_856),
    "qwen2-moe-a2.7b": (("Qwen2MoeForCausalLM", {}), 14_315_784_192),
    "deepseek-v2-lite-16b": (
        (
            "DeepseekV2ForCausalLM",
            {
                **llama(2048, 27, 16, 10944, vocab_size=102400)[1],
                **{"q_lora_rank": None, "moe_intermediate_size": 1408, "first_k_dense_replace": 1},
            },
        ),
        15_706_484_224,
    ),
    "deepseek-v3-671b": (("DeepseekV3ForCausalLM", {"num_mtp_layers": 0}), 671_026_404_352),
    "kimi-linear-48b": (("KimiLinearForCausalLM", {"layer_types": (KDA * 3 + MLA) * 6 + KDA * 2 + MLA}), None),
    "qwen3-next-80b": (("Qwen3NextForCausalLM", {}), None),
    "bamba-9.8b": (
        ("BambaForCausalLM", {"vocab_size": 128256, "mamba_d_state": 128, "attn_layer_indices": [9, 18, 27]}),
        None,
    ),
    "falcon-h1-90m": (falcon_h1(512, 24, 8, 768, 32768, (24, 32, 64), head_dim=64, **TIED), None),
    "falcon-h1-0.5b": (falcon_h1(1024, 36, 8, 2048, 32784, (24, 64, 128), head_dim=64), None),
    "falcon-h1-1.5b": (falcon_h1(2048, 24, 8, 4608, 65537, (48, 64, 256)), None),
    "falcon-h1-deep-1.5b": (falcon_h1(1280, 66, 6, 3072, 65537, (24, 64, 256)), None),
    "falcon-h1-3b": (falcon_h1(2560, 32, 10, 6144, 65537, (32, 128, 256)), None),
    "falcon-h1-7.6b": (falcon_h1(3072, 44, 12, 12288, 130049, (24, 128, 256)), None),
    "falcon-h1-34b": (
        falcon_h1(
            5120, 72, 20, 21504, 261120, (32, 128, 256), num_key_value_heads=4, mamba_n_groups=2, mamba_rms_norm=True
        ),
        None,
    ),
    "falcon-mamba-7b": (
        state_space("FalconMamba", 4096, 64, vocab_size=65024, tie_word_embeddings=False),
        7_272_665_088,
    ),
    "mamba-130m": (state_space("Mamba", 768, 24), 129_135_360),
    "mamba-370m": (state_space("Mamba", 1024, 48), 371_516_416),
    "mamba-790m": (state_space("Mamba", 1536, 48), 793_204_224),
    "mamba-1.4b": (state_space("Mamba", 2048, 48), 1_372_178_432),
    "mamba-2.8b": (state_space("Mamba", 2560, 64), 2_768_345_600),
    "mamba2-130m": (mamba2(768, 24), None),
    "mamba2-370m": (mamba2(1024, 48), None),
    "mamba2-780m": (mamba2(1536, 48), None),
    "mamba2-1.3b": (mamba2(2048, 48), None),
    "mamba2-2.7b": (mamba2(2560, 64), None),
    "mamba2-codestral-7b": (("Mamba2ForCausalLM", {}), 7_285_403_648),
    "rwkv4-169m": (state_space("Rwkv", 768, 12), 169_342_464),
    "rwkv4-430m": (state_space("Rwkv", 1024, 24), 430_397_440),
    "rwkv4-1.5b": (state_space("Rwkv", 2048, 24), 1_515_106_304),
    "rwkv4-3b": (state_space("Rwkv", 2560, 32), 2_984_627_200),
    "rwkv4-7b": (state_space("Rwkv", 4096, 32), 7_392_649_216),
    "rwkv4-14b": (state_space("Rwkv", 5120, 40), 14_148_597_760),
    "olmo-hybrid-7b": (("OlmoHybridForCausalLM", {}), None),
    "zamba2-1.2b": (zamba2(2048, 38, range(5, 38, 6), 128, use_shared_attention_adapter=True, use_mem_rope=True), None),
    "zamba2-2.7b": (zamba2(2560, 54, (6, 12, 18, 24, 30, 36, 42, 47, 51), 64, num_mem_blocks=2), None),
    "zamba2-7b": (
        zamba2(3584, 81, (6, *range(11, 81, 6)), 64, num_mem_blocks=2, use_mem_rope=True, mamba_ngroups=2),
        None,
    ),
}
CLASSIFIERS = ("bert-base-110m", "distilbert-66m", "tinybert-4l-14.5m", "mobilebert-25m", "albert-xlarge-55m")


# What a class has and does not compute with.
SPARE = {"BigBirdForMaskedLM": "pooler", "FNetForMaskedLM": "pooler", "ReformerModelWithLMHead": "lm_head.bias"}


def count(model: torch.nn.Module, spare: str = "nothing") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if spare not in name)


def theirs(architecture: str, values: dict) -> torch.nn.Module:
    cls = getattr(hf, architecture)
    return cls(cls.config_class(**values))


@pytest.mark.parametrize("name", PEERS)
def test_as_many_parameters_as_the_original(name):
    (architecture, values), total = PEERS[name]
    with torch.device("meta"):
        expected = count(theirs(architecture, values), SPARE.get(architecture, "nothing"))
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
