"""KL against the number of layers that keep attention, untrained and distilled, on the demo's teacher and text.

    python benchmarks/tradeoff.py --cpu-seconds 90 --out benchmarks/results

The layers are ranked once by the one-layer scan; every student is distilled for the same CPU time. The scan and the
training see the training documents only, KL is measured on held-out ones.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import torch

from zoo.convert.api import convert
from zoo.convert.surgery import replace_mixers
from zoo.convert.teachers import load_teacher
from zoo.text import sample_tokens, split_documents
from zoo.train.api import distill
from zoo.train.demo import CURVE, HELD_OUT, LENGTH, MIXER, MIXER_OPTIONS, find_teacher, find_text, rates
from zoo.train.evaluation import compare
from zoo.train.plots import tradeoff_plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-seconds", type=float, default=90.0, help="training of each student")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    parser.add_argument("--scan-tokens", type=int, default=2048, help="training tokens that the scan looks at")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()

    train, held_out = split_documents(find_text(), HELD_OUT)
    teacher = load_teacher(find_teacher())
    scanned = sample_tokens(train, teacher.tokenizer, tokens=args.scan_tokens, length=LENGTH, whole_documents=True)
    student = convert(teacher, MIXER, keep="sensitivity:1", mixer_options=MIXER_OPTIONS, data=scanned, calibrate=False)
    scan = [row.scan for row in student.report.layers]
    order = sorted(range(len(scan)), key=lambda i: -scan[i])
    options = next(block.mixer.config for block in student.model.layers if block.mixer.name != "attention")
    rows = sample_tokens(held_out, teacher.tokenizer, tokens=args.tokens, length=LENGTH, seed=1, whole_documents=True)
    stage = {
        "kind": "distill", "budget": {"cpu_seconds": args.cpu_seconds}, "length": LENGTH, "batch_size": 2,
        "packing": "joined",
    }  # fmt: skip
    points = []
    for keep in CURVE:
        model = replace_mixers(teacher.model, dict.fromkeys(order[keep:], options))
        measure(points, teacher, model, rows, keep, trained=False)
        if keep < len(scan):
            stages = [{**stage, "train": rates(model)}]
            distill(model, teacher, data=train, stages=stages, tokenizer=teacher.tokenizer, progress=False)
        measure(points, teacher, model, rows, keep, trained=True)
        write(points, args.out)


def measure(points: list[dict], teacher, model, rows: torch.Tensor, keep: int, *, trained: bool) -> None:
    """Add one point, and print it."""
    found = compare(teacher.model, {"student": model}, rows)["student"]
    point = {"keep": keep, "trained": trained, "kl": found.kl, "top1": found.top1, "label": MIXER}
    points.append(point)
    print(point, flush=True)


def write(points: list[dict], out: Path) -> None:
    """The table and the picture so far."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "tradeoff.csv.partial"
    with open(partial, "w", newline="") as file:
        table = csv.DictWriter(file, ["keep", "trained", "kl", "top1", "label"])
        table.writeheader()
        table.writerows(points)
    os.replace(partial, out / "tradeoff.csv")
    tradeoff_plot(points, out / "tradeoff.png", layers=30)


if __name__ == "__main__":
    main()
