"""The file `server.json` in the folder of a catalog, by which commands find the server that has the folder open."""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import read_regular_file
from unidiff_sdk._internal.json_values import parse_json
from unidiff_sdk.errors import StoreError

__all__ = ["FILE_NAME", "ServerFile"]

FILE_NAME = "server.json"
MAX_SIZE = 4096  # bytes
PROBE_SECONDS = 5.0
# A proxy would see the token, and could not reach this machine anyway.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class ServerFile:
    """The server that has a catalog open.

    Attributes:
        url: its address on this machine.
        token: the key of the routes under /v1/local. Only the user who started the server can read it.
        process: the id of its process.
    """

    url: str
    token: str = field(repr=False)
    process: int

    @staticmethod
    def new_token() -> str:
        """A new random token."""
        return secrets.token_urlsafe(32)

    @classmethod
    def find(cls, folder: Path) -> ServerFile | None:
        """Read the file in the folder of a catalog.

        Returns None if there is none, or if another user could have written or read it.
        """
        path = folder / FILE_NAME
        try:
            status = path.lstat()
            is_private = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077 and status.st_uid == os.geteuid()
            if not is_private:
                return None
            content = parse_json(read_regular_file(path, MAX_SIZE, StoreError), FILE_NAME, error=StoreError, kind=dict)
            return cls(str(content["url"]), str(content["token"]), int(content["process"]))
        except (OSError, StoreError, KeyError, TypeError, ValueError):
            return None  # the folder is in use all the same, and the error of the caller says so

    @contextmanager
    def written(self, folder: Path) -> Iterator[None]:
        """Keep the file in a folder while the block runs. A server that is killed leaves it behind.

        Raises StoreError if it cannot be written.
        """
        path, content = folder / FILE_NAME, {"url": self.url, "token": self.token, "process": self.process}
        try:
            descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{FILE_NAME}.")  # readable by its owner only
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file)
            os.replace(temporary, path)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror or error}.") from error
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()

    def answers(self) -> bool:
        """Whether the server is alive. The file of a server that was killed stays behind."""
        try:
            with self.request("/v1/local/info", timeout=PROBE_SECONDS):
                return True
        except OSError:  # urllib's errors, HTTP statuses included
            return False

    def request(self, path: str, body: Any = None, *, timeout: float) -> Any:
        """Send a request, a POST if there is a body, and return the response of urllib.

        Raises `urllib.error.HTTPError` for an error status, and OSError if there is no answer.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        return _opener.open(urllib.request.Request(self.url + path, data, headers), timeout=timeout)
