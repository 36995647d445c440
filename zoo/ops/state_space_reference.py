"""The plain mathematics of the state space models: slow and obvious. The fast forms are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.chunks import run_starts
from zoo.ops.dplr import DPLR


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
    h_BEN = z_EN.new_zeros(len(x_BLE), *z_EN.shape) if initial is None else initial
    mask_BL = torch.ones_like(x_BLE[..., 0], dtype=torch.bool) if mask_BL is None else mask_BL
    steps = []
    for t, x_BE in enumerate(x_BLE.unbind(1)):
        after_BEN = z_EN * h_BEN + x_BE[..., None]
        real_B11 = mask_BL[:, t, None, None]
        h_BEN = torch.where(real_B11, after_BEN, h_BEN)
        steps.append(torch.where(real_B11[..., 0], 2 * (c_EN * h_BEN).sum(-1).real, 0.0))
    return torch.stack(steps, 1), h_BEN if final else None


def dplr_ssm_reference(
    x_BLE: Tensor, model: DPLR, *, initial: Tensor | None = None, final: bool = False, mask_BL: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`zoo.ops.dplr.dplr_ssm` one step after another with dense matrices: S4, equation 3."""
    w, p, b = (torch.cat([t, t.conj()], -1) for t in (model.w_EN, model.p_EN, model.b_EN))
    A = torch.diag_embed(w) - p[..., :, None] * p.conj()[..., None, :]
    eye, half = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device), model.dt_E[:, None, None] / 2
    solve = torch.linalg.inv(eye - half * A)
    a_bar, b_bar = solve @ (eye + half * A), (solve @ b[..., None])[..., 0] * model.dt_E[:, None]
    c_EM = torch.cat([model.c_QEN[0], model.c_QEN[0].conj()], -1)
    start = w.new_zeros(len(x_BLE), *model.w_EN.shape) if initial is None else initial
    mask_BL = torch.ones_like(x_BLE[..., 0], dtype=torch.bool) if mask_BL is None else mask_BL
    h_BEM, steps = torch.cat([start, start.conj()], -1), []
    for t, x_BE in enumerate(x_BLE.unbind(1)):
        after_BEM = torch.einsum("emn,ben->bem", a_bar, h_BEM) + b_bar * x_BE[..., None]
        real_B11 = mask_BL[:, t, None, None]
        h_BEM = torch.where(real_B11, after_BEM, h_BEM)
        steps.append(torch.where(real_B11[..., 0], (c_EM * h_BEM).sum(-1).real, 0.0))
    return torch.stack(steps, 1), h_BEM[..., : start.shape[-1]] if final else None
