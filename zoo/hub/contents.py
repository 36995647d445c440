"""Which files of a folder are a model's: what a push sends and a pull takes. What is not listed stays where it is."""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import CheckpointError, did_you_mean
from zoo.hub.weights import INDEX, weight_files

CODE = "modeling_zoo.py"
CONFIG = ("config.json", "generation_config.json", "preprocessor_config.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
SENTENCE = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json")
CARD = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
MEASURED = ("score.json", "card.json", "conversion.json", ".eval_results/*.yaml")
WEIGHTS = ("model.safetensors", INDEX, "model-*.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")

TO_LOAD = (*CONFIG, *TOKENIZER, *SENTENCE)
BESIDE_WEIGHTS = (*TO_LOAD, *CARD, *MEASURED)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path inside a folder is one of the listed ones; a wildcard does not reach into folders."""
    return any(fnmatch.fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns)


@dataclass(frozen=True)
class Contents:
    """What a push would send: path in the repository -> file here. `stays`: what else is in the folder."""

    files: dict[str, Path]
    stays: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files.values())


def collect(folder: str | Path, card: str | Path | None = None) -> Contents:
    """The files of a saved model that belong on the Hub.

    Args:
        folder: weights as safetensors, config, tokenizer, and, unless `card` is given, the card and what was measured.
        card: a folder with README.md, score.json, plots and `.eval_results`; or a Markdown file, whose folder it is.

    Raises CheckpointError where the folder has no complete model, is an unfinished training run, or where a file is a
    link that leads out of it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        near = [p.name for p in folder.parent.glob("*") if p.is_dir()] if folder.parent.is_dir() else []
        raise CheckpointError(f"{folder}: no such folder{did_you_mean(folder.name, near)}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in it; push the folder of a saved model")
    if (folder / "run.json").is_file() and not (folder / "train.json").is_file():
        raise CheckpointError(f"{folder}: the training run in it is not finished; go on with it, then push")
    weights = {file.name: file for file in weight_files(folder)}
    if (folder / INDEX).is_file() and "model.safetensors" not in weights:
        weights[INDEX] = folder / INDEX
    beside, stays = _listed(folder, BESIDE_WEIGHTS)
    if card is not None:
        theirs, extra = _card_files(Path(card))
        beside = {name: file for name, file in beside.items() if not matches(name, (*CARD, *MEASURED))}
        beside, stays = {**beside, **theirs}, stays + extra
    readme = beside.get("README.md")
    pictures = {} if readme is None else _pictures(readme)
    files = {**beside, **pictures, **weights}
    for name, file in files.items():
        root = readme.parent if card is not None and readme is not None and readme.parent in file.parents else folder
        if not file.resolve().is_relative_to(root.resolve()):
            raise CheckpointError(f"{file}: is a link that leads out of the folder; put the file itself there")
        if name.endswith(".json"):
            _must_be_json(file)
    return Contents(dict(sorted(files.items())), sorted(name for name in stays if name not in files))


def _listed(folder: Path, patterns: tuple[str, ...]) -> tuple[dict[str, Path], list[str]]:
    """The files below a folder that the patterns name, and the names of the others; a folder of others is one name."""
    found, others = {}, set()
    deep = {pattern.split("/")[0] for pattern in patterns if "/" in pattern}
    for path in sorted(folder.iterdir()):
        inside = sorted(path.iterdir()) if path.is_dir() and path.name in deep else [path]
        for file in inside:
            name = file.relative_to(folder).as_posix()
            if file.is_file() and matches(name, patterns):
                found[name] = file
            else:
                others.add(f"{name}/" if file.is_dir() else name)
    return found, sorted(others)


def _card_files(card: Path) -> tuple[dict[str, Path], list[str]]:
    folder = card if card.is_dir() else card.parent
    if card.is_file() and card.suffix == ".md":
        return {**_listed(folder, MEASURED)[0], "README.md": card}, []
    if not (card / "README.md").is_file():
        raise CheckpointError(f"{card}: no card: give a Markdown file, or a folder with README.md in it")
    return _listed(card, (*CARD, *MEASURED))


def _pictures(readme: Path) -> dict[str, Path]:
    """The pictures beside a card that it shows."""
    shown = re.findall(r"!\[[^\]]*\]\(([\w.-]+\.(?:png|svg|jpg))\)", readme.read_text(encoding="utf-8"))
    return {name: readme.parent / name for name in shown if (readme.parent / name).is_file()}


def _must_be_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
