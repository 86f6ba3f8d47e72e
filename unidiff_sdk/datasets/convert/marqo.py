"""The fashion datasets that Marqo publishes on the hub: parquet files with images, texts and categories."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from unidiff_sdk.datasets.reader import EmbeddedImage, InvalidRow, SpooledImage, read_catalog

from .pairs import Pair
from .source_files import words

__all__ = ["marqo"]

# The part of an item_ID that names the product: MEN-Denim-id_00000080-01_7_additional, 51727804_0.
_PRODUCT = re.compile(r"(?P<product>.+-id_\d+|\d+)[-_]\d+(_\d+_\w+|_\w+)?")
# The first bytes of an image file.
_FORMATS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"RIFF": ".webp"}


def marqo(source: str | Path) -> Iterator[Pair | InvalidRow]:
    """Iterate over the pairs of a dataset of https://huggingface.co/Marqo, such as Marqo/fashion200k.

    Marqo/deepfashion-inshop, deepfashion-multimodal, fashion200k, KAGL, atlas, polyvore and iMaterialist have the
    columns that https://github.com/marqo-ai/marqo-FashionCLIP reads:

        SOURCE/data/data-00000-of-00008.parquet

        image: {"bytes": …, "path": …}    text    item_ID    category1, category2, … and others

    `unidiff index SOURCE` and `read_catalog` read such a folder as it is. This function adds splits by product: the
    part of the item_ID that the images of a product have in common. All other columns are kept. Images are kept in a
    temporary file until they are written.

    Raises:
        DataError: the folder has no parquet file, or the table has no column image or text.
    """
    invalid: list[InvalidRow] = []
    spool = tempfile.TemporaryFile(prefix="unidiff-")  # noqa: SIM115 (closed with the last image)
    offset = 0
    for row in read_catalog(source, columns={"id": "item_ID"}, on_error=invalid.append):
        yield from invalid
        invalid.clear()
        content = row.source.content if isinstance(row.source, EmbeddedImage) else b""
        suffix = next((end for start, end in _FORMATS.items() if content.startswith(start)), None)
        id = words(str(row.payload.pop("id", ""))) or str(row.line)
        if suffix is None:
            yield InvalidRow(row.line, row.name, "the image is not a JPEG, PNG or WebP in the table")
            continue
        spool.write(content)
        spool.flush()
        product = _PRODUCT.fullmatch(id)
        image = SpooledImage(f"image{suffix}", spool, offset, len(content))
        offset += len(content)
        yield Pair(id, product["product"] if product else id, image, row.text, row.payload, row.line)
    yield from invalid
