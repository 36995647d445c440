"""What is lost when each token meets only some of the neurons of SmolLM2's MLPs (MoEfication), and what comes back.

    python benchmarks/moefication.py --cpu-seconds 150 --out benchmarks/results

The MLPs of the demo's teacher are split into equal parts, of which a router takes some for each token (`zoo.convert`
with `ffn: moefy`, fitted on training documents). KL and top-1 agreement with the teacher are of held-out documents,
before and after a short distillation in which the experts train. `mass` is the share of what all neurons add, sum of
|h_j| |d_j|, that the chosen parts hold, the mean over tokens and layers; `mass_best` that of the best possible choice.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.experts import moefy
from zoo.convert.teachers import load_teacher
from zoo.text import sample_tokens, split_documents
from zoo.train.api import distill
from zoo.train.demo import HELD_OUT, LENGTH, find_teacher, find_text
from zoo.train.evaluation import compare

POINTS = [(16, 14), (16, 12), (16, 8)]  # parts, and how many a token meets
DISTILLED = [(16, 12), (16, 8)]
RATE = 2e-4
FIELDS = ["parts", "chosen", "active", "trained", "kl", "top1", "mass", "mass_best"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-seconds", type=float, default=150.0, help="training of each distilled student")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens")
    parser.add_argument("--fit-tokens", type=int, default=4096, help="training tokens that the routers are fitted on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()

    train, held_out = split_documents(find_text(), HELD_OUT)
    teacher = load_teacher(find_teacher())
    sampled = {"length": LENGTH, "whole_documents": True}
    fitted = sample_tokens(train, teacher.tokenizer, tokens=args.fit_tokens, **sampled)
    rows = sample_tokens(held_out, teacher.tokenizer, tokens=args.tokens, seed=1, **sampled)
    stage = {
        "kind": "distill", "budget": {"cpu_seconds": args.cpu_seconds}, "length": LENGTH, "batch_size": 2,
        "packing": "joined", "train": {"*.ffn.experts.*": RATE},
    }  # fmt: skip
    points: list[dict[str, Any]] = []
    for parts, chosen in POINTS:
        student = moefy(teacher, fitted, num_experts=parts, top_k=chosen)
        mass = masses(teacher.model, student, rows[:2])
        add(points, teacher.model, student, rows, (parts, chosen), mass, trained=False)
        write(points, args.out)
        if (parts, chosen) in DISTILLED and args.cpu_seconds:
            distill(student, teacher, data=train, stages=[stage], tokenizer=teacher.tokenizer, progress=False)
            add(points, teacher.model, student, rows, (parts, chosen), mass, trained=True)
            write(points, args.out)


@torch.no_grad()
def masses(teacher: Any, student: Any, rows_NL: Tensor) -> tuple[float, float]:
    """The share of the mass in the parts that the routers choose, and in the heaviest ones; on the teacher's inputs."""
    shares: list[tuple[float, float]] = []

    def watch(moe: Any) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            x_TD, e = args[0].flatten(0, 1), moe.experts
            mass_TE = torch.stack(
                [
                    (e.act(x_TD @ e.gate_EIO[i]) * (x_TD @ e.up_EIO[i])).abs() @ e.down_EIO[i].norm(dim=1)
                    for i in range(moe.config.num_experts)
                ],
                1,
            )
            chosen_TK = moe.logits(args[0]).flatten(0, 1).topk(moe.config.top_k, -1).indices
            best_TK = mass_TE.topk(moe.config.top_k, -1).values
            held = [mass_TE.gather(1, chosen_TK).sum(1), best_TK.sum(1)]
            shares.append(tuple(float((part / mass_TE.sum(1)).mean()) for part in held))

        return hook

    handles = [
        block.ffn.register_forward_pre_hook(watch(other.ffn))
        for block, other in zip(teacher.model.layers, student.model.layers, strict=True)
    ]
    teacher.model(rows_NL, use_cache=False)
    for handle in handles:
        handle.remove()
    return sum(a for a, _ in shares) / len(shares), sum(b for _, b in shares) / len(shares)


def add(
    points: list[dict[str, Any]], teacher: Any, student: Any, rows_NL: Tensor, kind: tuple[int, int],
    mass: tuple[float, float], *, trained: bool,
) -> None:  # fmt: skip
    """Measure one point, and print it. Masses are of the split before training."""
    found = compare(teacher, {"student": student}, rows_NL, dtype=torch.bfloat16)["student"]
    values = (*kind, kind[1] / kind[0], trained, found.kl, found.top1, *(("", "") if trained else mass))
    points.append(dict(zip(FIELDS, values, strict=True)))
    print(points[-1], flush=True)


def write(points: list[dict[str, Any]], out: Path) -> None:
    """The table so far."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "moefication.csv.partial"
    with open(partial, "w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(points)
    os.replace(partial, out / "moefication.csv")


if __name__ == "__main__":
    main()
