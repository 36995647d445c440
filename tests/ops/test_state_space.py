"""Diagonal state space models: kernel, recurrence, states; and HiPPO."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.ops.state_space import diagonal_ssm, hippo_legs, legs_normal, response
from zoo.ops.state_space_reference import diagonal_ssm_reference

B, L, E, N = 2, 37, 3, 4


def make(dtype=torch.complex128):
    log_z = torch.complex(-torch.rand(E, N).double(), 3 * torch.randn(E, N).double())
    c, back, h = (torch.randn(*s, dtype=torch.complex128) for s in ((E, N), (E, N), (B, E, N)))
    x = torch.randn(B, L, E).double().to(torch.empty(0, dtype=dtype).real.dtype)
    return x, *(t.to(dtype) for t in (log_z, c, back, h))


@pytest.mark.parametrize(("length", "start"), [(1, 0), (2, 1), (37, 0), (64, 3), (65, 0)])
def test_response_is_the_power_series(length, start):
    _, log_z, c, _, h = make()
    exponents = torch.arange(start, start + length)
    for weights in (c, c * h):  # with and without a batch
        wanted = 2 * (weights[..., None] * (log_z[..., None] * exponents).exp()).sum(-2).real
        assert (response(weights, log_z, length, start) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("length", [1, L])
def test_is_the_recurrence(masked, carried, length):
    x, log_z, c, _, h = make()
    x, mask = x[:, :length].requires_grad_(), (torch.rand(B, length) > 0.3) if masked else None
    leaves = [x, *(t.requires_grad_() for t in ((log_z, c, h) if carried else (log_z, c)))]
    keep = {"initial": h if carried else None, "mask_BL": mask, "final": True}
    poisoned = x if mask is None else x.masked_fill(~mask[..., None], torch.nan)
    got = diagonal_ssm(poisoned if length > 1 else x, log_z, c, **keep)
    wanted = diagonal_ssm_reference(x, log_z, c, **keep)
    weights = [torch.randn_like(t) for t in wanted]
    grads = [
        torch.autograd.grad(sum((t * w).abs().square().sum() for t, w in zip(out, weights, strict=True)), leaves)
        for out in (got, wanted)
    ]
    for a, b in zip((*got, *grads[0]), (*wanted, *grads[1]), strict=True):
        assert (a - b).abs().max() < 1e-10 * max(1.0, b.abs().max().item())


def test_segments_are_sequences_and_two_sides_are_two_recurrences():
    x, log_z, c, back, _ = make()
    segments = torch.tensor([[0] * 10 + [1] * 27, [3] * 36 + [0]])
    y, _ = diagonal_ssm(x, log_z, c, back, segments_BL=segments)
    for b, (start, end) in ((0, (0, 10)), (0, (10, 37)), (1, (0, 36)), (1, (36, 37))):
        part = x[b : b + 1, start:end]
        ahead, _ = diagonal_ssm_reference(part, log_z, c)
        behind, _ = diagonal_ssm_reference(part.flip(1), log_z, back)
        behind = torch.cat([behind.flip(1)[:, 1:], torch.zeros_like(behind[:, :1])], 1)  # without the step itself
        assert (y[b : b + 1, start:end] - ahead - behind).abs().max() < 1e-11


def test_phases_of_long_sequences_keep_their_precision():
    """100 radians a step for 4000 steps in float32: the powers are not the place where digits are lost."""
    log_z = torch.complex(torch.full((1, 1), -1e-4), torch.full((1, 1), 100.0))
    c = torch.ones(1, 1, dtype=torch.complex64)
    exact = response(c.to(torch.complex128), log_z.to(torch.complex128), 4000)
    assert (response(c, log_z, 4000) - exact).abs().max() < 1e-6


def test_hippo_legs_is_normal_plus_low_rank():
    """A = V (diag(w) - p p*) V*: the same matrix, seen from outside by C A^l B for any C."""
    A, B_N = hippo_legs(6)
    assert A[2, 1] == -(15**0.5)
    assert A[1, 2] == 0
    assert A[2, 2] == -3
    w, p, b = legs_normal(6)
    full_w, full_p, full_b = (torch.cat([t, t.conj()]) for t in (w, p, b))
    low_rank = torch.diag(full_w) - torch.outer(full_p, full_p.conj())
    gram = [full_b.conj() @ torch.linalg.matrix_power(low_rank, i) @ full_b for i in range(6)]
    wanted = [B_N @ torch.linalg.matrix_power(A, i) @ B_N for i in range(6)]
    torch.testing.assert_close(torch.stack(gram).real, torch.stack(wanted), rtol=1e-9, atol=1e-9)
    # The frequencies of N = 2 by hand: A + p p^T has -1/2 on its diagonal and sqrt(3)/2 of either sign beside it.
    torch.testing.assert_close(
        legs_normal(2)[0], torch.tensor([-0.5 + 3**0.5 / 2 * 1j], dtype=torch.complex128), check_device=False
    )


def test_wrong_arguments_are_named():
    x, log_z, c, back, h = make()
    with pytest.raises(ConfigError, match=r"z and c must be \(3, N\) for 3 channels; got \(3, 4\) and \(3, 2\)"):
        diagonal_ssm(x, log_z, c[:, :2])
    with pytest.raises(ConfigError, match="no state to carry"):
        diagonal_ssm(x, log_z, c, back, initial=h)
    with pytest.raises(ConfigError, match=r"initial state must be \(2, 3, 4\); got \(3, 4\)"):
        diagonal_ssm(x, log_z, c, initial=h[0])
