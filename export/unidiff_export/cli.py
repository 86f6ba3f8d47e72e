"""`unidiff-export`: a checkpoint in, a verified ONNX bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from unidiff_sdk._cli import Command
from unidiff_sdk.errors import ExportError

from .options import TARGETS

if TYPE_CHECKING:
    from rich.table import Table

    from .exporter import Export

EXAMPLES = """
unidiff-export runs/shop -o bundles/shop
unidiff-export tiny -o bundles/tiny-fp16 --fp16
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("checkpoint", metavar="CKPT")
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
@click.option("--overwrite", is_flag=True, help="Replace the bundle that is at BUNDLE already.")
def main(checkpoint: str, out: Path, precision: str, target: str, overwrite: bool) -> None:
    """Export the checkpoint CKPT as an ONNX bundle that searches and generates without PyTorch.

    CKPT is a folder that unidiff-train wrote, or "tiny" for the built-in base. Each graph is compared with PyTorch,
    and whole pictures with those of the diffusers pipeline; the bundle appears only if all of them agree, and carries
    the figures in its manifest.json.
    """
    from rich.console import Console

    with Console(stderr=True).status("importing PyTorch") as status:
        try:
            from .exporter import export_bundle
        except ImportError as error:
            raise ExportError(f"{error.name} is not installed: pip install 'unidiff-sdk[cpu,export]'") from error

        export = export_bundle(
            checkpoint, out, precision=precision, target=target, overwrite=overwrite, progress=status.update
        )
    Console().print(parity_table(export))
    # Plain, so that a long path is neither wrapped nor coloured.
    click.echo(f"{precision} bundle in {export.seconds:.1f} s, {megabytes(export.bytes)}: {export.path}")


def parity_table(export: Export) -> Table:
    """The evidence of an export: a row for each graph and one for whole pictures."""
    from rich.table import Table

    table = Table(title="Compared with PyTorch", title_justify="left")
    table.add_column("graph")
    for column in ("precision", "size", "attention", "max error", "allowed", "cosine"):
        table.add_column(column, justify="right")
    for graph in export.graphs:
        table.add_row(
            graph.name,
            graph.precision,
            megabytes(graph.bytes),
            str(graph.attention_nodes),
            f"{graph.parity.max_abs_error:.1e}",
            f"≤ {graph.parity.tolerance:.0e}",
            f"{graph.parity.cosine:.7f}",
        )
    table.add_section()
    image = export.image
    table.add_row("whole picture", "", "", "", f"{image.psnr_db:.1f} dB", f"≥ {image.tolerance_db:.0f} dB")
    return table


def megabytes(size: int) -> str:
    """Bytes as megabytes with one decimal."""
    return f"{size / 1e6:.1f} MB"
