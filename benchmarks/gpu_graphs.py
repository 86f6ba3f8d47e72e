"""The half-precision graphs that `gpu.py` measures: `python gpu_graphs.py KEPT GRAPH FLAVOUR`.

KEPT/sd15 is the checkpoint that `sd15.py KEPT sd15` writes. A flavor is a way to say attention, normalization and
convolutions in ONNX; all of them compute the same.
"""

from __future__ import annotations

from pathlib import Path

import click
from provenance import digest

FLAVOURS = {
    "channels last": ("cuda", True),  # as `--target cuda` leaves it
    "channels first": ("cuda", False),
    "standard Attention": ("portable", False),
    "decomposed": ("tensorrt", False),
}


def half_graph(kept: Path, graph: str, flavor: str) -> Path:
    """Where a graph of this code is kept."""
    return kept / f"half-{digest([Path(__file__)])}" / flavor.replace(" ", "-") / graph / "model.onnx"


@click.command()
@click.argument("kept", type=click.Path(path_type=Path))
@click.argument("graph")
@click.argument("flavors", nargs=-1, type=click.Choice(list(FLAVOURS)))
def main(kept: Path, graph: str, flavors: tuple[str, ...]) -> None:
    """Lower a graph in each flavor that is not there yet."""
    missing = [flavor for flavor in flavors if not half_graph(kept, graph, flavor).is_file()]
    if not missing:
        return
    from sd15 import graph_spec

    from unidiff_export.bundle_folder import write_graph
    from unidiff_export.graphs.lowering import lower
    from unidiff_export.graphs.passes import rewrite_for_cuda
    from unidiff_export.options import TARGETS

    spec = graph_spec(kept / "sd15", "sd15", graph)
    for flavor in missing:
        file = half_graph(kept, graph, flavor)
        target, rewritten = FLAVOURS[flavor]
        model = lower(spec, TARGETS[target], half=True)
        if rewritten:
            rewrite_for_cuda(model)
        file.parent.parent.mkdir(parents=True, exist_ok=True)
        write_graph(model, file.parent, {})


if __name__ == "__main__":
    main()
