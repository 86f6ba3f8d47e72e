"""Resuming: whatever stops a run, the last checkpoint is complete, and the resumed run has the same result."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.errors import CheckpointError, TrainingError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.saving import (  # noqa: E402
    TRAINING_STATE,
    recover_interrupted_save,
    save_checkpoint,
)
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.loop.model_selection import ModelSelection  # noqa: E402
from unidiff_sdk.training.loop.resume import Progress, restore  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.runtime.callbacks import ModelSnapshot, StepReport, ValidationResult  # noqa: E402

SETTINGS = {
    "steps": 5,
    "batch_size": 5,
    "save_every": 2,
    "warmup_steps": 1,
    "learning_rate": 1e-3,
    "rsc_warmup_steps": 2,
    "lambda_rsc_encoder": 0.1,
    "flip": True,
}

# A run that is killed as by `kill -9`: during step AT, or while it saves, where no handler can run.
KILLED = """
import json, os, signal, sys
from unidiff_sdk.training import TrainingConfig, train

data, base, out, where, at, settings = sys.argv[1:]
steps = []

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def on_audit(event, arguments):
    if where == "write" and event == "open" and str(arguments[0]).endswith(".tmp/unidiff.json") and arguments[1] == "w":
        kill()  # in the first save, before its last file is written
    if where == "replace" and event == "shutil.rmtree" and str(arguments[0]).endswith(".old"):
        kill()  # in the second save, when the new checkpoint is in place and the old one still set aside

def count_step(*_):
    steps.append(1)
    if where == "step" and len(steps) == int(at):
        kill()

def on_start(checkpoint):
    checkpoint.unet.register_forward_pre_hook(count_step)

sys.addaudithook(on_audit)
train(data, base, out, TrainingConfig(**json.loads(settings)), device="cpu", resume=True, on_start=on_start)
"""


def weights(path: Path) -> dict:
    loaded = load_checkpoint(path)
    return {f"{part}.{name}": t for part in ("unet", "clip") for name, t in getattr(loaded, part).state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted(small_catalog: Path, random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(small_catalog, random_checkpoint, out, TrainingConfig(**SETTINGS), device="cpu")
    return weights(out)


@pytest.mark.parametrize(
    ("where", "at"),
    [("step", 1), ("step", 4), ("step", 5), ("write", 0), ("replace", 0)],
    ids=["before-any-save", "after-a-save", "last-step", "while-writing", "while-replacing"],
)
def test_killed_run_resumes_bit_for_bit(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, uninterrupted: dict, where: str, at: int
) -> None:
    out = tmp_path / "run"
    arguments = [small_catalog, random_checkpoint, out, where, at, json.dumps(SETTINGS)]
    # Sums are split over threads, so equal weights need an equal number of threads.
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    killed = subprocess.run(command, capture_output=True, text=True, env=threads)
    assert killed.returncode == -9, killed.stderr
    result = train(small_catalog, random_checkpoint, out, TrainingConfig(**SETTINGS), device="cpu", resume=True)
    assert result.steps == 5
    assert equal(weights(out), uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "no incomplete folder is left"
    assert not (out / TRAINING_STATE).exists(), "a finished run needs no state"


def test_interrupted_run_resumes_bit_for_bit_with_another_save_interval(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, uninterrupted: dict
) -> None:
    out = tmp_path / "run"
    interrupt_after(3, small_catalog, random_checkpoint, out)
    assert load_checkpoint(out).meta["step"] == 3
    config = TrainingConfig(**(SETTINGS | {"save_every": 100}))
    steps: list[int] = []
    train(
        small_catalog,
        random_checkpoint,
        out,
        config,
        device="cpu",
        resume=True,
        on_step=lambda report: steps.append(report.step),
    )
    assert steps == [4, 5]
    assert equal(weights(out), uninterrupted)


def interrupt_after(step: int, data: Path, base: Path, out: Path, **settings: object) -> None:
    config = TrainingConfig(**(SETTINGS | settings))
    with pytest.raises(KeyboardInterrupt):
        train(data, base, out, config, device="cpu", on_step=interrupt_at(step))


def interrupt_at(step: int):
    """A callback that interrupts after a step."""

    def on_step(report: StepReport) -> None:
        if report.step == step:
            raise KeyboardInterrupt

    return on_step


def test_run_resumes_only_with_its_own_settings_and_base(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    interrupt_after(1, small_catalog, random_checkpoint, out)

    def again(data: Path = small_catalog, base: Path = random_checkpoint, resume: bool = True, **settings: object):
        return train(data, base, out, TrainingConfig(**(SETTINGS | settings)), device="cpu", resume=resume)

    with pytest.raises(TrainingError, match=r"unfinished run.*--resume"):
        again(resume=False)
    with pytest.raises(TrainingError, match="has seed 0, not 1"):
        again(seed=1)
    with pytest.raises(TrainingError, match="has base"):
        again(base=other_base(random_checkpoint, tmp_path))
    (out / TRAINING_STATE / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="Cannot resume from"):
        again()
    (out / TRAINING_STATE / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"Cannot read .*state\.json"):
        again()


def test_run_saved_by_an_earlier_version_resumes_bit_for_bit(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    """Schema 2 had other names for a setting, a term and the state of the validations."""
    settings = {"lambda_feature_distillation": 0.5, "patience": 3, "validate_every": 1}
    config = TrainingConfig(**(SETTINGS | settings))

    def run(name: str, **options: object) -> None:
        def validate(snapshot: ModelSnapshot) -> ValidationResult:
            return ValidationResult(float(snapshot.step), data_fingerprint="pairs")

        train(small_catalog, random_checkpoint, tmp_path / name, config, on_validate=validate, device="cpu", **options)

    with pytest.raises(KeyboardInterrupt):
        run("run", on_step=interrupt_at(2))
    file = tmp_path / "run" / TRAINING_STATE / "state.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    selection = state.pop("selection")
    selection.pop("latest")
    names = {"validated_step": "looked", "data_fingerprint": "measured_on", "validations_since_best": "since_best"}
    looks = {names.get(name, name): value for name, value in selection.items()}
    state["config"]["lambda_leash"] = state["config"].pop("lambda_feature_distillation")
    losses = state["progress"]["losses"]
    losses["leash"] = losses.pop("feature_distillation")
    file.write_text(json.dumps(state | {"schema_version": 2, "looks": looks}), encoding="utf-8")

    run("run", resume=True)
    run("uninterrupted")
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "uninterrupted"))


def test_state_of_an_unknown_schema_is_refused(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    interrupt_after(1, small_catalog, random_checkpoint, out)
    file = out / TRAINING_STATE / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 99}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"schema 99; this version reads schemas 2 and 3"):
        train(small_catalog, random_checkpoint, out, TrainingConfig(**SETTINGS), device="cpu", resume=True)


def test_run_resumes_only_with_its_own_groups(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    """The same images and captions with other values in the grouping column."""
    folders = [shutil.copytree(small_catalog, tmp_path / name) for name in ("then", "now")]
    for folder, kinds in zip(folders, (4, 3), strict=True):
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
        lines = (json.dumps(row | {"kind": number % kinds}) for number, row in enumerate(rows))
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {"group": ("kind",)}
    interrupt_after(1, folders[0], random_checkpoint, tmp_path / "run", **settings)
    config = TrainingConfig(**(SETTINGS | settings))
    with pytest.raises(TrainingError, match="has groups"):
        train(folders[1], random_checkpoint, tmp_path / "run", config, device="cpu", resume=True)
    assert train(folders[0], random_checkpoint, tmp_path / "run", config, device="cpu", resume=True).steps


def other_base(checkpoint: Path, folder: Path) -> Path:
    loaded = load_checkpoint(checkpoint)
    with torch.no_grad():
        loaded.unet.conv_out.weight += 1.0
    return save_checkpoint(folder / "other", **loaded.parts(), meta=loaded.meta)


def test_finished_run_is_not_repeated(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    config = TrainingConfig(**(SETTINGS | {"steps": 2}))
    first = train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu")
    steps: list[int] = []
    second = train(
        small_catalog,
        random_checkpoint,
        tmp_path / "run",
        config,
        device="cpu",
        resume=True,
        on_step=lambda report: steps.append(report.step),
    )
    assert steps == [] and (second.steps, second.losses) == (2, first.losses)
    with pytest.raises(TrainingError, match="has steps 2, not 3"):
        longer = TrainingConfig(**(SETTINGS | {"steps": 3}))
        train(small_catalog, random_checkpoint, tmp_path / "run", longer, device="cpu", resume=True)


def test_older_checkpoints_move_to_the_history(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    config = TrainingConfig(**(SETTINGS | {"save_every": 1, "keep": 3}))
    train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu")
    history = tmp_path / "run.history"
    assert sorted(folder.name for folder in history.iterdir()) == ["step-000003", "step-000004"]
    assert load_checkpoint(history / "step-000004").meta["step"] == 4
    assert not (history / "step-000004" / TRAINING_STATE).exists()


def test_failed_write_leaves_the_last_checkpoint(random_checkpoint: Path, tmp_path: Path) -> None:
    """The kernel refuses a write within a file, whatever library writes it."""
    out = save_checkpoint(tmp_path / "out", **load_checkpoint(random_checkpoint).parts(), meta={"step": 1})
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    largest = max(map(len, before.values()))
    loaded = load_checkpoint(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))
    try:
        with pytest.raises(CheckpointError, match=r"Cannot save .*previous one is unchanged"):
            save_checkpoint(out, **loaded.parts(), meta={"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_run_that_filled_the_disk_resumes_from_its_last_checkpoint(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, uninterrupted: dict
) -> None:
    out = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(report) -> None:
        if report.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    try:
        with pytest.raises(CheckpointError, match=r"Cannot save .*previous one is unchanged"):
            train(
                small_catalog,
                random_checkpoint,
                out,
                TrainingConfig(**SETTINGS),
                device="cpu",
                on_step=fill_the_disk,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(out).meta["step"] == 2
    train(small_catalog, random_checkpoint, out, TrainingConfig(**SETTINGS), device="cpu", resume=True)
    assert equal(weights(out), uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_leftovers_of_a_killed_save_are_restored_or_removed(random_checkpoint: Path, tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    pid = int(dead.stdout)
    out = tmp_path / "out"
    aside = save_checkpoint(tmp_path / f".out.{pid}.old", **load_checkpoint(random_checkpoint).parts(), meta={})
    (tmp_path / f".out.{pid}.tmp").mkdir()
    (tmp_path / ".out.1.tmp").mkdir()  # of a running process, which may be saving now
    recover_interrupted_save(out)
    assert not aside.exists() and load_checkpoint(out).shared
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.1.tmp", "out"]


@pytest.mark.parametrize(
    "change",
    [
        {"progress": None},
        {"progress": {}},
        {"progress": {"step": "4", "losses": {}}},
        {"progress": {"step": -1, "losses": {}}},
        {"progress": {"step": 4, "losses": {"itc": "x"}}},
        {"progress": {"step": 4, "losses": 7}},
        {"selection": None},
        {"selection": {"best_step": "x"}},
        {"selection": {"latest": 3}},
        {"config": None},
        {"config": 3},
        {"identity": []},
        {"learner": 7},
        {"schema_version": []},
        {"schema_version": 2},
    ],
)
def test_damaged_state_is_a_checkpoint_error(tmp_path: Path, change: dict) -> None:
    config = TrainingConfig()
    learner = SimpleNamespace(config=config, restore=lambda folder, state: state["averaged_updates"], processes=None)
    selection = ModelSelection.__new__(ModelSelection)
    vars(selection).update(learner=learner, validated_step=-1, data_fingerprint="", best_step=-1, best_score=0.0)
    vars(selection).update(validations_since_best=0, latest={})
    state = {
        "schema_version": 3,
        "progress": {"step": 4, "losses": {"itc": 0.5}},
        "learner": {"averaged_updates": 3},
        "selection": selection.__dict__ | {"learner": None},
        "config": asdict(config),
        "identity": {"base": "b"},
    }
    file = tmp_path / TRAINING_STATE / "state.json"
    file.parent.mkdir()
    file.write_text(json.dumps(state))
    assert restore(tmp_path, learner, selection, None, {"base": "b"}) == Progress(4, {"itc": 0.5})
    file.write_text(json.dumps(state | change))
    with pytest.raises((CheckpointError, TrainingError)):
        restore(tmp_path, learner, selection, None, {"base": "b"})
