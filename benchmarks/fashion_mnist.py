"""A small ViT trained on Fashion-MNIST, then converted: accuracy of teacher, untrained and distilled students.

    apt-get install dataset-fashion-mnist        # 70,000 images of 28 x 28 pixels (Xiao et al. 2017, arXiv 1708.07747)
    python benchmarks/fashion_mnist.py --data /usr/share/datasets/fashion-mnist

The teacher reads patches of 4 x 4 pixels behind a class token. Every attention layer of it becomes two-sided linear
attention (Hedgehog maps) or Mamba-2 scanning along rows and columns both ways; students are calibrated on training
images, then distilled: relative error of every layer's mixer and KL of the answers. The last 5,000 training images are
for looking at; the 10,000 test images are counted once, at the end. Training runs under bf16
autocast where the machine has it. Times are CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import ZooConfig
from zoo.convert.api import convert
from zoo.convert.layerwise import fast_autocast
from zoo.models.heads import ZooForImageClassification
from zoo.train.losses import relative_error
from zoo.train.measure import machine
from zoo.train.stages import converted_layers, watching

LABELS = 10
HELD_OUT = 5000
STUDENTS: dict[str, dict[str, Any]] = {
    "linear attention, two-sided": {"mixer": "linear_attention"},
    "Mamba-2, cross scan": {"mixer": "scan", "mixer_options": {"inner": {"name": "mamba2"}}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--teacher-seconds", type=float, default=420.0, help="CPU seconds")
    parser.add_argument("--student-seconds", type=float, default=300.0, help="CPU seconds, each student")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fashion_mnist.csv"))
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = read(args.data, "train")
    train = images[:-HELD_OUT], labels[:-HELD_OUT]
    held_out, test = (images[-HELD_OUT:], labels[-HELD_OUT:]), read(args.data, "t10k")
    teacher = ZooForImageClassification(vit())
    steps = run(teacher, train, args.teacher_seconds, args.batch_size, lr=2e-3, loss=cross_entropy)
    rows = [row("teacher", teacher, teacher, test, args.teacher_seconds, steps)]
    print(f"teacher on held-out training images: {accuracy(teacher, *held_out):.4f}", flush=True)
    for name, how in STUDENTS.items():
        student = convert(teacher, keep="none", data=train[0][:512], **how)
        rows.append(row(f"{name}, untrained", student, teacher, test))
        loss = Distillation(teacher, student)
        steps = run(student, train, args.student_seconds, args.batch_size, lr=1e-3, loss=loss)
        rows.append(row(f"{name}, distilled", student, teacher, test, args.student_seconds, steps))
        write(args.out, rows)
    print(machine())


def read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) with mean 0 and deviation 1 over the training set, and labels (N,)."""
    found = []
    for file, header in ((f"{part}-images-idx3-ubyte.gz", 16), (f"{part}-labels-idx1-ubyte.gz", 8)):
        if not (folder / file).is_file():
            sys.exit(f"{folder / file}: no such file; apt-get install dataset-fashion-mnist, or give --data")
        with gzip.open(folder / file) as opened:
            found.append(torch.frombuffer(bytearray(opened.read()[header:]), dtype=torch.uint8))
    images = found[0].view(-1, 1, 28, 28).float() / 255
    return (images - 0.2860) / 0.3530, found[1].long()


def vit() -> ZooConfig:
    """96 wide, 4 layers, 3 heads, 50 tokens: 0.45 million parameters."""
    mixer = {"name": "attention", "num_heads": 3, "head_dim": 32, "causal": False, "qkv_bias": True, "out_bias": True}
    layer = {"mixer": mixer, "ffn": {"name": "mlp", "hidden_size": 384}}
    return ZooConfig(
        task="image-classification", image={"image_size": 28, "patch_size": 4, "channels": 1}, num_labels=LABELS,
        hidden_size=96, norm="layer_norm", pooling="cls", layers=[layer] * 4,
    )  # fmt: skip


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless, in a new order each time, every other image mirrored."""
    while True:
        for index in torch.randperm(len(images)).split(size):
            x = images[index]
            x = torch.where((torch.rand(len(x)) < 0.5)[:, None, None, None], x.flip(3), x)
            yield x, labels[index]


def cross_entropy(model: Any, x: Tensor, labels: Tensor) -> Tensor:
    """What the teacher learns from."""
    return model(pixel_values=x, labels=labels).loss


class Distillation:
    """KL to the teacher's answers plus the relative error of every converted mixer's output."""

    def __init__(self, teacher: Any, student: Any) -> None:
        self.teacher, self.layers = teacher.eval(), converted_layers(student, teacher)

    def __call__(self, student: Any, x: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), watching(self.teacher.model, self.layers) as theirs:
            wanted = self.teacher(pixel_values=x).logits
        with watching(student.model, self.layers) as ours:
            logits = student(pixel_values=x).logits
        kl = F.kl_div(
            logits.float().log_softmax(-1), wanted.float().log_softmax(-1), log_target=True, reduction="batchmean"
        )
        names = [f"mixer_out.{i}" for i in self.layers]
        return kl + torch.stack([relative_error(ours[n], theirs[n]) for n in names]).mean()


def run(model: Any, data: tuple[Tensor, Tensor], seconds: float, size: int, *, lr: float, loss: Any) -> int:
    """Train for so many CPU seconds, the rate warming up over 2 % and falling to zero; how many steps it were."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    start = time.process_time()
    for step, (x, labels) in zip(itertools.count(), batches(*data, size)):
        share = (time.process_time() - start) / seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, share / 0.02, 1 - share)
        with fast_autocast(model):
            value = loss(model, x, labels)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"{100 * share:5.1f} %  step {step}  loss {value.item():.4f}", file=sys.stderr, flush=True)
    model.eval()
    return step


@torch.no_grad()
def answers(model: Any, images: Tensor) -> Tensor:
    """The label that a model gives each image."""
    model.eval()
    return torch.cat([model(pixel_values=x).logits.argmax(-1) for x in images.split(500)])


def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    """Share of right labels."""
    return float((answers(model, images) == labels).float().mean())


def row(name: str, model: Any, teacher: Any, test: tuple[Tensor, Tensor], seconds: float = 0, steps: int = 0) -> dict:
    """One line of the table, printed as well."""
    mine, theirs = answers(model, test[0]), answers(teacher, test[0])
    found = {
        "model": name, "accuracy": round(float((mine == test[1]).float().mean()), 4),
        "agreement": round(float((mine == theirs).float().mean()), 4),
        "parameters": sum(p.numel() for p in model.parameters()), "cpu_seconds": seconds, "steps": steps,
    }  # fmt: skip
    print(found, flush=True)
    return found


def write(out: Path, rows: list[dict]) -> None:
    """The table so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with open(partial, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    os.replace(partial, out)


if __name__ == "__main__":
    main()
