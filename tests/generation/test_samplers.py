"""Each table against the diffusers scheduler with the same settings, over whole trajectories."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unidiff_sdk.errors import BundleError, OptionError
from unidiff_sdk.generation.samplers import FLOW_SAMPLERS, SAMPLERS, advance, make_table
from unidiff_sdk.inference.schedule import FlowSchedule, Schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

SHAPE = (2, 4, 5, 5)
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
FLOW = "FlowMatchEulerDiscreteScheduler"
STABLE_DIFFUSION_3 = {"_class_name": FLOW, "num_train_timesteps": 1000, "shift": 3.0}


def reference(sampler: str, config: dict[str, Any]) -> Any:
    karras = {"use_karras_sigmas": True} if sampler.endswith("_karras") else {}
    classes = {
        "ddim": diffusers.DDIMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_a": diffusers.EulerAncestralDiscreteScheduler,
        "dpm++2m": diffusers.DPMSolverMultistepScheduler,
        "lcm": diffusers.LCMScheduler,
    }
    if sampler in FLOW_SAMPLERS:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    cls = classes[sampler.removesuffix("_karras")]
    return cls.from_config(config | karras | {"clip_sample": False})


def read_schedule(config: dict[str, Any]) -> Schedule | FlowSchedule:
    return (FlowSchedule if config.get("_class_name") == FLOW else Schedule).from_config(config)


def model(x: np.ndarray, timestep: float) -> np.ndarray:
    """Replaces a UNet: not linear, and different at every step."""
    return np.tanh(0.7 * x[:, ::-1] + np.cos(timestep * 0.01)).astype(np.float32)


def reference_trajectory(
    scheduler: Any, steps: int, start: np.ndarray, noises: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    noise = iter(noises)
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_args, **_kw: torch.from_numpy(next(noise)))
    x = torch.from_numpy(start) * getattr(scheduler, "init_noise_sigma", 1.0)  # that of flow matching starts from noise
    trajectory = []
    for timestep in scheduler.timesteps[:steps]:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        output = torch.from_numpy(model(scaled.numpy(), float(timestep)))
        x = scheduler.step(output, timestep, x).prev_sample
        trajectory.append(x.numpy())
    return trajectory


def our_trajectory(
    sampler: str, schedule: Schedule | FlowSchedule, steps: int, start: np.ndarray, noises: np.ndarray
) -> list[Any]:
    table = make_table(sampler, schedule, steps)
    assert len(table) == steps and table.rows.dtype == np.float32 and np.isfinite(table.rows).all()
    x, x0, trajectory = start * np.float32(table.init_noise_sigma), None, []
    for step in range(steps):
        row = table[step]
        output = model(x * row.input_scale, float(row.timestep))
        x, x0 = advance(row, x, output, x0, noises[step] if row.next_from_noise else None)
        assert x.dtype == np.float32
        trajectory.append(x)
    return trajectory


def assert_same(sampler: str, config: dict[str, Any], steps: int, seed: int = 0, tolerance: float = 1e-4) -> None:
    schedule = read_schedule(config)
    rng = np.random.default_rng(seed)
    start = rng.standard_normal(SHAPE, dtype=np.float32)
    noises = rng.standard_normal((steps, *SHAPE), dtype=np.float32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        expected = reference_trajectory(reference(sampler, config), steps, start, noises, monkeypatch)
    actual = our_trajectory(sampler, schedule, steps, start, noises)
    # Where alpha vanishes, diffusers subtracts float32 numbers thousands of times the result: its rounding, not ours.
    largest = np.abs(start).max() * make_table(sampler, schedule, steps).init_noise_sigma
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        largest = max(largest, np.abs(theirs).max())
        allowed = tolerance * np.abs(theirs).max() + 4 * np.finfo(np.float32).eps * largest
        error = np.abs(ours - theirs).max()
        assert error <= allowed, f"{sampler}, step {step} of {steps}: off by {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", None])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_table_equals_diffusers_for_stable_diffusion(sampler: str, prediction: str, spacing: str | None) -> None:
    """Without a spacing, as Stable Diffusion 1.5 was published, each class of diffusers has its own default."""
    config = STABLE_DIFFUSION | {"prediction_type": prediction} | ({"timestep_spacing": spacing} if spacing else {})
    for steps in (1, 2, 3, 8, 25, 50):
        assert_same(sampler, config, steps, tolerance=2e-5)


@settings(max_examples=60, deadline=None)
@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    total=st.integers(60, 1200),
    beta_start=st.floats(1e-4, 2e-3),
    beta_end=st.floats(5e-3, 3e-2),
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    offset=st.integers(0, 1),
    to_one=st.booleans(),
    steps=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_table_equals_diffusers_for_any_schedule(
    sampler: str,
    prediction: str,
    spacing: str,
    total: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: str,
    offset: int,
    to_one: bool,
    steps: int,
    seed: int,
) -> None:
    # there diffusers truncates the timestep, of which the first is the last training step less a rounding error
    assume(not (sampler == "dpm++2m_karras" and beta_schedule == "squaredcos_cap_v2"))
    # diffusers counts down in floating point and sometimes lands just above 0: one timestep too many, at -1
    assume(spacing != "trailing" or len(np.arange(total, 0, -total / steps)) == steps)
    config = {
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "num_train_timesteps": total,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": beta_schedule,
        "steps_offset": offset,
        "set_alpha_to_one": to_one,
    }
    assert_same(sampler, config, steps, seed)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpm++2m", "lcm"])
def test_table_equals_diffusers_for_zero_terminal_snr(sampler: str) -> None:
    config = STABLE_DIFFUSION | {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    for steps in (1, 4, 20):
        assert_same(sampler, config, steps)
    if sampler == "ddim":
        with pytest.raises(OptionError, match="zero terminal SNR"):
            make_table(sampler, Schedule.from_config(config | {"prediction_type": "epsilon"}), 4)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedule_is_bit_equal_to_diffusers(beta_schedule: str) -> None:
    for total in (60, 777, 1000):
        config = STABLE_DIFFUSION | {"beta_schedule": beta_schedule, "num_train_timesteps": total}
        expected = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
        np.testing.assert_array_equal(Schedule.from_config(config).alphas_cumprod, expected)


def test_advance_combines_rows_of_different_tables() -> None:
    """Stacked rows of two tables return bit for bit what each returns alone."""
    schedule = Schedule.from_config(STABLE_DIFFUSION)
    tables = [make_table("ddim", schedule, 5), make_table("dpm++2m", schedule, 9)]
    rng = np.random.default_rng(0)
    x, output, previous = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(3))
    rows = np.stack([tables[0].rows[1], tables[1].rows[4]])
    together, _ = advance(type(tables[0][0])(*rows.T[:, :, None, None, None]), x, output, previous, None)
    for i, row in enumerate((tables[0][1], tables[1][4])):
        alone, _ = advance(row, x[i : i + 1], output[i : i + 1], previous[i : i + 1], None)
        np.testing.assert_array_equal(together[i], alone[0])


def test_only_stochastic_samplers_need_noise() -> None:
    schedule = Schedule.from_config(STABLE_DIFFUSION)
    assert {name for name in SAMPLERS if make_table(name, schedule, 6).needs_noise} == {"euler_a", "lcm"}


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 1200),
    shift=st.floats(0.125, 20),
    steps=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_table_of_flow_matching_equals_diffusers(total: int, shift: float, steps: int, seed: int) -> None:
    config = {"_class_name": FLOW, "num_train_timesteps": total, "shift": shift}
    assert_same("flow_euler", config, min(steps, total), seed)


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_levels_of_flow_matching_are_bit_equal_to_diffusers(shift: float) -> None:
    config = STABLE_DIFFUSION_3 | {"shift": shift}
    scheduler, schedule = reference("flow_euler", config), FlowSchedule.from_config(config)
    for steps in (*range(1, 51), 333, 999, 1000):
        scheduler.set_timesteps(steps)
        np.testing.assert_array_equal(schedule.sigmas(steps), scheduler.sigmas[:-1].numpy())
        table = make_table("flow_euler", schedule, steps)
        np.testing.assert_array_equal(table.rows[:, 0], scheduler.timesteps.numpy())
        assert table.rows[-1, table[0]._fields.index("next_from_x0")] == 1  # the last step returns its estimate


@pytest.mark.parametrize("start", [0, 3, 7])
def test_image_to_image_of_flow_matching_starts_as_diffusers(start: int) -> None:
    """x = (1 - sigma) * latents + sigma * noise, also for inpainting after each step."""
    scheduler = reference("flow_euler", STABLE_DIFFUSION_3)
    table = make_table("flow_euler", FlowSchedule.from_config(STABLE_DIFFUSION_3), 8).starting_at(start)
    scheduler.set_timesteps(8)
    rng = np.random.default_rng(0)
    latents, noise = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(2))
    for step, timestep in enumerate(scheduler.timesteps[start:]):
        clean, noisy = table.levels[step]
        expected = scheduler.scale_noise(torch.from_numpy(latents), timestep[None], torch.from_numpy(noise))
        np.testing.assert_allclose(clean * latents + noisy * noise, expected.numpy(), atol=1e-6)
    assert list(table.levels[-1]) == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "'FlowMatchHeunDiscreteScheduler' is not supported"),
        ({"_class_name": None}, "scheduler None is not supported"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting True"),
        ({"invert_sigmas": True}, "invert_sigmas True"),
        ({"shift_terminal": 0.1}, "shift_terminal 0.1"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas True"),
        ({"stochastic_sampling": True}, "stochastic_sampling True"),
        ({"shift": 0}, "shift is 0"),
        ({"shift": "3"}, "shift is '3'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ],
)
def test_other_schedulers_of_flow_matching_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        FlowSchedule.from_config(STABLE_DIFFUSION_3 | change)


def test_samplers_of_the_other_kind_of_models_are_refused() -> None:
    with pytest.raises(OptionError, match="'euler', which is for other models than flow matching models; use one of f"):
        make_table("euler", FlowSchedule(), 4)
    with pytest.raises(OptionError, match="'flow_euler', which is for flow matching models; use one of ddim"):
        make_table("flow_euler", Schedule.from_config(STABLE_DIFFUSION), 4)
    for steps in (0, 1001):
        with pytest.raises(OptionError, match="supports 1 to 1000"):
            make_table("flow_euler", FlowSchedule(), steps)


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        ("ddpm", 5, r"sampler is 'ddpm'; use one of ddim, euler"),
        ("ddim", 0, "supports 1 to 1000"),
        ("ddim", 1001, "supports 1 to 1000"),
        ("dpm++2m", 1000, "supports 1 to 999"),
        ("ddim", 1000, "give fewer"),
        ("lcm", 51, "supports 1 to 50"),
    ],
)
def test_invalid_sampler_or_steps_is_refused(sampler: str, steps: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_table(sampler, Schedule.from_config(STABLE_DIFFUSION), steps)


@pytest.mark.parametrize(
    "change",
    [{"prediction_type": "flow"}, {"timestep_spacing": "odd"}, {"beta_schedule": "laplace"}, {"thresholding": True}],
)
def test_unsupported_schedules_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="not supported"):
        Schedule.from_config(STABLE_DIFFUSION | change)
