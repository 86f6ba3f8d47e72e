"""The page of `unidiff web` in headless Chromium, next to ONNX Runtime on the same machine.

    python benchmarks/web.py [--bundle BUNDLE] [--out FILE.json]

It writes a site of synthetic products, visits it with an empty cache, and measures what a visitor waits for: bytes,
seconds to the first hit and to the first image, a denoising step with guidance (one call of the UNet for two samples)
with one and two threads, and a search over 10,000 items once its text is encoded. A local server sends the files, so
the network takes no time. The page must be built (`make web`), and Chromium must be installed.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from _host import host

ITEMS, LARGE = 300, 10_000
STEPS, SEARCHES, CALLS = 12, 50, 20
FIRST_LOAD_MB, SEARCH_MS = 25.0, 15.0  # what the page should stay below
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}

# In the page: start a worker, and time what it does.
MEASURE = """async ([script, prompt, steps, searches]) => {
  const worker = new Worker(script, { type: "module" });
  let next = 0;
  const call = (method, args, onEvent) => new Promise((resolve, reject) => {
    const id = next++;
    worker.addEventListener("message", ({ data }) => {
      if (data.id !== id) return;
      if ("event" in data) onEvent?.();
      else if (data.error) reject(new Error(data.error.message));
      else resolve(data.result);
    });
    worker.postMessage({ id, method, args });
  });
  const started = performance.now();
  const info = await call("start", [new URL("./", location.href).href, "wasm"]);
  const search = () => call("search", [{ text: prompt, limit: 24, offset: 0 }]);
  const first = await search();
  const hit_s = (performance.now() - started) / 1000;
  const times = [];
  for (let k = 0; k < searches; k++) times.push((await search()).took_ms);
  if (!steps) return { engine: info.engine, hit_s, times };
  const generate = (seed, onEvent) => call("generate", [{
    prompt, negative_prompt: "", n: 1, seed, steps, sampler: info.generator.sampler, guidance_scale: 5,
  }], onEvent);
  const before = performance.now();
  await generate(0);
  const image_s = (performance.now() - before) / 1000;
  const ticks = [];
  await generate(1, () => ticks.push(performance.now()));
  const gaps = ticks.slice(1).map((tick, k) => tick - ticks[k]);
  worker.terminate();
  return { engine: info.engine, hit_s, image_s, times, steps_ms: gaps };
}"""


class CountingHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files with given headers, and counts the bytes of their bodies."""

    headers_sent: Mapping[str, str]
    sent: int

    def end_headers(self) -> None:
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        super().end_headers()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        type(self).sent += os.fstat(source.fileno()).st_size
        super().copyfile(source, outputfile)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def served(folder: Path, headers: dict[str, str]) -> Iterator[tuple[str, type[CountingHandler]]]:
    handler = type("Handler", (CountingHandler,), {"headers_sent": headers, "sent": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", handler
    finally:
        server.shutdown()


def write_sites(folder: Path, bundle: str | None) -> tuple[Path, Path]:
    """A site of `ITEMS` products, and one that repeats them to `LARGE` items."""
    from unidiff_sdk import Bundle, Catalog
    from unidiff_sdk.cli.servers.site.writer import SiteOptions, write_site
    from unidiff_sdk.datasets.synthetic import write_catalog

    write_catalog("fashion-woman", folder / "products", n=ITEMS, seed=1, split="test")
    with Catalog(folder / "shop.catalog") as catalog:
        catalog.add_folder(folder / "products")
        model = None if bundle is None else Bundle.open(bundle)
        site = write_site(catalog.parts(), folder / "site", SiteOptions("Benchmark"), model).path
    large = shutil.copytree(site, folder / "large")
    data, index = large / "data", json.loads((large / "site.json").read_text())
    repeats = -(-LARGE // ITEMS)
    rows = (data / "vectors.bin").read_bytes()
    (data / "vectors.bin").write_bytes((rows * repeats)[: len(rows) // ITEMS * LARGE])
    items = json.loads((data / "items.json").read_text())
    for name in ("texts", "columns", "thumbnails"):
        items[name] = (items[name] * repeats)[:LARGE]
    (data / "items.json").write_text(json.dumps(items | {"ids": list(range(LARGE))}))
    for name in ("data/vectors.bin", "data/items.json"):
        content = (large / name).read_bytes()
        index["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (large / "site.json").write_text(json.dumps(index | {"items": LARGE}))
    return site, large


def visit(browser: Any, site: Path, headers: dict[str, str], prompt: str, steps: int) -> dict[str, Any]:
    """Measure the worker in a new browser profile."""
    script = next((site / "assets").glob("worker-*.js"))
    with served(site, headers) as (address, handler):
        context = browser.new_context(service_workers="block")
        context.set_default_timeout(600_000)
        page = context.new_page()
        page.goto(address + "licenses.txt")  # of the same origin, and it starts nothing
        measured: dict[str, Any] = page.evaluate(MEASURE, [f"assets/{script.name}", prompt, steps, SEARCHES])
        context.close()
        return measured | {"bytes": handler.sent}


def first_load(browser: Any, site: Path) -> int:
    """The bytes that the page loads until it works offline."""
    with served(site, {}) as (address, handler):
        context = browser.new_context()
        context.set_default_timeout(600_000)
        page = context.new_page()
        page.goto(address + "?engine=wasm")
        page.wait_for_selector("#offline:has-text('Works offline')")
        context.close()
        return handler.sent


def native_step_ms(bundle: str | None, threads: int) -> float:
    """The median time of the same call of the UNet in ONNX Runtime."""
    import numpy as np

    from unidiff_sdk import Bundle

    opened = Bundle.open(bundle, threads=threads)
    session, latent = opened.session("unet"), opened.latent
    rng = np.random.default_rng(0)
    width = opened.config("unet/config.json")["cross_attention_dim"]
    feeds = {
        "sample": rng.standard_normal((2, latent.channels, latent.size, latent.size), dtype=np.float32),
        "timestep": np.full(2, 500, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, opened.prompt_tokens, width), dtype=np.float32),
    }
    times = []
    for _ in range(CALLS):
        before = time.perf_counter()
        session.run(feeds)
        times.append(1000 * (time.perf_counter() - before))
    return statistics.median(times[CALLS // 4 :])


def rows_of(
    one: dict[str, Any], two: dict[str, Any], large: dict[str, Any], load: int, bundle: str | None
) -> Sequence[Any]:
    return [
        ("first load, MB", load / 1e6, f"≤ {FIRST_LOAD_MB:g}"),
        ("first hit, s", one["hit_s"], ""),
        (f"first image after it, {STEPS} steps, s", one["image_s"], ""),
        ("step with guidance, wasm, 1 thread, ms", statistics.median(one["steps_ms"]), ""),
        (f"step with guidance, {two['engine']}, ms", statistics.median(two["steps_ms"]), ""),
        ("step with guidance, native, 1 thread, ms", native_step_ms(bundle, 1), ""),
        ("step with guidance, native, 2 threads, ms", native_step_ms(bundle, 2), ""),
        (f"search, {LARGE:,} items, p50, ms", statistics.median(large["times"]), f"≤ {SEARCH_MS:g}"),
    ]


@click.command()
@click.option("--bundle", help="Model of the page. Default: the built-in bundle.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the figures as JSON.")
def main(bundle: str | None, out: Path | None) -> None:
    """Measure what a visitor of the page waits for."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium is not installed. Install it, or set CHROMIUM to its path.")
    prompt = "red striped dress"
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as started:
        site, large = write_sites(Path(temporary), bundle)
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        load = first_load(browser, site)
        one = visit(browser, site, {}, prompt, STEPS)
        two = visit(browser, site, ISOLATED, prompt, STEPS)
        many = visit(browser, large, {}, prompt, 0)
        browser.close()
        rows = rows_of(one, two, many, load, bundle)
    for name, value, limit in rows:
        click.echo(f"{name:<50} {value:10.2f}  {limit}")
    if out is not None:
        report = {**host(), "figures": {name: round(value, 3) for name, value, _ in rows}}
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
