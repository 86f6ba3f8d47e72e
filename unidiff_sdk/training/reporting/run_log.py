"""The log of a run, in a folder next to its checkpoint. The report is made from it. It stays complete after a resume.

run.json              settings, command, versions, and how the run ended
steps.jsonl           losses, learning rate and duration of every step
validations.jsonl     figures, prompts and ranks of every validation
samples/000100.webp   images generated for the prompts, eight per row
examples.json         searches with validation captions, at the last validation
invalid_rows.jsonl    every row that was skipped: data, line, file name and reason
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.files import read_regular_file
from unidiff_sdk._internal.images import load_image
from unidiff_sdk._internal.json_values import damaged_content, parse_json, read_json
from unidiff_sdk._internal.text import json_text
from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import TrainingError
from unidiff_sdk.training.evaluation.validation import SearchExample, ValidationRecord
from unidiff_sdk.training.runtime.callbacks import StepReport

__all__ = ["Log", "RunLog", "read_log"]

RUN, STEPS, VALIDATIONS, EXAMPLES = "run.json", "steps.jsonl", "validations.jsonl", "examples.json"
INVALID_ROWS = "invalid_rows.jsonl"
MAX_LOG = 1 << 30  # bytes of a .jsonl file: a million steps take 200 MB
SAMPLES, PER_ROW = "samples", 8  # a WebP image has at most 16,383 pixels per side


class RunLog:
    """Writes the log of a run; a `RunCallback`. Nothing is written before the first event.

    When a run is resumed, entries that the earlier process wrote from that step on are removed.

    Args:
        folder: Folder of the log. Created if missing.
        about: Description of the run, JSON-serializable: name, command, settings, base and data.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self.about = dict(about)
        self.started = False
        self._invalid_rows: list[dict[str, Any]] = []

    def on_invalid_rows(self, data: Path, rows: Sequence[InvalidRow]) -> Path:
        """Write the skipped rows of `data`, after those of other data. Returns the file."""
        self._invalid_rows += [
            {"data": data.name, "line": row.line, "file_name": row.file_name, "reason": row.reason} for row in rows
        ]
        file = self.folder / INVALID_ROWS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_text(file, "".join(json_text(row) + "\n" for row in self._invalid_rows))
        except OSError as error:
            raise _not_written(file, error) from error
        return file

    def on_step(self, report: StepReport) -> None:
        """Append a step."""
        self._begin(report.step)
        _append(self.folder / STEPS, asdict(report))

    def on_validation(self, record: ValidationRecord) -> None:
        """Append a validation, write its samples, and replace the search examples."""
        self._begin(record.step)
        if record.samples:
            _contact_sheet(record.samples).save(self.folder / SAMPLES / f"{record.step:06d}.webp", quality=92)
        _write_json(self.folder / EXAMPLES, [_example_as_json(example) for example in record.examples])
        line = {"step": record.step, "figures": record.figures}
        _append(self.folder / VALIDATIONS, line | {"prompts": record.prompts, "ranks": record.ranks})

    def finish(self, **facts: Any) -> None:
        """Record how the run ended: pairs, invalid rows, chosen weights, …"""
        self.about |= facts
        _write_json(self.folder / RUN, self.about)

    def _begin(self, step: int) -> None:
        """Prepare the folder at the first event and remove what an earlier process wrote from `step` on."""
        if self.started:
            return
        self.started = True
        try:
            (self.folder / SAMPLES).mkdir(parents=True, exist_ok=True)
            for name in (STEPS, VALIDATIONS):
                kept = [line for line in _lines(self.folder / name) if line["step"] < step]
                _write_text(self.folder / name, "".join(json.dumps(line) + "\n" for line in kept))
            for image in (self.folder / SAMPLES).glob("*.webp"):
                if int(image.stem) >= step:
                    image.unlink()
            _write_json(self.folder / RUN, self.about)
        except OSError as error:
            raise _not_written(self.folder, error) from error


@dataclass(frozen=True)
class Log:
    """A log that was read.

    Attributes:
        about: Description of the run.
        steps: The steps, in order.
        validations: The validations, in order.
        samples: By step, one image per prompt.
        examples: Search examples of the last validation, with PIL images.
    """

    about: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    samples: dict[int, list[Image.Image]]
    examples: list[dict[str, Any]]


def read_log(folder: Path) -> Log:
    """Read what a run has logged so far. Raises TrainingError if the folder holds no log."""
    if not (folder / RUN).is_file():
        raise TrainingError(f"{folder} holds no run log: {RUN} is missing.")
    with damaged_content(folder, TrainingError, "Move it away, so that the next run starts a new log."):
        return _read(folder)


def _read(folder: Path) -> Log:
    # Of several validations after the same step, the last one measures the chosen weights.
    validations = list({line["step"]: line for line in _lines(folder / VALIDATIONS)}.values())
    samples = {}
    for line in filter(lambda line: line["prompts"], validations):
        sheet = load_image(folder / SAMPLES / f"{line['step']:06d}.webp")
        samples[line["step"]] = _cut(sheet, len(line["prompts"]))
    examples = read_json(folder / EXAMPLES, error=TrainingError, kind=list, nan=True) if validations else []
    examples = [example for example in examples if "expected" in example]  # earlier versions wrote another format
    for example in examples:
        example["expected"] = _decoded(example["expected"])
        for hit in example["hits"]:
            hit["image"] = _decoded(hit["image"])
    about = read_json(folder / RUN, error=TrainingError, nan=True)
    return Log(about, list(_lines(folder / STEPS)), validations, samples, examples)


def _example_as_json(example: SearchExample) -> dict[str, Any]:
    hits = [
        {
            "row": hit.row,
            "image": _encoded(hit.image),
            "caption": hit.caption,
            "score": hit.score,
            "relevant": hit.relevant,
        }
        for hit in example.hits
    ]
    return {
        "row": example.row,
        "caption": example.caption,
        "rank": example.rank,
        "expected": _encoded(example.expected),
        "hits": hits,
    }


def _contact_sheet(images: Sequence[NDArray[np.uint8]]) -> Image.Image:
    """Square images of one size, `PER_ROW` in a row."""
    side = len(images[0])
    sheet = Image.new("RGB", (side * min(len(images), PER_ROW), side * -(-len(images) // PER_ROW)), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, PER_ROW)
        sheet.paste(Image.fromarray(image), (side * column, side * row))
    return sheet


def _cut(sheet: Image.Image, n: int) -> list[Image.Image]:
    """The n images of a contact sheet."""
    side = sheet.width // min(n, PER_ROW)
    places = [divmod(number, PER_ROW) for number in range(n)]
    return [sheet.crop((side * column, side * row, side * (column + 1), side * (row + 1))) for row, column in places]


def _not_written(path: Path, error: OSError) -> TrainingError:
    return TrainingError(f"Cannot write the run log to {path}: {error.strerror}")


def _append(file: Path, line: Mapping[str, Any]) -> None:
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json_text(line) + "\n")
    except OSError as error:
        raise _not_written(file, error) from error


def _lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines. A process that was killed may have left half a line at the end."""
    found: list[dict[str, Any]] = []
    content = read_regular_file(file, MAX_LOG, TrainingError) if file.is_file() else b""
    lines = content.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse_json(line, f"{file}, line {number}", error=TrainingError, nan=True))
        except TrainingError:
            if number < len(lines):
                raise
    return found


def _write_json(file: Path, value: Any) -> None:
    _write_text(file, json_text(value, indent=1) + "\n")


def _write_text(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _encoded(image: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=92)
    return base64.b64encode(buffer.getvalue()).decode()


def _decoded(text: str) -> Image.Image:
    return load_image(base64.b64decode(text))
