"""Validation during training, the run log, and the report."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.errors import DataError, OptionError, TrainingError, UniDiffError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.cli import train as train_command  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.pairs import load_pairs  # noqa: E402
from unidiff_sdk.training.evaluation.retrieval import embed_pairs, retrieval_figures  # noqa: E402
from unidiff_sdk.training.evaluation.validation import (  # noqa: E402
    SearchExample,
    SearchHit,
    ValidationRecord,
    Validator,
    denoising_loss,
)
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.reporting import tensorboard  # noqa: E402
from unidiff_sdk.training.reporting.report import write_report  # noqa: E402
from unidiff_sdk.training.reporting.run_log import RunLog, read_log  # noqa: E402
from unidiff_sdk.training.runtime.callbacks import ModelSnapshot, StepReport  # noqa: E402

ABOUT = {"name": "shop", "base": "tiny", "data": "d", "val": "v", "command": "unidiff-train d", "config": {"steps": 9}}
ABOUT |= {"versions": {"torch": "2"}}


class Recorder:
    """A callback that keeps all events."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.records: list[ValidationRecord] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_validation(self, record: ValidationRecord) -> None:
        self.records.append(record)


def validator_of(data: Path, *arguments, **options) -> Validator:
    """A validator that generates its samples in two denoising steps."""
    return Validator(data, *arguments, steps=2, **options)


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(random_checkpoint)


def snapshot(checkpoint: Checkpoint, step: int = 0) -> ModelSnapshot:
    return ModelSnapshot(step, JointModel(checkpoint).eval(), checkpoint, TrainingConfig())


def make_record(step: int, *, caption: str = "a red dress") -> ValidationRecord:
    image = np.full((8, 8, 3), step, np.uint8)
    hits = [SearchHit(0, image, caption, 0.9, True), SearchHit(1, image, "other", 0.1, False)]
    examples = [SearchExample(0, caption, 1, image, hits), SearchExample(1, "other", 2, image, hits)]
    names = ("denoising_loss", "image_effective_rank", "text_effective_rank", "image_mean_cosine", "mean_recall")
    ways = [f"{way} {k}" for way in ("text_to_image", "image_to_text") for k in ("R@1", "R@5", "R@10", "median_rank")]
    figures = {name: 0.5 + step / 10 for name in (*names, *ways)}
    return ValidationRecord(step, figures, [caption, "boots"], [image, image + 1], [1, 2], examples)


def make_report(step: int) -> StepReport:
    return StepReport(step, 9, {"itc": 1.0 / step, "is": 0.5}, 1e-4, 0.1, 6)


# --- validation -----------------------------------------------------------------------------------------------------


def test_validator_measures_the_figures_of_the_evaluation(checkpoint: Checkpoint, small_catalog: Path) -> None:
    recorder = Recorder()
    result = validator_of(small_catalog, [recorder])(snapshot(checkpoint))
    model, pairs = JointModel(checkpoint).eval(), load_pairs(small_catalog, checkpoint)
    keys = [("red",) if n in (0, 11) else (n,) for n in range(12)]
    expected = retrieval_figures(*embed_pairs(model, checkpoint, pairs), keys)
    for way, figures in expected.items():
        for name, value in figures.items():
            assert result.figures[f"{way} {name}"] == pytest.approx(value)
    recalls = [value for figures in expected.values() for name, value in figures.items() if "R@" in name]
    assert result.score == pytest.approx(sum(recalls) / 6)
    (record,) = recorder.records
    assert len(record.samples) == len(record.prompts) == 8 and record.samples[0].shape == (32, 32, 3)
    assert all((example.rank == 1) == example.hits[0].relevant for example in record.examples)
    assert [np.mean(np.array(record.ranks) <= 5)] == pytest.approx([expected["text_to_image"]["R@5"]])


def test_validations_of_the_same_weights_agree_and_leave_the_random_state(
    checkpoint: Checkpoint, small_catalog: Path
) -> None:
    validator, state = validator_of(small_catalog, prompts=["a red dress"]), torch.get_rng_state()
    first, second = validator(snapshot(checkpoint)), validator(snapshot(checkpoint, 5))
    assert torch.equal(torch.get_rng_state(), state)
    without_time = [{name: v for name, v in result.figures.items() if name != "seconds"} for result in (first, second)]
    assert without_time[0] == without_time[1]


def test_training_is_the_same_with_and_without_validation(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(steps=2, batch_size=4, warmup_steps=1)
    recorder = Recorder()
    validated = {"config": replace(config, validate_every=1), "on_validate": validator_of(small_catalog, [recorder])}
    for name, options in {"with": validated, "without": {"config": config}}.items():
        train(small_catalog, random_checkpoint, tmp_path / name, device="cpu", **options)
    a, b = (load_checkpoint(tmp_path / name).unet.state_dict() for name in ("with", "without"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [record.step for record in recorder.records] == [0, 1, 2]
    assert recorder.records[0].figures["denoising_loss"] != recorder.records[2].figures["denoising_loss"]


def test_score_is_the_denoising_loss_if_the_encoder_is_not_trained(checkpoint: Checkpoint, small_catalog: Path) -> None:
    config = TrainingConfig(lambda_itc=0)
    result = Validator(small_catalog)(ModelSnapshot(0, JointModel(checkpoint).eval(), checkpoint, config, True))
    assert result.score == -result.figures["denoising_loss"]


class Oracle(torch.nn.Module):
    """A UNet that predicts the noise exactly if all images have the latents z: ε = (z_t - √ᾱ z) / √(1-ᾱ)."""

    def __init__(self, z: torch.Tensor, alpha_bar: torch.Tensor) -> None:
        super().__init__()
        self.z, self.alpha_bar = z, alpha_bar
        self.timesteps: list[int] = []

    def forward(self, z_t: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> SimpleNamespace:
        self.timesteps.extend(t.tolist())
        alpha_bar = self.alpha_bar[t][:, None, None, None]
        return SimpleNamespace(sample=(z_t - alpha_bar.sqrt() * self.z) / (1 - alpha_bar).sqrt())


def test_denoising_loss_of_an_exact_unet_is_zero(checkpoint: Checkpoint) -> None:
    model = JointModel(checkpoint).eval()
    z = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(3))
    model.unet = oracle = Oracle(z, model.alpha_bar)
    ids = torch.zeros((6, 16), dtype=torch.int64)
    assert denoising_loss(model, z.expand(6, -1, -1, -1), ids) == pytest.approx(0, abs=1e-6)
    # 24 timesteps, one in each twenty-fourth of the schedule.
    assert sorted(t * 24 // len(model.alpha_bar) for t in oracle.timesteps) == list(range(24))


def test_denoising_loss_does_not_depend_on_the_batch_size(checkpoint: Checkpoint) -> None:
    model = JointModel(checkpoint).eval()
    latents = torch.randn((5, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 300, (5, 16), generator=torch.Generator().manual_seed(0))
    whole = denoising_loss(model, latents, ids)
    assert denoising_loss(model, latents, ids, batch_size=3) == pytest.approx(whole, rel=1e-5)


def test_single_validation_pair_is_refused(checkpoint: Checkpoint, small_catalog: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((small_catalog / "0.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}', encoding="utf-8")
    with pytest.raises(DataError, match="needs at least 2"):
        Validator(tmp_path)(snapshot(checkpoint))


# --- the log ---------------------------------------------------------------------------------------------------------


def test_log_reads_back_all_events(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log", ABOUT)
    log.on_validation(make_record(0))
    log.on_step(make_report(1))
    log.on_validation(make_record(1))
    log.finish(pairs=12)
    read = read_log(tmp_path / "log")
    assert [step["losses"]["itc"] for step in read.steps] == [1.0]
    assert [line["step"] for line in read.validations] == [0, 1] and read.validations[0]["ranks"] == [1, 2]
    assert [image.size for image in read.samples[1]] == [(8, 8), (8, 8)]
    assert read.examples[0]["hits"][1]["relevant"] is False and read.about["pairs"] == 12


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40])
def test_samples_of_any_number_of_prompts(tmp_path: Path, n: int) -> None:
    """Forty images of 512 px in one row would exceed the width of a WebP image."""
    record, side = make_record(0), 512
    samples = [np.full((side, side, 3), 6 * number, np.uint8) for number in range(n)]
    RunLog(tmp_path / "log", ABOUT).on_validation(replace(record, prompts=[f"{k}" for k in range(n)], samples=samples))
    read = read_log(tmp_path / "log").samples[0]
    assert [image.size for image in read] == n * [(side, side)]
    assert [round(np.asarray(image).mean() / 6) for image in read] == list(range(n))


def test_entries_after_the_resumed_step_are_removed(tmp_path: Path) -> None:
    first = RunLog(tmp_path / "log", ABOUT)
    for step in range(1, 6):
        first.on_step(make_report(step))
    for step in (0, 2, 4):
        first.on_validation(make_record(step))
    with (tmp_path / "log" / "steps.jsonl").open("a") as file:
        file.write('{"step": 6, "los')  # killed while writing
    second = RunLog(tmp_path / "log", ABOUT)
    second.on_step(make_report(4))
    read = read_log(tmp_path / "log")
    assert [step["step"] for step in read.steps] == [1, 2, 3, 4]
    assert list(read.samples) == [0, 2]


def test_damaged_log_is_a_training_error(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    log = RunLog(folder, ABOUT)
    log.on_validation(make_record(0))
    log.on_step(make_report(1))
    log.on_validation(make_record(1))
    write_report(folder, tmp_path / "report.html")
    refused = 0
    for name in ("run.json", "steps.jsonl", "validations.jsonl", "examples.json", "samples/000001.webp"):
        original = (folder / name).read_bytes()
        for seed in range(20):
            rng = random.Random(seed)
            damaged = bytearray(original)
            for _ in range(3):
                damaged[rng.randrange(len(damaged))] = rng.choice(b'0{}[]":,\\x\xff')
            (folder / name).write_bytes(damaged)
            try:
                write_report(folder, tmp_path / "report.html")
            except UniDiffError:
                refused += 1
        (folder / name).write_bytes(original)
    assert refused > 20
    for lines in ('{"step": "x"}', "7\n7", '{"step": 1, "prompts": []}', '{"step": 1e400}', '{"step": null}'):
        (folder / "validations.jsonl").write_text(lines)
        with pytest.raises(UniDiffError):
            read_log(folder)
            write_report(folder, tmp_path / "report.html")


def test_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no run log"):
        read_log(tmp_path)
    (tmp_path / "log").write_text("a file")
    with pytest.raises(TrainingError, match="Cannot write the run log"):
        RunLog(tmp_path / "log", ABOUT).on_step(make_report(1))


# --- the report ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Open elements, counts of elements, and all links of an HTML page."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_well_formed_file(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log", ABOUT)
    for step in range(0, 60):
        if step:
            log.on_step(make_report(step))
        if step % 4 == 0:
            log.on_validation(make_record(step, caption="<script>alert(1)</script> & boots"))
    text = write_report(tmp_path / "log", tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and all(link.startswith("data:") for link in page.links)
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; boots" in text
    assert page.counts["svg"] == 7
    # Two prompts at eight of the fifteen validations, and two examples of three images.
    assert page.counts["img"] == 2 * 8 + 2 * 3
    assert "step 0<" in text and "step 56<" in text and "unidiff-train d" in text
    assert "rank 1 → 1" in text and "rank 2 → 2" in text


def test_report_without_validation_shows_the_losses(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log", ABOUT)
    log.on_step(make_report(1))
    text = write_report(tmp_path / "log", tmp_path / "report.html").read_text(encoding="utf-8")
    assert Page(text).open == [] and "--val DATA" in text and "ITC" in text


def test_command_writes_the_report(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    arguments = [small_catalog, "--base", random_checkpoint, "-o", out, "--steps", 2, "--batch-size", 4]
    arguments += ["--val", small_catalog, "--validate-every", 2, "--prompt", "a red dress"]
    result = CliRunner().invoke(train_command, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "tuned.log" / "report.html") in result.stdout
    read = read_log(tmp_path / "tuned.log")
    assert [line["step"] for line in read.validations] == [0, 2] and read.validations[0]["prompts"] == ["a red dress"]
    assert read.about["pairs"] == 12 and read.about["config"]["steps"] == 2
    assert json.loads((out / "unidiff.json").read_text())["step"] == 2
    refused = CliRunner().invoke(train_command, [str(small_catalog), "--base", "tiny", "-o", "x", "--prompt", "a"])
    assert refused.exit_code == 2 and "--val" in refused.stderr


def test_tensorboard_receives_curves_and_samples(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = tensorboard.TensorBoard(tmp_path)
    board.on_validation(make_record(0))
    board.on_step(make_report(1))
    board.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.value for event in read.Scalars("loss/itc")] == [1.0]
    assert read.Scalars("validation/text_to_image/R@1")[0].value == 0.5
    assert read.Images("validation/samples")[0].width == 16


def test_missing_tensorboard_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match=r"pip install 'unidiff-sdk\[tensorboard\]'"):
        tensorboard.TensorBoard(tmp_path)
