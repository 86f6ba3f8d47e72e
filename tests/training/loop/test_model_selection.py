"""Model selection: the final weights of early stopping and WiSE-FT, compared with weights recorded on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.errors import CheckpointError, OptionError, TrainingError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.saving import TRAINING_STATE, merged_state_dict  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.evaluation.validation import Validator  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.loop.wise_ft import ALPHAS  # noqa: E402
from unidiff_sdk.training.reporting.report import write_report  # noqa: E402
from unidiff_sdk.training.reporting.run_log import RunLog  # noqa: E402
from unidiff_sdk.training.runtime.callbacks import ModelSnapshot, ValidationResult  # noqa: E402

FEW = {"steps": 6, "batch_size": 5, "warmup_steps": 0, "learning_rate": 1e-2, "validate_every": 1}


def weights(checkpoint) -> dict[str, torch.Tensor]:
    parts = {"unet": checkpoint.unet, "clip": checkpoint.clip}
    return {
        f"{part}.{name}": tensor.clone()
        for part, model in parts.items()
        for name, tensor in merged_state_dict(model).items()
    }


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Script:
    """A validation with given scores, which records the weights that it receives."""

    def __init__(self, scores: list[float]) -> None:
        self.scores, self.weights, self.steps = scores, {}, []

    def __call__(self, snapshot: ModelSnapshot) -> ValidationResult:
        self.steps.append(snapshot.step)
        self.weights.setdefault(snapshot.step, weights(snapshot.checkpoint))
        return ValidationResult(self.scores[snapshot.step])


def test_run_that_tunes_the_unet_alone_is_scored_by_its_denoising_loss(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    scores: list[float] = []
    validator = Validator(small_catalog)

    def validate(snapshot: ModelSnapshot) -> ValidationResult:
        scores.append((result := validator(replace(snapshot, score_only=True))).score)
        return result

    # ITC has a weight, but trains nothing.
    config = TrainingConfig(**FEW | {"steps": 2}, lock_text=True, lock_image=True)
    train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=validate)
    assert all(score < 0 for score in scores) and len(set(scores)) == len(scores)


# --- early stopping --------------------------------------------------------------------------------------------------


def test_run_without_improvement_stops_with_its_best_weights(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    validation = Script([0.1, 0.3, 0.5, 0.2, 0.5, 0.9, 0.9])
    config = TrainingConfig(**FEW, patience=2)
    result = train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=validation)
    assert validation.steps == [0, 1, 2, 3, 4, 4], (
        "an equal score is no improvement; the last validation measures the kept weights"
    )
    assert result.steps == 4
    assert result.chosen == {"early_stopping": {"stopped_at": 4, "step": 2, "score": 0.5}, "score": 0.5}
    saved = load_checkpoint(tmp_path / "run")
    assert equal(weights(saved), validation.weights[2]) and not equal(validation.weights[2], validation.weights[4])
    assert saved.meta["chosen"] == result.chosen and saved.meta["step"] == 4


def test_complete_run_keeps_its_best_weights(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    validation = Script([0.1, 0.3, 0.2, 0.2, 0.4, 0.3, 0.3])
    config = TrainingConfig(**FEW, patience=3)
    result = train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=validation)
    assert result.steps == 6 and result.chosen["early_stopping"]["step"] == 4
    assert equal(weights(load_checkpoint(tmp_path / "run")), validation.weights[4])


@pytest.mark.parametrize("at", [2, 3, 4])
def test_interrupted_run_stops_early_at_the_same_step(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, at: int
) -> None:
    """Interrupted before the validation of a step, which the resumed run then does."""
    config = TrainingConfig(**FEW, patience=2)
    scores = [0.1, 0.3, 0.5, 0.2, 0.1, 0.9, 0.9]

    def interrupt(report) -> None:
        if report.step == at:
            raise KeyboardInterrupt

    def run(name: str, validation: Script, **more: object):
        return train(
            small_catalog, random_checkpoint, tmp_path / name, config, on_validate=validation, device="cpu", **more
        )

    whole = run("whole", Script(scores))
    first, second = Script(scores), Script(scores)
    with pytest.raises(KeyboardInterrupt):
        run("parts", first, on_step=interrupt)
    assert first.steps[-1] == at - 1
    resumed = run("parts", second, resume=True)
    assert second.steps[0] == at and (resumed.steps, resumed.chosen) == (whole.steps, whole.chosen)
    a, b = (weights(load_checkpoint(tmp_path / name)) for name in ("whole", "parts"))
    assert equal(a, b)


def test_validation_interval_belongs_to_a_run_with_early_stopping(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    def interrupt(report) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    def run(on_step=lambda report: None, **settings: object):
        config = TrainingConfig(**(FEW | {"patience": 2} | settings))
        train(
            *(small_catalog, random_checkpoint, tmp_path / "run", config),
            **{"device": "cpu", "on_validate": Script([0.5] + [0.1] * 6), "on_step": on_step, "resume": True},
        )

    with pytest.raises(KeyboardInterrupt):
        run(on_step=interrupt)
    with pytest.raises(TrainingError, match="has validate_every 1, not 2"):
        run(validate_every=2)
    (tmp_path / "run" / TRAINING_STATE / "best.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="Cannot resume from"):
        run()


def test_validation_pairs_belong_to_a_run_with_early_stopping(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    def run(pairs: str, **more: object) -> None:
        def validate(snapshot: ModelSnapshot) -> ValidationResult:
            return ValidationResult(0.5, data_fingerprint=pairs)

        config = TrainingConfig(**(FEW | {"patience": 9}))
        train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=validate, **more)

    def interrupt(report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("these", on_step=interrupt)
    with pytest.raises(OptionError, match=r"validation pairs differ.*--val"):
        run("others", resume=True)
    run("these", resume=True)


@pytest.mark.parametrize("setting", [{"patience": 1}, {"wise_ft": True}], ids=str)
def test_choosing_weights_without_validation_is_refused(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, setting: dict
) -> None:
    with pytest.raises(OptionError, match="--val"):
        train(small_catalog, random_checkpoint, tmp_path / "run", TrainingConfig(**(FEW | setting)), device="cpu")
    assert not (tmp_path / "run").exists()


# --- WiSE-FT ---------------------------------------------------------------------------------------------------------


MEASURED = {
    "encoder": "clip.vision_model.encoder.layers.1.self_attn.q_proj.weight",
    "generator": "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight",
}


class Peak:
    """Scores that peak at given values of α, measured on one weight of each half."""

    def __init__(self, **peaks: float) -> None:
        self.peaks, self.base, self.tuned, self.score_only = peaks, {}, {}, 0

    def __call__(self, snapshot: ModelSnapshot) -> ValidationResult:
        now = weights(snapshot.checkpoint)
        if snapshot.step == 0:
            self.base = now
        elif not snapshot.score_only and not self.tuned:
            self.tuned = now
        self.score_only += snapshot.score_only
        miss = {half: abs(self.alpha(half, now) - peak) for half, peak in self.peaks.items()} if self.tuned else {}
        figures = {"denoising_loss": miss.get("generator", 0.0)}
        return ValidationResult(-miss.get("encoder", 0.0), figures)

    def alpha(self, half: str, now: dict[str, torch.Tensor]) -> float:
        """α of the current weights, by least squares."""
        base, tuned, here = (of[MEASURED[half]] for of in (self.base, self.tuned, now))
        return float(((here - base) * (tuned - base)).sum() / (tuned - base).square().sum())


@pytest.mark.parametrize("lora", [0, 2], ids=["full", "adapters"])
def test_wise_ft_finds_the_best_alpha_of_each_half(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, lora: int
) -> None:
    peak = Peak(encoder=0.4, generator=0.72)
    settings = {"steps": 2, "validate_every": 2, "wise_ft": True}
    ranks = dict.fromkeys(("lora_unet", "lora_text", "lora_image"), lora)
    config = TrainingConfig(**(FEW | settings | ranks))
    result = train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=peak)
    alphas = {half: found["alpha"] for half, found in result.chosen["wise_ft"].items()}
    assert alphas == {"encoder": 0.4, "generator": 0.7} and peak.score_only == 22
    assert [alpha for alpha, _ in result.chosen["wise_ft"]["encoder"]["sweep"]] == list(ALPHAS)
    saved = load_checkpoint(tmp_path / "run")
    assert json.loads(json.dumps(saved.meta["chosen"])) == json.loads(json.dumps(result.chosen))
    for name, tensor in weights(saved).items():
        alpha = alphas["generator" if name.startswith("unet.") else "encoder"]
        expected = (1 - alpha) * peak.base[name] + alpha * peak.tuned[name]
        torch.testing.assert_close(
            tensor, expected, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_interrupted_sweep_loses_no_step(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    config = TrainingConfig(**(FEW | {"steps": 2, "wise_ft": True}))
    steps: list[int] = []

    def run(name: str, cut_off: bool = False, **more: object):
        def validate(snapshot: ModelSnapshot) -> ValidationResult:
            if cut_off and snapshot.score_only:
                raise KeyboardInterrupt
            return ValidationResult(0.5, {"denoising_loss": 0.5})

        return train(
            *(small_catalog, random_checkpoint, tmp_path / name, config),
            **{"device": "cpu", "on_validate": validate, "on_step": lambda report: steps.append(report.step)},
            **more,
        )

    with pytest.raises(KeyboardInterrupt):
        run("parts", cut_off=True)
    steps.clear()
    resumed = run("parts", resume=True)
    assert steps == [] and resumed.chosen == run("whole").chosen
    assert equal(*(weights(load_checkpoint(tmp_path / name)) for name in ("parts", "whole")))


def test_wise_ft_prefers_the_base_among_equals(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    """An encoder that was not trained has no α."""
    config = TrainingConfig(**(FEW | {"steps": 1, "wise_ft": True, "lambda_itc": 0.0}))
    result = train(
        small_catalog,
        random_checkpoint,
        tmp_path / "run",
        config,
        device="cpu",
        on_validate=lambda snapshot: ValidationResult(0.5, {"denoising_loss": 0.5}),
    )
    assert {half: found["alpha"] for half, found in result.chosen["wise_ft"].items()} == {"generator": 0.0}
    assert equal(weights(load_checkpoint(tmp_path / "run")), weights(load_checkpoint(random_checkpoint)))


def test_sweep_generates_no_samples_and_notifies_no_callback(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    """WiSE-FT with the real validation after early stopping. The report shows both."""
    about = {
        "name": "shop",
        "base": "b",
        "data": "d",
        "val": "v",
        "command": "unidiff-train d",
        "config": {},
        "versions": {},
    }
    log = RunLog(tmp_path / "log", about)
    validator = Validator(small_catalog, [log], prompts=["a red dress"], steps=2)
    config = TrainingConfig(**(FEW | {"steps": 2, "wise_ft": True, "patience": 1, "lambda_itc": 1.0}))
    result = train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=validator)
    log.finish(pairs=12, chosen=result.chosen)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log" / "validations.jsonl").read_text().splitlines()]
    assert steps in ([0, 1, 1], [0, 1, 2, 2])
    best = max(score for _, score in result.chosen["wise_ft"]["encoder"]["sweep"])
    assert result.chosen["score"] == best
    page = write_report(tmp_path / "log", tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Choice of the weights" in page and "Encoder: from base (0) to tuned (1)" in page
    assert f"step {result.chosen['early_stopping']['step']}" in page
