"""CPU time of whole layers beside those of other packages: forward, and forward with the gradients of all inputs.

    python benchmarks/layers.py                                    # the table at 512 and 2048 steps
    python benchmarks/layers.py --lengths 8192 --only retention mamba2 --out benchmarks/results/layers.csv

One layer, width 512, batch 1, float32. Times are of one thread's CPU clock, so other programs disturb them less. All
layers of a length take turns, round after round, after one round to warm up; what is printed are medians. Every layer
of ours is compared with the fastest peer of its family; the families, and which shapes are equal, are in
benchmarks/README.md. Peers that are not installed are named and left out (`make bench` installs them).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it tells of every CUDA kernel that it misses
warnings.simplefilter("ignore", FutureWarning)  # a peer's torch.jit
PEERS = Path(__file__).parent.parent / ".venv" / "peers"
if PEERS.is_dir():
    sys.path.append(str(PEERS))  # behind everything else: nothing is shadowed

import torch  # noqa: E402
from peer_layers import CASES, WIDTH, Case, Layer, Made  # noqa: E402
from torch import Tensor  # noqa: E402

COLUMNS = ("forward_ms", "forward_backward_ms")


def build(cases: list[Case], length: int) -> dict[str, Made]:
    """name -> (module, function of x); peers that cannot be had are named and left out."""
    made = {}
    for case in cases:
        if length > case.longest:
            print(f"left out: {case.name} at {length}, which would need too much memory", file=sys.stderr)
            continue
        try:
            made[case.name] = case.make(length)
        except ImportError as error:
            if not case.peer:
                raise
            print(f"left out: {case.name} ({error}); pip install --no-deps -r benchmarks/peers.txt", file=sys.stderr)
    return made


def forward(layer: Layer, x: Tensor, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: Layer, x: Tensor, inputs: list[Tensor]) -> None:
    y = layer(x)
    torch.autograd.grad(y, inputs, torch.ones_like(y))


def measure(made: dict[str, Made], length: int, rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Median milliseconds per layer; the layers take turns, and every round begins with another one."""
    x = torch.randn(1, length, WIDTH, requires_grad=True)
    times: dict[tuple[str, str], list[float]] = {}
    names = list(made)
    for turn in range(rounds + 1):
        for i in range(len(names)):
            module, layer = made[names[(i + turn) % len(names)]]
            inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
            for column, work in zip(COLUMNS, (forward, forward_backward), strict=True):
                start = clock()
                work(layer, x, inputs)
                taken = 1e3 * (clock() - start)
                if turn:  # the first round warms up
                    times.setdefault((names[(i + turn) % len(names)], column), []).append(taken)
    return {name: {column: statistics.median(times[name, column]) for column in COLUMNS} for name in names}


def table(cases: list[Case], made: dict[str, Made], found: dict[str, dict[str, float]], length: int) -> list[dict]:
    """One row per layer; ours with the fastest peer of the family, and the ratio to it, for either column."""
    rows = []
    for case in (c for c in cases if c.name in made):
        parameters = sum(p.numel() for p in made[case.name][0].parameters())
        row = {"layer": case.name, "peer": case.peer, "length": length, "parameters": parameters}
        row |= {column: round(found[case.name][column], 2) for column in COLUMNS}
        rivals = [c.name for c in cases if c.name in made and c.peer and case.families[0] in c.families]
        for column in COLUMNS:
            best = min(rivals, key=lambda name: found[name][column], default=None) if not case.peer else None
            ratio = None if best is None else round(found[case.name][column] / found[best][column], 3)
            row |= {column.replace("ms", "peer"): best, column.replace("ms", "ratio"): ratio}
        rows.append(row)
    return rows


def show(rows: list[dict]) -> None:
    head = f"{'layer':<35}{'L':>6}{'parameters':>12}{'forward':>10}{'ratio':>7}{'fwd+bwd':>10}{'ratio':>7}"
    print(f"\n{head}  best peer (fwd+bwd); CPU ms")
    for r in rows:
        ratios = ["" if r[c] is None else f"{r[c]:.2f}" for c in ("forward_ratio", "forward_backward_ratio")]
        times = f"{r['forward_ms']:>10.1f}{ratios[0]:>7}{r['forward_backward_ms']:>10.1f}{ratios[1]:>7}"
        name, best = ("  " if r["peer"] else "") + r["layer"], r["forward_backward_peer"] or ""
        print(f"{name:<35}{r['length']:>6}{r['parameters']:>12,}{times}  {best}", flush=True)


def surroundings(threads: int) -> dict[str, str | int]:
    """Machine, versions and date, as they go into every row of the CSV."""

    def version(package: str) -> str:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} absent"

    packages = ("torch", "transformers", "torchscale", "yet-another-retnet", "mambapy")
    return {
        "width": WIDTH,
        "threads": threads,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "versions": "; ".join([f"python {platform.python_version()}", *map(version, packages)]),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="8192 takes minutes")
    parser.add_argument("--rounds", type=int, default=7, help="at most 3 from 8192 steps on")
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of ours; their peers come along")
    parser.add_argument("--out", type=Path, help="also write a CSV, such as benchmarks/results/layers.csv")
    parser.add_argument("--threads", type=int, default=1, help="wall-clock times where more than one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    wanted = [c for c in CASES if not c.peer and (not args.only or any(part in c.name for part in args.only))]
    families = {family for c in wanted for family in c.families}
    cases = [c for c in CASES if c in wanted or (c.peer and families & set(c.families))]
    rows = []
    for length in args.lengths:
        made, rounds = build(cases, length), args.rounds if length < 8192 else min(args.rounds, 3)
        rows += (new := table(cases, made, measure(made, length, rounds, clock), length))
        show(new)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("w", newline="") as file:
                extra = surroundings(args.threads)
                writer = csv.DictWriter(file, [*rows[0], *extra])
                writer.writeheader()
                writer.writerows({**row, **extra} for row in rows)


if __name__ == "__main__":
    main()
