"""Training Stable Diffusion 3: conditions, noise, loss and gradients compared with diffusers' own modules."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

import torch.nn.functional as F  # noqa: E402
from support.random_sd3 import make_random_sd3  # noqa: E402
from support.training_step import PARTS_OF_TERMS, TrainingStep, parts_trained_by, prepare_step  # noqa: E402

from unidiff_sdk.errors import OptionError  # noqa: E402
from unidiff_sdk.inference.manifest import RerankDefaults  # noqa: E402
from unidiff_sdk.training.checkpoints.bases import load_base  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.captions import prompt_ids  # noqa: E402
from unidiff_sdk.training.data.latents import LatentCache  # noqa: E402
from unidiff_sdk.training.data.pairs import load_pairs  # noqa: E402
from unidiff_sdk.training.evaluation.reranking import reranked_order  # noqa: E402
from unidiff_sdk.training.evaluation.sampling import generate_images, sampler_table  # noqa: E402
from unidiff_sdk.training.evaluation.validation import denoising_loss  # noqa: E402
from unidiff_sdk.training.objective.batch import RandomInputs  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.objective.score_consistency import (  # noqa: E402
    GENERATOR_TEMPERATURE,
    ScoreInputs,
    generator_logits,
)
from unidiff_sdk.training.runtime.randomness import Purpose, seeded_generator  # noqa: E402

IS_ONLY = {"lambda_itc": 0.0}
CAPTIONS = ["a red striped dress", "green dotted boots"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_sd3(tmp_path_factory.mktemp("base") / "sd3")


@pytest.fixture(scope="module")
def with_third(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a T5, and without dual attention."""
    return make_random_sd3(tmp_path_factory.mktemp("base") / "third", third=True, dual_attention=False)


@pytest.fixture
def checkpoint(base: Path) -> Checkpoint:
    return load_base(base)


@pytest.fixture
def separate(checkpoint: Checkpoint) -> Checkpoint:
    """The same with a text encoder of its own, as with another CLIP."""
    return replace(checkpoint, text_encoder=deepcopy(checkpoint.text_encoder))


def pipeline_of(folder: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    absent = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode(pipeline: Any, captions: list[str]) -> tuple[Any, Any]:
    """Token states and pooled embeddings by diffusers, with gradients."""
    states, _, pooled, _ = pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
    return states, pooled


# --- conditions, latents, noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "with_third"])
def test_conditions_equal_the_prompt_embeddings_of_diffusers(name: str, request: pytest.FixtureRequest) -> None:
    """Of captions, and of the empty one. A T5 takes part as in evaluation also while the model trains."""
    folder = request.getfixturevalue(name)
    checkpoint, pipeline = load_base(folder), pipeline_of(folder)
    model = JointModel(checkpoint).train()
    with torch.no_grad():
        conditions = model.encode_prompts(prompt_ids(checkpoint, CAPTIONS))
        none = model.unconditional(prompt_ids(checkpoint, [""]))
        for ours, captions in ((conditions, CAPTIONS), (none, [""])):
            states, pooled = encode(pipeline, captions)
            torch.testing.assert_close(ours.states, states)
            torch.testing.assert_close(ours.pooled, pooled)
    assert bool(conditions.states[:, -256:].any()) is (name == "with_third")


def test_latents_are_shifted_and_scaled(base: Path, checkpoint: Checkpoint) -> None:
    """By the two lines of diffusers' pipelines that use the shift of a VAE."""
    model, vae = JointModel(checkpoint).eval(), pipeline_of(base).vae
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = (vae.encode(2 * pixels - 1).latent_dist.mode() - 0.0609) * 1.5305
        torch.testing.assert_close(model.encode(pixels), latents)
        torch.testing.assert_close(model.decode(latents), vae.decode(latents / 1.5305 + 0.0609).sample / 2 + 0.5)


def test_cached_latents_belong_to_a_shift(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, image = JointModel(checkpoint), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    LatentCache(tmp_path, model).write(image, torch.ones(1, 16, 16, 16))
    assert LatentCache(tmp_path, model).read(image) is not None
    checkpoint.vae.register_to_config(shift_factor=0.5)
    assert LatentCache(tmp_path, JointModel(checkpoint)).read(image) is None


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_are_those_of_the_scheduler(tmp_path: Path, shift: float) -> None:
    """Rising, by the closed form, also after the scheduler has generated."""
    checkpoint = load_base(make_random_sd3(tmp_path / "sd3", shift=shift))
    checkpoint.scheduler.set_timesteps(4)
    model = JointModel(checkpoint)
    share = torch.arange(1, 1001) / 1000
    sigma = shift * share / (1 + (shift - 1) * share)
    torch.testing.assert_close(model.timesteps, 1000 * sigma)
    torch.testing.assert_close(model.alpha_bar, 1 - sigma, atol=1e-6, rtol=0)


def test_levels_are_sampled_as_in_diffusers(checkpoint: Checkpoint) -> None:
    """Logit-normal for IS. Score consistency takes the noisy ones, by 1,000 times their share of noise."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    model, config = JointModel(checkpoint), TrainingConfig()
    seeded = torch.Generator().manual_seed
    random = RandomInputs.sample(
        seeded(3), 500, (1, 2, 2), len(model.timesteps), config, pairs=500, logit_normal=model.is_transformer
    )
    u = compute_density_for_timestep_sampling("logit_normal", 500, 0.0, 1.0, generator=seeded(3))
    assert torch.equal(random.t, (1000 * u).long())
    scores = ScoreInputs.sample(seeded(3), 500, (1, 2, 2), model.timesteps, config).t
    timesteps = model.timesteps[scores]
    assert 650 <= timesteps.min() < 652 and 948 < timesteps.max() < 951


def test_samples_of_a_run_equal_the_images_of_diffusers(base: Path, checkpoint: Checkpoint) -> None:
    """With guidance, from the same noise: the images of validation and of priors."""
    table = sampler_table(checkpoint, "flow_euler", 4)
    images = generate_images(JointModel(checkpoint).eval(), checkpoint, CAPTIONS, table=table, guidance=5.0, seed=3)
    noise = [np.random.default_rng([3, i]).standard_normal((16, 16, 16), dtype=np.float32) for i in range(2)]
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "latents": torch.from_numpy(np.stack(noise))}
    expected = pipeline_of(base)(CAPTIONS, **options, output_type="np").images
    assert np.abs(np.stack(images) - 255 * expected).max() < 1
    with pytest.raises(OptionError, match="'euler', which is for other models than flow matching models"):
        sampler_table(checkpoint, "euler", 4)


def test_denoising_loss_of_a_perfect_model_is_zero(checkpoint: Checkpoint) -> None:
    model, z = JointModel(checkpoint), torch.randn(1, 16, 16, 16)
    seen = []

    def oracle(z_t: torch.Tensor, *, timestep: torch.Tensor, **conditions: Any) -> Any:
        seen.append(timestep)
        return SimpleNamespace(sample=(z_t - z) / (timestep / 1000)[:, None, None, None])  # ε - z

    model.unet = torch.nn.Identity()
    model.unet.forward, model.unet.config = oracle, checkpoint.unet.config
    ids = prompt_ids(checkpoint, CAPTIONS[:1])
    assert denoising_loss(model, z, ids) < 1e-6
    assert set(torch.cat(seen).tolist()) <= set(model.timesteps.tolist()) and len(torch.cat(seen)) == 4


def test_reranking_measures_the_velocity(base: Path, small_catalog: Path) -> None:
    """The order that the errors of a pass over all candidates give."""
    checkpoint = load_base(base)
    model, pairs = JointModel(checkpoint).eval(), load_pairs(small_catalog, checkpoint, limit=4)
    unit = np.eye(4, 8, dtype=np.float32)
    settings = RerankDefaults((600, 900), 4, 1e6, 0, None)  # the gain alone decides
    order = reranked_order(model, checkpoint, pairs, unit, unit, settings)
    from unidiff_sdk.retrieval.reranking.denoising_error import noise_of

    pipeline = pipeline_of(base)
    with torch.no_grad():
        latents = torch.cat([model.encode(image[None].float() / 255) for image in pairs.images[torch.arange(4)]])

        def error(caption: str, image: int) -> float:
            states, pooled = encode(pipeline, [caption])
            errors = []
            for t in (600, 900):
                noise = torch.from_numpy(noise_of(0, t, (16, 16, 16)))
                z_t = (1 - t / 1000) * latents[image] + t / 1000 * noise
                output = pipeline.transformer(z_t[None], states, pooled, torch.tensor([t])).sample[0]
                errors.append((output - noise + latents[image]).square().mean().item())
            return sum(errors)

        for row, caption in enumerate(pairs.captions):
            gains = [(error("", image) - error(caption, image)) / error("", image) for image in range(4)]
            assert order[row].tolist() == sorted(range(4), key=lambda image: -gains[image])


# --- one step --------------------------------------------------------------------------------------------------------


def loss_by_diffusers(pipeline: Any, batch: Any, random: RandomInputs, captions: list[str]) -> torch.Tensor:
    """The loss of diffusers' training script on velocities (`precondition_outputs` off), same random numbers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    timesteps, sigmas = scheduler.timesteps.flip(0)[random.t], scheduler.sigmas.flip(0)[random.t].view(-1, 1, 1, 1)
    dropped = ["" if drop else caption for caption, drop in zip(captions, random.dropped.tolist(), strict=True)]
    states, pooled = encode(pipeline, dropped)
    noisy = (1.0 - sigmas) * batch.latents + sigmas * random.noise
    output = pipeline.transformer(noisy, states, pooled, timesteps).sample
    return F.mse_loss(output, random.noise - batch.latents)


def random_inputs(step: TrainingStep, n: int, number: int = 0) -> RandomInputs:
    generator = seeded_generator(step.config.seed, Purpose.NOISE, number)
    shape = step.batches.latent_shape(step.batches.indices(number))
    return RandomInputs.sample(
        generator, n, shape, len(step.model.timesteps), step.config, pairs=n, logit_normal=step.model.is_transformer
    )


@pytest.mark.parametrize(("name", "micro_batch"), [("base", 0), ("with_third", 3)])
def test_loss_and_gradients_of_a_step_equal_diffusers(
    name: str, micro_batch: int, request: pytest.FixtureRequest, small_catalog: Path
) -> None:
    """The step's gradients, parameter by parameter, and those of autograd on the modules of diffusers' pipeline."""
    folder = request.getfixturevalue(name)
    config = TrainingConfig(**IS_ONLY, batch_size=8, caption_dropout=0.4, flip=True, micro_batch=micro_batch)
    step = prepare_step(folder, small_catalog, config)
    found, values = step.backpropagate()
    indices, random = step.batches.indices(0), random_inputs(step, 8)
    assert 0 < random.dropped.sum() < 8 and 0 < indices.mirror.sum() < 8

    pipeline = pipeline_of(folder)
    loss = loss_by_diffusers(pipeline, step.batches.load(indices, 8), random, [step.captions[i] for i in indices.rows])
    loss.backward()
    assert values["is"] == pytest.approx(loss.item(), rel=1e-5)
    parts = {"unet": pipeline.transformer, "clip": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    expected = {
        f"{part}.{name}": p.grad
        for part, model in parts.items()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    unused = {
        name for name in expected if "transformer_blocks.2.attn.add_q" in name or "blocks.2.attn.norm_added_q" in name
    }
    assert not any(expected.pop(name).any() for name in unused) and unused
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        message = lambda text, name=parameter: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(found[parameter], gradient, atol=1e-6, rtol=1e-4, msg=message)


def test_loss_on_buckets_of_aspect_ratios_equals_diffusers(with_third: Path, small_catalog: Path) -> None:
    """Rectangles, whose positions are cropped from those of the largest square; every batch of an epoch."""
    config = TrainingConfig(**IS_ONLY, batch_size=4, aspect_buckets=True)
    step, pipeline = prepare_step(with_third, small_catalog, config), pipeline_of(with_third)
    assert step.batches.buckets
    shapes = set()
    for number in range(step.batches.buckets.batches_per_epoch):
        indices = step.batches.indices(number)
        shapes.add(step.batches.latent_shape(indices))
        random, batch = random_inputs(step, len(indices), number), step.batches.load(indices, len(indices))
        with torch.no_grad():
            loss = loss_by_diffusers(pipeline, batch, random, [step.captions[row] for row in indices.rows])
        _, values = step.backpropagate(number)
        assert values["is"] == pytest.approx(loss.item(), rel=1e-5)
    assert len(shapes) > 2


def test_buckets_beyond_the_positions_are_refused(small_catalog: Path, tmp_path: Path) -> None:
    checkpoint = load_base(make_random_sd3(tmp_path / "sd3", largest_side=36))
    with pytest.raises(OptionError, match=r"sides of up to 40 pixels, but the transformer .* for at most 36"):
        load_pairs(small_catalog, checkpoint, aspect_buckets=True)


def test_scores_of_the_generator_equal_the_denoising_errors_of_diffusers(base: Path, small_catalog: Path) -> None:
    config = TrainingConfig(lambda_rsc_generator=1.0, rsc_timesteps=2, batch_size=8)
    step = prepare_step(base, small_catalog, config)
    indices = step.batches.indices(0)
    latents = step.batches.load_latents(indices.select(torch.tensor([0, 3, 5])))
    shape, timesteps = step.model.latent_shape, step.model.timesteps
    inputs = ScoreInputs.sample(torch.Generator().manual_seed(4), 1, shape, timesteps, config)
    ids = step.batches.input_ids[indices.rows[:1]]
    pipeline = pipeline_of(base)
    with torch.no_grad():
        found = generator_logits(step.model.eval(), latents[None], ids, step.empty_ids, inputs)

        def error(caption: str, image: int) -> float:
            states, pooled = encode(pipeline, [caption])
            errors = []
            for level, noise in zip(inputs.t[0], inputs.noise[0], strict=True):
                sigma, t = pipeline.scheduler.sigmas[999 - level], pipeline.scheduler.timesteps[999 - level]
                z_t = (1 - sigma) * latents[image] + sigma * noise
                output = pipeline.transformer(z_t[None], states, pooled, t[None]).sample[0]
                errors.append((output - (noise - latents[image])).square().mean().item())
            return sum(errors)

        for image in range(3):
            without = error("", image)
            expected = (without - error(step.captions[indices.rows[0]], image)) / without / GENERATOR_TEMPERATURE
            assert found[0, image].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


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
    reached = {name for name, gradient in found.items() if gradient.any() or ".lora_A" in name}  # A moves after B
    assert found.keys() - reached == set()
    encoders = {name.partition(".")[0] for name in found}
    assert encoders == {"unet", "clip", "text_encoder_2", *(["text_encoder"] if has_own_encoder else [])}
    assert all(".lora_" in name or name == "clip.logit_scale" for name in found) is (rank > 0)
    adapted = {name.split(".lora_")[0].rpartition(".attn.")[2] for name in found if ".attn." in name}
    if rank:
        own = {"to_q", "to_k", "to_v", "to_out.0"}
        assert adapted == own | {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


def test_a_third_text_encoder_stays_as_it_is(with_third: Path, small_catalog: Path) -> None:
    step = prepare_step(with_third, small_catalog, TrainingConfig(batch_size=4))
    found, _ = step.backpropagate()
    frozen = [name for name, p in step.model.named_parameters() if not p.requires_grad]
    assert any(name.startswith("text_encoder_3.") for name in frozen) and not set(frozen) & found.keys()
    third = step.model.text_encoder_3
    assert third is not None and not third.training
    with step.model.evaluating():
        pass
    assert step.model.training and not third.training and not step.model.vae.training


def test_activation_checkpointing_keeps_the_gradients_and_half_precision_the_loss(
    with_third: Path, small_catalog: Path
) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "micro_batch": 1}
    settings |= {f"lora_{part}": 4 for part in ("unet", "text", "image")}
    plain, values = prepare_step(with_third, small_catalog, TrainingConfig(**settings)).backpropagate()
    checkpointed = TrainingConfig(**settings, checkpoint_activations=True)
    found, same = prepare_step(with_third, small_catalog, checkpointed).backpropagate()
    assert found.keys() == plain.keys() and same == pytest.approx(values, rel=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for precision in ("bf16", "fp16"):
        half = TrainingConfig(**settings, precision=precision)  # type: ignore[arg-type]
        found, close = prepare_step(with_third, small_catalog, half).backpropagate()
        assert close == pytest.approx(values, rel=0.03) and all(
            gradient.isfinite().all() for gradient in found.values()
        )
