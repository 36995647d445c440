"""The published weights that model names lead to, `NAME.TAG`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError, did_you_mean
from zoo.hub.pull import OF_THE_HUB, origin, snapshot
from zoo.registry import Pretrained

if TYPE_CHECKING:
    from zoo.convert.layouts import Imported

OPTIONS = ("dtype", "device_map", "revision", *OF_THE_HUB)


def load_pretrained(source: Pretrained, **options: Any) -> Any:
    """The model that somebody published, in evaluation mode, with `model.tokenizer` (None where there is none).

    Args and errors are those of `import_published`.
    """
    found = import_published(source, **options)
    found.model.tokenizer = found.tokenizer
    return found.model


def import_published(source: Pretrained, **options: Any) -> Imported:
    """The checkpoint of a tag, read in its layout.

    Only the files that are needed are downloaded. The config's `origin` records layout, repository and full sha.

    Args:
        source: a tag of the registry.
        options: dtype and device_map; revision, in place of the tag's; token, endpoint, cache_dir, local_files_only.

    Raises:
        HubError: what the Hub lacks or refuses. CheckpointError: weights that are damaged or not of that layout.
        ConfigError: another option.
    """
    from zoo.convert.layouts import import_checkpoint

    for key in options:
        if key not in OPTIONS:
            raise ConfigError(f"{key}: published weights have their own config{did_you_mean(key, OPTIONS)}")
    hub = {key: options.pop(key) for key in OF_THE_HUB if key in options}
    files = [] if source.file is None else [source.file]
    taken = snapshot(source.repo, options.pop("revision", source.revision), files=files, **hub)
    tokenizer = None
    if source.tokenizer is not None:
        tokenizer = snapshot(source.tokenizer, weights=False, **hub).folder
    place = taken.folder if source.file is None else taken.folder / source.file
    found = import_checkpoint(place, layout=source.layout, tokenizer=tokenizer, **options)
    found.model.config.origin = {**found.model.config.origin, **origin(taken)}
    found.model.config.name_or_path = source.repo
    return found
