"""The frozen judge: a small classifier of the synthetic catalogs' attributes, whose features KID and CMMD use.

The judge has its own recipe (`recipes.judge`), its own data seeds and a recorded hash, and it never learns from a model
under test. So its figures compare across runs and versions. It was trained on the products of
`unidiff_sdk.datasets.synthetic` only; its labels for photographs mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from unidiff_sdk._internal.json_values import read_json
from unidiff_sdk.errors import CheckpointError, OptionError

__all__ = ["FOLDER", "IMAGE_SIZE", "Judge", "JudgeNet", "attribute_accuracy", "judge_files", "to_tensor"]

ImageLike = Image.Image | NDArray[np.uint8] | NDArray[np.floating]

FOLDER = Path(__file__).parent
IMAGE_SIZE = 64  # pixels; every image is resized to it
FEATURES = 128


class JudgeNet(nn.Module):
    """Seven 3x3 convolutions, pooling, 128 features, and a linear head per attribute. Below 250,000 parameters.

    labels: The values of each attribute.
    """

    def __init__(self, labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

        self.trunk = nn.Sequential(
            block(3, 24),  # full resolution first: at 64 px, the lines of a check pattern are two pixels wide
            block(24, 40, stride=2),
            block(40, 40),
            block(40, 64, stride=2),
            block(64, 64),
            block(64, 96, stride=2),
            block(96, 96),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, FEATURES, bias=False),
            # Unit variance on real renderings gives the kernel of KID, (x·y/d + 1)³, features of a known scale.
            nn.BatchNorm1d(FEATURES, affine=False),
        )
        self.sizes = {name: len(values) for name, values in labels.items()}
        self.heads = nn.Linear(FEATURES, sum(self.sizes.values()))  # all heads in one matrix

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features, float[n, 128], and logits, {attribute: float[n, labels]}, of float[n, 3, 64, 64] in [0, 1]."""
        features = self.trunk(pixels * 2.0 - 1.0)
        logits = self.heads(features).split(list(self.sizes.values()), dim=1)
        return features, dict(zip(self.sizes, logits, strict=True))


class Judge:
    """The frozen judge.

    Args:
        net: The network.
        labels: The values of each attribute.
        record: Content of judge.json: recipe, seeds, accuracy and sha256 of the weights.
    """

    def __init__(self, net: JudgeNet, labels: Mapping[str, Sequence[str]], record: Mapping[str, object]) -> None:
        self.labels = {name: tuple(values) for name, values in labels.items()}
        self.record = dict(record)
        self._net = net.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: str | Path = FOLDER) -> Judge:
        """Load judge.json and judge.safetensors. Default: the judge of this package.

        Raises CheckpointError if a file is missing, or if the weights do not have the recorded sha256. Figures of
        another judge do not compare.
        """
        record_path, weights_path = judge_files(Path(folder))
        try:
            record = read_json(record_path, error=OptionError)
            weights = weights_path.read_bytes()
            recorded, labels = record["sha256"], record["labels"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder} holds no usable judge: {error}. Reinstall the package, or train a judge with "
                "`python -m unidiff_sdk.training.recipes.judge train`."
            ) from error
        found = hashlib.sha256(weights).hexdigest()
        if found != recorded:
            raise CheckpointError(
                f"{weights_path} has sha256 {found[:12]}…, but judge.json records {recorded[:12]}…. Figures of a "
                "changed judge do not compare. Restore the original file."
            )
        net = JudgeNet(labels)
        net.load_state_dict(load_tensors(weights))  # copies float16 into float32 parameters
        return cls(net, labels, record)

    def features(self, images: Iterable[ImageLike], *, batch_size: int = 128) -> NDArray[np.float32]:
        """Features for KID, CMMD, diversity and nearest images: float32[n, 128], unit variance on real renderings.

        images: PIL images, uint8[h, w, 3] arrays, or float[h, w, 3] arrays in [0, 1], of any size. Raises OptionError
        for anything else.
        """
        rows = [features.numpy() for features, _ in self._run(images, batch_size)]
        return np.concatenate(rows) if rows else np.zeros((0, FEATURES), np.float32)

    def attributes(self, images: Iterable[ImageLike], *, batch_size: int = 128) -> dict[str, list[str]]:
        """Most likely label of each attribute for each image: {"type": [...], "pattern": [...], ...}.

        The result has every attribute of every catalog. Compare only those that the expected product has, as
        `attribute_accuracy` does. images: as in `features`.
        """
        predicted: dict[str, list[str]] = {name: [] for name in self.labels}
        for _, logits in self._run(images, batch_size):
            for name, values in self.labels.items():
                predicted[name] += [values[i] for i in logits[name].argmax(dim=1).tolist()]
        return predicted

    def _run(self, images: Iterable[ImageLike], batch_size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        stream = iter(images)
        while batch := [_pixels(image) for image in islice(stream, batch_size)]:
            with torch.inference_mode():
                yield self._net(to_tensor(np.stack(batch)))


def attribute_accuracy(
    predicted: Mapping[str, Sequence[str]], expected: Sequence[Mapping[str, str]]
) -> dict[str, float]:
    """Share of correct labels per attribute, over the products that have it, in [0, 1].

    "all" is the share of products with every attribute correct. Attributes that the judge does not have are ignored.

    Args:
        predicted: n labels per attribute, from `Judge.attributes`.
        expected: The attributes of the n products.

    Raises:
        OptionError: The lengths differ, or no attribute can be compared.
    """
    names = [name for name in predicted if any(name in product for product in expected)]
    if not names or any(len(predicted[name]) != len(expected) for name in names):
        raise OptionError(
            f"attribute_accuracy needs a label for each of the {len(expected)} products, in at least one attribute."
        )
    right = {
        name: [predicted[name][i] == product[name] if name in product else None for i, product in enumerate(expected)]
        for name in names
    }
    shares = {name: float(np.mean([hit for hit in hits if hit is not None])) for name, hits in right.items()}
    every = [all(hits[i] is not False for hits in right.values()) for i in range(len(expected))]
    return {**shares, "all": float(np.mean(every))}


def _pixels(image: ImageLike) -> NDArray[np.uint8]:
    """Any image as uint8[64, 64, 3]."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
            raise OptionError(f"The judge needs images of shape [h, w, 3], not {array.shape}.")
        if np.issubdtype(array.dtype, np.floating):
            if not np.isfinite(array).all() or array.min() < 0.0 or array.max() > 1.0:
                raise OptionError("The judge needs float images in [0, 1]. Clip the values first.")
            array = (array * 255.0 + 0.5).astype(np.uint8)
        if array.dtype != np.uint8:
            raise OptionError(f"The judge needs uint8 or float images, not {array.dtype}.")
        image = Image.fromarray(array)
    image = image.convert("RGB")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8[n, 64, 64, 3] -> float[n, 3, 64, 64] in [0, 1], channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255.0


def judge_files(folder: Path) -> tuple[Path, Path]:
    """(record, weights): the two files of a judge."""
    return folder / "judge.json", folder / "judge.safetensors"
