"""unidiff-train and unidiff-evaluate as a person meets them: help, results, and one line for whatever is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.cli import distill, evaluate, train  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.loop import gradients  # noqa: E402

FEW = ["--steps", "2", "--batch-size", "4", "--rsc", "0", "--device", "cpu"]
FEW_DISTILLED = ["--steps", 2, "--batch-size", 4, "--trajectories", 4, "--teacher-steps", 8, "--device", "cpu"]


def call(command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def one_line(result: Result) -> str:
    """The error of a refused run: one line, and a failing exit code."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]


@pytest.mark.parametrize("command", [train, distill, evaluate])
def test_help_tells_what_comes_out(command) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0 and "Examples" in result.output


def test_options_default_to_the_settings() -> None:
    by_field = {parameter.name: parameter.default for parameter in train.params}
    settings = TrainingConfig()
    flags = {parameter.name for parameter in train.params if getattr(parameter, "is_flag", False)}
    offered = {
        name: value for name, value in by_field.items() if hasattr(settings, name) and name not in flags | {"group"}
    }
    assert offered and all(getattr(settings, name) == default for name, default in offered.items())


def test_train_then_evaluate(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    result = call(train, small_catalog, "--base", random_checkpoint, "-o", out, *FEW)
    assert result.exit_code == 0, result.output
    assert "2 steps on 12 pairs" in result.output and "itc" in result.stderr
    assert load_checkpoint(out).meta["config"]["steps"] == 2
    figures_file = tmp_path / "deep" / "figures.json"
    result = call(evaluate, out, small_catalog, "--prompts", 0, "--json", figures_file)
    assert result.exit_code == 0, result.output
    assert "text_to_image R@1" in result.stdout
    assert json.loads(figures_file.read_text(encoding="utf-8"))["checkpoint"] == "tuned"


def test_small_data_from_the_command_line(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    """The base draws its prior; leash, early stopping and WiSE-FT; what was chosen is told, and reported."""
    out, looks = tmp_path / "tuned", ["--val", small_catalog, "--validate-every", 1, "--prompt", "a red dress"]
    prior = ["--prior", tmp_path / "prior", "--prior-prompt", "a coat", "--prior-pairs", 3, "--prior-batch", 2]
    result = call(
        *(train, small_catalog, "--base", random_checkpoint, "-o", out, *FEW, *looks, *prior),
        *("--leash", 0.5, "--patience", 2, "--wise-ft"),
    )
    assert result.exit_code == 0, result.output
    assert "prior_leash" in result.stderr and "Kept of the generator" in result.stdout
    assert len(list((tmp_path / "prior").glob("*.png"))) == 3
    assert load_checkpoint(out).meta["chosen"].keys() == {"early_stopping", "wise_ft", "score"}
    assert "How the weights were chosen" in (tmp_path / "tuned.log" / "report.html").read_text(encoding="utf-8")


def test_distill_stands_beside_training(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    assert "distill" in call(train, "--help").output and "Usage: unidiff-train distill" in help_of("distill")
    result = call(train, "distill", random_checkpoint, small_catalog, "-o", tmp_path / "fast", *FEW_DISTILLED)
    assert result.exit_code == 0, result.output
    assert "2 steps on 12 captions" in result.output and "distillation" in result.stderr
    assert load_checkpoint(tmp_path / "fast").meta["sampler"] == {"name": "ddim", "steps": 4, "guidance_scale": 1.0}
    common = (train, "distill", random_checkpoint, small_catalog, "-o", tmp_path / "none")
    assert "give a multiple" in one_line(call(*common, "--teacher-steps", 6))
    assert "nowhere" in one_line(call(train, "distill", tmp_path / "nowhere", small_catalog, "-o", tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def help_of(*words: str) -> str:
    return CliRunner().invoke(train, [*words, "--help"], prog_name="unidiff-train").output


def test_missing_folders(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert "nowhere" in one_line(call(train, nowhere, "--base", random_checkpoint, "-o", tmp_path / "out"))
    assert "nowhere" in one_line(call(train, small_catalog, "--base", nowhere, "-o", tmp_path / "out"))
    assert "nowhere" in one_line(call(evaluate, random_checkpoint, nowhere))
    assert "nowhere" in one_line(call(evaluate, nowhere, small_catalog))
    assert list(tmp_path.iterdir()) == []


def test_bad_rows(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
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
    assert "2 steps on 2 pairs (2 rows passed over)" in result.stdout
    assert "line 2 (cut.png)" in result.stderr and "line 3" in result.stderr
    assert result.stderr.index("line 2 (cut.png)") < result.stderr.index("step 1/2"), "told before time is spent"
    distilled = call(train, "distill", random_checkpoint, tmp_path, "-o", tmp_path / "fast", *FEW_DISTILLED)
    assert distilled.exit_code == 0 and "line 3 (1.png)" in distilled.stderr


def test_all_bad_rows_of_all_data_are_written_down(
    random_checkpoint: Path, small_catalog: Path, tmp_path: Path
) -> None:
    data, val = (tmp_path / name for name in ("data", "val"))
    for folder, bad in ((data, 7), (val, 1)):
        shutil.copytree(small_catalog, folder)
        with (folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(f'\n{{"file_name": "gone-{n}.png", "text": "gone"}}' for n in range(bad))
    looks = ("--val", val, "--validate-every", 2, "--prompt", "a red dress")
    result = call(train, data, "--base", random_checkpoint, "-o", tmp_path / "out", *FEW, *looks)
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "Passed over" in line]
    assert len(told) == 5 + 1 and "val" in told[-1] and "(gone-0.png)" in told[-1]
    file = tmp_path / "out.log" / "bad_rows.jsonl"
    assert f"and 2 more rows, all in {file}" in result.stderr
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["file_name"] for row in rows] == [f"gone-{n}.png" for n in (*range(7), 0)]
    assert [row["data"] for row in rows] == 7 * ["data"] + ["val"] and "no such image" in rows[0]["reason"]


def test_empty_catalog(random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("", encoding="utf-8")
    assert "no usable pair" in one_line(call(train, tmp_path, "--base", random_checkpoint, "-o", tmp_path / "out"))


def test_wrong_values(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    common = (train, small_catalog, "--base", random_checkpoint, "-o", tmp_path / "out")
    assert "caption_dropout" in one_line(call(*common, "--caption-dropout", 2))
    assert "colour" in one_line(call(*common, "--group", "brand"))
    assert call(*common, "--rsc-teacher", "judge").exit_code == 2
    assert "--val" in one_line(call(*common, "--patience", 3)) and "--val" in one_line(call(*common, "--wise-ft"))
    assert "--prior" in one_line(call(*common, "--prior-prompt", "a coat"))
    assert "at least one pair" in one_line(
        call(*common, "--prior", tmp_path, "--prior-prompt", "a", "--prior-pairs", 0)
    )
    assert "both --base and --base-data" in one_line(call(evaluate, random_checkpoint, small_catalog, "--base", "tiny"))
    assert "is a folder" in one_line(call(evaluate, random_checkpoint, small_catalog, "--json", tmp_path))


def test_nan_and_interruption(
    random_checkpoint: Path, small_catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients.forward

    def broken(*arguments: object, **options: object) -> object:
        result = plain(*arguments, **options)
        result.means["is"] *= float("nan")
        return result

    arguments = (train, small_catalog, "--base", random_checkpoint, "-o", tmp_path / "out", *FEW)
    monkeypatch.setattr(gradients, "forward", broken)
    assert "is nan" in one_line(call(*arguments))

    def interrupted(*_: object, **__: object) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(gradients, "forward", interrupted)
    assert call(*arguments).exit_code == 130
