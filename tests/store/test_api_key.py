"""The key of a server is sent, but never shown: in representations, errors, tracebacks, logs, pickles and URLs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import rich.console
import rich.traceback
from click.testing import CliRunner
from support.misbehaving_server import MisbehavingServer

from unidiff_sdk import Catalog, OptionError, ServerOptions, StoreError
from unidiff_sdk._internal.text import Secret, redact_url
from unidiff_sdk.cli.main import main
from unidiff_sdk.store.location import Location

MARK = "".join(["s3", "cr3t"])  # put together, because tracebacks show the lines of this file


def key() -> str:
    """The key, returned by a function so that no local variable of a test shows it."""
    return f"{MARK}-" * 20  # longer than the 80 characters at which tracebacks cut


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    server = MisbehavingServer()
    yield server
    server.stop()


def shown(error: BaseException) -> str:
    """An error as tracebacks with local variables show it."""
    text = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    console = rich.console.Console(file=io.StringIO(), width=400)
    trace = rich.traceback.Traceback.from_exception(
        type(error), error, error.__traceback__, show_locals=True, locals_max_string=10_000, locals_max_length=1000
    )
    console.print(trace)
    return text + console.file.getvalue()  # type: ignore[attr-defined]


def test_location_hides_the_key() -> None:
    location = Location(Path("images"), None, "https://host:6333", api_key=key())
    texts = [repr(location), str(location), f"{location}", repr(asdict(location)), f"{location.api_key:>8}"]
    texts += [json.dumps(repr(deepcopy(location))), repr(location.api_key[:60] if location.api_key else "")]
    assert not [text for text in texts if MARK in text]
    assert location.api_key == key() and location.api_key.encode() == key().encode()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(location, protocol)
    assert Secret.of(None) is None and Location(Path("images")).api_key is None


@pytest.mark.parametrize("fault", [503, "reset", 500, 403])
def test_failures_do_not_show_the_key(
    server: MisbehavingServer, toy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: int | str
) -> None:
    caplog.set_level(logging.DEBUG)
    images, options = tmp_path / "images", ServerOptions(retries=1, timeout=2)
    server.faults = [fault] * 2
    with pytest.raises(StoreError) as opening:
        Catalog(server.url, toy, images=images, api_key=key(), server=options)
    server.faults = []
    with Catalog(server.url, toy, images=images, api_key=key(), server=options) as catalog:
        assert MARK not in repr(catalog) + json.dumps(catalog.info()) + repr(vars(catalog))
        server.faults = [fault] * 2
        with pytest.raises(StoreError) as counting:
            catalog.count()
    server.faults = []
    for caught in (opening, counting):
        assert MARK not in shown(caught.value)
    assert MARK not in "".join(map(repr, caplog.messages))
    assert {headers.get("api-key") for *_, headers in server.requests} == {key()}


def test_other_ways_to_open_hide_the_key_too(tmp_path: Path) -> None:
    options = ServerOptions(retries=0, timeout=1)

    async def open_async() -> None:
        await Catalog.aopen("http://127.0.0.1:9", "tiny", images=tmp_path, api_key=key(), server=options)

    def restore() -> None:
        Catalog.restore(tmp_path / "none.parquet", "http://127.0.0.1:9", images=tmp_path, api_key=key())

    ways: list[Callable[[], object]] = [lambda: asyncio.run(open_async()), restore]
    for way in ways:
        with pytest.raises(Exception) as caught:
            way()
        assert MARK not in shown(caught.value)


URLS = [
    "https://user:s3cr3t@host:6333",
    "https://s3cr3t@host",
    "HTTPS://a:b@s3cr3t@host/path",
    "http://host:6333/?api_key=s3cr3t",
    "http://host?token=s3cr3t&x=1#y",
    "http://host#s3cr3t",
]


@pytest.mark.parametrize("url", URLS)
def test_url_with_credentials_is_refused_without_showing_them(url: str, tmp_path: Path) -> None:
    assert "s3cr3t" not in redact_url(url)
    for open_url in (lambda: Catalog(url, images=tmp_path), lambda: Location(tmp_path, url=url)):
        with pytest.raises((OptionError, StoreError)) as caught:
            open_url()
        assert "s3cr3t" not in str(caught.value) and "api_key=" in str(caught.value)
    result = CliRunner().invoke(main, ["info", url])
    assert result.exit_code == 2 and "s3cr3t" not in result.output


@pytest.mark.parametrize("url", ["http://host:port", "http://host:99999999", "http://", "http://[::1"])
def test_invalid_url_is_an_error_that_shows_no_key(url: str, tmp_path: Path) -> None:
    options = ServerOptions(retries=0, timeout=1)
    with pytest.raises(StoreError) as caught:
        Catalog(url, images=tmp_path, api_key=key(), server=options)
    assert MARK not in shown(caught.value)


def test_other_schemes_are_not_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("ftp://u:s3cr3t@host", "qdrant://host", "file:///catalog"):
        with pytest.raises(OptionError, match="has the scheme") as caught:
            Catalog(url, images=tmp_path / "images")
        assert "s3cr3t" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_plain_urls_are_unchanged() -> None:
    for url in ("http://localhost:6333", "https://host/prefix/a@b", "http://[::1]:6333/"):
        assert redact_url(url) == url
