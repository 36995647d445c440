"""The plain mathematics of the state space models: slow and obvious. The fast forms are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.chunks import run_starts


def selective_scan_reference(
    x_BLE: Tensor,
    dt_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    *,
    initial: Tensor | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`zoo.ops.diagonal.selective_scan` one step after another: Gu and Dao 2023, algorithm 2."""
    (B, L, _), dtype = x_BLE.shape, torch.promote_types(x_BLE.dtype, torch.float32)
    h_BEN = x_BLE.new_zeros(B, *A_EN.shape, dtype=dtype) if initial is None else initial.to(dtype)
    real_BL = x_BLE.new_ones(B, L, dtype=torch.bool) if mask_BL is None else mask_BL
    starts_BL = torch.zeros_like(real_BL) if segments_BL is None else run_starts(segments_BL, real_BL)
    steps = []
    for t, x_BE in enumerate(x_BLE.unbind(1)):
        real_B11, dt_BE1 = real_BL[:, t, None, None], dt_BLE[:, t, :, None].to(dtype)
        decayed_BEN = (dt_BE1 * A_EN).exp() * h_BEN.masked_fill(starts_BL[:, t, None, None], 0.0)
        h_BEN = torch.where(real_B11, decayed_BEN + dt_BE1 * x_BE[..., None] * B_BLN[:, t, None], h_BEN)
        steps.append(torch.where(real_B11[..., 0], (h_BEN * C_BLN[:, t, None]).sum(-1), 0.0))
    return torch.stack(steps, 1).to(x_BLE.dtype), h_BEN if final else None


def diagonal_ssm_reference(
    x_BLE: Tensor,
    log_z_EN: Tensor,
    c_EN: Tensor,
    *,
    initial: Tensor | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`zoo.ops.state_space.diagonal_ssm` one step after another: h = z h + x, y = 2 Re(c . h)."""
    z_EN = log_z_EN.exp()
    h_BEN = torch.zeros(len(x_BLE), *z_EN.shape, dtype=z_EN.dtype) if initial is None else initial
    steps = []
    for t, x_BE in enumerate(x_BLE.unbind(1)):
        after_BEN = z_EN * h_BEN + x_BE[..., None]
        real_B11 = torch.ones(len(x_BLE), 1, 1, dtype=torch.bool) if mask_BL is None else mask_BL[:, t, None, None]
        h_BEN = torch.where(real_B11, after_BEN, h_BEN)
        steps.append(torch.where(real_B11[..., 0], 2 * (c_EN * h_BEN).sum(-1).real, 0.0))
    return torch.stack(steps, 1), h_BEN if final else None
