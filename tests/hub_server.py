"""A small Hugging Face for uploads: repositories in memory, over HTTP, as huggingface_hub speaks to it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
HANG = -1


@dataclass(frozen=True)
class File:
    """`raw` is None where the content came in Xet's blocks, which this server does not take apart."""

    size: int
    sha256: str
    raw: bytes | None

    @property
    def git(self) -> str | None:
        return None if self.raw is None else hashlib.sha1(b"blob %d\0%b" % (self.size, self.raw)).hexdigest()


def file(raw: bytes) -> File:
    return File(len(raw), hashlib.sha256(raw).hexdigest(), raw)


@dataclass
class Repository:
    """Its commits, each the files that it left by their names; the first one is that of its making."""

    private: bool
    commits: list[dict[str, File]] = field(default_factory=lambda: [{".gitattributes": file(b"filter=lfs")}])

    @property
    def files(self) -> dict[str, File]:
        return self.commits[-1]

    @property
    def head(self) -> str:
        return f"{len(self.commits) - 1:040x}"


@dataclass
class Hub:
    """`stored` are the large files that have arrived, by SHA-256; `asked` is what was requested.

    fails: a part of a path -> the status that requests for it are answered with; 0 breaks the connection, HANG keeps it
    open without an answer.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, File] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    fails: dict[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    lock: Lock = field(default_factory=Lock)
    closing: Event = field(default_factory=Event)

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Status and JSON."""
        if method == "PUT":
            self.stored[path.removeprefix("/store/")] = file(body)
            return 200, {}
        if path.startswith("/cas/v1/"):  # Xet's storage, in its first version
            known = {"xorbs": {"was_inserted": True}, "shards": {"result": 1}}.get(path.split("/")[3])
            return (200, known) if known else (404, {})
        if path.startswith("/cas/"):
            return 404, {}
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}
        said = json.loads(body) if body and "/commit/" not in path else {}
        if path == "/api/validate-yaml":
            bad = "broken: [" in said["content"]
            return (400, {"errors": [{"message": "not YAML"}]}) if bad else (200, {})
        if path == "/api/repos/create":
            owner, name = said["organization"], said["name"]
            if owner != "org":
                return 403, {"error": f'You don\'t have the rights to create a model under the namespace "{owner}".'}
            self.repositories[f"{owner}/{name}"] = Repository("private" in (said.get("visibility"), *said))
            return 200, {"url": f"{self.url}/{owner}/{name}"}
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
        repository = self.repositories.get(name)
        if repository is None:
            return 404, {"error": "Repository not found"}
        match path.split(name, 1)[1].strip("/").split("/"):
            case ["preupload", "main"]:
                return 200, {"files": [self._upload(repository, entry["path"]) for entry in said["files"]]}
            case ["xet-write-token", "main"]:
                return 200, {"accessToken": "short-lived", "exp": 1 << 33, "casUrl": f"{self.url}/cas"}
            case [".git", *_]:
                return 200, {"transfer": "basic", "objects": [self._large(entry) for entry in said["objects"]]}
            case ["commit", "main"]:
                return self._commit(name, [json.loads(line) for line in body.splitlines()])
            case ["revision", revision] if revision != "main":
                files = repository.commits[int(revision, 16)]
            case _:
                files = repository.files
        siblings = [{"rfilename": at, "size": held.size, "blobId": held.git} for at, held in files.items()]
        return 200, {"id": name, "sha": repository.head, "private": repository.private, "siblings": siblings}

    def _upload(self, repository: Repository, path: str) -> dict[str, Any]:
        large, held = path.endswith(".safetensors"), repository.files.get(path)
        oid = held and (held.sha256 if large else held.git)
        return {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": path in self.ignored,
            "oid": oid,
        }

    def _large(self, entry: dict[str, Any]) -> dict[str, Any]:
        href = {"upload": {"href": f"{self.url}/store/{entry['oid']}"}}
        return entry if entry["oid"] in self.stored else {**entry, "actions": href}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        repository = self.repositories[name]
        files = dict(repository.files)
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header" and value.get("parentCommit") != repository.head:
                return 412, {"error": "A commit has happened since."}
            if key == "file":
                files[value["path"]] = file(base64.b64decode(value["content"]))
            if key == "lfsFile":
                files[value["path"]] = self.stored.get(value["oid"], File(value["size"], value["oid"], None))
            if key == "deletedFile":
                del files[value["path"]]
        repository.commits.append(files)
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{repository.head}", "commitOid": repository.head}


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with hub.lock:
                hub.asked.append(f"{self.command} {path}")
                fails = [status for part, status in hub.fails.items() if part in path]
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                status, said = (fails[0], {}) if fails else hub.answer(self.command, path, body, token)
            if status == HANG:
                hub.closing.wait()
            if status <= 0:
                return self.connection.close()
            raw = json.dumps(said).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
