"""Where a recurrent state beats a window of equal bytes: recall of what the window no longer sees.

    python benchmarks/recall.py --cpu-seconds 240 --out benchmarks/results/recall.csv

Three students of SmolLM2-135M without any attention and with equal state bytes are trained on multi-query associative
recall alone (`zoo.train.tasks`: lines of ` key: value` in running text, asked for again at the end), for the same CPU
time each: Gated DeltaNet beside a window of 64 with a mixing gate that sees the token, the same with one gate a head,
and a window that spends all bytes on keys and values. The loss is KL to the teacher over all positions and half the
cross-entropy of the answers. Pairs are drawn anew at every step; the accuracy is measured on others, also at lengths
that training did not have. Chance among the values that were there is 1 / pairs.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.api import convert
from zoo.convert.baseline import window_baseline
from zoo.convert.teachers import Teacher, load_teacher
from zoo.train import tasks
from zoo.train.demo import find_teacher

OPTIONS = {"window": 64, "sinks": 4, "gate_init": -2.0, "branch_norm": False}
NEW = ("mix_", "gain_H", "linear.")
NEW_RATE, COPIED_RATE, WINDOW_RATE = 1e-2, 1e-4, 3e-4
WARM_UP = 10  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-seconds", type=float, default=240.0, help="training of each student")
    parser.add_argument("--length", type=int, default=256, help="of the training sequences")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--examples", type=int, default=16, help="scored sequences at each length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--only", choices=["token gate", "head gate", "window"], nargs="+")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recall.csv"))
    args = parser.parse_args()
    torch.manual_seed(0)
    teacher = load_teacher(find_teacher(), check=False)
    symbols = tasks.symbols(teacher.tokenizer, teacher.model.config.vocab_size)
    for name in args.only or ("token gate", "head gate", "window"):
        student = make(teacher, name)
        steps = train(student, teacher, symbols, args)
        row: dict[str, Any] = {
            "student": name, "steps": steps, "tokens": steps * args.length, "cpu_seconds": args.cpu_seconds,
            "pairs": args.pairs,
        }  # fmt: skip
        for length in args.lengths:
            row[f"mqar {length}"] = round(
                tasks.mqar_accuracy(student, length, symbols=symbols, examples=args.examples, pairs=args.pairs), 3
            )
        print(row, flush=True)
        write(args.out, row)


def make(teacher: Teacher, name: str) -> Any:
    """The student of that name, untrained; all have the same state bytes."""
    gate = "head" if name == "head gate" else "token"
    options = {**OPTIONS, "mix_gate": gate}
    student = convert(teacher, "gated_delta_net+window", keep="none", mixer_options=options, calibrate=False)
    return window_baseline(teacher.model, student) if name == "window" else student


def train(student: Any, teacher: Teacher, symbols: tasks.Symbols, args: argparse.Namespace) -> int:
    """Train until the CPU time is used up, the rate going down with it; the number of steps."""
    new, copied = [], []
    for name, p in student.named_parameters():
        p.requires_grad_(".mixer." in name)
        if p.requires_grad:
            (new if any(part in name for part in NEW) else copied).append(p)
    groups = [{"params": copied, "peak": COPIED_RATE if new else WINDOW_RATE}]
    groups += [{"params": new, "peak": NEW_RATE}] if new else []
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    student.train()
    start, steps = time.process_time(), 0
    while (used := time.process_time() - start) < args.cpu_seconds:
        ids_1L, labels_1L = tasks.mqar_batch(1, args.length, symbols=symbols, pairs=args.pairs, seed=generator)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, (steps + 1) / WARM_UP) * max(0.05, 1 - used / args.cpu_seconds)
        optimizer.zero_grad()
        loss(student, teacher.model, ids_1L, labels_1L).backward()
        torch.nn.utils.clip_grad_norm_([*new, *copied], 1.0)
        optimizer.step()
        steps += 1
    return steps


def loss(student: Any, teacher: Any, ids_1L: Tensor, labels_1L: Tensor) -> Tensor:
    """KL(teacher || student) over all positions and half the cross-entropy of the answers."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            wanted = teacher(ids_1L, use_cache=False).logits[0, :-1]
        found = student(ids_1L, use_cache=False).logits[0, :-1]
    wanted, found = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    return kl + 0.5 * torch.nn.functional.nll_loss(found, labels_1L[0, 1:], ignore_index=tasks.IGNORED)


def write(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the table; a row of the same student is replaced."""
    rows = []
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            rows = [old for old in csv.DictReader(file) if old["student"] != row["student"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows([*rows, row])


if __name__ == "__main__":
    main()
