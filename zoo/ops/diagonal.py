"""The selective scan: one diagonal state space model per channel, whose step, input and output depend on the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t          y_t = h_t C_t

with h (E, N) for E channels of N states (Gu and Dao 2023, Mamba, arXiv 2312.00752, section 3.2 and algorithm 2: A by
zero-order hold, B by Euler's step, as in the released code). The portable form walks over chunks. Inside it doubles:
blocks of 1, 2, 4, ... steps are joined in place, the later one receiving the last state of the earlier one times the
decay up to there. Only products of factors <= 1 are formed, never their inverses, so no decay is too strong. Of the
states, those at the borders of the chunks are kept; the backward pass, written by hand, makes the others again.

Shapes: B batch, L positions, E channels, N states of a channel, C positions in a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import ConfigError
from zoo.ops.backends import dispatch, no_autocast, register_backend
from zoo.ops.chunks import run_starts
from zoo.ops.stepwise import leaves_torch, repeat_step

OP = "selective_scan"
_ROOM = {"cpu": 1 << 19}  # numbers in one chunk of states: on a CPU what stays in its cache
_ROOM_ELSEWHERE, _LONGEST = 1 << 25, 128


def selective_scan(
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
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = h_t C_t (the step itself included).

    Args:
        x_BLE: inputs. dt_BLE: steps >= 0. A_EN: rates <= 0. B_BLN, C_BLN: shared by all channels of a position.
        initial: the state (B, E, N) to start from. final: also return the state behind the last step.
        mask_BL: bool, True for real tokens. A masked position is an identity step whatever it holds; its output is 0.
        segments_BL: int; every run of equal ids is an independent sequence. `initial` belongs to a row's first run and
            the final state is that of its last.
        chunk: steps per chunk, a power of two. backend: a name from `zoo.backends()`; None takes the best.

    Returns:
        y_BLE in the dtype of x, and the final state or None. Sums are kept in float32 (float64 for float64).

    Raises:
        ConfigError: shapes that do not fit together.
    """
    check_shapes(x_BLE, dt_BLE, A_EN, B_BLN, C_BLN, initial)
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise ConfigError(f"{OP}: chunk must be a power of two, got {chunk}")
    dtype = torch.promote_types(torch.float32, torch.promote_types(x_BLE.dtype, dt_BLE.dtype))
    with no_autocast(x_BLE):
        x, dt, A, B, C = (t.to(dtype) for t in (x_BLE, dt_BLE, A_EN, B_BLN, C_BLN))
        if mask_BL is not None:
            hidden_BL1 = ~mask_BL[..., None]
            x, dt, B, C = (t.masked_fill(hidden_BL1, 0.0) for t in (x, dt, B, C))
        starts_BL = None if segments_BL is None else run_starts(segments_BL, mask_BL)
        state = x.new_zeros(x.shape[0], *A.shape) if initial is None else initial.to(dtype)
        if x.shape[1] == 1 and backend is None:
            y, state = _step(state, x, dt, B, C, A)
        else:
            y, state = dispatch(OP, backend, x, dt, A, B, C, starts_BL, state, chunk)
    return y.to(x_BLE.dtype), state if final else None


def check_shapes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None) -> None:
    """Raise ConfigError where the tensors of `selective_scan` do not fit together."""
    if x.ndim != 3 or x.shape[1] == 0:
        raise ConfigError(f"{OP}: x must be (B, L, E) with L >= 1; got {tuple(x.shape)}")
    if A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise ConfigError(f"{OP}: A must be ({x.shape[2]}, N) for the {x.shape[2]} channels of x; got {tuple(A.shape)}")
    wanted = {"dt": (dt, x.shape), "B": (B, (*x.shape[:2], A.shape[1])), "C": (C, (*x.shape[:2], A.shape[1]))}
    if initial is not None:
        wanted["initial"] = (initial, (x.shape[0], *A.shape))
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ConfigError(f"{OP}: {name} must be {tuple(shape)}; got {tuple(tensor.shape)}")


def _step(state_BEN, x_B1E, dt_B1E, B_B1N, C_B1N, A_EN) -> tuple[Tensor, Tensor]:
    state_BEN = (dt_B1E.mT * A_EN).exp() * state_BEN + (dt_B1E * x_B1E).mT * B_B1N
    return (state_BEN @ C_B1N.mT).mT, state_BEN


@register_backend(OP, "scan", usable=leaves_torch)
def _by_steps(x, dt, A, B, C, starts_BL, state, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Step by step, for graphs that leave torch."""
    return repeat_step(_step, state, (x, dt, B, C), 1, (A,))


@register_backend(OP, "torch")
def _torch(x, dt, A, B, C, starts_BL, state, chunk: int | None) -> tuple[Tensor, Tensor]:
    L, steps = x.shape[1], chunk or _chunk_length(x, A)
    while steps >= 2 * L:
        steps //= 2
    if fill := -L % steps:  # identity steps
        x, dt, B, C = (F.pad(t, (0, 0, 0, fill)) for t in (x, dt, B, C))
        starts_BL = None if starts_BL is None else F.pad(starts_BL, (0, fill))
    y, state = _Scan.apply(x, dt, A, B, C, state, starts_BL, steps)
    return y[:, :L], state


def _chunk_length(x_BLE: Tensor, A_EN: Tensor) -> int:
    """The largest power of two up to `_LONGEST` (at least 8) whose states have room."""
    room, C = _ROOM.get(x_BLE.device.type, _ROOM_ELSEWHERE), 8
    while C < _LONGEST and 2 * C * x_BLE.shape[0] * A_EN.numel() <= room:
        C *= 2
    return C


def _decays(dt_BCE: Tensor, A_EN: Tensor, starts_BC: Tensor | None) -> Tensor:
    a_BCEN = (dt_BCE[..., None] * A_EN).exp_()
    return a_BCEN if starts_BC is None else a_BCEN.masked_fill_(starts_BC[..., None, None], 0.0)


def _scan_chunk(a_BCEN: Tensor, h_BCEN: Tensor, state_BEN: Tensor) -> None:
    """h_t += a_t h_{t-1} in place, from the state before the chunk; a becomes the products from the chunk's start."""
    h_BCEN[:, 0].addcmul_(a_BCEN[:, 0], state_BEN)
    m, C = 1, h_BCEN.shape[1]
    while m < C:
        a, h = a_BCEN.unflatten(1, (-1, 2, m)), h_BCEN.unflatten(1, (-1, 2, m))
        h[:, :, 1].addcmul_(a[:, :, 1], h[:, :, 0, -1:])
        if 2 * m < C:
            a[:, :, 1] *= a[:, :, 0, -1:]
        m *= 2


def _scan_chunk_back(a_BCEN: Tensor, g_BCEN: Tensor) -> None:
    """g_t += a_{t+1} g_{t+1} in place. The last position has been given what comes from behind the chunk."""
    r_BCEN = F.pad(a_BCEN[:, 1:], (0, 0, 0, 0, 0, 1), value=1.0)  # from t to the first step behind t's block
    m, C = 1, g_BCEN.shape[1]
    while m < C:
        r, g = r_BCEN.unflatten(1, (-1, 2, m)), g_BCEN.unflatten(1, (-1, 2, m))
        g[:, :, 0].addcmul_(r[:, :, 0], g[:, :, 1, :1])
        if 2 * m < C:
            r[:, :, 0] *= r[:, :, 1, :1]
        m *= 2


class _Scan(torch.autograd.Function):
    """The scan over whole chunks of `steps` positions."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, state, starts_BL, steps: int) -> tuple[Tensor, Tensor]:
        y, before = torch.empty_like(x), []
        for i in range(0, x.shape[1], steps):
            at = slice(i, i + steps)
            before.append(state)
            a = _decays(dt[:, at], A, None if starts_BL is None else starts_BL[:, at])
            h = (dt[:, at] * x[:, at])[..., None] * B[:, at, None]
            _scan_chunk(a, h, state)
            y[:, at] = (h @ C[:, at, :, None]).squeeze(-1)
            state = h[:, -1].clone()  # so that the chunk can be freed
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, dt, A, B, C, starts_BL, *before)
            ctx.steps = steps
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, dstate: Tensor):
        x, dt, A, B, C, starts_BL, *before = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
        dA, behind = torch.zeros_like(A), dstate
        for n in reversed(range(len(before))):
            at = slice(n * ctx.steps, (n + 1) * ctx.steps)
            u = dt[:, at] * x[:, at]
            a = _decays(dt[:, at], A, None if starts_BL is None else starts_BL[:, at])
            h = u[..., None] * B[:, at, None]
            _scan_chunk(a.clone(), h, before[n])
            dC[:, at] = (dy[:, at, None] @ h).squeeze(2)
            g = dy[:, at, :, None] * C[:, at, None]
            g[:, -1] += behind
            _scan_chunk_back(a, g)
            dB[:, at] = (u[:, :, None] @ g).squeeze(2)
            du = (g @ B[:, at, :, None]).squeeze(-1)
            a *= g
            behind = a[:, 0].clone()
            a[:, 1:] *= h[:, :-1]  # the gradient of dt A
            a[:, 0] *= before[n]
            dA += torch.einsum("ble,blen->en", dt[:, at], a)
            dx[:, at] = du * dt[:, at]
            ddt[:, at] = (a * A).sum(-1).addcmul_(du, x[:, at])
        return dx, ddt, dA, dB, dC, behind, None, None
