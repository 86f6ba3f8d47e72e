"""Quality and time of four unguided steps: the distilled tiny model compared with its teacher.

Each student is distilled and exported (`unidiff-train distill`) on captions from the training splits of the three
synthetic catalogs. Then all models generate images of the same captions from the same seeds. The captions describe
combinations of attributes that occur neither in training nor in distillation. The frozen judge reads the attributes of
the images. Four unguided steps are 4/50 of the UNet's work and 0.104 of an image's multiply-adds, as both decode it.
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
WORK = ROOT / ".cache" / "few-steps"
SEEDS, DISTILLATIONS = (0, 1, 2), (0,)
TEACHER, UNDISTILLED, DIFFUSERS = "guided, 25 steps", "not distilled, 4 steps unguided", "diffusers, guided, 25 steps"


@click.command()
@options
@click.option("--work", type=click.Path(path_type=Path), default=WORK, help="Folder for the students.")
def main(work: Path, **chosen: Any) -> None:
    """Distill, export, generate and judge."""
    bench = Benchmark(__file__, "What do four unguided steps cost in quality, and save in time?", **chosen)
    from generate import diffusers_pipeline

    from unidiff_sdk import Bundle
    from unidiff_sdk.datasets.synthetic import CATALOGS, products
    from unidiff_sdk.generation.generator import Generator
    from unidiff_sdk.training.evaluation.judge import Judge, attribute_accuracy

    teacher = Bundle.open("tiny", threads=bench.threads)
    test_products = [p for name in CATALOGS for p in products(name, CAPTIONS, seed=5, split="test-unseen")]
    judge = Judge.load()

    def generation(bundle: Bundle, **settings: Any) -> Callable[..., Any]:
        return lambda prompts, **more: Generator(bundle).generate(prompts, **settings, **more)

    def quality(generate: Callable[..., Any]) -> dict[str, float]:
        shares = []
        for seed in SEEDS:
            found = judge.attributes(generate([product.caption for product in test_products], seed=seed))
            shares.append(attribute_accuracy(found, [product.attributes for product in test_products]))
        means = {name: sum(share[name] for share in shares) / len(SEEDS) for name in shares[0]}
        all_attributes = means.pop("all")
        return {"accuracy": round(all_attributes, 4), "attributes_right": round(sum(means.values()) / len(means), 4)}

    students = {f"distilled (seed {seed}), 4 steps": student(work, teacher, seed) for seed in DISTILLATIONS}
    ours = {name: generation(Bundle.open(folder, threads=bench.threads)) for name, folder in students.items()}
    ours[UNDISTILLED] = generation(teacher, steps=STEPS, guidance_scale=1)
    ours[TEACHER] = generation(teacher, steps=GUIDED_STEPS)
    figures = {name: quality(generate) for name, generate in ours.items()}
    peer = diffusers_pipeline(bench.threads)
    for n in (1, 8):
        bench.row(
            f"tiny, {n} image{'s' if n > 1 else ''}",
            ours={name: one_call(generate, test_products[0].caption, n) for name, generate in ours.items()},
            peers={DIFFUSERS: lambda: peer(n, GUIDED_STEPS)},  # noqa: B023
            parameters={"images": n},
            figures=figures,
            items=n,
            rounds=max(bench.rounds, 11),
            note=f"Quality over {len(test_products)} captions and the seeds {', '.join(map(str, SEEDS))}: "
            "attributes_right is the mean over the attributes, accuracy the share of images with all attributes right.",
        )
    bench.finish()


def one_call(generate: Callable[..., Any], prompt: str, n: int) -> Callable[[], object]:
    return lambda: generate(prompt, n=n, seed=0)


def student(work: Path, teacher: Any, seed: int) -> Path:
    """Return the bundle of a student of this teacher; distill and export it if it is not in `work`."""
    from unidiff_export import export_bundle
    from unidiff_sdk.training.config import DistillationConfig
    from unidiff_sdk.training.loop.distiller import distill

    name = f"few-steps-{teacher.fingerprint[:12]}-seed{seed}"
    bundle, checkpoint = work / f"{name}.bundle", work / name
    if bundle.is_dir():
        return bundle
    if not checkpoint.is_dir():
        click.echo(f"Distilling {name} (once, several minutes)…", err=True)
        config = DistillationConfig(trajectories=1024, steps=800, precision="bf16", seed=seed)
        distill("tiny", captions(work), checkpoint, config, overwrite=True)
    return export_bundle(str(checkpoint), bundle).path


def captions(work: Path) -> Path:
    """Write a catalog with the captions of all three training splits; distillation does not read its images."""
    from unidiff_sdk.datasets.synthetic import CATALOGS, products, render

    folder = work / "few-steps-captions"
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [p for name in CATALOGS for p in products(name, CAPTIONS_TO_LEARN)]
        render(chosen[0]).save(folder / "image.png")
        lines = [json.dumps({"file_name": "image.png", "text": product.caption}) for product in chosen]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
