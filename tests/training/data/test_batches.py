"""From catalog folder to batches: the runtime's own pixels, bad rows told, batches that follow from their seed."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.errors import DataError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.data.batches import Batches, group_keys, load_pairs, normalize_caption, tokenize  # noqa: E402
from unidiff_sdk.training.data.latents import encode_latents  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(random_checkpoint)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Two good rows, a truncated picture, a row without a caption."""
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
    picture = Image.open(small_catalog / "7.png")
    expected = checkpoint.image_processor(picture, return_tensors="pt").pixel_values[0]
    ours = JointModel(checkpoint).to_clip(pairs.clip_images[7:8].float() / 255)[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert pairs.payloads[3]["colour"] == "purple" and not pairs.bad


def test_bad_rows_are_passed_over_and_told(checkpoint: Checkpoint, broken: Path) -> None:
    pairs = load_pairs(broken, checkpoint)
    assert pairs.captions == ["a grey thing", "noise"]
    assert [(bad.line, bad.file_name) for bad in pairs.bad] == [(2, "cut.png"), (3, "good.png")]
    assert "caption" in pairs.bad[1].reason


def test_strict_stops_at_the_first_bad_row(checkpoint: Checkpoint, broken: Path) -> None:
    with pytest.raises(DataError, match=r"cut\.png"):
        load_pairs(broken, checkpoint, strict=True)


def test_no_usable_row(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_pairs(tmp_path / "nowhere", checkpoint)
    (tmp_path / "metadata.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="no usable pair"):
        load_pairs(tmp_path, checkpoint)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"gone\.png"):
        load_pairs(tmp_path, checkpoint)


def test_limit(checkpoint: Checkpoint, small_catalog: Path) -> None:
    assert len(load_pairs(small_catalog, checkpoint, limit=3)) == 3


def test_rows_past_the_limit_are_not_told_of(checkpoint: Checkpoint, broken: Path) -> None:
    assert load_pairs(broken, checkpoint, limit=1).bad == []


def test_pictures_that_do_not_fit_in_memory_are_decoded_when_wanted(
    checkpoint: Checkpoint, small_catalog: Path
) -> None:
    pairs = load_pairs(small_catalog, checkpoint)
    streamed = load_pairs(small_catalog, checkpoint, memory=5 * 3 * 32 * 32)
    assert pairs.images.kept is not None and streamed.images.kept is None
    assert streamed.fingerprint() == pairs.fingerprint()
    rows = torch.tensor([11, 3, 3, 0])
    for way in (lambda pictures: pictures, lambda pictures: pictures.mirrored()):
        a, b = way(streamed.clip_images), way(pairs.clip_images)
        assert torch.equal(a[rows], b[rows]) and torch.equal(a[2:4], b[2:4]) and torch.equal(a[12:], b[12:])
        assert [torch.equal(x, y) for x, y in zip(a.split(5), b.split(5), strict=True)] == [True] * 3


def test_shards_give_the_pairs_of_the_folder(checkpoint: Checkpoint, small_catalog: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shop.tar", "w") as tar:
        for number, line in enumerate((small_catalog / "metadata.jsonl").read_text().splitlines()):
            columns = json.loads(line)
            (tmp_path / "columns.json").write_text(line, encoding="utf-8")
            tar.add(small_catalog / columns["file_name"], f"{number:04d}.png")
            tar.add(tmp_path / "columns.json", f"{number:04d}.json")
    from_folder, from_shard = (load_pairs(path, checkpoint) for path in (small_catalog, tmp_path / "shop.tar"))
    assert from_shard.fingerprint() == from_folder.fingerprint()
    assert from_shard.payloads[3]["colour"] == "purple"


def test_padding_shows_what_cropping_cuts_off(checkpoint: Checkpoint, small_catalog: Path) -> None:
    cropped, padded = (load_pairs(small_catalog, checkpoint, fit=fit).images[11:][0] for fit in ("crop", "pad"))
    assert torch.equal(cropped, cropped[:, :1, :1].expand_as(cropped)), "the picture is of one colour"
    assert (padded[:, :, 0] == 255).all() and torch.equal(padded[:, :, 16], cropped[:, :, 16])


def test_fingerprint_follows_the_content(checkpoint: Checkpoint, small_catalog: Path) -> None:
    all_rows, few = load_pairs(small_catalog, checkpoint), load_pairs(small_catalog, checkpoint, limit=3)
    assert all_rows.fingerprint() == load_pairs(small_catalog, checkpoint).fingerprint() != few.fingerprint()


def test_captions_that_mean_the_same(checkpoint: Checkpoint, small_catalog: Path) -> None:
    assert normalize_caption("A red  dress.") == normalize_caption("a red, dress") == "a red dress"
    pairs = load_pairs(small_catalog, checkpoint)
    keys = group_keys(pairs)
    assert keys[0] == keys[11] and len(set(keys)) == 11
    assert len(set(group_keys(pairs, ["colour", "price"]))) == 12
    with pytest.raises(DataError, match="colour, price"):
        group_keys(pairs, ["brand"])


def test_tokens_are_padded_and_cut_like_the_pipelines(checkpoint: Checkpoint) -> None:
    ids = tokenize(checkpoint.tokenizer, ["a red dress", "a red dress " * 30])
    assert ids.shape == (2, 16)
    assert ids[1, -1] == checkpoint.tokenizer.eos_token_id


def batches(checkpoint: Checkpoint, folder: Path, *, size: int, flip: bool = False, seed: int = 0) -> Batches:
    model, pairs = JointModel(checkpoint), load_pairs(folder, checkpoint)
    ids = tokenize(checkpoint.tokenizer, pairs.captions)
    return Batches(model, pairs, ids, group_keys(pairs), size=size, flip=flip, seed=seed)


def test_a_step_gets_the_same_pairs_whenever_it_is_asked(checkpoint: Checkpoint, small_catalog: Path) -> None:
    """By its number and the seed alone, so that a run can go on anywhere; an epoch holds each pair once at most."""
    made = {seed: batches(checkpoint, small_catalog, size=5, flip=True, seed=seed) for seed in (1, 2)}
    choices = {seed: [of.choose(step) for step in range(4)] for seed, of in made.items()}
    assert all(
        torch.equal(made[1].choose(step).rows, choices[1][step].rows)
        and torch.equal(made[1].choose(step).mirror, choices[1][step].mirror)
        for step in (3, 0, 2, 1)
    )
    rows = {seed: [choice.rows.tolist() for choice in of] for seed, of in choices.items()}
    assert rows[1] != rows[2] and rows[1][:2] != rows[1][2:]
    assert len(set(rows[1][0] + rows[1][1])) == 10


def test_small_data_makes_small_batches(checkpoint: Checkpoint, small_catalog: Path) -> None:
    made = batches(checkpoint, small_catalog, size=64)
    batch = made.load(made.choose(0), samples=5)
    assert len(batch) == 12 == len(batch.clip_pixels) and len(batch.latents) == 5


def test_mirrored_pictures_have_their_own_latents(checkpoint: Checkpoint, small_catalog: Path) -> None:
    made = batches(checkpoint, small_catalog, size=12, flip=True)
    assert made.mirrored is not None
    pairs = load_pairs(small_catalog, checkpoint)
    torch.testing.assert_close(made.mirrored, encode_latents(made.model, pairs.images.mirrored()))
