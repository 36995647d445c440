"""Linear state space models whose transition is diagonal plus low rank: S4 (Gu et al. 2022, arXiv 2111.00396).

    h' = A h + B x, y = C h          A = diag(w) - P P*          N states in conjugate pairs, of which one is stored

By the bilinear rule h_t = (I + X) h_{t-1} + R dt B x_t with R = (I - dt/2 A)^-1 and X = dt R A = 2 (R - I). As A is
diagonal plus rank one, Woodbury's identity gives R v in O(N): that is the recurrence, and X as a real matrix.

The convolution kernel k_l = C (I + X)^l R dt B comes from few products. With l = i C + j, C about sqrt(L), it is row i
of C (I + X)^(i C) times column j of (I + X)^j R dt B, and both are made by doubling, from log2 L squarings of I + X.
The paper (section 3.2) takes C (I - (I + X)^L) through N Cauchy kernels at the L roots of unity. It needs the same
squarings, and then N L complex divisions that these products do without; the kernel is the same.

The squarings hold X_n = (I + X)^n - I, for which X_2n = 2 X_n + X_n^2: of a slow mode (X small) no decimal is lost
beside the one, so float32 does for long sequences.
P P* with the same P on both sides keeps A stable (Goel et al. 2022, arXiv 2202.09729, section 4.1).

Shapes: B batch, L positions, E channels, N pairs stored of a channel, M = 2N, J inputs, Q outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops.backends import no_autocast
from zoo.ops.long_conv import long_conv
from zoo.ops.pairs import Pairs, from_pairs, to_pairs, where
from zoo.ops.stepwise import repeat_step

OP = "dplr_ssm"


@dataclass(frozen=True)
class DPLR:
    """One model per channel: steps dt; rates w, rank-one part P, input B and outputs C,
    which are complex (or `Pairs`)."""

    dt_E: Tensor
    w_EN: Any
    p_EN: Any
    b_EN: Any
    c_QEN: Any

    def solve(self, v: Any) -> Any:
        """(I - dt/2 A)^-1 v for v (..., E, N), by Woodbury's identity."""
        half_E1 = self.dt_E[:, None] / 2
        d_EN = 1 / (1 - half_E1 * self.w_EN)
        dp_EN, dv = d_EN * self.p_EN, d_EN * v
        return dv - dp_EN * (half_E1 * _inner(self.p_EN, dv) / (1 + half_E1 * _inner(self.p_EN, dp_EN)))

    def half_forward(self, v: Any) -> Any:
        """(I + dt/2 A) v."""
        return v + self.dt_E[:, None] / 2 * (self.w_EN * v - self.p_EN * _inner(self.p_EN, v))

    def advance(self, v: Tensor) -> Tensor:
        """One step of the state without input, O(N)."""
        return self.solve(self.half_forward(v))

    def written(self) -> Tensor:
        """What an input of one leaves in the state (E, N)."""
        return self.solve(self.dt_E[:, None] * self.b_EN)

    def change(self) -> Tensor:
        """X: what a step adds to the state, as a real matrix (E, M, M) on [Re h, Im h]; it is linear over the reals.

        R - I = (D - I) - D p (dt/2) (p* D) / (1 + dt/2 p* D p) with D = (I - dt/2 w)^-1 and p* as in `_inner`.
        """
        half_E1 = self.dt_E[:, None] / 2
        d_EN = 1 / (1 - half_E1 * self.w_EN)
        left_EN, right_EN = d_EN * self.p_EN, d_EN * self.p_EN.conj()
        left_EN = left_EN * (half_E1 / (1 + half_E1 * _inner(self.p_EN, left_EN)))
        grown_EN = half_E1 * self.w_EN * d_EN  # D - I
        re, im = torch.diag_embed(grown_EN.real), torch.diag_embed(grown_EN.imag)
        diagonal_EMM = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
        return 2 * diagonal_EMM - 4 * _to_real(left_EN)[:, :, None] * _to_real(right_EN.conj())[:, None]


def _inner(p: Any, v: Any) -> Tensor:
    """P* v over both of each pair: 2 Re(sum conj(p) v), kept as (..., 1)."""
    return 2 * (p.conj() * v).sum(-1, keepdim=True).real


def _to_real(h: Tensor) -> Tensor:
    return torch.cat([h.real, h.imag], -1)


def _to_complex(h: Tensor) -> Tensor:
    return torch.complex(*h.chunk(2, -1))


def dplr_ssm(
    x_BLE: Tensor,
    model: DPLR,
    *,
    initial: Any = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """y = C h of the discretised model: a convolution for a sequence, the recurrence for a single step.

    Args:
        x_BLE: inputs, real. model: with one output (Q = 1), or two for the two-sided form: the second reads the states
            of the sequence run backwards before they take in x_t.
        initial: the state (B, E, N), complex (`Pairs` where the model's numbers are), to start from.
        final: also return the state behind the last step.
        mask_BL: bool, True for real tokens. A masked position is an identity step whatever it holds; its output is 0.
        segments_BL: contiguous runs of one id are independent sequences. Not with a state.

    Returns:
        y_BLE in the dtype of x, and the final state or None. Sums are kept in float32 (float64 for float64).

    Raises:
        ConfigError: shapes that do not fit together, or a state where there can be none.
    """
    _, L, E = x_BLE.shape
    shape = (x_BLE.shape[0], *model.w_EN.shape)
    if (final or initial is not None) and (segments_BL is not None or model.c_QEN.shape[0] > 1):
        raise ConfigError(f"{OP}: packed segments and the two-sided form have no state to carry")
    if model.w_EN.shape[0] != E:
        raise ConfigError(f"{OP}: the model has {model.w_EN.shape[0]} channels, the input {E}")
    if initial is not None and initial.shape != shape:
        raise ConfigError(f"{OP}: the initial state must be {shape}; got {tuple(initial.shape)}")
    with no_autocast(x_BLE):
        x = x_BLE.to(model.dt_E.dtype)
        if mask_BL is not None:
            x = x.masked_fill(~mask_BL[..., None], 0)
        if initial is not None and (L == 1 or isinstance(initial, Pairs)):
            y, state = _steps(x, model, initial, mask_BL)
        else:
            starts_JEN, powers = (
                model.written()[None],
                doublings(model, (L if initial is not None else L - 1).bit_length()),
            )
            if initial is not None:
                starts_JEN = torch.cat([starts_JEN, model.advance(initial)])
            response, columns = kernels(model, starts_JEN, L, powers)
            back_EL = response[1, 0] if len(response) > 1 else None
            y = long_conv(x, response[0, 0], back_EL, mask_BL=mask_BL, segments_BL=segments_BL)
            if initial is not None:
                y = y + _at_positions(response[0, 1:].mT, mask_BL)
            state = _final(x, columns[..., 0], powers, initial, mask_BL) if final else None
    return y.to(x_BLE.dtype), state if final else None


def _steps(x_BLE: Tensor, model: DPLR, initial: Any, mask_BL: Tensor | None) -> tuple[Tensor, Any]:
    """The recurrence over one position, or over all of them in a graph that leaves torch."""
    if x_BLE.shape[1] == 1:
        return _step(initial, x_BLE, mask_BL, model)

    def step(state_BEN2: Tensor, x_B1E: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *mask_B1, dt_E, w, p, b, c = rest
        same = DPLR(dt_E, *(from_pairs(x, True) for x in (w, p, b, c)))
        y_B1E, state = _step(from_pairs(state_BEN2, True), x_B1E, mask_B1[0] if mask_B1 else None, same)
        return y_B1E, to_pairs(state)

    inputs = (x_BLE,) if mask_BL is None else (x_BLE, mask_BL)
    constants = (model.dt_E, *(to_pairs(x) for x in (model.w_EN, model.p_EN, model.b_EN, model.c_QEN)))
    y_BLE, state = repeat_step(step, to_pairs(initial), inputs, 1, constants)
    return y_BLE, from_pairs(state, True)


def _step(before: Any, x_B1E: Tensor, mask_B1: Tensor | None, model: DPLR) -> tuple[Tensor, Any]:
    dt_E1 = model.dt_E[:, None]
    state = model.solve(model.half_forward(before) + dt_E1 * model.b_EN * x_B1E.mT)
    if mask_B1 is not None:
        state = where(mask_B1[..., None], state, before)
    y_B1E = 2 * (model.c_QEN[0] * state).sum(-1).real[:, None]
    return y_B1E if mask_B1 is None else y_B1E.masked_fill(~mask_B1[..., None], 0), state


def _at_positions(y_BLE: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Row t of y at the t-th real position."""
    if mask_BL is None:
        return y_BLE
    place_BL1 = (mask_BL.cumsum(1) - 1).clamp(min=0)[..., None]
    return y_BLE.gather(1, place_BL1.expand_as(y_BLE)).masked_fill(~mask_BL[..., None], 0)


def doublings(model: DPLR, count: int) -> list[Tensor]:
    """X_n, what n steps add to the state, (E, M, M), for the first `count` of n = 1, 2, 4, .. (at least one)."""
    powers = [model.change()]
    while len(powers) < count:
        powers.append(torch.baddbmm(powers[-1], powers[-1], powers[-1], beta=2))
    return powers


def kernels(model: DPLR, starts_JEN: Tensor, length: int, powers: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """C (I + X)^l v for l < length and each start v: (Q, J, E, length), real.

    From v = R dt B that is the convolution kernel, from v = (I + X) h what the outputs owe to an earlier state h.
    Also returns (I + X)^j v for the first j: (E, M, C, J), C a power of two. `powers` are `doublings`, if known.
    """
    J, Q, bits = len(starts_JEN), len(model.c_QEN), (length - 1).bit_length()
    powers, half = doublings(model, bits) if powers is None else powers, bits // 2
    columns_EMX = _to_real(starts_JEN).permute(1, 2, 0)
    for x_EMM in powers[:half]:
        columns_EMX = torch.cat([columns_EMX, torch.baddbmm(columns_EMX, x_EMM, columns_EMX)], -1)
    rows_EYM = 2 * torch.cat([model.c_QEN.real, -model.c_QEN.imag], -1).transpose(0, 1)
    for x_EMM in powers[half:bits]:
        rows_EYM = torch.cat([rows_EYM, torch.baddbmm(rows_EYM, rows_EYM, x_EMM)], 1)
    y_EnQCJ = (rows_EYM @ columns_EMX).unflatten(-1, (-1, J)).unflatten(1, (-1, Q))
    y_QJEL = y_EnQCJ.permute(2, 4, 0, 1, 3).flatten(3)[..., :length]
    return y_QJEL, columns_EMX.unflatten(-1, (-1, J))


def _final(
    x_BLE: Tensor, krylov_EMC: Tensor, powers: list[Tensor], initial: Tensor | None, mask_BL: Tensor | None
) -> Tensor:
    """(I + X)^n h + sum_s (I + X)^(n-1-s) R dt B x_s over the n real positions of each row.

    krylov_EMC: (I + X)^j R dt B for j < C, a power of two.
    """
    (B, L, E), C = x_BLE.shape, krylov_EMC.shape[-1]
    if mask_BL is None:
        age_BL1 = torch.arange(L - 1, -1, -1, device=x_BLE.device).expand(B, L)[..., None]
        length_B = torch.full((B,), L, device=x_BLE.device)
    else:
        length_B = mask_BL.sum(1)
        age_BL1 = (length_B[:, None] - mask_BL.cumsum(1))[..., None]
    blocks = -(-L // C)
    by_age_BEnC = x_BLE.new_zeros(B, blocks * C, E).scatter_add(1, age_BL1.expand_as(x_BLE), x_BLE).mT
    block_BEnM = by_age_BEnC.unflatten(-1, (blocks, C)) @ krylov_EMC.mT
    state = block_BEnM[:, :, -1]
    for i in range(blocks - 2, -1, -1):
        state = _add_change(powers[C.bit_length() - 1], state) + block_BEnM[:, :, i]
    if initial is not None:
        carried = _to_real(initial)
        for k, x_EMM in enumerate(powers):  # the bits of a row's length say which powers its state goes through
            moves_B11 = (length_B >> k & 1).bool()[:, None, None]
            carried = torch.where(moves_B11, _add_change(x_EMM, carried), carried)
        state = state + carried
    return _to_complex(state)


def _add_change(x_EMM: Tensor, state_BEM: Tensor) -> Tensor:
    return state_BEM + (x_EMM @ state_BEM[..., None])[..., 0]
