"""What four steps without guidance cost in quality, and save in time: the distilled tiny model beside its teacher.

Every student is distilled anew, from seed to bundle (`unidiff-train distill`), on captions of the three synthetic
catalogs' training splits; then all draw the same captions of combinations that neither training nor distillation
showed, from the same seeds. What is right in the pictures is read off by the frozen judge. Of the UNet's work four
unguided steps are 4/50; of all that a picture takes, by multiply-adds, 0.104, because both decode it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from harness import ROOT, Benchmark, options

CAPTIONS_TO_LEARN, CAPTIONS = 1000, 40  # of each catalog
GUIDED_STEPS, STEPS = 25, 4
SEEDS, DISTILLATIONS = (0, 1, 2), (0,)
TEACHER, UNTAUGHT, DIFFUSERS = "guided, 25 steps", "not distilled, 4 steps unguided", "diffusers, guided, 25 steps"


@click.command()
@options
@click.option(
    "--work", type=click.Path(path_type=Path), default=ROOT / ".cache" / "few-steps", help="Where students are kept."
)
def main(work: Path, **chosen: Any) -> None:
    """Distil, export, draw and judge."""
    bench = Benchmark(__file__, "What do four steps without guidance lose, and save?", **chosen)
    from generate import diffusers_pipeline

    from unidiff_sdk import Bundle
    from unidiff_sdk.datasets.synthetic import CATALOGS, products
    from unidiff_sdk.generation.generator import Generator
    from unidiff_sdk.training.evaluation.judge import Judge, attribute_accuracy

    teacher = Bundle.open("tiny", threads=bench.threads)
    asked = [p for name in CATALOGS for p in products(name, CAPTIONS, seed=5, split="test-unseen")]
    judge = Judge.load()

    def drawing(bundle: Bundle, **settings: Any) -> Callable[..., Any]:
        return lambda prompts, **more: Generator(bundle).generate(prompts, **settings, **more)

    def right(draw: Callable[..., Any]) -> dict[str, float]:
        shares = []
        for seed in SEEDS:
            seen = judge.attributes(draw([product.caption for product in asked], seed=seed))
            shares.append(attribute_accuracy(seen, [product.attributes for product in asked]))
        means = {name: sum(share[name] for share in shares) / len(SEEDS) for name in shares[0]}
        everything = means.pop("all")
        return {"accuracy": round(everything, 4), "attributes_right": round(sum(means.values()) / len(means), 4)}

    students = {f"distilled (seed {seed}), 4 steps": student(work, teacher, seed) for seed in DISTILLATIONS}
    ours = {name: drawing(Bundle.open(folder, threads=bench.threads)) for name, folder in students.items()}
    ours[UNTAUGHT] = drawing(teacher, steps=STEPS, guidance_scale=1)
    ours[TEACHER] = drawing(teacher, steps=GUIDED_STEPS)
    figures = {name: right(draw) for name, draw in ours.items()}
    peer = diffusers_pipeline(bench.threads)
    for n in (1, 8):
        bench.row(
            f"tiny, {n} picture{'s' if n > 1 else ''}",
            ours={name: picture(draw, asked[0].caption, n) for name, draw in ours.items()},
            peers={DIFFUSERS: lambda: peer(n, GUIDED_STEPS)},  # noqa: B023
            parameters={"pictures": n},
            figures=figures,
            items=n,
            rounds=max(bench.rounds, 11),
            note=f"of {len(asked)} captions with the seeds {SEEDS}: attributes_right is the mean over the attributes, "
            "accuracy the share of pictures that have all of them right.",
        )
    bench.finish()


def picture(draw: Callable[..., Any], prompt: str, n: int) -> Callable[[], object]:
    return lambda: draw(prompt, n=n, seed=0)


def student(work: Path, teacher: Any, seed: int) -> Path:
    """The bundle of a student of this teacher; made if it is not in `work`."""
    from unidiff_export import export_bundle
    from unidiff_sdk.training.config import DistillationConfig
    from unidiff_sdk.training.loop.distiller import distill

    name = f"few-steps-{teacher.fingerprint[:12]}-seed{seed}"
    bundle, checkpoint = work / f"{name}.bundle", work / name
    if bundle.is_dir():
        return bundle
    if not checkpoint.is_dir():
        click.echo(f"Distilling {name} (once, some minutes)…", err=True)
        config = DistillationConfig(trajectories=1024, steps=800, precision="bf16", seed=seed)
        distill("tiny", captions(work), checkpoint, config)
    return export_bundle(str(checkpoint), bundle).path


def captions(work: Path) -> Path:
    """A catalog of all three training splits; its pictures are not looked at."""
    from unidiff_sdk.datasets.synthetic import CATALOGS, products, render

    folder = work / "few-steps-captions"
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [p for name in CATALOGS for p in products(name, CAPTIONS_TO_LEARN)]
        render(chosen[0]).save(folder / "any.png")
        lines = [json.dumps({"file_name": "any.png", "text": product.caption}) for product in chosen]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
