"""The frozen judge: a small classifier of the synthetic catalogs' attributes, and the features for KID and CMMD.

It has its own recipe, its own data seeds and a recorded hash, and it never learns from a model under test; so a figure
that it gives today compares with one that it gave yesterday. It knows the products of `unidiff_sdk.datasets.synthetic`
and nothing else: of photographs it has no opinion worth hearing.

    python -m unidiff_sdk.training.evaluation.judge train      # the whole recipe, about 15 minutes on one core
    python -m unidiff_sdk.training.evaluation.judge check      # accuracy of the committed weights on fresh renderings
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
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
from unidiff_sdk.errors import CheckpointError, OptionError

__all__ = ["Judge", "attribute_accuracy"]

Picture = Image.Image | NDArray[np.uint8]

FOLDER = Path(__file__).parent
SIZE = 64  # pixels; every picture is resized to it
FEATURES = 128
IGNORED = -1  # the class of an attribute that a product does not have

# Catalogs for training and measuring models use small seeds; the judge's own begin here, so that the two never meet.
FIRST_SEED = 900_000
CHECK_SEED = 950_000


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, recorded beside them."""

    renderings: int = 15_000  # over all catalogs
    epochs: int = 10
    batch: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    seed: int = FIRST_SEED


# --- the network -----------------------------------------------------------------------------------------------------


class JudgeNet(nn.Module):
    """Seven 3x3 convolutions, pooling, 128 features, and a linear head per attribute. Under 250,000 parameters."""

    def __init__(self, labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

        self.trunk = nn.Sequential(
            block(3, 24),  # full resolution first: at 64 px, the lines of a check are two pixels wide
            block(24, 40, stride=2),
            block(40, 40),
            block(40, 64, stride=2),
            block(64, 64),
            block(64, 96, stride=2),
            block(96, 96),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, FEATURES, bias=False),
            # Unit variance on real renderings: the kernel of KID, (x·y/d + 1)³, then sees features of a known scale.
            nn.BatchNorm1d(FEATURES, affine=False),
        )
        self.sizes = {name: len(values) for name, values in labels.items()}
        self.heads = nn.Linear(FEATURES, sum(self.sizes.values()))  # side by side in one matrix

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """pixels: float[n, 3, 64, 64] in [0, 1] -> features float[n, 128], logits {attribute: float[n, labels]}."""
        features = self.trunk(pixels * 2.0 - 1.0)
        logits = self.heads(features).split(list(self.sizes.values()), dim=1)
        return features, dict(zip(self.sizes, logits, strict=True))


# --- judging ---------------------------------------------------------------------------------------------------------


class Judge:
    """The frozen judge, ready to look at pictures."""

    def __init__(self, net: JudgeNet, labels: Mapping[str, Sequence[str]], record: Mapping[str, object]) -> None:
        self.labels = {name: tuple(values) for name, values in labels.items()}
        self.record = dict(record)  # recipe, seeds, accuracy, sha256: what judge.json says
        self._net = net.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: str | Path = FOLDER) -> Judge:
        """Read judge.json and judge.safetensors from `folder` (default: the committed ones).

        Raises CheckpointError where a file is missing or the weights' sha256 is not the recorded one: figures of
        another judge do not compare.
        """
        record_path, weights_path = _paths(Path(folder))
        try:
            record = json.loads(record_path.read_text(encoding="utf-8"))
            weights = weights_path.read_bytes()
            recorded, labels = record["sha256"], record["labels"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"No usable judge in {folder} ({error}). "
                "`python -m unidiff_sdk.training.evaluation.judge train` makes one."
            ) from error
        found = hashlib.sha256(weights).hexdigest()
        if found != recorded:
            raise CheckpointError(
                f"{weights_path} has sha256 {found[:12]}…, but judge.json records {recorded[:12]}…: figures of a "
                "changed judge do not compare. Restore the committed file."
            )
        net = JudgeNet(labels)
        net.load_state_dict(load_tensors(weights))  # copies the halves into float32 parameters
        return cls(net, labels, record)

    def features(self, images: Iterable[Picture], *, batch_size: int = 128) -> NDArray[np.float32]:
        """float32[n, 128] for KID, CMMD, diversity and nearest pictures; about unit variance on real renderings.

        images: PIL pictures, uint8[h, w, 3] arrays or float[h, w, 3] arrays in [0, 1], of any size.
        """
        rows = [features.numpy() for features, _ in self._look(images, batch_size)]
        return np.concatenate(rows) if rows else np.zeros((0, FEATURES), np.float32)

    def attributes(self, images: Iterable[Picture], *, batch_size: int = 128) -> dict[str, list[str]]:
        """The likeliest label of each attribute for each picture: {"type": [...], "color": [...], ...}.

        Every attribute of every catalog is answered; compare only those that the expected product has, as
        `attribute_accuracy` does. images: as in `features`.
        """
        answers: dict[str, list[str]] = {name: [] for name in self.labels}
        for _, logits in self._look(images, batch_size):
            for name, values in self.labels.items():
                answers[name] += [values[i] for i in logits[name].argmax(dim=1).tolist()]
        return answers

    def _look(self, images: Iterable[Picture], batch_size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        stream = iter(images)
        while batch := [_pixels(image) for image in islice(stream, batch_size)]:
            with torch.inference_mode():
                yield self._net(_to_tensor(np.stack(batch)))


def attribute_accuracy(answers: Mapping[str, Sequence[str]], expected: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of right answers per attribute, over the products that have it; "all" is all of a product's right.

    answers: of `Judge.attributes`, n each; expected: the n products' attributes. Attributes that the judge does not
    know are left out.
    """
    names = [name for name in answers if any(name in product for product in expected)]
    if not names or any(len(answers[name]) != len(expected) for name in names):
        raise OptionError(f"attribute_accuracy needs an answer for each of the {len(expected)} products")
    right = {
        name: [answers[name][i] == product[name] if name in product else None for i, product in enumerate(expected)]
        for name in names
    }
    shares = {name: float(np.mean([hit for hit in hits if hit is not None])) for name, hits in right.items()}
    every = [all(hits[i] is not False for hits in right.values()) for i in range(len(expected))]
    return {**shares, "all": float(np.mean(every))}


def _pixels(image: Picture) -> NDArray[np.uint8]:
    """Any picture as uint8[64, 64, 3]."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
            raise OptionError(f"the judge looks at pictures of shape [h, w, 3], not {array.shape}")
        if np.issubdtype(array.dtype, np.floating):
            if not np.isfinite(array).all() or array.min() < 0.0 or array.max() > 1.0:
                raise OptionError("the judge takes float pictures in [0, 1]; clip them first")
            array = (array * 255.0 + 0.5).astype(np.uint8)
        if array.dtype != np.uint8:
            raise OptionError(f"the judge takes uint8 or float pictures, not {array.dtype}")
        image = Image.fromarray(array)
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8[n, 64, 64, 3] -> float[n, 3, 64, 64] in [0, 1], channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255.0


# --- the recipe ------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, folder: Path = FOLDER) -> dict[str, float]:
    """Render, train, store in half precision, and return the accuracy of what was stored on fresh renderings."""
    # 1. Data: combinations that the tuned models never see are no secret to their judge
    labels = _labels()
    pixels, targets = _training_set(recipe, labels)

    # 2. The network, in bfloat16 where that is safe: twice as fast on current processors
    torch.manual_seed(recipe.seed)
    net = JudgeNet(labels)
    steps = recipe.epochs * (len(pixels) // recipe.batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
    cross_entropy = nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=recipe.label_smoothing)
    random = np.random.default_rng(recipe.seed)

    # 3. Learn every attribute at once
    for _ in track(range(recipe.epochs), "Training the judge"):
        order = random.permutation(len(pixels))
        for step in range(steps // recipe.epochs):
            rows = order[step * recipe.batch : (step + 1) * recipe.batch]
            with torch.autocast("cpu", torch.bfloat16):
                _, logits = net(_worn(pixels[rows], random))
            losses = [cross_entropy(logits[name].float(), targets[name][rows]) for name in labels]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()

    # 4. Store halves, and state the accuracy of exactly those
    weights = save_tensors({name: t.half() if t.is_floating_point() else t for name, t in net.state_dict().items()})
    net.load_state_dict(load_tensors(weights))
    accuracy, _ = check(Judge(net, labels, {}))
    record = {
        "format": "unidiff-judge",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(p.numel() for p in net.parameters()),
        "recipe": asdict(recipe),
        "check_seed": CHECK_SEED,
        "accuracy_on_fresh_renderings": {name: round(share, 4) for name, share in accuracy.items()},
        "labels": labels,
    }
    record_path, weights_path = _paths(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights_path.write_bytes(weights)
    record_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return accuracy


def check(judge: Judge, *, n: int = 1000, seed: int = CHECK_SEED, size: int = SIZE) -> tuple[dict[str, float], Counter]:
    """Accuracy on about `n` fresh real renderings, and how often which label was taken for which."""
    chosen = _products(n, seed)
    expected = [_truth(product) for product in chosen]
    answers = judge.attributes(synthetic.render(product, size) for product in chosen)
    confusions = Counter(
        (name, truth[name], answers[name][i])
        for i, truth in enumerate(expected)
        for name in truth
        if truth[name] != answers[name][i]
    )
    return attribute_accuracy(answers, expected), confusions


def _products(n: int, seed: int) -> list[synthetic.Product]:
    """About `n` products over all catalogs and all attribute combinations, in the proportion in which those exist."""
    unseen = max(1, n // 8 // len(synthetic.CATALOGS))  # "test-unseen" holds one combination in eight
    seen = n // len(synthetic.CATALOGS) - unseen
    return [
        product
        for name in synthetic.CATALOGS
        for split, count in (("train", seen), ("test-unseen", unseen))
        for product in synthetic.products(name, count, seed, split)
    ]


def _truth(product: synthetic.Product) -> dict[str, str]:
    # The background is not told by every caption, but a generator that knows only one should not look real.
    return product.attributes | {"background": product.background}


def _labels() -> dict[str, list[str]]:
    """Every value of every attribute in the union of the catalogs, in the catalogs' order."""
    labels: dict[str, list[str]] = {}
    for attributes in synthetic.ATTRIBUTES.values():
        for name, values in attributes.items():
            known = labels.setdefault(name, [])
            known += [value for value in values if value not in known]
    return labels | {"background": list(BACKGROUNDS)}


def _training_set(recipe: Recipe, labels: Mapping[str, list[str]]) -> tuple[NDArray[np.uint8], dict[str, Tensor]]:
    chosen = _products(recipe.renderings, recipe.seed)
    truth = [_truth(product) for product in chosen]
    targets = {
        name: torch.tensor([values.index(t[name]) if name in t else IGNORED for t in truth])
        for name, values in labels.items()
    }
    pixels = np.stack([np.asarray(synthetic.render(product, SIZE)) for product in track(chosen, "Rendering")])
    return pixels, targets


def _worn(pixels: NDArray[np.uint8], random: np.random.Generator) -> Tensor:
    """A batch as a generator might have made it: JPEG, blur, another light, noise. float[n, 3, 64, 64] in [0, 1]."""
    pixels = pixels.copy()
    for i in np.flatnonzero(random.random(len(pixels)) < 0.2):
        file = io.BytesIO()
        Image.fromarray(pixels[i]).save(file, "JPEG", quality=int(random.integers(40, 95)))
        pixels[i] = np.asarray(Image.open(file))
    x = _to_tensor(pixels)

    def per_picture(low: float, high: float) -> Tensor:
        return torch.from_numpy(random.uniform(low, high, (len(pixels), 1, 1, 1)).astype(np.float32))

    blurred = _blur(x, sigma=float(random.uniform(0.4, 1.1)))  # one width a batch, half of its pictures
    x = torch.where(per_picture(0, 1) < 0.5, blurred, x)
    x = x * per_picture(0.95, 1.05) + per_picture(-0.02, 0.02)
    noise = torch.from_numpy(random.standard_normal(x.shape, dtype=np.float32))
    return (x + per_picture(0.0, 0.05) * noise).clamp(0.0, 1.0).contiguous(memory_format=torch.channels_last)


def _blur(x: Tensor, sigma: float) -> Tensor:
    offsets = torch.arange(-3, 4, dtype=torch.float32)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).repeat(3, 1)
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(F.conv2d(x, weights[:, None, None, :], groups=3), weights[:, None, :, None], groups=3)


def _paths(folder: Path) -> tuple[Path, Path]:
    return folder / "judge.json", folder / "judge.safetensors"


# --- command line ----------------------------------------------------------------------------------------------------


@click.group(help="Make or check the frozen judge of the synthetic catalogs.")
def main() -> None: ...


@main.command("train", help="Render, train and store the judge: about 15 minutes on one core.")
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER, help="Folder for judge.json and its weights.")
@click.option("--renderings", default=Recipe.renderings, show_default=True, type=click.IntRange(1000))
@click.option("--epochs", default=Recipe.epochs, show_default=True, type=click.IntRange(1))
def train_command(out: Path, renderings: int, epochs: int) -> None:
    accuracy = train(Recipe(renderings=renderings, epochs=epochs), out)
    click.echo(_table(accuracy))


@main.command("check", help="Accuracy on fresh renderings, and what is taken for what.")
@click.option("--n", default=1000, show_default=True, type=click.IntRange(100), help="Number of renderings.")
@click.option("--seed", default=CHECK_SEED, show_default=True, help="Their seed.")
@click.option("--size", default=SIZE, show_default=True, help="Their side in pixels.")
def check_command(n: int, seed: int, size: int) -> None:
    accuracy, confusions = check(Judge.load(), n=n, seed=seed, size=size)
    click.echo(_table(accuracy))
    for (name, truth, answer), times in confusions.most_common(20):
        click.echo(f"{times:4d}x {name} {truth} taken for {answer}")


def _table(accuracy: Mapping[str, float]) -> str:
    return "\n".join(f"{name:12s} {share:.4f}" for name, share in accuracy.items())


if __name__ == "__main__":
    main()
