"""Looks at a model in training, the log that they go to, and the report that is made of it."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.errors import DataError, OptionError, TrainingError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.cli import train as train_command  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.batches import load_pairs  # noqa: E402
from unidiff_sdk.training.evaluation import validation  # noqa: E402
from unidiff_sdk.training.evaluation.evaluate import embed, retrieval  # noqa: E402
from unidiff_sdk.training.evaluation.validation import Validation, Validator, denoising_loss  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.reporting import tensorboard  # noqa: E402
from unidiff_sdk.training.reporting.report import write_report  # noqa: E402
from unidiff_sdk.training.reporting.run_log import RunLog, read_log  # noqa: E402
from unidiff_sdk.training.runtime.callbacks import Moment, StepReport  # noqa: E402

ABOUT = {"name": "shop", "base": "tiny", "data": "d", "val": "v", "command": "unidiff-train d", "config": {"steps": 9}}
ABOUT |= {"versions": {"torch": "2"}}


class Kept:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.looks: list[Validation] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_validation(self, look: Validation) -> None:
        self.looks.append(look)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "SAMPLER", {"name": "dpm++2m", "steps": 2, "guidance_scale": 2.0})


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(random_checkpoint)


def moment(checkpoint: Checkpoint, step: int = 0) -> Moment:
    return Moment(step, JointModel(checkpoint).eval(), checkpoint, TrainingConfig())


def a_look(step: int, *, caption: str = "a red dress") -> Validation:
    picture = np.full((8, 8, 3), step, np.uint8)
    hits = [(0, picture, caption, 0.9, True), (1, picture, "other", 0.1, False)]
    examples = [validation.Example(0, caption, 1, picture, hits), validation.Example(1, "other", 2, picture, hits)]
    names = ("denoising_loss", "image_effective_rank", "text_effective_rank", "image_mean_cosine", "mean_recall")
    ways = [f"{way} {k}" for way in ("text_to_image", "image_to_text") for k in ("R@1", "R@5", "R@10", "median_rank")]
    figures = {name: 0.5 + step / 10 for name in (*names, *ways)}
    return Validation(step, figures, [caption, "boots"], [picture, picture + 1], [1, 2], examples)


def a_step(step: int) -> StepReport:
    return StepReport(step, 9, {"itc": 1.0 / step, "is": 0.5}, 1e-4, 0.1, 6)


# --- the look --------------------------------------------------------------------------------------------------------


def test_a_look_measures_what_the_evaluation_measures(checkpoint: Checkpoint, small_catalog: Path) -> None:
    kept = Kept()
    result = Validator(small_catalog, [kept])(moment(checkpoint))
    model, pairs = JointModel(checkpoint).eval(), load_pairs(small_catalog, checkpoint)
    keys = [("red",) if n in (0, 11) else (n,) for n in range(12)]
    expected = retrieval(*embed(model, checkpoint, pairs), keys)
    for way, figures in expected.items():
        for name, value in figures.items():
            assert result.figures[f"{way} {name}"] == pytest.approx(value)
    recalls = [value for figures in expected.values() for name, value in figures.items() if "R@" in name]
    assert result.score == pytest.approx(sum(recalls) / 6)
    (look,) = kept.looks
    assert len(look.samples) == len(look.prompts) == 8 and look.samples[0].shape == (32, 32, 3)
    assert all((example.rank == 1) == example.hits[0][4] for example in look.examples)
    assert [np.mean(np.array(look.ranks) <= 5)] == pytest.approx([expected["text_to_image"]["R@5"]])


def test_looks_at_the_same_weights_agree_and_leave_no_trace(checkpoint: Checkpoint, small_catalog: Path) -> None:
    validator, state = Validator(small_catalog, prompts=["a red dress"]), torch.get_rng_state()
    first, second = validator(moment(checkpoint)), validator(moment(checkpoint, 5))
    assert torch.equal(torch.get_rng_state(), state)
    without_time = [{name: v for name, v in look.figures.items() if name != "seconds"} for look in (first, second)]
    assert without_time[0] == without_time[1]


def test_training_is_the_same_with_and_without_looks(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(steps=2, batch_size=4, warmup_steps=1, validate_every=1, lambda_rsc=0)
    kept = Kept()
    for name, look in {"with": Validator(small_catalog, [kept]), "without": None}.items():
        train(small_catalog, random_checkpoint, tmp_path / name, config, device="cpu", on_validate=look)
    a, b = (load_checkpoint(tmp_path / name).unet.state_dict() for name in ("with", "without"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [look.step for look in kept.looks] == [0, 1, 2]
    assert kept.looks[0].figures["denoising_loss"] != kept.looks[2].figures["denoising_loss"]


def test_the_score_is_the_denoising_loss_where_the_encoder_is_not_trained(
    checkpoint: Checkpoint, small_catalog: Path
) -> None:
    alone = Moment(0, JointModel(checkpoint).eval(), checkpoint, TrainingConfig(lambda_itc=0))
    result = Validator(small_catalog)(alone)
    assert result.score == -result.figures["denoising_loss"]


def test_a_unet_that_knows_the_noise_has_no_loss(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle: with one and the same picture everywhere, epsilon = (z_t - √ᾱ z) / √(1-ᾱ)."""
    model = JointModel(checkpoint).eval()
    z = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(3))
    seen: list[int] = []

    def oracle(z_t: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> object:
        seen.extend(t.tolist())
        alpha_bar = model.alpha_bar[t][:, None, None, None]
        return type("Output", (), {"sample": (z_t - alpha_bar.sqrt() * z) / (1 - alpha_bar).sqrt()})

    monkeypatch.setattr(model.unet, "forward", oracle)
    ids = torch.zeros((6, 16), dtype=torch.int64)
    assert denoising_loss(model, z.expand(6, -1, -1, -1), ids) == pytest.approx(0, abs=1e-6)
    # 24 timesteps, one in each twenty-fourth of the schedule.
    assert sorted(t * 24 // len(model.alpha_bar) for t in seen) == list(range(24))


def test_the_loss_does_not_hang_on_the_batch(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = JointModel(checkpoint).eval()
    latents = torch.randn((5, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 300, (5, 16), generator=torch.Generator().manual_seed(0))
    whole = denoising_loss(model, latents, ids)
    monkeypatch.setattr(validation, "LOSS_BATCH", 3)
    assert denoising_loss(model, latents, ids) == pytest.approx(whole, rel=1e-5)


def test_a_single_pair_is_not_enough(checkpoint: Checkpoint, small_catalog: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((small_catalog / "0.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}', encoding="utf-8")
    with pytest.raises(DataError, match="at least two"):
        Validator(tmp_path)(moment(checkpoint))


# --- the log ---------------------------------------------------------------------------------------------------------


def test_a_log_reads_back_what_was_told(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log", ABOUT)
    log.on_validation(a_look(0))
    log.on_step(a_step(1))
    log.on_validation(a_look(1))
    log.finish(pairs=12)
    read = read_log(tmp_path / "log")
    assert [step["losses"]["itc"] for step in read.steps] == [1.0]
    assert [line["step"] for line in read.validations] == [0, 1] and read.validations[0]["ranks"] == [1, 2]
    assert [picture.size for picture in read.samples[1]] == [(8, 8), (8, 8)]
    assert read.examples[0]["hits"][1]["relevant"] is False and read.about["pairs"] == 12


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40])
def test_any_number_of_prompts_can_be_drawn(tmp_path: Path, n: int) -> None:
    """More than a WebP is wide: forty pictures of 512 px side by side would be."""
    look, side = a_look(0), 512
    samples = [np.full((side, side, 3), 6 * number, np.uint8) for number in range(n)]
    RunLog(tmp_path / "log", ABOUT).on_validation(replace(look, prompts=[f"{k}" for k in range(n)], samples=samples))
    read = read_log(tmp_path / "log").samples[0]
    assert [picture.size for picture in read] == n * [(side, side)]
    assert [round(np.asarray(picture).mean() / 6) for picture in read] == list(range(n))


def test_what_was_logged_past_the_resumed_step_goes(tmp_path: Path) -> None:
    first = RunLog(tmp_path / "log", ABOUT)
    for step in range(1, 6):
        first.on_step(a_step(step))
    for step in (0, 2, 4):
        first.on_validation(a_look(step))
    with (tmp_path / "log" / "steps.jsonl").open("a") as file:
        file.write('{"step": 6, "los')  # killed while it wrote
    second = RunLog(tmp_path / "log", ABOUT)
    second.on_step(a_step(4))
    read = read_log(tmp_path / "log")
    assert [step["step"] for step in read.steps] == [1, 2, 3, 4]
    assert list(read.samples) == [0, 2]


def test_a_folder_without_a_log(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no log"):
        read_log(tmp_path)
    (tmp_path / "log").write_text("a file")
    with pytest.raises(TrainingError, match="cannot be written"):
        RunLog(tmp_path / "log", ABOUT).on_step(a_step(1))


# --- the report ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Which elements are open, and every place that a page refers to."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.places: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)
        self.places += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_whole_file(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log", ABOUT)
    for step in range(0, 60):
        if step:
            log.on_step(a_step(step))
        if step % 4 == 0:
            log.on_validation(a_look(step, caption="<script>alert(1)</script> & boots"))
    text = write_report(tmp_path / "log", tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and all(place.startswith("data:") for place in page.places)
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; boots" in text
    assert page.counts["svg"] == 7
    # Two prompts at eight of the fifteen looks, and two examples of three pictures.
    assert page.counts["img"] == 2 * 8 + 2 * 3
    assert "step 0<" in text and "step 56<" in text and "unidiff-train d" in text
    assert "rank 1 → 1" in text and "rank 2 → 2" in text


def test_a_report_without_looks_shows_the_losses(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log", ABOUT)
    log.on_step(a_step(1))
    text = write_report(tmp_path / "log", tmp_path / "report.html").read_text(encoding="utf-8")
    assert Page(text).open == [] and "--val DATA" in text and "ITC" in text


def test_the_command_writes_the_report(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    arguments = [small_catalog, "--base", random_checkpoint, "-o", out, "--steps", 2, "--batch-size", 4]
    arguments += ["--val", small_catalog, "--validate-every", 2, "--prompt", "a red dress", "--rsc", 0]
    result = CliRunner().invoke(train_command, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "tuned.log" / "report.html") in result.stdout
    read = read_log(tmp_path / "tuned.log")
    assert [line["step"] for line in read.validations] == [0, 2] and read.validations[0]["prompts"] == ["a red dress"]
    assert read.about["pairs"] == 12 and read.about["config"]["steps"] == 2
    assert json.loads((out / "unidiff.json").read_text())["step"] == 2
    refused = CliRunner().invoke(train_command, [str(small_catalog), "--base", "tiny", "-o", "x", "--prompt", "a"])
    assert refused.exit_code == 1 and "--val" in refused.stderr


def test_tensorboard_gets_curves_and_samples(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = tensorboard.TensorBoard(tmp_path)
    board.on_validation(a_look(0))
    board.on_step(a_step(1))
    board.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.value for event in read.Scalars("loss/itc")] == [1.0]
    assert read.Scalars("validation/text_to_image R@1")[0].value == 0.5
    assert read.Images("validation/samples")[0].width == 16


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match=r"pip install 'unidiff-sdk\[tensorboard\]'"):
        tensorboard.TensorBoard(tmp_path)
