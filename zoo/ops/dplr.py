"""Linear state space models whose transition is diagonal plus low rank: S4 (Gu et al. 2022, arXiv 2111.00396).

    h' = A h + B x, y = C h          A = diag(w) - P P*          N states in conjugate pairs, of which one is stored

By the bilinear rule h_t = R (I + dt/2 A) h_{t-1} + R dt B x_t with R = (I - dt/2 A)^-1. As A is diagonal plus rank one,
R costs O(N) by Woodbury's identity: that is the recurrence. The convolution kernel k_l = C (R (I + dt/2 A))^l R dt B
is found from its generating function at the roots of unity (section 3.2 and appendix C.3 of the paper),

    sum_{l < L} k_l z^l = C~ ((1 - z) I - dt/2 (1 + z) A)^-1 dt B,      C~ = C (I - Abar^L),

by Woodbury, whose four inner products are Cauchy kernels sum_n a_n b_n / ((1 - z) - dt/2 (1 + z) w_n). Written so, and
not divided by 1 + z, nothing is singular at z = -1. C itself is the parameter, so any length can be asked for.
P P* with the same P on both sides keeps A stable (Goel et al. 2022, arXiv 2202.09729, section 4.1).

Shapes: B batch, L positions, E channels, N pairs stored of a channel, J inputs, Q outputs, F frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.errors import ConfigError
from zoo.ops.backends import no_autocast
from zoo.ops.long_conv import long_conv

OP = "dplr_ssm"
_ROOM = 1 << 22  # numbers of a Cauchy matrix at a time


@dataclass(frozen=True)
class DPLR:
    """One model per channel: steps dt; rates w, rank-one part P, input B and outputs C, which are complex."""

    dt_E: Tensor
    w_EN: Tensor
    p_EN: Tensor
    b_EN: Tensor
    c_QEN: Tensor

    def solve(self, v: Tensor) -> Tensor:
        """(I - dt/2 A)^-1 v for v (..., E, N), by Woodbury's identity."""
        half_E1 = self.dt_E[:, None] / 2
        d_EN = 1 / (1 - half_E1 * self.w_EN)
        dp_EN, dv = d_EN * self.p_EN, d_EN * v
        return dv - dp_EN * (half_E1 * _inner(self.p_EN, dv) / (1 + half_E1 * _inner(self.p_EN, dp_EN)))

    def half_forward(self, v: Tensor) -> Tensor:
        """(I + dt/2 A) v."""
        return v + self.dt_E[:, None] / 2 * (self.w_EN * v - self.p_EN * _inner(self.p_EN, v))

    def advance(self, v: Tensor) -> Tensor:
        """One step of the state without input, O(N)."""
        return self.solve(self.half_forward(v))

    def transition(self) -> Tensor:
        """`advance` as a real matrix (E, 2N, 2N) on [Re h, Im h]; it is linear over the reals only."""
        N = self.w_EN.shape[1]
        unit = torch.eye(2 * N, dtype=self.dt_E.dtype, device=self.dt_E.device)
        images = self.advance(_to_complex(unit)[:, None].expand(-1, *self.w_EN.shape))
        return _to_real(images).permute(1, 2, 0)


def _inner(p: Tensor, v: Tensor) -> Tensor:
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
    initial: Tensor | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = C h of the discretised model: a convolution for a sequence, the recurrence for a single step.

    Args:
        x_BLE: inputs, real. model: with one output (Q = 1), or two for the two-sided form: the second reads the states
            of the sequence run backwards before they take in x_t.
        initial: the state (B, E, N), complex, to start from. final: also return the state behind the last step.
        mask_BL: bool, True for real tokens. A masked position is an identity step whatever it holds; its output is 0.
        segments_BL: contiguous runs of one id are independent sequences. Not with a state.

    Returns:
        y_BLE in the dtype of x, and the final state or None. Sums are kept in float32 (float64 for float64).

    Raises:
        ConfigError: shapes that do not fit together, or a state where there can be none.
    """
    (_, L, E), shape = x_BLE.shape, (len(x_BLE), *model.w_EN.shape)
    if (final or initial is not None) and (segments_BL is not None or len(model.c_QEN) > 1):
        raise ConfigError(f"{OP}: packed segments and the two-sided form have no state to carry")
    if len(model.w_EN) != E:
        raise ConfigError(f"{OP}: the model has {len(model.w_EN)} channels, the input {E}")
    if initial is not None and initial.shape != shape:
        raise ConfigError(f"{OP}: the initial state must be {shape}; got {tuple(initial.shape)}")
    with no_autocast(x_BLE):
        x = x_BLE.to(model.dt_E.dtype)
        if mask_BL is not None:
            x = x.masked_fill(~mask_BL[..., None], 0)
        state: Tensor | None
        if L == 1 and initial is not None:
            y, state = _step(x, model, initial, mask_BL)
        else:
            inputs_JEN = model.b_EN[None]
            if initial is not None:  # a state is what an input of the step before would have left (see `kernels`)
                inputs_JEN = torch.cat([inputs_JEN, model.half_forward(initial) / model.dt_E[:, None]])
            response = kernels(model, inputs_JEN, L)
            back_EL = response[1, 0] if len(response) > 1 else None
            y = long_conv(x, response[0, 0], back_EL, mask_BL=mask_BL, segments_BL=segments_BL)
            if initial is not None:
                y = y + _at_positions(response[0, 1:].mT, mask_BL)
            state = _final(x, model, initial, mask_BL) if final else None
    return y.to(x_BLE.dtype), state if final else None


def _step(x_B1E: Tensor, model: DPLR, initial: Tensor, mask_B1: Tensor | None) -> tuple[Tensor, Tensor]:
    dt_E1 = model.dt_E[:, None]
    state = model.solve(model.half_forward(initial) + dt_E1 * model.b_EN * x_B1E.mT)
    if mask_B1 is not None:
        state = torch.where(mask_B1[..., None], state, initial)
    y_B1E = 2 * (model.c_QEN[0] * state).sum(-1).real[:, None]
    return y_B1E if mask_B1 is None else y_B1E.masked_fill(~mask_B1[..., None], 0), state


def _at_positions(y_BLE: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Row t of y at the t-th real position."""
    if mask_BL is None:
        return y_BLE
    place_BL1 = (mask_BL.cumsum(1) - 1).clamp(min=0)[..., None]
    return y_BLE.gather(1, place_BL1.expand_as(y_BLE)).masked_fill(~mask_BL[..., None], 0)


def kernels(model: DPLR, inputs_JEN: Tensor, length: int) -> Tensor:
    """C Abar^l (I - dt/2 A)^-1 dt v for l < length and each input v: (Q, J, E, length), real.

    With v = B that is the convolution kernel; with v = (I + dt/2 A) h / dt what the outputs owe to an earlier state h.
    """
    power_EMM, c = _power(model.transition(), length), model.c_QEN
    c_QEM = torch.cat([c.real, -c.imag], -1)
    c_QEM = c_QEM - (c_QEM[..., None, :] @ power_EMM)[..., 0, :]
    N = c.shape[-1]
    truncated = replace(model, c_QEN=torch.complex(c_QEM[..., :N], -c_QEM[..., N:]))
    F = length // 2 + 1
    angle_F = torch.arange(F, device=c.device, dtype=torch.float64) * (-2 * torch.pi / length)
    z_F = torch.polar(torch.ones_like(angle_F), angle_F).to(c.dtype)
    pieces = z_F.split(max(1, _ROOM // model.w_EN.numel()))
    spectra = [
        _spectrum(truncated, inputs_JEN, z)
        if len(pieces) == 1
        else checkpoint(_spectrum, truncated, inputs_JEN, z, use_reentrant=False)
        for z in pieces
    ]
    return torch.fft.irfft(torch.cat(spectra, -1), n=length)


def _spectrum(model: DPLR, inputs_JEN: Tensor, z_F: Tensor) -> Tensor:
    """C ((1 - z) I - dt/2 (1 + z) A)^-1 dt v at the points z: (Q, J, E, F).

    With s = 1 - z and t = dt/2 (1 + z) both halves of a pair have one denominator, so that sums over pairs are real
    matrix products:  a / (s - w t) + a* / (s - w* t) = (2 Re(a) s - 2 Re(a w*) t) / (s^2 - 2 Re(w) s t + |w|^2 t^2).
    """
    s_F, t_EF = 1 - z_F, model.dt_E[:, None] / 2 * (1 + z_F)
    w_EN, E = model.w_EN, len(model.w_EN)
    terms_E2F = torch.stack([s_F * t_EF, t_EF.square()], 1)
    factors_EN2 = torch.stack([-2 * w_EN.real, w_EN.real.square() + w_EN.imag.square()], -1)
    below_ENF = 1 / (s_F.square() + _real_product(factors_EN2, terms_E2F))
    rows = torch.cat([model.c_QEN, model.p_EN.conj()[None]])  # what reads: C and P*
    columns = torch.cat([inputs_JEN, model.p_EN[None]])  # what is read: v and P
    a_ERN = (rows[:, None] * columns).flatten(0, 1).transpose(0, 1)  # R: every row with every column
    above_EQN = torch.cat([2 * a_ERN.real, -2 * (a_ERN * w_EN.conj()[:, None]).real], 1)
    times_s, times_t = _real_product(above_EQN, below_ENF).unflatten(1, (2, len(rows), len(columns))).unbind(1)
    r = (s_F * times_s + t_EF.view(E, 1, 1, -1) * times_t).permute(1, 2, 0, 3)
    correction = r[:-1, -1:] * (t_EF / (1 + t_EF * r[-1, -1])) * r[-1:, :-1]
    return (r[:-1, :-1] - correction) * model.dt_E[:, None]


def _real_product(a_ERN: Tensor, b_ENF: Tensor) -> Tensor:
    """a @ b for a real and b complex."""
    return torch.view_as_complex((a_ERN @ torch.view_as_real(b_ENF).flatten(-2)).unflatten(-1, (-1, 2)))


def _power(a_EMM: Tensor, exponent: int) -> Tensor:
    """a^exponent by squaring."""
    result: Tensor | None = None
    while exponent:
        if exponent & 1:
            result = a_EMM if result is None else result @ a_EMM
        exponent >>= 1
        a_EMM = a_EMM @ a_EMM if exponent else a_EMM
    assert result is not None
    return result


def _final(x_BLE: Tensor, model: DPLR, initial: Tensor | None, mask_BL: Tensor | None) -> Tensor:
    """Abar^n h + sum_s Abar^(n-1-s) Bbar x_s over the n real positions of each row."""
    B, L, E = x_BLE.shape
    if mask_BL is None:
        age_BL1 = torch.arange(L - 1, -1, -1, device=x_BLE.device).expand(B, L)[..., None]
        length_B = torch.full((B,), L, device=x_BLE.device)
    else:
        length_B = mask_BL.sum(1)
        age_BL1 = (length_B[:, None] - mask_BL.cumsum(1))[..., None]
    C = min(64, 1 << (L - 1).bit_length())  # a power of two
    blocks = -(-L // C)
    by_age_BEnC = x_BLE.new_zeros(B, blocks * C, E).scatter_add(1, age_BL1.expand_as(x_BLE), x_BLE).mT
    by_age_BEnC = by_age_BEnC.unflatten(-1, (blocks, C))
    power_EMM = model.transition()
    krylov_EMC = _to_real(model.solve(model.dt_E[:, None] * model.b_EN))[..., None]  # Abar^j Bbar for j < C
    carried = None if initial is None else _to_real(initial)
    bit = 1
    while bit <= L or krylov_EMC.shape[-1] < C:
        if krylov_EMC.shape[-1] == bit < C:
            krylov_EMC = torch.cat([krylov_EMC, power_EMM @ krylov_EMC], -1)
        if carried is not None:  # the bits of the row's length say which powers the earlier state goes through
            moved = (power_EMM @ carried[..., None])[..., 0]
            carried = torch.where((length_B & bit).bool()[:, None, None], moved, carried)
        if bit == C:
            block_EMM = power_EMM
        bit *= 2
        power_EMM = power_EMM @ power_EMM
    block_BEnM = by_age_BEnC @ krylov_EMC.mT
    state = block_BEnM[:, :, -1]
    for i in range(blocks - 2, -1, -1):
        state = (block_EMM @ state[..., None])[..., 0] + block_BEnM[:, :, i]
    return _to_complex(state if carried is None else state + carried)
