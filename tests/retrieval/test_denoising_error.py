"""Denoising errors and re-ranked orders against torch and diffusers, with the checkpoint of the built-in model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from unidiff_sdk import Bundle, Catalog
from unidiff_sdk.datasets.synthetic import products, render
from unidiff_sdk.inference.schedule import FlowSchedule, Schedule
from unidiff_sdk.retrieval.reranking.denoising_error import DenoisingError, Row

torch = pytest.importorskip("torch", reason="needs the train extra")
diffusers = pytest.importorskip("diffusers", reason="needs the train extra")

pytestmark = [
    pytest.mark.filterwarnings("ignore:rerank="),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:The bundle .tiny. was trained"),
]

FLOW = "FlowMatchEulerDiscreteScheduler"


class Answering:
    """A denoiser that records its inputs and returns their negative."""

    def __init__(self) -> None:
        self.samples: list[np.ndarray] = []

    def predict(self, samples: Sequence[Any], timesteps: Sequence[int], states: Sequence[Any]) -> np.ndarray:
        self.samples += samples
        return -np.stack(samples)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noisy_latents_and_targets_equal_diffusers(prediction_type: str) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    denoiser = Answering()
    error = DenoisingError(denoiser, Schedule.from_config(scheduler.config), noise_seed=5)  # type: ignore[arg-type]
    latents = np.random.default_rng(0).standard_normal((3, 2, 4, 6)).astype(np.float16)
    timesteps = [999, 0, 640]
    states = np.zeros((1, 1), np.float32)
    measured = error.measure([Row(z, t, states) for z, t in zip(latents, timesteps, strict=True)])

    for z, t, sample, value in zip(latents, timesteps, denoiser.samples, measured, strict=True):
        generator = np.random.Generator(np.random.Philox(key=np.array([5, t], np.uint64)))
        clean, noise = torch.from_numpy(z).float()[None], generator.standard_normal(z.shape, dtype=np.float32)[None]
        at = torch.tensor([t])
        noisy = scheduler.add_noise(clean, torch.from_numpy(noise), at)
        velocity = scheduler.get_velocity(clean, torch.from_numpy(noise), at)
        target = velocity if prediction_type == "v_prediction" else torch.from_numpy(noise)
        np.testing.assert_allclose(sample, noisy[0].numpy(), atol=1e-5)
        assert value == pytest.approx(float((-noisy - target).square().mean()), rel=1e-5)


def test_noisy_latents_and_targets_of_flow_matching_equal_diffusers() -> None:
    """diffusers mixes them in `scale_noise`; its trainer of Stable Diffusion 3 takes noise - latents as the target."""
    scheduler, denoiser = diffusers.FlowMatchEulerDiscreteScheduler(), Answering()
    error = DenoisingError(denoiser, FlowSchedule.from_config(dict(scheduler.config, _class_name=FLOW)), noise_seed=5)
    latents = np.random.default_rng(0).standard_normal((3, 2, 4, 6)).astype(np.float16)
    timesteps = [999, 1, 640]
    measured = error.measure([Row(z, t, np.zeros((1, 1))) for z, t in zip(latents, timesteps, strict=True)])
    for z, t, sample, value in zip(latents, timesteps, denoiser.samples, measured, strict=True):
        generator = np.random.Generator(np.random.Philox(key=np.array([5, t], np.uint64)))
        clean, noise = torch.from_numpy(z).float(), torch.from_numpy(generator.standard_normal(z.shape, np.float32))
        noisy = scheduler.scale_noise(clean[None], torch.tensor([float(t)]), noise[None])[0]
        np.testing.assert_allclose(sample, noisy.numpy(), atol=1e-5)
        assert value == pytest.approx(float((-noisy - (noise - clean)).square().mean()), rel=1e-5)


@torch.no_grad()
def test_reranked_order_equals_torch_and_diffusers() -> None:
    """The whole way from images and a text to scores, computed once more with the PyTorch models."""
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    shop = products("fashion-woman", 12, seed=3, split="test-unseen")
    text, images = shop[0].caption, [render(product) for product in shop]
    with Catalog(bundle=Bundle.open("tiny", threads=1)) as catalog:
        catalog.add(images, ids=list(range(12)), payloads=[{"catalog": "fashion-woman"}] * 12)
        page = catalog.search(text, rerank=6, limit=6)
        settings = catalog._current.searcher()._reranker().settings

    model = load_checkpoint("tiny")
    scheduler = diffusers.DDPMScheduler.from_config(model.scheduler.config)
    ids = model.tokenizer([text, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = model.text_encoder(ids).last_hidden_state
    pixels = torch.stack([torch.from_numpy(np.array(images[hit.id], np.float32)) for hit in page])
    z = model.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode() * model.vae.config.scaling_factor
    z = z.half().float()
    errors = torch.zeros(2, len(page))
    for t in settings.timesteps:
        generator = np.random.Generator(np.random.Philox(key=np.array([settings.noise_seed, t], np.uint64)))
        noise = torch.from_numpy(generator.standard_normal(z.shape[1:], dtype=np.float32)).expand_as(z)
        at = torch.full((len(z),), t)
        for i, each in enumerate(states):
            output = model.unet(scheduler.add_noise(z, noise, at), at, each.expand(len(z), -1, -1)).sample
            target = scheduler.get_velocity(z, noise, at)
            errors[i] += (output - target).square().mean(dim=(1, 2, 3)) / len(settings.timesteps)
    gains = ((errors[1] - errors[0]) / errors[1]).double().numpy()
    scores = np.array([hit.score for hit in page])
    expected = (scores - scores.mean()) / scores.std() + settings.weight * (gains - gains.mean()) / gains.std()
    np.testing.assert_allclose([hit.gain for hit in page], gains, atol=1e-4)
    np.testing.assert_allclose([hit.rerank_score for hit in page], expected, atol=1e-3)
    assert list(expected) == sorted(expected, reverse=True)
    assert page[0].id == 0
