"""A Hub on loopback: the part of its protocol that a push and a pull use, over real HTTP, with faults on request.

`HubDouble` answers as huggingface.co does: access tokens, private and gated repositories, commits with a parent, LFS,
tags, ranges. `fail(...)` makes it answer a request with a status, or drop the connection in the middle of a body.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repos import Blob, Repo, git_oid
from xet_store import XetStore

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
LFS_FROM = 1024  # bytes from which any file is sent as LFS; the real one looks at names and contents


class _Dropped(Exception):
    pass


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path matches."""

    method: str
    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None  # bytes of the body, of the request for PUT and POST, of the answer for GET
    corrupt: bool = False  # the last byte of the answer is another
    lost: bool = False  # the request is carried out, and no answer comes
    wait: bool = False  # for `go`, before the connection is dropped: time for the test to kill who asked
    times: int = 1
    error: str = "as the test wants it"
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def drop(self) -> None:
        """Break the connection off."""
        self.reached.set()
        if self.wait:
            self.go.wait(60)
        raise _Dropped


class HubDouble:
    """The server. `requests` lists (method, path, status, bytes that came in); a dropped one has status 0.

    `served` lists (path, bytes of the body that went out).
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # LFS objects that arrived whole
        self.xet: XetStore | None = None  # the double has no Xet unless a test gives it a store
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int, int]] = []
        self.served: list[tuple[str, int]] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.server.handle_error = lambda *_: None  # a client that was killed is no news
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, status: int = 0, **how: object) -> Fault:
        fault = Fault(method, path, status, **how)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, path: str) -> int:
        return sum(m == method and bool(re.search(path, p)) for m, p, _, _ in self.requests)

    def publish(
        self, name: str, files: dict[str, bytes], private: bool = False, gated: bool = False, sha: str | None = None
    ) -> str:
        """Put a commit there without a push; its sha, which can be chosen."""
        repo = self.repos.setdefault(name, Repo(private=private, gated=gated))
        blobs = {path: Blob(data, len(data) >= LFS_FROM) for path, data in files.items()}
        return repo.commit(blobs, "published", sha=sha)

    def publish_folder(self, name: str, folder, **how: bool) -> str:
        """The files of a folder as a commit."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.publish(name, files, **how)


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", body: dict | None = None) -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        self.user = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        self.fault = self.hub.fault_for(self.command, self.route)
        self.came, self.status = 0, 0
        try:
            self.body = self.read_body()
            if self.fault is not None and self.fault.status:
                refused = _Refused(self.fault.status, message=self.fault.error)
                self.answer_error(refused, self.fault.headers)
            else:
                with self.hub.lock:
                    answer = self.dispatch()
                if self.fault is not None and self.fault.lost:
                    self.fault.drop()
                answer()
        except _Refused as refused:
            self.answer_error(refused)
        except (_Dropped, ConnectionError):
            self.close_connection = True
        finally:
            self.hub.requests.append((self.command, self.route, self.status, self.came))

    def read_body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        drop = self.fault.drop_after if self.fault is not None and self.command in ("PUT", "POST") else None
        data = self.rfile.read(length if drop is None else min(drop, length))
        self.came = len(data)
        if self.fault is not None and drop is not None:
            self.fault.drop()
        return data

    # ---- answers

    def answer_error(self, refused: _Refused, headers: dict[str, str] | None = None) -> None:
        extra = dict(headers or {})
        if refused.code:
            extra["X-Error-Code"] = refused.code
        if refused.message:
            extra["X-Error-Message"] = refused.message
        self.answer_json(refused.body or {"error": refused.message}, refused.status, extra)

    def answer_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.answer(data, status, {"Content-Type": "application/json", **(headers or {})})

    def answer(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        drop = self.fault.drop_after if self.fault is not None else None
        self.wfile.write(data if drop is None else data[:drop])
        self.hub.served.append((self.route, len(data[:drop])))
        if self.fault is not None and drop is not None:
            self.wfile.flush()
            self.fault.drop()

    # ---- what the Hub does

    def dispatch(self):
        for method, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, self.route)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                value = getattr(self, name)(**found.groupdict())
                return value if callable(value) else functools.partial(self.answer_json, value)
        raise _Refused(404, message=f"no such route {self.command} {self.route}")

    def need_user(self) -> str:
        if self.user is None:
            raise _Refused(401, message="Invalid username or password.")
        return self.user

    def repo(self, id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(id)
        owner = id.split("/")[0]
        mine = self.user is not None and (self.user == owner or owner == "zoo-org")
        if repo is None or (repo.private and not mine):
            raise _Refused(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
        if write and not mine:
            raise _Refused(403, message="Forbidden: you have no write access to this repository")
        return repo

    def at(self, id: str, rev: str) -> tuple[Repo, str]:
        repo = self.repo(id)
        sha = repo.find(rev)
        if sha is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return repo, sha

    def whoami(self) -> dict:
        user = self.need_user()
        return {"type": "user", "name": user, "orgs": [{"name": "zoo-org"}], "auth": {"accessToken": {"role": "write"}}}

    def create(self) -> dict:
        user, asked = self.need_user(), json.loads(self.body)
        owner = asked.get("organization") or user
        if owner not in (user, "zoo-org"):
            raise _Refused(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            raise _Refused(409, message="You already created this model repo", body=url)
        private = asked["private"] if "private" in asked else asked.get("visibility") == "private"
        repo = self.hub.repos[name] = Repo(private=bool(private))
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return url

    def validate_yaml(self) -> dict:
        return {"errors": [], "warnings": []}

    def preupload(self, id: str, rev: str) -> dict:
        repo, (_, sha) = self.repo(id, write="create_pr" not in self.query), self.at(id, rev)
        self.need_user()
        out = []
        for file in json.loads(self.body)["files"]:
            there = repo.commits[sha].get(file["path"])
            mode = "lfs" if file["size"] >= LFS_FROM or file["path"].endswith(".safetensors") else "regular"
            oid = None if there is None else there.oid
            out.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": out}

    def batch(self, id: str) -> dict:
        self.repo(id)  # whoever may read may propose
        self.need_user()
        out = []
        for asked in json.loads(self.body)["objects"]:
            if asked["oid"] not in self.hub.stored:
                place = f"{self.hub.url}/lfs/{asked['oid']}"
                asked = {**asked, "actions": {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}}
            out.append(asked)
        return {"transfer": "basic", "objects": out}

    def put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, message="the bytes are not those of this oid")
        self.hub.stored[oid] = self.body
        return lambda: self.answer(b"")

    def verify(self, oid: str) -> dict:
        self.need_user()
        asked = json.loads(self.body)
        if len(self.hub.stored.get(oid, b"")) != asked["size"]:
            raise _Refused(422, message="size differs")
        return {}

    def commit(self, id: str, rev: str) -> dict:
        self.need_user()
        propose = "create_pr" in self.query
        repo = self.repo(id, write=not propose)
        _, sha = self.at(id, rev)
        if rev not in repo.branches:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, sha):
            raise _Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[sha])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large_file(value["oid"], value["size"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = len(repo.requests) + 1
        new = repo.commit(files, header["summary"], f"refs/pr/{number}" if propose else rev)
        answer = {"success": True, "commitOid": new, "commitUrl": f"{self.hub.url}/{id}/commit/{new}"}
        return answer | ({"pullRequestUrl": f"{self.hub.url}/{id}/discussions/{number}"} if propose else {})

    def large_file(self, oid: str, size: int) -> Blob:
        """What arrived by LFS, or by Xet."""
        name = None if self.hub.xet is None else self.hub.xet.files().get(oid)
        if self.hub.xet is not None and name is not None:
            return Blob(self.hub.xet.read(name, size), True, name)
        if oid not in self.hub.stored:
            raise _Refused(400, message=f"LFS object {oid} is not there")
        return Blob(self.hub.stored[oid], True)

    def xet_token(self, id: str, way: str, rev: str):
        self.repo(id, write=way == "write" and "create_pr" not in self.query)
        if self.hub.xet is None:
            raise _Refused(404, message="Sorry, we can't find the page you are looking for.")
        return functools.partial(self.answer_json, self.hub.xet.token(), 200, self.hub.xet.headers())

    def info(self, id: str, rev: str = "main") -> dict:
        repo, sha = self.at(id, rev)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        return {"id": id, "sha": sha, "private": repo.private, "gated": repo.gated, "siblings": siblings, "tags": []}

    def tree(self, id: str, rev: str) -> list:
        repo, sha = self.at(id, rev)
        out = []
        for path, blob in repo.commits[sha].items():
            entry = {"type": "file", "path": path, "oid": git_oid(blob.data), "size": len(blob.data)}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}
            if blob.xet is not None:
                entry["xetHash"] = blob.xet
            out.append(entry)
        return out

    def paths_info(self, id: str, rev: str) -> list:
        asked = parse_qs(self.body.decode()) if b"=" in self.body else json.loads(self.body)
        return [entry for entry in self.tree(id, rev) if entry["path"] in asked["paths"]]

    def refs(self, id: str) -> dict:
        repo = self.repo(id)

        def listed(kind: str, names: dict[str, str]) -> list:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in names.items()]

        branches = {name: sha for name, sha in repo.branches.items() if name not in repo.requests}
        return {"branches": listed("heads", branches), "tags": listed("tags", repo.tags), "converts": []}

    def commits(self, id: str, rev: str) -> list:
        repo, _ = self.at(id, rev)
        both = zip(repo.commits, repo.messages, strict=True)
        return [
            {"id": sha, "title": title, "message": "", "authors": [], "date": "2026-11-22T00:00:00.000Z"}
            for sha, title in reversed(list(both))
        ]

    def tag(self, id: str, rev: str) -> dict:
        repo, (_, sha) = self.repo(id, write=True), self.at(id, rev)
        name = json.loads(self.body)["tag"]
        if name in repo.tags:
            raise _Refused(409, message="Tag reference exists already")
        repo.tags[name] = sha
        return {}

    def branch(self, id: str, rev: str) -> dict:
        repo, name = self.repo(id, write=True), rev
        if name in repo.branches:
            raise _Refused(409, message="Reference already exists")
        repo.branches[name] = self.at(id, json.loads(self.body or b"{}").get("startingPoint") or "main")[1]
        return {}

    def delete(self) -> dict:
        user, asked = self.need_user(), json.loads(self.body)
        del self.hub.repos[f"{asked.get('organization') or user}/{asked['name']}"]
        return {}

    def resolve(self, id: str, rev: str, path: str):
        repo, sha = self.at(id, rev)
        if repo.gated and self.user is None:
            raise _Refused(401, "GatedRepo", f"Access to model {id} is restricted. You must be logged in.")
        if repo.gated and self.user != id.split("/")[0]:
            raise _Refused(403, "GatedRepo", f"Access to model {id} is restricted and you are not in the list.")
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        if blob.xet is not None:
            route = f"{self.hub.url}/api/models/{id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": blob.xet, "X-Xet-Refresh-Route": route}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return lambda: self.answer(blob.data, 200, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(blob.data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
        return lambda: self.answer(blob.data[first : last + 1], 206, headers)


_ID, _REV = r"(?P<id>[^/]+/[^/]+)", r"(?P<rev>.+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{_ID}/preupload/{_REV}", "preupload"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "put"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "verify"),
    ("GET", rf"/api/models/{_ID}/xet-(?P<way>read|write)-token/{_REV}", "xet_token"),
    ("POST", rf"/api/models/{_ID}/commit/{_REV}", "commit"),
    ("POST", rf"/api/models/{_ID}/tag/{_REV}", "tag"),
    ("POST", rf"/api/models/{_ID}/branch/{_REV}", "branch"),
    ("POST", rf"/api/models/{_ID}/paths-info/{_REV}", "paths_info"),
    ("GET", rf"/api/models/{_ID}/revision/{_REV}", "info"),
    ("GET", rf"/api/models/{_ID}/tree/(?P<rev>[^/]+)/?", "tree"),  # a mirror asks for the folder ""
    ("GET", rf"/api/models/{_ID}/commits/{_REV}", "commits"),
    ("GET", rf"/api/models/{_ID}/refs", "refs"),
    ("GET", rf"/api/models/{_ID}", "info"),
    ("GET", rf"/{_ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]
