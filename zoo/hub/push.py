"""To the Hub: the files of a saved model in one commit, and a tag for the version."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zoo.errors import CheckpointError, HubError
from zoo.hub.client import GO_ON, LOGIN, check_repo, check_revision, client, explained
from zoo.hub.contents import CODE, MEASURED, WEIGHTS, collect, matches
from zoo.hub.measured import check_card, check_old_card
from zoo.hub.shards import reshard, size_in_bytes
from zoo.hub.weights import weights_hash

MAIN = "main"
VERSION = re.compile(r"v(\d+)")


@dataclass(frozen=True)
class Pushed:
    """What a push sent, or, with `commit` None after a dry run, would send.

    files: path in the repository -> bytes. stays: what else is in the folder and does not belong on the Hub. removed:
    weights and scores of the version before that are no longer there. revision: the branch. pull_request: its address,
    where it was one. changed: False where all of it was there already.
    """

    repo: str
    url: str
    private: bool
    files: dict[str, int]
    stays: list[str]
    removed: list[str]
    commit: str | None = None
    tag: str | None = None
    revision: str = MAIN
    pull_request: str | None = None
    changed: bool = True

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def push(
    model: Any,
    repo: str,
    *,
    private: bool = True,
    card: str | Path | None = None,
    tag: str | None = None,
    message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "5GB",
    with_code: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Publish a model: weights as safetensors, config, tokenizer, card and what was measured, in one commit.

    Sent are the files that belong to a model (`zoo.hub.contents`), never pickles, checkpoints of training or whatever
    else lies in the folder. Files that the server has are not sent again, so an interrupted push goes on where it
    stopped; until its last request nothing is visible. Weights and scores of an earlier version that have no successor
    are removed in the same commit.

    Args:
        model: the folder of a saved model, or a model; with `model.tokenizer` where it has one.
        repo: ``org/name``, or the name of one's own; it is made where there is none.
        private: whether it may be public; False must be said, also where the repository is public already.
        card: README.md, or a folder with it and what was measured; by default those of the model's folder.
        tag: a name for this version; by default v1, v2, ... on main, and none elsewhere.
        message: of the commit.
        revision: a branch other than main, which is made from main where there is none; or an open pull request,
            ``refs/pr/1``.
        create_pr: propose it as a pull request, also to a repository that one may only read; without a tag.
        max_shard_size: weights in larger files are split.
        with_code: put the code of the model beside it (one file), for those who do not have this package and load with
            ``trust_remote_code=True``. With the package it needs neither.
        dry_run: only say what would be sent.
        token, endpoint: as in huggingface_hub.

    Raises:
        HubError: no access, no connection, a tag that exists, a change by somebody else in between.
        CheckpointError: no complete model, a card whose numbers belong to other weights.
    """
    check_repo(repo)
    for name in (tag, revision):
        if name is not None:
            check_revision(name, repo)
    if create_pr and tag is not None:
        raise HubError(f"{repo}: a pull request has no tag of its own; leave out {tag!r}, and give it after the merge")
    if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise HubError(f"{repo}: {revision} is a commit; give the branch that is to move on (--revision)")
    size_in_bytes(max_shard_size)
    with tempfile.TemporaryDirectory(prefix="zoo-push-") as scratch:
        folder = model if isinstance(model, str | Path) else _saved(model, Path(scratch) / "model", max_shard_size)
        files, stays, digest = _prepared(Path(folder), card, Path(scratch), max_shard_size, with_code)
        api = client(endpoint, token)
        repo = _full_name(repo, api)
        sizes = {name: file.stat().st_size for name, file in files.items()}
        url = f"{api.endpoint}/{repo}"
        plan = Pushed(repo, url, private, sizes, stays, [], tag=tag, revision=revision or MAIN)
        return plan if dry_run else _send(plan, files, digest, message, create_pr, api)


def _full_name(repo: str, api: Any) -> str:
    """``org/name``; a name alone is one's own repository, as in huggingface_hub."""
    if "/" in repo:
        return repo
    if api.token is False:
        raise HubError(f"{api.endpoint}: not logged in; {LOGIN}")
    with explained(repo, api=api, doing="writing"):
        return f"{api.whoami()['name']}/{repo}"


def _saved(model: Any, folder: Path, max_shard_size: int | str) -> Path:
    model.save_pretrained(folder, max_shard_size=size_in_bytes(max_shard_size))
    tokenizer, report = getattr(model, "tokenizer", None), getattr(model, "report", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if report is not None:
        (folder / "conversion.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return folder


def _prepared(
    folder: Path, card: str | Path | None, scratch: Path, max_shard_size: int | str, with_code: bool
) -> tuple[dict[str, Path], list[str], str]:
    """The files as they are sent, the names of those that stay, and the hash of the weights."""
    contents = collect(folder, card)
    files, made, together = dict(contents.files), scratch / "made", scratch / "together"
    made.mkdir()
    together.mkdir()
    digest = weights_hash(folder)
    check_card(files, digest, together)
    if shards := reshard(folder, made, max_shard_size):
        files = {name: file for name, file in files.items() if not matches(name, WEIGHTS)}
        files |= {file.name: file for file in shards}
    values = json.loads(files["config.json"].read_text(encoding="utf-8"))
    wanted = _with_code(values, folder, made) if with_code else _without_code(values, folder)
    if wanted != values:
        files["config.json"] = made / "config.json"
        files["config.json"].write_text(json.dumps(wanted, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if with_code:
        files[CODE] = made / CODE
    return dict(sorted(files.items())), [name for name in contents.stays if name not in files], digest


def _without_code(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A config that asks for no code, since none is sent."""
    if "auto_map" in values and values.get("model_type") != "zoo":
        raise CheckpointError(f"{folder}/config.json: asks for code of its own (auto_map), which a push does not send")
    return {key: value for key, value in values.items() if key != "auto_map"}


def _with_code(values: Mapping[str, Any], folder: Path, made: Path) -> dict[str, Any]:
    from zoo.hub.code import auto_map, modeling_code
    from zoo.models.create import read_config

    if values.get("model_type") != "zoo":
        raise CheckpointError(
            f"{folder}: is a {values.get('model_type')!r} of transformers, which has the code; leave out with_code"
        )
    config = read_config(folder)
    (made / CODE).write_text(modeling_code(config), encoding="utf-8")
    return {**values, "auto_map": auto_map(config)}


def _send(
    plan: Pushed, files: Mapping[str, Path], digest: str, message: str | None, create_pr: bool, api: Any
) -> Pushed:
    repo = plan.repo
    with explained(repo, plan.revision, api=api, doing="writing"):
        there, refs = _open_repository(plan, create_pr, api)
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        tagged = plan.tag is not None or (plan.revision == MAIN and not create_pr)
        tag = _free_tag(plan.tag, tags, there.sha, repo) if tagged else None
        operations, removed = _operations(files, there, digest, api)
        message = message or (f"zoo push: {tag}" if tagged else "zoo push")
        try:
            commit = api.create_commit(
                repo, operations, commit_message=message, parent_commit=there.sha,
                revision=plan.revision, create_pr=create_pr,
            )  # fmt: skip
        except ValueError as error:
            if isinstance(error, OSError):
                raise
            said = " ".join(str(error).split())
            raise HubError(f"{repo}: the Hub does not take the files: {said}") from None
        if commit.oid == there.sha and plan.tag is None and tagged:  # nothing changed: the version has a name already
            tag = next((name for name, sha in tags.items() if sha == commit.oid and VERSION.fullmatch(name)), tag)
        if tag is not None and tags.get(tag) != commit.oid:
            if tag in tags:
                raise HubError(
                    f"{repo}: published as {commit.oid}, but tag {tag!r} names another; give a new one (--tag)"
                )
            api.create_tag(repo, tag=tag, revision=commit.oid)
    done = {"private": bool(there.private), "removed": removed, "commit": commit.oid, "tag": tag}
    return replace(plan, **done, pull_request=commit.pr_url, changed=commit.oid != there.sha)


def _operations(files: Mapping[str, Path], there: Any, digest: str, api: Any) -> tuple[list[Any], list[str]]:
    """What the commit does, and the files of the version before that it removes."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    names = [sibling.rfilename for sibling in there.siblings or []]
    if "README.md" in names and "README.md" not in files:
        path = api.hf_hub_download(there.id, "README.md", revision=there.sha)
        check_old_card(Path(path).read_text(encoding="utf-8"), digest, there.id)
    removed = [n for n in names if n not in files and matches(n, (*WEIGHTS, *MEASURED, CODE))]
    operations: list[Any] = [CommitOperationDelete(name) for name in removed]
    return operations + [CommitOperationAdd(name, str(file)) for name, file in files.items()], removed


def _open_repository(plan: Pushed, create_pr: bool, api: Any) -> tuple[Any, Any]:
    """What is known of the repository at the branch, and its branches and tags; what is missing is made."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repo = plan.repo
    try:
        there = api.model_info(repo)
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError) or create_pr:
            raise
        api.create_repo(repo, private=plan.private, exist_ok=True)
        there = api.model_info(repo)
    if plan.private and not there.private:
        raise HubError(f"{repo}: is public; say that the model may be, with private=False (--public)")
    refs = api.list_repo_refs(repo)
    if plan.revision == MAIN:
        return there, refs
    if plan.revision in {ref.name for ref in refs.tags}:
        raise HubError(f"{repo}: {plan.revision!r} is a tag, which stays where it is; give a branch (--revision)")
    if not plan.revision.startswith("refs/") and plan.revision not in {ref.name for ref in refs.branches}:
        if create_pr:
            raise HubError(f"{repo}: has no branch {plan.revision!r}; leave out --revision to propose it for main")
        api.create_branch(repo, branch=plan.revision, revision=there.sha, exist_ok=True)
    return api.model_info(repo, revision=plan.revision), refs


def _free_tag(wanted: str | None, tags: Mapping[str, str], head: str, repo: str) -> str:
    """The tag that is wanted, if it does not name another commit; else the next of v1, v2, ..."""
    if wanted is None:
        taken = [int(found[1]) for name in tags if (found := VERSION.fullmatch(name))]
        return f"v{max(taken, default=0) + 1}"
    if tags.get(wanted, head) != head:
        raise HubError(f"{repo}: tag {wanted!r} names an earlier version; give a new one (--tag); {GO_ON}")
    return wanted
