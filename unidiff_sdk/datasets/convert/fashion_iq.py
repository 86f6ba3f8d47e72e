"""FashionIQ: images of fashion with captions that compare them with another image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.json_values import read_json
from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import DataError

from .pairs import Pair
from .source_files import find_folder, image_in, words

__all__ = ["fashion_iq"]


def fashion_iq(source: str | Path) -> Iterator[Pair | InvalidRow]:
    """Iterate over the pairs of FashionIQ (Wu et al. 2021, "Fashion IQ: A New Dataset Towards Retrieving Images by
    Natural Language Feedback").

    The captions are published at https://github.com/XiaoxiaoGuo/fashion-iq, the images as a list of addresses. Layout:

        SOURCE/captions/cap.dress.train.json    also shirt and toptee, and val
        SOURCE/images/B008BHCT58.jpg            or .png

        [{"target": "B008BHCT58", "candidate": "B003FGW7MK", "captions": ["is solid black", "is longer"]}, …]

    The text joins the captions: it says **how the target differs from the candidate**, not all that the target is. It
    suits searches that refine an image, and is weak as a caption. The image and the group are the target. The columns
    are category, target, candidate and published_split. The captions for test have no targets, and are not read.

    Raises:
        DataError: captions/ or images/ is missing, or a file has another format.
    """
    source = Path(source)
    folder = find_folder(source, ("captions",), "the captions of FashionIQ")
    images = find_folder(source, ("images",), "the images of FashionIQ")
    files = [file for file in sorted(folder.glob("cap.*.*.json")) if not file.name.endswith(".test.json")]
    if not files:
        raise DataError(f"{folder} has no file such as cap.dress.train.json. Put the captions of FashionIQ there.")
    line = 0
    for file in files:
        _, category, split, _ = file.name.split(".", 3)
        entries: Any = read_json(file, kind=object)
        if not isinstance(entries, list):
            raise DataError(f"{file}: must hold a list of objects with target, candidate and captions")
        for entry in entries:
            line += 1
            yield _pair(images, entry, {"category": category, "published_split": split}, line)


def _pair(images: Path, entry: Any, columns: dict[str, str], line: int) -> Pair | InvalidRow:
    entry = entry if isinstance(entry, dict) else {}
    target, candidate, captions = (entry.get(name) for name in ("target", "candidate", "captions"))
    if not isinstance(target, str) or not isinstance(candidate, str) or not isinstance(captions, list):
        return InvalidRow(line, str(target or "")[:100], "expected a target, a candidate and captions")
    image = image_in(images, f"{target}.jpg") or image_in(images, f"{target}.png")
    if image is None:
        return InvalidRow(line, target, "there is no such image in images/")
    text = " and ".join(filter(None, map(words, captions)))
    if not text:
        return InvalidRow(line, target, "the captions are missing")
    columns = {"category": columns["category"], "target": target, "candidate": candidate, **columns}
    return Pair(f"{target}-{candidate}-{line}", target, image, text, columns, line)
