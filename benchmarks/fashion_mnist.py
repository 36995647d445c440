"""A small ViT trained on Fashion-MNIST and converted: the recipes fashion-mnist-*, scored, with cards.

    apt-get install dataset-fashion-mnist        # 70,000 images of 28 x 28 pixels (Xiao et al. 2017, arXiv 1708.07747)
    python benchmarks/fashion_mnist.py

The teacher is trained from nothing; every attention layer of it becomes two-sided linear attention, or Mamba-2 scanning
along rows and columns both ways. All are scored on the 10,000 test images, of which no recipe sees one. A run that was
stopped goes on where it was; one that is complete is only scored. Scores and cards go to `--cards`, the table to the
screen and as a CSV to `--out`.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from zoo.train.api import train_recipe
from zoo.train.card import card
from zoo.train.markdown import table
from zoo.train.recipe import load_recipe
from zoo.train.score import Score, score

COMMAND = "python benchmarks/fashion_mnist.py"
STUDENTS = ("linear-attention", "mamba2")
COLUMNS = ("accuracy", "top1", "kl", "images_per_cpu_s", "parameters", "train_tokens", "train_cpu_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion-mnist"))
    parser.add_argument("--cards", type=Path, default=Path("model_cards"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fashion_mnist.csv"))
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for name in ("teacher", *STUDENTS):
        measured = train_and_score(name, args.runs, args.data)
        write_card(args.cards / f"fashion-mnist-{'vit' if name == 'teacher' else name}", measured, args.runs / name)
        lines += rows(name, measured)
        write(args.out, lines)
    print(table(list(lines[0]), [[str(value) for value in line.values()] for line in lines]))


def train_and_score(name: str, runs: Path, data: Path) -> Score:
    """Run a recipe to its end, and score what comes of it."""
    out, teacher = runs / name, runs / "teacher"
    changes = [f"out={out}", f"data={data}/train-images-idx3-ubyte.gz"]
    if name != "teacher":
        changes.append(f"teacher={teacher}")
    if not (out / "train.json").is_file():  # written last
        train_recipe(load_recipe(f"fashion-mnist-{name}", changes))
    recorded = json.loads((out / "train.json").read_text(encoding="utf-8"))
    initial = out / "initial"
    measured = score(
        str(out), teacher=None if name == "teacher" else str(teacher), untrained=initial if initial.is_dir() else None,
        data=data / "t10k-images-idx3-ubyte.gz", train_info=recorded, names={"teacher": "fashion-mnist-vit"}, out=out,
        command=COMMAND,
    )  # fmt: skip
    measured.table()
    return measured


def write_card(folder: Path, measured: Score, run: Path) -> None:
    """The card of the model in the folder of a run, with its score beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score.json").write_text(json.dumps(measured.to_json(), indent=2) + "\n", encoding="utf-8")
    teacher = None if measured.row("teacher") is None else "fashion-mnist-vit"
    card(
        folder, run=run, title=folder.name, location=str(run), teacher=teacher, license="apache-2.0", command=COMMAND,
        data="the training images of Fashion-MNIST, 5 % of them held out", data_license="MIT (Zalando SE)",
        # what the run recorded stands on the card; these were given where a card was written before that
        stages=None, tokens=None, cpu_seconds=None, seed=None,
    )  # fmt: skip


def rows(name: str, measured: Score) -> list[dict[str, Any]]:
    """Lines of the table: a student's with what it was before training; the teacher's stands there already."""
    found = []
    for row in measured.rows:
        if row["role"] != "teacher":
            title = name if row["role"] == "student" else f"{name}, untrained"
            found.append({"model": title, **{key: rounded(row[key]) for key in COLUMNS}})
    return found


def rounded(value: Any) -> Any:
    """A number as it stands in the table; nothing where nothing was measured."""
    return "" if value is None else round(value, 4) if isinstance(value, float) else value


def write(out: Path, lines: list[dict[str, Any]]) -> None:
    """The table so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    partial.replace(out)


if __name__ == "__main__":
    main()
