"""Linear state space models with constant, diagonal, complex transitions: S4D and what is made of it.

    h_t = z h_{t-1} + x_t          y_t = 2 Re(sum_n c_n h_t[n])          |z| < 1, half of N conjugate pairs per channel

(Gu et al. 2022, S4D, arXiv 2206.11893; the input's factor is part of c.) A whole sequence is a long convolution with
k_l = 2 Re(sum_n c_n z_n^l). That sum, a product with a Vandermonde matrix, is done in two steps of sqrt(L) powers each,
z^(i C + j) = z^(i C) z^j, so that it is a product of small matrices and no power (E, N, L) is ever held. Powers are
taken in float64: the phase of z^l grows with l, and with it its error.

Shapes: B batch, L positions, E channels, N states (pairs) of a channel, n blocks of C powers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.ops.backends import no_autocast
from zoo.ops.long_conv import long_conv
from zoo.ops.pairs import Pairs, from_pairs, log1p, to_pairs, where
from zoo.ops.stepwise import repeat_step

OP = "diagonal_ssm"


def diagonal_ssm(
    x_BLE: Tensor,
    log_z_EN: Any,
    c_EN: Any,
    back_c_EN: Tensor | None = None,
    *,
    initial: Any = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """h_t = z h_{t-1} + x_t, y_t = 2 Re(c . h_t): a convolution for a sequence, the recurrence for a single step.

    Args:
        x_BLE: inputs, real. log_z_EN, c_EN: complex; the real part of log z is <= 0. With a state they may be `Pairs`,
            as `initial` is then.
        back_c_EN: the two-sided form: the same states run backwards and are read, before they take in x_t, with this.
        initial: the state (B, E, N), complex, to start from. final: also return the state behind the last step.
        mask_BL: bool, True for real tokens. A masked position is an identity step whatever it holds; its output is 0.
        segments_BL: contiguous runs of one id are independent sequences. Not with a state.

    Returns:
        y_BLE in the dtype of x, and the final state or None. Sums are kept in float32 (float64 for float64).

    Raises:
        ConfigError: shapes that do not fit together, or a state where there can be none.
    """
    B, L, E = x_BLE.shape
    carries = final or initial is not None
    if carries and (segments_BL is not None or back_c_EN is not None):
        raise ConfigError(f"{OP}: packed segments and the two-sided form have no state to carry")
    if log_z_EN.ndim != 2 or log_z_EN.shape[0] != E or c_EN.shape != log_z_EN.shape:
        raise ConfigError(
            f"{OP}: z and c must be ({E}, N) for {E} channels; got {tuple(log_z_EN.shape)} and {tuple(c_EN.shape)}"
        )
    if initial is not None and initial.shape != (B, *log_z_EN.shape):
        raise ConfigError(f"{OP}: the initial state must be {(B, *log_z_EN.shape)}; got {tuple(initial.shape)}")
    with no_autocast(x_BLE):
        if initial is not None and (L == 1 or isinstance(initial, Pairs)):
            z_EN = _powers(log_z_EN, torch.ones(1), c_EN.dtype)[..., 0]
            y_BLE, state = _steps(x_BLE.to(c_EN.dtype.to_real()), z_EN, c_EN, initial.to(c_EN.dtype), mask_BL)
            return y_BLE.to(x_BLE.dtype), state if final else None
        back_EL = None if back_c_EN is None else response(back_c_EN, log_z_EN, L)
        y_BLE = long_conv(
            x_BLE.to(c_EN.real.dtype), response(c_EN, log_z_EN, L), back_EL, mask_BL=mask_BL, segments_BL=segments_BL
        )
        if initial is not None:
            y_BLE = y_BLE + _of_initial(initial, log_z_EN, c_EN, L, mask_BL)
        state = _final(x_BLE.to(c_EN.real.dtype), log_z_EN, initial, mask_BL) if final else None
    return y_BLE.to(x_BLE.dtype), state


def discretize(dt_E: Tensor, A_EN: Any, rule: str) -> tuple[Any, Any]:
    """log z and the factor of the inputs, both complex (E, N), of h' = A h + x in steps of dt.

    rule: "zoh" holds the input for a step, z = e^{dt A}; "bilinear" is the trapezoidal rule.
    """
    dt_E1, dtA_EN = dt_E[:, None], A_EN * dt_E[:, None]
    if rule == "zoh":
        return dtA_EN, (dtA_EN.exp() - 1) / A_EN
    return log1p(dtA_EN / 2) - log1p(-dtA_EN / 2), dt_E1 / (1 - dtA_EN / 2)


def response(c_EN: Tensor, log_z_EN: Tensor, length: int, start: int = 0) -> Tensor:
    """2 Re(sum_n c_n z_n^(start + l)) for l < length: (..., E, length) of c (..., E, N)."""
    C, n = _blocks(length)
    coarse_ENn = _powers(log_z_EN, torch.arange(n) * C + start, c_EN.dtype)
    fine_ENC = _powers(log_z_EN, torch.arange(C), c_EN.dtype)
    left = (c_EN[..., None] * coarse_ENn).mT  # (..., E, n, N)
    # The real part of a complex product is one real product of twice the inner size.
    left, right = torch.cat([left.real, -left.imag], -1), torch.cat([fine_ENC.real, fine_ENC.imag], -2)
    return 2 * (left @ right).flatten(-2)[..., :length]


def _powers(log_z_EN: Any, exponents: Tensor, dtype: torch.dtype) -> Any:
    wide_EN1 = log_z_EN.to(torch.complex128)[..., None]
    return (wide_EN1 * exponents.to(wide_EN1.real.device)).exp().to(dtype)


def _blocks(length: int) -> tuple[int, int]:
    """Powers in a block, about sqrt(length), and blocks."""
    C = 1 << math.ceil(math.log2(max(length, 1)) / 2)
    return C, -(-length // C)


def _of_initial(initial: Tensor, log_z_EN: Tensor, c_EN: Tensor, L: int, mask_BL: Tensor | None) -> Tensor:
    """What the outputs (B, L, E) owe to the state before: 2 Re(c . z^(t+1) h) at the t-th real position."""
    y_BLE = response(c_EN * initial.to(c_EN.dtype), log_z_EN, L, start=1).mT
    if mask_BL is None:
        return y_BLE
    place_BL1 = (mask_BL.cumsum(1) - 1).clamp(min=0)[..., None]
    return y_BLE.gather(1, place_BL1.expand_as(y_BLE)).masked_fill(~mask_BL[..., None], 0)


def _final(x_BLE: Tensor, log_z_EN: Tensor, initial: Tensor | None, mask_BL: Tensor | None) -> Tensor:
    """z^L h + sum_s z^(L-1-s) x_s over the real positions."""
    L, dtype = x_BLE.shape[1], log_z_EN.dtype
    if mask_BL is None:
        age_BL1 = torch.arange(L - 1, -1, -1, device=x_BLE.device).expand(x_BLE.shape[:2])[..., None]
        length_B = torch.full((len(x_BLE),), L, device=x_BLE.device)
    else:  # the real positions, the last first
        x_BLE, length_B = x_BLE.masked_fill(~mask_BL[..., None], 0), mask_BL.sum(1)
        age_BL1 = (length_B[:, None] - mask_BL.cumsum(1))[..., None]
    C, n = _blocks(L)
    by_age_BLE = x_BLE.new_zeros(len(x_BLE), n * C, x_BLE.shape[2])
    by_age_BEnC = by_age_BLE.scatter_add(1, age_BL1.expand_as(x_BLE), x_BLE).mT.unflatten(-1, (n, C))
    fine_ECN = _powers(log_z_EN, torch.arange(C), dtype).mT
    inner_BEnN = torch.complex(by_age_BEnC @ fine_ECN.real, by_age_BEnC @ fine_ECN.imag)
    state = (inner_BEnN * _powers(log_z_EN, torch.arange(n) * C, dtype).mT).sum(-2)
    if initial is None:
        return state
    return state + initial * (log_z_EN.to(torch.complex128) * length_B[:, None, None]).exp().to(dtype)


def _steps(x_BLE: Tensor, z_EN: Any, c_EN: Any, initial: Any, mask_BL: Tensor | None) -> tuple[Tensor, Any]:
    """The recurrence over one position, or over all of them in a graph that leaves torch."""
    if x_BLE.shape[1] == 1:
        return _step(initial, x_BLE, mask_BL, z_EN, c_EN)

    def step(state_BEN2: Tensor, x_B1E: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *mask_B1, z_EN2, c_EN2 = rest
        before, z_EN, c_EN = (from_pairs(x, True) for x in (state_BEN2, z_EN2, c_EN2))
        y_B1E, state = _step(before, x_B1E, mask_B1[0] if mask_B1 else None, z_EN, c_EN)
        return y_B1E, to_pairs(state)

    inputs = (x_BLE,) if mask_BL is None else (x_BLE, mask_BL)
    y_BLE, state = repeat_step(step, to_pairs(initial), inputs, 1, (to_pairs(z_EN), to_pairs(c_EN)))
    return y_BLE, from_pairs(state, True)


def _step(before: Any, x_B1E: Tensor, mask_B1: Tensor | None, z_EN: Any, c_EN: Any) -> tuple[Tensor, Any]:
    state = before * z_EN + x_B1E.mT
    if mask_B1 is not None:
        state = where(mask_B1[..., None], state, before)
    y_B1E = 2 * (state * c_EN).sum(-1).real[:, None]
    return y_B1E if mask_B1 is None else y_B1E.masked_fill(~mask_B1[..., None], 0), state


def hippo_legs(size: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The HiPPO-LegS matrix A (N, N) and vector B (N): Gu et al. 2020, arXiv 2008.07669, theorem 2 (with their signs).

    A_nk = -sqrt((2n + 1) (2k + 1)) for n > k, -(n + 1) for n = k, 0 else; B_n = sqrt(2n + 1).
    """
    n = torch.arange(size, dtype=dtype, device="cpu")  # also where the model is made on no device
    B_N = (2 * n + 1).sqrt()
    return -(torch.outer(B_N, B_N).tril(-1) + torch.diag(n + 1)), B_N


def legs_normal(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS as normal plus low rank: A = V (diag(w) - p p*) V*, with B = V b (S4, arXiv 2111.00396, theorem 1).

    Returns w, p, b, all complex128 of size / 2: of each conjugate pair the one with a positive imaginary part.
    Adding sqrt(n + 1/2) sqrt(k + 1/2) to A leaves -1/2 plus a skew-symmetric matrix, whose eigenvectors are orthogonal.
    """
    A, B_N = hippo_legs(size)
    p_N = B_N / 2**0.5
    skew = A + torch.outer(p_N, p_N) + torch.full_like(B_N, 0.5).diag()
    frequency_N, V = torch.linalg.eigh(skew * -1j)
    frequency_N, V = frequency_N[size // 2 :], V[:, size // 2 :]  # in ascending order, and as many of either sign
    w = torch.complex(torch.full_like(frequency_N, -0.5), frequency_N)
    return w, V.mH @ p_N.to(V.dtype), V.mH @ B_N.to(V.dtype)
