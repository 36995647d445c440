"""What `zoo.score` starts from: models, one tokenizer that fits them all, and rows of token ids."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.train.measure import position_limit

ROLES = ("teacher", "untrained", "student", "window_baseline")
SCORED_TASKS = ("causal-lm", "masked-lm", "sentence-embedding", "image-classification")


def resolve_model(given: Any, *, teacher: bool = False) -> tuple[Any, Any]:
    """(zoo model, its tokenizer or None) of a model, a folder, a `Teacher` or, for teachers, any source of one."""
    from zoo.models.backbone import ZooPreTrainedModel

    if isinstance(given, ZooPreTrainedModel):
        return given, getattr(given, "tokenizer", None)
    if isinstance(getattr(given, "model", None), ZooPreTrainedModel):
        return given.model, getattr(given, "tokenizer", None)
    if isinstance(given, str | Path) and (not teacher or _is_zoo_folder(given)):
        from zoo.models.create import create_model

        return create_model(str(given)), _folder_tokenizer(Path(given))
    if not teacher:
        raise ConfigError(f"expected a zoo model or a folder of one, got {type(given).__name__}")
    from zoo.convert.teachers import load_teacher

    loaded = load_teacher(given)
    return loaded.model, loaded.tokenizer


def hash_of(given: Any, model: Any) -> str:
    """The hash of the weights that are scored: those in the folder `given`, or of `model` as it would be saved."""
    from zoo.hub.weights import weights_hash
    from zoo.train.folder import save_quietly

    if isinstance(given, str | Path) and Path(given).is_dir():
        return weights_hash(given)
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        save_quietly(model, folder)
        return weights_hash(folder)


def count_mixers(model: Any) -> dict[str, int]:
    """How many layers each mixer has, by name."""
    names = list(model.config.mixer_names)
    return {name: names.count(name) for name in sorted(set(names))}


def model_name(model: Any, role: str) -> str:
    """A short name: the teacher's source, or the mixers of a student with the number of layers they have."""
    source = (model.config.origin or {}).get("source")
    if role == "teacher" and source:
        return Path(str(source)).name or str(source)
    return " + ".join(f"{count} {name}" for name, count in count_mixers(model).items())


def _is_zoo_folder(source: str | Path) -> bool:
    path = Path(source) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type") == "zoo"
    except (OSError, ValueError, AttributeError):
        return False


def _folder_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def check_tasks(models: Mapping[str, Any]) -> None:
    """Raise ConfigError for a task that has no score, or a model with another task than its teacher's."""
    task = models.get("teacher", models["student"]).config.task
    if task not in SCORED_TASKS:
        raise ConfigError(f"there is no score for task {task!r}; there is for {', '.join(SCORED_TASKS)}")
    if "teacher" not in models and task != "image-classification":
        raise ConfigError(f"a {task} is scored against its teacher; name one")
    for role, model in models.items():
        if model.config.task != task:
            raise ConfigError(
                f"the {role} is a {model.config.task!r} model, its teacher {task!r}; they must be the same"
            )


def one_tokenizer(given: Any, found: Sequence[Any]) -> Any:
    """The first tokenizer there is, or None. Raises ConfigError where two of them differ."""
    known = [t for t in (given, *found) if t is not None]
    if not known:
        return None
    first = known[0].get_vocab()
    for other in known[1:]:
        if other is known[0] or (vocabulary := other.get_vocab()) == first:
            continue
        token = min(first.items() ^ vocabulary.items(), key=lambda item: item[1])[0]
        raise ConfigError(
            f"student and teacher have different tokenizers ({len(first)} and {len(vocabulary)} tokens, they differ at "
            f"{token!r}); KL needs the same tokens on both sides"
        )
    return known[0]


def sample_of(
    models: Mapping[str, Any], data: Any, tokenizer: Any, *, tokens: int, length: int, quick: bool, seed: int
) -> tuple[Any, dict[str, Any]]:
    """What is scored, and its description: rows of token ids, texts of any length, or images, by the models' task."""
    from zoo.train.image_score import sample_images

    task = models["student"].config.task
    if task == "image-classification":
        return sample_images(data, models, quick=quick, seed=seed)
    if task == "sentence-embedding":
        limits = [limit for model in models.values() if (limit := position_limit(model)) is not None]
        return sample_sentences(data, tokenizer, tokens=tokens, length=min([length, *limits]), seed=seed)
    return sample_rows(data, tokenizer, tokens=tokens, length=length, seed=seed)


def sample_rows(data: Any, tokenizer: Any, *, tokens: int, length: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """The rows (N, length) that are scored, and their description. Raises DataError where the text is too short.

    Rows come from one document each; where too few documents are that long, from the documents joined.
    """
    from zoo.text import Documents, describe, sample_tokens

    about: dict[str, Any] = {"source": "token ids given by the caller", "rows_from": "caller"}
    if isinstance(data, Tensor):
        if data.dim() != 2 or data.dtype.is_floating_point or not data.numel():
            raise DataError(f"token ids must be integers of shape (rows, length), got {tuple(data.shape)} {data.dtype}")
        rows_NL = data.long().cpu()[: max(1, tokens // data.shape[1])]
    else:
        if tokenizer is None:
            raise DataError("no tokenizer: neither teacher nor student has one; pass tokenizer=..., or ids as a tensor")
        data = data if isinstance(data, str | Path) else Documents(data)  # read twice if need be
        wanted = max(1, tokens // length)
        rows_NL = torch.empty(0, length, dtype=torch.long)
        for whole in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # too few rows: told below
                try:
                    rows_NL = sample_tokens(
                        data, tokenizer, tokens=tokens, length=length, seed=seed, whole_documents=whole
                    )
                except DataError:
                    if not whole:
                        raise
            if len(rows_NL) >= wanted:
                break
        if len(rows_NL) < wanted:
            raise DataError(
                f"{describe(data)}: scoring needs {wanted} rows of {length} tokens ({wanted * length} in all), "
                f"this text has {len(rows_NL)}; give more text, or tokens={len(rows_NL) * length}"
            )
        # The name alone: where it lies on one machine says nothing to the readers of a card.
        name = Path(describe(data)).name
        about = {"source": name, "rows_from": "documents" if whole else "joined text", "seed": seed}
    digest = hashlib.sha256(rows_NL.numpy().astype("<i8").tobytes()).hexdigest()
    return rows_NL, {**about, "rows": len(rows_NL), "length": rows_NL.shape[1], "tokens": rows_NL.numel(),
                     "sha256": digest}  # fmt: skip


def sample_sentences(
    data: Any, tokenizer: Any, *, tokens: int, length: int, seed: int
) -> tuple[list[list[int]], dict[str, Any]]:
    """Rows of token ids, one text each, cut at `length`, about `tokens` in all; and their description.

    A sentence encoder is scored on whole texts of any length: drawn in an order given by `seed`, or the rows of token
    ids as they are. Raises DataError where there are fewer tokens.
    """
    from zoo.text import Documents, describe
    from zoo.train.data import encode_row

    about: dict[str, Any] = {"source": "token ids given by the caller", "rows_from": "caller"}
    if isinstance(data, Tensor):
        rows_NL, _ = sample_rows(data, tokenizer, tokens=tokens, length=length, seed=seed)
        rows = rows_NL.tolist()
    else:
        if tokenizer is None:
            raise DataError("no tokenizer: neither teacher nor student has one; pass tokenizer=..., or ids as a tensor")
        documents = data if isinstance(data, Documents) else Documents(data)
        texts, rows, total = list(documents), [], 0
        random.Random(seed).shuffle(texts)
        for text in texts:
            rows.append(encode_row(tokenizer, text, length))
            total += len(rows[-1])
            if total >= tokens:
                break
        if total < tokens:
            raise DataError(
                f"{describe(data)}: scoring needs {tokens} tokens of text, there are {total} in {len(rows)} texts cut "
                f"at {length}; give more text, or tokens={total}"
            )
        about = {"source": Path(describe(data)).name, "rows_from": "texts", "seed": seed}
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return rows, {**about, "rows": len(rows), "length": length, "tokens": sum(map(len, rows)), "sha256": digest}


def spent_on(info: Mapping[str, Any] | None, role: str) -> dict[str, Any]:
    """`tokens` and `cpu_seconds` of a role in what `score` is given as `train_info`; {} where nothing is known."""
    if info is None:
        return {}
    if not isinstance(info, Mapping) or not set(info) & set(ROLES):
        info = {"student": info}
    given = info.get(role)
    if given is None:
        return {}
    get = given.get if isinstance(given, Mapping) else lambda name: getattr(given, name, None)
    return {name: get(name) for name in ("tokens", "cpu_seconds")}
