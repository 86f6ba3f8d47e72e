"""DeepFashion In-shop: several views of each product, with the description of the shop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.json_values import read_json
from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import DataError

from .pairs import Pair
from .source_files import find_folder, image_in, text_of, words

__all__ = ["deepfashion_inshop"]

# img/WOMEN/Dresses/id_00000002/02_1_front.jpg: gender, category, item, number of the color, number and name of the view
_NAME = re.compile(r"img/(?P<gender>MEN|WOMEN)/(?P<category>\w+)/(?P<item>id_\d+)/\d+_\d+_(?P<view>\w+)\.jpg")


def deepfashion_inshop(source: str | Path) -> Iterator[Pair | InvalidRow]:
    """Iterate over the pairs of the In-shop Clothes Retrieval Benchmark of DeepFashion (Liu et al. 2016).

    The files are documented in the README of the download, at
    http://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html, and at
    https://github.com/open-mmlab/mmfashion/blob/master/docs/dataset/IN_SHOP_DATASET.md. Layout:

        SOURCE/Eval/list_eval_partition.txt         two lines, then: image name, item id, train or query or gallery
        SOURCE/Anno/list_description_inshop.json    [{"item": "id_00000001", "color": "Khaki", "description": ["…"]}]
        SOURCE/Img/img/WOMEN/Dresses/id_00000002/02_1_front.jpg    or SOURCE/img/…

    The text is the description. The columns are gender, category, garment (the group, the same as that of
    `deepfashion_multimodal`, whose splits are therefore the same), color, view and published_split.

    Raises:
        DataError: a file is missing or has another format.
    """
    source = Path(source)
    partition = text_of(source / "Eval" / "list_eval_partition.txt").splitlines()
    items = _descriptions(source / "Anno" / "list_description_inshop.json")
    images = find_folder(source, ("Img/img", "img"), "the images of In-shop").parent
    for line, content in enumerate(partition[2:], start=3):
        fields = content.split()
        parts = _NAME.fullmatch(fields[0]) if len(fields) == 3 else None
        if parts is None:
            if content.strip():
                yield InvalidRow(line, content[:100], "expected img/WOMEN/…/02_1_front.jpg, an item id and a status")
            continue
        name, item, status = fields
        image, (color, text) = image_in(images, name), items.get(item, ("", ""))
        if image is None:
            yield InvalidRow(line, name, "there is no such image")
        elif not text:
            yield InvalidRow(line, name, "the item has no description")
        else:
            garment = f"{parts['gender']}-{parts['category']}-{parts['item']}"
            columns = {"gender": parts["gender"].lower(), "category": parts["category"], "garment": garment}
            columns |= {"color": color} if color else {}
            columns |= {"view": parts["view"], "published_split": status}
            yield Pair(f"{garment}-{image.stem}", garment, image, text, columns, line)


def _descriptions(file: Path) -> dict[str, tuple[str, str]]:
    """Color and description by item id."""
    entries: Any = read_json(file, kind=object)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{file}: must hold a list of objects with item, color and description")
    found = {}
    for entry in entries:
        lines = entry.get("description")
        text = " ".join(filter(None, map(words, lines))) if isinstance(lines, list) else words(lines)
        found[str(entry.get("item"))] = (words(entry.get("color")), text)
    return found
