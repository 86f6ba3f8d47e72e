"""Gain and cost of `rerank=`, by the number of candidates and of timesteps: R@1 and time of a search.

The catalogs hold synthetic products with combinations of attributes that training has not shown. The queries are full
captions (a hit is correct if all six attributes match) and brief captions as a user would type them (a hit is correct
if all attributes that the caption names match). The latents are prepared, as with `Catalog(rerank=True)`. R@1 comes
from one measurement of all errors for each query, from which every number of candidates and timesteps follows. Other
contestants: the encoder alone, `imagine=4`, and `hybrid=True` over brief captions that do not repeat the query.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import click
from harness import Benchmark, options

ITEMS, QUERIES = 500, 60
CANDIDATES = (4, 8, 16)
TIMESTEPS = ((750,), (750, 900), (550, 750, 900), (550, 650, 750, 900))
WEIGHT = 1.5


@click.command()
@options
@click.option("--items", default=ITEMS, show_default=True, help="Size of each catalog.")
@click.option("--queries", default=QUERIES, show_default=True, help="Number of full and of brief captions.")
@click.option("--int8", type=click.Path(path_type=Path), help="Bundle of the same model, exported with --int8.")
def main(items: int, queries: int, int8: Path | None, **chosen: Any) -> None:
    """Search each catalog with its products' captions, re-ranked by different numbers of candidates and timesteps."""
    bench = Benchmark(__file__, "What does a search gain when the generator re-ranks it?", **chosen)
    from unidiff_sdk import Bundle
    from unidiff_sdk.datasets.synthetic import CATALOGS

    bundles = {"fp32": Bundle.open("tiny", threads=bench.threads)}
    if int8 is not None:
        bundles["int8"] = Bundle.open(int8, threads=bench.threads)
    for (precision, bundle), name, kind in product(bundles.items(), CATALOGS, ("full captions", "brief captions")):
        case = f"{name}, {kind}, {precision}"
        if bench.wants(case):
            measure_case(bench, case, bundle, name, kind, items, queries)
    bench.finish()


def measure_case(bench: Benchmark, case: str, bundle: Any, name: str, kind: str, items: int, queries: int) -> None:
    """Measure one row: a catalog, a kind of query and a bundle."""
    from unidiff_export.bundle.reranking import measure
    from unidiff_sdk import Bundle, Catalog
    from unidiff_sdk.datasets.synthetic import brief_caption, products, render
    from unidiff_sdk.inference.manifest import RerankDefaults, RerankGain
    from unidiff_sdk.store.edge.store import EdgeStore
    from unidiff_sdk.store.images import ImageStore

    shop = products(name, items, seed=0, split="test-unseen")
    images = [render(each) for each in shop]
    pairs = [
        (each.caption, frozenset(each.attributes)) if kind == "full captions" else brief_caption(each, seed=1)
        for each in shop[:queries]
    ]
    wanted = [
        (text, [i for i, other in enumerate(shop) if all(other.attributes[c] == each.attributes[c] for c in named)])
        for each, (text, named) in zip(shop, pairs, strict=False)
    ]
    texts = [text for text, _ in pairs]
    figures = measure(bundle, images, wanted, TIMESTEPS[-1], max(CANDIDATES))
    hits = {"encoder": figures.relevant[:, 0]}
    searches: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store, image_store = EdgeStore(Path(folder) / "vectors", bundle.dim), ImageStore(Path(folder))

        def opened(timesteps: Sequence[int], candidates: int) -> Any:
            gain = RerankGain(0.0, 1.0, queries, items)  # so that it does not warn
            settings = RerankDefaults(tuple(timesteps), candidates, WEIGHT, 0, gain)
            manifest = replace(bundle.manifest, rerank=settings)
            return Catalog.from_parts(store, image_store, Bundle(bundle.path, manifest, threads=bench.threads))

        with opened(TIMESTEPS[-1], max(CANDIDATES)) as catalog:
            captions = [brief_caption(each, seed=2)[0] for each in shop]
            catalog.add(images, captions, list(range(items)), [{"catalog": name}] * items)
            catalog.prepare_rerank()
            for label, arguments in {"imagine=4": {"imagine": 4}, "hybrid": {"hybrid": True}}.items():
                found = [catalog.search(text, limit=1, **arguments)[0].id for text in texts]
                hits[label] = [id in right for id, (_, right) in zip(found, wanted, strict=True)]
                searches[label] = search(catalog, texts, **arguments)
            searches["encoder"] = search(catalog, texts)
            for candidates, timesteps in product(CANDIDATES, TIMESTEPS):
                label = f"rerank={candidates}, {len(timesteps)} timestep{'s' if len(timesteps) > 1 else ''}"
                hits[label] = figures.first_hits(candidates, timesteps, WEIGHT)
                searches[label] = search(opened(timesteps, candidates), texts, rerank=candidates)
            bench.row(
                case,
                ours=searches,
                peers={},
                parameters={"catalog": name, "query": kind, "items": items, "precision": bundle.precision},
                figures={label: {"r@1": sum(map(bool, column)) / len(column)} for label, column in hits.items()},
                note=f"{queries} queries; weight {WEIGHT}.",
            )


def search(catalog: Any, texts: Sequence[str], **arguments: Any) -> Callable[[], object]:
    """Return a contestant that searches with the next text at each call."""
    turn = cycle(texts)
    return lambda: catalog.search(next(turn), **arguments)


if __name__ == "__main__":
    main()
