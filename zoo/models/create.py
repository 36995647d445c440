"""Create a model by name, from a folder, or from the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.config import ZooConfig
from zoo.errors import CheckpointError, ConfigError, did_you_mean
from zoo.models.backbone import ZooModel, ZooPreTrainedModel
from zoo.models.heads import TASK_CLASSES
from zoo.registry import model_config, model_entry

# What an `auto_map` may say: the classes of this package, which a push with its code writes into one file.
CODE_CLASSES = {f"modeling_zoo.{cls.__name__}" for cls in (ZooConfig, ZooModel, *TASK_CLASSES.values())}


def create_model(name: str, *, pretrained: bool = False, **overrides: Any) -> ZooPreTrainedModel:
    """A model by registered name (fresh weights), by folder, or by `hf-hub:org/name@revision` (stored weights).

    Args:
        name: ``"retnet-tiny"``, ``"name.tag"`` with `pretrained`, ``"path/to/folder"`` or ``"hf-hub:org/name"``.
        pretrained: load the published weights of a registered name: of its first tag, or of ``name.tag``.
        overrides: top-level fields of the config, such as ``vocab_size=4096``; for stored weights, arguments of
            `from_pretrained` such as ``dtype``, and from the Hub also ``token``, ``endpoint``, ``cache_dir`` and
            ``local_files_only``.

    Raises:
        UnknownNameError: a misspelt name, with the nearest ones. ConfigError: a wrong override.
        CheckpointError: a folder that holds no complete model. HubError: what the Hub lacks or refuses.
    """
    if name.startswith("hf-hub:"):
        from zoo.hub.pull import load

        return load(name, **overrides)
    if Path(name).is_dir() or "/" in name:
        return load_folder(name, **overrides)
    entry = model_entry(name)
    if not pretrained:
        config = model_config(name, **overrides)
        return TASK_CLASSES[config.task](config)
    tag = name[len(entry.name) + 1 :] or next(iter(entry.tags), "")
    if tag not in entry.tags:
        raise ConfigError(f"{entry.name} has no published weights yet; create it with pretrained=False and train it")
    from zoo.hub.pretrained import load_pretrained

    return load_pretrained(entry.tags[tag], **overrides)


def load_folder(folder: str | Path, **options: Any) -> ZooPreTrainedModel:
    """Load a saved model. Raises CheckpointError where the folder is missing or not a complete zoo model."""
    _check_weights(Path(folder), read_config(folder))
    return _load(folder, **options)


def read_config(folder: str | Path) -> ZooConfig:
    """The config of a saved model. Raises CheckpointError where the folder is missing or not that of a zoo model."""
    folder = Path(folder)
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.glob("*") if p.is_dir()] if folder.parent.is_dir() else []
        raise CheckpointError(f"{folder}: no such folder{_on_the_hub(folder) or did_you_mean(folder.name, siblings)}")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json in it; a saved model has config.json and model.safetensors")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("model_type") != "zoo":
        kind = values.get("model_type") if isinstance(values, dict) else None
        raise CheckpointError(
            f"{path}: model_type is {kind!r}, not 'zoo'; `zoo convert {folder}` makes a zoo model of it"
        )
    _refuse_code(values, path)
    return ZooConfig.from_pretrained(folder)


def _on_the_hub(folder: Path) -> str:
    """What to do about a folder that is not there, and has the name of a repository."""
    name = str(folder)
    if name.startswith("hf-hub:"):
        return f" here; take it first: zoo pull {name.removeprefix('hf-hub:')} --out DIR"
    if len(folder.parts) == 2 and not folder.parent.is_dir() and not folder.is_absolute():
        return f"; a model of the Hub is written hf-hub:{name}"
    return ""


def _refuse_code(values: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError where a config names code other than what `zoo.push(..., with_code=True)` puts there."""
    named = values.get("auto_map") or {}
    foreign = [v for v in named.values() if v not in CODE_CLASSES] if isinstance(named, dict) else [named]
    if foreign:
        raise CheckpointError(
            f"{path}: asks for code of its own (auto_map: {foreign[0]!r:.80}), which is never run here; if you trust "
            "its author, load it with transformers and trust_remote_code=True"
        )


def _check_weights(folder: Path, config: ZooConfig) -> None:
    """Raise CheckpointError unless the files hold just what the config asks for; before memory is given to anything."""
    from zoo.hub.weights import weight_shapes
    from zoo.models.costs import empty_model

    found = weight_shapes(folder)
    try:
        model = empty_model(config)
    except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder / 'config.json'}: no model can be made of it: {said:.300}") from error
    expected, tied = model.state_dict(), model.all_tied_weights_keys
    wrong = dict.fromkeys(found.keys() - expected.keys(), "is unknown to the config")
    for name, wanted in expected.items():
        if name not in found:
            wrong |= {} if name in tied else {name: "is not in the files"}
            continue
        kind, shape = found[name]
        if shape != tuple(wanted.shape):
            wrong[name] = f"has shape {list(shape)}, by the config {list(wanted.shape)}"
        elif wanted.is_floating_point() != ("F" in kind):
            wrong[name] = f"is of type {kind}, by the config {str(wanted.dtype).removeprefix('torch.')}"
    if wrong:
        name = min(wrong)
        raise CheckpointError(
            f"{folder}: weights do not fit the config, first {name!r} of {len(wrong)}, which {wrong[name]}"
        )


def _load(source: str | Path, **options: Any) -> ZooPreTrainedModel:
    config = ZooConfig.from_pretrained(source, **{k: options[k] for k in ("revision",) if k in options})
    cls: Any = TASK_CLASSES[config.task]  # transformers does not say that two things can come back
    try:
        # Never a pickle: loading one runs whatever its author wrote. Wrong sizes are named below, with the config.
        fixed: dict[str, Any] = {"config": config, "use_safetensors": True, "ignore_mismatched_sizes": True}
        model, info = cls.from_pretrained(source, **options, **fixed, output_loading_info=True)
    except (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        # Also what transformers makes of a generation config that is none.
        said = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{source}: cannot be loaded: {said:.300}") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise CheckpointError(f"{source}: the weights are truncated or damaged: {error}") from None
        raise
    sizes = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    wrong = sorted(sizes) + sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise CheckpointError(f"{source}: weights do not fit the config, first {wrong[0]!r} of {len(wrong)}")
    return model
