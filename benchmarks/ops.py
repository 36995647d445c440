"""CPU time of the recurrent ops, one thread, beside softmax attention and the portable code in transformers.

    python benchmarks/ops.py                                  # a table of forward and forward+backward milliseconds
    python benchmarks/ops.py --lengths 512 2048 --only scalar mamba2 --out benchmarks/results/ops.csv

Times are of one thread's CPU clock, so other programs disturb them less; the candidates take turns, and each keeps its
best of `--repeats` rounds, so that a slow moment of the machine is nobody's. Tensors lie in memory as a mixer makes
them, (B, L, H, K) seen as (B, H, L, K). Peers get the layout they want.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops import delta_rule, linear_recurrence

PEERS = ("sdpa", "mamba2 (transformers)", "gated delta (transformers)")


def build(L: int, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor, list[Tensor]]]]:
    """name -> a function that runs the op once and returns its output and the leaves that want gradients."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def leaf(*shape: int, make: Callable[..., Tensor] = torch.randn) -> Tensor:
        return make(1, L, heads, *shape).to(dtype if shape else torch.float32).requires_grad_()

    q, v, g = leaf(dim), leaf(dim), leaf(dim, make=torch.rand)
    k = F.normalize(leaf(dim).detach(), dim=-1).requires_grad_()
    beta, step = leaf(make=torch.rand), leaf(make=torch.rand)
    constant = torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads))))
    A = -torch.rand(heads)

    def ours(function: Callable, *gates: Tensor, **options) -> tuple[Tensor, list[Tensor]]:
        y, _ = function(*(x.transpose(1, 2) for x in (q, k, v, *gates)), **options)
        return y, [q, k, v, *gates]

    return {
        "no decay": lambda: ours(linear_recurrence),
        "no decay, normalized": lambda: ours(linear_recurrence, normalize=True),
        "constant decay": lambda: ours(linear_recurrence, log_decay=constant),
        "scalar decay": lambda: ours(lambda q, k, v, s: linear_recurrence(q, k, v, -s), step),
        "vector decay": lambda: ours(lambda q, k, v, g: linear_recurrence(q, k, v, -g.float()), g),
        "delta rule": lambda: ours(delta_rule, beta),
        "gated delta rule": lambda: ours(lambda q, k, v, b, s: delta_rule(q, k, v, b, -s), beta, step),
        PEERS[0]: lambda: (
            F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True),
            [q, k, v],
        ),
        PEERS[1]: lambda: (mamba2_chunk_scan(v, step, A, k, q, chunk_size=64), [q, k, v, step]),
        PEERS[2]: lambda: (torch_chunk_gated_delta_rule(q, k, v, -step, beta)[0], [q, k, v, step, beta]),
    }


def forward(run: Callable) -> None:
    with torch.no_grad():
        run()


def forward_backward(run: Callable) -> None:
    y, leaves = run()
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def cpu_milliseconds(work: Callable, run: Callable) -> float:
    start = time.thread_time()
    work(run)
    return (time.thread_time() - start) * 1e3


def measure(L: int, only: list[str], heads: int, dim: int, dtype: torch.dtype, repeats: int) -> list[dict]:
    """One row per op: best CPU milliseconds forward and forward+backward."""
    ops = {n: run for n, run in build(L, heads, dim, dtype).items() if not only or any(o in n for o in only)}
    best: dict[tuple[str, str], float] = {}
    for turn in range(repeats + 1):  # the first round warms up
        for name, run in ops.items():
            for column, work in (("forward_ms", forward), ("forward_backward_ms", forward_backward)):
                taken = cpu_milliseconds(work, run)
                best[name, column] = min(taken, best.get((name, column), taken) if turn > 1 else taken)
    columns = ("forward_ms", "forward_backward_ms")
    return [{"op": name, "length": L, **{c: round(best[name, c], 2) for c in columns}} for name in ops]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--only", nargs="+", default=[], help="parts of op names; all where left out")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64, help="key and value size of a head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write a CSV, such as benchmarks/results/ops.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    print(f"{'op':<28}{'L':>7}{'forward':>11}{'fwd+bwd':>11}   CPU ms, {args.heads} heads x {args.dim}, {args.dtype}")
    for L in args.lengths:
        for row in measure(L, args.only, args.heads, args.dim, getattr(torch, args.dtype), args.repeats):
            print(f"{row['op']:<28}{L:>7}{row['forward_ms']:>11.1f}{row['forward_backward_ms']:>11.1f}", flush=True)
            rows.append({**row, "heads": args.heads, "dim": args.dim, "dtype": args.dtype})
    if args.out:
        machine = {
            "torch": torch.__version__,
            "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *machine])
            writer.writeheader()
            writer.writerows({**row, **machine} for row in rows)


if __name__ == "__main__":
    main()
