"""The recipe of the frozen judge (`evaluation.judge`), trained from scratch on renderings of the synthetic catalogs.

python -m unidiff_sdk.training.recipes.judge train      # the whole recipe, about 15 minutes on one core
python -m unidiff_sdk.training.recipes.judge check      # accuracy of the packaged weights on new renderings
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from unidiff_sdk.datasets import synthetic
from unidiff_sdk.datasets.drawing import BACKGROUNDS
from unidiff_sdk.training.evaluation.judge import (
    FOLDER,
    IMAGE_SIZE,
    Judge,
    JudgeNet,
    attribute_accuracy,
    judge_files,
    to_tensor,
)

__all__ = ["Recipe", "check", "train"]

IGNORED = -1  # class index of an attribute that a product does not have

# Catalogs for training and evaluating models use small seeds. The judge's seeds start here, so they never overlap.
FIRST_SEED = 900_000
CHECK_SEED = 950_000
CHECK_RENDERINGS = 1000


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights. Recorded in judge.json.

    Attributes:
        renderings: Number of training images over all catalogs.
        epochs: Passes over the training images.
        batch: Images per step.
        learning_rate: Peak learning rate of AdamW with the one-cycle schedule.
        weight_decay: Weight decay of AdamW.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1).
        seed: Seed of products, initial weights and augmentation.
    """

    renderings: int = 15_000
    epochs: int = 10
    batch: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    seed: int = FIRST_SEED


def train(recipe: Recipe, folder: Path = FOLDER, *, check_renderings: int = CHECK_RENDERINGS) -> dict[str, float]:
    """Train a judge and save it in half precision. Returns the accuracy of the saved weights on new renderings.

    check_renderings: Number of new renderings, about.
    """
    labels = _labels()
    net = _fit(recipe, labels)
    weights = save_tensors({name: t.half() if t.is_floating_point() else t for name, t in net.state_dict().items()})
    net.load_state_dict(load_tensors(weights))
    accuracy, _ = check(Judge(net, labels, {}), n=check_renderings)
    record = {
        "format": "unidiff-judge",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(p.numel() for p in net.parameters()),
        "recipe": asdict(recipe),
        "check_seed": CHECK_SEED,
        "accuracy_on_fresh_renderings": {name: round(share, 4) for name, share in accuracy.items()},
        "labels": labels,
    }
    record_path, weights_path = judge_files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights_path.write_bytes(weights)
    record_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return accuracy


def _fit(recipe: Recipe, labels: Mapping[str, list[str]]) -> JudgeNet:
    """Train a network on all attributes at once."""
    pixels, targets = _training_set(recipe, labels)
    torch.manual_seed(recipe.seed)
    net = JudgeNet(labels)
    steps = recipe.epochs * (len(pixels) // recipe.batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
    cross_entropy = nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=recipe.label_smoothing)
    random = np.random.default_rng(recipe.seed)
    for _ in track(range(recipe.epochs), "Training the judge"):
        order = random.permutation(len(pixels))
        for step in range(steps // recipe.epochs):
            rows = order[step * recipe.batch : (step + 1) * recipe.batch]
            with torch.autocast("cpu", torch.bfloat16):  # twice as fast on current processors
                _, logits = net(_degrade(pixels[rows], random))
            losses = [cross_entropy(logits[name].float(), targets[name][rows]) for name in labels]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()
    return net


def check(
    judge: Judge, *, n: int = CHECK_RENDERINGS, seed: int = CHECK_SEED, size: int = IMAGE_SIZE
) -> tuple[dict[str, float], Counter]:
    """Accuracy on about `n` new renderings of `size` pixels, and counts of (attribute, true label, wrong label)."""
    products = _products(n, seed)
    expected = [_expected(product) for product in products]
    predicted = judge.attributes(synthetic.render(product, size) for product in products)
    confusions = Counter(
        (name, truth[name], predicted[name][i])
        for i, truth in enumerate(expected)
        for name in truth
        if truth[name] != predicted[name][i]
    )
    return attribute_accuracy(predicted, expected), confusions


def _products(n: int, seed: int) -> list[synthetic.Product]:
    """About `n` products over all catalogs and all attribute combinations, in their natural proportion.

    The judge is trained on the combinations that are held out from the tuned models as well.
    """
    unseen = max(1, n // 8 // len(synthetic.CATALOGS))  # "test-unseen" holds one combination in eight
    seen = n // len(synthetic.CATALOGS) - unseen
    return [
        product
        for name in synthetic.CATALOGS
        for split, count in (("train", seen), ("test-unseen", unseen))
        for product in synthetic.products(name, count, seed, split)
    ]


def _expected(product: synthetic.Product) -> dict[str, str]:
    # Not every caption names the background, but a generator with only one background must not look real.
    return product.attributes | {"background": product.background}


def _labels() -> dict[str, list[str]]:
    """Every value of every attribute in the union of the catalogs, in the order of the catalogs."""
    labels: dict[str, list[str]] = {}
    for attributes in synthetic.ATTRIBUTES.values():
        for name, values in attributes.items():
            known = labels.setdefault(name, [])
            known += [value for value in values if value not in known]
    return labels | {"background": list(BACKGROUNDS)}


def _training_set(recipe: Recipe, labels: Mapping[str, list[str]]) -> tuple[NDArray[np.uint8], dict[str, Tensor]]:
    """(images uint8[n, 64, 64, 3], {attribute: label indices int64[n]})."""
    products = _products(recipe.renderings, recipe.seed)
    expected = [_expected(product) for product in products]
    targets = {
        name: torch.tensor([values.index(truth[name]) if name in truth else IGNORED for truth in expected])
        for name, values in labels.items()
    }
    pixels = np.stack([np.asarray(synthetic.render(product, IMAGE_SIZE)) for product in track(products, "Rendering")])
    return pixels, targets


def _degrade(pixels: NDArray[np.uint8], random: np.random.Generator) -> Tensor:
    """Degrade a batch as generators do: JPEG artifacts, blur, changed light, noise. float[n, 3, 64, 64] in [0, 1]."""
    pixels = pixels.copy()
    for i in np.flatnonzero(random.random(len(pixels)) < 0.2):
        file = io.BytesIO()
        Image.fromarray(pixels[i]).save(file, "JPEG", quality=int(random.integers(40, 95)))
        pixels[i] = np.asarray(Image.open(file))
    x = to_tensor(pixels)

    def per_image(low: float, high: float) -> Tensor:
        return torch.from_numpy(random.uniform(low, high, (len(pixels), 1, 1, 1)).astype(np.float32))

    blurred = _blur(x, sigma=float(random.uniform(0.4, 1.1)))  # one width per batch, half of its images
    x = torch.where(per_image(0, 1) < 0.5, blurred, x)
    x = x * per_image(0.95, 1.05) + per_image(-0.02, 0.02)
    noise = torch.from_numpy(random.standard_normal(x.shape, dtype=np.float32))
    return (x + per_image(0.0, 0.05) * noise).clamp(0.0, 1.0).contiguous(memory_format=torch.channels_last)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with a standard deviation of `sigma` pixels."""
    offsets = torch.arange(-3, 4, dtype=torch.float32)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).repeat(3, 1)
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(F.conv2d(x, weights[:, None, None, :], groups=3), weights[:, None, :, None], groups=3)


# --- command line ----------------------------------------------------------------------------------------------------


@click.group(help="Train or check the frozen judge of the synthetic catalogs.")
def main() -> None: ...


@main.command("train", help="Render, train and save the judge: about 15 minutes on one core.")
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER, help="Folder for judge.json and its weights.")
@click.option(
    "--renderings",
    default=Recipe.renderings,
    show_default=True,
    type=click.IntRange(1000),
    help="Number of training images.",
)
@click.option(
    "--epochs",
    default=Recipe.epochs,
    show_default=True,
    type=click.IntRange(1),
    help="Passes over the training images.",
)
def train_command(out: Path, renderings: int, epochs: int) -> None:
    accuracy = train(Recipe(renderings=renderings, epochs=epochs), out)
    click.echo(_table(accuracy))


@main.command("check", help="Measure accuracy on new renderings and list the most frequent confusions.")
@click.option(
    "--n", default=CHECK_RENDERINGS, show_default=True, type=click.IntRange(100), help="Number of renderings."
)
@click.option("--seed", default=CHECK_SEED, show_default=True, help="Seed of the renderings.")
@click.option("--size", default=IMAGE_SIZE, show_default=True, help="Side of the renderings in pixels.")
def check_command(n: int, seed: int, size: int) -> None:
    accuracy, confusions = check(Judge.load(), n=n, seed=seed, size=size)
    click.echo(_table(accuracy))
    for (name, truth, predicted), count in confusions.most_common(20):
        click.echo(f"{count:4d}x {name}: {truth} predicted as {predicted}")


def _table(accuracy: Mapping[str, float]) -> str:
    return "\n".join(f"{name:12s} {share:.4f}" for name, share in accuracy.items())


if __name__ == "__main__":
    main()
