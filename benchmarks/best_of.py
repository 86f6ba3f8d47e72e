"""Gain and cost of `best_of=`, by which the encoder selects among several candidates: attributes right and time.

The prompts are full captions of synthetic products with combinations of attributes that training has not shown. The
frozen judge, which is not the encoder that selects, reads the attributes of the selected images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import click
from harness import Benchmark, options

PROMPTS = 40
CANDIDATES = (1, 4, 16)
SEED = 0


@click.command()
@options
@click.option("--prompts", default=PROMPTS, show_default=True, help="Number of prompts of each catalog.")
def main(prompts: int, **chosen: Any) -> None:
    """Generate an image for each prompt from different numbers of candidates, and let the judge read it."""
    bench = Benchmark(__file__, "What does best_of= gain, and what does it cost?", **chosen)
    from unidiff_sdk import Bundle, Catalog
    from unidiff_sdk.datasets.synthetic import CATALOGS, products
    from unidiff_sdk.training.evaluation.judge import Judge, attribute_accuracy

    bundle, judge = Bundle.open("tiny", threads=bench.threads), Judge.load()
    for name in filter(bench.wants, CATALOGS):
        wanted = products(name, prompts, seed=6, split="test-unseen")
        captions = [product.caption for product in wanted]
        figures = {}
        with Catalog(bundle=bundle) as catalog:
            for n in CANDIDATES:
                images = [catalog.generate(caption, best_of=n, seed=SEED)[0].image for caption in captions]
                shares = attribute_accuracy(judge.attributes(images), [product.attributes for product in wanted])
                all_right = shares.pop("all")
                figures[label(n)] = {"accuracy": all_right, "attributes_right": sum(shares.values()) / len(shares)}
            bench.row(
                name,
                ours={label(n): generation(catalog, captions, n) for n in CANDIDATES},
                peers={},
                parameters={"catalog": name},
                figures={key: {k: round(v, 4) for k, v in both.items()} for key, both in figures.items()},
                note=f"Quality over {prompts} captions. attributes_right is the mean over the attributes, accuracy the "
                "share of images with all attributes right.",
            )
    bench.finish()


def label(n: int) -> str:
    return f"best_of={n}"


def generation(catalog: Any, captions: Sequence[str], n: int) -> Callable[[], object]:
    """Return a contestant that generates an image of the next prompt at each call."""
    turn = cycle(captions)
    return lambda: catalog.generate(next(turn), best_of=n, seed=SEED)


if __name__ == "__main__":
    main()
