"""Configurations, tokenizers and manifests with valid hashes and odd content: a BundleError, and nothing else."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toy_bundle import make_toy_bundle, seal

from unidiff_sdk.errors import BundleError, UniDiffError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.schedule import Schedule

MUTATIONS = 60  # for each file
FILES = [
    "manifest.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae_decoder/config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
]
ODD_VALUES: list[Any] = [None, True, 0, -1, 1, 2.5, 10**9, 2**63, -(10**40), 1e-300, 1e300, float("nan"), float("inf")]
ODD_VALUES += ["", "x", "\0", "\ud800", "x" * 5000, [], [[]], {}, {"a": 1}, [1, 2, 3], ["x"], [None]]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in a JSON document; of long lists only the start."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:8]) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places(child, (*path, key))


def with_odd_value(document: Any, rng: random.Random) -> Any:
    document = copy.deepcopy(document)
    *path, key = rng.choice(list(places(document)))
    section = document
    for each in path:
        section = section[each]
    if rng.random() < 0.2:
        del section[key]
    else:
        section[key] = rng.choice(ODD_VALUES)
    return document


def use(folder: Path) -> None:
    bundle = Bundle.open(folder, threads=1)
    repr(bundle)
    bundle.warmup()
    Encoder(bundle).encode_text("a red coat")
    Encoder(bundle).encode_images([np.full((20, 24, 3), 90, np.uint8)])
    for sampler in ("dpm++2m_karras", "ddim", "lcm"):
        Generator(bundle).generate("a coat", steps=2, sampler=sampler)


@pytest.mark.parametrize("name", FILES)
def test_mutated_file_raises_no_foreign_error(tmp_path: Path, name: str) -> None:
    folder = make_toy_bundle(tmp_path / "toy")
    manifest = json.loads((folder / "manifest.json").read_text())
    content, results = json.loads((folder / name).read_text()), []
    for seed in range(MUTATIONS):
        changed = with_odd_value(content, random.Random(seed))
        if name == "manifest.json":
            seal(folder, changed)
        else:
            (folder / name).write_text(json.dumps(changed))
            seal(folder, manifest)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # of numpy: an overflow, a division by zero
            try:
                use(folder)
                results.append("valid")
            except UniDiffError:
                results.append("refused")
    assert "refused" in results


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000; it must be an integer from 1 to 100000"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"beta_start": -0.1}, "beta_start is -0.1; it must be a number from 1e-09 to 0.9999"),
        ({"beta_end": float("nan")}, "beta_end is nan"),
        ({"trained_betas": []}, r"trained_betas is \[\]; it must be a list of 1 to 100000 numbers"),
        ({"trained_betas": [0.1, "x"]}, "trained_betas is 'x'"),
        ({"trained_betas": [0.1, 1.5]}, r"trained_betas is 1\.5"),
        ({"steps_offset": 10**12}, "steps_offset is 1000000000000; it must be an integer from 0 to 1000"),
        ({"steps_offset": [1]}, r"steps_offset is \[1\]"),
        ({"original_inference_steps": 2000}, "original_inference_steps is 2000"),
        ({"timestep_scaling": 0}, "timestep_scaling is 0; it must be a number from 1e-06 to 1e"),
        ({"beta_start": 0.85, "beta_end": 0.9}, "does not add noise at each of its 1000 timesteps"),
        ({"prediction_type": ["epsilon"]}, "is not supported"),
        ({"timestep_spacing": {}}, "is not supported"),
    ],
)
def test_schedule_of_odd_values_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Schedule.from_config(config)


def test_schedule_accepts_the_forms_of_diffusers() -> None:
    betas = np.linspace(0.01, 0.02, 10)
    of_array, of_list = (Schedule.from_config({"trained_betas": value}) for value in (betas, betas.tolist()))
    np.testing.assert_array_equal(of_array.alphas_cumprod, of_list.alphas_cumprod)
    assert of_list.original_inference_steps == 10
    assert Schedule.from_config({"num_train_timesteps": 1000.0}).num_train_timesteps == 1000
