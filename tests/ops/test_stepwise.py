"""The forms of ops in graphs that leave torch: traced at one size, run at others, held against the op itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo import ops
from zoo.ops.block_sparse import block_sparse_attention
from zoo.ops.bonus import bonus_recurrence
from zoo.ops.diagonal import selective_scan
from zoo.ops.dplr import DPLR, dplr_ssm
from zoo.ops.fourier import fourier_mixing
from zoo.ops.generalized_delta import generalized_delta_rule
from zoo.ops.long_conv import long_conv
from zoo.ops.nystrom import nystrom_attention
from zoo.ops.pairs import from_pairs, numbers, to_pairs
from zoo.ops.state_space import diagonal_ssm
from zoo.ops.vector_delta import vector_delta_rule
from zoo.ops.wkv import empty_state, wkv

H, G, K, V, E, N = 4, 2, 6, 5, 6, 4
FREE = torch.export.Dim.AUTO


def qkv(B, L):
    q, k, v = torch.randn(B, H, L, K), torch.randn(B, G, L, K), torch.randn(B, G, L, V)
    return {"q_BHLK": q, "k_BGLK": F.normalize(k, dim=-1), "v_BGLV": v}


def mask(B, L):
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    mask_BL[1:, 1 : L // 2] = False
    return {"mask_BL": mask_BL}


def state(B, extra=0):
    return {"initial": torch.randn(B, G, K, V + extra)}


def constant(size):
    return torch.linspace(0.2, 1.3, size)


def s4d(x_BLE, state_BEN2, mask_BL):
    log_z = numbers(-constant(E * N).view(E, N) / 5, constant(E * N).view(E, N), steps=True)
    c = from_pairs(constant(E * N * 2).view(E, N, 2), steps=True)
    initial = from_pairs(state_BEN2, steps=True)
    y_BLE, after = diagonal_ssm(x_BLE, log_z, c, initial=initial, final=True, mask_BL=mask_BL)
    return y_BLE, to_pairs(after)


def s4(x_BLE, state_BEN2, mask_BL):
    w = numbers(-constant(E * N).view(E, N), constant(E * N).view(E, N) * 3, steps=True)
    p, b = (from_pairs(constant(E * N * 2).view(E, N, 2) / n, steps=True) for n in (2, 1))
    model = DPLR(constant(E) / 5, w, p, b, from_pairs(constant(E * N * 2).view(1, E, N, 2), steps=True))
    initial = from_pairs(state_BEN2, steps=True)
    y_BLE, after = dplr_ssm(x_BLE, model, initial=initial, final=True, mask_BL=mask_BL)
    return y_BLE, to_pairs(after)


def scan(x_BLE, dt_BLE, B_BLN, C_BLN, initial, mask_BL):
    A_EN = -constant(E * N).view(E, N)
    return selective_scan(x_BLE, dt_BLE, A_EN, B_BLN, C_BLN, initial=initial, final=True, mask_BL=mask_BL)


def average(k_BLE, v_BLE, initial, mask_BL):
    return wkv(k_BLE, v_BLE, constant(E), -constant(E), initial=initial, final=True, mask_BL=mask_BL)


def window(**options):
    def op(q_BHLK, k_BGLK, v_BGLV, mask_BL, **kv):
        sink_kv = (kv["sink_k"], kv["sink_v"]) if kv else None
        return ops.window_attention(q_BHLK, k_BGLK, v_BGLV, mask_BS=mask_BL, sink_kv=sink_kv, **options)

    return op


def sparse(q_BHLK, k_BGLK, v_BGLV, mask_BL):
    table_BHNR = torch.arange(40)[:, None].expand(1, H, 40, 1) // 5
    return block_sparse_attention(
        q_BHLK, k_BGLK, v_BGLV, block=2, random_BHNR=table_BHNR, full_up_to=12, mask_BL=mask_BL
    )


def landmarks(q_BHLK, k_BGLK, v_BGLV, length_B):
    return nystrom_attention(q_BHLK, k_BGLK, v_BGLV, landmarks=6, length_B=length_B)


def decay(*sizes):
    return lambda B, L: {"log_decay": -torch.rand(B, G, L, *sizes)}


def rates(B, L):
    return {"removal_BGLK": F.normalize(torch.randn(B, G, L, K), dim=-1), "along_BGLK": torch.rand(B, G, L, K) / 3}


def named(op, name):
    """The op with its decay under the name it has there."""
    return lambda log_decay, **rest: op(**rest, **{name: log_decay}, final=True)


CASES = {
    "recurrence": (lambda **x: ops.linear_recurrence(**x, final=True), lambda B, L: {**qkv(B, L), **state(B)}),
    "recurrence, constant": (
        lambda **x: ops.linear_recurrence(**x, log_decay=-constant(G), final=True),
        lambda B, L: {**qkv(B, L), **state(B)},
    ),
    "recurrence, vector": (
        lambda **x: ops.linear_recurrence(**x, final=True),
        lambda B, L: {**qkv(B, L), **decay(K)(B, L), **state(B), **mask(B, L)},
    ),
    "recurrence, normalised": (
        lambda q_BHLK, k_BGLK, **x: ops.linear_recurrence(q_BHLK.exp(), k_BGLK.exp(), **x, normalize=True, final=True),
        lambda B, L: {**qkv(B, L), **decay()(B, L), "initial": torch.rand(B, G, K, V + 1)},
    ),
    "bonus": (
        named(lambda **x: bonus_recurrence(**x, bonus_GK=constant(G * K).view(G, K)), "log_decay_BGLK"),
        lambda B, L: {**qkv(B, L), **decay(K)(B, L), **state(B), **mask(B, L)},
    ),
    "delta": (
        named(ops.delta_rule, "log_decay_BGL"),
        lambda B, L: {**qkv(B, L), "beta_BGL": torch.rand(B, G, L), **decay()(B, L), **state(B), **mask(B, L)},
    ),
    "delta, no decay, no state": (ops.delta_rule, lambda B, L: {**qkv(B, L), "beta_BGL": torch.rand(B, G, L)}),
    "vector delta": (
        named(vector_delta_rule, "log_decay_BGLK"),
        lambda B, L: {**qkv(B, L), "beta_BGL": torch.rand(B, G, L), **decay(K)(B, L), **state(B)},
    ),
    "generalized delta": (
        named(generalized_delta_rule, "log_decay_BGLK"),
        lambda B, L: {**qkv(B, L), **rates(B, L), **decay(K)(B, L), **state(B), **mask(B, L)},
    ),
    "selective scan": (
        scan,
        lambda B, L: {
            **dict(zip(("x_BLE", "dt_BLE"), torch.rand(2, B, L, E), strict=True)),
            **dict(zip(("B_BLN", "C_BLN"), torch.randn(2, B, L, N), strict=True)),
            "initial": torch.randn(B, E, N),
            **mask(B, L),
        },
    ),
    "wkv": (
        average,
        lambda B, L: {
            **dict(zip(("k_BLE", "v_BLE"), torch.randn(2, B, L, E), strict=True)),
            "initial": empty_state(B, E, "cpu", torch.float32),
            **mask(B, L),
        },
    ),
    "s4d": (s4d, lambda B, L: {"x_BLE": torch.randn(B, L, E), "state_BEN2": torch.randn(B, E, N, 2), **mask(B, L)}),
    "s4": (s4, lambda B, L: {"x_BLE": torch.randn(B, L, E), "state_BEN2": torch.randn(B, E, N, 2), **mask(B, L)}),
    "window": (window(window=3), lambda B, L: {**qkv(B, L), **mask(B, L)}),
    "window, sinks": (window(window=3, sinks=2), lambda B, L: {**qkv(B, L), **mask(B, L)}),
    "window, two-sided": (window(window=3, sinks=2, causal=False), lambda B, L: {**qkv(B, L), **mask(B, L)}),
    "window, given sinks": (
        window(window=3),
        lambda B, L: {
            **qkv(B, L), **mask(B, L), "sink_k": torch.randn(B, G, 2, K), "sink_v": torch.randn(B, G, 2, V),
        },
    ),
    "long convolution": (
        lambda x_BLE, taps_EL, mask_BL: long_conv(x_BLE, taps_EL, mask_BL=mask_BL),
        lambda B, L: {"x_BLE": torch.randn(B, L, E), "taps_EL": torch.randn(E, L), **mask(B, L)},
    ),
    "long convolution, two-sided": (
        lambda x_BLE, taps_EL, back_EL: long_conv(x_BLE, taps_EL, back_EL[:, 1:]),
        lambda B, L: {"x_BLE": torch.randn(B, L, E), **dict.fromkeys(("taps_EL", "back_EL"), torch.randn(E, L))},
    ),
    "fourier": (fourier_mixing, lambda B, L: {"x_BLD": torch.randn(B, L, 6), **mask(B, L)}),
    "fourier, whole": (fourier_mixing, lambda B, L: {"x_BLD": torch.randn(B, L, 6)}),
    "block-sparse": (sparse, lambda B, L: {**qkv(B, L), **mask(B, L)}),
    "landmarks": (landmarks, lambda B, L: {**qkv(B, L), "length_B": torch.arange(B) + L - B + 1}),
}  # fmt: skip


class Wrapped(nn.Module):
    def __init__(self, op, names):
        super().__init__()
        self.op, self.names = op, names

    def forward(self, *tensors):
        for t in tensors[1:]:
            if t.shape[0] != E:
                torch._check(t.shape[0] == tensors[0].shape[0])
        return self.op(**dict(zip(self.names, tensors, strict=True)))


@pytest.mark.parametrize("name", CASES)
def test_a_graph_is_the_op_at_other_sizes(name):
    op, make = CASES[name]
    example, other = make(5, 11), make(7, 13)  # no size of the ops: what is equal in a trace is taken for one
    along = {
        key: {
            0: FREE,
            **{d: FREE for d, (a, b) in enumerate(zip(t.shape, other[key].shape, strict=True)) if d and a != b},
        }
        for key, t in example.items()
    }
    module = Wrapped(op, list(example)).eval()
    program = torch.export.export(module, tuple(example.values()), dynamic_shapes=(tuple(along.values()),))
    graph = program.module(check_guards=False)
    for sizes in ((3, 21), (1, 3)):
        inputs = make(*sizes)
        got, expected = graph(*inputs.values()), module(*inputs.values())
        one, two = ((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected))
        for x, y in zip(one, two, strict=True):
            assert (x is None) == (y is None)
            if y is not None:
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
