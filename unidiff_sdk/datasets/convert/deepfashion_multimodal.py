"""DeepFashion-MultiModal: images of people with captions and labels of their clothes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from unidiff_sdk._internal.json_values import read_json
from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import DataError

from .pairs import Pair
from .source_files import text_of

__all__ = ["deepfashion_multimodal"]

# The columns of the label files and the meaning of their numbers. None means "not visible" and is left out.
_SHAPE: dict[str, tuple[str | None, ...]] = {
    "sleeve_length": ("sleeveless", "short", "medium", "long", "not long", None),
    "lower_length": ("three-point", "medium short", "three-quarter", "long", None),
    "socks": ("none", "socks", "leggings", None),
    "hat": ("no", "yes", None),
    "glasses": ("none", "eyeglasses", "sunglasses", "in hand or on clothes", None),
    "neckwear": ("no", "yes", None),
    "wrist_wearing": ("no", "yes", None),
    "ring": ("no", "yes", None),
    "waist_accessories": ("none", "belt", "clothing", "hidden", None),
    "neckline": ("V", "square", "round", "standing", "lapel", "suspenders", None),
    "cardigan": ("yes", "no", None),
    "covers_navel": ("no", "yes", None),
}
_FABRICS = ("denim", "cotton", "leather", "furry", "knitted", "chiffon", "other", None)
_PATTERNS = ("floral", "graphic", "striped", "pure color", "lattice", "other", "color block", None)
_GARMENTS = ("upper", "lower", "outer")
_LABELS: dict[str, dict[str, tuple[str | None, ...]]] = {
    "shape/shape_anno_all.txt": _SHAPE,
    "texture/fabric_ann.txt": {f"{garment}_fabric": _FABRICS for garment in _GARMENTS},
    "texture/pattern_ann.txt": {f"{garment}_pattern": _PATTERNS for garment in _GARMENTS},
}
# MEN-Denim-id_00000080-01_7_additional.jpg: gender, category, garment, color, and number and name of the view.
_NAME = re.compile(r"(?P<gender>MEN|WOMEN)-(?P<category>\w+)-(?P<garment>id_\d+)-(?P<color>\d+)_\d+_(?P<view>\w+)")


def deepfashion_multimodal(source: str | Path, gender: Literal["men", "women"]) -> Iterator[Pair | InvalidRow]:
    """Iterate over the pairs of DeepFashion-MultiModal (Jiang et al. 2022, "Text2Human") that show men or women.

    The meaning of the labels is documented at https://github.com/yumingj/DeepFashion-MultiModal. Layout:

        SOURCE/images/MEN-Denim-id_00000080-01_7_additional.jpg
        SOURCE/captions.json                        {"MEN-Denim-….jpg": "The man wears …", …}
        SOURCE/labels/shape/shape_anno_all.txt      optional, as are the next two: a file name and numbers per line
        SOURCE/labels/texture/fabric_ann.txt
        SOURCE/labels/texture/pattern_ann.txt

    The columns are gender, category, garment (the group), colour (its number), view, and the labels in words.

    Raises:
        DataError: captions.json or images/ is missing or has another format.
    """
    source = Path(source)
    captions = _captions(source / "captions.json")
    images = source / "images"
    if not images.is_dir():
        raise DataError(f"{images}: there is no such folder. Unpack the images of DeepFashion-MultiModal there.")
    labels = _labels(source / "labels")
    for line, (name, text) in enumerate(captions.items(), start=1):
        parts = _NAME.fullmatch(Path(name).stem)
        if parts is None:
            yield InvalidRow(line, name, "the name does not have the form MEN-Denim-id_00000080-01_7_additional.jpg")
            continue
        if parts["gender"].lower() != gender:
            continue
        image = images / Path(name).name
        if not isinstance(text, str) or not text.strip():
            yield InvalidRow(line, name, "the caption is missing")
        elif not image.is_file():
            yield InvalidRow(line, name, "there is no such image in images/")
        else:
            garment = f"{parts['gender']}-{parts['category']}-{parts['garment']}"
            columns = {"gender": gender, "category": parts["category"], "garment": garment}
            columns |= {"colour": parts["color"], "view": parts["view"], **labels.get(image.name, {})}
            yield Pair(image.stem, garment, image, text.strip(), columns, line)


def _captions(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise DataError(f"{file}: there is no such file. It holds the textual descriptions of DeepFashion-MultiModal.")
    captions = read_json(file, kind=object)
    if not isinstance(captions, dict):
        raise DataError(f"{file}: must hold an object from file name to caption, not {type(captions).__name__}")
    return captions


def _labels(folder: Path) -> dict[str, dict[str, str]]:
    """Read the visible labels: file name -> column -> word."""
    found: dict[str, dict[str, str]] = {}
    for name, columns in _LABELS.items():
        file = folder / name
        if not file.is_file():
            continue
        for line, content in enumerate(text_of(file).splitlines(), start=1):
            image, *numbers = content.split() or [""]
            words = found.setdefault(image, {})
            try:
                for (column, meanings), number in zip(columns.items(), numbers, strict=True):
                    if meaning := meanings[int(number)]:
                        words[column] = meaning
            except (ValueError, IndexError) as error:
                raise DataError(
                    f"{file}, line {line}: {content!r}. Expected a file name and {len(columns)} numbers for "
                    f"{', '.join(columns)}."
                ) from error
    return found
