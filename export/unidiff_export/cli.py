"""`unidiff-export`: export a checkpoint as a verified ONNX bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unidiff_sdk._internal.progress import ProgressLines
from unidiff_sdk._internal.text import terminal_safe
from unidiff_sdk.cli.console import Command, MainCommand, echo
from unidiff_sdk.cli.parameters import parse_pairs
from unidiff_sdk.errors import ExportError
from unidiff_sdk.training.cli.options import base_options

from .options import TARGETS

if TYPE_CHECKING:
    from rich.table import Table

    from .exporter import Export

EXAMPLES = """
unidiff-export runs/shop -o bundles/shop
unidiff-export tiny -o bundles/tiny-fp16 --fp16
unidiff-export runs/shop -o bundles/shop-int8 --int8 --calibration products
unidiff-export models/sd15 --clip models/clip-vit-large-patch14 -o bundles/sd15
unidiff-export --clip models/clip-vit-base-patch32 -o bundles/search
unidiff-export models/sd15 --clip models/clip --variant fp16 --lora shoes.safetensors:0.8 -o bundles/shoes
unidiff-export runs/shop -o bundles/shop --lora shoes.safetensors --lora light.safetensors --lora-switchable
unidiff-export runs/shop -o bundles/shop --sign KEY.pem
unidiff-export sign bundles/shop --key KEY.pem
unidiff-export rerank bundles/shop products
"""


@click.command(cls=MainCommand, resuming="No bundle was written.", epilog=EXAMPLES)
@click.argument("checkpoint", metavar="[CKPT]", required=False)
@click.option(
    "--clip",
    help="CLIP for a pipeline without one, or CLIP or SigLIP alone for a bundle that only searches: a folder, "
    "hf:org/name, or open_clip:ARCH/TAG-or-file.",
)
@base_options()
@click.option(
    "--lora-switchable",
    is_flag=True,
    help="Keep the --lora files apart instead of merging them, so that each generation chooses among them by name.",
)
@click.option(
    "-o", "--out", metavar="BUNDLE", required=True, type=click.Path(path_type=Path), help="Folder for the bundle."
)
@click.option("--fp32", "precision", flag_value="fp32", default="fp32", help="Single precision (default).")
@click.option("--fp16", "precision", flag_value="fp16", help="Half precision for GPUs: half the size.")
@click.option("--int8", "precision", flag_value="int8", help="8-bit integers for CPUs: a quarter of the size.")
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    default="cpu",
    show_default=True,
    help=f"Runtime of the graphs. {'; '.join(f'{name}: {target.purpose}' for name, target in TARGETS.items())}.",
)
@click.option(
    "--calibration",
    metavar="DATA",
    type=click.Path(path_type=Path),
    help="Catalog to calibrate int8 and compare search on. Default: captions in CKPT and images generated from them.",
)
@click.option(
    "--columns",
    callback=parse_pairs,
    metavar="ROLE=NAME,…",
    help="Names of columns of --calibration: image=photo,text=title.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle at BUNDLE.")
@click.option("--sign", metavar="PEM", help="Sign the bundle with this Ed25519 private key.")
def main(
    checkpoint: str | None,
    clip: str | None,
    out: Path,
    precision: str,
    target: str,
    calibration: Path | None,
    columns: dict[str, str | None] | None,
    overwrite: bool,
    sign: str | None,
    **additions: Any,
) -> None:
    """Export the checkpoint CKPT as an ONNX bundle that searches and generates without PyTorch.

    CKPT is a folder written by unidiff-train, "tiny" for the built-in base, a Stable Diffusion pipeline of diffusers,
    or a Stable Diffusion in one safetensors file. Without CKPT, --clip alone becomes a bundle that searches but has no
    generator. The export compares each graph with PyTorch, whole images with the diffusers pipeline, and embeddings
    with transformers. The bundle appears only if all comparisons pass. Its manifest.json holds the figures.
    """
    from rich.console import Console

    with _stage_display() as show:
        try:
            from .exporter import export_bundle
        except ImportError as error:
            raise ExportError(f"{error.name} is not installed. Run: pip install 'unidiff-sdk[cpu,export]'") from error

        export = export_bundle(
            checkpoint,
            out,
            clip=clip,
            precision=precision,
            target=target,
            calibration=calibration,
            columns=columns,
            overwrite=overwrite,
            sign=sign,
            fork=True,  # the only other thread shows the stage
            progress=show,
            **additions,
        )
    console = Console()
    console.print(graph_table(export))
    console.print(result_table(export))
    echo(summary(export, precision))  # without rich, which would wrap and color a long path


@click.command(
    "sign", cls=Command, short_help="Sign a bundle.", epilog="unidiff-export sign bundles/shop --key KEY.pem"
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", metavar="PEM", required=True, help="Ed25519 private key.")
def sign_existing(bundle: Path, key: str) -> None:
    """Sign an existing BUNDLE, after its files have been compared with its manifest.

    Make a key with: openssl genpkey -algorithm ed25519 -out KEY.pem
    """
    from unidiff_sdk.inference.folder.signature import SIGNATURE, sign_bundle

    key_id = sign_bundle(bundle, key)
    echo(f"Wrote {bundle / SIGNATURE}, signed with the key {key_id}.")


main.add(sign_existing)


@click.command(
    "rerank",
    cls=Command,
    short_help="Choose the defaults of search --rerank.",
    epilog="unidiff-export rerank bundles/shop products",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
def choose_rerank(bundle: Path, data: tuple[Path, ...]) -> None:
    """Choose the defaults of search --rerank for BUNDLE on the captions in DATA, and write them into its manifest.

    DATA are catalogs that the model was not trained on. The manifest also records what re-ranking gained on captions
    that the defaults were not chosen with. Graphs and embeddings stay as they are. Sign a signed bundle again.
    """
    from unidiff_sdk.inference.bundle import Bundle

    from .bundle.reranking import rerank_defaults, write_rerank

    defaults = rerank_defaults(Bundle.open(bundle), data)
    write_rerank(bundle, defaults)
    gain = defaults.gain
    assert gain is not None  # `rerank_defaults` measures it
    echo(
        f"rerank={defaults.candidates} at timesteps {', '.join(map(str, defaults.timesteps))} with weight "
        f"{defaults.weight:g}: R@1 {gain.recall_at_1:.1%} -> {gain.reranked_recall_at_1:.1%}, {gain.queries} captions"
    )


main.add(choose_rerank)


@contextmanager
def _stage_display() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the stage of an export: beside a spinner, or as lines without a terminal."""
    from rich.console import Console
    from rich.markup import escape

    console, first = Console(stderr=True), "Importing PyTorch"
    if console.is_terminal:
        with console.status(first) as status:
            yield lambda stage: status.update(escape(terminal_safe(stage)))
    else:
        with ProgressLines(first) as lines:
            yield lines.update


def graph_table(export: Export) -> Table:
    """Return the comparison of each graph with PyTorch; for int8, also the share of multiply-adds that is quantized."""
    from rich.table import Table

    int8 = any(graph.int8 for graph in export.graphs)
    table = Table(title="Comparison with PyTorch", title_justify="left")
    table.add_column("graph", no_wrap=True)
    for column in ("precision", *(["int8"] if int8 else []), "MB", "max error", "limit", "cosine"):
        table.add_column(column, justify="right")
    for graph in export.graphs:
        limit = graph.parity.tolerance
        table.add_row(
            graph.name,
            graph.precision,
            *([f"{graph.int8['multiply_adds']:.1%}" if graph.int8 else ""] if int8 else []),
            f"{graph.bytes / 1e6:.1f}",
            f"{graph.parity.max_abs_error:.1e}",
            "" if limit is None else f"≤ {limit:.0e}",
            f"{graph.parity.cosine:.5f}",
        )
    return table


def result_table(export: Export) -> Table:
    """Return the comparison of images and search with PyTorch."""
    from rich.table import Table

    image, search = export.image, export.search
    table = Table()
    table.add_column("")
    for column in ("bundle", "PyTorch", "limit"):
        table.add_column(column, justify="right")
    if image:
        table.add_row(
            f"PSNR of the worst of {image.images} images, {image.resolution} px",
            f"{image.psnr_db:.1f} dB",
            "",
            f"≥ {image.tolerance_db:.0f} dB",
        )
        table.add_row("image-prompt cosine", f"{image.agreement:.3f}", f"{image.reference_agreement:.3f}", "± 2 %")
    if search:
        table.add_row(
            f"R@1, {search.pairs} pairs",
            f"{search.recall_at_1:.1%}",
            f"{search.reference_recall_at_1:.1%}",
            "− 0.5 points",
        )
    embeddings = export.embeddings
    worst = min(embeddings.text_cosine, embeddings.image_cosine)
    inputs = f"{embeddings.texts} odd texts and {embeddings.images} odd images"
    table.add_row(f"worst embedding of {inputs}", f"{worst:.5f}", "", f"≥ {embeddings.min_cosine}")
    return table


def summary(export: Export, precision: str) -> str:
    """Return the size, time and memory of an export in one line."""
    return (
        f"Exported {precision} bundle ({megabytes(export.bytes)}) in {export.seconds:.1f} s, "
        f"peak memory {megabytes(export.peak_bytes)}: {export.path}"
    )


def megabytes(size: int) -> str:
    """Format bytes as megabytes with one decimal."""
    return f"{size / 1e6:.1f} MB"
