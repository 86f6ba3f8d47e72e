"""`unidiff`: catalogs on the command line. Every import that costs time waits until a command needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unidiff_sdk._internal.text import shorten, terminal_safe
from unidiff_sdk.errors import DataError, FilterError, GenerationError, OptionError, StoreError

from .console import CatalogFolder, Group
from .datasets import dataset
from .terminal import graphics_protocol, render_image

if TYPE_CHECKING:
    from unidiff_sdk.catalog.catalog import Catalog
    from unidiff_sdk.catalog.results import Generation
    from unidiff_sdk.retrieval.results import Hit

__all__ = ["main"]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""
    unidiff dataset fashion-woman products --n 300
    unidiff index products shop.catalog
    unidiff search shop.catalog "red striped dress" --where '{"price": {"lt": 80}}'
    unidiff generate shop.catalog "purple dotted boots" -n 4 -o pictures
    """,
)
@click.version_option(package_name="unidiff-sdk", message="%(package)s %(version)s")
def main() -> None:
    """Search a product catalog by words and by pictures, and generate new product pictures that fit it."""


main.add_command(dataset)


@main.command(
    keeps=True,
    short_help="Add a folder of images to a catalog.",
    epilog="""
    unidiff index products shop.catalog
    unidiff index photos shop.catalog --bundle bundles/shop --reference
    unidiff index products shop.catalog --prune
    unidiff index spring.csv shop.catalog --images photos
    """,
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("catalog", type=CatalogFolder())
@click.option("--bundle", help="Model for a new catalog: a bundle's folder, or tiny (the default).")
@click.option("--images", type=click.Path(path_type=Path), help="Where the paths of a table start; its own folder.")
@click.option("--reference", is_flag=True, help="Leave the images where they are instead of copying them.")
@click.option("--prune", is_flag=True, help="Also delete what came from FOLDER earlier and has left it.")
@click.option("--strict", is_flag=True, help="Stop at the first bad row.")
@json_option
def index(
    folder: Path,
    catalog: Path,
    bundle: str | None,
    images: Path | None,
    reference: bool,
    prune: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Add FOLDER, images with a metadata.jsonl, .csv or .parquet, to CATALOG, which is made if it does not exist.

    FOLDER may hold webdataset shards (.tar) instead, or be one; or it is such a table by itself, of any name.

    Each row of the metadata names an image (file_name) and its caption (text); other columns can be filtered by. Rows
    that have not changed since the last time are passed over, bad ones are listed at the end.
    """
    from unidiff_sdk.catalog.catalog import Catalog
    from unidiff_sdk.datasets.reader import TABLES, count_rows

    if images is not None and folder.suffix.lower() not in TABLES:
        raise OptionError(f"--images goes with a table ({', '.join(TABLES)}), and {folder} is none")
    count_rows(folder)  # a folder that cannot be read must not leave an empty catalog behind
    with Catalog(catalog, bundle) as opened:
        options: dict[str, bool] = {"prune": prune, "strict": strict, "progress": not as_json, "copy": not reference}
        if folder.suffix.lower() in TABLES:
            report = opened.add_table(folder, images=images, **options)
        else:
            report = opened.add_folder(folder, **options)
        items = opened.count()
    if as_json:
        failed = [{"line": bad.line, "file_name": bad.file_name, "reason": bad.reason} for bad in report.failed]
        counts: dict[str, float] = {"added": report.added, "skipped": report.skipped, "removed": report.removed}
        counts |= {"items": items, "seconds": report.seconds}
        click.echo(json.dumps(counts | {"failed": failed}))
    else:
        if report.failed:
            _table(["line", "file", "what is wrong"], ([bad.line, bad.file_name, bad.reason] for bad in report.failed))
        click.echo(f"{report}. {catalog} holds {items:,} items.")
    if report.failed and not report.added + report.skipped:
        raise DataError(f"None of the {len(report.failed):,} rows of {folder} could be used.")


@main.command(
    short_help="Find by words, by a picture, or by both.",
    epilog="""
    unidiff search shop.catalog "red striped dress"
    unidiff search shop.catalog "but in blue" --image dress.jpg --weights 0.6 0.4
    unidiff search shop.catalog --like D-17 --unlike D-4 --without stripes --diversity 0.3
    unidiff search shop.catalog "a long slim green coat with navy checks" --imagine 4
    unidiff search shop.catalog "model QX-7719" --hybrid --group-by brand
    unidiff search shop.catalog boots --where '{"price": {"gte": 20, "lt": 80}, "brand": ["Acme", "Nord"]}'
    """,
)
@click.argument("catalog", type=CatalogFolder())
@click.argument("text", required=False)
@click.option("--imagine", default=0, metavar="N", help="Also draw TEXT so many times, and look for such pictures.")
@click.option("--image", type=click.Path(path_type=Path), help="Look for what looks like this picture.")
@click.option("--like", multiple=True, metavar="ID", help="Look for what is like this item; may be repeated.")
@click.option("--unlike", multiple=True, metavar="ID", help="Keep away from this item; may be repeated.")
@click.option("--without", multiple=True, metavar="WORDS", help="What it should not be; may be repeated.")
@click.option("--weights", type=float, nargs=2, help="Of TEXT and --image; only the ratio counts.")
@click.option("--where", help="Filter on columns, as JSON.")
@click.option("--limit", default=10, show_default=True, help="How many hits.")
@click.option("--offset", default=0, help="How many of the best hits to pass over.")
@click.option("--cursor", help="Go on where a page ended; repeat the rest of the command.")
@click.option("--min-score", type=float, help="Leave out what scores less.")
@click.option("--diversity", type=float, help="0 to 1: variety against similarity.")
@click.option("--group-by", metavar="COLUMN", help="One hit of each value of this column.")
@click.option("--hybrid", is_flag=True, help="Rank by the words of the captions too (BM25).")
@click.option("--pictures/--no-pictures", default=None, help="Show thumbnails; by default where the terminal can.")
@json_option
def search(
    catalog: Path,
    text: str | None,
    like: Sequence[str],
    unlike: Sequence[str],
    offset: int,
    pictures: bool | None,
    as_json: bool,
    where: str | None,
    **asked: Any,
) -> None:
    """Find in CATALOG what is most similar to TEXT, to a picture, to items, or to any mix of these."""
    from unidiff_sdk.catalog.catalog import Catalog

    if text is None and not (asked["image"] or like or unlike or asked["without"]):
        raise OptionError("say what to look for: TEXT, --image, --like, --unlike or --without")
    with Catalog(catalog, create=False) as opened:
        if not opened.count():
            raise StoreError(f"{catalog} is empty. Fill it with: unidiff index FOLDER {catalog}")
        page = opened.search(
            text,
            like=[_known(opened, id) for id in like],
            unlike=[_known(opened, id) for id in unlike],
            where=_parse_json(where),
            offset=offset,
            **asked,
        )
    if as_json:
        facts = {"offset": page.offset, "limit": page.limit, "took_ms": page.took_ms, "cursor": page.cursor}
        click.echo(json.dumps({"hits": [_hit_as_dict(hit) for hit in page]} | facts, ensure_ascii=False))
        return
    _show_hits(page, page.offset, pictures)
    click.echo(f"{len(page)} hits in {page.took_ms:.1f} ms")
    if page.cursor:
        click.echo(f"next page: --cursor={page.cursor}")


@main.command(
    short_help="List items that look the same.",
    epilog="""
    unidiff duplicates shop.catalog
    unidiff duplicates shop.catalog --threshold 0.999 --json
    """,
)
@click.argument("catalog", type=CatalogFolder())
@click.option("--threshold", default=0.95, show_default=True, help="The cosine from which two pictures are the same.")
@click.option("--where", help="Compare only what passes this filter, as JSON.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="How many groups to show.")
@click.option("--pictures/--no-pictures", default=None, help="Show thumbnails; by default where the terminal can.")
@json_option
def duplicates(
    catalog: Path, threshold: float, where: str | None, limit: int, pictures: bool | None, as_json: bool
) -> None:
    """List the groups of items in CATALOG whose pictures look (almost) the same, the largest first.

    What threshold means the same depends on the bundle: start high. The score is the cosine to the most similar other.
    """
    from unidiff_sdk.catalog.catalog import Catalog

    with Catalog(catalog, create=False) as opened:
        groups = opened.duplicates(threshold, where=_parse_json(where))
    if as_json:
        click.echo(json.dumps([[_hit_as_dict(hit) for hit in group] for group in groups], ensure_ascii=False))
        return
    for group in groups[:limit]:
        _show_hits(group, 0, pictures)
    items = sum(map(len, groups))
    rest = f"; the first {limit} are shown" if len(groups) > limit else ""
    click.echo(f"{len(groups):,} groups of {items:,} items have a cosine of {threshold:g} or more{rest}.")


@main.command(
    short_help="Draw new products, ranked by agreement.",
    epilog="""
    unidiff generate "red striped dress" -o pictures
    unidiff generate shop.catalog "purple dotted boots" -n 4 --seed 7 -o pictures
    unidiff generate "a blue mug" --bundle bundles/shop --steps 30 --guidance 5 -o pictures
    unidiff generate shop.catalog "the same in red" --like D-17 --strength 0.5 -n 4 -o pictures
    unidiff generate shop.catalog "a green coat" -n 4 --best-of 16 --max-similarity 0.97 -o pictures
    """,
)
@click.argument("catalog_and_prompt", nargs=-1, required=True, metavar="[CATALOG] PROMPT")
@click.option("--bundle", help="Without CATALOG: a bundle's folder, or tiny (the default).")
@click.option("-n", default=1, show_default=True, help="How many pictures.")
@click.option("--negative", default="", help="What to keep away from.")
@click.option("--seed", type=int, help="Draws the same pictures again; random by default.")
@click.option("--steps", type=int, help="Denoising steps; the bundle's own number by default.")
@click.option("--guidance", type=float, help="How closely to follow PROMPT; the bundle's own scale by default.")
@click.option("--rescale", default=0.0, show_default=True, help="How much of guidance's contrast to take back, 0 to 1.")
@click.option("--sampler", help="The bundle's own by default.")
@click.option("--width", type=int, help="Pixels; the bundle's own by default.")
@click.option("--height", type=int, help="Pixels; the bundle's own by default.")
@click.option(
    "--long-prompts",
    type=click.Choice(["truncate", "chunk"]),
    default="truncate",
    show_default=True,
    help="Past the model's tokens.",
)
@click.option("--like", help="Start from this picture: a file, or the id of an item of CATALOG.")
@click.option("--strength", type=float, help="With --like: how much of it may change, up to 1.")
@click.option("--mask", type=click.Path(path_type=Path), help="With --like: repaint only where this picture is bright.")
@click.option("--best-of", type=int, help="Draw so many and keep the best -n.")
@click.option("--min-score", type=float, help="Draw anew what agrees with PROMPT by less than this cosine.")
@click.option("--max-similarity", type=float, help="Draw anew what is nearer to an item of CATALOG than this cosine.")
@click.option("--budget", type=int, help="How many may be drawn in all; four times the first draw by default.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the pictures.")
@click.option("--add", is_flag=True, help="Add the pictures to CATALOG, marked as generated.")
@json_option
def generate(
    catalog_and_prompt: Sequence[str],
    bundle: str | None,
    n: int,
    negative: str,
    seed: int | None,
    steps: int | None,
    guidance: float | None,
    rescale: float,
    sampler: str | None,
    width: int | None,
    height: int | None,
    long_prompts: str,
    like: str | None,
    strength: float | None,
    mask: Path | None,
    best_of: int | None,
    min_score: float | None,
    max_similarity: float | None,
    budget: int | None,
    out: Path,
    add: bool,
    as_json: bool,
) -> None:
    """Draw PROMPT, rank the pictures by how well they agree with it, and name the nearest item of CATALOG.

    The folder gets each picture as a PNG that holds its own recipe, all of them on contact-sheet.png, and
    generation.json.
    """
    from unidiff_sdk._internal.progress import progress_bar
    from unidiff_sdk.catalog.catalog import Catalog

    if len(catalog_and_prompt) > 2:
        raise OptionError(f"{len(catalog_and_prompt)} arguments: give CATALOG and PROMPT, with PROMPT in quotes")
    *catalog, prompt = catalog_and_prompt
    if add and not catalog:
        raise OptionError("--add needs a CATALOG to add to")
    with Catalog(catalog[0] if catalog else ":memory:", bundle, create=not catalog) as opened:
        with progress_bar("Drawing", shown=not as_json) as advance:
            generation = opened.generate(
                prompt,
                negative_prompt=negative,
                n=n,
                seed=seed,
                steps=steps,
                guidance_scale=guidance,
                guidance_rescale=rescale,
                sampler=sampler,
                width=width,
                height=height,
                long_prompts=long_prompts,
                like=like if like is None or Path(like).is_file() else opened.get(_known(opened, like)) or like,
                strength=strength,
                mask=mask,
                best_of=best_of,
                min_score=min_score,
                max_similarity=max_similarity,
                budget=budget,
                callback=advance,
            )
        if not generation:
            raise GenerationError(
                f"none of the {generation.generated} pictures that were drawn passed, so none is written"
            )
        if add:
            opened.add(generation)
        files = _save(generation, out)
    if as_json:
        click.echo(json.dumps(_generation_as_list(generation, files), ensure_ascii=False))
        return
    rows = (
        [file, f"{picture.score:.3f}", _name(picture.nearest)] for file, picture in zip(files, generation, strict=True)
    )
    _table(["file", "agreement", "nearest item"], rows)
    first = generation[0]
    click.echo(
        f"{len(files)} pictures in {generation.took_ms / 1000:.1f} s, the best of {generation.generated}: seed "
        f"{min(picture.seed for picture in generation)}, {first.steps} steps of "
        f"{first.sampler}, guidance {first.guidance_scale:g}"
    )


@main.command(short_help="Tell what a catalog holds.", epilog="unidiff info shop.catalog --json")
@click.argument("catalog", type=CatalogFolder())
@json_option
def info(catalog: Path, as_json: bool) -> None:
    """Tell what CATALOG holds and which bundle it was made with."""
    from unidiff_sdk.catalog.catalog import Catalog

    with Catalog(catalog, create=False) as opened:
        facts = opened.info()
    if as_json:
        click.echo(json.dumps(facts))
        return
    bundle = facts["bundle"]
    click.echo(f"{facts['location']}: {facts['items']:,} items, made {facts['created']}")
    click.echo(f"bundle {bundle['name']} at {bundle['path']}: {bundle['dim']} dimensions, {bundle['fingerprint'][:12]}")
    if facts["columns"]:
        _table(["column", "holds"], facts["columns"].items())


@main.command(short_help="Remove items.", epilog="unidiff delete shop.catalog boots-17 boots-18")
@click.argument("catalog", type=CatalogFolder())
@click.argument("ids", nargs=-1, required=True)
@json_option
def delete(catalog: Path, ids: Sequence[str], as_json: bool) -> None:
    """Remove the items IDS and their pictures from CATALOG."""
    from unidiff_sdk.catalog.catalog import Catalog

    with Catalog(catalog, create=False) as opened:
        removed = opened.delete([_known(opened, id) for id in ids])
        items = opened.count()
    if as_json:
        click.echo(json.dumps({"removed": removed, "items": items}))
    else:
        click.echo(f"{removed} removed; {items:,} items are left.")


@main.command(short_help="Change a catalog to another bundle.", epilog="unidiff reindex shop.catalog bundles/tuned")
@click.argument("catalog", type=CatalogFolder())
@click.argument("bundle")
@json_option
def reindex(catalog: Path, bundle: str, as_json: bool) -> None:
    """Re-encode every picture of CATALOG with another BUNDLE, which it then keeps."""
    from unidiff_sdk.catalog.catalog import Catalog

    with Catalog(catalog, create=False) as opened:
        count = opened.reindex(bundle, progress=not as_json)
    if as_json:
        click.echo(json.dumps({"reindexed": count}))
    else:
        click.echo(f"{count:,} items re-encoded with {bundle}." if count else f"{catalog} is made with it already.")


@main.command(
    short_help="Write a catalog into one parquet file.",
    epilog="""
    unidiff export shop.catalog shop.parquet
    unidiff export shop.catalog drawn.parquet --where '{"generated": true}'
    """,
)
@click.argument("catalog", type=CatalogFolder())
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--where", help="Only what passes this filter, as JSON.")
@json_option
def export(catalog: Path, file: Path, where: str | None, as_json: bool) -> None:
    """Write all items of CATALOG with vectors and pictures into FILE, from which `unidiff restore` makes it again."""
    from unidiff_sdk.catalog.catalog import Catalog

    with Catalog(catalog, create=False) as opened:
        count = opened.export(file, where=_parse_json(where), progress=not as_json)
    size = file.stat().st_size
    if as_json:
        click.echo(json.dumps({"items": count, "bytes": size}))
    else:
        click.echo(f"{count:,} items in {file} ({size / 1e6:,.1f} MB)")


@main.command(
    short_help="Make a catalog from such a file.",
    epilog="""
    unidiff restore shop.parquet shop.catalog
    unidiff restore shop.parquet tuned.catalog --bundle bundles/tuned --reencode
    """,
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("catalog", type=CatalogFolder())
@click.option("--bundle", help="Where the bundle of the export is, if it has moved; or another one, with --reencode.")
@click.option("--reencode", is_flag=True, help="Encode the pictures anew.")
@json_option
def restore(file: Path, catalog: Path, bundle: str | None, reencode: bool, as_json: bool) -> None:
    """Make a new CATALOG of FILE, which `unidiff export` wrote."""
    from unidiff_sdk.catalog.catalog import Catalog

    with Catalog.restore(file, catalog, bundle, reencode=reencode, progress=not as_json) as opened:
        items = opened.count()
    if as_json:
        click.echo(json.dumps({"items": items}))
    else:
        click.echo(f"{catalog} holds {items:,} items.")


# ------------------------------------------------------------------------------------------------ output


def _parse_json(where: str | None) -> Any:
    try:
        return None if where is None else json.loads(where)
    except ValueError as error:
        raise FilterError(f'--where is not JSON ({error}); write it like \'{{"price": {{"lt": 80}}}}\'') from error


def _meant(id: str) -> list[str | int]:
    """On the command line 7 may mean the id 7 or the id "7"."""
    number = id.removeprefix("-")
    return [id, int(id)] if number.isdecimal() and len(id) < 19 and id == str(int(id)) else [id]


def _known(catalog: Catalog, id: str) -> str | int:
    """The id that is meant by what was typed; as it is if the catalog knows neither, which the search then says."""
    return next((meant for meant in _meant(id) if catalog.get(meant)), id)


def _show_hits(hits: Sequence[Hit], offset: int, pictures: bool | None) -> None:
    """A table; or, with pictures, one hit below the other."""
    if not hits:
        return
    how = graphics_protocol(os.environ)
    if not (sys.stdout.isatty() and how if pictures is None else pictures):
        rows = (
            [n, f"{hit.score:.3f}", hit.id, shorten(hit.text), _columns(hit)] for n, hit in enumerate(hits, offset + 1)
        )
        _table(["", "score", "id", "caption", "columns"], rows)
        return
    for n, hit in enumerate(hits, offset + 1):
        click.echo(render_image(hit.thumbnail(), how if sys.stdout.isatty() else ""), color=True)
        click.echo(f"{n}. {hit.score:.3f}  {shorten(hit.id)}  {shorten(hit.text)}")
        click.echo(f"   {_columns(hit)}\n")


def _table(header: list[str], rows: Iterable[Sequence[object]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in header:
        table.add_column(name, overflow="fold")  # an id that is cut short could not be typed again
    for row in rows:
        table.add_row(*(escape(terminal_safe(cell)) for cell in row))
    Console().print(table)


def _columns(hit: Hit) -> str:
    return shorten(", ".join(f"{name}: {value}" for name, value in hit.payload.items()))


def _name(hit: Hit | None) -> str:
    return shorten(f"{hit.id}: {hit.text or ''}") if hit else ""


def _hit_as_dict(hit: Hit) -> dict[str, Any]:
    return {"id": hit.id, "score": hit.score, "text": hit.text, "payload": hit.payload, "uri": hit.uri}


def _save(generation: Generation, out: Path) -> list[Path]:
    """Write the pictures, best first, a contact sheet, and `generation.json` with what makes them again."""
    from .contact_sheet import contact_sheet

    files = [out / f"{rank:03d}-seed{picture.seed}.png" for rank, picture in enumerate(generation)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, picture in zip(files, generation, strict=True):
            picture.save(file)
        contact_sheet(generation).save(out / "contact-sheet.png")
        (out / "generation.json").write_text(json.dumps(_generation_as_list(generation, files), indent=2) + "\n")
    except OSError as error:
        raise OptionError(f"cannot write pictures to {out}: {error.strerror}") from error
    return files


def _generation_as_list(generation: Generation, files: Sequence[Path]) -> list[dict[str, Any]]:
    return [
        {
            "file": str(file),
            "score": picture.score,
            "nearest": _hit_as_dict(picture.nearest) if picture.nearest else None,
            **picture.payload,
        }
        for file, picture in zip(files, generation, strict=True)
    ]
