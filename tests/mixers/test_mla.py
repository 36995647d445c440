"""Multi-head latent attention: against transformers' DeepSeek-V3, both ways of computing, where a conversion starts."""

from __future__ import annotations

import pytest
import torch
from formulas import align, shaken

import zoo
from zoo.errors import ConfigError, ConversionError, TraitError
from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.mla import MLAConfig, MultiHeadLatentAttention, low_rank
from zoo.ops.rotary import RotaryConfig
from zoo.testing import check_mixer

L, D, H = 33, 48, 4
SIZES = {"num_heads": H, "kv_rank": 20, "nope_dim": 12, "rope_dim": 8, "value_head_dim": 10}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.7,
    "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def deepseek(q_rank, rope, interleave, bias):
    """Their attention and what gives its tables, and ours with the same weights."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    config = DeepseekV3Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=H, kv_lora_rank=20, q_lora_rank=q_rank,
        qk_rope_head_dim=8, v_head_dim=10, qk_nope_head_dim=12, rope_parameters=rope, rope_interleave=interleave,
        max_position_embeddings=512, attention_bias=bias,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = shaken(DeepseekV3Attention(config, 0), 0.3)
    rotary = RotaryConfig.from_transformers(config, 8, interleaved=interleave)
    ours = MultiHeadLatentAttention(
        MLAConfig(**SIZES, q_rank=q_rank, rotary=rotary, bias=bias, out_bias=bias), D
    )  # fmt: skip
    names = {
        "q_proj": "q_proj", "q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q_up", "o_proj": "o_proj",
        "kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up",
    }  # fmt: skip
    weights = {f"{names[n.split('.')[0]]}.{n.split('.')[1]}": w for n, w in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    return theirs, DeepseekV3RotaryEmbedding(config), ours


@pytest.mark.parametrize(
    ("q_rank", "rope", "interleave", "bias"),
    [(24, PLAIN, True, False), (None, PLAIN, False, True), (24, YARN, True, True), (None, YARN, True, False)],
)
def test_parity_with_deepseek_v3(q_rank, rope, interleave, bias):
    theirs, tables, ours = deepseek(q_rank, rope, interleave, bias)
    x_BLD, weights = torch.randn(2, L, D), torch.randn(2, L, D)
    mask = torch.full((L, L), -torch.inf).triu(1)[None, None]
    expected = theirs(x_BLD, tables(x_BLD, torch.arange(L)[None]), mask)[0]
    y = ours(x_BLD)[0]
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    state, parts = ours.init_state(2), []
    with torch.no_grad():
        for piece in x_BLD.split([9, *[1] * (L - 9)], 1):
            part, state = ours(piece, state=state)
            parts.append(part)
    assert (torch.cat(parts, 1) - expected).abs().max() <= 2e-5 * expected.abs().max()
    their_grads = torch.autograd.grad((expected * weights).sum(), [theirs.kv_b_proj.weight, theirs.o_proj.weight])
    our_grads = torch.autograd.grad((y * weights).sum(), [ours.kv_up.weight, ours.o_proj.weight])
    for a, b in zip(our_grads, their_grads, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_yarn_sharpens_the_scale():
    config = MLAConfig(**SIZES, rotary=RotaryConfig.from_transformers(zoo_yarn(), 8))
    assert config.softmax_scale == pytest.approx(20**-0.5 * (0.1 * torch.log(torch.tensor(8.0)).item() + 1) ** 2)
    assert MLAConfig(**SIZES, scale=0.5).softmax_scale == 0.5


def zoo_yarn():
    from transformers import DeepseekV3Config

    return DeepseekV3Config(rope_parameters=YARN, max_position_embeddings=512)


@pytest.mark.parametrize(
    "options",
    [
        {**SIZES, "up_bias": True, "bias": True, "window": 7, "rotary": {"theta": 50.0}},
        {**SIZES, "latent_norm": False, "q_rank": 5, "rotary": None},
        {**SIZES, "rope_dim": 0, "rotary": None},
        {**SIZES, "nope_dim": 0, "rotary": {"theta": 50.0}},
    ],
)
def test_laws_with_other_options(options):
    check_mixer("mla", config=options, seed=1)


@pytest.mark.parametrize("masked", [False, True])
def test_absorbed_and_expanded_matrices_give_the_same(masked, monkeypatch):
    options = {**SIZES, "up_bias": True, "bias": True, "rotary": RotaryConfig()}
    mixer = shaken(MultiHeadLatentAttention(MLAConfig(**options), D).double(), 0.3)
    x_BLD, mask_BL = torch.randn(2, L, D).double(), torch.ones(2, L, dtype=torch.bool)
    mask_BL[0, :6] = False
    results = []
    for absorb in (False, True):
        monkeypatch.setattr(mixer, "absorbs", lambda L, S, absorb=absorb: absorb)
        leaves = [x_BLD.clone().requires_grad_(), mixer.kv_up.weight, mixer.kv_down.weight]
        y, state = mixer(leaves[0], state=mixer.init_state(2), mask_BL=mask_BL if masked else None)
        z, _ = mixer(leaves[0][:, :3], state=state)
        y = torch.cat([y[mask_BL] if masked else y.flatten(0, 1), z.flatten(0, 1)])
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_decoding_absorbs_and_prefill_expands():
    sizes = {"num_heads": 16, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_head_dim": 128}
    with torch.device("meta"):
        mixer = MultiHeadLatentAttention(MLAConfig(**sizes), 64)
    assert mixer.absorbs(1, 1000)
    assert mixer.absorbs(4, 100)
    assert not mixer.absorbs(1000, 1000)
    assert not mixer.absorbs(512, 4096)
    mixer.kv_up.register_forward_hook(lambda *_: None)  # an adapter would not be seen
    assert not mixer.absorbs(1, 1000)


@torch.no_grad()
def test_the_state_is_the_latent_and_one_rotary_key():
    mixer = MultiHeadLatentAttention(MLAConfig(**SIZES, rotary=RotaryConfig()), D)
    _, state = mixer(torch.randn(3, 11, D), state=mixer.init_state(3))
    assert {n: tuple(t.shape) for n, t in state.tensors.items()} == {"latent": (3, 1, 11, 20 + 8)}
    assert state.nbytes == 3 * 11 * 28 * 4


def test_two_sided_has_no_state():
    mixer = MultiHeadLatentAttention(MLAConfig(**SIZES, causal=False), D)
    with pytest.raises(TraitError, match="two-sided"):
        mixer(torch.zeros(1, 3, D), state=mixer.init_state(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nope_dim": 0, "rope_dim": 0}, "nope_dim and rope_dim are both 0"),
        ({"rope_dim": 7, "rotary": {}}, r"rope_dim \(7\) must be even"),
        ({"rotary": {"dim": 4}}, r"rotary.dim \(4\) left out"),
        ({"kv_rank": 0}, "kv_rank: input should be greater than or equal to 1"),
        ({"kv_lora_rank": 4}, "kv_lora_rank: unknown key"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        MLAConfig.parse({**SIZES, **options})


def test_parameters_are_those_of_minicpm3():
    from transformers import MiniCPM3Config, MiniCPM3ForCausalLM

    with torch.device("meta"):
        ours = zoo.create_model("mla-4b")
        theirs = MiniCPM3ForCausalLM(
            MiniCPM3Config(
                vocab_size=73448, hidden_size=2560, num_hidden_layers=62, num_attention_heads=40, q_lora_rank=768,
                kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=6400,
                num_key_value_heads=40, tie_word_embeddings=True,
            )
        )  # fmt: skip
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_initial_weights_have_the_deviation_of_the_model():
    model = zoo.create_model("mla-tiny", hidden_size=256)
    for name, p in model.named_parameters():
        if "_norm" in name or name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif any(part in name for part in ("q_down", "q_up", "kv_down", "kv_up")):
            assert p.std().item() == pytest.approx(model.config.initializer_range, rel=0.06), name


# --- From attention ------------------------------------------------------------------------------------------------


def attention(**options):
    config = AttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, **options})
    return shaken(Attention(config, 32).double(), 0.15)


def convert(teacher, **options):
    cls, weights = MultiHeadLatentAttention, teacher.attention_weights()
    return cls.from_attention(cls.config_from_attention(weights, **options), weights).double()


@torch.no_grad()
def relative_error(student, teacher):
    x_BLD = torch.randn(2, 40, 32).double()
    y, expected = student(x_BLD)[0], teacher(x_BLD)[0]
    return ((y - expected).square().sum() / expected.square().sum()).sqrt().item()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 4, "qkv_bias": True, "out_bias": True, "value_head_dim": 6},
        {"window": 5, "scale": 0.7},
    ],
)
def test_full_rank_is_exact_without_positions(options):
    teacher = attention(**options)
    assert relative_error(convert(teacher, kv_rank=32), teacher) < 1e-6
    assert relative_error(convert(teacher, kv_rank=70, q_rank=32), teacher) < 1e-6
    if not options:
        errors = [relative_error(convert(teacher, kv_rank=rank), teacher) for rank in (2, 8, 16, 31, 32)]
        assert errors == sorted(errors, reverse=True)
        assert errors[1] > 0.05


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}])
def test_full_rank_is_exact_with_positions_of_a_single_key_head(interleaved, scaling):
    rotary = RotaryConfig(theta=100.0, interleaved=interleaved, scaling=scaling)
    teacher = attention(num_kv_heads=1, rotary=rotary, qkv_bias=True)
    assert relative_error(convert(teacher, rope_dim=8, kv_rank=32), teacher) < 1e-6


@pytest.mark.parametrize("interleaved", [False, True])
def test_kept_pairs_keep_their_angles(interleaved):
    """Keys with weight on the kept pairs alone lose nothing, whatever becomes of the others."""
    teacher = attention(num_kv_heads=1, rotary=RotaryConfig(theta=100.0, interleaved=interleaved))
    kept = [0, 1, 4, 5] if interleaved else [0, 2, 4, 6]
    with torch.no_grad():
        teacher.k_proj.weight[[i for i in range(8) if i not in kept]] = 0
    assert relative_error(convert(teacher, rope_dim=4, kv_rank=32), teacher) < 1e-6
    assert relative_error(convert(teacher, rope_dim=2, kv_rank=32), teacher) > 1e-2


def test_a_partly_rotary_head_with_qk_norm_starts_in_scale():
    rotary = RotaryConfig(theta=100.0, dim=4, scaling={"rope_type": "linear", "factor": 2.0})
    teacher = attention(rotary=rotary, qk_norm=True, qkv_bias=True)
    student = convert(teacher, kv_rank=32)
    assert (student.config.nope_dim, student.config.rope_dim) == (6, 2)
    assert student.config.rotary == rotary.model_copy(update={"dim": None})
    assert relative_error(student, teacher) < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rope_dim": 6}, "rope_dim 6 must be even and divide the 8"), ({"num_heads": 2}, "2 heads of 4 . 4 and values")],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConversionError, match=message):
        convert(attention(rotary=RotaryConfig()), **options)


def test_factors_are_the_best_of_their_rank():
    W = torch.randn(9, 7).double()
    up, down = low_rank(W, 3)
    assert torch.linalg.matrix_norm(W - up @ down) == pytest.approx(torch.linalg.svdvals(W)[3:].norm().item())


def test_a_few_steps_of_alignment_bring_it_closer():
    teacher = attention(rotary=RotaryConfig(theta=100.0)).float()
    student = convert(teacher, kv_rank=16).float()
    x_BLD = torch.randn(4, 40, 32)
    errors = [e**2 for e in align(student, teacher, steps=31, inputs=lambda: x_BLD)]
    assert errors[0] < 0.7
    assert errors[-1] < 0.6 * errors[0]
