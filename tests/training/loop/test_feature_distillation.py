"""Feature distillation: its value, the weights that it trains, and its effect on a run."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

import torch.nn.functional as F  # noqa: E402
from support.training_step import TrainingStep, prepare_step  # noqa: E402
from transformers import CLIPModel  # noqa: E402

from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402

PLAIN = {"caption_dropout": 0.0, "min_snr_gamma": 0.0, "batch_size": 9}


def disturbed_step(base: Path, data: Path, **settings: object) -> TrainingStep:
    """A step whose CLIP differs from the base's."""
    return prepare_step(base, data, TrainingConfig(**(PLAIN | settings)), disturbed=True)


@pytest.mark.parametrize("flip", [False, True])
def test_value_is_the_distance_of_transformers_embeddings(
    small_catalog: Path, random_checkpoint: Path, flip: bool
) -> None:
    step = disturbed_step(random_checkpoint, small_catalog, lambda_feature_distillation=0.3, flip=flip)
    _, values = step.backpropagate()
    indices = step.batches.indices(0)
    assert indices.mirror.any() == flip
    batch = step.batches.load(indices, 9)
    base = CLIPModel.from_pretrained(random_checkpoint / "clip").eval()
    with torch.no_grad():
        a, b = (clip(input_ids=batch.input_ids, pixel_values=batch.clip_pixels) for clip in (base, step.model.clip))
    images = 1 - F.cosine_similarity(a.image_embeds, b.image_embeds).mean()
    texts = 1 - F.cosine_similarity(a.text_embeds, b.text_embeds).mean()
    assert values["feature_distillation"] == pytest.approx(float(images + texts) / 2, rel=1e-3)
    assert values["feature_distillation"] > 1e-3


def test_value_at_the_base_is_zero(small_catalog: Path, random_checkpoint: Path) -> None:
    config = TrainingConfig(**PLAIN, lambda_feature_distillation=1.0)
    _, values = prepare_step(random_checkpoint, small_catalog, config).backpropagate()
    assert values["feature_distillation"] == pytest.approx(0, abs=1e-6)


def test_only_the_towers_are_trained(small_catalog: Path, random_checkpoint: Path) -> None:
    """By its contribution to the gradients of a step, which is the same with micro-batches."""
    without, _ = disturbed_step(random_checkpoint, small_catalog).backpropagate()
    weight = {"lambda_feature_distillation": 2.0}
    whole, _ = disturbed_step(random_checkpoint, small_catalog, **weight).backpropagate()
    micro, _ = disturbed_step(random_checkpoint, small_catalog, **weight, micro_batch=4).backpropagate()
    trained = {name for name in whole if not torch.allclose(whole[name], without[name], atol=1e-6)}
    towers = ("clip.text_model", "clip.vision_model", "clip.text_projection", "clip.visual_projection", "text_encoder")
    assert {prefix for prefix in towers for name in trained if name.startswith(prefix)} >= set(towers[:4])
    assert all(name.startswith((*towers, "f.")) for name in trained)
    for name in whole:
        torch.testing.assert_close(micro[name], whole[name], atol=1e-5, rtol=1e-4, msg=name)


def test_text_tower_alone_is_trained_without_the_contrastive_term(small_catalog: Path, random_checkpoint: Path) -> None:
    settings = {"lambda_itc": 0.0, "lambda_feature_distillation": 1.0, "micro_batch": 4}
    gradients, values = disturbed_step(random_checkpoint, small_catalog, **settings).backpropagate()
    assert set(values) == {"is", "feature_distillation"} and gradients["clip.text_projection.weight"].abs().sum() > 0
    assert not any(name.startswith("clip.vis") for name in gradients)


def test_embeddings_stay_closer_to_the_base(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    few = {"steps": 8, "batch_size": 5, "warmup_steps": 0, "learning_rate": 3e-3, "ema_decay": 0.0}
    drift = {}
    for weight in (0.0, 30.0):
        config = TrainingConfig(**few, lambda_feature_distillation=weight)
        out = train(small_catalog, random_checkpoint, tmp_path / f"{weight}", config, device="cpu").path
        ids = torch.tensor(load_checkpoint(out).tokenizer(["a red dress", "a blue dress"]).input_ids)
        base, tuned = (CLIPModel.from_pretrained(path / "clip") for path in (random_checkpoint, out))
        with torch.no_grad():
            a, b = (clip.get_text_features(input_ids=ids) for clip in (base, tuned))
        a, b = (getattr(output, "pooler_output", output) for output in (a, b))
        drift[weight] = 1 - float(F.cosine_similarity(a, b).mean())
    assert drift[30.0] < 0.5 * drift[0.0]
