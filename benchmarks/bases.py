"""The bases of the ablation: CLIP and a UNet trained on two of the synthetic catalogs, without the third.

    python benchmarks/bases.py [CATALOG ...]        about an hour and a quarter each on one core; resumes

Each base shares the tokenizer and the VAE with the built-in checkpoint, whose VAE has seen images of all three
catalogs. Its CLIP and UNet are trained from scratch. `measure` counts how often it generates a product of the two
catalogs with the right type and the right color, by the frozen judge.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SYNTHETIC = ("ecommerce-product", "fashion-man", "fashion-woman")
STEPS = {"clip": 1700, "unet": 4500}
PROMPTS = 200  # for each known catalog


@click.command()
@click.argument("catalogs", nargs=-1, type=click.Choice(SYNTHETIC))
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "runs" / "ablation", show_default=True)
@click.option("--threads", type=int, help="Threads of PyTorch. Default: one per core.")
def main(catalogs: tuple[str, ...], work: Path, threads: int | None) -> None:
    """Train the bases without CATALOGS (default: each of the three) and measure them."""
    if threads:
        import torch

        torch.set_num_threads(threads)
    for catalog in catalogs or SYNTHETIC:
        base_without(catalog, work)
        click.echo(f"without {catalog}: {json.dumps(measure(catalog, work))}")


def base_without(catalog: str, work: Path) -> Path:
    """Return the checkpoint trained on the other catalogs. Trains it if it is missing."""
    folder = work / "bases" / catalog
    if not folder.exists():
        from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
        from unidiff_sdk.training.recipes import tiny

        built_in = load_checkpoint("tiny")
        tiny.train_base(
            folder.with_name(f"{catalog}.work"),
            folder,
            name=f"tiny without {catalog}",
            catalogs=[name for name in SYNTHETIC if name != catalog],
            vae=built_in.vae.eval(),
            tokenizer=built_in.tokenizer,
            stages={name: replace(tiny.RECIPE[name], steps=steps) for name, steps in STEPS.items()},
        )
    return folder


def measure(catalog: str, work: Path) -> dict[str, float]:
    """Return the shares of generated images of the known catalogs with the right type, color, and both."""
    if known_shares := measured_base(catalog, work):
        return known_shares
    from unidiff_sdk.datasets.synthetic import products
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
    from unidiff_sdk.training.evaluation.judge import Judge
    from unidiff_sdk.training.evaluation.sampling import generate_images, sampler_settings, sampler_table
    from unidiff_sdk.training.objective.joint_model import JointModel

    checkpoint = load_checkpoint(base_without(catalog, work))
    known = [p for name in SYNTHETIC if name != catalog for p in products(name, PROMPTS, seed=1, split="test")]
    sampler, steps, guidance = sampler_settings(checkpoint)
    images = generate_images(
        JointModel(checkpoint).eval(), checkpoint, [product.caption for product in known],
        table=sampler_table(checkpoint, sampler, steps), guidance=guidance, seed=0,
    )  # fmt: skip
    answers: Any = Judge.load().attributes(images)
    right = {
        name: np.array([answers[name][i] == product.attributes[name] for i, product in enumerate(known)])
        for name in ("type", "colour")
    }
    shares = {name: float(column.mean()) for name, column in right.items()}
    shares["both"] = float((right["type"] & right["colour"]).mean())
    _measured_file(catalog, work).write_text(json.dumps(shares) + "\n", encoding="utf-8")
    return shares


def measured_base(catalog: str, work: Path) -> dict[str, float] | None:
    """Return the shares that `measure` found, or None."""
    file = _measured_file(catalog, work)
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def _measured_file(catalog: str, work: Path) -> Path:
    return work / "bases" / f"{catalog}.json"


if __name__ == "__main__":
    main()
