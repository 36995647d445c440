"""RWKV-4's weighted average of values (Peng et al. 2023, arXiv 2305.13048), channel by channel.

    y_t = (sum_{s < t} e^{k_s - (t-1-s) w} v_s + e^{u + k_t} v_t) / (sum_{s < t} e^{k_s - (t-1-s) w} + e^{u + k_t})

with a rate w >= 0 and a bonus u per channel. Numerator and denominator are two first-order recurrences

    h_t = e^{p_{t-1} - w - p_t} h_{t-1} + e^{k_t - p_t} (v_t, 1)

which are divided by e^{p_t}, the largest of their terms, so that nothing overflows. The result does not depend on p,
so its gradient is that with p held constant, and p need only be nearly the maximum. Hence all of p comes at once, as a
cumulative maximum of k_s + s w (in float64, for s w may be large), and h by joining blocks of 1, 2, 4, ... steps as in
`zoo.ops.diagonal`. The loop over time is `wkv_reference`.

Shapes: B batch, L positions, E channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import ConfigError
from zoo.ops import fla
from zoo.ops.backends import dispatch, no_autocast, register_backend
from zoo.ops.chunks import run_starts
from zoo.ops.diagonal import _chunk_length, _scan_chunk, _scan_chunk_back
from zoo.ops.stepwise import leaves_torch, repeat_step

OP = "wkv"
EMPTY = -1e30  # the exponent of a state that holds nothing


def wkv(
    k_BLE: Tensor,
    v_BLE: Tensor,
    rate_E: Tensor,
    bonus_E: Tensor,
    *,
    initial: Tensor | None = None,
    final: bool = False,
    mask_BL: Tensor | None = None,
    segments_BL: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The average above for every channel and position.

    Args:
        k_BLE, v_BLE: keys, which may have any size, and values. rate_E: w >= 0. bonus_E: u.
        initial: the state (B, 3, E) to start from: numerator and denominator divided by e^p, and p. `empty_state` is
            that before the first token. final: also return the state behind the last step.
        mask_BL: bool, True for real tokens. A masked position is an identity step whatever it holds; its output is 0.
        segments_BL: contiguous runs of one id are independent sequences. Not with a state.
        chunk: steps that are joined at a time, a power of two. backend: a name from `zoo.backends()`.

    Returns:
        y_BLE in the dtype of v, and the final state or None. Sums are kept in float32 (float64 for float64).

    Raises:
        ConfigError: shapes that do not fit together, or a state beside packed segments.
    """
    B, L, E = k_BLE.shape
    wanted = {"v": (v_BLE, (B, L, E)), "rate": (rate_E, (E,)), "bonus": (bonus_E, (E,))}
    if initial is not None:
        wanted["initial"] = (initial, (B, 3, E))
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ConfigError(f"{OP}: {name} must be {shape}, got {tuple(tensor.shape)}")
    if segments_BL is not None and (final or initial is not None):
        raise ConfigError(f"{OP}: packed segments have no state to carry")
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise ConfigError(f"{OP}: chunk must be a power of two, got {chunk}")
    dtype = torch.promote_types(torch.float32, torch.promote_types(k_BLE.dtype, v_BLE.dtype))
    with no_autocast(k_BLE):
        k, v, rate, bonus = (t.to(dtype) for t in (k_BLE, v_BLE, rate_E, bonus_E))
        if mask_BL is not None:
            k, v = (t.masked_fill(~mask_BL[..., None], 0.0) for t in (k, v))
        state = empty_state(B, E, k.device, dtype) if initial is None else initial.to(dtype)
        if L == 1 and backend is None:
            y, state = _step(k[:, 0], v[:, 0], rate, bonus, state, mask_BL)
        else:
            y, state = dispatch(OP, backend, k, v, rate, bonus, state, mask_BL, segments_BL, chunk)
    return y.to(v_BLE.dtype), state if final else None


def empty_state(batch_size: int, channels: int, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
    """The state (B, 3, E) before the first token."""
    state_B3E = torch.zeros(batch_size, 3, channels, device=device, dtype=dtype)
    state_B3E[:, 2] = EMPTY
    return state_B3E


def _step(k_BE, v_BE, rate, bonus, state_B3E, mask_B1):
    numerator, denominator, p = state_B3E.unbind(1)
    y_BE = _read(numerator, denominator, p, k_BE + bonus, v_BE)
    p, before = torch.maximum(p - rate, k_BE).detach(), p
    fade, write = (before - rate - p).exp(), (k_BE - p).exp()
    last = torch.stack([fade * numerator + write * v_BE, fade * denominator + write, p], 1)
    if mask_B1 is not None:
        y_BE, last = y_BE.masked_fill(~mask_B1, 0.0), torch.where(mask_B1[..., None], last, state_B3E)
    return y_BE[:, None], last


def _read(numerator, denominator, p, own, v):
    """The average of a state whose terms are divided by e^p and one more value with the exponent `own`."""
    top = torch.maximum(p, own).detach()
    past, present = (p - top).exp(), (own - top).exp()
    return (past * numerator + present * v) / (past * denominator + present)


def _kernel_serves(k, v, rate, bonus, state_B3E, mask_BL, segments_BL, chunk) -> bool:
    return k.dtype == torch.float32 and mask_BL is None and segments_BL is None


@register_backend(OP, "fla", **fla.OPTIONS, usable=_kernel_serves)
def _kernel(k, v, rate, bonus, state_B3E, mask_BL, segments_BL, chunk):
    """flash-linear-attention: fused_recurrent_rwkv4, a loop over time for every channel."""
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    log_rate = rate.clamp(min=torch.finfo(rate.dtype).tiny).log()  # it takes the exponent
    y, state = fused_recurrent_rwkv4(log_rate, bonus, k, v, state_B3E[:, :, None])
    return y, state[:, :, 0]


@register_backend(OP, "scan", usable=lambda *x: leaves_torch() and x[6] is None)
def _by_steps(k, v, rate, bonus, state_B3E, mask_BL, segments_BL, chunk: int | None):
    """Step by step, for graphs that leave torch."""

    def step(state_B3E, k_B1E, v_B1E, *rest):
        *mask_B1, rate, bonus = rest
        return _step(k_B1E[:, 0], v_B1E[:, 0], rate, bonus, state_B3E, mask_B1[0] if mask_B1 else None)

    return repeat_step(step, state_B3E, (k, v) if mask_BL is None else (k, v, mask_BL), 1, (rate, bonus))


@register_backend(OP, "torch")
def _torch(k, v, rate, bonus, state_B3E, mask_BL, segments_BL, chunk: int | None):
    hidden_BL1 = None if mask_BL is None else ~mask_BL[..., None]
    starts_BL1 = None if segments_BL is None else run_starts(segments_BL, mask_BL)[..., None]
    first_B1E = state_B3E[:, 2:].detach()
    p_BLE = _exponents(k, rate, hidden_BL1, starts_BL1, first_B1E)
    before_BLE = torch.cat([first_B1E, p_BLE[:, :-1]], 1)
    fade_BLE, write_BLE = before_BLE - rate - p_BLE, k - p_BLE
    if hidden_BL1 is not None:
        fade_BLE, write_BLE = fade_BLE.masked_fill(hidden_BL1, 0.0), write_BLE.masked_fill(hidden_BL1, -torch.inf)
    if starts_BL1 is not None:
        fade_BLE, before_BLE = fade_BLE.masked_fill(starts_BL1, -torch.inf), before_BLE.masked_fill(starts_BL1, EMPTY)
    write_BLE = write_BLE.exp()
    h_BLEN = _recur(fade_BLE.exp(), torch.stack([write_BLE * v, write_BLE], -1), state_B3E[:, :2].mT, chunk)
    earlier_BLEN = torch.cat([state_B3E[:, None, :2].mT, h_BLEN[:, :-1]], 1)
    y_BLE = _read(earlier_BLEN[..., 0], earlier_BLEN[..., 1], before_BLE, k + bonus, v)
    if hidden_BL1 is not None:
        y_BLE = y_BLE.masked_fill(hidden_BL1, 0.0)
    return y_BLE, torch.cat([h_BLEN[:, -1].mT, p_BLE[:, -1:]], 1)


@torch.no_grad()
def _exponents(k_BLE, rate_E, hidden_BL1, starts_BL1, first_B1E):
    """p_t, nearly max_s (k_s - (t - s) w) over the tokens s <= t of the sequence and what the state brings."""
    k, rate = k_BLE.double(), rate_E.double()
    real_BL1 = torch.ones_like(k[..., :1]) if hidden_BL1 is None else (~hidden_BL1).double()
    line_BLE = real_BL1.cumsum(1) * rate
    if starts_BL1 is not None:  # lifted so far that every run exceeds the runs before it
        level_BLE = k + line_BLE
        line_BLE = line_BLE + starts_BL1.cumsum(1) * (level_BLE.max() - level_BLE.min() + 1)
    level_BLE = k + line_BLE
    if hidden_BL1 is not None:
        level_BLE = level_BLE.masked_fill(hidden_BL1, -torch.inf)
    p_BLE = torch.maximum(level_BLE.cummax(1).values, first_B1E.double()) - line_BLE
    return p_BLE.to(k_BLE.dtype)


def _recur(f_BLE: Tensor, x_BLEN: Tensor, state_BEN: Tensor, chunk: int | None) -> Tensor:
    """h_t = f_t h_{t-1} + x_t, all of h (B, L, E, N)."""
    L, steps = x_BLEN.shape[1], chunk or _chunk_length(f_BLE, state_BEN[0])
    while steps >= 2 * L:
        steps //= 2
    if fill := -L % steps:
        f_BLE, x_BLEN = F.pad(f_BLE, (0, 0, 0, fill), value=1.0), F.pad(x_BLEN, (0, 0, 0, 0, 0, fill))
    return _Recurrence.apply(f_BLE, x_BLEN, state_BEN, steps)[:, :L]


class _Recurrence(torch.autograd.Function):
    """`_recur` over whole chunks of `steps` positions."""

    @staticmethod
    def forward(ctx, f_BLE, x_BLEN, state_BEN, steps: int):
        h_BLEN, before = x_BLEN.clone(memory_format=torch.contiguous_format), state_BEN
        for i in range(0, h_BLEN.shape[1], steps):
            here = h_BLEN[:, i : i + steps]
            _scan_chunk(f_BLE[:, i : i + steps, :, None].clone(), here, before)
            before = here[:, -1]
        ctx.save_for_backward(f_BLE, h_BLEN, state_BEN)
        ctx.steps = steps
        return h_BLEN

    @staticmethod
    @once_differentiable
    def backward(ctx, dh_BLEN):
        f_BLE, h_BLEN, state_BEN = ctx.saved_tensors
        g_BLEN, behind = dh_BLEN.clone(memory_format=torch.contiguous_format), None
        for i in range(h_BLEN.shape[1] - ctx.steps, -1, -ctx.steps):
            f, g = f_BLE[:, i : i + ctx.steps, :, None], g_BLEN[:, i : i + ctx.steps]
            if behind is not None:
                g[:, -1] += behind
            _scan_chunk_back(f, g)
            behind = f[:, 0] * g[:, 0]
        earlier_BLEN = torch.cat([state_BEN[:, None], h_BLEN[:, :-1]], 1)
        return (g_BLEN * earlier_BLEN).sum(-1), g_BLEN, behind, None
