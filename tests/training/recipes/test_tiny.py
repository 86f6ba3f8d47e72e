"""The recipe of the built-in model, in miniature: it runs, goes on where it stopped, and leaves a whole checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from unidiff_sdk.datasets.synthetic import CATALOGS, products
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
from unidiff_sdk.training.recipes import tiny, tiny_models


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "PER_CATALOG", 6)
    short = {name: replace(stage, steps=2, batch=4, warmup=1) for name, stage in tiny.RECIPE.items()}
    monkeypatch.setattr(tiny, "RECIPE", short)


def test_the_recipe_ends_in_a_checkpoint_of_the_stated_size(miniature: None, tmp_path: Path) -> None:
    def run(out: str) -> None:
        arguments = [str(tmp_path / "work"), "-o", str(tmp_path / out)]
        assert CliRunner().invoke(tiny.main, arguments, catch_exceptions=False).exit_code == 0

    run("out")
    made = load_checkpoint(tmp_path / "out")
    assert made.shared and made.meta["synthetic"]
    parameters = sum(p.numel() for m in (made.unet, made.vae, made.clip) for p in m.parameters())
    assert parameters <= 6_000_000

    first = {key: value.clone() for key, value in made.unet.state_dict().items()}
    run("again")
    for key, value in load_checkpoint(tmp_path / "again").unet.state_dict().items():
        assert torch.equal(value, first[key])  # every stage was done: nothing was trained again


def test_texts_suit_the_pictures_that_are_equal_in_what_they_tell() -> None:
    chosen = [p for name in CATALOGS for p in products(name, 40)]
    texts = tiny.Texts.of_products(chosen)
    n = len(chosen)
    assert len(texts.words) == 2 * n and texts.told.shape == (2 * n, texts.shown.shape[1])
    for row in range(2 * n):
        told = texts.told[row]
        assert ((told == texts.shown[row % n]) | (told < 0)).all()  # a text suits its own picture
        assert (told >= 0).any()
    assert (texts.told[:n] >= 0).all() and (texts.told[n:] < 0).any()


def test_no_character_is_unknown_to_the_tokenizer() -> None:
    tokenizer = tiny_models.train_tokenizer(["a red dress", "blue boots"])
    ids = tokenizer("naïve 日本 ☃ dress").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]  # CLIP pools at the first end: an unknown letter must not be one
