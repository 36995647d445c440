"""How the cost of a layer grows: log CPU time over log length, forward + backward, from 1024 to 8192 steps.

    python benchmarks/slopes.py --out benchmarks/results/slopes.csv

1 is linear, 2 quadratic. The layers are those of `layers.py` that promise less than quadratic cost; one thread.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import torch
from layers import build, measure
from peer_layers import CASES

LENGTHS = (1024, 8192)
QUADRATIC = ("attention", "mla", "linformer", "fnet", "moe (8 experts, 2 a token)")  # or nothing to promise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/slopes.csv"))
    parser.add_argument("--only", nargs="+", default=[], help="parts of names")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [case for case in CASES if not case.peer and case.name not in QUADRATIC]
    cases = [case for case in cases if not args.only or any(part in case.name for part in args.only)]
    times = {}
    for length in LENGTHS:
        times[length] = measure(build(cases, length), length, 3 if length < 4096 else 1, time.thread_time)
    with args.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["layer", *(f"ms at {length}" for length in LENGTHS), "slope"])
        for case in cases:
            first, last = (times[length][case.name]["forward_backward_ms"] for length in LENGTHS)
            slope = math.log(last / first) / math.log(LENGTHS[1] / LENGTHS[0])
            table.writerow([case.name, round(first, 1), round(last, 1), round(slope, 2)])
            print(f"{case.name:<28}{first:>9.0f}{last:>9.0f}{slope:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
