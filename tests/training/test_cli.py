"""The commands unidiff-train and unidiff-evaluate: help, results, and errors of one line."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.saving import TRAINING_STATE, save_checkpoint  # noqa: E402
from unidiff_sdk.training.cli import distill, evaluate, train  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402

FEW = ["--steps", "2", "--batch-size", "4", "--device", "cpu"]
FEW_DISTILLED = ["--steps", 2, "--batch-size", 4, "--trajectories", 4, "--teacher-steps", 8, "--device", "cpu"]


def call(command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def one_line(result: Result, code: int = 1) -> str:
    """The error of a failed command: one line, and the exit code."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


@pytest.mark.parametrize("command", [train, distill, evaluate])
def test_help_has_examples(command) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0 and "Examples" in result.output


def test_options_default_to_the_configuration() -> None:
    by_field = {parameter.name: parameter.default for parameter in train.params}
    config = TrainingConfig()
    flags = {parameter.name for parameter in train.params if getattr(parameter, "is_flag", False)}
    offered = {
        name: value for name, value in by_field.items() if hasattr(config, name) and name not in flags | {"group"}
    }
    assert offered and all(getattr(config, name) == default for name, default in offered.items())


def test_train_then_evaluate(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    result = call(train, small_catalog, "--base", random_checkpoint, "-o", out, *FEW)
    assert result.exit_code == 0, result.output
    assert "Trained 2 steps on 12 pairs" in result.output and "itc" in result.stderr
    assert load_checkpoint(out).meta["config"]["steps"] == 2
    figures_file = tmp_path / "deep" / "figures.json"
    result = call(evaluate, out, small_catalog, "--prompts", 0, "--json", figures_file)
    assert result.exit_code == 0, result.output
    assert "text_to_image R@1" in result.stdout
    assert json.loads(figures_file.read_text(encoding="utf-8"))["checkpoint"] == "tuned"


def test_train_with_prior_distillation_early_stopping_and_wise_ft(
    random_checkpoint: Path, small_catalog: Path, tmp_path: Path
) -> None:
    out, validation = tmp_path / "tuned", ["--val", small_catalog, "--validate-every", 1, "--prompt", "a red dress"]
    prior = ["--prior", tmp_path / "prior", "--prior-prompt", "a coat", "--prior-pairs", 3, "--prior-batch", 2]
    result = call(
        *(train, small_catalog, "--base", random_checkpoint, "-o", out, *FEW, *validation, *prior),
        *("--feature-distillation", 0.5, "--patience", 2, "--wise-ft"),
    )
    assert result.exit_code == 0, result.output
    assert "prior_feature_distillation" in result.stderr and "of the change of the generator" in result.stdout
    assert len(list((tmp_path / "prior").glob("*.png"))) == 3
    assert load_checkpoint(out).meta["chosen"].keys() == {"early_stopping", "wise_ft", "score"}
    assert "Choice of the weights" in (tmp_path / "tuned.log" / "report.html").read_text(encoding="utf-8")


def test_distill(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    assert "distill" in call(train, "--help").output and "Usage: unidiff-train distill" in help_of("distill")
    result = call(train, "distill", random_checkpoint, small_catalog, "-o", tmp_path / "fast", *FEW_DISTILLED)
    assert result.exit_code == 0, result.output
    assert "2 steps on 12 captions" in result.output and "distillation" in result.stderr
    assert load_checkpoint(tmp_path / "fast").meta["sampler"] == {"name": "ddim", "steps": 4, "guidance_scale": 1.0}
    common = (train, "distill", random_checkpoint, small_catalog, "-o", tmp_path / "none")
    assert "must be a multiple" in one_line(call(*common, "--teacher-steps", 6), code=2)
    assert "nowhere" in one_line(call(train, "distill", tmp_path / "nowhere", small_catalog, "-o", tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def help_of(*arguments: str) -> str:
    return CliRunner().invoke(train, [*arguments, "--help"], prog_name="unidiff-train").output


def test_missing_folders_are_named(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert "nowhere" in one_line(call(train, nowhere, "--base", random_checkpoint, "-o", tmp_path / "out"))
    assert "nowhere" in one_line(call(train, small_catalog, "--base", nowhere, "-o", tmp_path / "out"))
    assert "nowhere" in one_line(call(evaluate, random_checkpoint, nowhere))
    assert "nowhere" in one_line(call(evaluate, nowhere, small_catalog))
    assert list(tmp_path.iterdir()) == []


def test_invalid_rows_are_skipped_and_shown(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    good = (small_catalog / "0.png").read_bytes()
    for name, content in {"0.png": good, "1.png": good, "cut.png": good[:60]}.items():
        (tmp_path / name).write_bytes(content)
    rows = [("0.png", "red"), ("cut.png", "cut"), ("1.png", ""), ("1.png", "also red")]
    lines = (json.dumps({"file_name": name, "text": text}) for name, text in rows)
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = (train, tmp_path, "--base", random_checkpoint, "-o", tmp_path / "out", *FEW)
    assert "cut.png" in one_line(call(*arguments, "--strict"))
    assert not (tmp_path / "out").exists()
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert "2 steps on 2 pairs (2 invalid rows skipped)" in result.stdout
    assert "line 2 (cut.png)" in result.stderr and "line 3" in result.stderr
    assert result.stderr.index("line 2 (cut.png)") < result.stderr.index("step 1/2"), "before training starts"
    distilled = call(train, "distill", random_checkpoint, tmp_path, "-o", tmp_path / "fast", *FEW_DISTILLED)
    assert distilled.exit_code == 0 and "line 3 (1.png)" in distilled.stderr


def test_columns_name_the_images_and_captions(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (small_catalog / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.copytree(small_catalog, tmp_path / "data")
    (tmp_path / "data" / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"photo": row.pop("file_name"), "title": row.pop("text")} | row) for row in rows)
    )
    named = ("--columns", "image=photo,text=title")
    validation = ("--val", tmp_path / "data", "--validate-every", 2, "--prompt", "a red dress")
    arguments = (train, tmp_path / "data", "--base", random_checkpoint, "-o", tmp_path / "out", *FEW, *validation)
    result = call(*arguments, *named)
    assert result.exit_code == 0, result.output
    assert f"on {len(rows)} pairs in" in result.stdout and "Skipped" not in result.stderr
    measured = call(evaluate, tmp_path / "out", tmp_path / "data", "--prompts", 0, *named)
    assert measured.exit_code == 0 and "text_to_image R@1" in measured.stdout, measured.output
    distilled = (train, "distill", random_checkpoint, tmp_path / "data", "-o", tmp_path / "fast", *FEW_DISTILLED)
    assert call(*distilled, *named).exit_code == 0
    assert "image=photo" in one_line(call(*arguments, "--overwrite")), "the message names the option"
    assert "training needs captions" in one_line(
        call(*distilled, "--overwrite", "--columns", "image=photo,text="), code=2
    )


def test_all_invalid_rows_are_listed_in_the_log(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    data, val = (tmp_path / name for name in ("data", "val"))
    for folder, bad in ((data, 7), (val, 1)):
        shutil.copytree(small_catalog, folder)
        with (folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(f'\n{{"file_name": "gone-{n}.png", "text": "gone"}}' for n in range(bad))
    validation = ("--val", val, "--validate-every", 2, "--prompt", "a red dress")
    result = call(train, data, "--base", random_checkpoint, "-o", tmp_path / "out", *FEW, *validation)
    assert result.exit_code == 0, result.output
    shown = [line for line in result.stderr.splitlines() if line.startswith("Skipped /")]
    assert len(shown) == 2 and "(gone-0.png)" in shown[0] and "(7 rows with this problem)" in shown[0]
    assert "val" in shown[-1] and "(gone-0.png)" in shown[-1]
    file = tmp_path / "out.log" / "invalid_rows.jsonl"
    assert f"All 7 invalid rows: {file}" in result.stderr
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["file_name"] for row in rows] == [f"gone-{n}.png" for n in (*range(7), 0)]
    assert [row["data"] for row in rows] == 7 * ["data"] + ["val"] and "no such image" in rows[0]["reason"]


def test_empty_catalog_is_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("", encoding="utf-8")
    assert "no valid image-caption pair" in one_line(
        call(train, tmp_path, "--base", random_checkpoint, "-o", tmp_path / "out")
    )


def test_invalid_options_are_refused(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    refused = partial(one_line, code=2)
    common = (train, small_catalog, "--base", random_checkpoint, "-o", tmp_path / "out")
    assert "caption_dropout" in refused(call(*common, "--caption-dropout", 2))
    assert "colour" in one_line(call(*common, "--group", "brand"))
    assert call(*common, "--precision", "fp8").exit_code == 2
    assert "--val" in refused(call(*common, "--patience", 3)) and "--val" in refused(call(*common, "--wise-ft"))
    assert "--prior" in refused(call(*common, "--prior-prompt", "a coat"))
    assert "needs at least 1" in refused(call(*common, "--prior", tmp_path, "--prior-prompt", "a", "--prior-pairs", 0))
    assert "both --base and --base-data" in refused(call(evaluate, random_checkpoint, small_catalog, "--base", "tiny"))
    assert "--prior-pairs has no effect without --prior" in refused(call(*common, "--prior-pairs", 9))
    assert "--validate-every has no effect without --val" in refused(call(*common, "--validate-every", 9))
    assert "rsc_captions has no effect" in refused(call(*common, "--rsc-captions", 2))
    no_images = (evaluate, random_checkpoint, small_catalog, "--prompts", 0)
    assert "--sheet, --steps have no effect" in refused(call(*no_images, "--steps", 4, "--sheet", tmp_path / "x.png"))
    assert "is a folder" in refused(call(evaluate, random_checkpoint, small_catalog, "--json", tmp_path))


def test_loss_that_is_not_finite_is_an_error_of_one_line(
    random_checkpoint: Path, small_catalog: Path, tmp_path: Path
) -> None:
    base = load_checkpoint(random_checkpoint)
    base.unet.conv_out.bias.data.fill_(float("nan"))
    save_checkpoint(tmp_path / "broken", **base.parts(), meta=base.meta)
    error = one_line(call(train, small_catalog, "--base", tmp_path / "broken", "-o", tmp_path / "out", *FEW))
    assert "is nan" in error and "No checkpoint had been saved yet" in error


INTERRUPTIBLE = "from unidiff_sdk.training.cli import train; train()"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_saves_and_says_how_to_continue(
    random_checkpoint: Path, small_catalog: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """A real process, interrupted by the first line of losses."""
    out, many = tmp_path / "out", ["--steps", "100000", "--batch-size", "4", "--device", "cpu"]
    arguments = list(map(str, [small_catalog, "--base", random_checkpoint, "-o", out, *many]))
    command = [sys.executable, "-c", INTERRUPTIBLE, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step 1/"):
                process.send_signal(number)
    assert process.returncode == code, lines
    command_to_continue = f"unidiff-train {shlex.join(arguments)} --resume"
    assert lines[-1] == f"Interrupted. The steps done are saved. Continue with: {command_to_continue}\n"
    assert load_checkpoint(out).meta["step"] >= 1
    assert (out / TRAINING_STATE / "state.json").is_file()


def test_model_card_gets_the_figures_of_an_evaluation(
    random_checkpoint: Path, small_catalog: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(random_checkpoint, tmp_path / "copy"))
    result = call(evaluate, out, small_catalog, "--prompts", 0, "--model-card")
    assert result.exit_code == 0, result.output
    assert load_checkpoint(out).meta["evaluation"]["retrieval"].keys() == {"text_to_image", "image_to_text"}
    assert "| retrieval, text to image, R@1 |" in (out / "README.md").read_text(encoding="utf-8")
    assert "not a folder" in one_line(call(evaluate, "tiny", small_catalog, "--model-card"), code=2)
