"""The checks of the options that need no bundle. Those that need one are in test_generator.py."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

import unidiff_sdk
from unidiff_sdk.errors import OptionError
from unidiff_sdk.generation.options import MAX_SEED, GenerationOptions, checked_prompts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0; give an integer of at least 1"),
        ({"n": "2"}, "n is '2'"),
        ({"n": True}, "n is True"),
        ({"seed": -1}, "seed is -1; give an integer of at least 0"),
        ({"steps": 0}, "steps is 0; give an integer of at least 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; give a number from 0 to 50"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; give a number from 0 to 1"),
        ({"sampler": ["ddim"]}, r"sampler is \['ddim'\]; give the name of a sampler"),
        ({"negative_prompt": 7}, "negative_prompt is 7; give a text"),
        ({"long_prompts": "drop"}, "long_prompts is 'drop'; use one of truncate, chunk"),
        ({"strength": 0.5}, "strength applies to an image to start from; give that image as like="),
        ({"mask": "m.png"}, "mask applies to an image to start from"),
        ({"like": "x.png", "strength": 0}, "strength is 0; give a number above 0"),
        ({"like": "x.png", "strength": float("nan")}, "strength is nan"),
        ({"like": "x.png", "strength": True}, "strength is True"),
        ({"n": 4, "best_of": 3}, "best_of is 3; give an integer of at least 4"),
        ({"n": 4, "best_of": True}, "best_of is True"),
        ({"best_of": 5, "budget": 4}, "budget is 4; give an integer of at least 5"),
        ({"min_score": 1.5}, "min_score is 1.5; it is a cosine"),
        ({"max_similarity": float("nan")}, "max_similarity is nan"),
        ({"max_similarity": "high"}, "max_similarity is 'high'"),
        ({"safety": "strict"}, "safety is 'strict'; give a function"),
        ({"n": 10**18}, "up to 1,000,000,000,000,000,000 candidates of a prompt; give at most 100,000"),
        ({"min_score": 0.1, "budget": 10**9}, "give at most 100,000"),
        ({"lora": [["light"]]}, r"lora names \['light'\]; give the name of a LoRA"),
        ({"lora": [("light", 0.5)]}, "lora names"),
        ({"lora": 7}, "lora names 7"),
    ],
)
def test_options_report_what_is_accepted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GenerationOptions(**options)


def test_options_are_public_and_frozen() -> None:
    options = unidiff_sdk.GenerationOptions(n=np.int64(3), negative_prompt=None, guidance_scale=7)
    assert (options.n, type(options.n)) == (3, int) and options.negative_prompt == ""
    assert isinstance(options.guidance_scale, float)
    with pytest.raises(FrozenInstanceError):
        options.n = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"n": 3}, 3),
        ({"n": 3, "best_of": 5}, 5),  # nothing can be rejected
        ({"n": 3, "best_of": 5, "min_score": 0.1}, 20),
        ({"n": 3, "safety": lambda image: image, "budget": 4}, 4),
    ],
)
def test_seeds_of_all_candidates_fit_into_a_payload(options: dict[str, Any], most: int) -> None:
    assert GenerationOptions(**options, seed=MAX_SEED - most + 1).max_candidates == most
    with pytest.raises(OptionError, match=f"and {most} images may use the seeds from it on; give at most"):
        GenerationOptions(**options, seed=MAX_SEED - most + 2)


def test_prompts_are_texts() -> None:
    assert checked_prompts("boots") == ["boots"]
    assert checked_prompts(iter(["boots", "a coat"])) == ["boots", "a coat"]
    for wrong in (None, 3, ["boots", None], b"boots"):
        with pytest.raises(OptionError, match="give a text, or a list of texts"):
            checked_prompts(wrong)
