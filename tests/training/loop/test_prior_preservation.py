"""Prior preservation: the gradients of prior pairs, generated priors, and resumed runs with a prior."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

import torch.nn.functional as F  # noqa: E402
from diffusers import DDIMScheduler  # noqa: E402
from PIL import Image  # noqa: E402
from support.training_step import prepare_step  # noqa: E402
from transformers import CLIPModel  # noqa: E402

from unidiff_sdk.errors import DataError, OptionError, TrainingError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import PriorConfig, TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.pairs import load_pairs  # noqa: E402
from unidiff_sdk.training.evaluation.validation import generate_by_own_sampler  # noqa: E402
from unidiff_sdk.training.loop.prior_preservation import generate_prior  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.objective.batch import RandomInputs  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.runtime.randomness import Purpose, derive_seed, seeded_generator  # noqa: E402

FEW = {"steps": 3, "batch_size": 5, "warmup_steps": 0, "learning_rate": 3e-3}
PLAIN = {"caption_dropout": 0.0, "min_snr_gamma": 0.0, "batch_size": 5}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return JointModel(load_checkpoint(path)).state_dict()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def noise_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven prior pairs that are unlike the catalog's."""
    folder = tmp_path_factory.mktemp("prior")
    rows = []
    for number in range(7):
        Image.effect_noise((40, 40), 20 + 10 * number).convert("RGB").save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"noise, {number} of seven"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("micro", [0, 2])
def test_prior_adds_the_denoising_gradient_of_its_pairs(
    small_catalog: Path, random_checkpoint: Path, noise_images: Path, micro: int
) -> None:
    """DreamBooth's sum. The prior's part comes from diffusers' scheduler and a plain mean squared error."""
    settings = PLAIN | {"prior_batch": 4, "lambda_prior": 0.7, "lambda_is": 1.5, "micro_batch": micro}
    config = TrainingConfig(**settings)
    alone, _ = prepare_step(random_checkpoint, small_catalog, config).backpropagate()
    step = prepare_step(random_checkpoint, small_catalog, config, prior=noise_images)
    both, values = step.backpropagate()

    checkpoint = load_checkpoint(random_checkpoint)
    scheduler = DDIMScheduler.from_config(checkpoint.scheduler.config)
    batch = step.prior.load(step.prior.indices(0), 4)
    generator = seeded_generator(step.prior.seed, Purpose.NOISE, 0)
    random = RandomInputs.sample(generator, 4, step.model.latent_shape, len(step.model.timesteps), config, pairs=4)
    noisy = scheduler.add_noise(batch.latents, random.noise, random.t)
    output = checkpoint.unet(noisy, random.t, checkpoint.text_encoder(batch.input_ids).last_hidden_state).sample
    loss = F.mse_loss(output, random.noise)
    loss.backward()
    assert values["prior"] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in checkpoint.unet.named_parameters():
        expected = alone[f"unet.{name}"] + 0.7 * 1.5 * parameter.grad
        torch.testing.assert_close(both[f"unet.{name}"], expected, atol=1e-5, rtol=1e-3, msg=name)
    text = {name: p.grad for name, p in checkpoint.clip.named_parameters() if p.grad is not None}
    assert text and all(name.startswith("text_model.") for name in text)
    for name, gradient in text.items():
        expected = alone[f"clip.{name}"] + 0.7 * 1.5 * gradient
        torch.testing.assert_close(both[f"clip.{name}"], expected, atol=1e-5, rtol=1e-3, msg=name)


def test_feature_distillation_applies_to_the_prior(
    small_catalog: Path, random_checkpoint: Path, noise_images: Path
) -> None:
    config = TrainingConfig(**PLAIN, prior_batch=7, lambda_feature_distillation=0.5, lambda_is=0.0)
    step = prepare_step(random_checkpoint, small_catalog, config, prior=noise_images, disturbed=True)
    _, values = step.backpropagate()
    batch = step.prior.load(step.prior.indices(0), 7)
    base = CLIPModel.from_pretrained(random_checkpoint / "clip").eval()
    with torch.no_grad():
        a, b = (clip(input_ids=batch.input_ids, pixel_values=batch.clip_pixels) for clip in (base, step.model.clip))
    images = F.cosine_similarity(a.image_embeds, b.image_embeds)
    texts = F.cosine_similarity(a.text_embeds, b.text_embeds)
    expected = 1 - float((images + texts).mean()) / 2
    assert set(values) == {"itc", "feature_distillation", "prior_feature_distillation"}
    assert values["prior_feature_distillation"] == pytest.approx(expected, rel=1e-3)


def test_run_with_prior_and_feature_distillation_resumes_bit_for_bit(
    small_catalog: Path, random_checkpoint: Path, noise_images: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(**FEW, lambda_feature_distillation=0.5, prior_batch=3, flip=True)

    def interrupt(report) -> None:
        assert {"feature_distillation", "prior", "prior_feature_distillation"} <= set(report.losses)
        if report.step == 2:
            raise KeyboardInterrupt

    def run(name: str, folder: Path = noise_images, **options: object):
        prior = PriorConfig(folder)
        return train(small_catalog, random_checkpoint, tmp_path / name, config, device="cpu", prior=prior, **options)

    with pytest.raises(KeyboardInterrupt):
        run("parts", on_step=interrupt)
    with pytest.raises(TrainingError, match="has prior"):
        run("parts", small_catalog, resume=True)
    run("parts", resume=True)
    run("whole")
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    other = replace(config, lambda_feature_distillation=0.0, prior_batch=0)
    train(small_catalog, random_checkpoint, tmp_path / "without", other, device="cpu")
    assert not equal(weights(tmp_path / "without"), weights(tmp_path / "whole"))


def test_generated_prior_comes_from_the_base_and_is_completed_after_an_interrupt(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    model = JointModel(checkpoint).train()
    prior = PriorConfig(tmp_path / "generated", ("a coat", "a mug"), pairs=20)
    generate_prior(prior, model, checkpoint, seed=3)
    assert model.training
    pairs = load_pairs(prior.folder, checkpoint)
    assert pairs.captions == 10 * ["a coat", "a mug"] and not pairs.invalid_rows
    model.eval()
    seed = derive_seed(3, Purpose.PRIOR, 0)
    expected = generate_by_own_sampler(model, checkpoint, 8 * ["a coat", "a mug"], seed=seed)
    for number, image in enumerate(expected):
        assert (torch.from_numpy(image) == pairs.images[:][number].permute(1, 2, 0)).all()

    before = {file.name: file.read_bytes() for file in prior.folder.iterdir()}
    metadata = prior.folder / "metadata.jsonl"
    metadata.write_text("\n".join(metadata.read_text().splitlines()[:16]) + "\n")  # as after an interrupt
    generate_prior(prior, model, checkpoint, seed=3)
    assert {file.name: file.read_bytes() for file in prior.folder.iterdir()} == before
    generate_prior(replace(prior, pairs=5), model, checkpoint, seed=4)
    assert {file.name: file.read_bytes() for file in prior.folder.iterdir()} == before, "the folder holds enough pairs"


def test_unusable_prior_is_refused(
    small_catalog: Path, random_checkpoint: Path, noise_images: Path, tmp_path: Path
) -> None:
    def run(prior: PriorConfig, **settings: object) -> None:
        config = TrainingConfig(**(FEW | settings))
        train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", prior=prior)

    with pytest.raises(OptionError, match="pairs=0, but it needs at least 1"):
        PriorConfig(noise_images, pairs=0)
    with pytest.raises(OptionError, match="no term trains on it"):
        run(PriorConfig(noise_images), lambda_prior=0.0)
    with pytest.raises(OptionError, match="no term trains on it"):
        run(PriorConfig(noise_images), lambda_is=0.0)
    with pytest.raises(DataError, match="no such folder"):
        run(PriorConfig(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Cannot write prior images"):
        run(PriorConfig(tmp_path / "file", ("a coat",), pairs=1))
