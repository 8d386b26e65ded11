"""A hub on this machine: as much of its protocol as an upload, and a download of what was uploaded, speak."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

TOKEN = "hf_ours"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Its state, for tests to read and to change.

    Attributes:
        repositories: Id → file → content.
        made: What creating each repository asked for.
        objects: sha256 → content of the large files.
        sent: sha256 of each large file that was sent, in turn.
        refusing: Repository → status with which its commits are answered.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.made: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.refusing: dict[str, int] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub(home: Path) -> Iterator[Hub]:
    """A hub that answers until the end of the block, and is the one that huggingface_hub knows.

    Args:
        home: Folder for what is downloaded.
    """
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        ours = {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        }
        away = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        kept = {"HF_HUB_CACHE": str(home), "HF_XET_CACHE": str(home), "HF_TOKEN_PATH": str(home / "token")}
        for name, value in {**ours, **away, **kept}.items():  # which are read from the environment at the first import
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", TOKEN)
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            ours = self.headers.get("authorization") == f"Bearer {TOKEN}"
            return self._json({"name": "me", "type": "user"}) if ours else self._json({"error": "Invalid token"}, 401)
        if self.path.startswith("/api/models/"):
            return self._files(*self.path.partition("?")[0].split("/")[3:6])
        return self._file()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._json(
                {"transfer": "basic", "objects": [self._batch(one) for one in json.loads(body)["objects"]]}
            )
        if "/preupload/" in self.path:
            files = [one["path"] for one in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith((".safetensors", ".png")) else "regular" for path in files}
            return self._json(
                {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
            )
        return self._commit([json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        content = self._body()
        found = hashlib.sha256(content).hexdigest()
        self.server.objects[found] = content
        self.server.sent.append(found)
        self._json({})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization', 'me')}/{asked['name']}"
        new = name not in self.server.repositories
        if new:
            self.server.repositories[name], self.server.made[name] = {}, asked
        self._json({"url": f"{self.server.address}/{name}"}, 200 if new else 409)

    def _batch(self, one: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.address}/objects/{one['oid']}"
        return one if one["oid"] in self.server.objects else {**one, "actions": {"upload": {"href": href}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        name = "/".join(self.path.split("/")[3:5])
        if name in self.server.refusing:
            return self._json({"error": "no room"}, self.server.refusing[name])
        files = self.server.repositories[name]
        for kind, value in ((line["key"], line["value"]) for line in lines):
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        return self._json({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _files(self, owner: str, name: str, what: str = "") -> None:
        files = self.server.repositories.get(f"{owner}/{name}")
        if files is None:
            return self._json({"error": "Repository not found"}, 404)
        if what == "tree":
            found = [{"type": "file", "path": path, "size": len(file), "oid": ""} for path, file in files.items()]
            return self._json(found)
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings})

    def _file(self) -> None:
        """``/me/model/resolve/COMMIT/FILE``."""
        owner, name, _, _, path = [*self.path.split("/", 5)[1:], "", "", "", ""][:5]
        content = self.server.repositories.get(f"{owner}/{name}", {}).get(path)
        if content is None:
            return self._json({"error": "Entry not found"}, 404, {"x-error-code": "EntryNotFound"})
        etag = {"etag": f'"{hashlib.sha256(content).hexdigest()}"', "x-repo-commit": COMMIT}
        return self._answer(content, 200, etag)

    def _json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(data).encode(), status, {"content-type": "application/json", **(headers or {})})

    def _answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))
