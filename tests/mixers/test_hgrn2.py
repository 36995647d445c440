"""HGRN2: against flash-linear-attention, its bounds and gates, where a conversion starts.

`FLA_VALUES` were printed by this file run as a script with fla-core 0.6.0 on the path:
    python tests/mixers/test_hgrn2.py
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from formulas import align

import zoo
from zoo.errors import ConfigError
from zoo.mixers.attention import Attention, AttentionConfig
from zoo.mixers.base import AttentionStats
from zoo.mixers.hgrn2 import HGRN2, HGRN2Config
from zoo.testing import check_mixer

B, L, D, H, K = 2, 40, 16, 2, 8
FLA_VALUES = [0.799083, -0.004356, -0.800852, -0.320797, 0.418377, 1.512094, 0.195547, -1.4327]


def waves(*shape, phase=0.0):
    """Numbers that need no generator."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + phase).view(shape).float()


def fixed_mixer(bound: float = 0.25) -> HGRN2:
    mixer = HGRN2(HGRN2Config(num_heads=H, head_dim=K, lower_bound=bound), D)
    with torch.no_grad():
        for i, p in enumerate(mixer.parameters()):
            p.copy_(waves(*p.shape, phase=i) * (0.5 if p.ndim > 1 else 0.1) + (p.ndim == 1))
    return mixer


def theirs(mixer: HGRN2, x_BLD: torch.Tensor) -> torch.Tensor:
    """The published block around flash-linear-attention's loop over time, with the weights of ours."""
    found = next((p for entry in sys.path if (p := Path(entry) / "fla/ops/gla/naive.py").is_file()), None)
    if found is None:
        pytest.skip("fla/ops/gla/naive.py is not on the Python path: pip install --no-deps fla-core")
    spec = importlib.util.spec_from_file_location("fla_gla_naive", found)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    f_BLE = -mixer.k_proj(x_BLD)
    bound_E = mixer.bound_logit.sigmoid().flatten()
    g_BLE = (bound_E + (1 - bound_E) * f_BLE.sigmoid()).log()
    q, k, v, g = (
        t.unflatten(-1, (H, K)) for t in (F.silu(mixer.q_proj(x_BLD)), 1 - g_BLE.exp(), mixer.v_proj(x_BLD), g_BLE)
    )
    y_BLHV, _ = peer.naive_recurrent_gla(q, k, v, g)
    return mixer.o_proj(F.rms_norm(y_BLHV.flatten(-2), (H * K,), mixer.out_norm.weight, mixer.out_norm.eps))


def test_parity_with_flash_linear_attention():
    mixer, x_BLD = fixed_mixer(), waves(B, L, D, phase=9.0)
    y, expected = mixer(x_BLD)[0], theirs(mixer, x_BLD)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    weights = waves(B, L, D, phase=4.0)
    ours_grads = torch.autograd.grad((y * weights).sum(), list(mixer.parameters()))
    their_grads = torch.autograd.grad((expected * weights).sum(), list(mixer.parameters()))
    for a, b in zip(ours_grads, their_grads, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_stored_values_of_flash_linear_attention():
    with torch.no_grad():
        y = fixed_mixer()(waves(B, L, D, phase=9.0))[0]
    torch.testing.assert_close(y[1, -2:, :4].flatten(), torch.tensor(FLA_VALUES), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("options", [{"lower_bound": 0.3}, {"lower_bound": 0.9, "out_norm": False, "head_norm": True}])
def test_laws_with_a_bound(options):
    check_mixer("hgrn2", config=options, seed=1)


def test_key_and_forget_gate_add_up_to_one(monkeypatch):
    """Also where either of them is tiny, and with finite gradients."""
    seen = {}
    monkeypatch.setattr(
        HGRN2, "recur", lambda self, q, k, v, inputs, log_decay, scale: seen.update(k=k, f=log_decay) or (v, {})
    )
    for bound in (0.0, 0.25):
        mixer = HGRN2(HGRN2Config(num_heads=1, head_dim=7, lower_bound=bound), 7)
        logits = torch.tensor([-100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0]).view(1, 1, 1, 7).requires_grad_()
        mixer.mix(logits, logits, logits, None)
        torch.testing.assert_close(seen["k"] + seen["f"].exp(), torch.ones(1, 1, 1, 7), rtol=0, atol=3e-7)
        least = math.log(bound) if bound else -100.0
        torch.testing.assert_close(seen["f"][..., -1].item(), least, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad((seen["f"] + seen["k"]).sum(), logits)
        assert gradient.isfinite().all()


def test_bounds_start_as_the_cumulative_softmax_of_the_paper():
    softmax_N = torch.zeros(24).softmax(0)
    paper = softmax_N.cumsum(0) - softmax_N[0]
    with torch.device("meta"):
        model = zoo.create_model("hgrn2-1.3b")
    bounds = torch.tensor([layer["mixer"]["lower_bound"] for layer in model.config.layers])
    torch.testing.assert_close(bounds, paper, rtol=0, atol=1e-5)
    mixers = [m for m in model.modules() if isinstance(m, HGRN2)]
    assert [hasattr(m, "bound_logit") for m in mixers] == [False] + [True] * 23
    tiny = [m for m in zoo.create_model("hgrn2-tiny").modules() if isinstance(m, HGRN2)]
    torch.testing.assert_close(tiny[1].bound_logit.sigmoid(), torch.full((4, 16), 0.25))


def test_parameters_of_the_published_sizes():
    """HGRN2Config of fla: 24 layers of q, f, i, o, norm (2048), gated MLP of 5632, two norms; 2 x 32000 rows."""
    with torch.device("meta"):
        model = zoo.create_model("hgrn2-1.3b")
    layer = 4 * 2048**2 + 2048 + 3 * 2048 * 5632 + 2 * 2048
    published = 24 * layer + 2 * 32000 * 2048 + 2048 + 24 * 2048  # and the bounds, one row a layer
    assert sum(p.numel() for p in model.parameters()) == published - 2048  # our first layer has no bound


def test_initial_weights_have_the_deviation_of_the_model():
    model = zoo.create_model("hgrn2-tiny", hidden_size=128)
    for name, p in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            assert p.std().item() == pytest.approx(model.config.initializer_range, rel=0.05), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower_bound": 1.0}, "lower_bound: input should be less than 1"),
        ({"lower_bound": -0.1}, "lower_bound: input should be greater than or equal to 0"),
        ({"lower_bound": 1e-6}, "lower_bound is 0 or at least 0.0001, got 1e-06"),
        ({"head_norm": True}, "out_norm and head_norm exclude each other"),
        ({"lower_bond": 0.5}, "lower_bond: unknown key; did you mean 'lower_bound'"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        HGRN2Config.parse({"num_heads": 2, "head_dim": 4, **options})


# --- From attention ------------------------------------------------------------------------------------------------


def converted():
    teacher = Attention(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True), 32)
    with torch.no_grad():
        for p in teacher.parameters():
            p.copy_(torch.randn_like(p) / 6)
    stats = AttentionStats(
        lookback_H=torch.tensor([1.0, 3.0, 20.0, 60.0]), q_norm_H=torch.ones(4), k_norm_H=torch.ones(4),
        out_rms_H=torch.tensor([0.3, 0.3, 0.2, 0.2]),
    )  # fmt: skip
    weights = teacher.attention_weights()
    return teacher, HGRN2.from_attention(HGRN2.config_from_attention(weights), weights, stats)


def test_a_middling_key_decays_with_the_measured_lookback():
    _, student = converted()
    bound = student.bound_logit.sigmoid()
    middle = bound + (1 - bound) / 2
    torch.testing.assert_close(-1 / torch.log2(middle), torch.tensor([[2.0], [40.0]]).expand(2, 8), rtol=1e-4, atol=0)


def test_a_few_steps_of_alignment_bring_it_closer():
    teacher, student = converted()
    x_BLD = torch.randn(4, 48, 32)
    errors = [e**2 for e in align(student, teacher, steps=31, inputs=lambda: x_BLD)]
    assert errors[0] < 3
    assert errors[-1] < 0.35 * errors[0]


if __name__ == "__main__":
    with torch.no_grad():
        y = theirs(fixed_mixer(), waves(B, L, D, phase=9.0))
    print(f"FLA_VALUES = {[round(x, 6) for x in y[1, -2:, :4].flatten().tolist()]}")
