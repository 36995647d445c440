"""What the double keeps: repositories, as commits of files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


def git_oid(data: bytes) -> str:
    """The name git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Blob:
    """A file of a commit."""

    data: bytes
    lfs: bool
    xet: str | None = None  # its name in Xet's store

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.lfs else git_oid(self.data)


@dataclass
class Repo:
    """A repository: what each commit holds, and where names point."""

    private: bool = True
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], message: str, branch: str = "main", sha: str | None = None) -> str:
        sha = sha or hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    @property
    def requests(self) -> list[str]:
        """Pull requests, as names of their branches."""
        return [name for name in self.branches if name.startswith("refs/pr/")]

    def find(self, revision: str) -> str | None:
        return (
            self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        )

    @property
    def files(self) -> dict[str, Blob]:
        return self.commits[self.branches["main"]]
