"""The report of a run: one HTML file with its curves, its samples over time, what it finds, and how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.pages.charts import Line, line_chart
from unidiff_sdk._internal.pages.html import Card, CardRow, Page, Section

from .run_log import Log, read_log

__all__ = ["write_report"]

SHOWN_LOOKS = 8  # of the samples over time
SMOOTHING = 0.95
LOSSES = {
    "itc": "ITC: image-text contrast",
    "is": "IS: image synthesis",
    "rsc": "RSC: the generator learns from the encoder",
    "rsc_generated": "RSC: the encoder learns from the generator",
    "rsc_feature": "RSC: both learn from each other's features",
    "leash": "Leash: how far embeddings are from the base's",
    "prior": "Image synthesis of the base's own world",
    "prior_leash": "Leash on the base's own world",
}
# What stands in the table and the curves: name, key of the figure, whether more is better.
FIGURES = (
    ("words → picture, R@1", "text_to_image R@1", True),
    ("words → picture, R@5", "text_to_image R@5", True),
    ("words → picture, R@10", "text_to_image R@10", True),
    ("words → picture, median rank", "text_to_image median_rank", False),
    ("picture → words, R@1", "image_to_text R@1", True),
    ("picture → words, R@5", "image_to_text R@5", True),
    ("picture → words, R@10", "image_to_text R@10", True),
    ("picture → words, median rank", "image_to_text median_rank", False),
    ("denoising loss, fixed noise and timesteps", "denoising_loss", False),
    ("effective rank of picture embeddings", "image_effective_rank", True),
    ("effective rank of text embeddings", "text_effective_rank", True),
    ("mean cosine between pictures", "image_mean_cosine", False),
)


def write_report(log_folder: Path, file: Path) -> Path:
    """Write the report of what `log_folder` (see `runlog`) holds so far. Raises TrainingError if it holds no log."""
    log = read_log(log_folder)
    sections = [_curves(log)]
    if log.validations:
        sections += [_samples(log), *_searches(log), *_chosen(log), _before_and_after(log)]
    return _page(log, [*sections, _to_repeat(log)]).write(file)


def _page(log: Log, sections: Sequence[Section]) -> Page:
    about, steps = log.about, log.steps
    tiles = [(f"{len(steps):,}", "steps")]
    if "pairs" in about:
        tiles.append((f"{about['pairs']:,}", "pairs trained on"))
    if log.validations:
        first, last = log.validations[0]["figures"], log.validations[-1]["figures"]
        for name, key in (("R@1, words → picture", "text_to_image R@1"), ("R@1, picture → words", "image_to_text R@1")):
            tiles.append((f"{first[key]:.2f} → {last[key]:.2f}", name))
        tiles.append((f"{first['denoising_loss']:.3f} → {last['denoising_loss']:.3f}", "denoising loss"))
    seconds = sum(step["seconds"] for step in steps)
    tiles.append((f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s", "in the steps"))
    measured = (
        " The samples, the searches and the figures are of the averaged weights, those that are saved, on pairs that "
        "were not trained on."
    )
    note = "" if log.validations else "There were no pairs to validate on (--val DATA), so this shows the losses alone."
    return Page(
        title=f"{about['name']}, tuned from {about['base']}",
        text=f"CLIP and Stable Diffusion, fine-tuned together.{measured if log.validations else ''}",
        figures=tiles,
        sections=sections,
        note=note,
        footer=[" · ".join(f"{name} {version}" for name, version in about["versions"].items())],
    )


# --- curves ----------------------------------------------------------------------------------------------------------


def _curves(log: Log) -> Section:
    charts = []
    terms = list(dict.fromkeys(name for step in log.steps for name in step["losses"]))
    for term in terms:
        points = [(step["step"], step["losses"][term]) for step in log.steps if term in step["losses"]]
        lines = [Line(term, points, faint=True), Line(term, _smoothed(points))]
        charts.append(line_chart(LOSSES.get(term, term), lines, x_label="step", y_label="loss"))
    if len(log.validations) > 1:
        for title, way in (("Words → picture, validation", "text_to_image"), ("Picture → words", "image_to_text")):
            lines = [Line(f"R@{k}", _figure(log, f"{way} R@{k}")) for k in (1, 5, 10)]
            charts.append(line_chart(title, lines, x_label="step", y_label="recall", y_max=1.0))
        loss = [Line("denoising loss", _figure(log, "denoising_loss"))]
        charts.append(line_chart("Denoising loss, validation", loss, x_label="step", y_label="mean squared error"))
        ranks = [Line(f"{kind}s", _figure(log, f"{kind}_effective_rank")) for kind in ("image", "text")]
        charts.append(line_chart("Effective rank of embeddings", ranks, x_label="step", y_label="dimensions"))
    measured = (
        " What is measured on the validation pairs always uses the same pairs, noise and timesteps, so its changes are "
        "the model's alone."
    )
    rate = [Line("learning rate", [(step["step"], step["learning_rate"]) for step in log.steps])]
    charts.append(line_chart("Learning rate", rate, x_label="step"))
    return Section(
        "Curves",
        f"Each loss without its weight, step by step and smoothed.{measured if log.validations else ''}",
        charts=charts,
    )


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The exponential moving average, its bias toward zero at the start corrected (Kingma & Ba 2015, section 3)."""
    smooth, found = 0.0, []
    for number, (x, y) in enumerate(points, start=1):
        smooth = SMOOTHING * smooth + (1 - SMOOTHING) * y
        found.append((x, smooth / (1 - SMOOTHING**number)))
    return found


def _figure(log: Log, key: str) -> list[tuple[float, float]]:
    return [(line["step"], line["figures"][key]) for line in log.validations]


# --- pictures --------------------------------------------------------------------------------------------------------


def _samples(log: Log) -> Section:
    shown = _evenly([line["step"] for line in log.validations], SHOWN_LOOKS)
    rows = [
        CardRow(prompt, [Card(log.samples[step][number], "", head=f"step {step:,}") for step in shown])
        for number, prompt in enumerate(log.validations[-1]["prompts"])
    ]
    return Section(
        "Samples over time",
        "The same prompts from the same noise, drawn as training went on. The first column is the base.",
        rows,
    )


def _evenly(values: Sequence[int], n: int) -> list[int]:
    """At most n of the values, the first and the last among them."""
    if len(values) <= n:
        return list(values)
    return [values[round(place * (len(values) - 1) / (n - 1))] for place in range(n)]


def _searches(log: Log) -> Iterable[Section]:
    first = log.validations[0]["ranks"]
    for title, text, right in (
        ("Found at once", "The first validation captions whose best hit is a right one.", True),
        ("Not found at once", "The first validation captions whose best hit is a wrong one.", False),
    ):
        examples = [example for example in log.examples if (example["rank"] == 1) == right]
        rows = [
            CardRow(example["caption"], _hits(example), f"rank {first[example['row']]} → {example['rank']}")
            for example in examples
        ]
        if rows:
            yield Section(
                title,
                f"{text} Framed is the caption's own picture, then come the best hits; a hit is right if it means the "
                "same as the caption. The ranks are those of the first right picture, before and after.",
                rows,
            )


def _hits(example: dict[str, Any]) -> list[Card]:
    cards = [Card(example["sought"], example["caption"], head="sought", query=True)]
    for hit in example["hits"]:
        badge = "right" if hit["relevant"] else "wrong"
        cards.append(
            Card(hit["picture"], hit["caption"], f"{hit['score']:.3f}", badge=badge, wrong=not hit["relevant"])
        )
    return cards


# --- how the weights were chosen -------------------------------------------------------------------------------------


def _chosen(log: Log) -> Iterable[Section]:
    chosen = log.about.get("chosen", {})
    told, charts = [], []
    if stopping := chosen.get("early_stopping"):
        told.append(
            f"The run stopped after step {stopping['stopped_at']:,}, and its best look was that after step "
            f"{stopping['step']:,}, with a score of {stopping['score']:.4g}."
        )
    for half, title in {"encoder": "Encoder", "generator": "Generator"}.items():
        if swept := chosen.get("wise_ft", {}).get(half):
            told.append(f"Of the {half}, {swept['alpha']:.0%} of what was tuned is kept (WiSE-FT).")
            # The generator's score is its denoising loss, negated.
            what, sign = ("score", 1) if half == "encoder" else ("denoising loss", -1)
            lines = [Line(what, [(alpha, sign * score) for alpha, score in swept["sweep"]])]
            charts.append(line_chart(f"{title}: from the base to the tuned", lines, x_label="α", y_label=what))
    if told:
        yield Section(
            "How the weights were chosen",
            f"{' '.join(told)} Chosen on the validation pairs, so their figures of the last look flatter a little.",
            charts=charts,
        )


# --- tables ----------------------------------------------------------------------------------------------------------


def _before_and_after(log: Log) -> Section:
    first, last = log.validations[0], log.validations[-1]
    lines: list[tuple[str, ...]] = [("", f"step {first['step']:,}", f"step {last['step']:,}", "")]
    for name, key, more_is_better in FIGURES:
        old, new = first["figures"][key], last["figures"][key]
        verdict = "same" if old == new else "better" if (new > old) == more_is_better else "worse"
        lines.append((name, f"{old:.4g}", f"{new:.4g}", verdict))
    return Section(
        "Before and after",
        f"On the {len(last['ranks']):,} pairs of {log.about['val']}. Relevance is equality of attributes on the "
        "synthetic catalogs, of captions on everything else. For distances to real pictures and attribute accuracy, "
        "which need more pictures than are drawn here: unidiff-evaluate.",
        table=lines,
    )


def _to_repeat(log: Log) -> Section:
    settings = json.dumps(log.about["config"], indent=1, ensure_ascii=False)
    facts = {
        name: value for name, value in log.about.items() if name not in ("config", "command", "versions", "chosen")
    }
    told = "\n".join(f"{name}: {value}" for name, value in facts.items() if value is not None)
    return Section(
        "To repeat it",
        "The command, what it found, and every setting. On the CPU, the same command gives the same weights.",
        code=f"{log.about['command']}\n\n{told}\n\n{settings}",
    )
