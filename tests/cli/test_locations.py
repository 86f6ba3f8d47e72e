"""Catalogs that commands find elsewhere: on a Qdrant server, and in a folder that `unidiff serve` has open."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from support.local_qdrant import URL, use_local_qdrant

from unidiff_sdk import Catalog
from unidiff_sdk.cli.locations.server_file import FILE_NAME, ServerFile
from unidiff_sdk.cli.main import main

ITEMS = 5


def run(*arguments: object) -> Result:
    return CliRunner(catch_exceptions=False).invoke(main, [str(argument) for argument in arguments])


def output(*arguments: object) -> Any:
    """What a command prints as JSON."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("locations") / "products"
    folder.mkdir()
    for n in range(ITEMS):
        Image.new("RGB", (32, 32), (40 * n, 90, 255 - 40 * n)).save(folder / f"{n}.png")
    rows = [{"id": n, "file_name": f"{n}.png", "text": f"shade {n}", "price": n} for n in range(ITEMS)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------------------ a Qdrant server


def test_every_command_takes_a_url(monkeypatch: pytest.MonkeyPatch, products: Path, toy: Path, tmp_path: Path) -> None:
    use_local_qdrant(monkeypatch)
    place = (URL, "--image-store", tmp_path / "images")
    assert output("index", products, *place, "--bundle", toy)["items"] == ITEMS
    assert output("info", *place)["items"] == ITEMS
    hits = output("search", *place, "shade", "--limit", 2, "--where", '{"price": {"gte": 3}}')["hits"]
    assert {hit["id"] for hit in hits} == {3, 4}
    output("duplicates", *place, "--threshold", 1)
    assert output("check", *place)["items"] == ITEMS
    assert output("export", *place, tmp_path / "shop.parquet")["items"] == ITEMS
    copy = (URL, "--image-store", tmp_path / "copy", "--collection", "copy")
    assert output("restore", tmp_path / "shop.parquet", *copy)["items"] == ITEMS
    assert output("delete", *copy, 3)["items"] == ITEMS - 1
    assert output("info", *place)["items"] == ITEMS, "the collections are separate"
    images = output("generate", *copy, "shade", "-n", 1, "--steps", 1, "-o", tmp_path / "out")
    assert images[0]["nearest"]["id"] in range(ITEMS)


def test_wrong_locations_are_refused(products: Path, tmp_path: Path) -> None:
    without = run("info", URL)
    assert without.exit_code == 2 and "--image-store FOLDER" in without.stderr
    folder = run("info", tmp_path / "shop.catalog", "--collection", "shop")
    assert folder.exit_code == 2 and "--collection: only for the URL" in folder.stderr
    password = run("index", products, "http://me:secret@shop.example", "--image-store", tmp_path / "images")
    assert password.exit_code == 2 and "secret" not in password.stderr
    missing = run("info", URL, "--image-store", tmp_path, "--qdrant-api-key-file", tmp_path / "none")
    assert missing.exit_code == 2 and "cannot be read" in missing.stderr


# ------------------------------------------------------------------------------------------------ a served folder


class Served:
    """A folder that a process of `unidiff serve` has open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "unidiff_sdk", "serve", str(folder), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert "Serving at http://127.0.0.1:" in self.process.stdout.readline()

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=30)
        return self.process.returncode


@pytest.fixture(scope="module")
def indexed(products: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("locations") / "shop.catalog"
    assert output("index", products, folder, "--bundle", toy)["items"] == ITEMS
    return folder


@pytest.fixture(scope="module")
def served(indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("fastapi", reason="needs the serve extra")
    served = Served(Path(shutil.copytree(indexed, tmp_path_factory.mktemp("served") / "shop.catalog")))
    yield served
    served.end(signal.SIGTERM)
    assert not (served.folder / FILE_NAME).exists(), "the server removes its file"


def test_info_is_answered_by_the_server(served: Served, indexed: Path) -> None:
    facts, plain = output("info", served.folder), output("info", indexed)
    assert facts["location"] == str(served.folder)
    del facts["location"], plain["location"], facts["bundle"]["path"], plain["bundle"]["path"]
    assert facts == plain


@pytest.mark.parametrize(
    "arguments",
    [
        ("shade", "--limit", "3"),
        ("--like", "2", "--unlike", "4"),
        ("shade", "--image", "IMAGE", "--weights", "0.3", "0.7", "--where", '{"price": {"lt": 3}}'),
        ("shade", "--group-by", "price", "--offset", "1", "--without", "shade 1"),
    ],
)
def test_search_is_answered_by_the_server(
    served: Served, indexed: Path, products: Path, arguments: tuple[str, ...]
) -> None:
    given = [str(products / "1.png") if each == "IMAGE" else each for each in arguments]
    page, plain = (output("search", folder, *given) for folder in (served.folder, indexed))
    del page["took_ms"], plain["took_ms"]
    assert page == plain


def test_pages_and_thumbnails_of_a_served_folder(served: Served) -> None:
    first = output("search", served.folder, "shade", "--limit", 2)
    second = output("search", served.folder, "shade", "--limit", 2, "--cursor", first["cursor"])
    assert not {hit["id"] for hit in first["hits"]} & {hit["id"] for hit in second["hits"]}
    shown = run("search", served.folder, "shade", "--limit", 1, "--thumbnails")
    assert "▀" in shown.stdout


def test_export_is_written_by_the_server(served: Served, indexed: Path, tmp_path: Path) -> None:
    file = tmp_path / "shop.parquet"
    assert output("export", served.folder, file, "--where", '{"price": {"gte": 1}}')["items"] == ITEMS - 1
    again = run("export", served.folder, file)
    assert again.exit_code == 1 and "--overwrite" in again.stderr
    output("export", served.folder, file, "--overwrite")
    with Catalog.restore(file) as restored, Catalog(indexed) as plain:
        assert restored.count() == plain.count() == ITEMS
        assert restored.get(2).image_bytes() == plain.get(2).image_bytes()


def test_other_commands_name_the_server(served: Served, products: Path) -> None:
    for arguments in (("delete", served.folder, "3"), ("index", products, served.folder), ("check", served.folder)):
        result = run(*arguments)
        assert result.exit_code == 1
        assert f"process {served.process.pid}" in result.stderr and "http://127.0.0.1:" in result.stderr


def test_invalid_arguments_keep_their_message(served: Served, tmp_path: Path) -> None:
    limit = run("search", served.folder, "shade", "--limit", 0)
    assert limit.exit_code == 2 and "limit" in limit.stderr
    id = run("search", served.folder, "--like", "none")
    assert id.exit_code == 2 and "'none'" in id.stderr
    key = run("search", served.folder, "shade", "--trusted-key", tmp_path / "key.pem")
    assert key.exit_code == 2 and "ignores --trusted-key" in key.stderr


def test_routes_of_the_owner_need_the_token(served: Served) -> None:
    import urllib.error
    import urllib.request

    server = ServerFile.find(served.folder)
    assert server is not None and server.answers()
    assert stat.S_IMODE((served.folder / FILE_NAME).stat().st_mode) == 0o600
    assert server.token not in repr(server)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.url}/v1/local/info", timeout=10)
    with urllib.request.urlopen(f"{server.url}/v1/openapi.json", timeout=10) as document:
        assert "/v1/local" not in document.read().decode()


def test_killed_server_leaves_no_lock(indexed: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs the serve extra")
    folder = Path(shutil.copytree(indexed, tmp_path / "shop.catalog"))
    served = Served(folder)
    served.end(signal.SIGKILL)
    assert (folder / FILE_NAME).exists()
    assert output("info", folder)["items"] == ITEMS
    with Catalog(folder):
        result = run("info", folder)
        assert result.exit_code == 1 and "process" in result.stderr, "the file names a server that is dead"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"url": "http://127.0.0.1:1"}', b"\xff", b"{" * 9000])
def test_damaged_files_are_ignored(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / FILE_NAME
    file.write_bytes(content)
    file.chmod(0o600)
    assert ServerFile.find(tmp_path) is None


def test_files_that_others_can_read_are_ignored(tmp_path: Path) -> None:
    server = ServerFile("http://127.0.0.1:1", ServerFile.new_token(), os.getpid())
    with server.written(tmp_path):
        assert ServerFile.find(tmp_path) == server
        (tmp_path / FILE_NAME).chmod(0o644)
        assert ServerFile.find(tmp_path) is None
    (tmp_path / "elsewhere").write_text(json.dumps({"url": server.url, "token": "t", "process": 1}))
    (tmp_path / "elsewhere").chmod(0o600)
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "elsewhere")
    assert ServerFile.find(tmp_path) is None
