"""Prior preservation: pairs of the base's own world beside the catalog's, so that the one is not lost for the other.

Ruiz et al. 2023, "DreamBooth", section 3.3. They come from a folder, or the base draws them itself before it is tuned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from PIL import Image

from unidiff_sdk.errors import DataError
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.config import Prior
from unidiff_sdk.training.evaluation.validation import draw
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.runtime.randomness import Purpose, seed_of

__all__ = ["draw_prior"]

AT_ONCE = 16  # pictures
METADATA = "metadata.jsonl"


def draw_prior(
    prior: Prior,
    model: JointModel,
    checkpoint: Checkpoint,
    *,
    seed: int,
    on_batches: Callable[[range], Iterable[int]] = iter,
) -> None:
    """Draw what the prior's folder lacks, if it has prompts. What was drawn before an interruption is kept.

    on_batches: wraps the batches while they are drawn. Raises DataError where the folder cannot be written.
    """
    file = prior.folder / METADATA
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if not prior.prompts or len(lines) >= prior.pairs:
        return
    try:
        prior.folder.mkdir(parents=True, exist_ok=True)
        for start in on_batches(range(len(lines), prior.pairs, AT_ONCE)):
            numbers = range(start, min(start + AT_ONCE, prior.pairs))
            prompts = [prior.prompts[number % len(prior.prompts)] for number in numbers]
            with model.at_rest():
                pictures = draw(model, checkpoint, prompts, seed=seed_of(seed, Purpose.PRIOR, start))
            for number, prompt, picture in zip(numbers, prompts, pictures, strict=True):
                name = f"prior-{number:06d}.png"
                Image.fromarray(picture).save(prior.folder / name)
                lines.append(json.dumps({"file_name": name, "text": prompt}, ensure_ascii=False))
            part = file.with_name(f".{METADATA}.part")
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
            part.replace(file)
    except OSError as error:
        raise DataError(f"the prior's pictures cannot be kept in {prior.folder}: {error}") from error
