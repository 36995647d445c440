"""Talking to the Hub: names that are checked before they become a path or an address, and errors in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from zoo.errors import HubError, did_you_mean

LOGIN = "log in with `hf auth login` or set HF_TOKEN"
GO_ON = "run the same command again: what has arrived is not sent twice"


def parse_reference(reference: str) -> tuple[str, str | None]:
    """``[hf-hub:]org/name[@revision]`` as repository and revision. Raises HubError for anything else."""
    repo, at, revision = reference.removeprefix("hf-hub:").partition("@")
    check_repo(repo)
    if at:
        check_revision(revision, repo)
    return repo, revision if at else None


def check_repo(repo: str) -> None:
    """Raise HubError unless `repo` can be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        page = re.fullmatch(r"https?://[^/]+/([\w.-]+/[\w.-]+)(?:/tree/([\w.-]+))?/?", repo)
        hint = "" if page is None else f"; did you mean {page[1] + (f'@{page[2]}' if page[2] else '')!r}?"
        raise HubError(
            f"{repo!r} is not a repository: write it as org/name, of letters, digits and single . - _ between them"
            + hint
        ) from None


def check_revision(revision: str, repo: str = "") -> None:
    """Raise HubError unless `revision` can be a branch, a tag or a commit: names become paths of the cache."""
    parts = revision.split("/")
    odd = not re.fullmatch(r"[A-Za-z0-9_./+-]{1,255}", revision) or ".." in revision or revision[0] in "-./"
    if odd or any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in parts):
        where = f" of {repo}" if repo else ""
        raise HubError(f"{revision!r} is not a revision{where}: give a branch, a tag or a commit")


def check_file_names(names: list[str], repo: str) -> None:
    """Raise HubError where a file of a repository has a name that would lead out of the folder it is put into."""
    for name in names:
        odd = re.search(r"[\x00-\x1f\x7f\\]", name) or name.startswith(("/", "~")) or re.match(r"[A-Za-z]:", name)
        if odd or ".." in PurePosixPath(name).parts or str(PurePosixPath(name)) != name:
            raise HubError(f"{repo}: holds a file named {name!r}, which leads out of its folder; nothing was taken")


def client(endpoint: str | None = None, token: str | bool | None = None) -> Any:
    """A `huggingface_hub.HfApi` that says who asks."""
    from huggingface_hub import HfApi

    import zoo

    return HfApi(endpoint=endpoint, token=token, library_name="zoo", library_version=zoo.__version__)


@contextmanager
def explained(repo: str, revision: str | None = None, *, api: Any, doing: str = "reading") -> Iterator[None]:
    """Turn what huggingface_hub raises into one HubError that says what to do. `doing`: "reading" or "writing"."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{repo}: the Hub is switched off by HF_HUB_OFFLINE=1; unset it to go there") from None
    except (errors.LocalEntryNotFoundError, errors.RevisionResolutionError) as error:
        raise _not_here(error, repo, revision, api) from None
    except errors.HfHubHTTPError as error:
        raise _answered(error, repo, revision, api, doing) from None
    except errors.HTTPError as error:
        raise _no_connection(error, api) from None
    except errors.LocalTokenNotFoundError:
        raise HubError(f"{api.endpoint}: not logged in; {LOGIN}") from None
    except OSError as error:
        if error.errno is not None:  # a file or the disk here
            raise
        raise _by_xet(error, api) from None
    except RuntimeError as error:  # what an upload of several files wraps the error of one in
        cause: Any = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _answered(cause, repo, revision, api, doing) from None
        if isinstance(cause, errors.HTTPError):
            raise _no_connection(cause, api) from None
        raise


def _not_here(error: BaseException, repo: str, revision: str | None, api: Any) -> HubError:
    """Not in the cache, and the Hub was not asked or did not answer."""
    from huggingface_hub import errors

    cause: Any = error.__cause__
    if isinstance(cause, errors.HfHubHTTPError):
        return _answered(cause, repo, revision, api, "reading")
    if isinstance(cause, errors.HTTPError):
        return _no_connection(cause, api)
    what = repo if revision is None else f"{repo}@{revision}"
    return HubError(f"{what}: not, or not whole, in the cache, and the Hub is not to be asked (HF_HUB_OFFLINE)")


def _no_connection(error: BaseException, api: Any) -> HubError:
    said = " ".join(str(error).split()) or type(error).__name__
    return HubError(f"{api.endpoint}: no connection ({said}); check the network and HF_ENDPOINT, then {GO_ON}")


def _by_xet(error: OSError, api: Any) -> HubError:
    """hf_xet, which moves large files, raises errors of the system without a number."""
    said = " ".join(str(error).split())
    return HubError(
        f"{api.endpoint}: moving files by Xet failed ({said:.300}); {GO_ON}; where the server has no Xet, set "
        "HF_HUB_DISABLE_XET=1"
    )


def _answered(error: Any, repo: str, revision: str | None, api: Any, doing: str) -> HubError:
    from huggingface_hub import errors

    status, said = error.response.status_code, " ".join((error.server_message or "").split())
    logged_in = "authorization" in error.response.request.headers
    if isinstance(error, errors.GatedRepoError):
        ask = f"ask for access at {api.endpoint}/{repo}"
        return HubError(f"{repo}: is gated: {ask}" + ("" if logged_in else f", and {LOGIN}"))
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo}: has no revision {revision or 'main'!r}{_near_revisions(repo, revision, api)}")
    if status == 401 and (doing == "writing" or logged_in):
        return HubError(f"{api.endpoint}: {'the token is not valid' if logged_in else 'not logged in'}; {LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "your account may not see it" if logged_in else f"it is private: then {LOGIN}"
        return HubError(f"{repo}: no such repository at {api.endpoint}, or {private}")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError(f"{repo}: has no file {str(error.response.request.url).rsplit('/', 1)[-1]!r}")
    if status == 403:
        need = "a token that may write" if doing == "writing" else "access"
        return HubError(f"{repo}: forbidden; you need {need} there ({said or 'no reason given'})")
    if status == 409:
        return HubError(f"{repo}: in conflict with what is there ({said}); look at it, then try again")
    if status == 412:
        return HubError(f"{repo}: somebody else changed it meanwhile; nothing was published; look at it, then {GO_ON}")
    if status == 429:
        return HubError(f"{api.endpoint}: too many requests; wait some minutes, then {GO_ON}")
    if status >= 500:
        return HubError(f"{api.endpoint}: the server has a problem ({status}); try later: {GO_ON}")
    return HubError(f"{repo}: the Hub answered {status} ({said or 'no reason given'})")


def _near_revisions(repo: str, revision: str | None, api: Any) -> str:
    try:
        refs = api.list_repo_refs(repo)
    except Exception:  # the hint is not worth another error
        return ""
    return did_you_mean(revision or "main", [ref.name for ref in (*refs.branches, *refs.tags)])
