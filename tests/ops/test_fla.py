"""flash-linear-attention's kernels behind our ops: against the loops over time, on fresh inputs, on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from recurrent_cases import evaluate

from zoo.ops import backends, fla
from zoo.ops.delta import delta_rule
from zoo.ops.generalized_delta import generalized_delta_rule
from zoo.ops.recurrence import linear_recurrence
from zoo.ops.reference import delta_rule_reference, linear_recurrence_reference
from zoo.ops.rwkv_reference import generalized_delta_rule_reference
from zoo.ops.vector_delta import vector_delta_rule
from zoo.ops.wkv import wkv

B, G, L, K, V = 2, 4, 150, 32, 64
# Errors relative to the root mean square of the reference. bfloat16 has 8 bits, tf32 11.
ALLOWED = {torch.bfloat16: 0.015, torch.float32: 0.004}

needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() or not backends._importable("fla"), reason="needs a GPU and flash-linear-attention"
)


@pytest.fixture(autouse=True)
def _untuned(monkeypatch):
    """The first of a kernel's configurations will do: which one is fastest, its tuner would search for minutes."""
    if torch.cuda.is_available():
        from triton.runtime.autotuner import Autotuner

        prune = Autotuner.prune_configs
        monkeypatch.setattr(Autotuner, "prune_configs", lambda self, arguments: prune(self, arguments)[:1])


def make(op: str, R: int):
    """(our op, its reference, tensors on the GPU with the values of bfloat16, options of both)."""
    heads = G // R
    q, k = torch.randn(B, G, L, K), F.normalize(torch.randn(B, heads, L, K), dim=-1)
    v, beta, u = torch.randn(B, heads, L, V), torch.rand(B, heads, L), torch.rand(B, heads, L, K)
    options = {"scale": 0.5}
    if op.startswith("delta") or op == "vector_delta":
        function, reference = (vector_delta_rule if op == "vector_delta" else delta_rule), delta_rule_reference
        decay = {"delta": [], "delta, decay": [-2 * u[..., 0] ** 4], "vector_delta": [-2 * u**4]}[op]
        tensors = [q, k, v, beta, *decay]
    elif op == "generalized":
        function = generalized_delta_rule

        def reference(*inputs, final, **options):
            return generalized_delta_rule_reference(*inputs, **options)

        removal = F.normalize(torch.randn(B, heads, L, K), dim=-1)
        tensors = [q, k, v, removal, removal * torch.rand(B, heads, L, K), -0.6 * u]
    else:
        function, reference = linear_recurrence, linear_recurrence_reference
        decay = {"none": None, "constant": -u[0, :, 0, 0] / 4, "scalar": -2 * u[..., 0] ** 4, "vector": -2 * u**4}
        tensors = [q, k, v, decay[op.removesuffix(", normalized")]]
        if op.endswith("normalized"):
            tensors[:2], options = [q.abs(), k.abs()], {"normalize": True}
    return function, reference, [t if t is None else t.bfloat16().cuda() for t in tensors], options


def make_case(case: str, R: int, normalize: bool):
    if case == "plain":
        return {}
    initial = torch.rand(B, G // R, K, V + normalize).bfloat16().cuda()
    if case == "state":
        return {"initial": initial}
    mask_BL = torch.rand(B, L) > 0.2
    mask_BL[0, :3], mask_BL[1, -4:] = False, False
    segments_BL = (torch.rand(B, L) > 0.95).cumsum(1)
    return {"initial": initial, "mask_BL": mask_BL.cuda(), "segments_BL": segments_BL.cuda()}


def assert_near(actual, expected, allowed):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = ((a.double() - e.double()).square().mean() / e.double().square().mean().clamp(min=1e-12)).sqrt().item()
        assert error <= allowed, f"output {i} of {len(actual)}: relative error {error:.2e}"  # a NaN fails too


OPS = ("none", "constant", "scalar", "vector", "none, normalized", "scalar, normalized")
PER_STEP = ("constant", "scalar", "scalar, normalized", "delta, decay")
DELTAS = ("delta", "delta, decay", "vector_delta", "generalized")


@needs_kernels
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize(("case", "R"), [("plain", 1), ("state", 2), ("mask, runs, state", 1)])
@pytest.mark.parametrize("op", OPS + DELTAS)
def test_matches_the_loop_over_time_with_all_gradients(op, case, R, dtype):
    if op == "delta" and dtype == torch.float32:
        pytest.skip("chunk_delta_rule refuses float32")
    function, reference, tensors, options = make(op, R)
    if op in PER_STEP and fla._miscompiled(torch.device("cuda")):
        pytest.skip("the package refuses this gradient with this version of Triton")
    case = make_case(case, R, "normalize" in options)
    expected = evaluate(reference, tensors, case, torch.float64, **options)
    assert_near(evaluate(partial(function, backend="fla"), tensors, case, dtype, **options), expected, ALLOWED[dtype])


@needs_kernels
@pytest.mark.parametrize("R", [1, 2])
def test_a_constant_decay_that_is_not_trained(R):
    function, reference, (*tensors, log_decay), options = make("constant", R)
    case = make_case("state", R, False)

    def fixed(function, q, k, v, **options):
        return function(q, k, v, log_decay.to(q.dtype), **options)

    expected = evaluate(partial(fixed, reference), tensors, case, torch.float64, **options)
    actual = evaluate(partial(fixed, partial(function, backend="fla")), tensors, case, torch.bfloat16, **options)
    assert_near(actual, expected, ALLOWED[torch.bfloat16])


@needs_kernels
@pytest.mark.parametrize("strength", [30.0, 1e4])
@pytest.mark.parametrize("op", ["scalar", "vector", "delta, decay", "vector_delta"])
def test_strong_decays(op, strength):
    function, reference, tensors, options = make(op, 1)
    if op in PER_STEP and fla._miscompiled(torch.device("cuda")):
        pytest.skip("the package refuses this gradient with this version of Triton")
    tensors[-1] = strength * tensors[-1]
    expected = evaluate(reference, tensors, {}, torch.float64, **options)[:5]
    actual = evaluate(partial(function, backend="fla"), tensors, {}, torch.bfloat16, **options)
    assert_near(actual[:5], expected, 0.02)
    assert actual[-1].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("case", ["plain", "state"])
def test_wkv(case):
    tensors = [torch.randn(B, L, V), torch.randn(B, L, V), torch.rand(V), torch.randn(V)]
    state = torch.stack([torch.randn(B, V), torch.rand(B, V) + 0.5, torch.randn(B, V)], 1)
    case = {"initial": state.cuda()} if case == "state" else {}

    def average(function, *inputs, **options):
        """The output, and what the state says: it is divided by e^p, and other p mean the same."""
        y, state = function(*inputs, **options)
        return y, state[:, 0] / state[:, 1]

    tensors = [t.cuda() for t in tensors]
    expected = evaluate(partial(average, partial(wkv, backend="torch")), tensors, case, torch.float64)
    actual = evaluate(partial(average, partial(wkv, backend="fla")), tensors, case, torch.float32)
    assert_near(actual[:6], expected[:6], 1e-4)


@needs_kernels
def test_the_dispatch_takes_them_for_bfloat16(monkeypatch):
    called = []
    monkeypatch.setattr(fla, "run", lambda name, q, *_, **__: called.append(name) or (q, q))
    q = torch.randn(1, 2, 70, 32, device="cuda", dtype=torch.bfloat16)
    linear_recurrence(q, q, q)
    delta_rule(q.float(), q.float(), q, torch.rand(1, 2, 70, device="cuda"))
    assert called == ["simple_gla.chunk_simple_gla", "delta_rule.chunk_delta_rule"]
    with backends.without("fla"):
        linear_recurrence(q, q, q)
    linear_recurrence(q.float(), q.float(), q.float())
    linear_recurrence(q[..., :20], q[..., :20], q)
    assert len(called) == 2


def test_a_miscompiled_gradient_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(fla, "_miscompiled", lambda device: True)
    low = torch.zeros(1, 2, 70, 32, dtype=torch.bfloat16)
    assert not fla.serves(low, low, low, decay_per_step=True)
    assert fla.serves(low, low, low)
    with torch.no_grad():
        assert fla.serves(low, low, low, decay_per_step=True)


def test_what_they_serve():
    q = torch.zeros(1, 2, 70, 32)
    low = q.bfloat16()
    assert fla.serves(low, low, low)
    assert fla.serves(q, q, low)
    assert not fla.serves(low, low, q)
    assert not fla.serves(q.double(), q.double(), low)
    assert not fla.serves(low[..., :20], low[..., :20], low)
    assert not fla.serves(low, low, low[..., :20])
    assert not fla.serves(low.repeat(1, 1, 1, 16), low.repeat(1, 1, 1, 16), low)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert not fla.serves(q, q, q)
        torch.set_float32_matmul_precision("high")
        assert fla.serves(q, q, q)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("R", [1, 2])
def test_the_way_to_their_conventions_and_back(R, monkeypatch):
    """A stand-in that keeps time before heads, computed by our own portable op, run by run."""

    def chunk_simple_gla(q, k, v, g, initial_state, output_final_state, scale, cu_seqlens):
        ys, states = [], []
        for n in range(len(cu_seqlens) - 1):
            here = [t[:, cu_seqlens[n] : cu_seqlens[n + 1]].transpose(1, 2) for t in (q, k, v, g)]
            y, state = linear_recurrence(*here, scale=scale, initial=initial_state[n : n + 1], final=True)
            ys, states = [*ys, y.transpose(1, 2)], [*states, state]
        return torch.cat(ys, 1), torch.cat(states)

    module = type("module", (), {"chunk_simple_gla": staticmethod(chunk_simple_gla)})
    monkeypatch.setattr(fla.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(backends, "_importable", lambda package: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    q, k, v = torch.randn(2, 4, 20, 4), torch.randn(2, 4 // R, 20, 4), torch.randn(2, 4 // R, 20, 3)
    mask_BL = torch.rand(2, 20) > 0.2
    mask_BL[0, :3] = False
    options = {
        "initial": torch.randn(2, 4 // R, 4, 3), "final": True, "scale": 0.5, "mask_BL": mask_BL,
        "segments_BL": (torch.rand(2, 20) > 0.7).cumsum(1),
    }  # fmt: skip
    tensors = q, k, v, -torch.rand(2, 4 // R, 20)
    expected = linear_recurrence(*tensors, backend="torch", **options)
    assert_near(linear_recurrence(*tensors, backend="fla", **options), expected, 1e-6)
