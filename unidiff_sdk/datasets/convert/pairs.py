"""Convert public product datasets to folders that `reader` reads, with reproducible splits.

    OUT/train/metadata.jsonl        {"file_name": "….jpg", "text": "…", "id": "…", …}, next to the images
    OUT/val/…
    OUT/test/…
    OUT/split.json                  source, seed, shares and counts

The split of a pair depends only on its group and the seed. The group is the product, so that no product is in two
splits. The first 8 bytes of SHA-256("SEED:GROUP"), as a fraction of 2^64, are in [0, 0.8) for train, [0.8, 0.9) for
val and [0.9, 1) for test. A part of a dataset therefore has the same splits as the whole. `n` keeps the pairs with
the lowest SHA-256("SEED:ID"). The published seed is 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import replacement_folder
from unidiff_sdk._internal.json_values import whole_number
from unidiff_sdk.datasets.reader import InvalidRow, SpooledImage
from unidiff_sdk.errors import DataError

__all__ = ["SEED", "SHARES", "Converted", "Pair", "convert", "split_of"]

SEED = 0
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Pair:
    """An image with its caption.

    Attributes:
        id: unique in the dataset.
        group: pairs of one group are in the same split.
        image: the file, or an image of a table, whose name has the suffix of its format.
        text: the caption.
        columns: further columns.
        line: the position in the dataset, from 1.
    """

    id: str
    group: str
    image: Path | SpooledImage
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
        pairs: from one of the functions of this package.
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
            name = f"{_file_name(pair.id)}{Path(pair.image.name).suffix.lower()}"
            if isinstance(pair.image, Path):
                _link(pair.image, folder / name)
            else:
                (folder / name).write_bytes(pair.image.read())
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
