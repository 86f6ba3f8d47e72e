"""Training Stable Diffusion XL: conditions, loss and gradients compared with diffusers' own modules."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

import torch.nn.functional as F  # noqa: E402
from support.random_sdxl import LARGER, POOLED, make_random_sdxl  # noqa: E402
from support.training_step import PARTS_OF_TERMS, parts_trained_by, prepare_step  # noqa: E402

from unidiff_sdk.training.checkpoints.bases import load_base  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.captions import prompt_ids  # noqa: E402
from unidiff_sdk.training.data.fitted_images import size_conditions  # noqa: E402
from unidiff_sdk.training.evaluation.sampling import generate_images, sampler_table  # noqa: E402
from unidiff_sdk.training.objective.batch import RandomInputs  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.objective.score_consistency import (  # noqa: E402
    GENERATOR_TEMPERATURE,
    ScoreInputs,
    generator_logits,
)
from unidiff_sdk.training.objective.tuning import set_trainable  # noqa: E402
from unidiff_sdk.training.runtime.randomness import Purpose, seeded_generator  # noqa: E402

IS_ONLY = {"lambda_itc": 0.0}
CAPTIONS = ["a red striped dress", "green dotted boots"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_sdxl(tmp_path_factory.mktemp("base") / "xl")


@pytest.fixture
def checkpoint(base: Path) -> Checkpoint:
    return load_base(base)


@pytest.fixture
def separate(checkpoint: Checkpoint) -> Checkpoint:
    """The same with a text encoder of its own, as with another CLIP."""
    return replace(checkpoint, text_encoder=deepcopy(checkpoint.text_encoder))


def pipeline_of(base: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)


@pytest.mark.parametrize("zeros", [True, False])
def test_conditions_equal_the_prompt_embeddings_of_diffusers(base: Path, checkpoint: Checkpoint, zeros: bool) -> None:
    """Of captions, and of no caption, which the pipeline replaces by zeros if its index says so."""
    assert checkpoint.second
    model = JointModel(replace(checkpoint, second=replace(checkpoint.second, zero_negative=zeros))).eval()
    pipeline = pipeline_of(base)
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    with torch.no_grad():
        conditions = model.encode_prompts(prompt_ids(checkpoint, CAPTIONS))
        none = model.unconditional(prompt_ids(checkpoint, [""])).repeated(2)
        states, empty_states, pooled, empty_pooled = pipeline.encode_prompt(CAPTIONS)
    torch.testing.assert_close(conditions.states, states)
    torch.testing.assert_close(conditions.pooled, pooled)
    torch.testing.assert_close(none.states, empty_states)
    torch.testing.assert_close(none.pooled, empty_pooled)
    assert bool(none.states.any()) is not zeros


@pytest.mark.parametrize("shape", [(16, 16), (16, 24)])
def test_sizes_of_whole_images_equal_the_time_ids_of_diffusers(
    base: Path, checkpoint: Checkpoint, shape: tuple[int, int]
) -> None:
    model, pipeline = JointModel(checkpoint).eval(), pipeline_of(base)
    height, width = (2 * side for side in shape)
    with torch.no_grad():
        conditions = model.encode_prompts(prompt_ids(checkpoint, CAPTIONS[:1]))
        time_ids = pipeline._get_add_time_ids((height, width), (0, 0), (height, width), torch.float32, POOLED)
        z, t = torch.randn(1, 4, *shape), torch.tensor([500])
        added = {"text_embeds": conditions.pooled, "time_ids": time_ids}
        expected = pipeline.unet(z, t, conditions.states, added_cond_kwargs=added).sample
        torch.testing.assert_close(model.predict(z, t, conditions), expected)
        cropped = model.predict(z, t, conditions.with_sizes(time_ids + torch.tensor([[9.0, 0, 3, 0, 0, 0]])))
    assert (cropped - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("original", "fit", "mirrored", "expected"),
    [
        ((100, 50), "crop", False, [50, 100, 0, 16, 32, 32]),  # resized to 64 x 32
        ((50, 101), "crop", False, [101, 50, 16, 0, 32, 32]),
        ((67, 50), "crop", False, [50, 67, 0, 5, 32, 32]),  # to 42 x 32
        ((69, 50), "crop", False, [50, 69, 0, 6, 32, 32]),  # to 44 x 32
        ((68, 50), "crop", True, [50, 68, 0, 6, 32, 32]),  # to 43 x 32: 5 on the left, 6 on the right
        ((100, 50), "pad", False, [100, 100, 0, 0, 32, 32]),
    ],
)
def test_sizes_of_training_images(original: tuple[int, int], fit: Any, mirrored: bool, expected: list[int]) -> None:
    assert size_conditions(original, (32, 32), fit, mirrored=mirrored) == expected


def test_samples_of_a_run_equal_the_images_of_diffusers(base: Path, checkpoint: Checkpoint) -> None:
    """With guidance, from the same noise: the images of validation and of priors."""
    table = sampler_table(checkpoint, "euler", 4)
    images = generate_images(JointModel(checkpoint).eval(), checkpoint, CAPTIONS, table=table, guidance=5.0, seed=3)
    noise = [np.random.default_rng([3, i]).standard_normal((4, 16, 16), dtype=np.float32) for i in range(2)]
    pipeline = pipeline_of(base)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "latents": torch.from_numpy(np.stack(noise))}
    expected = pipeline(CAPTIONS, **options, output_type="np").images
    assert np.abs(np.stack(images) - 255 * expected).max() < 1


# --- one step --------------------------------------------------------------------------------------------------------


def loss_by_diffusers(pipeline: Any, batch: Any, random: RandomInputs, captions: list[str]) -> torch.Tensor:
    """The loss of diffusers' training scripts with min-SNR weights, from the same latents, noise and timesteps."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    states, _, pooled, _ = pipeline.encode_prompt(captions)
    keep = (~random.dropped).float()  # this base uses zeros for the empty prompt
    added = {"text_embeds": pooled * keep[:, None], "time_ids": batch.sizes}
    noisy = scheduler.add_noise(batch.latents, random.noise, random.t)
    output = pipeline.unet(noisy, random.t, states * keep[:, None, None], added_cond_kwargs=added).sample
    snr = compute_snr(scheduler, random.t)
    weight = torch.minimum(snr, torch.full_like(snr, 5.0)) / snr
    return (F.mse_loss(output, random.noise, reduction="none").mean(dim=(1, 2, 3)) * weight).mean()


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_loss_and_gradients_of_a_step_equal_diffusers(base: Path, small_catalog: Path, micro_batch: int) -> None:
    """The step's gradients, parameter by parameter, and those of autograd on the modules of diffusers' pipeline."""
    config = TrainingConfig(**IS_ONLY, batch_size=8, caption_dropout=0.4, flip=True, micro_batch=micro_batch)
    step = prepare_step(base, small_catalog, config)
    found, values = step.backpropagate()
    indices, shape = step.batches.indices(0), step.model.latent_shape
    generator = seeded_generator(config.seed, Purpose.NOISE, 0)
    random = RandomInputs.sample(generator, 8, shape, len(step.model.timesteps), config, pairs=8)
    assert 0 < random.dropped.sum() < 8 and 0 < indices.mirror.sum() < 8
    batch = step.batches.load(indices, 8)
    assert batch.sizes is not None and len(batch.sizes.unique(dim=0)) > 4, "images of several sizes"

    pipeline = pipeline_of(base)
    captions = [step.captions[row] for row in indices.rows]
    loss = loss_by_diffusers(pipeline, batch, random, captions)
    loss.backward()
    assert values["is"] == pytest.approx(loss.item(), rel=1e-5)
    parts = {"unet": pipeline.unet, "clip.text_model": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    expected = {
        f"{part}.{name}": p.grad
        for part, model in parts.items()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_loss_on_buckets_of_aspect_ratios_equals_diffusers(base: Path, small_catalog: Path) -> None:
    """Rectangles, whose sizes and crops are in the conditions; every batch of an epoch."""
    config = TrainingConfig(**IS_ONLY, batch_size=4, aspect_buckets=True)
    step, pipeline = prepare_step(base, small_catalog, config), pipeline_of(base)
    assert step.batches.buckets
    shapes = set()
    for number in range(step.batches.buckets.batches_per_epoch):
        indices = step.batches.indices(number)
        n, shape = len(indices), step.batches.latent_shape(indices)
        shapes.add(shape)
        generator = seeded_generator(config.seed, Purpose.NOISE, number)
        random = RandomInputs.sample(generator, n, shape, len(step.model.timesteps), config, pairs=n)
        batch = step.batches.load(indices, n)
        with torch.no_grad():
            loss = loss_by_diffusers(pipeline, batch, random, [step.captions[row] for row in indices.rows])
        _, values = step.backpropagate(number)
        assert values["is"] == pytest.approx(loss.item(), rel=1e-5)
    assert len(shapes) > 3 and all(height > width for _, height, width in shapes - {(4, 16, 16)})


def test_scores_of_the_generator_equal_the_denoising_errors_of_diffusers(base: Path, small_catalog: Path) -> None:
    """g of each caption's candidates, whose sizes are those of each image; without a caption the UNet sees zeros."""
    config = TrainingConfig(lambda_rsc_generator=1.0, rsc_timesteps=2, batch_size=8)
    step = prepare_step(base, small_catalog, config)
    indices = step.batches.indices(0)
    candidates = torch.tensor([[0, 3, 5], [1, 7, 2]])
    chosen = indices.select(candidates.flatten())
    latents = step.batches.load_latents(chosen)
    sizes = step.batches.load_sizes(chosen)
    inputs = ScoreInputs.sample(
        torch.Generator().manual_seed(4), 2, step.model.latent_shape, step.model.timesteps, config
    )
    ids = step.batches.input_ids[indices.rows[:2]]
    with torch.no_grad():
        images = latents.unflatten(0, (2, 3))
        found = generator_logits(step.model.eval(), images, ids, step.empty_ids, inputs, sizes.unflatten(0, (2, 3)))

        pipeline = pipeline_of(base)
        states, _, pooled, _ = pipeline.encode_prompt([step.captions[row] for row in indices.rows[:2]])

        def error(caption: int, image: int, scale: float) -> float:
            errors = []
            for t, noise in zip(inputs.t[caption], inputs.noise[caption], strict=True):
                alpha = pipeline.scheduler.alphas_cumprod[t]
                z = alpha.sqrt() * latents[image] + (1 - alpha).sqrt() * noise
                added = {"text_embeds": scale * pooled[[caption]], "time_ids": sizes[[image]]}
                output = pipeline.unet(z[None], t, scale * states[[caption]], added_cond_kwargs=added).sample
                errors.append((output - noise).square().mean().item())
            return sum(errors) / len(errors)

        for caption in range(2):
            for place in range(3):
                without, given = (error(caption, 3 * caption + place, scale) for scale in (0.0, 1.0))
                expected = (without - given) / without / GENERATOR_TEMPERATURE
                assert found[caption, place].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert len(sizes.unique(dim=0)) > 3


@pytest.mark.parametrize("term", ["is", "rsc_generator"])
def test_sizes_of_the_images_reach_the_loss(base: Path, small_catalog: Path, term: str) -> None:
    config = TrainingConfig(**IS_ONLY | {"lambda_is": 0.0, f"lambda_{term}": 1.0}, batch_size=6)
    step = prepare_step(base, small_catalog, config)
    _, before = step.backpropagate()
    step.batches.original_sizes = [(10 * width, 10 * height) for width, height in step.batches.original_sizes]
    _, after = step.backpropagate()
    assert after[term] != pytest.approx(before[term], rel=1e-4)


@pytest.mark.parametrize("term", PARTS_OF_TERMS)
def test_each_term_trains_its_parts_only(base: Path, small_catalog: Path, term: str, separate: Checkpoint) -> None:
    assert parts_trained_by(term, base, small_catalog, separate) == PARTS_OF_TERMS[term]


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("has_own_encoder", [False, True], ids=["shared", "separate"])
def test_all_trainable_weights_have_a_gradient(
    base: Path, small_catalog: Path, checkpoint: Checkpoint, separate: Checkpoint, rank: int, has_own_encoder: bool
) -> None:
    """So the optimizer holds no state for weights that nothing trains."""
    ranks = {f"lora_{part}": rank for part in ("unet", "text", "image")}
    config = TrainingConfig(batch_size=6, **ranks)
    step = prepare_step(base, small_catalog, config, checkpoint=separate if has_own_encoder else checkpoint)
    found, _ = step.backpropagate()
    assert found.keys() == {name for name, p in step.model.named_parameters() if p.requires_grad}
    encoders = {name.partition(".")[0] for name in found}
    assert encoders == {"unet", "clip", "text_encoder_2", *(["text_encoder"] if has_own_encoder else [])}
    assert all(".lora_" in name or name == "clip.logit_scale" for name in found) is (rank > 0)


def test_activation_checkpointing_keeps_the_gradients_and_bf16_the_loss(base: Path, small_catalog: Path) -> None:
    """As in the command of the guide: adapters, micro-batches and both."""
    settings: dict[str, Any] = {"batch_size": 4, "micro_batch": 1}
    settings |= {f"lora_{part}": 4 for part in ("unet", "text", "image")}
    plain, values = prepare_step(base, small_catalog, TrainingConfig(**settings)).backpropagate()
    checkpointed = TrainingConfig(**settings, checkpoint_activations=True)
    found, same = prepare_step(base, small_catalog, checkpointed).backpropagate()
    assert found.keys() == plain.keys() and same == pytest.approx(values, rel=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    half = TrainingConfig(**settings, checkpoint_activations=True, precision="bf16")
    found, close = prepare_step(base, small_catalog, half).backpropagate()
    assert close == pytest.approx(values, rel=0.03) and all(gradient.isfinite().all() for gradient in found.values())


def test_the_end_of_the_first_text_encoder_is_trained_only_as_a_part_of_clip(
    checkpoint: Checkpoint, separate: Checkpoint
) -> None:
    """Its last layer and norm condition nothing: diffusers reads the states before them."""
    config = TrainingConfig()
    alone, shared = JointModel(separate), JointModel(checkpoint)
    for model in (alone, shared):
        set_trainable(model, config)
    locked = {name for name, p in alone.named_parameters() if not p.requires_grad and not name.startswith("vae.")}
    assert locked and all("layers.1." in name or "final_layer_norm" in name for name in locked)
    assert all(name.startswith("text_encoder.") for name in locked)
    assert all(p.requires_grad for name, p in shared.named_parameters() if not name.startswith("vae."))
    outputs = alone.encode_prompts(prompt_ids(checkpoint, CAPTIONS))
    (outputs.states.sum() + outputs.pooled.sum()).backward()
    trained = {name for name, p in alone.named_parameters() if p.grad is not None}
    encoders = {n for n, _ in alone.named_parameters() if n.startswith("text_encoder")}
    assert trained == encoders - locked
    assert outputs.states.shape[-1] == 32 + LARGER


def test_vae_decodes_in_float32_where_half_precision_overflows(checkpoint: Checkpoint) -> None:
    """Values of 1e5 are beyond float16. The VAE states `force_upcast`."""
    with torch.no_grad():
        checkpoint.vae.decoder.conv_in.weight *= 3e5
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = {}
    for precision in ("fp32", "fp16"):
        model = JointModel(checkpoint, precision)
        with torch.no_grad(), model.autocast():
            pixels[precision] = model.decode(z)
    assert torch.equal(pixels["fp16"], pixels["fp32"]) and pixels["fp32"].isfinite().all()
    checkpoint.vae.register_to_config(force_upcast=False)
    model = JointModel(checkpoint, "fp16")
    with torch.no_grad(), model.autocast():
        assert not torch.equal(model.decode(z), pixels["fp32"])
