"""`import_checkpoint` and `export_model`, and the guess which layout a checkpoint has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.config import MAX_LAYERS, ZooConfig
from zoo.convert.layouts.family import Family, OtherKindError, difference, families, open_any
from zoo.convert.layouts.files import Checkpoint
from zoo.convert.layouts.loading import load_entries, written_shapes
from zoo.errors import CheckpointError, ConfigError, ExportError, ZooError, unknown_name
from zoo.models.backbone import ZooPreTrainedModel

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass
class Imported:
    """A model that came in, its tokenizer where there is one, and the layout and family it was read as."""

    model: ZooPreTrainedModel
    tokenizer: Any
    layout: str
    family: str


def list_layouts() -> dict[str, dict[str, str]]:
    """The layouts, each with its families and whether they can be read, or read and written ("in", "in and out")."""
    found: dict[str, dict[str, str]] = {}
    for family in families():
        ways = [way for way, there in (("in", family.reads), ("out", family.writes)) if there]
        found.setdefault(family.layout, {})[family.name] = " and ".join(ways)
    return found


def import_checkpoint(
    path: str | Path,
    *,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    tokenizer: Any = None,
) -> Imported:
    """Somebody's checkpoint as a zoo model, in eval mode.

    Args:
        path: a folder, or a file of weights.
        layout: one of `list_layouts()`; None: guessed from the config and the names of the tensors.
        dtype: of the weights; None: as stored. Parameters that must stay float32 do so.
        device_map: a device, a mapping, or "auto" (see accelerate); None: the CPU.
        tokenizer: a tokenizer or its name, in place of the one in the folder.

    Raises CheckpointError for what is damaged, incomplete or of no known layout; UnknownNameError for a layout that
    does not exist.
    """
    path = Path(path)
    if layout is not None and layout not in list_layouts():
        raise unknown_name("layout", layout, list_layouts())
    checkpoint = open_any(path, layout)
    family = _family_of(checkpoint, layout)
    config = _config_of(family, checkpoint)
    model = load_entries(family, config, checkpoint, dtype=dtype, device_map=device_map)
    folder = path if path.is_dir() else path.parent
    if (folder / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    if tokenizer is None and path.suffix == ".gguf":
        found = _vocabulary_inside(path, checkpoint)
    else:
        found = _tokenizer(folder, config.vocab_size, tokenizer)
    return Imported(model, found, family.layout, family.name)


def guess_layout(path: str | Path) -> tuple[str, str]:
    """Layout and family of a checkpoint. Raises CheckpointError where it is of none, or could be of several."""
    family = _family_of(open_any(Path(path), None), None)
    return family.layout, family.name


def _family_of(checkpoint: Checkpoint, layout: str | None) -> Family:
    found = [family for family in families(layout) if _recognises(family, checkpoint)]
    if len(found) == 1:
        return found[0]
    config = checkpoint.config
    kind = next((f"{key} {config[key]!r}" for key in ("model_type", "architectures") if config.get(key)), "")
    what = f"{kind or 'no config beside it'}, first tensor {min(checkpoint.shapes, default='none')!r}"
    if not found:
        known = ", ".join(sorted({family.name for family in families(layout)}))
        of = f"of the layout {layout!r}" if layout else "of any layout"
        raise CheckpointError(f"{checkpoint.path}: no family {of} knows it ({what}); families: {known}")
    names = " or ".join(f"--layout {family.layout} ({family.name})" for family in found)
    raise CheckpointError(f"{checkpoint.path}: could be of several layouts ({what}); say which: {names}")


def _recognises(family: Family, checkpoint: Checkpoint) -> bool:
    try:
        return family.recognises(checkpoint)
    except (KeyError, TypeError, ValueError, AttributeError):  # a config of another kind, or a broken one
        return False


def _config_of(family: Family, checkpoint: Checkpoint) -> ZooConfig:
    where = f"{checkpoint.path}: config"
    origin = {"layout": family.layout, "family": family.name, "config": _kept(checkpoint.config)}
    for key in ("num_hidden_layers", "n_layer"):  # before anything is made of so many
        if isinstance(count := checkpoint.config.get(key), int) and count > MAX_LAYERS:
            raise CheckpointError(f"{where}: {key} is {count}; a model has at most {MAX_LAYERS} layers")
    try:
        fields = family.fields(checkpoint)
        return ZooConfig(**{**fields, "origin": {**origin, **fields.get("origin", {})}})
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except ZooError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{where}: {error.args[0]} is missing") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        raise CheckpointError(f"{where}: a value is not what {family.name} needs: {error}") from None


def _kept(value: Any) -> Any:
    """A config without its dtypes, which transformers would read wherever they stand, also below `origin`."""
    if isinstance(value, dict):
        return {key: _kept(v) for key, v in value.items() if key not in ("dtype", "torch_dtype")}
    return [_kept(v) for v in value] if isinstance(value, list) else value


def _tokenizer(folder: Path, vocab_size: int, given: Any) -> Any:
    from zoo.convert.teachers.sources import given_tokenizer, reading

    if given is None and any((folder / file).is_file() for file in _TOKENIZER_FILES):
        given = folder
    with reading(f"{folder}: tokenizer"):
        return given_tokenizer(given, vocab_size)


def _vocabulary_inside(path: Path, checkpoint: Checkpoint) -> Any:
    """The tokenizer in a GGUF file; None where there is none, or none that transformers can make."""
    if checkpoint.config.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception:  # whatever a vocabulary that transformers does not know leads it into
        return None


def export_model(
    model: ZooPreTrainedModel, layout: str, out: str | Path, *, tokenizer: Any = None, overwrite: bool = False
) -> Family:
    """Write a model in somebody's layout, with the tokenizer where there is one; returns the family that took it.

    Raises ExportError where the layout cannot express the model, with the reason and the layouts that can, and where
    the folder is not empty and `overwrite` is not set; UnknownNameError for a layout that does not exist.
    """
    if layout not in list_layouts():
        raise unknown_name("layout", layout, list_layouts())
    out = Path(out)
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: exists already; give overwrite=True (--overwrite) to write into it")
    family, values = family_for(model.config, layout)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    family.write(model, out, values, tokenizer)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    if model.can_generate() and model.generation_config is not None and (out / "config.json").is_file():
        model.generation_config.save_pretrained(out)
    return family


def family_for(config: ZooConfig, layout: str) -> tuple[Family, dict[str, Any]]:
    """The family of a layout that can express a config, with their config. Raises ExportError; see `export_model`."""
    far: list[str] = []
    reasons, used = [], set(config.mixer_names)
    for family in (f for f in families(layout) if used <= set(f.mixers)):
        try:
            return family, expressed(family, config)
        except OtherKindError as error:
            far.append(f"{family.name}: {error}")
        except ExportError as error:
            reasons.append(f"{family.name}: {error}")
    others = sorted({f.layout for f in families() if f.layout != layout and _can(f, config)})
    origin = f"{config.origin.get('family')}: "
    reasons.sort(key=lambda r: (not r.startswith(origin), "no class to write back to" in r))  # the nearest miss first
    near = reasons or far or [f"nothing there has layers of {', '.join(sorted(used))}"]
    hint = f"; layouts that can: {', '.join(others)}" if others else "; no other layout can either, keep it as it is"
    raise ExportError(f"layout {layout!r} cannot express this model ({'; '.join(near[:5])}){hint}")


def expressed(family: Family, config: ZooConfig) -> dict[str, Any]:
    """Their config of one of ours; raises ExportError where reading it back would not give the same model."""
    if not family.writes:
        raise ExportError("can be read, not written")
    if missing := sorted(set(config.mixer_names) - set(family.mixers)):
        raise ExportError(f"has no {missing[0]}")
    values = family.config(config)
    if not family.reads:
        return values
    written = Checkpoint(Path(family.name), values, written_shapes(family, config))
    again = ZooConfig(**{**family.fields(written), "origin": {}})
    lost = difference(family.written(config), again, family.inert)
    if lost is not None:
        raise ExportError(lost)
    return values


def _can(family: Family, config: ZooConfig) -> bool:
    try:
        expressed(family, config)
    except (ExportError, CheckpointError, ConfigError):
        return False
    return True
