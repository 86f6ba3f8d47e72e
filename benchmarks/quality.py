"""Write QUALITY.md from quality/ablation.json: `python benchmarks/quality.py`.

The whole page is generated, so no figure in it can outlive its run.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from ablation import PER_PROMPT, REAL, RESULT, Run, score
from bases import SYNTHETIC
from numpy.typing import NDArray

from unidiff_sdk._internal.pages.charts import Line, line_chart
from unidiff_sdk.training.evaluation.metrics import Interval, paired_bootstrap

PAGE = RESULT.parent.parent / "QUALITY.md"
JOINT, HARD = "ITC + IS", "ITC + IS, hard negatives"
# What each arm is compared with: the same model without the term, or the model tuned for its half alone.
REFERENCES = {
    "CLIP alone": "base",
    "CLIP alone, hard negatives": "CLIP alone",
    "SD alone": "base",
    "SD and text": "SD alone",
    JOINT: "CLIP alone",
    HARD: JOINT,
    "ITC + IS, hard negatives, WiSE-FT": HARD,
    "RSC encoder": HARD,
    "RSC generator": HARD,
    "RSC encoder and generator": HARD,
    "RSC reward": HARD,
}
SEPARATE = {"search": "CLIP alone, hard negatives", "all_right": "SD and text"}  # the best arms that tune one half
# The half that an arm does not tune is not compared.
UNTUNED = {("all_right", "CLIP alone"), ("all_right", "CLIP alone, hard negatives"), ("search", "SD alone")}
COLUMNS = {"search": "R@1", "reranked": "R@1 re-ranked", "all_right": "all attributes right"}
# name, title, digits; a domain without a figure omits its column
FIGURES = (
    ("search_r@1", "R@1 of text queries", 3),
    ("reranked_r@1", "re-ranked", 3),
    ("r@1", "R@1, both directions", 3),
    ("all_right", "all attributes right", 3),
    ("attributes_right", "attributes right", 3),
    ("kid", "KID", 4),
    ("cmmd", "CMMD", 3),
    ("diversity", "diversity of a prompt", 3),
    ("nearest_training_image", "nearest training image", 3),
    ("image_effective_rank", "effective rank, images", 1),
    ("retained_r@1", "retained R@1 on the base data", 3),
    ("seconds", "seconds of tuning", 0),
)
SUMMARY = ("search_r@1", "reranked_r@1", "all_right", "retained_r@1", "image_effective_rank", "diversity")
FLOORS = {
    "kid": "kid_floor",
    "cmmd": "cmmd_floor",
    "nearest_training_image": "nearest_training_image_of_real",
}

METHOD = """
Each arm is tuned for {common[steps]} steps with batch size {common[batch_size]} on pairs of a catalog that its base has
never seen. It is evaluated on pairs that no arm was tuned on: a gallery of up to {gallery} pairs, whose captions are
the queries, and {prompts} prompts with {per_prompt} images each, generated from the same noise in {sampler_steps}
guided steps ({sampler}, scale {guidance:g}). An image is right for a caption if it has the same attributes (synthetic
catalogs) or the same caption. "Re-ranked" is `search(rerank={rerank[candidates]})` with timesteps
{rerank[timesteps]} and weight {rerank[weight]:g}, by the UNet of the same arm. Training, re-ranking and generation run
in bfloat16. The judge of generated images is frozen and was trained on other renderings.

Two settings per arm were tried on the validation pairs of ecommerce-product with {sizes[0]} pairs and one seed. The
better one was frozen and run on the test pairs. The score is the mean of R@1 in both directions and "all attributes
right", or the one of them that the arm tunes; ties go to the first setting. RSC arms include the hard negatives and the
settings chosen for "ITC + IS, hard negatives"; "RSC encoder and generator" has the chosen weights of both.

Figures are means over seeds, followed by the lowest and the highest seed. KID and CMMD are unbiased estimates and may
be below zero. Intervals (95 %) come from a bootstrap over seeds and over queries or prompts, without correction for
multiple comparisons; those on top are over the synthetic catalogs together. Arms have the same number of steps, not
the same time. Two runs shared two cores, in part with other programs, so times are rough.

A base without one synthetic catalog is trained on the other two: CLIP for {base_steps[clip]} steps, the UNet for
{base_steps[unet]}. Its VAE and tokenizer come from the built-in base and have seen all three catalogs. {real} is tuned
from the built-in base, on real images.
"""

Result = Mapping[str, Any]
Key = tuple[int, str, str]  # pairs, domain, arm
Units = NDArray[np.float64]
Runs = Mapping[Key, list[Mapping[str, Any]]]  # sorted by seed


@click.command()
@click.option("--result", type=click.Path(path_type=Path, exists=True), default=RESULT)
@click.option("--page", type=click.Path(path_type=Path), default=PAGE)
def main(result: Path, page: Path) -> None:
    """Write the page and its plots."""
    content = json.loads(result.read_text(encoding="utf-8"))
    runs = tested(content)
    for pairs in sizes(runs):
        file = result.parent / f"ablation-{pairs}.svg"
        file.write_text(plot(pairs, content["declared"], runs) + "\n", encoding="utf-8")
    page.write_text("\n".join(lines(content, runs, result.parent, page)) + "\n", encoding="utf-8")
    click.echo(f"{page}: {len(content['runs'])} runs")


def tested(content: Result) -> Runs:
    """Return the runs of the test phase. The base, which is tuned on nothing, counts for every number of pairs."""
    found: dict[Key, list[Mapping[str, Any]]] = {}
    for one in sorted(content["runs"], key=lambda one: one["run"]["seed"]):
        run = one["run"]
        if run["phase"] == "test":
            every = content["declared"]["sizes"] if run["arm"] == "base" else [run["pairs"]]
            for pairs in every:
                found.setdefault((pairs, run["domain"], run["arm"]), []).append(one)
    tuned = {(pairs, domain) for pairs, domain, arm in found if arm != "base"}
    return {key: some for key, some in found.items() if key[:2] in tuned}


def sizes(runs: Runs) -> list[int]:
    """Return the numbers of pairs that have results."""
    return sorted({pairs for pairs, _, _ in runs})


def synthetic_domains(pairs: int, runs: Runs) -> list[str]:
    """Return the synthetic catalogs that have results for a number of pairs."""
    return [domain for domain in SYNTHETIC if any(key[:2] == (pairs, domain) for key in runs)]


def lines(content: Result, runs: Runs, folder: Path, page: Path) -> Iterator[str]:
    """Yield the lines of the page."""
    declared = content["declared"]
    yield "# What joint tuning, RSC and re-ranking gain"
    yield ""
    yield "Generated by `benchmarks/quality.py` from `benchmarks/quality/ablation.json`; `make ablation` runs it."
    yield from ["", "## In short", ""]
    yield from answer(runs, declared)
    if not content["complete"]:
        yield ""
        yield f"**Incomplete**: {len(content['runs'])} runs so far. {coverage(runs, declared)}"
    for pairs in sizes(runs):
        domains = synthetic_domains(pairs, runs)
        if domains:
            yield from ["", f"## Tuned on {pairs} pairs", "", f"Means over {', '.join(domains)}.", ""]
            yield from summary(pairs, domains, runs, declared)
            yield from ["", f"![R@1 and attributes right, {pairs} pairs](quality/ablation-{pairs}.svg)"]
    yield from ["", "## Generated images", ""]
    yield "The first image of the first ten prompts, first seed."
    for domain in declared["domains"]:
        pairs = sizes(runs)[0] if runs else 0
        found = list(sheets(pairs, domain, declared["arms"], runs, folder, page))
        yield from ["", f"### {domain}", "", *found] if found else []
    yield from ["", "## How it was measured", ""]
    for paragraph in METHOD.format(**declared, real=REAL).strip().split("\n\n"):
        yield from [*textwrap.wrap(paragraph, 118), ""]
    yield from bases(content)
    yield from earlier_bases(content)
    yield f"The last runs: {content['cpu']}, {content['cores']} cores, {content['date'][:10]}."
    yield from ["", "## Settings tried", ""]
    yield from chosen(content)
    for pairs in sizes(runs):
        for domain in declared["domains"]:
            arms = [arm for arm in declared["arms"] if (pairs, domain, arm) in runs]
            if arms:
                yield from ["", f"## {domain}, {pairs} pairs", ""]
                yield from table(pairs, domain, arms, runs)
                yield from ["", *differences(pairs, domain, arms, runs)]


# --- the answer ------------------------------------------------------------------------------------------------------


def answer(runs: Runs, declared: Mapping[str, Any]) -> Iterator[str]:
    """Yield what each choice changes, as a list: over all numbers of pairs and synthetic catalogs."""
    settings = [(pairs, domain) for pairs in sizes(runs) for domain in synthetic_domains(pairs, runs)]
    tuned = [key for key in runs if key[:2] in settings and key[2] != "base"]
    if not tuned:
        return
    alone = np.mean([mean(runs[key], "search_r@1") for key in tuned])
    reranked = np.mean([mean(runs[key], "reranked_r@1") for key in tuned])
    better = sum(mean(runs[key], "reranked_r@1") > mean(runs[key], "search_r@1") for key in tuned)
    calls = declared["rerank"]["candidates"] * len(declared["rerank"]["timesteps"])
    yield (
        f"- **Re-ranking**: R@1 of text queries {alone:.3f} → {reranked:.3f} over all tuned models; better in {better} "
        f"of {len(tuned)}. Each query costs {calls} rows of the UNet and no training."
    )
    tuned_apart = [
        pooled_effect("reranked", HARD, SEPARATE["search"], settings, runs, theirs="search"),
        pooled_effect("all_right", HARD, SEPARATE["all_right"], settings, runs),
    ]
    if found := [effect for effect in tuned_apart if effect]:
        yield (
            f"- **One model instead of two**: {HARD}, re-ranked, compared with {SEPARATE['search']}, not re-ranked, "
            f"and with {SEPARATE['all_right']}: {'; '.join(found)}."
        )
    for arm, other in REFERENCES.items():
        effects = [effect for column in COLUMNS if (effect := pooled_effect(column, arm, other, settings, runs))]
        if effects:
            yield f"- **{arm}**, compared with {other}: {'; '.join(effects)}.{cost(arm, other, settings, runs)}"


def pooled_effect(
    column: str, arm: str, other: str, settings: Sequence[tuple[int, str]], runs: Runs, *, theirs: str = ""
) -> str | None:
    """Return the mean difference over settings, with its interval from all their queries or prompts together.

    theirs: The column of the other arm. Default: the same.
    """
    if (column, arm) in UNTUNED or (theirs or column, other) in UNTUNED:
        return None
    both = [paired(column, (*setting, arm), (*setting, other), runs, theirs=theirs) for setting in settings]
    of_settings = [found for found in both if found]
    if not of_settings:
        return None
    seeds = set.intersection(*(set(found) for found in of_settings))
    sides = [
        [np.concatenate([found[seed][side] for found in of_settings]) for seed in sorted(seeds)] for side in (0, 1)
    ]
    pooled = paired_bootstrap(*map(np.array, sides))
    verdict = "within chance" if pooled.low <= 0 <= pooled.high else "beyond chance"
    return f"{COLUMNS[column]} {pooled.difference:+.3f} ({pooled.low:+.3f} to {pooled.high:+.3f}, {verdict})"


def cost(arm: str, other: str, settings: Sequence[tuple[int, str]], runs: Runs) -> str:
    """Return the ratio of the tuning times as a sentence."""
    if other == "base":
        return ""
    ratios = [
        mean(runs[*setting, arm], "seconds") / mean(runs[*setting, other], "seconds")
        for setting in settings
        if (*setting, arm) in runs and (*setting, other) in runs
    ]
    return f" Time of a step: {np.median(ratios):.2f}x." if ratios else ""


def coverage(runs: Runs, declared: Mapping[str, Any]) -> str:
    """Return which settings have results, as a sentence."""
    parts = []
    for pairs in declared["sizes"]:
        for domain in declared["domains"]:
            seeds = [
                len(some) for (n, name, arm), some in runs.items() if (n, name) == (pairs, domain) and arm != "base"
            ]
            if seeds:
                parts.append(f"{domain} with {pairs} pairs: {len(seeds)} arms, {min(seeds)} to {max(seeds)} seeds")
    return "; ".join(parts) + "." if parts else "None on test pairs."


def interval(column: str, ours: Key, others: Key, runs: Runs) -> Interval | None:
    """Return the difference of two arms, by a bootstrap over the seeds that both have and over queries or prompts."""
    found = paired(column, ours, others, runs)
    return paired_bootstrap(*(np.array(side) for side in zip(*found.values(), strict=True))) if found else None


def paired(column: str, ours: Key, others: Key, runs: Runs, *, theirs: str = "") -> dict[int, tuple[Units, Units]]:
    """Return the units of two arms for each seed that both have. The base, which is tuned on nothing, has all seeds.

    theirs: The column of the other arm. Default: the same.
    """
    of_seed = {one["run"]["seed"]: one for one in runs.get(others, ())}
    found = {}
    for one in runs.get(ours, ()):
        other = of_seed.get(0 if others[2] == "base" else one["run"]["seed"])
        if other is not None and column in one["columns"]:
            found[one["run"]["seed"]] = (units(column, one), units(theirs or column, other))
    return found


def units(column: str, run: Mapping[str, Any]) -> Units:
    """Return the bootstrap units: queries, or prompts with all their images."""
    values = np.array(run["columns"][column], float)
    return values.reshape(-1, PER_PROMPT).mean(axis=1) if column == "all_right" else values


def mean(some: Sequence[Mapping[str, Any]], figure: str) -> float:
    """Return the mean of a figure over seeds."""
    return float(np.mean([one["figures"][figure] for one in some]))


# --- tables and plots ------------------------------------------------------------------------------------------------


def summary(pairs: int, domains: Sequence[str], runs: Runs, declared: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each arm: means over catalogs and seeds, and the time of a step compared with ITC + IS."""
    titles = {name: title for name, title, _ in FIGURES}
    digits = {name: n for name, _, n in FIGURES}
    yield f"| | runs | {' | '.join(titles[name] for name in SUMMARY)} | time of a step |"
    yield f"|---|{'---|' * (len(SUMMARY) + 2)}"
    for arm in declared["arms"]:
        found = [runs[pairs, domain, arm] for domain in domains if (pairs, domain, arm) in runs]
        if found:
            cells = [f"{np.mean([mean(some, name) for some in found]):.{digits[name]}f}" for name in SUMMARY]
            ratios = [
                mean(runs[pairs, domain, arm], "seconds") / mean(runs[pairs, domain, JOINT], "seconds")
                for domain in domains
                if (pairs, domain, arm) in runs and (pairs, domain, JOINT) in runs
            ]
            time = f"{np.median(ratios):.2f}" if ratios and arm != "base" else ""
            yield f"| {arm} | {sum(map(len, found))} | {' | '.join(cells)} | {time} |"


def table(pairs: int, domain: str, arms: Sequence[str], runs: Runs) -> Iterator[str]:
    """Yield one line for each arm, and one for real images."""
    first = runs[pairs, domain, arms[0]][0]["figures"]
    shown = [figure for figure in FIGURES if figure[0] in first]
    yield f"| | seeds | {' | '.join(title for _, title, _ in shown)} |"
    yield f"|---|{'---|' * (1 + len(shown))}"
    for arm in arms:
        of_seeds = [one["figures"] for one in runs[pairs, domain, arm]]
        cells = (spread([figures[name] for figures in of_seeds], digits) for name, _, digits in shown)
        yield f"| {arm} | {len(of_seeds)} | {' | '.join(cells)} |"
    floors = (f"{first[FLOORS[name]]:.{digits}f}" if name in FLOORS else "" for name, _, digits in shown)
    yield f"| *real images* | | {' | '.join(floors)} |"


def spread(values: Sequence[float], digits: int) -> str:
    """Format values as "mean (lowest to highest)"."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def differences(pairs: int, domain: str, arms: Sequence[str], runs: Runs) -> Iterator[str]:
    """Yield the difference of each arm from its reference."""
    for column, title in COLUMNS.items():
        for arm, other in REFERENCES.items():
            if arm not in arms or (column, arm) in UNTUNED or (column, other) in UNTUNED:
                continue
            found = interval(column, (pairs, domain, arm), (pairs, domain, other), runs)
            if found:
                significant = "" if found.low <= 0 <= found.high else ", excludes 0"
                yield (
                    f"- {title}, {arm} minus {other}: {found.difference:+.3f} "
                    f"(95% interval: {found.low:+.3f} to {found.high:+.3f}{significant})"
                )


def bases(content: Result) -> Iterator[str]:
    """Yield what the bases generate right of the catalogs that they were trained on."""
    if content["bases"]:
        yield "| base without | type right | color right | both |"
        yield "|---|---|---|---|"
        for domain, shares in content["bases"].items():
            yield f"| {domain} | {shares['type']:.3f} | {shares['colour']:.3f} | {shares['both']:.3f} |"
        yield ""


def earlier_bases(content: Result) -> Iterator[str]:
    """Yield which settings were chosen on a base that was trained for another number of steps."""
    arms: dict[int, list[str]] = {}
    for one in content["runs"]:
        steps, arm = one.get("base_steps", content["declared"]["base_steps"])["unet"], one["run"]["arm"]
        if steps != content["declared"]["base_steps"]["unet"] and arm not in arms.setdefault(steps, []):
            arms[steps].append(arm)
    for steps, names in arms.items():
        yield f"These settings were chosen on an earlier base with {steps:,} UNet steps: {'; '.join(names)}."
        yield ""


def chosen(content: Result) -> Iterator[str]:
    """Yield the table of the settings tried and their scores on the validation pairs."""
    scores = {
        (one["run"]["arm"], one["run"]["setting"]): score(one["run"]["arm"], one["figures"])
        for one in content["runs"]
        if one["run"]["phase"] == "development"
    }
    yield "| arm | settings and their scores |"
    yield "|---|---|"
    for arm, settings in content["declared"]["settings"].items():
        tried = [
            f"{_format(setting)}: {scores[arm, i]:.3f}" for i, setting in enumerate(settings) if (arm, i) in scores
        ]
        if tried and arm != "base":
            yield f"| {arm} | {'; '.join(tried)} |"


def _format(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" if not isinstance(value, bool) else name for name, value in settings.items())


def sheets(pairs: int, domain: str, arms: Sequence[str], runs: Runs, folder: Path, page: Path) -> Iterator[str]:
    """Yield links to the first image of the first ten prompts, for the first seed of each arm."""
    for arm in arms:
        for one in runs.get((pairs, domain, arm), [])[:1]:
            name = Run(**one["run"]).name.removesuffix(".json") + ".webp"
            if (folder / "sheets" / name).exists():
                yield f"{arm}<br>![{arm}]({(folder / 'sheets' / name).relative_to(page.parent)})<br>"


def plot(pairs: int, declared: Mapping[str, Any], runs: Runs) -> str:
    """Return the chart of the arms' means over the synthetic catalogs."""
    domains, arms = synthetic_domains(pairs, runs), list(declared["arms"])
    lines = [
        Line(
            title,
            [
                (number, float(np.mean([mean(runs[pairs, domain, arm], figure) for domain in domains])))
                for number, arm in enumerate(arms)
                if domains and all((pairs, domain, arm) in runs for domain in domains)
            ],
            dashed=figure == "all_right",
        )
        for figure, title in (
            ("search_r@1", "R@1"),
            ("reranked_r@1", "R@1 re-ranked"),
            ("all_right", "all attributes right"),
        )
    ]
    # Non-breaking spaces keep each name on one line.
    label = ", ".join(f"{number} {arm}".replace(" ", "\u00a0") for number, arm in enumerate(arms))
    return line_chart(f"Tuned on {pairs} pairs", [line for line in lines if line.points], x_label=label, y_max=1.0)


if __name__ == "__main__":
    main()
