"""Forked children: what the parent opened is refused at once, and stays as it is when the child ends."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.color_bundle import COLORS, color_image, make_color_bundle

from unidiff_sdk import Bundle, Catalog, StoreError
from unidiff_sdk.inference.encoder import Encoder

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

SECONDS = 20  # after which a child hangs
REFUSED, DONE, FAILED = 3, 0, 4


def in_child(act: Callable[[], Any]) -> int:
    """Run `act` in a forked child. Returns REFUSED for a StoreError about the fork, DONE, FAILED, or -1 if it hangs."""
    pid = os.fork()
    if pid == 0:
        code = FAILED
        try:
            act()
            code = DONE
        except StoreError as error:
            code = REFUSED if "forked child" in str(error) else FAILED
        finally:
            os._exit(code)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_color_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture
def catalog(tmp_path: Path, bundle: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        catalog.add([color_image(color) for color in COLORS], ids=list(COLORS))
        catalog.search("red")
        yield catalog


USES: dict[str, Callable[[Catalog], Any]] = {
    "search": lambda catalog: catalog.search("red"),
    "count": lambda catalog: catalog.count(),
    "browse": lambda catalog: catalog.browse(),
    "get": lambda catalog: catalog.get("red"),
    "add": lambda catalog: catalog.add(color_image("red"), ids="new"),
    "delete": lambda catalog: catalog.delete("red"),
    "optimize": lambda catalog: catalog.optimize(),
    "info": lambda catalog: catalog.info(),
    "generate": lambda catalog: catalog.generate("red", steps=1),
    "bundle": lambda catalog: catalog.bundle,
    "asearch": lambda catalog: asyncio.run(catalog.asearch("red")),
    "store": lambda catalog: catalog._opened.snapshot.store.count(),
    "store write": lambda catalog: catalog._opened.snapshot.store.delete([]),
}


@pytest.mark.parametrize("use", USES)
def test_catalog_of_the_parent_is_refused(catalog: Catalog, use: str) -> None:
    current = catalog._opened
    with current.lock, current._searcher_lock, current.snapshot._lock:  # as if other threads held them at the fork
        assert in_child(lambda: USES[use](catalog)) == REFUSED
    assert catalog.search("red")[0].id == "red" and catalog.count() == len(COLORS)


def test_bundle_of_the_parent_is_refused(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    encoder = Encoder(opened)
    encoder.encode_text("red")
    with opened._loading["text_encoder"], opened._loading["unet"]:  # as if other threads held them at the fork
        assert in_child(lambda: opened.session("text_encoder")) == REFUSED
        assert in_child(lambda: opened.load("unet", "vae_decoder")) == REFUSED
        assert in_child(lambda: encoder.encode_texts(["blue"])) == REFUSED
    session = opened.session("text_encoder")
    assert in_child(lambda: session.run({})) == REFUSED


def test_exit_of_a_child_keeps_the_images_of_the_parent(bundle: Path) -> None:
    with Catalog(":memory:", bundle) as catalog:
        catalog.add(color_image("red"), ids="red")
        finalizer = catalog._remove_temporary
        assert in_child(catalog.close) == DONE
        assert in_child(finalizer) == DONE  # as at the exit of an interpreter
        hit = catalog.get("red")
        assert hit is not None and hit.load_image().size == (40, 30)


def test_destroying_copies_in_a_child_does_not_wait(tmp_path: Path, bundle: Path) -> None:
    catalogs = [Catalog(tmp_path / "shop.catalog", bundle)]
    catalogs[0].add(color_image("red"), ids="red")

    def destroy() -> None:
        catalogs.clear()
        gc.collect()

    assert in_child(destroy) == DONE
    with catalogs[0] as catalog:
        catalog.add(color_image("blue"), ids="blue")
    with Catalog(tmp_path / "shop.catalog") as catalog:
        assert catalog.count() == 2


def test_parent_reopens_while_a_child_lives(tmp_path: Path, bundle: Path) -> None:
    catalog = Catalog(tmp_path / "shop.catalog", bundle)
    catalog.add(color_image("red"), ids="red")
    pid = os.fork()
    if pid == 0:
        time.sleep(SECONDS)
        os._exit(0)
    try:
        catalog.close()
        with Catalog(tmp_path / "shop.catalog") as again:
            assert again.count() == 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_child_uses_a_catalog_that_it_opens(tmp_path: Path, catalog: Catalog, bundle: Path) -> None:
    asyncio.run(catalog.asearch("red"))  # starts a thread of the pool, which the child lacks

    def use() -> None:
        with Catalog(tmp_path / "own.catalog", bundle) as own:
            own.add(color_image("red"), ids="red")
            assert asyncio.run(own.asearch("red"))[0].id == "red"

    assert in_child(use) == DONE
    with Catalog(tmp_path / "own.catalog", create=False) as own:
        assert own.count() == 1


# The child ends as an interpreter does, with exit handlers: its own, those of Python, and those of C libraries.
EXITING = """
import atexit, gc, os, sys
from unidiff_sdk import Catalog
from unidiff_sdk.inference.encoder import Encoder
location, bundle, how = sys.argv[1:]
catalog = Catalog(location, bundle)
catalog.add(bytes.fromhex(sys.stdin.read()), ids="red")
catalog.search("red")
if how == "closed":
    catalog.close()
child = os.fork()
if child == 0:
    atexit.register(lambda: print("handler"))
    if how == "deleted":
        del catalog
        gc.collect()
    if how == "own":
        with Catalog(":memory:", bundle) as own:
            own.search("red")
    print("child")
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(catalog) if how != "closed" else 1, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses on_exit of the GNU C library")
@pytest.mark.parametrize("how", ["idle", "closed", "deleted", "own"])
def test_child_ends_regularly_with_its_status(tmp_path: Path, bundle: Path, how: str) -> None:
    image = io.BytesIO()
    color_image("red").save(image, "PNG")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXITING, tmp_path / "shop.catalog", bundle, how],
        input=image.getvalue().hex(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout.split("\n") == ["child", "handler", "7 1", ""], run.stderr
