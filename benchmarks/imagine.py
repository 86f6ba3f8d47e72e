"""Gain and cost of `imagine=`, which generates images from the query and searches with them as well: R@1 and time.

The catalogs hold synthetic products with combinations of attributes that training has not shown. The queries are full
captions (a hit is correct if all six attributes match) and brief captions as a user would type them (a hit is correct
if all attributes that the caption names match).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import click
from harness import Benchmark, options

ITEMS, QUERIES = 500, 60
IMAGES = (1, 4)


@click.command()
@options
@click.option("--items", default=ITEMS, show_default=True, help="Size of each catalog.")
@click.option("--queries", default=QUERIES, show_default=True, help="Number of full and of brief captions.")
def main(items: int, queries: int, **chosen: Any) -> None:
    """Search each catalog with its products' captions, with and without generated images."""
    bench = Benchmark(__file__, "What does a search gain from images generated for its query?", **chosen)
    from unidiff_sdk import Bundle, Catalog
    from unidiff_sdk.datasets.synthetic import CATALOGS, Product, brief_caption, products, render

    def correct(wanted: Product, named: frozenset[str], found: Product) -> bool:
        return all(found.attributes[column] == wanted.attributes[column] for column in named)

    bundle = Bundle.open("tiny", threads=bench.threads)
    for name in CATALOGS:
        queries_of = {
            "full captions": lambda product: (product.caption, frozenset(product.attributes)),
            "brief captions": lambda product: brief_caption(product, seed=1),
        }
        if not any(bench.wants(f"{name}, {kind}") for kind in queries_of):
            continue
        shop = products(name, items, seed=0, split="test-unseen")
        by_id = {product.id: product for product in shop}
        with Catalog(bundle=bundle) as catalog:
            catalog.add([render(p) for p in shop], ids=list(by_id), payloads=[{"catalog": name}] * items)
            for kind, query in queries_of.items():
                case = f"{name}, {kind}"
                if not bench.wants(case):
                    continue
                pairs = [query(product) for product in shop[:queries]]
                texts = [text for text, _ in pairs]
                first_hits = {
                    n: [page[0] for page in catalog.search_batch([{"text": t, "imagine": n} for t in texts], limit=1)]
                    for n in (0, *IMAGES)
                }
                hits = {
                    n: [
                        correct(p, named, by_id[hit.id]) for p, (_, named), hit in zip(shop, pairs, found, strict=False)
                    ]
                    for n, found in first_hits.items()
                }
                bench.row(
                    case,
                    ours={label(n): search(catalog, texts, n) for n in hits},
                    peers={},
                    parameters={"catalog": name, "query": kind, "items": items},
                    figures={label(n): {"r@1": sum(column) / len(column)} for n, column in hits.items()},
                    rounds=max(bench.rounds, 15),
                    note="; ".join(
                        f"imagine={n}: {sum(b > a for a, b in zip(hits[0], hits[n], strict=True))} of {queries} "
                        f"queries won, {sum(a > b for a, b in zip(hits[0], hits[n], strict=True))} lost"
                        for n in IMAGES
                    )
                    + ".",
                )
    bench.finish()


def label(n: int) -> str:
    return f"imagine={n}" if n else "text alone"


def search(catalog: Any, texts: Sequence[str], n: int) -> Callable[[], object]:
    """Return a contestant that searches with the next text at each call."""
    turn = cycle(texts)
    return lambda: catalog.search(next(turn), imagine=n)


if __name__ == "__main__":
    main()
