"""Generate candidates, judge them with the encoder and the catalog, and select the best that pass."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import ImageError, OptionError
from unidiff_sdk.generation.options import GenerationOptions, checked_prompts
from unidiff_sdk.retrieval.query import open_image
from unidiff_sdk.retrieval.results import Hit

from .results import Generated, Generation

if TYPE_CHECKING:
    from unidiff_sdk.generation.generator import Preview

    from .snapshot import Snapshot

__all__ = ["Candidate", "Selection", "generate", "select"]

Generate = Callable[[Sequence[str], int, int], list[Image.Image]]
Judge = Callable[[Sequence[str], Sequence[Image.Image]], list[tuple[float, Hit | None]]]
ToHit = Callable[[dict[str, Any], float], Hit]

_REASONS = {
    "safety": "safety rejected {count}",
    "min_score": "{count} scored below min_score={min_score} (best: {best_rejected:.3f})",
    "max_similarity": "{count} exceeded max_similarity={max_similarity}",
}


def generate(
    snapshot: Snapshot,
    prompt: Any,
    options: GenerationOptions,
    to_hit: ToHit,
    *,
    callback: Callable[[int, int], None] | None = None,
    preview: Callable[[Preview], None] | None = None,
) -> Generation:
    """What `Catalog.generate` does.

    Args:
        snapshot: the model, and the store that candidates are compared with.
        prompt: one text or several, none of them empty.
        options: how images are generated and selected.
        to_hit: makes a hit of a payload and a score.
        callback, preview: called after each denoising step.
    """
    # 1. Check the request and read its images
    started, generator, prompts = time.perf_counter(), snapshot.generator, checked_prompts(prompt)
    for name, function in (("callback", callback), ("preview", preview)):
        if function is not None and not callable(function):
            raise OptionError(f"{name} is {function!r:.60}; give a function")
    for each in prompts:
        if not each.strip():
            raise OptionError(f"prompt is {each!r}; give a text that is not empty")
    resolved = generator.resolve(options)
    like, like_sha256 = _read("like", resolved.like)
    mask, mask_sha256 = _read("mask", resolved.mask)
    resolved = replace(resolved, like=like, mask=mask)
    if prompts:
        generator.load(*snapshot.encoder.graphs)  # all at once, which is faster than each when it is first used

    # 2. Generate, judge and select
    progress = _Progress(callback)

    def generate_round(prompts: Sequence[str], offset: int, count: int) -> list[Image.Image]:
        progress.start_round()
        on_step = progress if callback is not None else None
        return generator.run(prompts, resolved.round(offset, count), callback=on_step, preview=preview)

    def judge(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[tuple[float, Hit | None]]:
        return _judge(snapshot, to_hit, prompts, images)

    selections = select(prompts, generate_round, judge, resolved)

    # 3. Record how each image was made
    images = tuple(
        Generated(
            image=candidate.image,
            score=candidate.score,
            nearest=candidate.nearest,
            prompt=selection.prompt,
            negative_prompt=resolved.negative_prompt,
            seed=resolved.seed + candidate.offset,
            steps=resolved.steps,
            guidance_scale=resolved.guidance_scale,
            guidance_rescale=resolved.guidance_rescale,
            sampler=resolved.sampler,
            lora=dict(resolved.lora),
            long_prompts=resolved.long_prompts,
            bundle=snapshot.bundle.fingerprint,
            like=like_sha256,
            strength=resolved.strength,
            mask=mask_sha256,
            replaced=candidate.replaced,
        )
        for selection in selections
        for candidate in selection.accepted
    )
    rejected = sum((selection.rejected for selection in selections), Counter[str]())
    generated = sum(selection.generated for selection in selections)
    return Generation(images, 1000 * (time.perf_counter() - started), generated, dict(rejected))


class _Progress:
    """Counts steps over all rounds of a call; each round adds its steps to the total."""

    def __init__(self, callback: Callable[[int, int], None] | None) -> None:
        self._callback = callback
        self._before = self._total = 0

    def start_round(self) -> None:
        self._before = self._total

    def __call__(self, done: int, total: int) -> None:
        self._total = self._before + total
        if self._callback is not None:
            self._callback(self._before + done, self._total)


def _read(name: str, source: Any) -> tuple[Image.Image, str] | tuple[None, None]:
    """An image that a generation starts from, and its SHA-256. An error names the argument."""
    if source is None:
        return None, None
    try:
        image = open_image(source)
        return image.decoded, source.sha256 if isinstance(source, Hit) else image.sha256
    except ImageError as error:
        raise type(error)(f"{name}: {error}") from error


def _judge(
    snapshot: Snapshot, to_hit: ToHit, prompts: Sequence[str], images: Sequence[Image.Image]
) -> list[tuple[float, Hit | None]]:
    """For each image its cosine with its prompt, and the nearest catalog item."""
    if not images:
        return []
    encoder = snapshot.encoder
    judged: list[tuple[float, Hit | None]] = []
    for prompt, embedding in zip(prompts, encoder.encode_images(images), strict=True):
        found = snapshot.store.query(embedding, limit=1)
        nearest = to_hit(found[0].payload, found[0].score) if found else None
        judged.append((float(embedding @ encoder.encode_text(prompt)), nearest))
    return judged


# Selection


@dataclass(frozen=True)
class Candidate:
    """A generated image. Its seed is the call's plus `offset`; `replaced` if safety returned another image for it."""

    image: Image.Image
    offset: int
    score: float
    nearest: Hit | None
    replaced: bool


@dataclass
class Selection:
    """The result for one prompt: the accepted candidates, best first, and how many were rejected for which reason."""

    prompt: str
    accepted: list[Candidate] = field(default_factory=list)
    generated: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    best_rejected: float = -1.0


def select(prompts: Sequence[str], generate: Generate, judge: Judge, options: GenerationOptions) -> list[Selection]:
    """Generate candidates for each prompt until n are accepted, or the budget is spent.

    Args:
        prompts: what to generate.
        generate: (prompts, offset of the first seed, images for each) to images, those of the first prompt first.
        judge: (prompt of each image, images) to the cosine of each with its prompt, and its nearest catalog item.
        options: n, best_of, min_score, max_similarity, budget and safety.

    Returns:
        A selection for each prompt. A warning says why one has fewer than n images.
    """
    selections = [Selection(prompt) for prompt in prompts]
    count, offset = options.first_round, 0
    while short := [selection for selection in selections if len(selection.accepted) < options.n]:
        images = generate([selection.prompt for selection in short], offset, count)
        _accept_or_reject(short, images, offset, count, judge, options)
        offset += count
        missing = max(options.n - len(selection.accepted) for selection in short)
        count = min(missing, options.max_candidates - offset)
        if count <= 0:
            break
    for selection in selections:
        selection.accepted = sorted(selection.accepted, key=lambda candidate: -candidate.score)[: options.n]
        if len(selection.accepted) < options.n:
            warn(_shortage(selection, options))
    return selections


def _accept_or_reject(
    selections: Sequence[Selection],
    images: Sequence[Image.Image],
    offset: int,
    count: int,
    judge: Judge,
    options: GenerationOptions,
) -> None:
    """Pass the images of one round to safety and to the judge; add the accepted ones to their selections."""
    owners = [selection for selection in selections for _ in range(count)]
    offsets = [offset + k for _ in selections for k in range(count)]
    safe = [image if options.safety is None else _checked(options.safety(image)) for image in images]
    for owner, image in zip(owners, safe, strict=True):
        owner.generated += 1
        owner.rejected["safety"] += image is None
    passed = [(i, image) for i, image in enumerate(safe) if image is not None]
    judged = judge([owners[i].prompt for i, _ in passed], [image for _, image in passed])
    for (i, image), (score, nearest) in zip(passed, judged, strict=True):
        owner = owners[i]
        if options.min_score is not None and score < options.min_score:
            owner.rejected["min_score"] += 1
            owner.best_rejected = max(owner.best_rejected, score)
        elif options.max_similarity is not None and nearest is not None and nearest.score > options.max_similarity:
            owner.rejected["max_similarity"] += 1
        else:
            owner.accepted.append(Candidate(image, offsets[i], score, nearest, replaced=image is not images[i]))


def _checked(image: Any) -> Image.Image | None:
    if image is not None and not isinstance(image, Image.Image):
        raise OptionError(f"safety returned {image!r:.60}; it must return the image, another one, or None to reject it")
    return None if image is None else image.convert("RGB") if image.mode != "RGB" else image


def _shortage(selection: Selection, options: GenerationOptions) -> str:
    values = {**vars(options), "best_rejected": selection.best_rejected}
    reasons = [_REASONS[reason].format(count=count, **values) for reason, count in selection.rejected.items() if count]
    return (
        f"only {len(selection.accepted)} of {options.n} images of {selection.prompt!r:.80}: of "
        f"{selection.generated} generated, {', '.join(reasons)}; raise budget=, or relax these limits"
    )
