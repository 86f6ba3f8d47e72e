"""The HTML report of a run: one file with its curves, samples, searches, figures and settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.json_values import damaged_content
from unidiff_sdk._internal.pages.charts import Line, line_chart
from unidiff_sdk._internal.pages.html import Card, CardRow, Page, Section
from unidiff_sdk._internal.text import json_text
from unidiff_sdk.errors import TrainingError
from unidiff_sdk.training.config import TERM_TITLES, TrainingConfig

from .run_log import Log, read_log

__all__ = ["write_report"]

SHOWN_VALIDATIONS = 8  # columns of the samples
SMOOTHING = 0.95
LOSS_TITLES = TERM_TITLES | {
    "prior": "IS on prior pairs",
    "prior_feature_distillation": "Feature distillation on prior pairs",
}
# (title, key of the figure, whether higher is better)
FIGURES = (
    ("text → image, R@1", "text_to_image R@1", True),
    ("text → image, R@5", "text_to_image R@5", True),
    ("text → image, R@10", "text_to_image R@10", True),
    ("text → image, median rank", "text_to_image median_rank", False),
    ("image → text, R@1", "image_to_text R@1", True),
    ("image → text, R@5", "image_to_text R@5", True),
    ("image → text, R@10", "image_to_text R@10", True),
    ("image → text, median rank", "image_to_text median_rank", False),
    ("denoising loss, fixed noise and timesteps", "denoising_loss", False),
    ("effective rank of image embeddings", "image_effective_rank", True),
    ("effective rank of text embeddings", "text_effective_rank", True),
    ("mean cosine between images", "image_mean_cosine", False),
)


def write_report(log_folder: Path, file: Path) -> Path:
    """Write the report of a run log (see `run_log`), finished or not. Raises TrainingError if there is no log."""
    log = read_log(log_folder)
    with damaged_content(log_folder, TrainingError, "Move it away, so that the next run starts a new log."):
        sections = [_curves(log)]
        if log.validations:
            sections += [*_samples(log), *_searches(log), *_weight_selection(log), _before_and_after(log)]
        return _page(log, [*sections, _reproduction(log)]).write(file)


def _page(log: Log, sections: Sequence[Section]) -> Page:
    about, steps = log.about, log.steps
    tiles = [(f"{len(steps):,}", "steps")]
    if "pairs" in about:
        tiles.append((f"{about['pairs']:,}", "training pairs"))
    if log.validations:
        first, last = log.validations[0]["figures"], log.validations[-1]["figures"]
        for title, key in (("R@1, text → image", "text_to_image R@1"), ("R@1, image → text", "image_to_text R@1")):
            tiles.append((f"{first[key]:.2f} → {last[key]:.2f}", title))
        if "denoising_loss" in first:
            tiles.append((f"{first['denoising_loss']:.3f} → {last['denoising_loss']:.3f}", "denoising loss"))
    seconds = sum(step["seconds"] for step in steps)
    tiles.append((f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s", "training time"))
    trains_generator = TrainingConfig.from_dict(about["config"]).trains_generator
    text = "CLIP and Stable Diffusion, fine-tuned together." if trains_generator else "Encoders, fine-tuned for search."
    if log.validations:
        text += (
            " Samples, searches and figures come from the averaged weights, which are saved, on pairs that were not "
            "trained on."
        )
    return Page(
        title=f"{about['name']}, fine-tuned from {about['base']}",
        text=text,
        figures=tiles,
        sections=sections,
        note="" if log.validations else "This run had no validation data. Add --val DATA to see figures and samples.",
        footer=[" · ".join(f"{name} {version}" for name, version in about["versions"].items())],
    )


# --- curves ----------------------------------------------------------------------------------------------------------


def _curves(log: Log) -> Section:
    charts = []
    terms = list(dict.fromkeys(name for step in log.steps for name in step["losses"]))
    for term in terms:
        points = [(step["step"], step["losses"][term]) for step in log.steps if term in step["losses"]]
        lines = [Line(term, points, faint=True), Line(term, _smoothed(points))]
        charts.append(line_chart(LOSS_TITLES.get(term, term), lines, x_label="step", y_label="loss"))
    text = "Each loss without its weight, per step and smoothed."
    if len(log.validations) > 1:
        charts += _validation_charts(log)
        text += (
            " Validation always uses the same pairs, noise and timesteps, so a change in its curves is a change of the "
            "model."
        )
    rate = [Line("learning rate", [(step["step"], step["learning_rate"]) for step in log.steps])]
    charts.append(line_chart("Learning rate", rate, x_label="step"))
    return Section("Curves", text, charts=charts)


def _validation_charts(log: Log) -> list[str]:
    charts = []
    for title, direction in (("Text → image", "text_to_image"), ("Image → text", "image_to_text")):
        lines = [Line(f"R@{k}", _figure(log, f"{direction} R@{k}")) for k in (1, 5, 10)]
        charts.append(line_chart(f"{title}, validation", lines, x_label="step", y_label="recall", y_max=1.0))
    if "denoising_loss" in log.validations[0]["figures"]:
        loss = [Line("denoising loss", _figure(log, "denoising_loss"))]
        charts.append(line_chart("Denoising loss, validation", loss, x_label="step", y_label="mean squared error"))
    ranks = [Line(f"{kind}s", _figure(log, f"{kind}_effective_rank")) for kind in ("image", "text")]
    charts.append(line_chart("Effective rank of embeddings", ranks, x_label="step", y_label="dimensions"))
    return charts


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential moving average, corrected for its bias toward zero at the start (Kingma & Ba 2015, section 3)."""
    average, found = 0.0, []
    for number, (x, y) in enumerate(points, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * y
        found.append((x, average / (1 - SMOOTHING**number)))
    return found


def _figure(log: Log, key: str) -> list[tuple[float, float]]:
    return [(line["step"], line["figures"][key]) for line in log.validations]


# --- samples and searches --------------------------------------------------------------------------------------------


def _samples(log: Log) -> Iterable[Section]:
    """Samples, which a model without a generator does not have."""
    if not log.validations[-1]["prompts"]:
        return
    shown = _evenly([line["step"] for line in log.validations], SHOWN_VALIDATIONS)
    rows = [
        CardRow(prompt, [Card(log.samples[step][number], "", head=f"step {step:,}") for step in shown])
        for number, prompt in enumerate(log.validations[-1]["prompts"])
    ]
    yield Section(
        "Samples over time",
        "Images generated from the same prompts and the same noise. The first column shows the base.",
        rows,
    )


def _evenly(values: Sequence[int], n: int) -> list[int]:
    """At most n of the values, evenly spaced, with the first and the last."""
    if len(values) <= n:
        return list(values)
    return [values[round(place * (len(values) - 1) / (n - 1))] for place in range(n)]


def _searches(log: Log) -> Iterable[Section]:
    first = log.validations[0]["ranks"]
    for title, text, found in (
        ("Found at rank 1", "The first validation captions whose best hit is relevant.", True),
        ("Not found at rank 1", "The first validation captions whose best hit is not relevant.", False),
    ):
        examples = [example for example in log.examples if (example["rank"] == 1) == found]
        rows = [
            CardRow(example["caption"], _hits(example), f"rank {first[example['row']]} → {example['rank']}")
            for example in examples
        ]
        if rows:
            yield Section(
                title,
                f"{text} The framed image is the caption's own; the best hits follow. A hit is relevant if it has the "
                "same meaning as the caption. The ranks are those of the first relevant image, before and after "
                "training.",
                rows,
            )


def _hits(example: dict[str, Any]) -> list[Card]:
    cards = [Card(example["expected"], example["caption"], head="expected", query=True)]
    for hit in example["hits"]:
        badge = "relevant" if hit["relevant"] else "not relevant"
        cards.append(Card(hit["image"], hit["caption"], f"{hit['score']:.3f}", badge=badge, wrong=not hit["relevant"]))
    return cards


# --- choice of the weights -------------------------------------------------------------------------------------------


def _weight_selection(log: Log) -> Iterable[Section]:
    chosen = log.about.get("chosen", {})
    sentences, charts = [], []
    if stopping := chosen.get("early_stopping"):
        sentences.append(
            f"The run stopped after step {stopping['stopped_at']:,}. Its best validation was after step "
            f"{stopping['step']:,}, with a score of {stopping['score']:.4g}."
        )
    for half, title in {"encoder": "Encoder", "generator": "Generator"}.items():
        if sweep := chosen.get("wise_ft", {}).get(half):
            sentences.append(f"WiSE-FT keeps {sweep['alpha']:.0%} of the change of the {half}.")
            # The score of the generator is its negative denoising loss.
            label, sign = ("score", 1) if half == "encoder" else ("denoising loss", -1)
            lines = [Line(label, [(alpha, sign * score) for alpha, score in sweep["sweep"]])]
            charts.append(line_chart(f"{title}: from base (0) to tuned (1)", lines, x_label="α", y_label=label))
    if sentences:
        yield Section(
            "Choice of the weights",
            f"{' '.join(sentences)} The weights were chosen on the validation pairs, so their final figures are "
            "slightly optimistic.",
            charts=charts,
        )


# --- tables ----------------------------------------------------------------------------------------------------------


def _before_and_after(log: Log) -> Section:
    first, last = log.validations[0], log.validations[-1]
    lines: list[tuple[str, ...]] = [("", f"step {first['step']:,}", f"step {last['step']:,}", "")]
    for title, key, higher_is_better in FIGURES:
        if key not in first["figures"]:
            continue
        old, new = first["figures"][key], last["figures"][key]
        verdict = "same" if old == new else "better" if (new > old) == higher_is_better else "worse"
        lines.append((title, f"{old:.4g}", f"{new:.4g}", verdict))
    return Section(
        "Before and after",
        f"On the {len(last['ranks']):,} pairs of {log.about['val']}. An image is relevant to a caption if their "
        "attributes are equal (synthetic catalogs) or their captions are (other data). Run unidiff-evaluate for "
        "distances to real images and attribute accuracy, which need more generated images.",
        table=lines,
    )


def _reproduction(log: Log) -> Section:
    settings = json_text(log.about["config"], indent=1)
    other = {
        name: value for name, value in log.about.items() if name not in ("config", "command", "versions", "chosen")
    }
    facts = "\n".join(f"{name}: {value}" for name, value in other.items() if value is not None)
    return Section(
        "How to reproduce it",
        "The command, the data and all settings. On the CPU, the same command gives the same weights.",
        code=f"{log.about['command']}\n\n{facts}\n\n{settings}",
    )
