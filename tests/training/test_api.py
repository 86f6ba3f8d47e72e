"""The public names of `unidiff_sdk.training`, and configurations read from JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from unidiff_sdk.errors import OptionError
from unidiff_sdk.training import TrainingConfig


def test_import_does_not_import_torch() -> None:
    script = (
        "import sys\n"
        "from unidiff_sdk.training import DistillationConfig, PriorConfig, TrainingConfig\n"
        "assert TrainingConfig().steps > 0 and DistillationConfig().steps > 0 and PriorConfig\n"
        "assert not {'torch', 'transformers', 'diffusers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_can_be_imported() -> None:
    pytest.importorskip("torch", reason="needs the train extra")
    import unidiff_sdk.training as training

    assert all(getattr(training, name).__doc__ for name in training.__all__)
    assert set(training.__all__) <= set(dir(training))
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        _ = training.fit


def test_config_reads_its_own_json() -> None:
    config = replace(TrainingConfig(), group=("sku", "colour"), steps=7, fit="pad")
    assert TrainingConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_config_reads_names_of_earlier_versions() -> None:
    assert TrainingConfig.from_dict({"lambda_leash": 0.5}).lambda_feature_distillation == 0.5


def test_config_reads_removed_settings_that_had_no_effect() -> None:
    removed = {"lambda_rsc": 0.0, "lambda_rsc_feature": 0.0, "rsc_t_max": 300, "rsc_teacher": "ema"}
    assert TrainingConfig.from_dict({"steps": 7} | removed) == TrainingConfig(steps=7)
    with pytest.raises(OptionError, match="lambda_rsc is the weight of a term that this version does not have"):
        TrainingConfig.from_dict({"lambda_rsc": 0.1})


def test_config_refuses_unknown_names() -> None:
    with pytest.raises(OptionError, match=r"Unknown setting 'lambda_x'\. Settings: steps, batch_size"):
        TrainingConfig.from_dict({"lambda_x": 0.5})
