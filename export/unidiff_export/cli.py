"""`unidiff-export`: a checkpoint in, a verified ONNX bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unidiff_sdk.cli.console import Command
from unidiff_sdk.errors import ExportError

from .options import TARGETS

if TYPE_CHECKING:
    from rich.table import Table

    from .exporter import Export

EXAMPLES = """
unidiff-export runs/shop -o bundles/shop
unidiff-export tiny -o bundles/tiny-fp16 --fp16
unidiff-export runs/shop -o bundles/shop-int8 --int8 --calibration products
unidiff-export models/sd15 --clip models/clip-vit-large-patch14 -o bundles/sd15
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("checkpoint", metavar="CKPT")
@click.option("--clip", help="Its CLIP, where CKPT has none: a folder, hf:org/name, or open_clip:ARCH/TAG-or-file.")
@click.option("-o", "--out", metavar="BUNDLE", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--fp32", "precision", flag_value="fp32", default="fp32", help="Compute in single precision (default).")
@click.option("--fp16", "precision", flag_value="fp16", help="Compute in half precision: half the size, for GPUs.")
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    default="cpu",
    show_default=True,
    help=f"What the graphs run on. {'; '.join(f'{name}: {target.purpose}' for name, target in TARGETS.items())}.",
)
@click.option("--int8", "precision", flag_value="int8", help="Compute in 8-bit integers: a quarter, for CPUs.")
@click.option(
    "--calibration",
    metavar="DATA",
    type=click.Path(path_type=Path),
    help="Catalog to learn int8 from and judge search on. Default: captions in CKPT, and what is drawn of them.",
)
@click.option("--overwrite", is_flag=True, help="Replace the bundle that is at BUNDLE already.")
def main(
    checkpoint: str,
    clip: str | None,
    out: Path,
    precision: str,
    target: str,
    calibration: Path | None,
    overwrite: bool,
) -> None:
    """Export the checkpoint CKPT as an ONNX bundle that searches and generates without PyTorch.

    CKPT is a folder that unidiff-train wrote, "tiny" for the built-in base, or a Stable Diffusion of diffusers. Each
    graph is compared with PyTorch, and whole pictures with those of the diffusers pipeline; the bundle appears only if
    all of them agree, and carries the figures in its manifest.json.
    """
    from rich.console import Console

    with Console(stderr=True).status("importing PyTorch") as status:
        try:
            from .exporter import export_bundle
        except ImportError as error:
            raise ExportError(f"{error.name} is not installed: pip install 'unidiff-sdk[cpu,export]'") from error

        export = export_bundle(
            checkpoint,
            out,
            clip=clip,
            precision=precision,
            target=target,
            calibration=calibration,
            overwrite=overwrite,
            progress=status.update,
        )
    console = Console()
    console.print(graph_table(export))
    console.print(result_table(export))
    # Plain, so that a long path is neither wrapped nor colored.
    click.echo(
        f"{precision} bundle in {export.seconds:.1f} s, {megabytes(export.bytes)}, "
        f"with at most {megabytes(export.peak_bytes)} of memory: {export.path}"
    )


def graph_table(export: Export) -> Table:
    """How near each graph is to its PyTorch module. int8: the share of its multiply-adds that is quantized."""
    from rich.table import Table

    table = Table(title="Compared with PyTorch", title_justify="left")
    table.add_column("graph")
    for column in ("in", "int8", "MB", "attention", "max error", "asked", "cosine"):
        table.add_column(column, justify="right")
    for graph in export.graphs:
        allowed = graph.parity.tolerance
        table.add_row(
            graph.name,
            graph.precision,
            f"{graph.int8['multiply_adds']:.1%}" if graph.int8 else "",
            f"{graph.bytes / 1e6:.1f}",
            str(graph.attention_nodes),
            f"{graph.parity.max_abs_error:.1e}",
            "" if allowed is None else f"≤ {allowed:.0e}",
            f"{graph.parity.cosine:.5f}",
        )
    return table


def result_table(export: Export) -> Table:
    """What comes out at the end, pictures and hits, beside PyTorch's."""
    from rich.table import Table

    image, search = export.image, export.search
    table = Table()
    table.add_column("")
    for column in ("bundle", "PyTorch", "asked"):
        table.add_column(column, justify="right")
    table.add_row(
        f"PSNR, worst of {image.pictures} of {image.resolution} px",
        f"{image.psnr_db:.1f} dB",
        "",
        f"≥ {image.tolerance_db:.0f} dB",
    )
    table.add_row("agreement with prompts", f"{image.agreement:.3f}", f"{image.reference_agreement:.3f}", "± 2 %")
    table.add_row(
        f"R@1, {search.pairs} pairs",
        f"{search.recall_at_1:.1%}",
        f"{search.reference_recall_at_1:.1%}",
        "− 0.5 points",
    )
    return table


def megabytes(size: int) -> str:
    """Bytes as megabytes with one decimal."""
    return f"{size / 1e6:.1f} MB"
