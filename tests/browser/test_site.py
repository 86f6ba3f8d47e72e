"""The page of `unidiff web` in a real browser, against Python: `make test-browser`, which needs Chromium."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="needs the browser extra")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")

from unidiff_sdk import Bundle, Catalog  # noqa: E402
from unidiff_sdk.cli.servers.site.writer import PAGE, SiteOptions, write_site  # noqa: E402
from unidiff_sdk.datasets.synthetic import write_catalog  # noqa: E402
from unidiff_sdk.generation.generator import Generator  # noqa: E402
from unidiff_sdk.inference.encoder import Encoder  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; set CHROMIUM to its path"),
    pytest.mark.skipif(not (PAGE / "index.html").is_file(), reason="needs the built page: make web"),
]

ITEMS = 60
MARKUP = '<img src=x onerror="document.title=1"> boots'
MEASURE_AT_ONCE = "--enable-blink-features=ForceEagerMeasureMemory"
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
TIMEOUT = 120_000  # ms; the graphs load and run on one thread of a shared machine

# Calls of the worker without the page: `await ask("embedText", ["a dress"])`.
ASK = """async ([script, calls]) => {
  const worker = new Worker(script, { type: "module" });
  const ask = (id, method, args) => new Promise((resolve, reject) => {
    worker.addEventListener("message", ({ data }) => {
      if (data.id !== id || "event" in data) return;
      if (data.error) reject(new Error(data.error.message)); else resolve(data.result);
    });
    worker.postMessage({ id, method, args });
  });
  const engine = new URLSearchParams(location.search).get("engine");
  const results = [await ask(0, "start", [new URL("./", location.href).href, engine])];
  for (const [method, args] of calls) {
    const given = args.map((each) => each?.pixels ? { ...each, data: Uint8Array.from(each.pixels) } : each);
    if (given[0]?.latents) given[0].latents = Float32Array.from(given[0].latents);
    const result = await ask(results.length, method, given);
    const imageOf = (each) => ({ ...each, image: [...each.image.data] });
    const plain = (value) => ArrayBuffer.isView(value) ? [...value] : value;
    results.push(Array.isArray(result) ? result.map(imageOf) : plain(result));
  }
  worker.terminate();
  return results;
}"""


def export(folder: Path, precision: str) -> Bundle:
    """The base of the built-in model, exported for the browser."""
    pytest.importorskip("onnxscript", reason="needs the export extra")
    from unidiff_export.exporter import export_bundle

    path = export_bundle("tiny", folder / f"web-{precision}", target="web", precision=precision).path
    return Bundle.open(path, threads=1)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    folder = tmp_path_factory.mktemp("site") / "products"
    write_catalog("fashion-woman", folder, n=ITEMS, seed=1, split="train")
    with Catalog(":memory:", bundle=Bundle.open("tiny", threads=1)) as opened:
        opened.add_folder(folder)
        opened.add(opened.browse(limit=1)[0].image_bytes(), MARKUP, "markup", {"brand": "<b>bold</b>"})
        yield opened


def write(catalog: Catalog, out: Path, bundle: Bundle | None = None, **options: Any) -> Path:
    return write_site(catalog.parts(), out, SiteOptions("Shop", **options), bundle).path


@pytest.fixture(scope="module")
def site(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site with the bundle of the catalog."""
    return write(catalog, tmp_path_factory.mktemp("built-in") / "site", rerank=True)


@pytest.fixture(scope="module")
def web_site(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site with a bundle for the browser and int8 vectors."""
    folder = tmp_path_factory.mktemp("web")
    return write(catalog, folder / "site", export(folder, "fp32"), int8=True)


@contextmanager
def served(folder: Path, headers: dict[str, str] | None = None) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", MEASURE_AT_ONCE, *SOFTWARE_GPU])


class Visit:
    """A page, and what it asked for and complained about."""

    def __init__(self, browser: Any, address: str, size: tuple[int, int] = (1280, 900)) -> None:
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        self.context.set_default_timeout(TIMEOUT)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.context.on("request", lambda sent: self.requests.append(sent.url))
        self.page.goto(address)

    def ready(self) -> Any:
        """The page, once everything is loaded."""
        self.page.wait_for_selector(".card img[src^='blob:']")
        self.page.wait_for_selector("#offline:has-text('Works offline')")
        return self.page

    def hosts(self) -> set[str]:
        return {url.split("/")[2] for url in self.requests if url.startswith("http")}


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def visit(browser: Any, site: Path, request: pytest.FixtureRequest) -> Iterator[Visit]:
    with served(site) as address:
        visit = Visit(browser, address, request.param)
        page = visit.ready()
        yield visit
        assert visit.errors == []
        assert visit.hosts() == {address.split("/")[2]}  # no third party
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        visit.context.close()


def captions(page: Any) -> list[str]:
    return [str(each) for each in page.locator("#results .card p").all_inner_texts()]


def search(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_function("text => document.title.startsWith(text)", arg=text)
    page.wait_for_selector("#status:has-text('results in')")


def ask(page: Any, site: Path, *calls: tuple[str, list[Any]]) -> list[Any]:
    """The results of the worker's methods, after its description of itself."""
    script = next((site / "assets").glob("worker-*.js"))
    results: list[Any] = page.evaluate(ASK, [f"assets/{script.name}", [list(call) for call in calls]])
    return results


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.mean((a.astype(float) - b.astype(float)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


# ------------------------------------------------------------------------------------------------ the model


TEXTS = ["a red dress", "  größe ÉCLAIR 👗 ", "long " * 60, ""]
PROMPT, SEED, STEPS, GUIDANCE = "purple dotted boots", 7, 6, 5.0


class Computed:
    """What the worker of a site computes of texts, of an image, and from latents or a seed; and the same in Python."""

    def __init__(self, browser: Any, site: Path, headers: dict[str, str] | None = None) -> None:
        rng = np.random.default_rng(0)
        self.image = Image.fromarray(rng.integers(0, 256, (90, 140, 3), dtype=np.uint8))
        latents = rng.standard_normal((1, 4, 16, 16), dtype=np.float32)
        self.starts: list[dict[str, Any]] = [{"sampler": "dpm++2m", "latents": latents}, {"sampler": "euler_a"}]
        options = {"prompt": PROMPT, "negative_prompt": "", "n": 1, "seed": SEED, "steps": STEPS}
        plain = [self.starts[0] | {"latents": latents.ravel().tolist()}, self.starts[1]]
        pixels = {"width": 140, "height": 90, "pixels": np.asarray(self.image).ravel().tolist()}
        with served(site, headers) as address:
            visit = Visit(browser, address + "?engine=wasm")
            self.info, *results = ask(
                visit.page,
                site,
                *(("embedText", [text]) for text in TEXTS),
                ("embedImage", [pixels]),
                *(("generate", [options | {"guidance_scale": GUIDANCE} | start]) for start in plain),
            )
            visit.context.close()
        self.embeddings, generated = results[: len(TEXTS) + 1], results[len(TEXTS) + 1 :]
        self.images = [np.array(result[0]["image"]).reshape(64, 64, 3) for result in generated]
        self.scores = [result[0]["score"] for result in generated]

    def cosine(self, bundle: Bundle) -> float:
        """The lowest one of an embedding and that of a bundle in Python."""
        encoder = Encoder(bundle)
        expected = [*encoder.encode_texts(TEXTS), encoder.encode_images([self.image])[0]]
        return min(float(np.dot(mine, theirs)) for mine, theirs in zip(self.embeddings, expected, strict=True))

    def check_images(self, bundle: Bundle, decibels: float, tolerance: float = 0.01) -> None:
        """Compare images and their scores with those of a bundle in Python."""
        generator, encoder = Generator(bundle), Encoder(bundle)
        for mine, score, start in zip(self.images, self.scores, self.starts, strict=True):
            (image,) = generator.generate(PROMPT, seed=SEED, steps=STEPS, guidance_scale=GUIDANCE, **start)
            assert psnr(mine, np.asarray(image)) >= decibels
            expected = float(encoder.encode_images([image])[0] @ encoder.encode_text(PROMPT))
            assert score == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("name", ["site", "web_site"])
@pytest.mark.parametrize("headers", [None, ISOLATED], ids=["one-thread", "threads"])
def test_embeddings_and_images_are_those_of_python(
    browser: Any, catalog: Catalog, name: str, headers: dict[str, str] | None, request: pytest.FixtureRequest
) -> None:
    computed = Computed(browser, request.getfixturevalue(name), headers)
    threads = min(4, os.cpu_count() or 1) if headers else 1
    assert computed.info["engine"] == f"WebAssembly, {threads} thread{'s' if threads > 1 else ''}"
    assert computed.cosine(catalog.bundle) >= 0.9999
    computed.check_images(catalog.bundle, decibels=40)


@pytest.mark.parametrize(("precision", "decibels", "score"), [("fp16", 40, 0.01), ("int8", 25, 0.03)])
def test_bundles_of_less_precision_compute_the_same_as_in_python(
    browser: Any, catalog: Catalog, tmp_path: Path, precision: str, decibels: float, score: float
) -> None:
    """Embeddings are those of the same bundle. Images are as near to those in fp32 as the export requires of int8."""
    bundle = export(tmp_path, precision)
    computed = Computed(browser, write(catalog, tmp_path / "site", bundle))
    assert computed.info["model"].endswith(f", {precision}")
    assert computed.cosine(bundle) >= 0.9999
    computed.check_images(catalog.bundle, decibels, score)


def test_webgpu_computes_the_same_as_wasm(browser: Any, catalog: Catalog, web_site: Path) -> None:
    """On a software adapter: this shows that the operators run and are right, and nothing about speed."""
    image = catalog.browse(limit=1)[0]
    rgb = image.load_image()
    pixels = {"width": rgb.width, "height": rgb.height, "pixels": np.asarray(rgb).ravel().tolist()}
    with served(web_site) as address:
        visit = Visit(browser, address + "?engine=webgpu")
        if not visit.page.evaluate("navigator.gpu?.requestAdapter().then(Boolean) ?? false"):
            pytest.skip("this Chromium has no WebGPU adapter")
        info, text, embedding = ask(visit.page, web_site, ("embedText", ["a red dress"]), ("embedImage", [pixels]))
        visit.context.close()
    assert info["engine"] == "WebGPU"
    encoder = Encoder(catalog.bundle)
    assert float(np.dot(text, encoder.encode_text("a red dress"))) >= 0.9999
    assert float(np.dot(embedding, encoder.encode_images([rgb])[0])) >= 0.9999


def test_reranking_is_that_of_python(browser: Any, catalog: Catalog, site: Path) -> None:
    text = "a long red dress with white stripes"
    with served(site) as address:
        visit = Visit(browser, address)
        _, page = ask(visit.page, site, ("search", [{"text": text, "limit": 12, "offset": 0, "rerank": True}]))
        visit.context.close()
    candidates = catalog.bundle.manifest.rerank.candidates  # type: ignore[union-attr]
    expected = catalog.search(text, limit=12, rerank=candidates)
    assert [hit["id"] for hit in page["hits"]] == [hit.id for hit in expected]
    for hit, theirs in zip(page["hits"][:candidates], expected, strict=False):
        assert hit["gain"] == pytest.approx(theirs.gain, abs=1e-3)


# ------------------------------------------------------------------------------------------------ the page


def test_searching_filtering_and_paging_as_in_python(visit: Visit, catalog: Catalog) -> None:
    page = visit.page
    assert captions(page) == [hit.text for hit in catalog.browse(limit=24)]
    search(page, "purple boots")
    assert captions(page) == [hit.text for hit in catalog.search("purple boots", limit=24)]
    if page.locator("#open-filters").is_visible():
        page.click("#open-filters")
    page.check("[data-filter='type=boots']")
    page.wait_for_url("**where=**")
    expected = [hit.text for hit in catalog.search("purple boots", where={"type": ["boots"]}, limit=24)]
    page.wait_for_selector(f"#results .card:nth-child({len(expected)}):last-child")
    assert captions(page) == expected
    page.go_back()
    page.wait_for_selector("#results .card:nth-child(24)")


def test_queries_of_several_parts_as_in_python(visit: Visit, catalog: Catalog, tmp_path: Path) -> None:
    page = visit.page
    search(page, "boots")
    first, second = catalog.search("boots", limit=2)
    page.click(".card:nth-child(1) .tools button:nth-child(1)")
    expected = [hit.text for hit in catalog.search("boots", like=first, limit=24)]
    page.wait_for_function("text => document.querySelector('#results .card p').innerText === text", arg=expected[0])
    assert captions(page) == expected and second.text in expected
    page.click("#query button[aria-label^='Remove like']")
    page.wait_for_selector("#query button", state="detached")
    page.fill("#text", "")
    page.press("#text", "Enter")
    item = catalog.browse(limit=5)[4]
    (tmp_path / "x.png").write_bytes(item.image_bytes())
    page.set_input_files("#file", tmp_path / "x.png")
    page.wait_for_selector("#status:has-text('results in')")
    assert captions(page)[0] == item.text


def test_generating_with_previews_and_finding_similar(visit: Visit, catalog: Catalog) -> None:
    page = visit.page
    page.click("#open-generate")
    page.fill("#prompt", "purple dotted boots")
    page.fill("#n", "2")
    page.fill("#seed", "7")
    page.click("#prompt-form button[type=submit]")
    page.wait_for_selector("#generated canvas")  # a preview
    page.wait_for_selector("#generated .tools")
    expected = sorted(catalog.generate("purple dotted boots", seed=7, n=2), key=lambda image: -image.score)
    shown = page.locator("#generated p").all_inner_texts()
    assert shown == [f"Score {image.score:.3f}, seed {image.seed}" for image in expected]
    page.click("#generated .tools button >> nth=0")
    page.wait_for_selector("#status:has-text('results in')")
    assert "boots" in captions(page)[0]


def test_captions_are_text_and_not_markup(visit: Visit) -> None:
    page = visit.page
    search(page, MARKUP)
    assert MARKUP in captions(page) and "onerror" in page.title()
    page.click(f".card:nth-child({captions(page).index(MARKUP) + 1}) .frame")
    assert "<b>bold</b>" in page.locator("#item").inner_text()
    assert page.locator("#item b, #results img[src='x']").count() == 0


def test_the_policy_forbids_what_the_page_does_not_need(visit: Visit) -> None:
    policy = visit.page.locator("meta[http-equiv='Content-Security-Policy']").get_attribute("content")
    assert "unsafe-inline" not in policy and "'unsafe-eval'" not in policy and "default-src 'none'" in policy
    refused = """() => fetch("https://example.com/").then(() => "sent", () => "refused")"""
    assert visit.page.evaluate(refused) == "refused"
    visit.errors.clear()  # the browser reports the violation
    visit.requests.clear()
    visit.page.reload()
    visit.page.wait_for_selector(".card img[src^='blob:']")


def test_ids_of_every_kind_are_told_apart(browser: Any, tmp_path: Path) -> None:
    ids = [7, "7", 2**53, 2**53 + 1, str(2**53 + 1), 2**63 - 1]
    with Catalog(tmp_path / "shop.catalog", bundle=Bundle.open("tiny", threads=1)) as catalog:
        images = [np.full((8, 8, 3), 40 * k, np.uint8) for k in range(len(ids))]
        catalog.add(images, [f"{type(id).__name__} {id}" for id in ids], ids, [{"gtin": 2**60 + 1}] * len(ids))
        folder = write(catalog, tmp_path / "site")
        expected = {id: [hit.text for hit in catalog.search(like=id)] for id in ids}
    with served(folder) as address:
        visit = Visit(browser, address)
        for id in ids:
            page = visit.page
            page.goto(address)
            page.wait_for_selector(f"#results .card:nth-child({len(ids)})")
            page.click(f".card .frame[aria-label='Show {type(id).__name__} {id}']")
            shown = page.locator("#item dl").inner_text()
            assert f"id\n{id}\n" in shown and str(2**60 + 1) in shown
            page.click("#item .primary")
            page.wait_for_selector("#query img[src^='blob:']")  # the thumbnail of the item
            page.wait_for_selector("#status:has-text('results in')")
            assert captions(page) == expected[id]
        assert visit.errors == []
        visit.context.close()


def test_memory_does_not_grow_with_use(browser: Any, site: Path) -> None:
    """After everything was used once: graphs stay loaded, everything else is given back."""
    measure = "async () => (await performance.measureUserAgentSpecificMemory()).bytes"
    with served(site, ISOLATED) as address:
        visit = Visit(browser, address + "?engine=wasm")
        page = visit.ready()

        def use(text: str) -> None:
            search(page, text)
            page.click("#open-generate")
            page.fill("#n", "1")
            page.select_option("#steps", "4")
            page.click("#prompt-form button[type=submit]")
            page.wait_for_selector("#generated .tools")
            page.click("#generated .tools button >> nth=0")
            page.wait_for_selector("#query img")
            page.wait_for_selector("#status:has-text('results in')")
            page.click("#query button[aria-label='Remove image']")

        use("red boots")
        once = page.evaluate(measure)
        for text in ("a striped dress", "blue shoes", "a coat", "a purple skirt", "black boots"):
            use(text)
        again = page.evaluate(measure)
        visit.context.close()
    assert again - once < 8e6 and again < 400e6, (once, again)


def test_the_page_can_be_installed(browser: Any, site: Path) -> None:
    with served(site) as address:
        visit = Visit(browser, address)
        visit.ready()
        tools = visit.context.new_cdp_session(visit.page)
        assert tools.send("Page.getAppManifest")["errors"] == []
        errors = tools.send("Page.getInstallabilityErrors")["installabilityErrors"]
        visit.context.close()
    # Windows of the test are like private ones, where nothing can be installed.
    assert [error["errorId"] for error in errors] in ([], ["in-incognito"])


# ------------------------------------------------------------------------------------------------ files


def test_offline_after_the_first_visit(browser: Any, catalog: Catalog, site: Path) -> None:
    with served(site) as address:
        visit = Visit(browser, address)
        visit.ready()
    # The server is gone.
    page = visit.page
    page.goto(address + "?q=red+dress")
    page.wait_for_selector("#status:has-text('results in')")
    assert captions(page) == [hit.text for hit in catalog.search("red dress", limit=24)]
    page.wait_for_selector("#offline:has-text('Works offline')")
    page.click("#open-generate")
    page.fill("#n", "1")
    page.select_option("#steps", "4")
    page.click("#prompt-form button[type=submit]")
    page.wait_for_selector("#generated .tools")
    visit.context.close()


def test_offline_also_after_a_reload_without_the_cache(browser: Any, site: Path) -> None:
    with served(site) as address:
        visit = Visit(browser, address)
        visit.ready()
        visit.page.add_init_script("window.controlledAtFirst = navigator.serviceWorker.controller !== null")
        visit.context.new_cdp_session(visit.page).send("Page.reload", {"ignoreCache": True})
        visit.page.wait_for_function("() => window.controlledAtFirst === false")
        visit.page.wait_for_selector("#offline:has-text('Works offline')")
        visit.context.close()


def test_a_browser_without_room_says_so(browser: Any, site: Path) -> None:
    with served(site) as address:
        visit = Visit(browser, address + "licenses.txt")
        quota = {"origin": address, "quotaSize": 6_000_000}
        visit.context.new_cdp_session(visit.page).send("Storage.overrideQuotaForOrigin", quota)
        visit.page.goto(address)
        visit.page.wait_for_selector("#offline:has-text('Does not work offline')")
        search(visit.page, "purple boots")
        visit.context.close()


@pytest.mark.parametrize("name", ["model/text_encoder/model.onnx", "data/vectors.bin", "ort/wasm.bin"])
def test_a_damaged_file_is_refused(browser: Any, site: Path, tmp_path: Path, name: str) -> None:
    damaged = shutil.copytree(site, tmp_path / "site")
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    with served(damaged) as address:
        visit = Visit(browser, address)
        visit.page.wait_for_selector(f"#loading-text:has-text('{name} is damaged')")
        assert visit.page.locator(".card").count() == 0
        visit.context.close()


def test_an_update_reaches_visitors(browser: Any, site: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(site, tmp_path / "site")
    with served(changed) as address:
        visit = Visit(browser, address)
        visit.ready()
        index = json.loads((changed / "site.json").read_text())
        (changed / "site.json").write_text(json.dumps(index | {"name": "Renamed shop"}))
        visit.page.reload()
        visit.page.wait_for_function("() => document.title === 'Renamed shop'")
        visit.context.close()


def test_a_page_opened_as_a_file_says_what_to_do(browser: Any, site: Path) -> None:
    page = browser.new_page()
    page.goto((site / "index.html").as_uri())
    page.wait_for_timeout(500)
    assert "python -m http.server" in page.locator("#loading-text").inner_text()
    page.close()
