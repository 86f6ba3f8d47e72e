"""From a catalog to batches: the runtime's preprocessing, invalid rows, and batches that follow from the seed."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.errors import DataError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.data.batches import BatchLoader  # noqa: E402
from unidiff_sdk.training.data.captions import group_keys, normalize_caption, tokenize  # noqa: E402
from unidiff_sdk.training.data.latents import encode_latents  # noqa: E402
from unidiff_sdk.training.data.pairs import load_pairs  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(random_checkpoint)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Two valid rows, a truncated image, and a row without a caption."""
    good = Image.effect_noise((64, 64), 50).convert("RGB")
    good.save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:500])
    rows = [("good.png", "a grey thing"), ("cut.png", "cut"), ("good.png", ""), ("good.png", "noise")]
    lines = (json.dumps({"file_name": name, "text": text}) for name, text in rows)
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_pixels_are_those_of_the_image_processor(checkpoint: Checkpoint, small_catalog: Path) -> None:
    pairs = load_pairs(small_catalog, checkpoint)
    assert pairs.images[:].dtype == torch.uint8 and pairs.images[:].shape == (12, 3, 32, 32)
    image = Image.open(small_catalog / "7.png")
    expected = checkpoint.image_processor(image, return_tensors="pt").pixel_values[0]
    ours = JointModel(checkpoint).to_clip(pairs.clip_images[7:8].float() / 255)[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert pairs.payloads[3]["colour"] == "purple" and not pairs.invalid_rows


def test_invalid_rows_are_skipped_and_reported(checkpoint: Checkpoint, broken: Path) -> None:
    pairs = load_pairs(broken, checkpoint)
    assert pairs.captions == ["a grey thing", "noise"]
    assert [(row.line, row.file_name) for row in pairs.invalid_rows] == [(2, "cut.png"), (3, "good.png")]
    assert "caption" in pairs.invalid_rows[1].reason


def test_strict_raises_for_the_first_invalid_row(checkpoint: Checkpoint, broken: Path) -> None:
    with pytest.raises(DataError, match=r"cut\.png"):
        load_pairs(broken, checkpoint, strict=True)


def test_catalog_without_valid_rows_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_pairs(tmp_path / "nowhere", checkpoint)
    (tmp_path / "metadata.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="no valid image-caption pair"):
        load_pairs(tmp_path, checkpoint)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"gone\.png"):
        load_pairs(tmp_path, checkpoint)


def test_limit_reads_the_first_pairs(checkpoint: Checkpoint, small_catalog: Path) -> None:
    assert len(load_pairs(small_catalog, checkpoint, limit=3)) == 3


def test_invalid_rows_after_the_limit_are_not_reported(checkpoint: Checkpoint, broken: Path) -> None:
    assert load_pairs(broken, checkpoint, limit=1).invalid_rows == []


def test_images_that_do_not_fit_in_memory_are_decoded_at_each_access(
    checkpoint: Checkpoint, small_catalog: Path
) -> None:
    pairs = load_pairs(small_catalog, checkpoint)
    streamed = load_pairs(small_catalog, checkpoint, memory_limit=5 * 3 * 32 * 32)
    assert pairs.images.decoded is not None and streamed.images.decoded is None
    assert streamed.sha256 == pairs.sha256
    rows = torch.tensor([11, 3, 3, 0])
    for view in (lambda images: images, lambda images: images.mirrored()):
        a, b = view(streamed.clip_images), view(pairs.clip_images)
        assert torch.equal(a[rows], b[rows]) and torch.equal(a[2:4], b[2:4]) and torch.equal(a[12:], b[12:])
        assert [torch.equal(x, y) for x, y in zip(a.split(5), b.split(5), strict=True)] == [True] * 3


def test_shards_give_the_same_pairs_as_the_folder(checkpoint: Checkpoint, small_catalog: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shop.tar", "w") as tar:
        for number, line in enumerate((small_catalog / "metadata.jsonl").read_text().splitlines()):
            columns = json.loads(line)
            (tmp_path / "columns.json").write_text(line, encoding="utf-8")
            tar.add(small_catalog / columns["file_name"], f"{number:04d}.png")
            tar.add(tmp_path / "columns.json", f"{number:04d}.json")
    from_folder, from_shard = (load_pairs(path, checkpoint) for path in (small_catalog, tmp_path / "shop.tar"))
    assert from_shard.sha256 == from_folder.sha256
    assert from_shard.payloads[3]["colour"] == "purple"


def test_padding_keeps_what_cropping_removes(checkpoint: Checkpoint, small_catalog: Path) -> None:
    cropped, padded = (load_pairs(small_catalog, checkpoint, fit=fit).images[11:][0] for fit in ("crop", "pad"))
    assert torch.equal(cropped, cropped[:, :1, :1].expand_as(cropped)), "the image is of one colour"
    assert (padded[:, :, 0] == 255).all() and torch.equal(padded[:, :, 16], cropped[:, :, 16])


def test_digest_depends_on_the_content(checkpoint: Checkpoint, small_catalog: Path) -> None:
    all_rows, few = load_pairs(small_catalog, checkpoint), load_pairs(small_catalog, checkpoint, limit=3)
    assert all_rows.sha256 == load_pairs(small_catalog, checkpoint).sha256 != few.sha256


def test_group_keys_by_caption_and_by_columns(checkpoint: Checkpoint, small_catalog: Path) -> None:
    assert normalize_caption("A red  dress.") == normalize_caption("a red, dress") == "a red dress"
    pairs = load_pairs(small_catalog, checkpoint)
    keys = group_keys(pairs)
    assert keys[0] == keys[11] and len(set(keys)) == 11
    assert len(set(group_keys(pairs, ["colour", "price"]))) == 12
    with pytest.raises(DataError, match="colour, price"):
        group_keys(pairs, ["brand"])


def test_tokens_are_padded_and_truncated_as_in_the_pipeline(checkpoint: Checkpoint) -> None:
    ids = tokenize(checkpoint.tokenizer, ["a red dress", "a red dress " * 30])
    assert ids.shape == (2, 16)
    assert ids[1, -1] == checkpoint.tokenizer.eos_token_id


def batches(checkpoint: Checkpoint, folder: Path, *, size: int, flip: bool = False, seed: int = 0) -> BatchLoader:
    model, pairs = JointModel(checkpoint), load_pairs(folder, checkpoint)
    ids = tokenize(checkpoint.tokenizer, pairs.captions)
    return BatchLoader(model, pairs, ids, group_keys(pairs), size=size, flip=flip, seed=seed)


def test_batch_of_a_step_follows_from_its_number_and_the_seed(checkpoint: Checkpoint, small_catalog: Path) -> None:
    """So a run can resume at any step. An epoch holds each pair at most once."""
    made = {seed: batches(checkpoint, small_catalog, size=5, flip=True, seed=seed) for seed in (1, 2)}
    choices = {seed: [of.indices(step) for step in range(4)] for seed, of in made.items()}
    assert all(
        torch.equal(made[1].indices(step).rows, choices[1][step].rows)
        and torch.equal(made[1].indices(step).mirror, choices[1][step].mirror)
        for step in (3, 0, 2, 1)
    )
    rows = {seed: [choice.rows.tolist() for choice in of] for seed, of in choices.items()}
    assert rows[1] != rows[2] and rows[1][:2] != rows[1][2:]
    assert len(set(rows[1][0] + rows[1][1])) == 10


def test_batch_is_smaller_if_the_data_has_fewer_pairs(checkpoint: Checkpoint, small_catalog: Path) -> None:
    made = batches(checkpoint, small_catalog, size=64)
    batch = made.load(made.indices(0), samples=5)
    assert len(batch) == 12 == len(batch.clip_pixels) and len(batch.latents) == 5


def test_mirrored_images_have_their_own_latents(checkpoint: Checkpoint, small_catalog: Path) -> None:
    made = batches(checkpoint, small_catalog, size=12, flip=True)
    (mirrored,) = made.mirrored
    pairs = load_pairs(small_catalog, checkpoint)
    torch.testing.assert_close(mirrored, encode_latents(made.model, pairs.images.mirrored()))
