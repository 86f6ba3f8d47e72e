"""Aspect-ratio buckets: the bucket of each image, batches of one size, and what the models receive of them."""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the train extra")

from support.training_step import prepare_step  # noqa: E402

from unidiff_sdk.errors import OptionError, TrainingError  # noqa: E402
from unidiff_sdk.training import TrainingConfig, train  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.data.buckets import BucketBatches, bucket_sizes, nearest_bucket  # noqa: E402
from unidiff_sdk.training.data.fitted_images import fit_to, size_conditions  # noqa: E402
from unidiff_sdk.training.data.latents import LatentCache, encode_latents  # noqa: E402
from unidiff_sdk.training.data.pairs import load_pairs  # noqa: E402
from unidiff_sdk.training.loop.trainer import _require_shares, _warn_about_lone_images  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.runtime.processes import Processes  # noqa: E402

MODELS = st.sampled_from([(64, 8), (512, 64), (768, 64), (1024, 32), (1024, 64), (32, 4)])
SIDES = st.integers(1, 4000)
SHAPES = ((40, 40), (80, 40), (42, 40), (60, 40))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen images of noise: seven wide, six about square. One is high, alone in its bucket."""
    folder = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(0)
    sizes = [SHAPES[i % 4] for i in range(12)] + [(300, 40), (40, 80)]
    colors = ("red", "green", "blue", "purple", "yellow", "teal", "black", "white", "orange", "brown", "pink", "grey")
    lines = []
    for i, (width, height) in enumerate(sizes):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {colors[i % 12]} thing {i // 12}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(random_checkpoint)


# --- sizes -----------------------------------------------------------------------------------------------------------


@given(MODELS)
def test_buckets_need_no_more_memory_than_the_square(model: tuple[int, int]) -> None:
    side, block = model
    sizes = bucket_sizes(side, block)
    assert (side, side) in sizes and set(sizes) == {(height, width) for width, height in sizes}
    assert len({width / height for width, height in sizes}) == len(sizes)
    for width, height in sizes:
        assert width % block == height % block == 0 or width == height == side
        assert side * side * 0.7 < width * height <= side * side
        assert max(width, height) <= 2 * min(width, height)


def test_buckets_of_sdxl_hold_the_sizes_that_it_was_trained_at() -> None:
    """Some of Podell et al. 2023, appendix I, (height, width) there."""
    published = {(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1344), (704, 1408)}
    assert published <= {(height, width) for width, height in bucket_sizes(1024, 32)}


@given(MODELS, SIDES, SIDES)
def test_every_image_is_in_the_bucket_of_the_nearest_aspect_ratio(
    model: tuple[int, int], width: int, height: int
) -> None:
    sizes = bucket_sizes(*model)
    chosen = nearest_bucket((width, height), sizes)
    distances = {size: abs(math.log(width * size[1] / (height * size[0]))) for size in sizes}
    assert chosen in sizes and distances[chosen] <= min(distances.values()) + 1e-12


@pytest.mark.parametrize("model", [(64, 8), (512, 64), (1024, 32)], ids=str)
def test_border_between_two_buckets_is_the_geometric_mean_of_their_ratios(model: tuple[int, int]) -> None:
    sizes = bucket_sizes(*model)
    for wide, narrow in pairwise(sizes):
        border = math.sqrt(wide[0] / wide[1] * narrow[0] / narrow[1])
        assert nearest_bucket((round(1_000_000 * border * 1.0001), 1_000_000), sizes) == wide
        assert nearest_bucket((round(1_000_000 * border / 1.0001), 1_000_000), sizes) == narrow


# --- batches ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(1, 12), st.integers(0, 99), st.integers(0, 5))
def test_each_epoch_passes_over_each_pair_once_in_batches_of_one_bucket(
    counts: list[int], size: int, seed: int, epoch: int
) -> None:
    rows = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).split(counts)
    batches = BucketBatches(rows, size, seed)
    steps = range(epoch * batches.batches_per_epoch, (epoch + 1) * batches.batches_per_epoch)
    found = [batches.rows(step).tolist() for step in steps]
    assert sorted(row for batch in found for row in batch) == list(range(sum(counts)))
    buckets = [set(bucket.tolist()) for bucket in rows]
    for batch in found:
        assert batches.smallest <= len(batch) <= size and any(set(batch) <= bucket for bucket in buckets)
    assert [BucketBatches(rows, size, seed).rows(step).tolist() for step in reversed(steps)] == found[::-1]


def test_epochs_and_seeds_have_other_orders() -> None:
    rows = torch.arange(40).split([15, 25])
    orders = [
        [BucketBatches(rows, 5, seed).rows(step).tolist() for step in range(start, start + 8)]
        for seed, start in ((0, 0), (0, 8), (1, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


# --- images ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.tuples(st.integers(8, 200), st.integers(8, 200)), st.sampled_from([(48, 32), (32, 48), (40, 32), (64, 64)]))
def test_images_are_resized_and_cropped_as_their_sizes_say(original: tuple[int, int], size: tuple[int, int]) -> None:
    """The crop that the sizes describe, made by hand, is the image."""
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (*original[::-1], 3), dtype=np.uint8))
    height, width, top, left, crop_height, crop_width = size_conditions(original, size, "crop")
    assert ((width, height), (crop_width, crop_height)) == (original, size)
    scale = max(size[0] / width, size[1] / height)
    resized = [max(int(width * scale + 1e-9), size[0]), max(int(height * scale + 1e-9), size[1])]
    assert [(edge - part) // 2 for edge, part in zip(resized, size, strict=True)] == [left, top]
    expected = image.resize(tuple(resized), Image.Resampling.BICUBIC)
    expected = expected.crop((left, top, left + size[0], top + size[1]))
    made = fit_to(image, size, "crop")
    assert made.dtype == torch.uint8 and np.array_equal(made.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_pairs_are_in_the_bucket_of_their_image(checkpoint: Checkpoint, shapes: Path) -> None:
    pairs = load_pairs(shapes, checkpoint, aspect_buckets=True)
    sizes = bucket_sizes(checkpoint.image_size, checkpoint.block)
    assert checkpoint.block == 4 and len(pairs.buckets) > 2
    for bucket in pairs.buckets:
        width, height = bucket.images.size
        assert bucket.images[:].shape == (len(bucket.rows), 3, height, width)
        for row in bucket.rows.tolist():
            assert Image.open(shapes / f"{row}.png").size == pairs.original_sizes[row]
            assert nearest_bucket(pairs.original_sizes[row], sizes) == (width, height)
    assert pairs.describe(shapes)["buckets"] == {
        f"{bucket.images.size[0]} x {bucket.images.size[1]}": len(bucket.rows) for bucket in pairs.buckets
    }
    squares = load_pairs(shapes, checkpoint)
    assert torch.equal(pairs.clip_images[:], squares.clip_images[:]) and "buckets" not in squares.describe(shapes)


def test_cache_tells_sizes_apart(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Images of one color have the same bytes at both sizes."""
    model = JointModel(checkpoint)
    cache = LatentCache(tmp_path, model)
    for name, size in (("wide", (80, 40)), ("high", (40, 80))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size, "red").save(tmp_path / name / "a.png")
        (tmp_path / name / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}', encoding="utf-8")
        (bucket,) = load_pairs(tmp_path / name, checkpoint, aspect_buckets=True).buckets
        latents = encode_latents(model, bucket.images, cache)
        assert latents.shape[2:] == tuple(side // 2 for side in bucket.images.size[::-1])
        assert torch.equal(encode_latents(model, bucket.images, cache), latents)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


# --- steps -----------------------------------------------------------------------------------------------------------


TERMS: dict[str, Any] = {
    "lambda_itc": 1.0,
    "lambda_rsc_encoder": 0.3,
    "lambda_rsc_generator": 0.2,
    "lambda_rsc_reward": 0.2,
    "rsc_warmup_steps": 0,
    "rsc_reward_steps": 2,
}


def test_all_terms_train_on_batches_of_every_bucket(random_checkpoint: Path, shapes: Path) -> None:
    config = TrainingConfig(**TERMS, batch_size=4, micro_batch=2, flip=True, aspect_buckets=True)
    step = prepare_step(random_checkpoint, shapes, config)
    assert step.batches.buckets
    seen = {}
    for number in range(step.batches.buckets.batches_per_epoch):
        indices = step.batches.indices(number)
        batch = step.batches.load(indices, len(indices))
        seen[tuple(batch.latents.shape[2:])] = len(indices)
        assert batch.sizes is not None
        assert batch.sizes[:, 4:].tolist() == [[2 * side for side in batch.latents.shape[2:]]] * len(indices)
        assert batch.clip_pixels.shape[2:] == (32, 32)
        step.model.zero_grad(set_to_none=True)
        found, values = step.backpropagate(number)
        assert all(map(math.isfinite, values.values()))
        assert all(gradient.isfinite().all() for gradient in found.values())
    assert len(seen) > 2 and min(seen.values()) == 1


def test_estimates_are_cropped_for_clip_as_the_images_are(checkpoint: Checkpoint) -> None:
    model = JointModel(checkpoint)
    pixels = torch.rand(2, 3, 32, 48)
    assert torch.equal(model.to_clip(pixels), model.to_clip(pixels[..., 8:40]))
    assert torch.equal(model.to_clip(pixels.mT), model.to_clip(pixels.mT[..., 8:40, :]))


@pytest.mark.filterwarnings("ignore:.*aspect-ratio bucket of 1")
def test_resumed_run_is_bit_equal(random_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    config = TrainingConfig(steps=5, batch_size=4, save_every=3, aspect_buckets=True)
    train(shapes, random_checkpoint, tmp_path / "whole", config, device="cpu")

    def interrupt(report: Any) -> None:
        if report.step == 3:
            os.kill(os.getpid(), 2)

    with pytest.raises(KeyboardInterrupt):
        train(shapes, random_checkpoint, tmp_path / "parts", config, device="cpu", on_step=interrupt)
    train(shapes, random_checkpoint, tmp_path / "parts", config, device="cpu", resume=True)
    a, b = (load_checkpoint(tmp_path / name).unet.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    meta = json.loads((tmp_path / "whole" / "unidiff.json").read_text(encoding="utf-8"))
    assert sum(meta["data"]["buckets"].values()) == 14 and meta["config"]["aspect_buckets"]


def test_images_alone_in_their_bucket_are_reported(random_checkpoint: Path, shapes: Path) -> None:
    config = TrainingConfig(batch_size=4, aspect_buckets=True)
    batches = prepare_step(random_checkpoint, shapes, config).batches
    with pytest.warns(UserWarning, match="bucket of 1 of the 14 images"):
        _warn_about_lone_images(batches, shapes)
    _require_shares(batches, shapes, Processes(0, 1, torch.device("cpu")))
    with pytest.raises(TrainingError, match="smallest batch of a bucket has 1 pairs, but each of the 2 processes"):
        _require_shares(batches, shapes, Processes(0, 2, torch.device("cpu")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "pad"}, 'fit cannot be "pad"'),
        ({"hard_negatives": 2}, "exclude each other"),
    ],
)
def test_options_that_contradict_buckets_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainingConfig(aspect_buckets=True, **options)


def test_buckets_without_images_are_refused() -> None:
    config = TrainingConfig(aspect_buckets=True, lambda_is=0.0)
    assert "no term denoises images" in str(config.without_effect(prior=False, validation=False))


def test_base_of_padded_squares_is_refused(checkpoint: Checkpoint, shapes: Path) -> None:
    from dataclasses import replace

    padded = replace(checkpoint, meta=checkpoint.meta | {"fit": "pad"})
    with pytest.raises(OptionError, match="trained on padded squares"):
        load_pairs(shapes, padded, aspect_buckets=True)
    assert load_pairs(shapes, padded, fit="crop", aspect_buckets=True, limit=2)
