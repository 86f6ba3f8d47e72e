"""Draw, judge, keep: the encoder and the catalog decide which of the drawn pictures are handed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from unidiff_sdk.generation.generator import Generator

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import OptionError
from unidiff_sdk.retrieval.results import Hit

__all__ = ["Candidate", "Demands", "Safety", "Selection", "draw_queries", "select"]

Safety = Callable[[Image.Image], Image.Image | None]
Draw = Callable[[Sequence[str], int, int], list[Image.Image]]
Judge = Callable[[Sequence[str], Sequence[Image.Image]], list[tuple[float, Hit | None]]]

_BUDGET = 4  # times what is drawn at first
_REASONS = {
    "safety": "were dropped by safety",
    "min_score": "agree with the prompt by less than min_score={min_score} (the best by {best_refused:.3f})",
    "max_similarity": "are nearer to a catalog item than max_similarity={max_similarity}",
}


@dataclass(frozen=True)
class Demands:
    """How many pictures of each prompt are wanted, and of what kind.

    Attributes:
        n: how many.
        best_of: of how many they are the best; None for n.
        min_score: the least cosine with the prompt, -1 to 1.
        max_similarity: the most cosine with any catalog item, -1 to 1.
        budget: how many may be drawn for one prompt; None for four times what is drawn at first.
        safety: is shown each picture, and returns it, another one in its place, or None to drop it.

    Raises:
        OptionError: one of them is out of its range.
    """

    n: int
    best_of: int | None = None
    min_score: float | None = None
    max_similarity: float | None = None
    budget: int | None = None
    safety: Safety | None = None

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("best_of", self.n), ("budget", self.first)):
            value = getattr(self, name)
            optional = name != "n" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise OptionError(f"{name} is {value!r}; give a whole number of at least {least}")
        for name in ("min_score", "max_similarity"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and -1 <= value <= 1):
                raise OptionError(f"{name} is {value!r}; it is a cosine: give a number from -1 to 1")

    @property
    def first(self) -> int:
        """How many are drawn at first."""
        return self.n if self.best_of is None else self.best_of

    @property
    def most(self) -> int:
        """How many may be drawn."""
        return _BUDGET * self.first if self.budget is None else self.budget


@dataclass(frozen=True)
class Candidate:
    """A picture that was drawn: its seed is the call's plus `offset`; `replaced` if safety put another in its place."""

    image: Image.Image
    offset: int
    score: float
    nearest: Hit | None
    replaced: bool


@dataclass
class Selection:
    """What came of one prompt: the pictures that are kept, best first, and how many were refused for which reason."""

    prompt: str
    kept: list[Candidate] = field(default_factory=list)
    drawn: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    best_refused: float = -1.0


def select(prompts: Sequence[str], draw: Draw, judge: Judge, demands: Demands) -> list[Selection]:
    """Draw pictures of each prompt until there are enough that pass, or the budget is spent.

    Args:
        prompts: what to draw.
        draw: (prompts, offset of the first seed, pictures of each) to pictures, those of the first prompt first.
        judge: (prompt of each picture, pictures) to each one's cosine with its prompt and nearest catalog item.
        demands: how many, and of what kind.

    Returns:
        A selection for each prompt. Where one has fewer pictures than are wanted, a warning says why.
    """
    selections = [Selection(prompt) for prompt in prompts]
    count, offset = demands.first, 0
    while short := [s for s in selections if len(s.kept) < demands.n]:
        images = draw([s.prompt for s in short], offset, count)
        _keep(short, images, offset, count, judge, demands)
        offset += count
        missing = max(demands.n - len(s.kept) for s in short)
        count = min(missing, demands.most - offset)
        if count <= 0:
            break
    for selection in selections:
        selection.kept = sorted(selection.kept, key=lambda candidate: -candidate.score)[: demands.n]
        if len(selection.kept) < demands.n:
            warn(_shortage(selection, demands))
    return selections


def _keep(
    selections: Sequence[Selection],
    images: Sequence[Image.Image],
    offset: int,
    count: int,
    judge: Judge,
    demands: Demands,
) -> None:
    """Show pictures to safety and to the judge, and put those that pass into their selections."""
    owners = [selection for selection in selections for _ in range(count)]
    offsets = [offset + k for _ in selections for k in range(count)]
    shown = [image if demands.safety is None else _checked(demands.safety(image)) for image in images]
    passed = [i for i, image in enumerate(shown) if image is not None]
    judged = judge([owners[i].prompt for i in passed], [image for image in shown if image is not None])
    for owner, image in zip(owners, shown, strict=True):
        owner.drawn += 1
        owner.refused["safety"] += image is None
    for i, (score, nearest) in zip(passed, judged, strict=True):
        owner, image = owners[i], shown[i]
        assert image is not None
        if demands.min_score is not None and score < demands.min_score:
            owner.refused["min_score"] += 1
            owner.best_refused = max(owner.best_refused, score)
        elif demands.max_similarity is not None and nearest is not None and nearest.score > demands.max_similarity:
            owner.refused["max_similarity"] += 1
        else:
            owner.kept.append(Candidate(image, offsets[i], score, nearest, replaced=image is not images[i]))


def _checked(shown: Any) -> Image.Image | None:
    if shown is not None and not isinstance(shown, Image.Image):
        raise OptionError(f"safety returned {shown!r:.60}; it must return the picture, another one, or None to drop it")
    return None if shown is None else shown.convert("RGB") if shown.mode != "RGB" else shown


def _shortage(selection: Selection, demands: Demands) -> str:
    values = {**vars(demands), "best_refused": selection.best_refused}
    reasons = [f"{times} {_REASONS[reason].format(**values)}" for reason, times in selection.refused.items() if times]
    return (
        f"{len(selection.kept)} of {demands.n} pictures of {selection.prompt!r:.80}: of {selection.drawn} drawn, "
        f"{', '.join(reasons)}; raise budget=, or ask for less"
    )


_SEED = 0  # always the same, so that a search repeated finds the same


# Half of what a picture takes that is looked at: enough for the encoder to tell what it shows.
_MOST_STEPS = 6


def draw_queries(generator: Generator, texts: Sequence[str], n: int) -> list[Image.Image]:
    """`n` pictures of each text, those of the first text first; the same for the same texts.

    In few steps: the bundle's own number, if that is less than six.
    """
    steps = min(generator.settings().steps, _MOST_STEPS)
    return generator.generate(texts, n=n, seed=_SEED, steps=steps)
