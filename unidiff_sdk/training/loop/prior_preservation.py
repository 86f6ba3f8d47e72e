"""Prior preservation: pairs that the base already does well are trained on too, so that tuning does not unlearn them.

Ruiz et al. 2023, "DreamBooth", section 3.3. The pairs come from a folder, or the base generates them before training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from PIL import Image

from unidiff_sdk.errors import DataError
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.config import PriorConfig
from unidiff_sdk.training.evaluation.validation import generate_by_own_sampler
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.runtime.randomness import Purpose, derive_seed

__all__ = ["generate_prior"]

CHUNK = 16  # images per batch
METADATA = "metadata.jsonl"


def generate_prior(
    prior: PriorConfig,
    model: JointModel,
    checkpoint: Checkpoint,
    *,
    seed: int,
    on_batches: Callable[[range], Iterable[int]] = iter,
) -> None:
    """Generate the pairs that the prior's folder lacks, if there are prompts. Images of an interrupted run are kept.

    on_batches: Wraps the batches while they are generated. Raises DataError if the folder cannot be written.
    """
    file = prior.folder / METADATA
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if not prior.prompts or len(lines) >= prior.pairs:
        return
    try:
        prior.folder.mkdir(parents=True, exist_ok=True)
        for start in on_batches(range(len(lines), prior.pairs, CHUNK)):
            numbers = range(start, min(start + CHUNK, prior.pairs))
            prompts = [prior.prompts[number % len(prior.prompts)] for number in numbers]
            with model.evaluating():
                images = generate_by_own_sampler(
                    model, checkpoint, prompts, seed=derive_seed(seed, Purpose.PRIOR, start)
                )
            for number, prompt, image in zip(numbers, prompts, images, strict=True):
                name = f"prior-{number:06d}.png"
                Image.fromarray(image).save(prior.folder / name)
                lines.append(json.dumps({"file_name": name, "text": prompt}, ensure_ascii=False))
            part = file.with_name(f".{METADATA}.part")
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
            part.replace(file)
    except OSError as error:
        raise DataError(f"Cannot write prior images to {prior.folder}: {error}. Choose another --prior.") from error
