"""What a run tells, kept in a folder beside its checkpoint: the source of its report, and whole after a resume.

run.json            what was asked for, and with what
steps.jsonl         losses, learning rate and seconds of every step
validations.jsonl   figures, prompts and ranks of every look at the model
samples/000100.webp what was drawn for the prompts at that look, eight in a row
examples.json       searches with validation captions, at the last look
bad_rows.jsonl      every row that was passed over: its data, line, file and what is wrong with it
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

from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import TrainingError
from unidiff_sdk.training.evaluation.validation import Validation
from unidiff_sdk.training.runtime.callbacks import StepReport

__all__ = ["Log", "RunLog", "read_log"]

RUN, STEPS, VALIDATIONS, EXAMPLES = "run.json", "steps.jsonl", "validations.jsonl", "examples.json"
BAD_ROWS = "bad_rows.jsonl"
SAMPLES, PER_ROW = "samples", 8  # WebP has no more than 16,383 pixels a side


class RunLog:
    """Writes the log. Nothing is written before the first event; what an earlier run logged from that step on goes.

    about: JSON-serialisable, what is asked for: the command, the configuration, the names of base and data.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self.about = dict(about)
        self.started = False
        self._bad_rows: list[dict[str, Any]] = []

    def on_bad_rows(self, data: Path, rows: Sequence[InvalidRow]) -> Path:
        """Write down what was passed over of `data`, beside what was of other data. Returns the file."""
        self._bad_rows += [
            {"data": data.name, "line": row.line, "file_name": row.file_name, "reason": row.reason} for row in rows
        ]
        file = self.folder / BAD_ROWS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._bad_rows))
        except OSError as error:
            raise TrainingError(f"the log of the run cannot be written to {file}: {error.strerror}") from error
        return file

    def on_step(self, report: StepReport) -> None:
        """Add a line."""
        self._begin(report.step)
        _append(self.folder / STEPS, asdict(report))

    def on_validation(self, validation: Validation) -> None:
        """Add a line, the drawn samples, and the examples of the last look."""
        self._begin(validation.step)
        _sheet(validation.samples).save(self.folder / SAMPLES / f"{validation.step:06d}.webp", quality=92)
        examples = [
            {
                "row": example.row,
                "caption": example.caption,
                "rank": example.rank,
                "sought": _encoded(example.sought),
                "hits": [
                    {"row": row, "picture": _encoded(picture), "caption": caption, "score": score, "relevant": relevant}
                    for row, picture, caption, score, relevant in example.hits
                ],
            }
            for example in validation.examples
        ]
        _write(self.folder / EXAMPLES, examples)
        line = {"step": validation.step, "figures": validation.figures}
        _append(self.folder / VALIDATIONS, line | {"prompts": validation.prompts, "ranks": validation.ranks})

    def finish(self, **facts: Any) -> None:
        """Note how it ended: pairs, bad rows, seconds, ..."""
        self.about |= facts
        _write(self.folder / RUN, self.about)

    def _begin(self, step: int) -> None:
        if self.started:
            return
        self.started = True
        try:
            (self.folder / SAMPLES).mkdir(parents=True, exist_ok=True)
            for name in (STEPS, VALIDATIONS):
                kept = [line for line in _lines(self.folder / name) if line["step"] < step]
                _write_text(self.folder / name, "".join(json.dumps(line) + "\n" for line in kept))
            for picture in (self.folder / SAMPLES).glob("*.webp"):
                if int(picture.stem) >= step:
                    picture.unlink()
            _write(self.folder / RUN, self.about)
        except OSError as error:
            raise TrainingError(f"the log of the run cannot be written to {self.folder}: {error.strerror}") from error


@dataclass(frozen=True)
class Log:
    """A log that was read back. samples: by step, a picture for each prompt."""

    about: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    samples: dict[int, list[Image.Image]]
    examples: list[dict[str, Any]]


def read_log(folder: Path) -> Log:
    """Read what a run has logged so far. Raises TrainingError if the folder holds no log."""
    if not (folder / RUN).is_file():
        raise TrainingError(f"{folder} holds no log of a run ({RUN} is not there)")
    # Of several looks after the same step, the last one is at the weights that were chosen in the end.
    validations = list({line["step"]: line for line in _lines(folder / VALIDATIONS)}.values())
    samples = {}
    for line in validations:
        with Image.open(folder / SAMPLES / f"{line['step']:06d}.webp") as sheet:
            samples[line["step"]] = _cut(sheet.convert("RGB"), len(line["prompts"]))
    examples = json.loads((folder / EXAMPLES).read_text(encoding="utf-8")) if validations else []
    for example in examples:
        example["sought"] = _decoded(example["sought"])
        for hit in example["hits"]:
            hit["picture"] = _decoded(hit["picture"])
    about = json.loads((folder / RUN).read_text(encoding="utf-8"))
    return Log(about, list(_lines(folder / STEPS)), validations, samples, examples)


def _sheet(pictures: Sequence[NDArray[np.uint8]]) -> Image.Image:
    """Square pictures of one size, in rows."""
    side = len(pictures[0])
    sheet = Image.new("RGB", (side * min(len(pictures), PER_ROW), side * -(-len(pictures) // PER_ROW)), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, PER_ROW)
        sheet.paste(Image.fromarray(picture), (side * column, side * row))
    return sheet


def _cut(sheet: Image.Image, n: int) -> list[Image.Image]:
    """The n pictures of a sheet."""
    side = sheet.width // min(n, PER_ROW)
    places = [divmod(number, PER_ROW) for number in range(n)]
    return [sheet.crop((side * column, side * row, side * (column + 1), side * (row + 1))) for row, column in places]


def _append(file: Path, line: Mapping[str, Any]) -> None:
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise TrainingError(f"the log of the run cannot be written to {file}: {error.strerror}") from error


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines; a process that was killed may have left half a one."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _write(file: Path, value: Any) -> None:
    _write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _write_text(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _encoded(picture: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=92)
    return base64.b64encode(buffer.getvalue()).decode()


def _decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
