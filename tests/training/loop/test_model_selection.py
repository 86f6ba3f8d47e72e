"""Which weights a run ends with: early stopping and WiSE-FT against weights that were caught on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.errors import CheckpointError, OptionError, TrainingError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import TRAINING_STATE, load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.merging import merged_state_dict  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.evaluation.validation import Validator  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.loop.wise_ft import ALPHAS  # noqa: E402
from unidiff_sdk.training.reporting.report import write_report  # noqa: E402
from unidiff_sdk.training.reporting.run_log import RunLog  # noqa: E402
from unidiff_sdk.training.runtime.callbacks import Moment, Validated  # noqa: E402

FEW = {"steps": 6, "batch_size": 5, "warmup_steps": 0, "learning_rate": 1e-2, "lambda_rsc": 0.0, "validate_every": 1}


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
    """A validation whose scores are written down beforehand; keeps the weights that it was shown."""

    def __init__(self, scores: list[float]) -> None:
        self.scores, self.seen, self.steps = scores, {}, []

    def __call__(self, moment: Moment) -> Validated:
        self.steps.append(moment.step)
        self.seen.setdefault(moment.step, weights(moment.checkpoint))
        return Validated(self.scores[moment.step])


def test_a_run_that_tunes_the_unet_alone_is_judged_by_it(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    scores: list[float] = []
    look = Validator(small_catalog)

    def watched(moment: Moment) -> Validated:
        scores.append((validated := look(moment)).score)
        return validated

    config = TrainingConfig(**FEW | {"steps": 2}, lock_text=True, lock_image=True)  # ITC has a weight, and no part
    train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=watched)
    assert all(score < 0 for score in scores) and len(set(scores)) == len(scores)


# --- early stopping --------------------------------------------------------------------------------------------------


def test_a_run_without_progress_stops_with_its_best_weights(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    look = Script([0.1, 0.3, 0.5, 0.2, 0.5, 0.9, 0.9])
    config = TrainingConfig(**FEW, patience=2)
    result = train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=look)
    assert look.steps == [0, 1, 2, 3, 4, 4], "an equal look is no better one; the last is at what is kept"
    assert result.steps == 4
    assert result.chosen == {"early_stopping": {"stopped_at": 4, "step": 2, "score": 0.5}, "score": 0.5}
    saved = load_checkpoint(tmp_path / "run")
    assert equal(weights(saved), look.seen[2]) and not equal(look.seen[2], look.seen[4])
    assert saved.meta["chosen"] == result.chosen and saved.meta["step"] == 4


def test_the_best_weights_are_kept_where_the_run_goes_to_its_end(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    look = Script([0.1, 0.3, 0.2, 0.2, 0.4, 0.3, 0.3])
    config = TrainingConfig(**FEW, patience=3)
    result = train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=look)
    assert result.steps == 6 and result.chosen["early_stopping"]["step"] == 4
    assert equal(weights(load_checkpoint(tmp_path / "run")), look.seen[4])


@pytest.mark.parametrize("at", [2, 3, 4])
def test_an_interrupted_run_stops_where_it_would_have(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, at: int
) -> None:
    """Interrupted before the look of a step, so that this look is made up for: nothing hangs on where it was."""
    config = TrainingConfig(**FEW, patience=2)
    scores = [0.1, 0.3, 0.5, 0.2, 0.1, 0.9, 0.9]

    def interrupt(report) -> None:
        if report.step == at:
            raise KeyboardInterrupt

    def run(name: str, look: Script, **more: object):
        return train(small_catalog, random_checkpoint, tmp_path / name, config, on_validate=look, device="cpu", **more)

    whole = run("whole", Script(scores))
    first, second = Script(scores), Script(scores)
    with pytest.raises(KeyboardInterrupt):
        run("parts", first, on_step=interrupt)
    assert first.steps[-1] == at - 1
    resumed = run("parts", second, resume=True)
    assert second.steps[0] == at and (resumed.steps, resumed.chosen) == (whole.steps, whole.chosen)
    a, b = (weights(load_checkpoint(tmp_path / name)) for name in ("whole", "parts"))
    assert equal(a, b)


def test_looks_that_decide_are_part_of_the_run(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(report) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    def run(**more: object):
        config = TrainingConfig(**(FEW | {"patience": 2} | more))
        look = Script([0.5] + [0.1] * 6)
        train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=look, resume=True)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "unidiff_sdk.training.loop.trainer.StepReport", lambda step, *_: interrupt(type("R", (), {"step": step}))
        )
        run()
    with pytest.raises(TrainingError, match="has validate_every 1, not 2"):
        run(validate_every=2)
    (tmp_path / "run" / TRAINING_STATE / "best.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        run()


def test_looks_that_decide_are_at_the_same_pairs(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    def run(pairs: str, **more: object) -> None:
        def look(moment: Moment) -> Validated:
            return Validated(0.5, measured_on=pairs)

        config = TrainingConfig(**(FEW | {"patience": 9}))
        train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=look, **more)

    def interrupt(report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("these", on_step=interrupt)
    with pytest.raises(OptionError, match=r"other pairs than those before.*--val"):
        run("others", resume=True)
    run("these", resume=True)


@pytest.mark.parametrize("setting", [{"patience": 1}, {"wise_ft": True}], ids=str)
def test_without_looks_nothing_can_be_chosen(
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
    """Scores that are highest where the weights are at the given mixtures; measured on one weight of each half."""

    def __init__(self, **peaks: float) -> None:
        self.peaks, self.base, self.tuned, self.quick = peaks, {}, {}, 0

    def __call__(self, moment: Moment) -> Validated:
        now = weights(moment.checkpoint)
        if moment.step == 0:
            self.base = now
        elif not moment.quick and not self.tuned:
            self.tuned = now
        self.quick += moment.quick
        miss = {half: abs(self.alpha(half, now) - peak) for half, peak in self.peaks.items()} if self.tuned else {}
        figures = {"denoising_loss": miss.get("generator", 0.0)}
        return Validated(-miss.get("encoder", 0.0), figures)

    def alpha(self, half: str, now: dict[str, torch.Tensor]) -> float:
        """The mixture that the weights stand at, by least squares."""
        base, tuned, here = (of[MEASURED[half]] for of in (self.base, self.tuned, now))
        return float(((here - base) * (tuned - base)).sum() / (tuned - base).square().sum())


@pytest.mark.parametrize("lora", [0, 2], ids=["full", "adapters"])
def test_each_half_ends_at_its_best_mixture(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, lora: int
) -> None:
    look = Peak(encoder=0.4, generator=0.72)
    settings = {"steps": 2, "validate_every": 2, "wise_ft": True}
    ranks = dict.fromkeys(("lora_unet", "lora_text", "lora_image"), lora)
    config = TrainingConfig(**(FEW | settings | ranks))
    result = train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=look)
    alphas = {half: found["alpha"] for half, found in result.chosen["wise_ft"].items()}
    assert alphas == {"encoder": 0.4, "generator": 0.7} and look.quick == 22
    assert [alpha for alpha, _ in result.chosen["wise_ft"]["encoder"]["sweep"]] == list(ALPHAS)
    saved = load_checkpoint(tmp_path / "run")
    assert json.loads(json.dumps(saved.meta["chosen"])) == json.loads(json.dumps(result.chosen))
    for name, tensor in weights(saved).items():
        alpha = alphas["generator" if name.startswith("unet.") else "encoder"]
        expected = (1 - alpha) * look.base[name] + alpha * look.tuned[name]
        torch.testing.assert_close(
            tensor, expected, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_sweep_that_is_cut_off_costs_no_step(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    config = TrainingConfig(**(FEW | {"steps": 2, "wise_ft": True}))
    steps: list[int] = []

    def run(name: str, cut_off: bool = False, **more: object):
        def look(moment: Moment) -> Validated:
            if cut_off and moment.quick:
                raise KeyboardInterrupt
            return Validated(0.5, {"denoising_loss": 0.5})

        return train(
            *(small_catalog, random_checkpoint, tmp_path / name, config),
            **{"device": "cpu", "on_validate": look, "on_step": lambda report: steps.append(report.step)},
            **more,
        )

    with pytest.raises(KeyboardInterrupt):
        run("parts", cut_off=True)
    steps.clear()
    resumed = run("parts", resume=True)
    assert steps == [] and resumed.chosen == run("whole").chosen
    assert equal(*(weights(load_checkpoint(tmp_path / name)) for name in ("parts", "whole")))


def test_of_equal_mixtures_the_nearest_to_the_base_is_kept(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    """And an encoder that was not trained has no α of its own."""
    config = TrainingConfig(**(FEW | {"steps": 1, "wise_ft": True, "lambda_itc": 0.0}))
    result = train(
        small_catalog,
        random_checkpoint,
        tmp_path / "run",
        config,
        device="cpu",
        on_validate=lambda moment: Validated(0.5, {"denoising_loss": 0.5}),
    )
    assert {half: found["alpha"] for half, found in result.chosen["wise_ft"].items()} == {"generator": 0.0}
    assert equal(weights(load_checkpoint(tmp_path / "run")), weights(load_checkpoint(random_checkpoint)))


def test_a_quick_look_draws_nothing_and_tells_nobody(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WiSE-FT by the real validation, after early stopping; the report shows both."""
    monkeypatch.setattr(
        "unidiff_sdk.training.evaluation.validation.SAMPLER", {"name": "dpm++2m", "steps": 2, "guidance_scale": 2.0}
    )
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
    look = Validator(small_catalog, [log], prompts=["a red dress"])
    config = TrainingConfig(**(FEW | {"steps": 2, "wise_ft": True, "patience": 1, "lambda_itc": 1.0}))
    result = train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", on_validate=look)
    log.finish(pairs=12, chosen=result.chosen)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log" / "validations.jsonl").read_text().splitlines()]
    assert steps in ([0, 1, 1], [0, 1, 2, 2])
    best = max(score for _, score in result.chosen["wise_ft"]["encoder"]["sweep"])
    assert result.chosen["score"] == best
    page = write_report(tmp_path / "log", tmp_path / "report.html").read_text(encoding="utf-8")
    assert "How the weights were chosen" in page and "Encoder: from the base to the tuned" in page
    assert f"step {result.chosen['early_stopping']['step']}" in page
