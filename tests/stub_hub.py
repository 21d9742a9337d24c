"""A model hub on 127.0.0.1: the requests that huggingface_hub and datasets make, and its faults.

Repositories are dictionaries of files with a history of commits. What a test may switch: a private
or gated repository, a status instead of an answer (429, 503), files that break off, an account's
token. It takes uploads too (repository, metadata, large files, commit, visibility), for whoever has
the token. Every request is kept in `log`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_a_made_up_token_for_the_tests"  # noqa: S105 - no secret: the stub knows no other
LARGE = (
    ".safetensors",
    ".parquet",
    ".task",
    ".litertlm",
)  # kept as large files (LFS), named by their sha256


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
        self.reset()
        handler = type("Bound", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """A hub without repositories and faults, at the same address."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.log: list[Request] = []
        self.status = 0  # answered to everything instead of an answer, if not 0
        self.broken: set[str] = set()  # files of which half comes, then the connection ends
        self.may_write = True  # what the token's account may
        self.objects: dict[str, bytes] = {}  # large files by sha256
        self.alters: set[str] = set()  # files that are stored with a bit of their own
        self.refuses: dict[str, int] = {}  # part of a path -> status, for a part of an upload

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

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        pass  # the log is the hub's

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        if self.hub.status:
            self._send(self.hub.status, b"not now", {"Retry-After": "1"})
            return
        path = unquote(urlsplit(self.path).path)
        if self._upload(path, content):
            return
        body = content.decode()
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\S+?))?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            self._api(*api.groups(), body)
        elif file:
            datasets, name, revision, inside = file.groups()
            self._file("datasets" if datasets else "models", name, revision, inside)
        else:
            self._refuse(404, "EntryNotFound")

    def _upload(self, path: str, content: bytes) -> bool:
        """Answer a request that is a part of an upload; False for any other."""
        routes = {
            r"/api/whoami-v2": self._whoami,
            r"/api/validate-yaml": self._validate,
            r"/api/repos/create": self._create,
            r"/api/models/([^/]+/[^/]+)/preupload/main": self._preupload,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"/objects/(\w+)": self._store,
            r"/api/models/([^/]+/[^/]+)/commit/main": self._commit,
            r"/api/models/([^/]+/[^/]+)/settings": self._settings,
        }
        for route, answer in routes.items():
            if found := re.fullmatch(route, path):
                status = next((s for p, s in self.hub.refuses.items() if p in path), 0)
                known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if not (known or "/objects/" in path or "validate" in path):
                    self._refuse(401, "Unauthorized")
                elif status or not (self.hub.may_write or "whoami" in path):
                    self._refuse(status or 403, "Forbidden")
                else:
                    answer(content, *found.groups())
                return True
        return False

    def _whoami(self, content: bytes) -> None:
        self._json({"type": "user", "name": "me", "auth": {}})

    def _validate(self, content: bytes) -> None:
        """The rules of cards that matter here: a licence of the list, an index with numbers."""
        text = json.loads(content)["content"]
        errors = []
        data = yaml.safe_load(text.split("---")[1]) if text.startswith("---\n") else {}
        if data.get("license") not in ("mit", "apache-2.0", "other", "unknown"):
            errors.append("license must be one of the list")
        for model in data.get("model-index", []):
            for entry in model["results"]:
                numbers = [metric["value"] for metric in entry["metrics"]]
                if not numbers or not all(isinstance(number, (int, float)) for number in numbers):
                    errors.append("metrics need values")
        answer = {"errors": [{"message": e} for e in errors], "warnings": []}
        self._send(400 if errors else 200, json.dumps(answer).encode(), {})

    def _create(self, content: bytes) -> None:
        asked = json.loads(content)
        name = f"{asked['organization']}/{asked['name']}"
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.hub.add("models", name, {".gitattributes": b""}, private=private)
        self._json({"url": f"{self.hub.url}/{name}"})

    def _preupload(self, content: bytes, name: str) -> None:
        tree = self.hub.repos["models", name]
        there = tree.commits[tree.main]
        files = []
        for file in json.loads(content)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            oid = etag(path, there[path]) if path in there else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _batch(self, content: bytes, name: str) -> None:
        objects = []
        for wanted in json.loads(content)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}
            known = wanted["oid"] in self.hub.objects
            objects.append({**wanted, **({} if known else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, content: bytes, oid: str) -> None:
        self.hub.objects[oid] = content
        self._json({})

    def _commit(self, content: bytes, name: str) -> None:
        files = {}
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        for path in self.hub.alters & {*files}:
            files[path] += b" "
        sha = self.hub.repos["models", name].commit(files)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self._json({"commitOid": sha, "commitUrl": url, "success": True})

    def _settings(self, content: bytes, name: str) -> None:
        asked = json.loads(content)
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repos["models", name].private = private
        self._json({"private": private})

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
