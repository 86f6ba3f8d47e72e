"""What drawing the query gains: R@1 with and without `imagine=`, and the milliseconds that it costs.

Each synthetic catalog, its products of combinations that training never showed, queried by whole captions (a hit is
right if all six attributes are) and by the few words that one would type (right if all is right that these tell of).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import click
from harness import Benchmark, options

ITEMS, QUERIES = 500, 60
PICTURES = (1, 4)


@click.command()
@options
@click.option("--items", default=ITEMS, show_default=True, help="Size of each catalog.")
@click.option("--queries", default=QUERIES, show_default=True, help="How many captions, and how many few words.")
def main(items: int, queries: int, **chosen: Any) -> None:
    """Search each catalog by its own products' captions, drawn and not."""
    bench = Benchmark(__file__, "What does a search gain by drawing its query?", **chosen)
    from unidiff_sdk import Bundle, Catalog
    from unidiff_sdk.datasets.synthetic import CATALOGS, Product, brief_caption, products, render

    def right(wanted: Product, told: frozenset[str], found: Product) -> bool:
        return all(found.attributes[column] == wanted.attributes[column] for column in told)

    bundle = Bundle.open("tiny", threads=bench.threads)
    for name in CATALOGS:
        asked = {
            "whole captions": lambda product: (product.caption, frozenset(product.attributes)),
            "few words": lambda product: brief_caption(product, seed=1),
        }
        if not any(bench.wants(f"{name}, {kind}") for kind in asked):
            continue
        shop = products(name, items, seed=0, split="test-unseen")
        by_id = {product.id: product for product in shop}
        with Catalog(bundle=bundle) as catalog:
            catalog.add([render(p) for p in shop], ids=list(by_id), payloads=[{"catalog": name}] * items)
            for kind, words in asked.items():
                case = f"{name}, {kind}"
                if not bench.wants(case):
                    continue
                pairs = [words(product) for product in shop[:queries]]
                texts = [text for text, _ in pairs]
                firsts = {
                    n: [page[0] for page in catalog.search_batch([{"text": t, "imagine": n} for t in texts], limit=1)]
                    for n in (0, *PICTURES)
                }
                hits = {
                    n: [right(p, told, by_id[hit.id]) for p, (_, told), hit in zip(shop, pairs, found, strict=False)]
                    for n, found in firsts.items()
                }
                bench.row(
                    case,
                    ours={told_as(n): search(catalog, texts, n) for n in hits},
                    peers={},
                    parameters={"catalog": name, "words": kind, "items": items},
                    figures={told_as(n): {"r@1": sum(column) / len(column)} for n, column in hits.items()},
                    rounds=max(bench.rounds, 15),
                    note="; ".join(
                        f"drawn {n} times, {sum(b > a for a, b in zip(hits[0], hits[n], strict=True))} of {queries} "
                        f"queries are won and {sum(a > b for a, b in zip(hits[0], hits[n], strict=True))} lost"
                        for n in PICTURES
                    )
                    + ".",
                )
    bench.finish()


def told_as(n: int) -> str:
    return f"imagine={n}" if n else "text alone"


def search(catalog: Any, texts: Sequence[str], n: int) -> Callable[[], object]:
    """One search a call, each time by another text."""
    turn = cycle(texts)
    return lambda: catalog.search(next(turn), imagine=n)


if __name__ == "__main__":
    main()
