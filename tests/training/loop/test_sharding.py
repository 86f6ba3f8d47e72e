"""Sharded training (FSDP2): two processes over gloo take the run of one process, and store half of the weights each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from support.sharded_run import in_two_processes, run  # noqa: E402

from unidiff_sdk.errors import OptionError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.loop.resume import unfinished  # noqa: E402
from unidiff_sdk.training.loop.trainer import _require_equal_shares, train  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.reporting.run_log import read_log  # noqa: E402
from unidiff_sdk.training.runtime.processes import Processes  # noqa: E402

# All terms, in batches that two processes divide equally: of four pairs in a process, two pass through the UNet.
EVERYTHING = {
    "steps": 3,
    "batch_size": 4,
    "contrastive_batch": 8,
    "micro_batch": 3,
    "hard_negatives": 1,
    "lambda_rsc_encoder": 0.3,
    "lambda_rsc_generator": 0.6,
    "lambda_rsc_reward": 0.2,
    "rsc_captions": 4,
    "rsc_reward_captions": 2,
    "rsc_reward_steps": 2,
    "rsc_reward_last": 2,
    "lambda_feature_distillation": 0.4,
    "caption_dropout": 0.3,
    "flip": True,
    "warmup_steps": 1,
    "rsc_warmup_steps": 1,
    "patience": 3,
    "wise_ft": True,
    "validate_every": 2,
}
# Adapters beside frozen weights, and recomputed activations.
ADAPTED = {
    "steps": 4,
    "batch_size": 6,
    "micro_batch": 2,
    "lora_unet": 2,
    "lora_text": 2,
    "checkpoint_activations": True,
    "warmup_steps": 1,
    "gradient_clip": 0.3,
}


def assert_same_losses(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert ours
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Equal but for rounding, which AdamW amplifies where gradients are near zero."""
    a, b = (JointModel(load_checkpoint(path)).state_dict() for path in (ours, theirs))
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_sharded_run_equals_that_of_one_process(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    """Losses, the choice of the final weights, and those weights. Each process stores half of what is sharded."""
    request: dict[str, Any] = {"data": small_catalog, "base": random_checkpoint, "validate": True}
    whole = run(**request, out=tmp_path / "one", settings=EVERYTHING)
    ranks = in_two_processes(**request, out=tmp_path / "two", settings=EVERYTHING | {"shard": True})
    assert_same_losses(ranks[0]["losses"], whole["losses"])
    assert ranks[0]["chosen"]["wise_ft"].keys() == {"encoder", "generator"}
    for half, sweep in whole["chosen"]["wise_ft"].items():
        scores, others = (
            [score for _, score in each] for each in (sweep["sweep"], ranks[0]["chosen"]["wise_ft"][half]["sweep"])
        )
        assert others == pytest.approx(scores, rel=1e-3)
    assert_same_weights(tmp_path / "two", tmp_path / "one")
    assert_shares(*(rank["stored"] for rank in ranks))


def assert_shares(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Both processes together store each sharded weight once, with its average and its moments."""
    sharded = 0
    for name, (size, stored) in first.items():
        others = second[name][1]
        if stored[0] < size:
            assert [a + b for a, b in zip(stored, others, strict=True)] == [size] * len(stored), name
            sharded += size
        else:
            assert set(stored) == set(others) == {size}, name
    total = sum(size for size, _ in first.values())
    assert sharded > 0.9 * total
    for rank in (first, second):
        assert sum(stored[0] for _, stored in rank.values()) < 0.6 * total


@pytest.mark.slow
def test_saved_state_fits_any_number_of_processes(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    """Saved by two sharded processes after two steps and resumed by one, and the other way round."""
    request: dict[str, Any] = {"data": small_catalog, "base": random_checkpoint}
    whole = run(**request, out=tmp_path / "whole", settings=ADAPTED)["losses"]
    sharded = ADAPTED | {"shard": True}

    first = in_two_processes(**request, out=tmp_path / "two-one", settings=sharded, stop_after=2)[0]["losses"]
    assert unfinished(tmp_path / "two-one") and len(first) == 2
    rest = run(**request, out=tmp_path / "two-one", settings=ADAPTED, resume=True)["losses"]
    assert_same_losses(first + rest, whole)
    assert_same_weights(tmp_path / "two-one", tmp_path / "whole")

    first = run(**request, out=tmp_path / "one-two", settings=ADAPTED, stop_after=2)["losses"]
    rest = in_two_processes(**request, out=tmp_path / "one-two", settings=sharded, resume=True)[0]["losses"]
    assert_same_losses(first + rest, whole)
    assert_same_weights(tmp_path / "one-two", tmp_path / "whole")


# --- bad input -------------------------------------------------------------------------------------------------------


def test_sharding_needs_several_processes(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="shard is set, but there is only one process"):
        train(small_catalog, random_checkpoint, tmp_path / "out", TrainingConfig(shard=True), device="cpu")


@pytest.mark.parametrize("others", [{"precision": "fp16"}, {"aspect_buckets": True}], ids=["fp16", "buckets"])
def test_unsupported_combination_is_refused(others: dict[str, Any]) -> None:
    TrainingConfig(**others)
    with pytest.raises(OptionError, match=f"shard and {next(iter(others))}"):
        TrainingConfig(shard=True, **others)


@pytest.mark.parametrize(
    ("settings", "pairs", "name"),
    [
        ({"batch_size": 5}, 12, "batch_size"),
        ({"batch_size": 64}, 11, "batch_size"),
        ({"batch_size": 4, "contrastive_batch": 7}, 12, "contrastive_batch"),
        ({"batch_size": 4, "lambda_rsc_encoder": 1.0, "rsc_captions": 3}, 12, "rsc_captions"),
        ({"batch_size": 4, "lambda_rsc_reward": 1.0, "rsc_reward_captions": 3}, 12, "rsc_reward_captions"),
    ],
)
def test_shares_of_different_size_are_refused(settings: dict[str, Any], pairs: int, name: str) -> None:
    processes = Processes(0, 2, torch.device("cpu"))
    _require_equal_shares(TrainingConfig(**settings), pairs, processes)
    with pytest.raises(OptionError, match=rf"^{name}: \d+ samples cannot be divided equally among 2 processes"):
        _require_equal_shares(TrainingConfig(**settings, shard=True), pairs, processes)


@pytest.mark.slow
def test_torchrun_trains_as_one_process_does(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    """The launcher sets the environment of the processes, and the command joins them."""
    script = Path(sys.executable).with_name("unidiff-train")
    if not script.is_file():
        pytest.skip("needs the installed commands")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    settings = ["--steps", "3", "--batch-size", "4", "--micro-batch", "2", "--device", "cpu"]
    losses = {}
    for name, launcher, options in [("one", [], []), ("whole", torchrun, []), ("sharded", torchrun, ["--shard"])]:
        base = ["--base", str(random_checkpoint), "-o", str(tmp_path / name)]
        command = [*launcher, str(script), str(small_catalog), *base, *settings, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        losses[name] = [step["losses"] for step in read_log(tmp_path / f"{name}.log").steps]
        assert len(losses[name]) == 3
        assert_same_losses(losses[name], losses["one"])
        assert_same_weights(tmp_path / name, tmp_path / "one")
