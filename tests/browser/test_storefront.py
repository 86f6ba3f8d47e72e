"""The storefront in a real browser: `make test-browser`, which needs Chromium."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the serve extra")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the browser extra")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; set CHROMIUM to its path"),
]

from unidiff_sdk import Bundle, Catalog  # noqa: E402
from unidiff_sdk.datasets.synthetic import write_catalog  # noqa: E402
from unidiff_sdk.serve import ServerSettings, create_app  # noqa: E402
from unidiff_sdk.serve.settings import ApiKeys  # noqa: E402

KEY = "a-key-for-the-browser"
ITEMS = 60
SIZES = [(1280, 900), (390, 844)]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    folder = tmp_path_factory.mktemp("browser") / "products"
    write_catalog("fashion-woman", folder, n=ITEMS, seed=1, split="train")
    with Catalog(":memory:", bundle=Bundle.open("tiny", threads=1)) as opened:
        opened.add_folder(folder)
        yield opened


def serve(app: Any) -> Iterator[str]:
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address(catalog: Catalog) -> Iterator[str]:
    yield from serve(create_app(catalog, ServerSettings(allow_writes=True)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]} px")
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page at a size; at the end, the console must hold no error and the page no request to another host."""
    width, height = request.param
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if width < 800 else None
    )
    opened, errors, hosts = context.new_page(), [], set()
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda sent: hosts.add(sent.url.split("/")[2]) if "//" in sent.url else None)
    opened.goto(address)
    opened.wait_for_selector(".card img")
    yield opened
    assert errors == [] and hosts == {address.split("/")[2]}
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()


def captions(page: Any) -> list[str]:
    return [str(each) for each in page.locator("#results .card p").all_inner_texts()]


def search(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#status:has-text('results')")


def test_searching_shows_the_hits_of_the_catalog(page: Any, catalog: Catalog) -> None:
    search(page, "purple boots")
    assert captions(page) == [hit.text for hit in catalog.search("purple boots", limit=24)]
    assert "q=purple+boots" in page.url and page.title().startswith("purple boots")


def test_scrolling_loads_all_items_once(page: Any, catalog: Catalog) -> None:
    for _ in range(40):
        page.mouse.wheel(0, 4000)
        page.wait_for_timeout(100)
        if len(captions(page)) == ITEMS:
            break
    assert sorted(captions(page)) == sorted(hit.text for hit in catalog.browse(limit=ITEMS))


def test_suggestions_by_keyboard(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("orange dr", delay=20)
    page.wait_for_selector("#suggestions li")
    page.keyboard.press("ArrowDown")
    first = page.locator("#suggestions [aria-selected=true]").inner_text()
    page.keyboard.press("Enter")
    page.wait_for_selector("#status:has-text('results')")
    assert page.input_value("#text") == first == captions(page)[0]


def test_filters_links_and_the_back_button(page: Any, catalog: Catalog, address: str) -> None:
    if page.locator("#open-filters").is_visible():
        page.click("#open-filters")
    page.check("[data-filter='type=boots']")
    page.wait_for_url("**where=**")
    expected = [hit.text for hit in catalog.browse(where={"type": ["boots"]}, limit=24)]
    page.wait_for_selector(f"#results .card:nth-child({len(expected)}):last-child")
    assert captions(page) == expected
    link = page.url
    page.go_back()
    page.wait_for_selector("#results .card:nth-child(24)")
    page.goto(link)
    page.wait_for_selector(f"#results .card:nth-child({len(expected)}):last-child")
    assert captions(page) == expected and page.locator("[data-filter='type=boots']").is_checked()


def test_more_like_this_and_not_this(page: Any, catalog: Catalog) -> None:
    search(page, "boots")
    first, second = catalog.search("boots", limit=2)
    page.click(".card:nth-child(1) .tools button:nth-child(1)")
    page.wait_for_selector("#query button[aria-label^='Remove like']")
    page.wait_for_selector(f"#results .card >> nth=0 >> text={catalog.search('boots', like=first, limit=1)[0].text}")
    assert captions(page) == [hit.text for hit in catalog.search("boots", like=first, limit=24)]
    assert second.text in captions(page)


def test_integers_beyond_2_to_the_53_are_exact(browser: Any) -> None:
    ids = [2**53, 2**53 + 1, 2**63 - 1, -(2**63)]
    with Catalog(":memory:", bundle=Bundle.open("tiny", threads=1)) as catalog:
        images = [np.full((8, 8, 3), 60 * k, np.uint8) for k in range(len(ids))]
        catalog.add(images, [f"item {id}" for id in ids], ids, [{"gtins": [2**60 + 1]}] * len(ids))
        for address in serve(create_app(catalog)):
            context = browser.new_context()
            page = context.new_page()
            for id in ids:
                page.goto(address)
                page.click(f".card .frame[aria-label='Show item {id}']")
                assert f"id\n{id}\n" in page.locator("#item dl").inner_text()
                assert f"[{2**60 + 1}]" in page.locator("#item dl").inner_text()
                page.click("#item .primary")
                page.wait_for_selector("#status:has-text('results')")
                page.wait_for_selector(f"#query button[aria-label='Remove like {id}']")
                assert captions(page) == [hit.text for hit in catalog.search(like=id)]
            context.close()


def test_searching_by_an_image(page: Any, catalog: Catalog, tmp_path: Path) -> None:
    item = catalog.browse(limit=5)[4]
    (tmp_path / "x.png").write_bytes(item.image_bytes())
    page.set_input_files("#file", tmp_path / "x.png")
    page.wait_for_selector("#status:has-text('results')")
    assert captions(page)[0] == item.text
    page.fill("#text", "in red")
    page.press("#text", "Enter")
    page.wait_for_selector("#mix:not([hidden])")


def test_generating_with_previews_and_adding(page: Any, catalog: Catalog) -> None:
    before = len(catalog)
    page.click("#open-generate")
    page.fill("#prompt", "purple dotted boots")
    page.fill("#n", "1")
    page.fill("#seed", "7")
    page.click("#prompt-form button[type=submit]")
    page.wait_for_selector("#generated .tools", timeout=60_000)
    expected = catalog.generate("purple dotted boots", seed=7)[0]
    assert f"Score {expected.score:.3f}, seed 7" in page.locator("#generated").inner_text()
    page.click("text=Add to catalog")
    page.wait_for_selector("text=Added")
    assert len(catalog) == before + 1
    added = catalog.browse(where={"generated": True}, limit=1)[0]
    assert added.text == "purple dotted boots" and added.payload["seed"] == 7
    catalog.delete(added)


def test_varying_an_item_with_a_mask(page: Any) -> None:
    page.click(".card:nth-child(1) .frame")
    page.click("text=Vary it")
    page.wait_for_selector("#generate[open]")
    page.fill("#n", "1")
    page.fill("#steps", "4")
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 120, steps=5)
    page.mouse.up()
    with page.expect_request("**/v1/generate") as sent:
        page.click("#prompt-form button[type=submit]")
    asked = sent.value.post_data_json
    assert asked["mask"].startswith("data:image/png;base64,") and "strength" not in asked
    page.wait_for_selector("#generated .tools", timeout=60_000)


def test_captions_are_text_and_not_markup(page: Any, catalog: Catalog) -> None:
    text = '<img src=x onerror="document.title=1"> boots'
    catalog.update(catalog.browse(limit=1)[0], {"brand": "<b>bold</b>"})
    id = catalog.add(catalog.browse(limit=1)[0].image_bytes(), text, "markup")[0]
    search(page, text)
    assert text in captions(page) and page.title() != "1"
    catalog.delete(id)


def test_keys_are_asked_for(browser: Any, catalog: Catalog) -> None:
    for address in serve(create_app(catalog, ServerSettings(keys=ApiKeys({KEY: "read"})))):
        page = browser.new_page()
        page.goto(address)
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        page.wait_for_selector(".card img[src^='blob:']")
        page.close()
