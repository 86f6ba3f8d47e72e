"""The half-precision graphs that `gpu.py` measures: `python gpu_graphs.py CACHE GRAPH FLAVOR`.

CACHE/sd15 is the checkpoint that `sd15.py CACHE sd15` writes. A flavor is a way to express attention, normalization and
convolutions in ONNX. All flavors compute the same function.
"""

from __future__ import annotations

from pathlib import Path

import click
from provenance import digest

FLAVORS = {
    "channels last": ("cuda", True),  # as `--target cuda` writes it
    "channels first": ("cuda", False),
    "standard Attention": ("portable", False),
    "decomposed": ("tensorrt", False),
}


def half_graph(cache: Path, graph: str, flavor: str) -> Path:
    """Return the path of a graph of this code in the cache."""
    return cache / f"half-{digest([Path(__file__)])}" / flavor.replace(" ", "-") / graph / "model.onnx"


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("graph")
@click.argument("flavors", nargs=-1, type=click.Choice(list(FLAVORS)))
def main(cache: Path, graph: str, flavors: tuple[str, ...]) -> None:
    """Lower a graph in each flavor that is not in the cache."""
    missing = [flavor for flavor in flavors if not half_graph(cache, graph, flavor).is_file()]
    if not missing:
        return
    from sd15 import graph_spec

    from unidiff_export.bundle.files import write_graph
    from unidiff_export.graphs.lowering import lower
    from unidiff_export.graphs.passes import rewrite_for_cuda
    from unidiff_export.options import TARGETS

    spec = graph_spec(cache / "sd15", "sd15", graph)
    for flavor in missing:
        file = half_graph(cache, graph, flavor)
        target, rewritten = FLAVORS[flavor]
        model = lower(spec, TARGETS[target], half=True)
        if rewritten:
            rewrite_for_cuda(model)
        file.parent.parent.mkdir(parents=True, exist_ok=True)
        write_graph(model, file.parent, {})


if __name__ == "__main__":
    main()
