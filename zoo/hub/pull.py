"""From the Hub: a snapshot in the cache, a folder of one's own, a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import CheckpointError, HubError, did_you_mean
from zoo.hub.client import check_file_names, check_repo, check_revision, client, explained, parse_reference
from zoo.hub.contents import BESIDE_WEIGHTS, CODE, PICKLES, TO_LOAD, WEIGHTS, matches
from zoo.hub.weights import INDEX, SINGLE, tensor_files, weight_files

OWN = ".cache"  # where huggingface_hub keeps, inside a folder, what it needs to go on with a download
UNUSUAL = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".ckpt")  # weights, but under which name?
PICTURES = ("*.png", "*.svg", "*.jpg")
OF_THE_HUB = ("token", "endpoint", "cache_dir", "local_files_only")  # options that are not of `from_pretrained`


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit, in the cache of huggingface_hub or in a folder. `revision` is the full sha."""

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
    into: Path | None = None,
) -> Snapshot:
    """Bring a model's files into the cache: weights, config and tokenizer; nothing where they are there already.

    Weights come as safetensors; where a repository has none, its `pytorch_model*.bin`. A branch or a tag is asked for
    each time; a full commit sha that is in the cache costs no request. HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME act as
    everywhere.

    Args:
        repo: ``org/name``. revision: a branch, a tag or a commit, by default ``main``.
        files: exactly these files instead of the weights (``RWKV-4.pth``); config and tokenizer come too.
        weights: False: only config and tokenizer. card: the card and what was measured, too.
        token, endpoint, cache_dir, local_files_only: as in huggingface_hub.
        into: a folder to which the files go, if they are not all in the cache, and then not into the cache.

    Raises:
        HubError: a repository, revision or file that is not there, no access, no connection, odd names.
    """
    check_repo(repo)
    if revision is not None:
        check_revision(revision, repo)
    check_file_names(list(files), repo)
    api = client(endpoint, token)
    place: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    with explained(repo, revision, api=api):
        sha = api.resolve_revision(repo, revision=revision, **place).resolved
    beside = (*BESIDE_WEIGHTS, CODE, *PICTURES) if card else TO_LOAD
    listed, unreachable = _list(api, repo, sha, place)
    usual = tuple(files) or ((_weights_of(listed, repo, sha) if listed else WEIGHTS) if weights else ())
    if listed and (missing := [name for name in files if name not in listed]):
        raise HubError(f"{repo}: has no file {missing[0]!r} at {sha}{did_you_mean(missing[0], listed)}")
    folder = _fetch(api, repo, sha, (*beside, *usual), {**place, "local_dir": into}, listed, unreachable)
    names = _chosen(folder, (*beside, *usual), listed)
    if not listed and usual == WEIGHTS and not any(matches(name, WEIGHTS) for name in names):
        names = _chosen(folder, (*beside, *PICKLES), listed)
    if missing := [name for name in files if name not in names]:
        raise HubError(f"{repo}: has no file {missing[0]!r} at {sha} in the cache")
    return Snapshot(folder, repo, sha, names)


def _weights_of(listed: Mapping[str, str], repo: str, sha: str) -> tuple[str, ...]:
    """The usual names of weights that a repository has. Raises HubError for one that has none of them."""
    for usual in (WEIGHTS, PICKLES):
        if any(matches(name, usual) for name in listed):
            return usual
    others = [name for name in listed if name.endswith(UNUSUAL)]
    has = f", but {', '.join(others[:5])}; name one with files=[...] (--file)" if others else ""
    raise HubError(f"{repo}: holds no model at {sha}: no {WEIGHTS[0]}{has}")


def _list(api: Any, repo: str, sha: str, place: Mapping[str, Any]) -> tuple[dict[str, str], Exception | None]:
    """All files of a commit, and why they are not known, where only the cache can be asked."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    listed, unreachable = _listed(repo, sha, place["cache_dir"]), None
    if not listed and not place["local_files_only"]:
        with explained(repo, sha, api=api):
            try:
                tree = api.list_repo_tree(repo, revision=sha, recursive=True)
                listed = {f.path: f.blob_id for f in tree if hasattr(f, "blob_id")}
            except (OfflineModeIsEnabled, HTTPError) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                    raise
                unreachable = error
    check_file_names(list(listed), repo)
    return listed, unreachable


def _fetch(
    api: Any,
    repo: str,
    sha: str,
    patterns: tuple[str, ...],
    place: dict[str, Any],
    listed: Mapping[str, str],
    unreachable: Exception | None,
) -> Path:
    """The folder of a commit, in the cache or `local_dir`, once all its files that the patterns name are there."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = {"revision": sha, "cache_dir": place["cache_dir"], "allow_patterns": list(patterns)}
    with explained(repo, sha, api=api):
        # Only with the list of all files can be told whether a snapshot in the cache is whole. There is none of what
        # transformers put there, which is taken as it is where the Hub cannot be asked.
        if _listed(repo, sha, place["cache_dir"]) or unreachable is not None:
            try:
                return Path(api.snapshot_download(repo, **wanted, local_files_only=True))
            except LocalEntryNotFoundError:
                if unreachable is not None:
                    raise unreachable from None
        if place["local_dir"] is not None:
            _from_cache(repo, sha, _chosen(place["local_dir"], patterns, listed), place)
        return Path(api.snapshot_download(repo, **{**place, **wanted}))


def _from_cache(repo: str, sha: str, names: Sequence[str], place: Mapping[str, Any]) -> None:
    """Copy what the cache has of the files that are wanted."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        cached = try_to_load_from_cache(repo, name, cache_dir=place["cache_dir"], revision=sha)
        target = place["local_dir"] / name
        if isinstance(cached, str) and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(Path(cached), target)


def _listed(repo: str, sha: str, cache_dir: str | Path | None, folder: Path | None = None) -> dict[str, str]:
    """Each file of a commit with its hash, as the Hub listed them: git's SHA-1, of large files SHA-256. {}: unknown."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(repo, revision=sha, cache_dir=cache_dir, local_dir=folder)
    except CachedRepoTreeNotFoundError:
        return {}
    return {f.path: f.blob_id if f.lfs is None else f.lfs.sha256 for f in tree}


def _chosen(folder: Path, patterns: Sequence[str], listed: Mapping[str, str]) -> tuple[str, ...]:
    """The files that were asked for: of those that are listed, or, without a list, that are in the folder."""
    from huggingface_hub.utils import filter_repo_objects

    names = listed or [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return tuple(sorted(filter_repo_objects(list(names), allow_patterns=list(patterns))))


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

    The folder appears when it is whole, or not at all. Until then the files gather in a hidden one beside it, from
    which an interrupted download goes on. What the cache has is taken from there; the rest does not go through it, so
    that it takes its room once. Each file is compared with the hash under which the Hub lists it. The config of a zoo
    model then records in `origin` where it came from: repository and full commit sha.

    Args:
        repo: ``org/name``, also ``org/name@revision``. revision: a branch, a tag or a commit, by default ``main``.
        out: the folder; must not exist, be empty, or hold a model that `overwrite` gives up.
        files: as in `snapshot`. token, endpoint, cache_dir: as in huggingface_hub.

    Returns: the snapshot that was taken; its `folder` is `out`.

    Raises:
        HubError: as `snapshot`; another pull to the same folder. ConversionError: something stands at `out`.
        CheckpointError: damaged files.
    """
    from zoo.convert.api import _put_in_place, check_output

    repo, revision = _one_revision(repo, revision)
    out = Path(out)
    check_output(out, overwrite)
    part = out.parent / f".{out.name}.zoo-pull"
    with _alone(part, out):
        try:
            taken = snapshot(
                repo, revision, files=files, card=True, into=part,
                token=token, endpoint=endpoint, cache_dir=cache_dir,
            )  # fmt: skip
            _gather(taken, part, cache_dir)
            shutil.rmtree(part / OWN, ignore_errors=True)
            if (part / SINGLE).is_file() or (part / INDEX).is_file():
                tensor_files(weight_files(part))
            _record_origin(part / "config.json", taken)
            _put_in_place(part, out)
        except BaseException:
            if not (part / OWN).is_dir() or not [p for p in part.iterdir() if p.name != OWN]:
                # there is no download that could go on
                shutil.rmtree(part, ignore_errors=True)
            raise
    return Snapshot(out, taken.repo, taken.revision, taken.files)


@contextlib.contextmanager
def _alone(part: Path, out: Path) -> Iterator[None]:
    """Make the folder in which files gather, and keep other processes out of it."""
    part.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows, where folders cannot be locked
        yield
        return
    handle = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(f"{out}: another process is pulling to it; wait for it, or give another folder") from None
        yield
    finally:
        os.close(handle)


def _gather(taken: Snapshot, part: Path, cache_dir: str | Path | None) -> None:
    """Have in `part` the files of a snapshot, each as the Hub lists it, and nothing else.

    Raises CheckpointError for a file that is not: it is removed, also from the cache, so that the next call loads it.
    """
    from huggingface_hub import try_to_load_from_cache

    in_cache = taken.folder.resolve() != part.resolve()
    listed = _listed(taken.repo, taken.revision, cache_dir, None if in_cache else part)
    for file in [p for p in part.rglob("*") if p.is_file() or p.is_symlink()]:
        name = file.relative_to(part).as_posix()
        if (in_cache or name not in taken.files) and not name.startswith(f"{OWN}/"):
            file.unlink()  # of another commit
    for name in taken.files:
        file, source = part / name, taken.folder / name
        if in_cache:
            file.parent.mkdir(parents=True, exist_ok=True)
            _copy(source, file)
        # Without a list, the cache has the hash: it names by it the file to which its entry leads.
        expected = listed.get(name) or (source.readlink().name if source.is_symlink() else "")
        if not _is(file, expected):
            cached = try_to_load_from_cache(taken.repo, name, cache_dir=cache_dir, revision=taken.revision)
            for damaged in [file] if not isinstance(cached, str) else [file, Path(cached).resolve()]:
                damaged.unlink(missing_ok=True)
            where = "in the cache" if isinstance(cached, str) else "as it arrived"
            raise CheckpointError(f"{name}: is damaged {where}; it was removed there: run the same command again")


def _copy(source: Path, target: Path) -> None:
    """Copy a file so that the two share their room on the disk, where the file system can do that."""
    with open(source, "rb") as read, open(target, "wb") as written:
        left = os.fstat(read.fileno()).st_size
        try:
            while left > 0 and (count := os.copy_file_range(read.fileno(), written.fileno(), left)):
                left -= count
        except (AttributeError, OSError):  # not on this system, or not between these two places
            left = -1
    if left:
        shutil.copyfile(source, target)


def _is(file: Path, expected: str) -> bool:
    """Whether a file has this SHA-256 or git SHA-1; True where what is expected is neither."""
    with open(file, "rb") as opened:
        if re.fullmatch(r"[0-9a-f]{64}", expected):
            return hashlib.file_digest(opened, "sha256").hexdigest() == expected
        if re.fullmatch(r"[0-9a-f]{40}", expected):
            digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
            return hashlib.file_digest(opened, lambda: digest).hexdigest() == expected
    return True


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


def _one_revision(reference: str, revision: str | None) -> tuple[str, str | None]:
    """Repository and revision, which may be in the reference or beside it."""
    repo, at = parse_reference(reference)
    if at is not None and revision is not None and at != revision:
        raise HubError(f"two revisions are given, {at!r} and {revision!r}")
    return repo, at or revision


def load(reference: str, **options: Any) -> Any:
    """The model of ``[hf-hub:]org/name[@revision]``: what `create_model` gives for such a name.

    `options` are those of `from_pretrained` (``dtype``), and revision, token, endpoint, cache_dir, local_files_only.
    No code of the repository is run. Raises HubError, and CheckpointError where it holds no complete zoo model.
    """
    from transformers import PreTrainedConfig

    from zoo.models.create import load_folder

    repo, revision = _one_revision(reference, options.pop("revision", None))
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
