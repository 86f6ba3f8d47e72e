"""Public sets of product pictures, as they are downloaded, into catalog folders with splits that anyone can repeat.

What is written: OUT/train, OUT/val and OUT/test, each a folder that `datasets.reader` reads, and OUT/split.json with
the rule. A pair's split follows from its group alone (for DeepFashion the garment, so that no garment is in two splits;
for M5Product the product): the first 8 bytes of SHA-256("SEED:GROUP") as a fraction of 2^64 fall into [0, 0.8) train,
[0.8, 0.9) val or [0.9, 1) test. So a part of a set has the same splits as the whole, and `n` pairs are those with the
lowest SHA-256("SEED:ID"), whatever else is there. The published seed is 0.

The layouts that are expected are described in the functions, with where they are documented. They were rebuilt from
that documentation and from programs that read the sets: neither set can be had without its owners' terms.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unidiff_sdk.errors import DataError

from .reader import InvalidRow

__all__ = ["SEED", "Converted", "Pair", "convert", "deepfashion_multimodal", "m5product", "split_of"]

SEED = 0
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Pair:
    """A picture, its caption, its columns; `group` is what must not be in two splits, `line` its place in the set."""

    id: str
    group: str
    picture: Path
    text: str
    columns: dict[str, Any]
    line: int


@dataclass(frozen=True)
class Converted:
    """How many pairs each split got, and what was passed over."""

    counts: dict[str, int]
    bad: list[InvalidRow] = field(default_factory=list)


def split_of(group: str, seed: int = SEED) -> str:
    """The split of a group: "train", "val" or "test"."""
    place = int.from_bytes(_digest(group, seed)[:8], "big") / 2**64
    if place < SHARES["train"]:
        return "train"
    return "val" if place < SHARES["train"] + SHARES["val"] else "test"


def convert(
    pairs: Iterable[Pair | InvalidRow],
    out: str | Path,
    *,
    source: str,
    seed: int = SEED,
    n: int | None = None,
    strict: bool = False,
) -> Converted:
    """Write pairs as catalog folders, pictures linked where the file system can, else copied.

    Args:
        pairs: from `deepfashion_multimodal` or `m5product`.
        out: a folder that does not exist yet; it appears once everything is in it.
        source: the set's name, for split.json.
        seed: of the splits and of the choice of `n`; the published one by default.
        n: keep this many pairs of train, chosen by the seed alone; val and test stay whole.
        strict: raise at the first pair that cannot be used.

    Raises:
        DataError: `out` exists, nothing is usable, the disk is full, or in strict mode a bad pair.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists already: name a folder that does not, or remove it")
    bad: list[InvalidRow] = []
    chosen: dict[str, list[Pair]] = {split: [] for split in SHARES}
    for pair in pairs:
        if isinstance(pair, Pair):
            chosen[split_of(pair.group, seed)].append(pair)
        elif strict:
            raise DataError(f"{source}, {pair}")
        else:
            bad.append(pair)
    if not any(chosen.values()):
        why = f"the first of {len(bad):,} problems: {bad[0]}" if bad else "the source lists none"
        raise DataError(f"{source}: there is no usable pair of picture and caption ({why})")
    if n is not None:
        chosen["train"] = sorted(chosen["train"], key=lambda pair: _digest(pair.id, seed))[:n]
    counts = {split: len(pairs) for split, pairs in chosen.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            whole = Path(temporary) / out.name
            for split, kept in chosen.items():
                _write(kept, whole / split)
            rule = {"source": source, "seed": seed, "shares": SHARES, "n": n, "pairs": counts, "passed_over": len(bad)}
            (whole / "split.json").write_text(json.dumps(rule, indent=2) + "\n", encoding="utf-8")
            whole.rename(out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from error
    return Converted(counts, bad)


def _write(pairs: list[Pair], folder: Path) -> None:
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as table:
        for pair in pairs:
            name = f"{_safe(pair.id)}{pair.picture.suffix.lower()}"
            _link(pair.picture, folder / name)
            row = {"file_name": name, "text": pair.text, "id": pair.id, **pair.columns}
            table.write(json.dumps(row, ensure_ascii=False) + "\n")


def _link(picture: Path, target: Path) -> None:
    try:
        os.link(picture.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(picture, target)


def _safe(id: str) -> str:
    """An id as a file name; two ids never get the same one."""
    plain = re.sub(r"[^\w.-]", "_", id)[:100]
    return plain if plain == id else f"{plain}-{hashlib.sha256(id.encode()).hexdigest()[:8]}"


def _digest(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


# -------------------------------------------------------------------------------------------- DeepFashion-MultiModal

# The label files' columns, and the words that their numbers stand for; None is "not visible", which is left out.
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
# MEN-Denim-id_00000080-01_7_additional.jpg: gender, category, garment, color, number and name of the view.
_NAME = re.compile(r"(?P<gender>MEN|WOMEN)-(?P<category>\w+)-(?P<garment>id_\d+)-(?P<colour>\d+)_\d+_(?P<view>\w+)")


def deepfashion_multimodal(source: str | Path, gender: Literal["men", "women"]) -> Iterator[Pair | InvalidRow]:
    """The pairs of DeepFashion-MultiModal (Jiang et al. 2022, "Text2Human") that show men, or women.

    Expected in `source`: `images/`, `captions.json` (an object from file name to caption) and, if its columns are
    wanted, `labels/` with `shape/shape_anno_all.txt`, `texture/fabric_ann.txt` and `texture/pattern_ann.txt` (lines of
    a file name and numbers). The numbers' meaning is documented at https://github.com/yumingj/DeepFashion-MultiModal.

    Columns: gender, category, garment (the group), color (its number), view, and the labels as words, those that are
    not visible left out.

    Raises:
        DataError: captions.json or images/ is not there or is not of this form.
    """
    source = Path(source)
    captions = _captions(source / "captions.json")
    images = source / "images"
    if not images.is_dir():
        raise DataError(f"{images}: there is no such folder; unpack the images of DeepFashion-MultiModal there")
    labels = _labels(source / "labels")
    for line, (name, text) in enumerate(captions.items(), start=1):
        told = _NAME.fullmatch(Path(name).stem)
        if told is None:
            yield InvalidRow(line, name, "the name is not like MEN-Denim-id_00000080-01_7_additional.jpg")
            continue
        if told["gender"].lower() != gender:
            continue
        picture = images / Path(name).name
        if not isinstance(text, str) or not text.strip():
            yield InvalidRow(line, name, "it has no caption")
        elif not picture.is_file():
            yield InvalidRow(line, name, "there is no such picture in images/")
        else:
            garment = f"{told['gender']}-{told['category']}-{told['garment']}"
            columns = {"gender": gender, "category": told["category"], "garment": garment}
            columns |= {"colour": told["colour"], "view": told["view"], **labels.get(picture.name, {})}
            yield Pair(picture.stem, garment, picture, text.strip(), columns, line)


def _captions(file: Path) -> dict[str, Any]:
    try:
        captions = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{file}: there is no such file; it is DeepFashion-MultiModal's textual descriptions"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(captions, dict):
        raise DataError(f"{file}: must hold an object from file name to caption, not {type(captions).__name__}")
    return captions


def _labels(folder: Path) -> dict[str, dict[str, str]]:
    """Of each picture the labels that are visible, by its file name."""
    found: dict[str, dict[str, str]] = {}
    for name, columns in _LABELS.items():
        file = folder / name
        if not file.is_file():
            continue
        for line, content in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            picture, *numbers = content.split()
            words = found.setdefault(picture, {})
            try:
                for (column, meanings), number in zip(columns.items(), numbers, strict=True):
                    if meaning := meanings[int(number)]:
                        words[column] = meaning
            except (ValueError, IndexError) as error:
                raise DataError(
                    f"{file}, line {line}: expected a file name and {len(columns)} numbers that stand for "
                    f"{', '.join(columns)}, not {content!r}"
                ) from error
    return found


# -------------------------------------------------------------------------------------------- M5Product

_ANNOTATIONS = "*id_label.json"
_CHUNK, _LONGEST_ENTRY = 1 << 20, 1 << 24  # characters
_OPENING, _COLON, _COMMA = re.compile(r"\s*\{\s*"), re.compile(r"\s*:\s*"), re.compile(r"\s*(,\s*|(?=\}))")


def m5product(source: str | Path) -> Iterator[Pair | InvalidRow]:
    """The pairs of M5Product (Dong et al. 2022, "M5Product: Self-harmonized Contrastive Learning").

    Expected in `source`: the annotations, `product1m_product5m_id_label.json` or another single file that ends so (an
    object from product id to `title`, `label`, `url` and `pv`, the properties as `key#:#value#;#key#:#value`), read
    piece by piece as they take gigabytes; and `images/` with the main picture as `ID.jpg` of those products that
    are wanted, fetched from their `url` beforehand. The set is described at
    https://xiaodongsuper.github.io/M5Product_dataset/, the annotations' keys by the programs that read them, of
    https://github.com/Xiaodongsuper/M5Product_toolkit.

    Titles are Chinese: the CLIP that is tuned must know it. Columns: label (the category), attributes (from name to the
    list of its values).

    Raises:
        DataError: the annotations or images/ are not there or are not of this form.
    """
    source = Path(source)
    whole = source / "product1m_product5m_id_label.json"
    files = [whole] if whole.is_file() else sorted(source.glob(_ANNOTATIONS))
    if len(files) != 1:
        raise DataError(f"{source}: expected one file of annotations that ends in id_label.json, found {len(files)}")
    images = source / "images"
    if not images.is_dir():
        raise DataError(f"{images}: there is no such folder; put each product's main picture there as ID.jpg")
    pictures = {picture.stem: picture for picture in images.iterdir() if picture.suffix.lower() in IMAGE_SUFFIXES}
    for line, (id, product) in enumerate(_entries(files[0]), start=1):
        if id not in pictures:  # few will have fetched all six million
            continue
        picture = pictures.pop(id)
        if not isinstance(product, dict) or not isinstance(title := product.get("title"), str) or not title.strip():
            yield InvalidRow(line, id, "it has no title")
        else:
            columns = {"label": str(product.get("label", "")), "attributes": _properties(str(product.get("pv", "")))}
            yield Pair(id, id, picture, title.strip(), columns, line)
    for picture in pictures.values():
        yield InvalidRow(0, picture.name, f"{files[0].name} has no such product")


def _properties(pv: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for item in pv.split("#;#"):
        name, separator, value = item.partition("#:#")
        if separator and name.strip() and value.strip():
            found.setdefault(name.strip(), []).append(value.strip())
    return found


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    """The members of the object that a JSON file holds, one at a time: the file may be larger than the memory."""
    decode = json.JSONDecoder().raw_decode
    with file.open(encoding="utf-8") as stream:
        text, place = stream.read(_CHUNK), 0
        opening = _OPENING.match(text)
        if opening is None:
            raise DataError(f"{file}: must hold a JSON object from product id to its annotation")
        place = opening.end()
        while not text.startswith("}", place):
            try:
                key, end = decode(text, place)
                value, end = decode(text, _after(_COLON, text, end))
                end = _after(_COMMA, text, end)
            except (json.JSONDecodeError, RecursionError) as error:
                more = stream.read(_CHUNK)  # the chunk may have ended within the entry
                if not more or len(text) - place > _LONGEST_ENTRY:
                    raise DataError(f"{file}: is cut short or is not JSON near {text[place : place + 60]!r}") from error
                text, place = (text[place:] + more).lstrip(), 0
                continue
            yield str(key), value
            place = end


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    if found is None:
        raise json.JSONDecodeError(f"Expecting {pattern.pattern}", text, place)
    return found.end()
