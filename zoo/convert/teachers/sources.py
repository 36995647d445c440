"""Where a teacher comes from: a Hub name, a folder, a GGUF file; its tokenizer; a sentence-transformers folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from zoo.config import MAX_LAYERS, ZooConfig
from zoo.convert.teachers.adapter import TeacherAdapter, adapter_for, split_key
from zoo.errors import ConversionError, did_you_mean

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


@dataclass
class Opened:
    """An original model in float32, and what came with it. `fields`: of `ZooConfig`, from beside the weights."""

    model: Any
    name: str
    revision: str | None = None
    tokenizer: Any = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Arguments under which transformers finds a source's files."""

    name: str
    folder: Path | None = None  # None: the Hub
    options: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """The first argument of `from_pretrained`."""
        return self.name if self.folder is None else str(self.folder)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn whatever transformers raises on damaged, missing or unreachable files into one ConversionError."""
    try:
        yield
    except (ConversionError, MemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        if type(error).__name__ == "SafetensorError":
            text = f"the weights are truncated or damaged ({text})"
        raise ConversionError(f"{name}: cannot be read: {text}") from error


def place(source: str | Path) -> Place:
    """Find out what a source names. Raises ConversionError for a path at which there is nothing."""
    text = str(source)
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        _need_gguf(path)
        return Place(text, path.parent, {"gguf_file": path.name})
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; give the file itself: {path / files[0]}" if files else ""
            raise ConversionError(f"{path}: no config.json in it{hint}")
        refuse_outside_files(path)
        return Place(text, path)
    repo, _, revision = text.removeprefix("hf-hub:").partition("@")
    if isinstance(source, Path) or path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or repo[0] in ".~":
        siblings = [p.name for p in path.parent.glob("*") if p.is_dir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, siblings)
        raise ConversionError(f"{text}: no such folder or GGUF file{near if 'mean' in near else ''}")
    return Place(repo, None, {"revision": revision} if revision else {})


def _need_gguf(path: Path) -> None:
    if not path.is_file():
        raise ConversionError(f"{path}: no such file")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConversionError(f"{path}: reading GGUF needs the package gguf: pip install 'zoo[gguf]'") from None


def refuse_outside_files(folder: Path) -> None:
    """Raise ConversionError where an index of weights leads out of the folder."""
    for index in folder.glob("*.index.json"):
        with reading(str(index)):
            files = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        for file in files:
            if Path(file).name != file:
                raise ConversionError(f"{index}: weight file {file!r} lies outside the folder")


def open_source(where: Place, *, task: str | None, tokenizer: Any) -> Opened:
    """Load the original model in float32, and its tokenizer where there is one."""
    name = where.name
    with reading(name):
        raw, _ = PreTrainedConfig.get_config_dict(where.root, **where.options)
    adapter = adapter_for(raw.get("model_type"))
    for key in ("num_hidden_layers", "n_layer", "n_layers"):
        if isinstance(raw.get(key), int) and not 1 <= raw[key] <= MAX_LAYERS:
            raise ConversionError(f"{name}: {key} is {raw[key]}, but must be from 1 to {MAX_LAYERS}")
    with reading(name):
        if "gguf_file" in where.options:  # reading the header takes seconds: once is enough
            config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        else:
            config = AutoConfig.from_pretrained(where.root, **where.options)
    revision = getattr(config, "_commit_hash", None)
    adapter.check_options(config)
    encoder = "sentence-embedding" in adapter.architectures_of(config.model_type).values()
    fields = {}
    if encoder and task in (None, "sentence-embedding"):
        fields = sentence_fields(lambda file: _read_json(where, file), name)
    task = "sentence-embedding" if fields else task
    architecture = choose_architecture(adapter, config.model_type, config.architectures, task, name)
    # Before gigabytes are read: an option or a size that cannot be expressed ends here.
    ZooConfig(**adapter.fields(config, architecture))
    model = load_model(where, adapter, architecture, config)
    if "gguf_file" in where.options:
        _forget_quantization(model)
    tokenizer = find_tokenizer(where, getattr(model.config, "vocab_size", 0), tokenizer)
    return Opened(model, name, revision, tokenizer, fields)


def load_model(where: Place, adapter: TeacherAdapter, architecture: str, config: Any) -> Any:
    """The original in float32. Raises ConversionError where weights and config do not fit each other."""
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True, **where.options}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing tensors tells users less than the errors below
    try:
        with reading(where.name):
            cls: Any = adapter.original_class(architecture)
            model, info = cls.from_pretrained(where.root, config=config, **options)
    finally:
        logging.set_verbosity(verbosity)
    modules = adapter.modules(config, architecture)
    missing = [k for k in info["missing_keys"] if not adapter.is_dropped(k) and k not in adapter.copies]
    surplus = [k for k in info["unexpected_keys"] if "{i}" in (module := split_key(k)[0]) and module in modules]
    wrong = {
        "are not complete for": missing,
        "have other shapes than those of": [str(next(iter(key))) for key in info["mismatched_keys"]],
        "hold more than the config says of": surplus,
    }
    for problem, keys in wrong.items():
        if keys:
            raise ConversionError(f"{where.name}: the weights {problem} {architecture}, first {min(keys)!r}")
    return model


def choose_architecture(
    adapter: TeacherAdapter, model_type: str, named: list[str] | None, task: str | None, name: str
) -> str:
    """The original class to load: the one the config names, or the one of the wanted task."""
    supported = adapter.architectures_of(model_type)
    listing = ", ".join(f"{a} ({t})" for a, t in supported.items())
    if task is not None:
        found = next((a for a, t in supported.items() if t == task), None)
        if found is None:
            raise ConversionError(f"{name}: task {task!r} is not supported for {model_type}; supported: {listing}")
        return found
    if named and named[0] in supported:
        return named[0]
    if not named and len(supported) == 1:
        return next(iter(supported))
    what = f"{named[0]} is not supported" if named else "the config names no class"
    raise ConversionError(f"{name}: {what}; supported for {model_type}: {listing}; choose one by its task")


def _forget_quantization(model: Any) -> None:
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def find_tokenizer(where: Place, vocab_size: int, given: Any = None) -> Any:
    """The tokenizer given, else the one beside the weights, else None where there is none."""
    if given is not None:
        return given_tokenizer(given, vocab_size)
    if where.folder is None:
        there = any(_cached(where, file) for file in _TOKENIZER_FILES)
    else:
        there = "gguf_file" in where.options or any((where.folder / file).is_file() for file in _TOKENIZER_FILES)
    if not there:
        return None
    try:
        with reading(f"{where.name}: tokenizer"):
            found = AutoTokenizer.from_pretrained(where.root, **where.options)
    except ConversionError:
        if where.folder is not None and "gguf_file" in where.options and not _gguf_has_tokenizer(where):
            return None
        raise
    return check_tokenizer(found, vocab_size)


def _gguf_has_tokenizer(where: Place) -> bool:
    from gguf import GGUFReader

    return "tokenizer.ggml.model" in GGUFReader(f"{where.root}/{where.options['gguf_file']}").fields


def given_tokenizer(given: Any, vocab_size: int) -> Any:
    """A tokenizer by object or by name, checked against the vocabulary; None stays None."""
    if isinstance(given, str | Path):
        with reading(f"{given}: tokenizer"):
            given = AutoTokenizer.from_pretrained(given)
    return given if given is None else check_tokenizer(given, vocab_size)


def check_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """The tokenizer itself. Raises ConversionError where its text can get ids that the model has no embedding for.

    Added tokens (of padding, often) may lie beyond, as long as plain text does not get them.
    """
    added = tokenizer.get_added_vocab()
    ids = {token: i for token, i in tokenizer.get_vocab().items() if token not in added}
    ids |= {tokenizer.convert_ids_to_tokens(i): i for i in tokenizer("a").input_ids}
    token, largest = max(ids.items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab_size:
        raise ConversionError(
            f"the tokenizer does not fit: token {token!r} has id {largest}, but the model's vocabulary is {vocab_size}"
        )
    return tokenizer


def _cached(where: Place, file: str) -> str | None:
    """A file of a Hub repository on this machine, or None."""
    from transformers.utils import cached_file

    return cached_file(
        where.root,
        file,
        **where.options,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _read_json(where: Place, file: str) -> Any:
    path = _cached(where, file) if where.folder is None else where.folder / file
    if path is None or not Path(path).is_file():
        return None
    with reading(str(path)):
        return json.loads(Path(path).read_text(encoding="utf-8"))


_POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}  # sentence-transformers' names


def sentence_fields(read: Callable[[str], Any], name: str) -> dict[str, Any]:
    """Pooling and normalisation of a sentence-transformers model; {} where `modules.json` is absent.

    Raises ConversionError for a module or a pooling that our head does not have.
    """
    modules = read("modules.json")
    if not modules:
        return {}
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0]["path"]:
        raise ConversionError(f"{name}: modules.json lists {', '.join(kinds)}; only Transformer, Pooling, Normalize")
    values = read(f"{modules[1]['path']}/config.json") or {}
    on = [key.removeprefix("pooling_mode_") for key, v in values.items() if key.startswith("pooling_mode_") and v]
    pooling = values.get("pooling_mode") or _POOLINGS.get(on[0] if len(on) == 1 else "")
    if pooling == "lasttoken":
        pooling = "last"
    if pooling not in ("mean", "cls", "last"):
        raise ConversionError(f"{name}: pooling {pooling or on!r} is not known; only mean, cls and last")
    return {"pooling": pooling, "normalize_embeddings": "Normalize" in kinds}


def write_sentence_files(folder: Path, config: Any) -> None:
    """`modules.json` and the pooling beside a saved encoder, so that sentence-transformers pools as our head does."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if config.normalize_embeddings:
        kinds.append(("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    pooling: dict[str, Any] = {"word_embedding_dimension": config.hidden_size}
    pooling |= {f"pooling_mode_{theirs}": ours == config.pooling for theirs, ours in _POOLINGS.items()}
    for path, values in (("modules.json", modules), ("1_Pooling/config.json", pooling)):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
