"""From the Hub: a snapshot in the cache, a folder of one's own, a model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import CheckpointError, HubError
from zoo.hub.client import check_file_names, check_repo, check_revision, client, explained, parse_reference
from zoo.hub.contents import BESIDE_WEIGHTS, CODE, PICKLES, WEIGHTS, matches
from zoo.hub.weights import INDEX, SINGLE, tensor_files, weight_files

PICTURES = ("*.png", "*.svg", "*.jpg")
OF_THE_HUB = ("token", "endpoint", "cache_dir", "local_files_only")  # options that are not of `from_pretrained`


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit in the cache of huggingface_hub. `revision` is the full sha."""

    folder: Path
    repo: str
    revision: str
    files: tuple[str, ...]


def snapshot(
    repo: str,
    revision: str | None = None,
    *,
    files: Sequence[str] = (),
    weights: bool = True,
    card: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Snapshot:
    """Bring a model's files into the cache: weights, config and tokenizer; nothing where they are there already.

    Weights come as safetensors; where a repository has none, its `pytorch_model*.bin`. A branch or a tag is asked for
    each time; a full commit sha that is in the cache costs no request. HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME act as
    everywhere.

    Args:
        repo: ``org/name``. revision: a branch, a tag or a commit, by default ``main``.
        files: exactly these files instead of the weights (``RWKV-4.pth``); config and tokenizer come too.
        weights: False: only config and tokenizer. card: the card's pictures too.
        token, endpoint, cache_dir, local_files_only: as in huggingface_hub.

    Raises:
        HubError: a repository, revision or file that is not there, no access, no connection, odd names.
    """
    check_repo(repo)
    if revision is not None:
        check_revision(revision, repo)
    check_file_names(list(files), repo)
    api = client(endpoint, token)
    place = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    with explained(repo, revision, api=api):
        sha = api.resolve_revision(repo, revision=revision, **place).resolved
    beside = (*BESIDE_WEIGHTS, CODE, *(PICTURES if card else ()))
    usual = WEIGHTS if weights else ()
    found = _fetch(api, repo, sha, (*beside, *(files or usual)), place)
    there = _names(found)
    if weights and not files and not any(matches(name, WEIGHTS) for name in there):
        found = _fetch(api, repo, sha, (*beside, *PICKLES), place)
        there = _names(found)
    if missing := [name for name in files if name not in there]:
        raise HubError(f"{repo}: has no file {missing[0]!r} at {sha}")
    return Snapshot(found, repo, sha, there)


def _fetch(api: Any, repo: str, sha: str, patterns: tuple[str, ...], place: dict[str, Any]) -> Path:
    """The folder of a commit in the cache, once all its files that the patterns name are there."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import (
        CachedRepoTreeNotFoundError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    wanted: dict[str, Any] = {"revision": sha, "cache_dir": place["cache_dir"], "allow_patterns": list(patterns)}
    try:  # only with the list of all files on the disk can be told whether a snapshot there is whole
        names = [f.path for f in get_cached_repo_tree(repo, revision=sha, cache_dir=place["cache_dir"])]
    except CachedRepoTreeNotFoundError:
        names = None
    if names is not None:
        check_file_names(names, repo)
        try:
            return Path(api.snapshot_download(repo, **wanted, local_files_only=True))
        except LocalEntryNotFoundError:
            pass
    with explained(repo, sha, api=api):
        if names is None and not place["local_files_only"]:
            try:
                check_file_names([f.path for f in api.list_repo_tree(repo, revision=sha, recursive=True)], repo)
            except (OfflineModeIsEnabled, HTTPError) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                    raise
                return _without_the_hub(api, repo, wanted, error)
        return Path(api.snapshot_download(repo, **wanted, local_files_only=place["local_files_only"]))


def _without_the_hub(api: Any, repo: str, wanted: dict[str, Any], error: Exception) -> Path:
    """What transformers put into the cache, which keeps no list of a repository's files; else `error`."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(api.snapshot_download(repo, **wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        raise error from None


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))


def pull(
    repo: str,
    out: str | Path,
    *,
    revision: str | None = None,
    files: Sequence[str] = (),
    overwrite: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Snapshot:
    """A model of the Hub as a folder of one's own: weights, config, tokenizer, card.

    The folder appears when it is whole, or not at all; an interrupted download goes on from the cache. Each file is
    compared with the hash under which the Hub lists it. The config of a zoo model then records in `origin` where it
    came from: repository and full commit sha.

    Args:
        repo: ``org/name``, also ``org/name@revision``. revision: a branch, a tag or a commit, by default ``main``.
        out: the folder; must not exist, be empty, or hold a model that `overwrite` gives up.
        files: as in `snapshot`. token, endpoint, cache_dir: as in huggingface_hub.

    Returns: the snapshot that was copied; its `folder` is `out`.

    Raises:
        HubError: as `snapshot`. ConversionError: something stands at `out`. CheckpointError: damaged files.
    """
    from zoo.convert.api import _put_in_place, check_output

    repo, at = parse_reference(repo)
    if at is not None and revision is not None and at != revision:
        raise HubError(f"two revisions are given, {at!r} and {revision!r}")
    out = Path(out)
    check_output(out, overwrite)
    taken = snapshot(repo, revision or at, files=files, card=True, token=token, endpoint=endpoint, cache_dir=cache_dir)
    if not any(matches(name, (*WEIGHTS, *PICKLES, *files)) for name in taken.files):
        raise HubError(f"{repo}: holds no model at {taken.revision}; name a file of it with files=[...] (--file)")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder.chmod(0o755)
        for name in taken.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(taken.folder / name, folder / name)
        if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
            tensor_files(weight_files(folder))
        _record_origin(folder / "config.json", taken)
        _put_in_place(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Snapshot(out, taken.repo, taken.revision, taken.files)


def _copy(source: Path, target: Path) -> None:
    """Copy a file out of the cache. Its blob is named by its hash there: raise CheckpointError where that differs."""
    shutil.copyfile(source, target)
    blob = source.resolve()
    name = blob.name
    with open(target, "rb") as file:
        if blob.parent.name != "blobs":
            return
        if re.fullmatch(r"[0-9a-f]{64}", name):
            found = hashlib.file_digest(file, "sha256").hexdigest()
        elif re.fullmatch(r"[0-9a-f]{40}", name):
            digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
            found = hashlib.file_digest(file, lambda: digest).hexdigest()
        else:
            return
    if found != name:
        blob.unlink()
        raise CheckpointError(
            f"{source.name}: is damaged in the cache; it was removed there: run the same command again"
        )


def _record_origin(path: Path, taken: Snapshot) -> None:
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{taken.repo}: config.json is not valid JSON: {error}") from None
    if isinstance(values, dict) and values.get("model_type") == "zoo":
        values["origin"] = {**(values.get("origin") or {}), **origin(taken)}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def origin(taken: Snapshot) -> dict[str, dict[str, str]]:
    """What a config records of the snapshot a model came from."""
    return {"hub": {"repo": taken.repo, "revision": taken.revision}}


def load(reference: str, **options: Any) -> Any:
    """The model of ``[hf-hub:]org/name[@revision]``: what `create_model` gives for such a name.

    `options` are those of `from_pretrained` (``dtype``), and token, endpoint, cache_dir, local_files_only. No code of
    the repository is run. Raises HubError, and CheckpointError where the repository holds no complete zoo model.
    """
    from transformers import PreTrainedConfig

    from zoo.models.create import load_folder

    repo, revision = parse_reference(reference)
    taken = snapshot(repo, revision, **{key: options.pop(key) for key in OF_THE_HUB if key in options})
    if "config.json" not in taken.files:
        raise HubError(f"{repo}: holds no model at {taken.revision}: no config.json in it")
    kind = PreTrainedConfig.get_config_dict(taken.folder)[0].get("model_type")
    if kind != "zoo":
        raise HubError(f"{repo}: holds a model of type {kind!r}; `zoo convert {repo} --out DIR` makes one of zoo of it")
    model = load_folder(taken.folder, **options)
    model.config.origin = {**model.config.origin, **origin(taken)}
    model.config.name_or_path = repo
    return model
