"""Distillation: a step compared with closed forms and diffusers' scheduler, a run with diffusers' pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from unidiff_sdk.errors import CheckpointError, DataError, OptionError, TrainingError  # noqa: E402
from unidiff_sdk.generation.samplers import Coefficients, Table, advance, make_table  # noqa: E402
from unidiff_sdk.inference.schedule import Schedule  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import DistillationConfig  # noqa: E402
from unidiff_sdk.training.data.captions import tokenize  # noqa: E402
from unidiff_sdk.training.loop.distiller import distill, few_step_scheduler  # noqa: E402
from unidiff_sdk.training.loop.trajectories import record_trajectories  # noqa: E402
from unidiff_sdk.training.objective import distillation  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

FEW = {"student_steps": 2, "teacher_steps": 4, "trajectories": 6, "steps": 3, "batch_size": 4, "warmup_steps": 1}
CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "clip_sample": False,
}
PREDICTIONS = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


def schedule(**changes: object) -> Schedule:
    return Schedule.from_config(CONFIG | changes)


def alpha_bars(table: Table, noise: Schedule) -> torch.Tensor:
    return torch.tensor([noise.alphas_cumprod[int(t)] for t in table.rows[:, 0]], dtype=torch.float32)


# --- one step --------------------------------------------------------------------------------------------------------


@PREDICTIONS
def test_target_makes_the_diffusers_scheduler_end_at_the_teachers_latents(prediction_type: str) -> None:
    noise = schedule(prediction_type=prediction_type)
    student, _ = distillation.sampler_tables(noise, 4, 12)
    scheduler = DDIMScheduler.from_config(CONFIG | {"prediction_type": prediction_type})
    scheduler.set_timesteps(4)
    z_t, z_s = torch.randn(2, 4, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    coefficients = distillation.coefficients_at(student, torch.arange(4))
    assert scheduler.timesteps.tolist() == coefficients.timestep.flatten().tolist()
    x0 = distillation.target_x0(coefficients, z_t, z_s)
    alpha_bar = alpha_bars(student, noise)
    alpha, sigma = alpha_bar.sqrt()[:, None, None, None], (1 - alpha_bar).sqrt()[:, None, None, None]
    epsilon = (z_t - alpha * x0) / sigma
    output = epsilon if prediction_type == "epsilon" else alpha * epsilon - sigma * x0
    for i, t in enumerate(scheduler.timesteps):
        end = scheduler.step(output[i : i + 1], t, z_t[i : i + 1]).prev_sample
        torch.testing.assert_close(end, z_s[i : i + 1], atol=2e-4, rtol=2e-4)
    # the loss is zero for this output and positive for any other
    assert distillation.distillation_loss(coefficients, z_t, output, z_s, alpha_bar) < 1e-5
    assert distillation.distillation_loss(coefficients, z_t, output + 0.1, z_s, alpha_bar) > 1e-3


@PREDICTIONS
def test_loss_is_the_formula_of_the_paper(prediction_type: str) -> None:
    """Salimans & Ho 2022, computed by hand for one sample: max(SNR, 1)·mean (x̂0 - x̃0)²."""
    noise = schedule(prediction_type=prediction_type)
    student, _ = distillation.sampler_tables(noise, 4, 8)
    z_t, output, z_s = torch.randn(3, 1, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    for step, t, s in ((0, 999, 749), (2, 499, 249)):
        bar_t, bar_s = noise.alphas_cumprod[t], noise.alphas_cumprod[s]
        a_t, s_t, a_s, s_s = bar_t**0.5, (1 - bar_t) ** 0.5, bar_s**0.5, (1 - bar_s) ** 0.5
        target = (z_s - s_s / s_t * z_t) / (a_s - a_t * s_s / s_t)
        x0 = (z_t - s_t * output) / a_t if prediction_type == "epsilon" else a_t * z_t - s_t * output
        expected = max(bar_t / (1 - bar_t), 1.0) * (x0 - target).square().mean()
        coefficients = distillation.coefficients_at(student, torch.tensor([step]))
        loss = distillation.distillation_loss(
            coefficients, z_t, output, z_s, torch.tensor([bar_t], dtype=torch.float32)
        )
        torch.testing.assert_close(loss, expected.float(), rtol=1e-3, atol=1e-6)


def test_guidance_of_one_is_conditional_and_of_zero_unconditional() -> None:
    unconditional, conditional = torch.randn(2, 3)
    torch.testing.assert_close(distillation.apply_guidance(unconditional, conditional, 1.0), conditional)
    torch.testing.assert_close(distillation.apply_guidance(unconditional, conditional, 0.0), unconditional)
    expected = 5 * conditional - 4 * unconditional
    torch.testing.assert_close(distillation.apply_guidance(unconditional, conditional, 5.0), expected)


@settings(max_examples=40, deadline=None)
@given(student_steps=st.integers(1, 12), quotient=st.integers(2, 8), total=st.integers(200, 1000))
def test_every_student_step_starts_at_a_teacher_step(student_steps: int, quotient: int, total: int) -> None:
    noise = schedule(num_train_timesteps=total)
    student, teacher = distillation.sampler_tables(noise, student_steps, student_steps * quotient)
    assert student.rows[0, 0] == total - 1
    apart = student.rows[:, 0] - teacher.rows[::quotient, 0]
    assert abs(apart).max() <= 1, "half a timestep is rounded up by one sampler and down by the other"
    if total % student_steps == 0:
        assert not apart.any()
        # otherwise DDIM in diffusers, and here, may end one timestep early
        assert student[student_steps - 1].next_from_x == 0.0, "the last step returns the clean estimate"
    assert teacher[len(teacher) - 1].next_from_x == 0.0


@PREDICTIONS
def test_student_target_on_gaussian_data_is_the_exact_flow(prediction_type: str) -> None:
    """Data N(0, c²) has a linear denoiser, and a flow in closed form: z_s/z_t = √(ᾱ_s·c² + 1-ᾱ_s)/√(ᾱ_t·c² + 1-ᾱ_t).

    A teacher with many steps follows it. The best linear student, which exists for every step, then ends on it.
    """
    c, noise = 0.7, schedule(prediction_type=prediction_type)
    student, teacher = distillation.sampler_tables(noise, 4, 200)

    def denoise(z: torch.Tensor, bar: float) -> torch.Tensor:
        x0 = bar**0.5 * c**2 / (bar * c**2 + 1 - bar) * z
        epsilon = (z - bar**0.5 * x0) / (1 - bar) ** 0.5
        return epsilon if prediction_type == "epsilon" else bar**0.5 * epsilon - (1 - bar) ** 0.5 * x0

    z = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    points, x, x0 = [z], z, None
    for step in range(200):
        coefficients = Coefficients(*map(float, teacher[step]))
        x, x0 = advance(coefficients, x, denoise(x, noise.alphas_cumprod[int(coefficients.timestep)]), x0, None)
        if (step + 1) % 50 == 0:
            points.append(x)
    deviation = [(bar * c**2 + 1 - bar) ** 0.5 for bar in [*alpha_bars(student, noise).tolist(), 1.0]]
    for step in range(4):
        expected = deviation[step + 1] / deviation[0] * z
        torch.testing.assert_close(points[step + 1], expected, rtol=0.02, atol=0.01)
        # the target estimate is linear in z_t too, so no noise remains to average over
        coefficients = distillation.coefficients_at(student, torch.tensor([step]))
        ratio = distillation.target_x0(coefficients, points[step], points[step + 1]) / points[step]
        assert ratio.std() < 1e-2 * ratio.abs().mean()


# --- the teacher's trajectories --------------------------------------------------------------------------------------


def test_trajectories_equal_those_of_the_diffusers_pipeline(random_checkpoint: Path) -> None:
    """From the recorded noise, the pipeline with DPM-Solver++ and guidance reaches the recorded end."""
    from diffusers import DPMSolverMultistepScheduler

    checkpoint = load_checkpoint(random_checkpoint)
    captions = ["a red dress", "green boots", "a teal mug"]
    config = DistillationConfig(**FEW | {"trajectories": 5})
    model = JointModel(checkpoint).eval()
    scheduler = few_step_scheduler(checkpoint)
    _, teacher = distillation.sampler_tables(Schedule.from_config(scheduler.config), 2, 4)
    ids, empty = tokenize(checkpoint.tokenizer, captions), tokenize(checkpoint.tokenizer, [""])
    recorded = record_trajectories(model, ids, empty, teacher, config, guidance_scale=3.0)
    assert recorded.points.shape == (5, 3, 4, 16, 16)
    assert sorted(recorded.captions[:3].tolist()) == [0, 1, 2], "every caption is used in turn"
    pipeline = pipeline_of(checkpoint, DPMSolverMultistepScheduler.from_config(scheduler.config))
    latents = pipeline(
        [captions[row] for row in recorded.captions],
        latents=recorded.points[:, 0].clone(),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(recorded.points[:, 2], latents, rtol=1e-3, atol=1e-3)


def test_guidance_of_one_calls_the_unet_once_per_step(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    model = JointModel(checkpoint).eval()
    calls: list[int] = []
    checkpoint.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    config = DistillationConfig(**FEW | {"trajectories": 2})
    _, teacher = distillation.sampler_tables(Schedule.from_config(few_step_scheduler(checkpoint).config), 2, 4)
    ids, empty = (tokenize(checkpoint.tokenizer, [text]) for text in ("a red dress", ""))
    for guidance_scale, expected in ((1.0, 4), (2.0, 8)):
        calls.clear()
        record_trajectories(model, ids, empty, teacher, config, guidance_scale=guidance_scale)
        assert len(calls) == expected


# --- a run -----------------------------------------------------------------------------------------------------------


def test_run_changes_only_the_unet_and_the_sampler(
    random_checkpoint: Path, small_catalog: Path, tmp_path: Path
) -> None:
    reports, batches = [], []

    def counted(items: Iterable) -> Iterable:
        batches.extend(items)
        return batches

    result = distill(
        random_checkpoint,
        small_catalog,
        tmp_path / "fast",
        DistillationConfig(**FEW),
        device="cpu",
        on_trajectories=counted,
        on_step=reports.append,
    )
    assert (result.path, result.steps, result.captions, result.invalid_rows) == (tmp_path / "fast", 3, 12, [])
    assert sum(map(len, batches)) == 6 and [report.step for report in reports] == [1, 2, 3]
    fast, before = load_checkpoint(result.path), load_checkpoint(random_checkpoint)
    for part in ("vae", "clip", "text_encoder"):
        ours, theirs = getattr(fast, part).state_dict(), getattr(before, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part
    assert not torch.equal(fast.unet.conv_in.weight, before.unet.conv_in.weight)
    assert fast.meta["sampler"] == {"name": "ddim", "steps": 2, "guidance_scale": 1.0}
    assert fast.meta["base"] == "random" and fast.meta["teacher"] == {"name": "random", "guidance_scale": 5.0}


def test_diffusers_pipeline_gives_the_same_latents(
    random_checkpoint: Path, small_catalog: Path, tmp_path: Path
) -> None:
    """The checkpoint loads in the diffusers pipeline, whose scheduler takes the steps of the learned table."""
    distill(random_checkpoint, small_catalog, tmp_path / "fast", DistillationConfig(**FEW), device="cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "fast")
    pipeline.set_progress_bar_config(disable=True)
    fast = load_checkpoint(tmp_path / "fast")
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    prompts = ["a red dress", "green boots"]
    latents = pipeline(prompts, latents=z, num_inference_steps=2, guidance_scale=1.0, output_type="latent").images
    sampler = fast.meta["sampler"]
    table = make_table(sampler["name"], Schedule.from_config(fast.scheduler.config), sampler["steps"])
    x, states = z, fast.text_encoder(tokenize(fast.tokenizer, prompts)).last_hidden_state
    with torch.no_grad():
        for step in range(len(table)):
            coefficients = Coefficients(*map(float, table[step]))
            x, _ = advance(
                coefficients, x, fast.unet(x, torch.full((2,), coefficients.timestep), states).sample, None, None
            )
    torch.testing.assert_close(x, latents, rtol=1e-4, atol=1e-4)


@PREDICTIONS
def test_student_learns_the_end_points_of_its_teacher(
    random_checkpoint: Path, small_catalog: Path, tmp_path: Path, prediction_type: str
) -> None:
    """On new trajectories, its steps end closer to the teacher's points than before."""
    base = with_prediction(random_checkpoint, tmp_path / "base", prediction_type)
    settings = DistillationConfig(**FEW | {"trajectories": 64, "steps": 150, "batch_size": 16})
    distill(base, small_catalog, tmp_path / "fast", settings, device="cpu")
    teacher = load_checkpoint(base)
    noise = Schedule.from_config(few_step_scheduler(teacher).config)
    student_table, teacher_table = distillation.sampler_tables(noise, 2, 4)
    ids, empty = (tokenize(teacher.tokenizer, texts) for texts in (["a red dress", "a blue dress"], [""]))
    model = JointModel(teacher).eval()
    fresh = record_trajectories(
        model, ids, empty, teacher_table, DistillationConfig(**FEW, seed=99), guidance_scale=5.0
    )

    def distance(unet: torch.nn.Module) -> float:
        states = model.text_encoder(ids).last_hidden_state[fresh.captions]
        errors = []
        with torch.no_grad():
            for step in range(2):
                coefficients = Coefficients(*map(float, student_table[step]))
                z_t, z_s = fresh.points[:, step], fresh.points[:, step + 1]
                end, _ = advance(
                    coefficients, z_t, unet(z_t, torch.full((6,), coefficients.timestep), states).sample, None, None
                )
                errors.append(float((end - z_s).square().mean()))
        return sum(errors)

    assert distance(load_checkpoint(tmp_path / "fast").unet) < 0.7 * distance(teacher.unet)


def test_the_same_seed_gives_the_same_weights(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        distill(random_checkpoint, small_catalog, tmp_path / name, DistillationConfig(**FEW, seed=seed), device="cpu")
    a, b, c = (load_checkpoint(tmp_path / name).unet.conv_out.weight for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_interrupt_saves_the_steps_done(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    def interrupt(report: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(random_checkpoint, small_catalog, tmp_path / "fast", DistillationConfig(**FEW), on_step=interrupt)
    assert load_checkpoint(tmp_path / "fast").meta["step"] == 1


def test_invalid_requests_are_refused(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    few = DistillationConfig(**FEW)
    with pytest.raises(TrainingError, match="teacher itself"):
        distill(random_checkpoint, small_catalog, random_checkpoint, few)
    with pytest.raises(DataError, match="no such folder"):
        distill(random_checkpoint, tmp_path / "nowhere", tmp_path / "out", few)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a dress"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"no valid caption.*gone\.png"):
        distill(random_checkpoint, empty, tmp_path / "out", few)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        distill(random_checkpoint, small_catalog, tmp_path / "notes", few)
    assert not (tmp_path / "out").exists()


def test_loss_that_is_not_finite_stops_the_run(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    teachers = []

    def spoil(batches: Iterable) -> Iterable:
        """Record the trajectories, then put a NaN into the UNet, which is the student from now on."""
        yield from batches
        teachers[0].unet.conv_out.bias.data.fill_(float("nan"))

    few = DistillationConfig(**FEW)
    with pytest.raises(TrainingError, match=r"loss is nan at step 1\. Nothing was saved"):
        distill(
            *(random_checkpoint, small_catalog, tmp_path / "out", few),
            on_start=teachers.append,
            on_trajectories=spoil,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"student_steps": 0},
        {"teacher_steps": 4},
        {"teacher_steps": 10},
        {"guidance_scale": 0.5},
        {"guidance_scale": float("nan")},
        {"trajectories": 0},
        {"learning_rate": 0.0},
        {"ema_decay": 1.0},
        {"precision": "fp8"},
        {"warmup_steps": -1},
    ],
    ids=str,
)
def test_invalid_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong)) if "teacher_steps" not in wrong else "must be a multiple"):
        DistillationConfig(**wrong)


# --- helpers ---------------------------------------------------------------------------------------------------------


def pipeline_of(checkpoint, scheduler) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer,
        unet=checkpoint.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_prediction(checkpoint: Path, folder: Path, prediction_type: str) -> Path:
    """A copy of the checkpoint with another prediction type."""
    shutil.copytree(checkpoint, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"prediction_type": prediction_type}
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder
