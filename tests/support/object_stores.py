"""Object storage for tests: fsspec's memory file system, one without atomic writes, and an S3 server on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

BUCKET = "shop"


class PlainFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A file system that fsspec knows, where a killed process leaves half of a file."""

    protocol = "plain"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("plain://"))


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """The memory file system, with requests that are counted and may fail.

    Attributes:
        requests: (method, path) of each request.
        fault: called with the method and the path before each request; it may raise.
    """

    protocol = "abfs"  # one of the object stores, whose own package is not installed
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    requests: list[tuple[str, str]] = []  # noqa: RUF012
    fault: Callable[[str, str], object] | None = None
    is_inside = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("abfs://", "memory://"))

    @contextmanager
    def _request(self, method: str, path: str) -> Iterator[None]:
        """One request, also if the memory file system calls others of its methods."""
        kind = type(self)
        if kind.is_inside:
            yield
            return
        kind.requests.append((method, path))
        if kind.fault is not None:
            kind.fault(method, path)
        kind.is_inside = True
        try:
            yield
        finally:
            kind.is_inside = False

    def cat_file(self, path: str, *args: Any, **options: Any) -> Any:
        with self._request("GET", path):
            return super().cat_file(path, *args, **options)

    def pipe_file(self, path: str, *args: Any, **options: Any) -> Any:
        with self._request("PUT", path):
            return super().pipe_file(path, *args, **options)

    def info(self, path: str, **options: Any) -> Any:
        with self._request("HEAD", path):
            return super().info(path, **options)

    def rm_file(self, path: str) -> Any:
        with self._request("DELETE", path):
            return super().rm_file(path)

    @classmethod
    @contextmanager
    def fresh(cls) -> Iterator[type[FaultyFileSystem]]:
        """An empty one without faults."""
        cls.store.clear()
        cls.requests.clear()
        cls.fault = None
        yield cls
        cls.fault = None


def register() -> None:
    """Let fsspec open plain:// and abfs://."""
    for files in (PlainFileSystem, FaultyFileSystem):
        fsspec.register_implementation(files.protocol, files, clobber=True)


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """An S3 server (moto) with the bucket `shop` on loopback. Yields its URL; fsspec finds it by the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (folder / "s3.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        _wait(url, server)
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT")).close()
        yield url
    finally:
        server.kill()
        server.wait()


def s3_environment(url: str) -> dict[str, str]:
    """What a process needs to use an S3 server."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**os.environ, **keys, "AWS_ENDPOINT_URL": url}


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, "the S3 server did not start"
            time.sleep(0.1)
    raise AssertionError("the S3 server does not answer")
