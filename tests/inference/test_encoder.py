from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.recorded import open_recorded, recorded
from support.toy_bundle import DIM, IMAGE_SIZE, TOKENS, make_toy_bundle

from unidiff_sdk.errors import BundleError, ImageError, OptionError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder, cut_text
from unidiff_sdk.inference.preprocessing import preprocess


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy")


@pytest.fixture
def encoder(folder: Path) -> Encoder:
    return Encoder(Bundle.open(folder, threads=1))


def test_encode_texts_returns_unit_vectors_for_any_batch_size(encoder: Encoder) -> None:
    texts = [f"text {i}" for i in range(7)]
    rows = encoder.encode_texts(texts)
    assert rows.shape == (7, DIM) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_texts(texts, batch_size=3), rows, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_texts(texts[5:6])[0], rows[5], atol=1e-6)


def test_single_text_is_encoded_once(folder: Path) -> None:
    encoder = Encoder(open_recorded(folder))
    first, again, other = (encoder.encode_text(text) for text in ("a red dress", "a red dress", "boots"))
    assert recorded(encoder.bundle, "text_encoder").batches == [1, 1]
    np.testing.assert_array_equal(first, encoder.encode_texts(["a red dress"])[0])
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0  # other callers share it
    with pytest.raises(OptionError, match="strings"):
        encoder.encode_text(7)  # type: ignore[arg-type]


def test_encode_images_returns_unit_vectors_for_any_source(encoder: Encoder, tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 30), (200, 30, 90))
    image.save(tmp_path / "image.png")
    sources = [image, np.asarray(image), str(tmp_path / "image.png"), (tmp_path / "image.png").read_bytes()]
    rows = encoder.encode_images(iter(sources), batch_size=3)
    assert rows.shape == (4, DIM) and rows.dtype == np.float32
    np.testing.assert_allclose(rows, np.repeat(rows[:1], 4, axis=0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_encode_images_preprocesses(encoder: Encoder) -> None:
    bundle = encoder.bundle
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 30, 3), dtype=np.uint8))
    pixels = preprocess(image, IMAGE_SIZE, bundle.image_mean, bundle.image_std)
    expected = bundle.session("image_encoder").run({"pixel_values": pixels[None]})["image_embeds"]
    np.testing.assert_allclose(encoder.encode_images([image]), expected / np.linalg.norm(expected), rtol=1e-6)


def test_images_are_padded_for_a_bundle_trained_on_padded_images(tmp_path: Path) -> None:
    image = {"size": IMAGE_SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "fit": "pad"}
    encoder = Encoder(Bundle.open(make_toy_bundle(tmp_path / "padding", image=image)))
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 48, 3), dtype=np.uint8))
    square = Image.new("RGB", (48, 48), "white")
    square.paste(wide, (0, 20))
    np.testing.assert_allclose(*encoder.encode_images([wide, square]), atol=0.02)  # resized before or after padding
    assert not np.allclose(encoder.encode_images([wide]), encoder.encode_images([wide.crop((20, 0, 28, 8))]), atol=0.1)


def test_tokenize_truncates_and_pads_with_the_pad_token(encoder: Encoder) -> None:
    short, long = encoder.tokenize(["ab", "abcdefghijklmnopqrstuvwxyz"])
    vocabulary = json.loads((encoder.bundle.path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    start, end, pad = (vocabulary[token] for token in ("<|startoftext|>", "<|endoftext|>", "!"))
    assert short.dtype == np.int64 and len(short) == len(long) == TOKENS
    assert short.tolist() == [start, vocabulary["a"], vocabulary["b</w>"], end] + [pad] * (TOKENS - 4)
    assert long[0] == start and long[-1] == end and pad not in long


@pytest.mark.parametrize("text", ["ab " * 400_000, "x" * 1_000_000, " " * 1_000_000 + "ab"])
def test_text_of_a_million_characters_is_cut_before_it_is_tokenized(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    lengths: list[int] = []

    class Recorded:
        truncation = encoder._tokenizer.truncation

        def encode_batch(self, texts: list[str]) -> Any:
            lengths.extend(map(len, texts))
            return tokenizer.encode_batch(texts)

    tokenizer = encoder._tokenizer
    whole = [encoding.ids for encoding in tokenizer.encode_batch([text])]
    monkeypatch.setitem(vars(encoder), "_tokenizer", Recorded())
    np.testing.assert_array_equal(encoder.tokenize([text]), whole)
    assert max(lengths) <= 128 * TOKENS


@given(text=st.text(max_size=300), tokens=st.integers(1, 3))
def test_cut_text_keeps_the_start(text: str, tokens: int) -> None:
    cut = cut_text(text, tokens)
    assert cut == text or (len(cut) <= 128 * tokens and " ".join(text.split()).startswith(cut))


def test_empty_lists_return_empty_arrays(encoder: Encoder) -> None:
    assert encoder.encode_texts([]).shape == encoder.encode_images([]).shape == (0, DIM)
    assert encoder.tokenize([]).shape == (0, TOKENS)


@pytest.mark.parametrize("texts", ["a single text", [3], [None], ["fine", b"bytes"]])
def test_encode_texts_refuses_anything_but_a_list_of_texts(encoder: Encoder, texts: object) -> None:
    with pytest.raises(OptionError, match=r"list of texts|must be strings"):
        encoder.encode_texts(texts)  # type: ignore[arg-type]


def test_encode_images_refuses_a_single_image(encoder: Encoder) -> None:
    for single in ("image.png", Path("image.png"), np.zeros((4, 4, 3), np.uint8), Image.new("RGB", (4, 4))):
        with pytest.raises(OptionError, match="put a single one in a list"):
            encoder.encode_images(single)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="no such file"):
        encoder.encode_images(["missing.png"])
    with pytest.raises(OptionError, match="batch_size is 0"):
        encoder.encode_texts(["text"], batch_size=0)


def test_embeddings_that_are_zero_or_not_finite_raise(encoder: Encoder) -> None:
    for bad in (np.nan, np.inf, 0.0):
        with pytest.raises(BundleError, match=r"text encoder .* zero or not finite"):
            encoder._unit_vectors([np.full((1, DIM), bad, np.float32)], "text")


def test_embedding_of_another_dimension_than_the_manifest_states_raises(tmp_path: Path) -> None:
    changed = {"dim": DIM + 1, "shared_text_encoder": True, "max_tokens": TOKENS, "logit_scale": 10.0}
    encoder = Encoder(Bundle.open(make_toy_bundle(tmp_path / "toy", embedding=changed), verify=False))
    with pytest.raises(BundleError, match=r"embeddings of 8 dimensions, but the manifest states 9"):
        encoder.encode_texts(["text"])


def test_damaged_tokenizer_raises(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "toy")
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"pad_token": "[none]"}')
    with pytest.raises(BundleError, match=r"no pad token \('\[none\]'\)"):
        Encoder(Bundle.open(folder, verify=False)).tokenize(["text"])
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="tokenizer cannot be read"):
        Encoder(Bundle.open(folder, verify=False)).tokenize(["text"])
