"""Milliseconds of one decoding step: a converted student beside its teacher, as zoo runs it and as transformers does.

    python benchmarks/decode.py runs/demo/student --teacher runs/demo/teacher --out benchmarks/results/decode.csv

Every model starts from a state of `--lengths` random tokens and writes; steps are taken in turns and the median of each
model counts. `--batch 1 4` are the sequences written at once: more of them share one reading of the weights, but not
the reading of keys and values, which is where a smaller state pays. The last column is teacher (in zoo) / model.
A second table, `matvec.csv` beside it, has the product that a step is made of: every matrix of the student times a few
rows, by torch's linear map and by `zoo.linear`, beside the time of merely adding up as many bytes.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zoo.convert.baseline import window_baseline
from zoo.convert.teachers import load_teacher, write_back
from zoo.linear import FEW_ROWS, Linear
from zoo.models.create import load_folder
from zoo.train.measure import machine

PIECE = 512
WARM_UP = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--teacher", required=True, help="what the student was converted from")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.csv"))
    args = parser.parse_args()
    teacher, student = load_teacher(args.teacher), load_folder(args.student).eval()
    models = {
        "teacher in transformers": write_back(teacher.model).eval(),
        "teacher in zoo": teacher.model.eval(),
        "student": student,
        "window of equal bytes": window_baseline(teacher.model, student).eval(),
    }
    rows, products = [], []
    with torch.inference_mode():
        for threads in args.threads:
            torch.set_num_threads(threads)
            products += [{"threads": threads, **row} for row in matvec_times(student)]
            for batch in args.batch:
                caches = dict.fromkeys(models)
                for length in sorted(args.lengths):
                    times = step_times(models, caches, length, batch, args.steps)
                    for name, ms in times.items():
                        ratio = round(times["teacher in zoo"] / ms, 2)
                        rows.append(
                            {"threads": threads, "batch": batch, "length": length, "model": name,
                             "ms": round(ms, 1), "teacher / model": ratio}
                        )  # fmt: skip
                        print(*rows[-1].values(), sep="\t", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(args.out, rows)
    write(args.out.with_name("matvec.csv"), products)
    print(machine())


def step_times(models: dict[str, Any], caches: dict[str, Any], length: int, batch: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a step of each model behind `length` tokens, which `caches` are extended to."""
    ids_BL = torch.randint(1000, 40000, (batch, length), generator=torch.Generator().manual_seed(0))
    for name, model in models.items():
        start = 0 if caches[name] is None else caches[name].get_seq_length()
        for i in range(start, length, PIECE):
            piece = ids_BL[:, i : min(i + PIECE, length)]
            caches[name] = model(piece, past_key_values=caches[name], use_cache=True, logits_to_keep=1).past_key_values
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(WARM_UP + steps):
        for name, model in models.items():
            began = time.perf_counter()
            model(ids_BL[:, :1], past_key_values=caches[name], use_cache=True, logits_to_keep=1)
            taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(ms[WARM_UP:]) for name, ms in taken.items()}


def matvec_times(model: nn.Module) -> list[dict[str, Any]]:
    """Milliseconds of all linear maps of a model applied to 1 to FEW_ROWS rows, and of reading their bytes."""
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    numbers = sum(m.weight.numel() for m in layers)
    bytes_ = torch.ones(numbers)
    out = []
    for rows in range(1, FEW_ROWS + 1):
        inputs = {m.in_features: torch.randn(rows, m.in_features) for m in layers}
        ways: dict[str, Callable[[], Any]] = {
            "sum of as many numbers": bytes_.sum,
            "torch": lambda inputs=inputs: [F.linear(inputs[m.in_features], m.weight) for m in layers],
            "zoo.linear": lambda inputs=inputs: [m(inputs[m.in_features]) for m in layers],
        }
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(8):
            for way, work in ways.items():
                began = time.perf_counter()
                work()
                taken[way].append(1e3 * (time.perf_counter() - began))
        for way, ms in taken.items():
            best = statistics.median(ms[2:])
            rate = round(4 * numbers / best / 1e6, 1)
            out.append({"rows": rows, "way": way, "ms": round(best, 1), "GB/s": rate})
            print("matvec", *out[-1].values(), sep="\t", flush=True)
    return out


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
