"""Import a Transformer into the one backbone, exactly, and write it back."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import initialization as init

from zoo.config import ZooConfig
from zoo.convert.teachers.adapter import TeacherAdapter, adapter_for, wrapped
from zoo.convert.teachers.parity import check_parity
from zoo.convert.teachers.sources import (
    Opened,
    find_tokenizer,
    given_tokenizer,
    open_source,
    place,
    write_sentence_files,
)
from zoo.errors import ConversionError
from zoo.models.backbone import ZooPreTrainedModel
from zoo.models.create import load_folder
from zoo.models.heads import TASK_CLASSES
from zoo.transformers_keys import TOKEN_IDS

_CARRIED = (*TOKEN_IDS, "id2label", "label2id", "problem_type", "use_cache")


@dataclass
class Teacher:
    """A Transformer as a zoo model: `attention` in every layer, float32, evaluation mode.

    revision: the commit on the Hub, where it is known. max_logit_error: the largest difference from the original's
    logits that was measured (in float32, or in float64 where rounding hides it), or None where it was not.
    """

    model: ZooPreTrainedModel
    tokenizer: Any = None
    family: str = ""
    source: str = ""
    revision: str | None = None
    max_logit_error: float | None = None

    @property
    def task(self) -> str:
        """What the model does, such as "causal-lm" or "image-classification"; see `zoo.config.Task`."""
        return self.model.config.task


def load_teacher(source: Any, *, task: str | None = None, tokenizer: Any = None, check: bool = True) -> Teacher:
    """A pretrained Transformer as a zoo model that computes the same.

    Args:
        source: a Hub name (``"org/name"``, ``"org/name@revision"``), a folder of transformers or sentence-transformers,
            a ``.gguf`` file, a transformers or timm model (which is left as it is), or a zoo model (folder or object)
            with attention in every layer.
        task: which of a family's classes to load; by default the one that the config names.
        tokenizer: a tokenizer or its name, in place of the one beside the weights.
        check: compare with the original on random tokens, and refuse what differs by more than 1e-4.

    Raises ConversionError for a source that cannot be read, a model or an option that cannot be expressed exactly, and
    a tokenizer that does not fit.
    """
    if isinstance(source, ZooPreTrainedModel):
        return _from_zoo(source, type(source).__name__, task, tokenizer)
    source = wrapped(source)
    if isinstance(source, PreTrainedModel):
        opened = _opened_object(source, task, tokenizer)
    elif isinstance(source, str | Path):
        where = place(source)
        if where.folder is not None and "gguf_file" not in where.options and _is_zoo(where.folder):
            found = find_tokenizer(where, _vocab_size(where.folder), tokenizer)
            return _from_zoo(load_folder(where.folder), str(source), task, found)
        opened = open_source(where, task=task, tokenizer=tokenizer)
    else:
        raise ConversionError(
            f"a teacher is a name, a folder, a GGUF file or a transformers (or timm) model, not {type(source).__name__}"
        )
    adapter = adapter_for(opened.model.config.model_type)
    model = import_model(opened, adapter)
    error = check_parity(model, opened.model, adapter) if check else None
    model.config.origin["max_logit_error"] = error
    return Teacher(model, opened.tokenizer, adapter.family, opened.name, opened.revision, error)


def _opened_object(original: PreTrainedModel, task: str | None, tokenizer: Any) -> Opened:
    architecture, config = type(original).__name__, original.config
    adapter = adapter_for(config.model_type)
    adapter.check_options(config)
    supported = adapter.architectures_of(config.model_type)
    if architecture not in supported:
        listing = ", ".join(supported)
        raise ConversionError(f"{architecture} is not supported; supported for {config.model_type}: {listing}")
    if task not in (None, supported[architecture]):
        raise ConversionError(f"{architecture} is a model for {supported[architecture]}, not for {task}")
    name = original.name_or_path or architecture
    revision = getattr(config, "_commit_hash", None)
    return Opened(original, name, revision, given_tokenizer(tokenizer, getattr(config, "vocab_size", 0)))


@torch.no_grad()
def import_model(opened: Opened, adapter: TeacherAdapter) -> ZooPreTrainedModel:
    """The zoo model with the original's weights, copied, on its device; `config.origin` says where they come from."""
    original, config = opened.model, opened.model.config
    architecture = type(original).__name__
    task = adapter.architectures[architecture]
    theirs = original.state_dict()
    plain = json.loads(config.to_json_string(use_diff=False))
    plain = {key: value for key, value in plain.items() if key not in ("_name_or_path", "_model_name_or_path")}
    output = original.get_output_embeddings()
    if output is not None and output.weight is not original.get_input_embeddings().weight:
        plain["tie_word_embeddings"] = False  # also where the config says otherwise: the weights are what counts
    tensors = adapter.import_tensors(config, architecture, theirs)
    origin = {
        "family": adapter.family,
        "architecture": architecture,
        "source": opened.name,
        "revision": opened.revision,
        "config": plain,
        "max_logit_error": None,
        "dropped": [key for key in theirs if adapter.is_dropped(key)],
    }
    carried = {name: copy.deepcopy(getattr(config, name, None)) for name in _CARRIED}
    values = {**adapter.fields(config, architecture), **opened.fields, "origin": origin}
    values |= {name: value for name, value in carried.items() if value is not None}
    values["tie_word_embeddings"] = plain.get("tie_word_embeddings", False)
    cls = TASK_CLASSES[task]
    with init.no_init_weights():
        model = cls(ZooConfig(**values))
    _load(model, tensors, architecture)
    model.tie_weights()
    if getattr(original, "generation_config", None) is not None and model.can_generate():
        model.generation_config = copy.deepcopy(original.generation_config)
    return model.to(original.device).eval()


def _load(model: Any, tensors: dict[str, torch.Tensor], what: str) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ConversionError(f"{what}: the weights do not fit: {lines[-1].strip()}") from None


def _is_zoo(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "zoo"
    except (ValueError, AttributeError):
        raise ConversionError(f"{folder / 'config.json'}: not a JSON object") from None


def _vocab_size(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size", 1 << 62)


def _from_zoo(model: ZooPreTrainedModel, name: str, task: str | None, tokenizer: Any) -> Teacher:
    if type(model) not in TASK_CLASSES.values():
        raise ConversionError(f"{name}: a teacher needs a task head, such as ZooForCausalLM")
    refuse_other_mixers(model, "a teacher has attention in every layer")
    if task not in (None, model.config.task):
        raise ConversionError(f"{name}: is a model for {model.config.task}, not for {task}")
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    tokenizer = given_tokenizer(tokenizer, model.config.vocab_size)
    if model.training or any(p.dtype != torch.float32 for p in model.parameters()):
        model = copy.deepcopy(model).float().eval()
    origin = model.config.origin
    return Teacher(
        model, tokenizer, origin.get("family", "zoo"), name, origin.get("revision"), origin.get("max_logit_error")
    )


def refuse_other_mixers(model: Any, law: str) -> None:
    """Raise ConversionError that names the layers whose mixer is not the original's, which is mostly `attention`."""
    origin, names = model.config.origin, model.config.mixer_names
    wanted = ["attention"] * len(names)
    if "architecture" in origin:
        wanted = [layer["mixer"]["name"] for layer in original_layers(origin)]
    pairs = enumerate(zip(names, wanted, strict=True))
    others = [f"{i} ({name})" for i, (name, meant) in pairs if name != meant]
    if others:
        raise ConversionError(f"{law}, but layers {', '.join(others)} have not")


def original_layers(origin: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of an imported model as they were when it came."""
    values = origin["config"]
    adapter = adapter_for(values["model_type"])
    return ZooConfig(**adapter.fields(adapter.config(values), origin["architecture"])).layers


@torch.no_grad()
def write_back(model: ZooPreTrainedModel) -> PreTrainedModel:
    """The model as an instance of the class it was imported from, with the tensors it has now (copied).

    Raises ConversionError where a layer is not `attention` any more, or has other options than the original, and
    where the model was not imported.
    """
    origin = model.config.origin
    if "architecture" not in origin:
        raise ConversionError("this model was not imported from another class, so it cannot be written back")
    architecture = origin["architecture"]
    refuse_other_mixers(model, f"{architecture} has attention in every layer")
    values = dict(origin["config"])
    adapter = adapter_for(values["model_type"])
    config = adapter.config(values)
    wanted = original_layers(origin)
    for i, (has, needs) in enumerate(zip(model.config.layers, wanted, strict=True)):
        if has != needs:
            parts = [part for part in ("mixer", "ffn") if has[part] is not None]
            changed = (f"{part}.{k}" for part in parts for k in has[part] if has[part][k] != needs[part][k])
            key = next(changed, "same_as")
            raise ConversionError(
                f"layer {i}: {key} is not that of the original any more; {architecture} cannot hold it"
            )
    with init.no_init_weights():
        original: Any = adapter.build(architecture, config)
    dtype = next(model.parameters()).dtype
    original.to(dtype)
    original.config.dtype = dtype
    _load(original, adapter.export_tensors(config, architecture, model.state_dict()), architecture)
    original.tie_weights()
    if getattr(model, "generation_config", None) is not None and original.can_generate():
        original.generation_config = copy.deepcopy(model.generation_config)
    return original.to(model.device).eval()


def save_original(
    model: ZooPreTrainedModel, folder: str | Path, tokenizer: Any = None, *, overwrite: bool = False
) -> None:
    """Save a model as a folder of the class it was imported from, with its tokenizer.

    tokenizer: by default `model.tokenizer`, where there is one. Raises ConversionError as `write_back`, and for a
    folder that is not empty unless `overwrite`.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"{folder}: exists already; give overwrite=True to write into it")
    write_back(model).save_pretrained(folder)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model.config.task == "sentence-embedding":
        write_sentence_files(folder, model.config)
