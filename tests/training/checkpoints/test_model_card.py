"""Model cards: front matter that the Hugging Face hub reads, and the facts of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from huggingface_hub import ModelCard  # noqa: E402

from unidiff_sdk.errors import CheckpointError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import TINY, load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.model_card import add_evaluation, model_card  # noqa: E402
from unidiff_sdk.training.checkpoints.saving import save_checkpoint  # noqa: E402
from unidiff_sdk.training.config import DistillationConfig, TrainingConfig  # noqa: E402
from unidiff_sdk.training.loop.distiller import distill  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.runtime.callbacks import ValidationResult  # noqa: E402

TRAINED = {
    "name": "shop",
    "base": "some/model",
    "base_model": ["some/model", "some/clip"],
    "captions": ["a red dress"],
    "step": 400,
    "config": asdict(TrainingConfig(lambda_feature_distillation=0.5, learning_rate_unet=1e-5)),
    "data": {"name": "products", "pairs": 1200, "invalid_rows": 3, "columns": ["price", "type"], "sha256": "0"},
}


def test_card_of_a_training_run(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    def validate(snapshot) -> ValidationResult:
        return ValidationResult(0.25, {"mean_recall": 0.25, "denoising_loss": 1.5}, "products-val")

    config = TrainingConfig(steps=2, batch_size=4, warmup_steps=0, seed=7)
    out = train(small_catalog, random_checkpoint, tmp_path / "shop", config, on_validate=validate, device="cpu").path
    card = ModelCard.load(out / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert card.data.license is None and card.data.base_model is None, "neither is known"
    text = card.text
    assert "# shop" in text and "from the base random" in text
    assert f"`{small_catalog.name}`: 12 image-caption pairs." in text and "Columns: `colour`, `price`." in text
    assert "| ITC: image-text contrast | 1.0 |" in text and "RSC" not in text, "only active terms"
    assert "| optimizer steps | 2 |" in text and "| seed | 7 |" in text
    assert "Validation on `products-val` after step 2:" in text and "| denoising loss | 1.5 |" in text
    assert 'from_pretrained("CHECKPOINT/clip")' in text and "unidiff-export CHECKPOINT" in text
    assert load_checkpoint(out).meta["validation"]["figures"]["mean_recall"] == 0.25


def test_card_of_a_distillation_run(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    few = {"student_steps": 2, "teacher_steps": 4, "trajectories": 4, "steps": 1, "batch_size": 2, "warmup_steps": 0}
    distill(random_checkpoint, small_catalog, tmp_path / "fast", DistillationConfig(**few), device="cpu")
    text = (tmp_path / "fast" / "README.md").read_text(encoding="utf-8")
    assert "distilled from random: it generates in 2 denoising steps" in text
    assert "num_inference_steps=2, guidance_scale=1.0" in text and "12 captions" in text
    assert "rendered synthetic products only" in text


def test_card_states_base_models_terms_and_skipped_rows() -> None:
    card = ModelCard(model_card(TRAINED))
    assert card.data.base_model == ["some/model", "some/clip"]
    assert "`products`: 1,200 image-caption pairs; 3 invalid rows were skipped." in card.text
    assert "| Feature distillation: CLIP embeddings stay close to the base's | 0.5 |" in card.text
    assert "| peak learning rate, UNet | 1e-05 |" in card.text and "text side" not in card.text
    assert "synthetic" not in card.text and "Results" not in card.text


def test_card_reads_settings_of_earlier_versions() -> None:
    config = dict(TRAINED["config"])
    config["lambda_leash"] = config.pop("lambda_feature_distillation")
    assert model_card(TRAINED | {"config": config}) == model_card(TRAINED)


def test_card_of_the_tiny_base_states_its_recipe_and_published_figures() -> None:
    card = ModelCard.load(TINY / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    for stage in load_checkpoint("tiny").meta["recipe"].values():
        assert f"| {stage['steps']} | {stage['batch']} | {stage['lr']} |" in card.text
    published = (Path(__file__).parents[3] / "docs" / "results" / "quality.md").read_text(encoding="utf-8")
    figures = [line for line in card.text.splitlines() if line.startswith("| `")]
    assert len(figures) == 3 and all(line in published for line in figures)


def test_evaluation_is_added_to_metadata_and_card(random_checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(random_checkpoint)
    out = save_checkpoint(tmp_path / "shop", **loaded.parts(), meta=TRAINED)
    figures = {"data": {"name": "products-test", "pairs": 60}, "retrieval": {"text_to_image": {"R@1": 0.75}}}
    add_evaluation(out, figures)
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "Evaluation on `products-test` (60 pairs):" in text and "| retrieval, text to image, R@1 | 0.75 |" in text
    assert load_checkpoint(out).meta["evaluation"] == figures and load_checkpoint(out).meta["name"] == "shop"
    with pytest.raises(CheckpointError, match=r"unidiff\.json"):
        add_evaluation(tmp_path, figures)
