"""Settings: types, numbers of numpy, and settings without effect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from unidiff_sdk.errors import OptionError
from unidiff_sdk.training.config import DistillationConfig, PriorConfig, TrainingConfig


def test_numbers_of_numpy_are_accepted() -> None:
    config = TrainingConfig(steps=np.int64(3), learning_rate=np.float32(0.5), batch_size=np.array(4), seed=np.uint8(1))
    assert (config.steps, config.learning_rate, config.batch_size) == (3, 0.5, 4)
    assert {type(config.steps), type(config.batch_size), type(config.seed)} == {int}
    assert type(config.learning_rate) is float
    assert type(DistillationConfig(guidance_scale=np.float64(2), trajectories=np.int32(9)).guidance_scale) is float
    assert type(PriorConfig("prior", ("a coat",), pairs=np.int64(3)).pairs) is int  # type: ignore[arg-type]
    assert TrainingConfig(group=["brand"]).group == ("brand",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 1.5}, "steps is 1.5, but must be an integer"),
        ({"steps": True}, "steps is True, but must be an integer"),
        ({"batch_size": "8"}, "batch_size is '8', but must be an integer"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, but must be a finite number"),
        ({"learning_rate": np.float32(np.inf)}, "must be a finite number"),
        ({"lambda_itc": 10**400}, "must be a finite number"),
        ({"weight_decay": None}, "weight_decay is None"),
        ({"flip": 1}, "flip is 1, but must be True or False"),
        ({"group": "brand"}, "group is 'brand', but must be a sequence of texts"),
        ({"group": (1,)}, "must be a sequence of texts"),
    ],
)
def test_settings_of_another_type_are_errors(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        TrainingConfig(**settings)


CLIP_ONLY = {"lambda_is": 0.0}
GENERATOR_ONLY = {"lambda_itc": 0.0}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"rsc_warmup_steps": 10}, "rsc_warmup_steps"),
        ({"rsc_captions": 4}, "rsc_captions"),
        ({"lambda_rsc_encoder": 0.1, "rsc_reward_steps": 4}, "rsc_reward_steps"),
        (CLIP_ONLY | {"min_snr_gamma": 1.0}, "min_snr_gamma"),
        (CLIP_ONLY | {"caption_dropout": 0.2}, "caption_dropout"),
        (CLIP_ONLY | {"lora_unet": 4}, "lora_unet"),
        (CLIP_ONLY | {"learning_rate_unet": 1e-4}, "learning_rate_unet"),
        (GENERATOR_ONLY | {"group": ("brand",)}, "group"),
        (GENERATOR_ONLY | {"contrastive_batch": 128}, "contrastive_batch"),
        (GENERATOR_ONLY | {"lora_image": 4}, "lora_image"),
        ({"lock_text": True, "lora_text": 4}, "lora_text"),
        ({"lock_image": True, "learning_rate_image": 1e-4}, "learning_rate_image"),
        ({"lambda_prior": 0.5}, "lambda_prior"),
        ({"prior_batch": 8}, "prior_batch"),
        ({"validate_every": 10}, "validate_every"),
    ],
)
def test_setting_without_effect_is_named(settings: dict[str, Any], name: str) -> None:
    reason = TrainingConfig(**settings).without_effect(prior=False, validation=False)
    assert reason is not None and reason.startswith(f"{name} has no effect: ")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        CLIP_ONLY | {"group": ("brand",), "contrastive_batch": 128, "lora_text": 4},
        GENERATOR_ONLY | {"lora_unet": 4, "lora_text": 2, "caption_dropout": 0.0},
        {"lambda_rsc_encoder": 0.1, "rsc_captions": 4, "rsc_warmup_steps": 10},
        {"lambda_prior": 0.5, "prior_batch": 8, "validate_every": 10},
    ],
)
def test_settings_with_effect_are_accepted(settings: dict[str, Any]) -> None:
    assert TrainingConfig(**settings).without_effect(prior=True, validation=True) is None


def test_number_of_prior_pairs_needs_prompts() -> None:
    with pytest.raises(OptionError, match="no effect without prompts"):
        PriorConfig("prior", pairs=3)  # type: ignore[arg-type]
