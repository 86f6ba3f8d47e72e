"""Convert public product datasets to folders that `reader` reads, with reproducible splits.

    OUT/train/metadata.jsonl        {"file_name": "….jpg", "text": "…", "id": "…", …}, next to the images
    OUT/val/…
    OUT/test/…
    OUT/split.json                  source, seed, shares and counts

The split of a pair depends only on its group and the seed. The group is the garment for DeepFashion-MultiModal, so that
no garment is in two splits, and the product for M5Product. The first 8 bytes of SHA-256("SEED:GROUP"), as a fraction of
2^64, are in [0, 0.8) for train, [0.8, 0.9) for val and [0.9, 1) for test. A part of a dataset therefore has the same
splits as the whole. `n` keeps the pairs with the lowest SHA-256("SEED:ID"). The published seed is 0.

Each function documents the layout that it expects and its source. Both datasets require the consent of their owners, so
the layouts were reconstructed from their documentation and from programs that read them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unidiff_sdk._internal.files import open_regular_file, read_regular_file, replacement_folder
from unidiff_sdk._internal.json_values import MAX_DOCUMENT, parse_json, read_json, whole_number
from unidiff_sdk.errors import DataError

from .reader import InvalidRow

__all__ = ["SEED", "Converted", "Pair", "convert", "deepfashion_multimodal", "m5product", "split_of"]

SEED = 0
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Pair:
    """An image with its caption.

    Attributes:
        id: unique in the dataset.
        group: pairs of one group are in the same split.
        image: the file.
        text: the caption.
        columns: further columns.
        line: the position in the dataset, from 1.
    """

    id: str
    group: str
    image: Path
    text: str
    columns: dict[str, Any]
    line: int


@dataclass(frozen=True)
class Converted:
    """The result of `convert`.

    Attributes:
        counts: split -> number of pairs.
        invalid: the pairs that were skipped.
    """

    counts: dict[str, int]
    invalid: list[InvalidRow] = field(default_factory=list)


def split_of(group: str, seed: int = SEED) -> str:
    """Return the split of a group: "train", "val" or "test"."""
    fraction = int.from_bytes(_digest(group, seed)[:8], "big") / 2**64
    if fraction < SHARES["train"]:
        return "train"
    return "val" if fraction < SHARES["train"] + SHARES["val"] else "test"


def convert(
    pairs: Iterable[Pair | InvalidRow],
    out: str | Path,
    *,
    source: str,
    seed: int = SEED,
    n: int | None = None,
    strict: bool = False,
) -> Converted:
    """Write pairs as three folders. Images are hard-linked if the file system allows it, and copied otherwise.

    Args:
        pairs: from `deepfashion_multimodal` or `m5product`.
        out: a folder that does not exist yet. It appears when it is complete.
        source: the name of the dataset, for split.json.
        seed: of the splits and of the choice of `n` pairs. Default: the published seed.
        n: the number of training pairs to keep. Default: all. val and test are always complete.
        strict: raise DataError at the first invalid pair instead of skipping it.

    Raises:
        DataError: `out` exists, no pair is valid, the disk is full, or in strict mode a pair is invalid.
    """
    out = Path(out)
    _check_new(out)
    invalid: list[InvalidRow] = []
    seed, n = whole_number("seed", seed, at_least=0), None if n is None else whole_number("n", n, at_least=1)
    chosen: dict[str, list[Pair]] = {split: [] for split in SHARES}
    for pair in pairs:
        if isinstance(pair, Pair):
            chosen[split_of(pair.group, seed)].append(pair)
        elif strict:
            raise DataError(f"{source}, {pair}")
        else:
            invalid.append(pair)
    if not any(chosen.values()):
        why = f"the first of {len(invalid):,} problems: {invalid[0]}" if invalid else "the source lists none"
        raise DataError(f"{source}: there is no valid pair of image and caption ({why})")
    if n is not None:
        chosen["train"] = sorted(chosen["train"], key=lambda pair: _digest(pair.id, seed))[:n]
    counts = {split: len(pairs) for split, pairs in chosen.items()}
    try:
        with replacement_folder(out, DataError) as whole:
            for split, kept in chosen.items():
                _write(kept, whole / split)
            rule = {
                "source": source,
                "seed": seed,
                "shares": SHARES,
                "n": n,
                "pairs": counts,
                "passed_over": len(invalid),
            }
            (whole / "split.json").write_text(json.dumps(rule, indent=2) + "\n", encoding="utf-8")
            _check_new(out)  # again, because a conversion takes minutes
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    return Converted(counts, invalid)


def _check_new(out: Path) -> None:
    if out.exists():
        raise DataError(f"{out} exists already. Choose another folder, or remove it.")


def _write(pairs: list[Pair], folder: Path) -> None:
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as table:
        for pair in pairs:
            name = f"{_file_name(pair.id)}{pair.image.suffix.lower()}"
            _link(pair.image, folder / name)
            row = {"file_name": name, "text": pair.text, "id": pair.id, **pair.columns}
            table.write(json.dumps(row, ensure_ascii=False) + "\n")


def _link(image: Path, target: Path) -> None:
    try:
        os.link(image.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(image, target)


# Hugging Face `datasets` takes these words, between separators, for the split of a file.
_SPLIT_WORDS = re.compile(
    r"(?<![^-._ 0-9])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?![^-._ 0-9])",
    re.IGNORECASE,
)


def _file_name(id: str) -> str:
    """A file name without extension for an id. Different ids have different names, and none looks like a split."""
    plain = _SPLIT_WORDS.sub("_", re.sub(r"[^\w.-]", "_", id)[:100])
    return plain if plain == id else f"{plain}-{hashlib.sha256(id.encode()).hexdigest()[:8]}"


def _digest(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


# -------------------------------------------------------------------------------------------- DeepFashion-MultiModal

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
        for line, content in enumerate(_text_of(file).splitlines(), start=1):
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


def _text_of(file: Path) -> str:
    try:
        return read_regular_file(file, MAX_DOCUMENT, DataError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from None


# -------------------------------------------------------------------------------------------- M5Product

_ANNOTATIONS = "*id_label.json"
_CHUNK, _MAX_ENTRY = 1 << 20, 1 << 24  # characters
_OPENING, _COLON, _COMMA = re.compile(r"\s*\{\s*"), re.compile(r"\s*:\s*"), re.compile(r"\s*(,\s*|(?=\}))")


def m5product(source: str | Path) -> Iterator[Pair | InvalidRow]:
    """Iterate over the pairs of M5Product (Dong et al. 2022, "M5Product: Self-harmonized Contrastive Learning").

    The dataset is described at https://xiaodongsuper.github.io/M5Product_dataset/, and the annotations in the programs
    of https://github.com/Xiaodongsuper/M5Product_toolkit. Layout:

        SOURCE/product1m_product5m_id_label.json    or one other file *id_label.json, read in chunks (gigabytes)
        SOURCE/images/ID.jpg                        the main images, downloaded from the `url` of each product

        {"ID": {"title": "…", "label": "…", "url": "…", "pv": "name#:#value#;#name#:#value"}, …}

    Only products with an image are converted. Titles are Chinese, so the CLIP that is tuned must support Chinese. The
    columns are label (the category) and attributes (name -> list of values).

    Raises:
        DataError: the annotations or images/ are missing or have another format.
    """
    source = Path(source)
    whole = source / "product1m_product5m_id_label.json"
    files = [whole] if whole.is_file() else sorted(source.glob(_ANNOTATIONS))
    if len(files) != 1:
        raise DataError(f"{source}: found {len(files)} annotation files. Expected one file that ends in id_label.json.")
    (annotations,) = files
    images = source / "images"
    if not images.is_dir():
        raise DataError(f"{images}: there is no such folder. Put the main image of each product there as ID.jpg.")
    files_by_id = {image.stem: image for image in images.iterdir() if image.suffix.lower() in IMAGE_SUFFIXES}
    for line, (id, product) in enumerate(read_members(annotations), start=1):
        if id not in files_by_id:  # usually only some of the six million images are downloaded
            continue
        image = files_by_id.pop(id)
        if not isinstance(product, dict) or not isinstance(title := product.get("title"), str) or not title.strip():
            yield InvalidRow(line, id, "the title is missing")
        else:
            columns = {"label": str(product.get("label", "")), "attributes": _properties(str(product.get("pv", "")))}
            yield Pair(id, id, image, title.strip(), columns, line)
    for image in files_by_id.values():
        yield InvalidRow(0, image.name, f"{annotations.name} has no such product")


def _properties(pv: str) -> dict[str, list[str]]:
    """Parse "name#:#value#;#name#:#value". A name can have several values."""
    found: dict[str, list[str]] = {}
    for item in pv.split("#;#"):
        name, separator, value = item.partition("#:#")
        if separator and name.strip() and value.strip():
            found.setdefault(name.strip(), []).append(value.strip())
    return found


def read_members(file: Path, chunk_size: int = _CHUNK) -> Iterator[tuple[str, Any]]:
    """Iterate over the members of the JSON object in a file, which can be larger than the memory.

    Args:
        file: UTF-8.
        chunk_size: characters to read at a time.

    Raises:
        DataError: the file is truncated, is not UTF-8, or does not hold a JSON object.
    """
    decode = json.JSONDecoder(parse_int=float).raw_decode  # only finds the end of a member
    with io.TextIOWrapper(open_regular_file(file, DataError), encoding="utf-8-sig") as stream, _read_errors(file):
        text, place = stream.read(chunk_size), 0
        opening = _OPENING.match(text)
        if opening is None:
            raise DataError(f"{file}: must hold a JSON object from product id to its annotation")
        place = opening.end()
        while not text.startswith("}", place):
            try:
                key, end = decode(text, place)
                start = _after(_COLON, text, end)
                _, value_end = decode(text, start)
                end = _after(_COMMA, text, value_end)
            except (ValueError, RecursionError) as error:
                more = stream.read(chunk_size)  # the chunk may end within the member
                if not more or len(text) - place > _MAX_ENTRY:
                    raise DataError(f"{file}: truncated or not valid JSON near {text[place : place + 60]!r}") from error
                text, place = (text[place:] + more).lstrip(), 0
                continue
            if not isinstance(key, str):
                raise DataError(f"{file}: must hold a JSON object, but has the key {key!r:.60}")
            name = f"{file}: the annotation of {key!r:.60}"
            yield key, parse_json(text[start:value_end], name, kind=object, nan=True)
            place = end


@contextmanager
def _read_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    if found is None:
        raise json.JSONDecodeError(f"Expecting {pattern.pattern}", text, place)
    return found.end()
