"""A simulated Hugging Face hub on this machine, which can be made to fail.

It keeps repositories with their commits, takes large files by LFS into a separate store, and
answers what huggingface_hub asks for to create, commit, list and read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

LARGE = 20_000  # bytes from which a file goes by LFS; weights always do
RESET = "reset"  # in place of a status: the connection breaks


@dataclass
class Repo:
    """A repository: its visibility, and the files of each commit by the commit's hash."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def at(self, revision: str | None) -> tuple[str, dict[str, bytes]]:
        """Hash and files of a commit."""
        oid = self.head if revision in (None, "main") else revision
        return oid, self.commits[oid]

    def commit(self, files: dict[str, bytes], message: str, oid: str | None = None) -> str:
        oid = oid or hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid] = files
        return oid


class Missing(Exception):
    """What was asked for is not there; the hub's code for it."""


class Fault(NamedTuple):
    """What requests `after` + 1 and so on to an endpoint get instead of an answer."""

    status: int | str
    times: float
    after: int
    headers: dict[str, str]
    body: dict[str, object]


class FakeHub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repos: by ``models/user/name`` or ``datasets/user/name``.
        store: the large files, by SHA-256.
        token: the only one that is accepted; None accepts everybody.
        asked: number of requests by endpoint.
        sent: bytes of files that were sent to clients.
        knows_ranges: whether it sends parts of files.
        takes_large: whether large files go to the store; otherwise all are part of the commit.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.token: str | None = None
        self.asked: Counter[str] = Counter()
        self.sent = 0
        self.knows_ranges = self.takes_large = True
        self.faults: dict[str, list[Fault]] = {}

    def fail(
        self,
        endpoint: str,
        status: int | str,
        *,
        times: float = float("inf"),
        after: int = 0,
        headers: dict[str, str] | None = None,
        body: dict[str, object] | None = None,
    ) -> None:
        """Let requests to an endpoint fail from now on, after `after` that do not."""
        assert endpoint in {name for _, name in ROUTES}
        after += self.asked[endpoint]
        fault = Fault(status, times, after, headers or {}, body or {"error": "no"})
        self.faults.setdefault(endpoint, []).append(fault)

    def fault(self, endpoint: str) -> Fault | None:
        for fault in self.faults.get(endpoint, []):
            if fault.after < self.asked[endpoint] <= fault.after + fault.times:
                return fault
        return None

    def add(self, repo_id: str, folder: Path, oid: str | None = None) -> Repo:
        """A public model repository with the files of a folder."""
        repo = self.repos[f"models/{repo_id}"] = Repo(private=False)
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        repo.commit(files, "first", oid)
        return repo


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: FakeHub

    def do_POST(self) -> None:
        self.handle_one()

    do_PUT = do_GET = do_HEAD = do_POST

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        matches = [(name, re.fullmatch(pattern, path)) for pattern, name in ROUTES]
        endpoint, found = next(((name, match) for name, match in matches if match), (None, None))
        if endpoint is None or found is None:
            self.reply(404, {"error": f"unknown path: {path}"})
            return
        hub = self.server
        hub.asked[endpoint] += 1
        fault = hub.fault(endpoint)
        size = int(self.headers["Content-Length"] or 0)
        if fault and fault.status == RESET:
            self.rfile.read(size // 2)
            self.reset()
            return
        body = self.rfile.read(size)
        authorized = self.headers["Authorization"] == f"Bearer {hub.token}"
        if fault:
            self.reply(int(fault.status), fault.body, fault.headers)
        elif endpoint != "put" and hub.token and not authorized:
            self.reply(401, {"error": "Invalid username or password."})
        else:
            try:
                getattr(self, f"on_{endpoint.replace('-', '_')}")(body, **found.groupdict())
            except Missing as error:
                self.reply(404, {"error": "not found"}, {"X-Error-Code": str(error)})

    def reset(self) -> None:
        """Break the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.wfile = self.rfile = open("/dev/null", "r+b", buffering=0)  # noqa: SIM115

    def reply(
        self, status: int, answer: dict | list | bytes, headers: dict[str, str] | None = None
    ) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        headers = headers or {}
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        if not isinstance(answer, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass

    def repo(self, kind: str, name: str) -> Repo:
        if f"{kind}/{name}" not in self.server.repos:
            raise Missing("RepoNotFound")
        return self.server.repos[f"{kind}/{name}"]

    def on_create(self, body: bytes) -> None:
        wanted = json.loads(body)
        kind, hub = f"{wanted.get('type', 'model')}s", self.server
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        url = f"{hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
        known = f"{kind}/{name}" in hub.repos
        if not known:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            hub.repos[f"{kind}/{name}"] = repo = Repo(private)
            repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.reply(409 if known else 200, {"url": url, "name": name, "id": name})

    def on_validate_yaml(self, body: bytes) -> None:
        self.reply(200, {"errors": [], "warnings": []})

    def on_preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name)
        files = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            large = self.server.takes_large and is_large(path, wanted["size"])
            mode, hash_of = ("lfs", sha256) if large else ("regular", git_hash)
            oid = hash_of(repo.files[path]) if path in repo.files else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": files})

    def on_batch(self, body: bytes, name: str) -> None:
        objects = json.loads(body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.server.store:
                upload = {"href": f"{self.server.url}/lfs/{wanted['oid']}"}
                wanted["actions"] = {"upload": upload}
        self.reply(200, {"transfer": "basic", "objects": objects})

    def on_put(self, body: bytes, oid: str) -> None:
        if sha256(body) != oid:
            self.reply(400, {"error": "wrong hash"})
            return
        self.server.store[oid] = body
        self.reply(200, {})

    def on_commit(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name)
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repo.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.store[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        oid = repo.commit(files, lines[0]["value"]["summary"])
        url = f"{self.server.url}/{name}/commit/{oid}"
        self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def on_info(self, body: bytes, kind: str, name: str, revision: str | None) -> None:
        repo = self.repo(kind, name)
        oid, files = repo.at(revision)
        siblings = [listed(file, content) for file, content in files.items()]
        known = {"id": name, "sha": oid, "private": repo.private, "tags": [], "downloads": 0}
        self.reply(200, {**known, "siblings": siblings})

    def on_tree(self, body: bytes, kind: str, name: str, revision: str, below: str | None) -> None:
        _, files = self.repo(kind, name).at(revision)
        found = [listed(file, files[file]) for file in files if file.startswith(below or "")]
        if not found:
            raise Missing("EntryNotFound")
        for entry in found:  # the same by other names
            entry |= {"type": "file", "path": entry.pop("rfilename"), "oid": entry.pop("blobId")}
            if "lfs" in entry:
                entry["lfs"]["oid"] = entry["lfs"].pop("sha256")
        self.reply(200, found)

    def on_resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        oid, files = self.repo("models", name).at(revision)
        if file not in files:
            raise Missing("EntryNotFound")
        content = files[file]
        hash_ = sha256(content) if is_large(file, len(content)) else git_hash(content)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{hash_}"'}
        if self.command == "HEAD":
            self.reply(200, b"", {**headers, "Content-Length": str(len(content))})
            return
        part, status = content, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if wanted and self.server.knows_ranges:
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            part, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.server.sent += len(part)
        self.reply(status, part, headers)


REPO = r"(?P<name>[^/]+/[^/]+)"
KIND = r"/api/(?P<kind>models|datasets)/"
ROUTES = [
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate-yaml"),
    (KIND + REPO + r"/preupload/(?P<revision>.+)", "preupload"),
    (KIND + REPO + r"/commit/(?P<revision>.+)", "commit"),
    (KIND + REPO + r"(?:/revision/(?P<revision>.+))?", "info"),
    (KIND + REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<below>.*))?", "tree"),
    (r"/(?:datasets/)?" + REPO + r"\.git/info/lfs/objects/batch", "batch"),
    (r"/lfs/(?P<oid>\w+)", "put"),
    (r"/" + REPO + r"/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
]


def is_large(file: str, size: int) -> bool:
    return size > LARGE or file.endswith((".safetensors", ".bin"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listed(file: str, content: bytes) -> dict[str, Any]:
    """A file in the list of a repository's files."""
    known: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": git_hash(content)}
    if not is_large(file, len(content)):
        return known
    pointer = {"size": len(content), "sha256": sha256(content), "pointerSize": 134}
    return {**known, "lfs": pointer}


@contextmanager
def running_hub(monkeypatch, cache: Path) -> Iterator[FakeHub]:
    """A hub that huggingface_hub and what builds on it take for the real one."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    server = FakeHub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        close_session()
