"""The recipe of the tiny base in miniature: it runs, resumes, and saves a complete checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from unidiff_sdk.datasets.synthetic import CATALOGS, products
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
from unidiff_sdk.training.recipes import tiny, tiny_models


def test_recipe_saves_a_checkpoint_of_the_stated_size_and_resumes(tmp_path: Path) -> None:
    short = {name: replace(stage, steps=2, batch=4, warmup=1) for name, stage in tiny.RECIPE.items()}

    def run(out: str) -> None:
        tiny.train_base(tmp_path / "work", tmp_path / out, stages=short, per_catalog=6)

    run("out")
    saved = load_checkpoint(tmp_path / "out")
    assert saved.shared and saved.meta["synthetic"]
    parameters = sum(p.numel() for m in (saved.unet, saved.vae, saved.clip) for p in m.parameters())
    assert parameters <= 6_000_000

    first = {key: value.clone() for key, value in saved.unet.state_dict().items()}
    run("again")
    for key, value in load_checkpoint(tmp_path / "again").unet.state_dict().items():
        assert torch.equal(value, first[key])  # every stage was complete, so nothing was trained again


def test_texts_match_their_own_images() -> None:
    chosen = [p for name in CATALOGS for p in products(name, 40)]
    texts = tiny.Texts.of_products(chosen)
    n = len(chosen)
    named, images = texts.text_attributes, texts.image_attributes
    assert len(texts.texts) == 2 * n and named.shape == (2 * n, images.shape[1])
    for row in range(2 * n):
        assert ((named[row] == images[row % n]) | (named[row] < 0)).all()  # a text matches its own image
        assert (named[row] >= 0).any()
    assert (named[:n] >= 0).all() and (named[n:] < 0).any()


def test_tokenizer_has_a_token_for_every_character() -> None:
    tokenizer = tiny_models.train_tokenizer(["a red dress", "blue boots"])
    ids = tokenizer("naïve 日本 ☃ dress").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert (
        tokenizer.eos_token_id not in ids[1:-1]
    )  # CLIP pools at the first end token, which an unknown character must not become
