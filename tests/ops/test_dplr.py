"""S4's diagonal plus low rank: against dense matrices, the loop over time, and the authors' kernel."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ops.dplr import DPLR, dplr_ssm, kernels
from zoo.ops.state_space import hippo_legs, legs_normal
from zoo.ops.state_space_reference import dplr_ssm_reference

B, L, E, N = 2, 37, 3, 4
AUTHORS = [  # every fifth number of the kernels
    [1.227479843, -0.199373498, 0.038313866, -0.012579433, 0.006647529],
    [0.248866462, -0.048254996, -0.142088804, 0.070792895, 0.038338607],
]


def make(outputs=1, dtype=torch.complex128):
    def complex_normal(*shape):
        return torch.randn(*shape, dtype=torch.complex128)

    dt = torch.tensor([0.01, 0.1, 1.0])
    w = torch.complex(-torch.rand(E, N).double(), 5 * torch.randn(E, N).double())
    model = DPLR(dt.double(), w, complex_normal(E, N), complex_normal(E, N), complex_normal(outputs, E, N))
    real = torch.empty(0, dtype=dtype).real.dtype
    tensors = [t.to(dtype if t.is_complex() else real) for t in (getattr(model, f.name) for f in fields(DPLR))]
    return DPLR(*tensors), torch.randn(B, L, E, dtype=real), complex_normal(B, E, N).to(dtype)


def dense(model, e):
    """A, B and C of channel e over both of each pair."""
    w, p, b = (torch.cat([t[e], t[e].conj()]) for t in (model.w_EN, model.p_EN, model.b_EN))
    c = torch.cat([model.c_QEN[:, e], model.c_QEN[:, e].conj()], -1)
    return torch.diag(w) - torch.outer(p, p.conj()), b, c


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65])
def test_kernel_is_the_power_series_of_the_dense_matrices(length):
    model, _, _ = make(outputs=2)
    got = kernels(model, model.written()[None], length)[0][:, 0]
    for e, dt in enumerate(model.dt_E):
        A, b, c = dense(model, e)
        solve = torch.linalg.inv(torch.eye(2 * N) - dt / 2 * A)
        a_bar, b_bar = solve @ (torch.eye(2 * N) + dt / 2 * A), solve @ b * dt
        powers = torch.stack([torch.linalg.matrix_power(a_bar, i) @ b_bar for i in range(length)], -1)
        wanted = (c @ powers).real
        assert (got[:, e] - wanted).abs().max() < 1e-11 * max(1.0, wanted.abs().max().item())


def test_kernel_of_hippo_legs_is_that_of_the_dense_matrix():
    """C of the original basis, B and A as in HiPPO: nothing of the normal form shows from outside."""
    size, dt, length = 16, 0.05, 40
    c = torch.randn(size).double()
    A, b = (t.to(c.device) for t in hippo_legs(size))
    solve = torch.linalg.inv(torch.eye(size) - dt / 2 * A)
    a_bar, b_bar = solve @ (torch.eye(size) + dt / 2 * A), solve @ b * dt
    wanted = torch.stack([c @ torch.linalg.matrix_power(a_bar, i) @ b_bar for i in range(length)])
    w, p, b_normal = legs_normal(size)
    p_original = (torch.arange(size).double() + 0.5).sqrt()
    skew = A + torch.outer(p_original, p_original) + 0.5 * torch.eye(size)
    frequency, V = torch.linalg.eigh(skew * -1j)
    c_normal = (c.to(V.dtype) @ V)[frequency > 0]
    model = DPLR(torch.tensor([dt], dtype=torch.float64), w[None], p[None], b_normal[None], c_normal[None, None])
    assert (kernels(model, model.written()[None], length)[0][0, 0, 0] - wanted).abs().max() < 1e-10 * wanted.abs().max()


def test_kernel_is_that_of_the_authors():
    """SSMKernelDPLR of models/s4/s4.py, github.com/state-spaces/s4 at commit e757cef, in float64, from a formula."""

    def formula(shape, k):
        return (torch.arange(shape.numel()).double() * k + k).sin().view(shape)

    pairs = torch.Size((2, 3, 2))
    p, b, c = (torch.view_as_complex(formula(pairs, k)) for k in (0.8, 1.9, 1.3))
    rates = torch.complex(-(-0.7 + 0.3 * formula(pairs[:2], 0.9)).exp(), 9 * formula(pairs[:2], 1.7))
    model = DPLR((-2 + formula(pairs[:1], 2.1)).exp(), rates, p, b, c[None])
    got = kernels(model, model.written()[None], 24)[0][0, 0]
    torch.testing.assert_close(got[:, ::5], torch.tensor(AUTHORS).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("length", [1, L, 150])
def test_is_the_recurrence(masked, carried, length):
    model, _, h = make()
    x = torch.randn(B, length, E).double()
    mask = torch.rand(B, length) > 0.3 if masked else None
    tensors = [x, h, *(getattr(model, f.name) for f in fields(DPLR))]
    leaves = [t.clone().requires_grad_() for t in tensors]
    x, h, *parts = leaves
    results = []
    for function in (dplr_ssm, dplr_ssm_reference):
        y, state = function(x, DPLR(*parts), initial=h if carried else None, final=True, mask_BL=mask)
        loss = (y * torch.arange(length)[:, None].cos()).sum() + state.abs().square().sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=not carried)
        results.append([y, state, *(g for g in grads if g is not None)])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-10 * max(1.0, b.abs().max().item())


def test_segments_are_sequences_and_two_sides_are_two_recurrences():
    model, x, _ = make(outputs=2)
    parts = [getattr(model, f.name) for f in fields(DPLR)]
    one, two = (DPLR(*parts[:-1], parts[-1][i : i + 1]) for i in range(2))
    segments = torch.tensor([[0] * 10 + [1] * 27, [3] * 36 + [0]])
    y, _ = dplr_ssm(x, model, segments_BL=segments)
    for b, start, end in ((0, 0, 10), (0, 10, 37), (1, 0, 36), (1, 36, 37)):
        part = x[b : b + 1, start:end]
        ahead, _ = dplr_ssm_reference(part, one)
        behind, _ = dplr_ssm_reference(part.flip(1), two)
        behind = torch.cat([behind.flip(1)[:, 1:], torch.zeros_like(behind[:, :1])], 1)
        assert (y[b : b + 1, start:end] - ahead - behind).abs().max() < 1e-10


def test_single_precision_is_enough_for_thousands_of_steps():
    """The slowest steps turn and fade for the longest time, and in them a change of the state is the smallest."""
    torch.manual_seed(0)
    c = torch.randn(1, 3, 32, dtype=torch.complex128)
    w, p, b = (t.expand(3, -1).to(c.device) for t in legs_normal(64))
    exact = DPLR(torch.tensor([0.001, 0.01, 0.1]).double(), w, p, b, c)
    single = DPLR(exact.dt_E.float(), *(t.to(torch.complex64) for t in (w, p, b, c)))
    wanted, got = (kernels(model, model.written()[None], 8192)[0][0, 0] for model in (exact, single))
    assert ((got - wanted).abs().amax(1) / wanted.abs().amax(1)).max() < 1e-5


def test_wrong_arguments_are_named():
    model, x, h = make()
    with pytest.raises(ConfigError, match="the model has 3 channels, the input 2"):
        dplr_ssm(x[..., :2], model)
    with pytest.raises(ConfigError, match=r"initial state must be \(2, 3, 4\); got \(3, 4\)"):
        dplr_ssm(x, model, initial=h[0])
    with pytest.raises(ConfigError, match="no state to carry"):
        dplr_ssm(x, make(outputs=2)[0], final=True)
