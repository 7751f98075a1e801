"""A stand-in for the Hugging Face hub: its HTTP API as far as a push uses it, with files in a folder."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

WRITES, READS = "hf_writes", "hf_reads"
"""Tokens: one may write, the other only read."""
LARGE = (".safetensors", ".png", ".bin")
"""What the hub stores as LFS."""


@dataclasses.dataclass
class HubServer:
    """A running stand-in; its repositories lie in ``root``."""

    root: Path
    cards: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Metadata of the cards of models that are there already."""
    dies_at: str = ""
    """A part of the address at which the server dies: it closes this connection, and answers none until it is empty."""
    forbids: str = ""
    """A part of the address at which it answers 403."""
    visibility: dict[str, str | None] = dataclasses.field(default_factory=dict)
    blobs: dict[str, bytes] = dataclasses.field(default_factory=dict)
    log: list[str] = dataclasses.field(default_factory=list)
    """Requests: method and address."""
    commits: list[str] = dataclasses.field(default_factory=list)
    """The message of each commit."""
    url: str = ""
    dead: bool = False

    def __enter__(self) -> HubServer:
        state = self

        class Handler(_Handler):
            hub = state

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def folder(self, repo_id: str) -> Path:
        """What has arrived in a repository."""
        return self.root / repo_id


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = self.path.partition("?")[0]
        self.hub.log.append(f"{method} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.dead or (self.hub.dies_at and self.hub.dies_at in path):
            self.hub.dead = True
            self.close_connection = True
            self.connection.close()
            return
        if self.hub.forbids and self.hub.forbids in path:
            self._answer({"error": "You don't have the rights to write under this namespace"}, 403)
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (WRITES, READS) and not path.startswith("/blobs/"):
            self._answer({"error": "Invalid username or password."}, 401)
            return
        for pattern, handle in (
            ("/api/whoami-v2", self._who),
            ("/api/repos/create", self._create),
            ("/api/validate-yaml", self._validate),
            (r"/api/models/([^/]+/[^/]+)", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/main", self._tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/main", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/blobs/(\w+)", self._blob),
        ):
            if found := re.fullmatch(pattern, path):
                handle(body, token, *found.groups())
                return
        self._answer({"error": f"no such address: {path}"}, 404)

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _who(self, body: bytes, token: str) -> None:
        role = "write" if token == WRITES else "read"
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self._answer({"type": "user", "name": "me", "orgs": [{"name": "team"}], "auth": auth})

    def _create(self, body: bytes, token: str) -> None:
        given = json.loads(body)
        repo_id = f"{given['organization'] or 'me'}/{given['name']}"
        there = self.hub.folder(repo_id).is_dir()
        if not there:
            self.hub.folder(repo_id).mkdir(parents=True)
            self.hub.visibility[repo_id] = given.get("visibility") or ("private" if given.get("private") else None)
        self._answer({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, 409 if there else 200)

    def _validate(self, body: bytes, token: str) -> None:
        try:
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        except (IndexError, yaml.YAMLError) as error:
            self._answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        self._answer({"errors": [], "warnings": []})

    def _info(self, body: bytes, token: str, repo_id: str) -> None:
        if repo_id in self.hub.cards:
            self._answer({"id": repo_id, "modelId": repo_id, "cardData": self.hub.cards[repo_id], "sha": "0" * 40})
        elif self.hub.folder(repo_id).is_dir():
            self._answer({"id": repo_id, "modelId": repo_id, "sha": "0" * 40})
        else:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def _tree(self, body: bytes, token: str, repo_id: str) -> None:
        root = self.hub.folder(repo_id)
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        self._answer(
            [
                {
                    "type": "file",
                    "oid": _git_oid(path.read_bytes()),
                    "size": path.stat().st_size,
                    "path": path.relative_to(root).as_posix(),
                }
                for path in files
            ]
        )

    def _preupload(self, body: bytes, token: str, repo_id: str) -> None:
        answers = []
        for one in json.loads(body)["files"]:
            mode = "lfs" if one["path"].endswith(LARGE) else "regular"
            there = self.hub.folder(repo_id) / one["path"]
            known = there.is_file() and mode == "regular"
            oid = _git_oid(there.read_bytes()) if known else None
            answers.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": answers})

    def _batch(self, body: bytes, token: str, repo_id: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/blobs/{one['oid']}", "header": {}}}
            objects.append({**one, **({} if one["oid"] in self.hub.blobs else {"actions": upload})})
        self._answer({"transfer": "basic", "objects": objects})

    def _blob(self, body: bytes, token: str, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._answer({})

    def _commit(self, body: bytes, token: str, repo_id: str) -> None:
        if token != WRITES:
            self._answer({"error": "Forbidden"}, 403)
            return
        lines = [json.loads(line) for line in body.splitlines()]
        root = self.hub.folder(repo_id)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "deletedFile":
                (root / value["path"]).unlink()
            else:
                small = line["key"] == "file"
                content = base64.b64decode(value["content"]) if small else self.hub.blobs[value["oid"]]
                (root / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                (root / value["path"]).write_bytes(content)
        self._answer({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{'1' * 40}", "commitOid": "1" * 40})


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
