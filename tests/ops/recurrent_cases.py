"""What tests of recurrences share: cases with a state, padding and packing; everything a function gives; distances."""

from __future__ import annotations

import torch


def make_case(case: str, B=2, G=2, L=37, K=4, V=3):
    """An initial state, left, right and interior padding, packed runs: none of them, the state, or all."""
    if case == "plain":
        return {}
    if case == "state":
        return {"initial": torch.randn(B, G, K, V).double()}
    mask_BL = torch.rand(B, L) > 0.2
    mask_BL[0, :3], mask_BL[1, -4:] = False, False
    return make_case("state") | {"mask_BL": mask_BL, "segments_BL": (torch.rand(B, L) > 0.85).cumsum(1)}


def evaluate(function, tensors, case, dtype, real_L=None, **options):
    """The output, the final state, and the gradients of a random function of both for everything that goes in.

    With `real_L` the loss and what is returned see the real positions only; elsewhere all must be exactly zero.
    """
    initial = case.get("initial")
    leaves = [t.detach().to(dtype).requires_grad_() for t in (*tensors, initial) if t is not None]
    fed = iter(leaves)
    inputs = [next(fed) if t is not None else None for t in tensors]
    case = case if initial is None else dict(case, initial=next(fed))
    y, state = function(*inputs, final=True, **case, **options)

    def real(t):
        if real_L is None or t.ndim < 3 or t.shape[2] != len(real_L):
            return t
        assert (t[:, :, ~real_L] == 0).all()
        return t[:, :, real_L]

    outputs = [real(y), state]
    generator = torch.Generator().manual_seed(3)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum() for o in outputs)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in (*outputs, *map(real, grads))]


def assert_near(actual, expected, tolerance):
    """Largest error relative to the largest value of each tensor (and to 1 where all are small)."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = ((a.double() - e.double()).abs().max() / e.abs().max().clamp(min=1.0)).item()
        assert error <= tolerance, f"output {i}: relative error {error:.2e}"  # a NaN fails too
