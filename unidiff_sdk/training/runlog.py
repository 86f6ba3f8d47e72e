"""What a run tells, kept in a folder beside its checkpoint: the source of its report, and whole after a resume.

run.json            what was asked for, and with what
steps.jsonl         losses, learning rate and seconds of every step
validations.jsonl   figures, prompts and ranks of every look at the model
samples/000100.webp what was drawn for the prompts at that look, side by side
examples.json       searches with validation captions, at the last look
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unidiff_sdk.errors import TrainingError
from unidiff_sdk.training.callbacks import StepReport
from unidiff_sdk.training.validation import Validation

__all__ = ["Log", "RunLog", "read_log"]

RUN, STEPS, VALIDATIONS, EXAMPLES = "run.json", "steps.jsonl", "validations.jsonl", "examples.json"
SAMPLES = "samples"


class RunLog:
    """Writes the log. Nothing is written before the first event; what an earlier run logged from that step on goes.

    about: JSON-serialisable, what is asked for: the command, the configuration, the names of base and data.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self.about = dict(about)
        self.started = False

    def on_step(self, report: StepReport) -> None:
        """Add a line."""
        self._begin(report.step)
        _append(self.folder / STEPS, asdict(report))

    def on_validation(self, validation: Validation) -> None:
        """Add a line, the drawn samples, and the examples of the last look."""
        self._begin(validation.step)
        strip = Image.fromarray(np.concatenate(validation.samples, axis=1))
        strip.save(self.folder / SAMPLES / f"{validation.step:06d}.webp", quality=92)
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
        with Image.open(folder / SAMPLES / f"{line['step']:06d}.webp") as strip:
            side = strip.width // len(line["prompts"])
            samples[line["step"]] = [
                strip.convert("RGB").crop((number * side, 0, (number + 1) * side, strip.height))
                for number in range(len(line["prompts"]))
            ]
    examples = json.loads((folder / EXAMPLES).read_text(encoding="utf-8")) if validations else []
    for example in examples:
        example["sought"] = _decoded(example["sought"])
        for hit in example["hits"]:
            hit["picture"] = _decoded(hit["picture"])
    about = json.loads((folder / RUN).read_text(encoding="utf-8"))
    return Log(about, list(_lines(folder / STEPS)), validations, samples, examples)


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
