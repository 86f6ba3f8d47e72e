"""H&M Personalized Fashion Recommendations: articles of a fashion shop with descriptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.datasets.tables import read_table
from unidiff_sdk.errors import DataError

from .pairs import Pair
from .source_files import find_folder, image_in, words

__all__ = ["hm"]

_DIGITS = 10  # of an article_id; tools that read it as a number drop its leading zero
# The columns that are kept, by their names in articles.csv.
_COLUMNS = {
    "product_code": "product_code",
    "product_type_name": "product_type",
    "product_group_name": "product_group",
    "graphical_appearance_name": "appearance",
    "colour_group_name": "color",
    "index_group_name": "index_group",
    "section_name": "section",
    "garment_group_name": "garment_group",
}


def hm(source: str | Path) -> Iterator[Pair | InvalidRow]:
    """Iterate over the pairs of the H&M data of Kaggle.

    The files are documented at https://www.kaggle.com/competitions/h-and-m-personalized-fashion-recommendations/data:

        SOURCE/articles.csv                 a row for each article, with a header
        SOURCE/images/010/0108775015.jpg    the folder is the start of the article_id; some articles have no image

    The text is "NAME, COLOR. DESCRIPTION". The group is the product_code, which the colors of a product have in common.
    Articles without an image are left out. The columns are product_code, product_type, product_group, appearance,
    color, index_group, section and garment_group.

    Raises:
        DataError: articles.csv or images/ is missing, or the table has another format.
    """
    source = Path(source)
    images = find_folder(source, ("images",), "the images of H&M")
    table = source / "articles.csv"
    if not table.is_file():
        raise DataError(f"{table}: there is no such file. It holds the articles of H&M.")
    strings = ("article_id", "prod_name", "detail_desc", *_COLUMNS)
    for line, row in read_table(table, lambda header: _check_header(table, header), dict.fromkeys(strings, "string")):
        if isinstance(row, str):
            yield InvalidRow(line, "", row)
            continue
        article = str(row.get("article_id", "")).zfill(_DIGITS)
        image = image_in(images, f"{article[:3]}/{article}.jpg")
        if image is None:
            continue
        name, color, details = (words(row.get(key)) for key in ("prod_name", "colour_group_name", "detail_desc"))
        if not name:
            yield InvalidRow(line, image.name, "the name is missing")
            continue
        text = f"{name}, {color.lower()}" if color else name
        columns = {ours: words(row[theirs]) for theirs, ours in _COLUMNS.items() if words(row.get(theirs))}
        group = columns.get("product_code") or article
        yield Pair(article, group, image, f"{text}. {details}" if details else text, columns, line)


def _check_header(table: Path, header: Sequence[str]) -> None:
    if missing := [name for name in ("article_id", "prod_name", "product_code") if name not in header]:
        raise DataError(f"{table} has no column {missing[0]!r}. It must be articles.csv of the H&M data.")
