"""Mixers side by side, and the hybrids of transformers: Falcon-H1 (side by side) and Bamba (one after another)."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import zoo
from tests.mixers.formulas import align, convert, relative_error, teacher
from zoo.errors import ConfigError, ConversionError
from zoo.mixers.parallel import Parallel, ParallelConfig
from zoo.models.heads import ZooForCausalLM
from zoo.registry import mixer_class, model_config
from zoo.testing import check_mixer

HEADS = {"num_heads": 2, "head_dim": 8}
MAMBA = {"num_heads": 2, "num_groups": 1, "head_dim": 8, "value_head_dim": 16}
VARIANTS = {
    "falcon": {"branches": {"mamba2": {**MAMBA, "norm": False}, "attention": {**HEADS, "rotary": {}}}},
    "three, one twice": {
        "branches": {"attention": HEADS, "near": {"name": "sliding_window", "window": 3, **HEADS}, "mamba2": MAMBA},
        "scale": "channel", "branch_norm": True, "scale_init": {"near": 0.5},
    },
    "nested": {"branches": {"parallel": {"branches": {"retention": HEADS, "attention": HEADS}}, "mamba2": MAMBA},
               "scale": "branch"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "laws"),
    [
        ("falcon", ["split", "mask", "packing", "modules"]),
        ("three, one twice", ["mask", "gradients", "modules"]),
        ("nested", ["packing", "modules"]),
    ],
)
def test_variants_obey_the_laws(variant, laws):
    """What the laws over the registry do not reach: a recurrence with convolutions, scales, a mixer inside another."""
    check_mixer("parallel", config=VARIANTS[variant], laws=laws, seed=1)


def test_outputs_are_normed_scaled_and_added():
    torch.manual_seed(0)
    options = {"scale": "branch", "scale_init": {"mamba2": -2.0}, "branch_norm": True}
    mixer = Parallel(ParallelConfig(branches={"attention": HEADS, "mamba2": MAMBA}, **options), 16)
    x_BLD = torch.randn(2, 9, 16)
    parts = [mixer.branches[name](x_BLD)[0] for name in ("attention", "mamba2")]
    a, m = (y / y.square().mean(-1, keepdim=True).add(1e-6).sqrt() for y in parts)
    torch.testing.assert_close(mixer(x_BLD)[0], a - 2 * m)
    assert {n for n, _ in mixer.named_parameters() if "scales" in n} == {"scales.attention", "scales.mamba2"}
    assert [mixer.scales["attention"].item(), mixer.scales["mamba2"].item()] == [1, -2]
    fixed = Parallel(ParallelConfig(branches={"attention": HEADS, "mamba2": MAMBA}, scale_init={"mamba2": 3.0}), 16)
    fixed.load_state_dict({n: t for n, t in mixer.state_dict().items() if "scales" not in n})
    torch.testing.assert_close(fixed(x_BLD)[0], parts[0] + 3 * parts[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": {"attention": HEADS}}, "mixer.branches: "),
        ({"branches": {"attention": HEADS, "mamba2": {**MAMBA, "head_dim": 0}}}, "mixer.branches.mamba2.head_dim: "),
        ({"branches": {"attention": HEADS, "mamba2": {**MAMBA, "head_dm": 8}}}, "did you mean 'head_dim'"),
        ({"branches": {"attention": HEADS, "A.b": {"name": "mamba2", **MAMBA}}}, "label 'A.b' is not snake case"),
        ({"branches": {"attention": HEADS, "mamba2": 3}}, "branches.mamba2: expected a name or a mapping"),
        ({"branches": {"attention": HEADS, "near": {**HEADS, "name": "attention", "causal": False}}}, "near.causal"),
        ({"scale_init": {"atention": 1.0}}, "scale_init.atention: no branch has this label; did you mean 'attention'"),
        ({"scale_init": {"attention": math.inf}}, "scale_init.attention: must be between"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig.parse({"branches": {"attention": HEADS, "mamba2": MAMBA}, **options}, "mixer")


def test_traits_are_those_of_the_branches():
    branches = {"retention": HEADS, "mamba2": MAMBA}
    assert Parallel(ParallelConfig(branches=branches), 16).traits.state == "constant"
    window = {"name": "sliding_window", "window": 40, "sinks": 2, **HEADS}
    assert Parallel(ParallelConfig(branches={**branches, "near": window}), 16).traits.state == "window"
    mixer = Parallel(ParallelConfig(branches={**branches, "attention": HEADS}), 16)
    assert mixer.traits.state == "grows"
    assert set(mixer.keep_float32) >= {"A_log", "D", "dt_bias"}
    half = zoo.convert(zoo.create_model("transformer-tiny").bfloat16(), "parallel", calibrate=False)
    assert half.model.layers[0].mixer.branches["mamba2"].A_log.dtype == torch.float32


@pytest.mark.parametrize("causal", [True, False])
def test_a_conversion_starts_as_the_first_branch(causal):
    attention = teacher(causal=causal)
    student = convert(attention, "parallel")
    assert list(student.branches) == ["attention", "mamba2" if causal else "linear_attention"]
    assert relative_error(student, attention) < 1e-6
    again = ParallelConfig.parse(student.config.plain())
    assert again == student.config
    near = {"near": {"name": "sliding_window", "window": 4, "sinks": 1}, "linear_attention": {}}
    student = convert(attention, "parallel", branches=near)
    assert student.branches["linear_attention"].config.causal == causal
    alone = convert(attention, "sliding_window", window=4, sinks=1)
    start = relative_error(student, attention)
    assert start == pytest.approx(relative_error(alone, attention), rel=1e-4)
    align(student, attention)
    assert relative_error(student, attention) < 0.8 * start
    assert student.scales["linear_attention"].abs().max() > 0


def test_a_conversion_needs_scales_that_can_be_zero():
    attention = teacher(causal=True)
    for options in ({"scale": "fixed"}, {"branch_norm": True}):
        with pytest.raises(ConversionError, match="needs scale 'channel' or 'branch', and no branch_norm"):
            convert(attention, "parallel", **options)
    with pytest.raises(ConfigError, match=r"mixer\.branches: expected names or a mapping of options by label, got 3"):
        mixer_class("parallel").config_from_attention(attention.attention_weights(), branches=3)


# Falcon-H1: https://arxiv.org/abs/2507.22448, table 4 and the model cards; Bamba: https://huggingface.co/blog/bamba.
SIZES = {
    "falcon-h1-0.5b": 0.521, "falcon-h1-1.5b": 1.555, "falcon-h1-deep-1.5b": 1.555, "falcon-h1-3b": 3.15,
    "falcon-h1-7.6b": 7.59, "falcon-h1-34b": 33.6, "bamba-9.8b": 9.78,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    with torch.device("meta"):
        model = ZooForCausalLM(model_config(name))
    assert model.num_parameters() / 1e9 == pytest.approx(SIZES[name], rel=2e-3)


def test_bamba_has_attention_in_three_layers():
    names = model_config("bamba-9.8b").mixer_names
    assert [i for i, name in enumerate(names) if name == "attention"] == [9, 18, 27]


# --- Whole models of transformers ------------------------------------------------------------------------------------

D, V, F, H, G, K, M, P, N = 32, 61, 48, 4, 2, 8, 8, 8, 16  # M heads of size P with a state of N in Mamba-2
SHAPE = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 3, "num_attention_heads": H,
    "num_key_value_heads": G, "mamba_n_heads": M, "mamba_d_head": P, "mamba_d_state": N, "mamba_n_groups": 2,
    "mamba_chunk_size": 8, "max_position_embeddings": 128, "pad_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 1.7, "lm_head_multiplier": 0.4, "key_multiplier": 0.6, "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 1.3], "mlp_multipliers": [0.85, 0.6],
}  # fmt: skip
MAMBA2 = {"num_heads": M, "num_groups": 2, "head_dim": N, "value_head_dim": P}
ATTENTION = {"num_heads": H, "num_kv_heads": G, "head_dim": K}


def ours_of(pattern, mixers, tied=False):
    layers = {"pattern": pattern, "num_hidden_layers": 3, "mixers": mixers}
    layers["ffn"] = {"name": "gated_mlp", "hidden_size": F}
    config = zoo.ZooConfig(vocab_size=V, hidden_size=D, norm_eps=1e-5, tie_word_embeddings=tied, layers=layers)
    return ZooForCausalLM(config).eval()


def mamba_weights(get, theirs, ours, c=lambda part: 1.0, norm=True):
    """Our tensors of a Mamba-2 layer from theirs; c gives the multiplier of a part."""
    sizes = [M * P, M * P, 2 * N, 2 * N, M]
    parts = dict(zip(("g", "v", "k", "q", "dt"), get(f"{theirs}.in_proj.weight").split(sizes), strict=True))
    out = {f"{ours}.{n}_proj.weight": w * c(n) for n, w in parts.items()}
    for kind in ("weight", "bias"):
        conv = get(f"{theirs}.conv1d.{kind}").flatten(1) if kind == "weight" else get(f"{theirs}.conv1d.{kind}")
        for n, part in zip("vkq", conv.split(sizes[1:4]), strict=True):
            out[f"{ours}.{n}_conv.{kind}"] = part
    out |= {f"{ours}.{n}": get(f"{theirs}.{n}") for n in ("A_log", "D", "dt_bias")}
    out[f"{ours}.o_proj.weight"] = get(f"{theirs}.out_proj.weight") * c("o")
    return out | ({f"{ours}.norm.weight": get(f"{theirs}.norm.weight")} if norm else {})


def block_weights(get, i, c=lambda part: 1.0):
    """The norms and the MLP of a block."""
    a = f"model.layers.{i}"
    out = {f"{a}.ffn.{n}_proj.weight": get(f"{a}.feed_forward.{n}_proj.weight") * c(n) for n in ("gate", "up", "down")}
    norms = {"mixer_norm": "input_layernorm", "ffn_norm": "pre_ff_layernorm"}
    return out | {f"{a}.{ours}.weight": get(f"{a}.{theirs}.weight") for ours, theirs in norms.items()}


def falcon(norm=False, tied=False):
    """(their model, ours, a function from their parameters to ours)."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(
        **SHAPE, **MULTIPLIERS, mamba_d_ssm=M * P, mamba_rms_norm=norm, mamba_norm_before_gate=False,
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e11},
    )  # fmt: skip
    branches = {"mamba2": {**MAMBA2, "norm": norm}, "attention": {**ATTENTION, "rotary": {"theta": 1e11}}}
    m = MULTIPLIERS
    ssm = dict(zip(("g", "v", "k", "q", "dt"), m["ssm_multipliers"], strict=True))
    ssm = {n: s * m["ssm_in_multiplier"] for n, s in ssm.items()} | {"o": m["ssm_out_multiplier"]}
    heads = dict.fromkeys("qkv", m["attention_in_multiplier"]) | {"o": m["attention_out_multiplier"]}
    heads["k"] *= m["key_multiplier"]
    mlp = dict(zip(("gate", "down", "up"), [*m["mlp_multipliers"], 1.0], strict=True))

    def fold(get):
        head = m["lm_head_multiplier"] / (m["embedding_multiplier"] if tied else 1)
        out = {"model.embed_tokens.weight": get("model.embed_tokens.weight") * m["embedding_multiplier"]}
        out["model.norm.weight"] = get("model.final_layernorm.weight") * head
        out["lm_head.weight"] = out["model.embed_tokens.weight"] if tied else get("lm_head.weight")
        for i in range(3):
            a, b = f"model.layers.{i}", f"model.layers.{i}.mixer.branches"
            out |= mamba_weights(get, f"{a}.mamba", f"{b}.mamba2", ssm.__getitem__, norm)
            for n, s in heads.items():
                out[f"{b}.attention.{n}_proj.weight"] = get(f"{a}.self_attn.{n}_proj.weight") * s
            out |= block_weights(get, i, mlp.__getitem__)
        return out

    return FalconH1ForCausalLM(config), ours_of("parallel", {"parallel": {"branches": branches}}, tied), fold


def bamba():
    """The same for Bamba."""
    from transformers import BambaConfig, BambaForCausalLM

    attention = {**ATTENTION, "rotary": {"dim": K // 2}}

    def fold(get):
        out = {n: get(n) for n in ("model.embed_tokens.weight", "lm_head.weight")}
        out["model.norm.weight"] = get("model.final_layernorm.weight")
        for i in range(3):
            a = f"model.layers.{i}"
            if i == 1:
                out |= {f"{a}.mixer.{n}_proj.weight": get(f"{a}.self_attn.{n}_proj.weight") for n in "qkvo"}
            else:
                out |= mamba_weights(get, f"{a}.mamba", f"{a}.mixer")
            out |= block_weights(get, i)
        return out

    theirs = BambaForCausalLM(BambaConfig(**SHAPE, mamba_expand=2, attn_layer_indices=[1]))
    return theirs, ours_of("mamba2 attention", {"mamba2": MAMBA2, "attention": attention}), fold


MODELS = {
    "bamba": bamba,
    "falcon": falcon,
    "falcon with a norm": functools.partial(falcon, norm=True),
    "falcon, tied": functools.partial(falcon, tied=True),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """A model of transformers and ours with its weights; no bias is zero and no norm one."""
    torch.manual_seed(0)
    theirs, ours, fold = MODELS[request.param]()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.dim() == 1 and "A_log" not in name:
                p.add_(0.2 * torch.randn_like(p))
        ours.load_state_dict(fold(dict(theirs.named_parameters()).__getitem__))
    return theirs.eval(), ours, fold


IDS = torch.randint(0, V, (2, 27), generator=torch.Generator().manual_seed(3))


def test_logits_are_those_of_transformers(pair):
    theirs, ours, _ = pair
    with torch.no_grad():
        expected = theirs(IDS, use_cache=False).logits
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_gradients_are_those_of_transformers(pair):
    """Through the folding of the multipliers, so that every parameter of theirs is compared."""
    theirs, ours, fold = pair
    parameters = dict(theirs.named_parameters())
    expected = torch.autograd.grad(theirs(IDS, labels=IDS, use_cache=False).loss, list(parameters.values()))
    weights = fold(parameters.__getitem__)
    out = torch.func.functional_call(ours, weights, (IDS,), {"labels": IDS, "use_cache": False})
    got = torch.autograd.grad(out.loss, list(parameters.values()))
    for name, a, b in zip(parameters, got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7, name


def test_generation_is_that_of_transformers(pair):
    """Greedy, with caches on both sides and a left-padded row."""
    theirs, ours, _ = pair
    mask_BL = torch.ones_like(IDS)
    mask_BL[1, :6] = 0
    options = {"attention_mask": mask_BL, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(IDS, **options), theirs.generate(IDS, eos_token_id=None, **options))
