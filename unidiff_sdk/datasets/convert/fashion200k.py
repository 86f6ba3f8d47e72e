"""Fashion200k: product images of women's fashion with short descriptions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import DataError

from .pairs import Pair
from .source_files import find_folder, image_in, lines_of, words

__all__ = ["fashion200k"]


def fashion200k(source: str | Path) -> Iterator[Pair | InvalidRow]:
    """Iterate over the pairs of Fashion200k (Han et al. 2017, "Automatic Spatially-aware Fashion Concept Discovery").

    The layout is documented at https://github.com/xthan/fashion-200k:

        SOURCE/labels/dress_train_detect_all.txt    a file for each of five categories, and train and test
        SOURCE/women/dresses/casual_and_day_dresses/51727804/51727804_0.jpeg

        women/dresses/…/51727804_0.jpeg <tab> detection score <tab> description

    The columns are category, subcategory, product (the group), published_split and detection_score.

    Raises:
        DataError: labels/ is missing or has no such file, or a file cannot be read.
    """
    source = Path(source)
    folder = find_folder(source, ("labels",), "the labels of Fashion200k")
    files = sorted(folder.glob("*_detect_all.txt"))
    if not files:
        raise DataError(
            f"{folder} has no file such as dress_train_detect_all.txt. Unpack the labels of Fashion200k there."
        )
    line = 0
    for file in files:
        split = "test" if "_test_" in file.name else "train"
        for content in filter(str.strip, lines_of(file)):
            line += 1
            yield _pair(source, content.rstrip("\r\n"), split, line)


def _pair(source: Path, content: str, split: str, line: int) -> Pair | InvalidRow:
    name, _, rest = content.partition("\t")
    score, separator, text = rest.partition("\t")
    parts = name.split("/")
    if not separator or len(parts) != 5:
        return InvalidRow(
            line, name[:100], "expected women/CATEGORY/SUBCATEGORY/PRODUCT/FILE, a score and a description"
        )
    image = image_in(source, name)
    if image is None:
        return InvalidRow(line, name, "there is no such image")
    if not words(text):
        return InvalidRow(line, name, "the description is missing")
    _, category, subcategory, product, _ = parts
    columns = {"category": category, "subcategory": subcategory, "product": product, "published_split": split}
    try:
        columns["detection_score"] = float(score)  # type: ignore[assignment]
    except ValueError:
        return InvalidRow(line, name, f"the detection score is {score!r:.40}")
    return Pair(image.stem, product, image, words(text), columns, line)
