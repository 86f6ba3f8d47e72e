"""The sampler and noise schedule of every scheduler of diffusers: the same, replaced by name, or refused by name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

from unidiff_sdk.generation.samplers import advance, make_table  # noqa: E402
from unidiff_sdk.inference.schedule import (  # noqa: E402
    FOLLOWED_SCHEDULERS,
    Schedule,
    replacement_notice,
    sampler_choice,
    scheduler_refusal,
    stated_settings,
)


def scheduler_defaults() -> dict[str, dict[str, Any]]:
    """The arguments and defaults of every scheduler class, from its source: some classes need packages to import."""
    classes = {}
    for file in sorted(Path(diffusers.schedulers.__file__).parent.rglob("scheduling_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if "flax" in file.name or not isinstance(node, ast.ClassDef) or not node.name.endswith("Scheduler"):
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    named = [argument.arg for argument in method.args.args]
                    values = method.args.defaults
                    pairs = zip(named[len(named) - len(values) :], values, strict=True)
                    classes[node.name] = {name: _literal(value) for name, value in pairs}
    return classes


def _literal(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:  # an expression such as -float("inf")
        return None


DEFAULTS = scheduler_defaults()


def test_every_scheduler_of_diffusers_is_found() -> None:
    exported = {
        name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and not name.startswith("Flax")
    }
    assert len(exported) > 40
    assert exported <= DEFAULTS.keys()


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_scheduler_is_followed_replaced_or_refused_by_name(name: str) -> None:
    config = {"_class_name": name}
    if refused := scheduler_refusal(config):
        assert repr(name) in refused and "use a Stable Diffusion 1 or 2" in refused
        return
    choice = sampler_choice(config)
    assert choice.name and (choice.replaces is None) == (name in FOLLOWED_SCHEDULERS)
    if choice.replaces:
        notice = replacement_notice("base", choice.name, choice.replaces)
        assert name in notice and choice.name in notice
    explicit = {
        key: value for key, value in DEFAULTS[name].items() if key in ("beta_start", "beta_end", "beta_schedule")
    }
    assert explicit["beta_schedule"]
    np.testing.assert_array_equal(
        Schedule.from_config(config).alphas_cumprod, Schedule.from_config(explicit).alphas_cumprod
    )
    reference = getattr(diffusers, name)
    if not hasattr(reference, "_backends"):  # a class whose packages are installed
        np.testing.assert_array_equal(Schedule.from_config(config).alphas_cumprod, reference().alphas_cumprod.numpy())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in FOLLOWED_SCHEDULERS),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "lower_order_final": False}),
        ("DPMSolverMultistepScheduler", {"euler_at_final": True, "timestep_spacing": "leading"}),
        ("DDIMScheduler", {"trained_betas": np.linspace(1e-3, 2e-2, 600).tolist(), "num_train_timesteps": 600}),
        ("LCMScheduler", {"original_inference_steps": 40, "timestep_scaling": 7.0}),
    ],
)
def test_followed_scheduler_computes_the_same(name: str, options: dict[str, Any], monkeypatch: Any) -> None:
    config = {"_class_name": name, "prediction_type": "v_prediction"} | options
    choice = sampler_choice(config)
    assert choice.replaces is None and scheduler_refusal(config) is None
    scheduler, steps = getattr(diffusers, name).from_config(config | {"clip_sample": False}), 5
    scheduler.set_timesteps(steps)
    rng = np.random.default_rng(0)
    start, *noises = rng.standard_normal((1 + steps, 1, 4, 3, 3), dtype=np.float32)
    module, fresh = __import__(type(scheduler).__module__, fromlist=["randn_tensor"]), iter(noises)
    monkeypatch.setattr(module, "randn_tensor", lambda *_a, **_k: torch.from_numpy(next(fresh)), raising=False)
    table = make_table(choice.name, Schedule.from_config(config), steps)
    theirs, ours, x0 = torch.from_numpy(start) * scheduler.init_noise_sigma, start * table.init_noise_sigma, None
    for step, timestep in enumerate(scheduler.timesteps):
        output = np.tanh(scheduler.scale_model_input(theirs, timestep).numpy()[:, ::-1] + 0.01 * float(timestep))
        theirs = scheduler.step(torch.from_numpy(output), timestep, theirs).prev_sample
        ours, x0 = advance(table[step], ours, output, x0, noises[step] if table[step].next_from_noise else None)
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "DPMSolverMultistepScheduler",
            {"solver_order": 3},
            ("dpm++2m", "DPMSolverMultistepScheduler with solver_order 3"),
        ),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, ("dpm++2m", "algorithm_type 'sde-dpms")),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, ("dpm++2m", "use_lu_lambdas True")),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, ("dpm++2m", "lambda_min_clipped -5.1")),
        ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}, ("dpm++2m", "use_beta_sigmas True")),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, ("euler", "use_exponential_sigmas True")),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, ("euler", "final_sigmas_type 'sigma_min'")),
        ("EulerDiscreteScheduler", {"sigma_min": 0.1, "use_karras_sigmas": True}, ("euler_karras", "sigma_min 0.1")),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, ("dpm++2m_karras", "UniPCMultistepScheduler")),
        ("SASolverScheduler", {}, ("dpm++2m", "SASolverScheduler")),
    ],
)
def test_options_that_the_sampler_does_not_follow_are_named(
    name: str, options: dict[str, Any], expected: tuple[str, str]
) -> None:
    config = {"_class_name": name} | options
    assert scheduler_refusal(config) is None
    choice = sampler_choice(config)
    assert choice.name == expected[0] and choice.replaces and expected[1] in choice.replaces


def test_saved_defaults_are_told_from_stated_settings() -> None:
    published = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "steps_offset": 1}
    scheduler = diffusers.PNDMScheduler.from_config(published)
    stated = stated_settings(scheduler.config)
    assert stated["steps_offset"] == 1 and stated["prediction_type"] == "epsilon"
    assert not {"timestep_spacing", "set_alpha_to_one", "_use_default_values"} & stated.keys()


def test_pipeline_has_a_steps_offset_of_one_whatever_the_file_states() -> None:
    for config in ({}, {"steps_offset": 0}, {"steps_offset": 1}):
        assert Schedule.from_pipeline(config).steps_offset == 1
    assert Schedule.from_config({}).steps_offset == 0
