"""A stand-in for the Hugging Face hub on this machine: the requests of downloading and uploading a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

ROUTE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<action>revision|tree|preupload|commit)/(?P<revision>[^?]+)")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>[^?]+)")


class LoopbackHub:
    """Repositories in memory.

    Attributes:
        url: for HF_ENDPOINT.
        commits: by repository, the files of each commit, oldest first.
        private: of the repositories that were created here.
        requests: "METHOD path" of each request.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Add files to the newest ones, and return the commit."""
        before = list(self.commits.setdefault(repo, {}).values())
        files = (before[-1] if before else {}) | files
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[repo][sha] = files
        return sha

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits.get(repo, {})
        sha = next(reversed(commits), None) if revision == "main" else revision
        return (sha, commits[sha]) if sha in commits else None

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(f"{method} {path}")
        if path == "/api/repos/create":
            values = json.loads(body)
            repo = f"{values['organization']}/{values['name']}" if values.get("organization") else values["name"]
            self.private[repo] = values.get("visibility") == "private" or values.get("private") is True
            self.commits.setdefault(repo, {})
            return _json({"url": f"{self.url}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if route := ROUTE.match(path):
            return self._route(route["repo"], route["action"], unquote(route["revision"]), body)
        if (file := FILE.match(path)) and (found := self.files(file["repo"], file["revision"])):
            sha, files = found
            if (name := unquote(file["path"])) in files:
                return 200, {"X-Repo-Commit": sha, "ETag": f'"{_oid(files[name])}"'}, files[name]
        return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"

    def _route(self, repo: str, action: str, revision: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if action == "preupload":
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return _json({"files": [{"path": each["path"], **modes} for each in json.loads(body)["files"]]})
        if action == "commit":
            lines = map(json.loads, body.splitlines())
            values = [line["value"] for line in lines if line["key"] == "file"]
            sha = self.commit(repo, {value["path"]: base64.b64decode(value["content"]) for value in values})
            return _json({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"})
        found = self.files(repo, revision)
        if found is None:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        sha, files = found
        if action == "revision":
            return _json({"id": repo, "modelId": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        return _json(
            [{"type": "file", "path": n, "size": len(data), "oid": _oid(data)} for n, data in sorted(files.items())]
        )


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _oid(data: bytes) -> str:
    """The hash of git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A hub that answers within the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, content = hub.answer(self.command, self.path, body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = LoopbackHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
