"""A model hub on 127.0.0.1: the requests that huggingface_hub and datasets make, and its faults.

Repositories are dictionaries of files with a history of commits. What a test may switch: a private
or gated repository, a status instead of an answer (429, 503), files that break off, an account's
token. Every request is kept in `log`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_a_made_up_token_for_the_tests"  # noqa: S105 - no secret: the stub knows no other
LARGE = (".safetensors", ".parquet")  # kept as large files (LFS), named by their sha256


@dataclass
class Repo:
    """One repository: its commits (newest last), and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False  # the list of files is public, their content is not

    def commit(self, files: dict[str, bytes], tag: str | None = None) -> str:
        """Add a commit in which `files` replace those of the same name; returns its 40 digits."""
        tree = {**(self.commits[self.main] if self.commits else {}), **files}
        content = b"".join(name.encode() + tree[name] for name in sorted(tree))
        sha = hashlib.sha1(content + str(len(self.commits)).encode()).hexdigest()
        self.commits[sha] = tree
        if tag:
            self.tags[tag] = sha
        return sha

    @property
    def main(self) -> str:
        return [*self.commits][-1]

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit names."""
        if revision == "main":
            return self.main
        return revision if revision in self.commits else self.tags.get(revision)


class Request(NamedTuple):
    """One line of the log."""

    method: str
    path: str
    authorized: bool
    status: int


class StubHub:
    """The server; `url` is what HF_ENDPOINT takes."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.log: list[Request] = []
        self.status = 0  # answered to everything instead of an answer, if not 0
        self.broken: set[str] = set()  # files of which half comes, then the connection ends
        handler = type("Bound", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def add(self, kind: str, name: str, files: dict[str, bytes], **switches: bool) -> Repo:
        """A new repository ("models" or "datasets") with one commit."""
        repo = self.repos[kind, name] = Repo(**switches)
        repo.commit(files)
        return repo

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def etag(name: str, content: bytes) -> str:
    """The name of a file's content: git's for small files, the sha256 for large ones."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: StubHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass  # the log is the hub's

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        if self.hub.status:
            self._send(self.hub.status, b"not now", {"Retry-After": "1"})
            return
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\S+?))?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            self._api(*api.groups(), body)
        elif file:
            datasets, name, revision, inside = file.groups()
            self._file("datasets" if datasets else "models", name, revision, inside)
        else:
            self._refuse(404, "EntryNotFound")

    def _repo(self, kind: str, name: str, content: bool) -> Repo | None:
        """The repository, if this request may read it; else the refusal was sent."""
        sent = self.headers.get("Authorization")
        repo = self.hub.repos.get((kind, name))
        known = sent == f"Bearer {TOKEN}"
        if sent and not known:
            message = "Invalid credentials in Authorization header"
            self._send(401, b"{}", {"X-Error-Message": message})
        elif repo is None or (repo.private and not known):
            # Who sends no token is not told whether there is such a repository.
            self._refuse(404 if known else 401, "RepoNotFound")
        elif repo.gated and content and not known:
            self._refuse(401, "GatedRepo")
        else:
            return repo
        return None

    def _api(self, kind: str, name: str, rest: str | None, body: str) -> None:
        repo = self._repo(kind, name, content=False)
        if repo is None:
            return
        what, _, tail = (rest or "revision/main").partition("/")
        revision, _, inside = tail.partition("/")
        sha = repo.resolve(revision)
        if sha is None:
            self._refuse(404, "RevisionNotFound")
            return
        tree = repo.commits[sha]
        if what == "revision":
            siblings = [{"rfilename": file} for file in tree]
            answer = {"id": name, "sha": sha, "private": repo.private, "siblings": siblings}
            self._json({**answer, "gated": "auto" if repo.gated else False, "tags": []})
        elif what == "paths-info":
            paths = parse_qs(body)["paths"] if "=" in body else json.loads(body)["paths"]
            found = [entry for entry in entries(tree, "", True) if entry["path"] in paths]
            self._json(found)
        elif what == "tree":
            deep = "recursive=true" in self.path.lower()
            self._json(entries(tree, inside, deep))
        else:
            self._refuse(404, "EntryNotFound")

    def _file(self, kind: str, name: str, revision: str, inside: str) -> None:
        repo = self._repo(kind, name, content=True)
        if repo is None:
            return
        sha = repo.resolve(revision)
        if sha is None:
            self._refuse(404, "RevisionNotFound")
            return
        content = repo.commits[sha].get(inside)
        headers = {"X-Repo-Commit": sha}
        if content is None:
            self._refuse(404, "EntryNotFound", headers)
            return
        headers |= {"ETag": f'"{etag(inside, content)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status, part = 200, content
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            status, part = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        self._send(status, part, headers, breaks=inside in self.hub.broken)

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b'{"error": "refused"}', {"X-Error-Code": code, **(headers or {})})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], breaks: bool = False
    ) -> None:
        authorized = "Authorization" in self.headers
        self.hub.log.append(Request(self.command, self.path, authorized, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if breaks else content)
        self.close_connection = breaks


def entries(tree: dict[str, bytes], inside: str, deep: bool) -> list[dict]:
    """Files and folders in a folder of a commit, as the hub lists them."""
    prefix = f"{inside}/" if inside else ""
    files, folders = [], {}
    for name, content in tree.items():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if deep else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            folders[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
        if deep or len(parts) == 1:
            entry = {"type": "file", "path": name, "size": len(content), "oid": etag(name, content)}
            if name.endswith(LARGE):
                entry["oid"] = hashlib.sha1(content).hexdigest()
                entry["lfs"] = {"oid": etag(name, content), "size": len(content), "pointerSize": 1}
            files.append(entry)
    return [*folders.values(), *files]
