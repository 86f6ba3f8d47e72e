"""`unidiff generate`: images in a folder, with a contact sheet and the values that reproduce them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unidiff_sdk._internal.files import folder_kind
from unidiff_sdk._internal.text import json_text, shorten
from unidiff_sdk.errors import GenerationError, OptionError

from .console import Command, echo, echo_json
from .locations.location import CatalogLocation, qdrant_options
from .output.terminal import counted, print_table
from .parameters import json_option, refuse_options, stored_id, trusted_key_option

if TYPE_CHECKING:
    from unidiff_sdk.catalog.catalog import Catalog
    from unidiff_sdk.catalog.results import Generation

__all__ = ["generate"]


def _parse_loras(context: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, float | None]:
    """NAME or NAME:WEIGHT, for `Catalog.generate`."""
    loras: dict[str, float | None] = {}
    for value in values:
        name, colon, weight = value.rpartition(":")
        try:
            loras[name if colon else value] = float(weight) if colon else None
        except ValueError:
            raise click.BadParameter(f"the weight of {name!r} is {weight!r}; write NAME or NAME:WEIGHT") from None
    return loras


@click.command(
    cls=Command,
    resuming="The same command with the same --seed generates the same images.",
    short_help="Generate product images, ranked by score.",
    epilog="""
    unidiff generate "red striped dress" -o images
    unidiff generate shop.catalog "purple dotted boots" -n 4 --seed 7 -o images
    unidiff generate "a blue mug" --bundle bundles/shop --steps 30 -o images
    unidiff generate shop.catalog "in red" --like D-17 --strength 0.5 -o images
    unidiff generate "a red coat" --bundle bundles/shop --lora light:0.6 -o out
    unidiff generate shop.catalog coat --best-of 8 --max-similarity 0.97 -o images
    """,
)
@click.argument("catalog_and_prompt", nargs=-1, required=True, metavar="[CATALOG] PROMPT")
@click.option("--bundle", help="Without CATALOG: a bundle folder, hf:org/name, or tiny (default).")
@click.option("-n", default=1, show_default=True, help="Number of images.")
@click.option("--negative", default="", metavar="TEXT", help="Negative prompt: what to avoid.")
@click.option("--seed", type=int, help="Seed of the first image. The same seed repeats the images. Default: random.")
@click.option("--steps", type=int, help="Denoising steps. Default: from the bundle.")
@click.option(
    "--guidance", type=float, help="Guidance scale, 0 to 50: how closely to follow PROMPT. Default: from the bundle."
)
@click.option(
    "--rescale",
    default=0.0,
    show_default=True,
    help="Guidance rescale, 0 to 1: removes contrast that a high guidance scale adds.",
)
@click.option("--sampler", help="Sampler, such as ddim, euler or dpm++2m. Default: from the bundle.")
@click.option("--width", type=int, help="Width in pixels. Default: from the bundle.")
@click.option("--height", type=int, help="Height in pixels. Default: from the bundle.")
@click.option(
    "--lora",
    multiple=True,
    callback=_parse_loras,
    metavar="NAME[:WEIGHT]",
    help="Switchable LoRA of the bundle, and its weight. Repeatable. Default: none.",
)
@click.option(
    "--long-prompts",
    type=click.Choice(["truncate", "chunk"]),
    default="truncate",
    show_default=True,
    help="What to do with tokens past the limit of the model: ignore them, or encode them in chunks.",
)
@click.option("--like", metavar="IMAGE", help="Image to start from: a file, or the id of an item in CATALOG.")
@click.option(
    "--strength",
    type=float,
    help="With --like: how much of the image may change, above 0 up to 1. Default: 0.7, or 1 with --mask.",
)
@click.option(
    "--mask", type=click.Path(path_type=Path), help="With --like: mask for inpainting, bright where to repaint."
)
@click.option(
    "--best-of",
    type=int,
    metavar="N",
    help="Generate N candidates and keep the best -n. Default: no further candidates.",
)
@click.option("--min-score", type=float, help="Replace candidates whose cosine similarity to PROMPT is lower, -1 to 1.")
@click.option(
    "--max-similarity",
    type=float,
    help="Replace candidates whose cosine similarity to an item in CATALOG is higher, -1 to 1.",
)
@click.option("--budget", type=int, help="Maximum number of candidates. Default: 4 times the first round.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the images.")
@click.option("--add", is_flag=True, help='Add the images to CATALOG, with the column "generated": true.')
@trusted_key_option
@json_option
@qdrant_options
def generate(
    locate: Callable[[str], CatalogLocation],
    catalog_and_prompt: Sequence[str],
    bundle: str | None,
    negative: str,
    guidance: float | None,
    rescale: float,
    like: str | None,
    out: Path,
    add: bool,
    trusted_keys: Sequence[str] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate images from PROMPT, rank them by their similarity to it, and name the nearest item in CATALOG.

    The output folder receives each image as a PNG with its recipe, a contact sheet (contact-sheet.png), and the values
    that reproduce the images (generation.json).
    """
    from unidiff_sdk._internal.progress import progress_bar

    if len(catalog_and_prompt) > 2:
        raise OptionError(f"Found {len(catalog_and_prompt)} arguments. Give CATALOG and PROMPT, with PROMPT in quotes.")
    *catalog, prompt = catalog_and_prompt
    if folder_kind(Path(prompt))[0] == "a catalog":
        raise OptionError(f"{prompt} is a catalog, not a prompt. Give PROMPT after it: unidiff generate CATALOG PROMPT")
    if add and not catalog:
        raise OptionError("--add needs a CATALOG. Give one before PROMPT, or omit --add.")
    _check_writable(out)
    if not catalog:
        refuse_options("without a CATALOG to compare with. Give one before PROMPT", "max_similarity")
    location = locate(catalog[0] if catalog else ":memory:")
    with location.open(bundle, create=not catalog, trusted_keys=trusted_keys) as opened:
        with progress_bar("Generating", shown=not as_json) as advance:
            generation = opened.generate(
                prompt,
                negative_prompt=negative,
                guidance_scale=guidance,
                guidance_rescale=rescale,
                like=_start_image(opened, like),
                callback=advance,
                **options,
            )
        if not generation:
            raise GenerationError(
                f"No image was written: {counted(generation.generated, 'candidate')} rejected. Raise --budget, lower "
                "--min-score, or raise --max-similarity."
            )
        if add:
            opened.add(generation)
        files = _save(generation, out)
    if as_json:
        echo_json(_as_list(generation, files))
    else:
        _print_summary(generation, files)


def _check_writable(out: Path) -> None:
    """Raise OptionError if the folder cannot be created or written, before images are generated for it."""
    place = next(folder for folder in (out, *out.absolute().parents) if os.path.lexists(folder))
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise OptionError(f"--out {out} is not writable, because of {place}. Choose another folder.")


def _start_image(catalog: Catalog, like: str | None) -> Any:
    """The image of `--like`: a file, or else an item of the catalog."""
    if like is None or Path(like).is_file():
        return like
    item = catalog.get(stored_id(catalog, like))
    if item is None:
        raise OptionError(f"--like {like} is neither an image file nor the id of an item. Give one of them.")
    return item


def _save(generation: Generation, out: Path) -> list[Path]:
    """Write the images, best first, a contact sheet, and generation.json. Returns the files of the images."""
    from .output.contact_sheet import contact_sheet

    files = [out / f"{rank:03d}-seed{generated.seed}.png" for rank, generated in enumerate(generation)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, generated in zip(files, generation, strict=True):
            generated.save(file)
        contact_sheet(generation).save(out / "contact-sheet.png")
        described = json_text(_as_list(generation, files), indent=2) + "\n"
        (out / "generation.json").write_text(described, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"--out {out} is not writable: {error.strerror}. Choose another folder.") from error
    return files


def _as_list(generation: Generation, files: Sequence[Path]) -> list[dict[str, Any]]:
    return [
        {
            "file": str(file),
            "score": generated.score,
            "nearest": generated.nearest.to_dict() if generated.nearest else None,
            **generated.payload,
            **generated.recipe,  # LoRAs with their exact weights
        }
        for file, generated in zip(files, generation, strict=True)
    ]


def _print_summary(generation: Generation, files: Sequence[Path]) -> None:
    rows = []
    for file, generated in zip(files, generation, strict=True):
        nearest = generated.nearest
        rows.append([file, f"{generated.score:.3f}", shorten(f"{nearest.id}: {nearest.text or ''}") if nearest else ""])
    print_table(["file", "score", "nearest item"], rows)
    first, seed = generation[0], min(generated.seed for generated in generation)
    candidates, seconds = counted(generation.generated, "generated image"), generation.took_ms / 1000
    echo(
        f"Kept {len(files)} of {candidates} in {seconds:.1f} s.",
        f"Seed {seed}, {first.steps} steps, sampler {first.sampler}, guidance scale {first.guidance_scale:g}",
    )
