"""The training loop: its checkpoints when it ends, is interrupted, or fails."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

from unidiff_sdk.errors import CheckpointError, DataError, OptionError, TrainingError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.saving import save_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.captions import group_keys, representative_captions  # noqa: E402
from unidiff_sdk.training.loop.distiller import distill  # noqa: E402
from unidiff_sdk.training.loop.learner import Ema, learning_rate_factor  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.runtime.callbacks import StepReport  # noqa: E402

FEW = {"steps": 3, "batch_size": 6, "warmup_steps": 1, "learning_rate": 1e-3}


def tensors(path: Path, part: str) -> dict:
    return getattr(load_checkpoint(path), part).state_dict()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoint_records_captions_and_sampler_for_export(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    base = load_checkpoint(random_checkpoint)
    sampler = {"name": "euler", "steps": 7, "guidance_scale": 3.0}
    captions = [json.loads(line)["text"] for line in (small_catalog / "metadata.jsonl").read_text().splitlines()]
    for name, teacher in (("plain", {}), ("fast", {"teacher": {"name": "another", "guidance_scale": 3.0}})):
        save_checkpoint(tmp_path / name, **base.parts(), meta={"name": name, "sampler": sampler} | teacher)
        out = tmp_path / f"{name} tuned"
        tuned = load_checkpoint(train(small_catalog, tmp_path / name, out, TrainingConfig(**FEW), device="cpu").path)
        assert tuned.meta["captions"] == list(dict.fromkeys(captions))
        assert tuned.meta.get("sampler") == (None if teacher else sampler)


def test_representative_captions_are_evenly_spaced() -> None:
    captions = [f"caption {n}" for n in range(1000)]
    some = representative_captions(captions + captions)
    assert len(some) == 250 and some == captions[::4]
    assert representative_captions(captions[:256]) == captions[:256] and representative_captions([]) == []


def test_run_tunes_everything_except_the_vae(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    reports: list[StepReport] = []
    config = TrainingConfig(**FEW, rsc_warmup_steps=1, lambda_rsc_encoder=0.1)
    result = train(small_catalog, random_checkpoint, tmp_path / "tuned", config, device="cpu", on_step=reports.append)
    assert (result.path, result.steps, result.pairs, result.invalid_rows) == (tmp_path / "tuned", 3, 12, [])
    assert [report.step for report in reports] == [1, 2, 3]
    assert set(reports[0].losses) == {"itc", "is", "rsc_encoder"}
    assert reports[0].learning_rate == 1e-3 > reports[2].learning_rate > 0

    tuned = load_checkpoint(result.path)
    assert tuned.shared
    for part in ("unet", "clip"):
        assert not equal(getattr(tuned, part).state_dict(), tensors(random_checkpoint, part)), part
    assert equal(tuned.vae.state_dict(), tensors(random_checkpoint, "vae"))
    assert tuned.meta["config"]["lambda_rsc_encoder"] == 0.1 and tuned.meta["step"] == 3
    assert tuned.meta["base"] == "random" and tuned.meta["data"]["pairs"] == 12
    assert tuned.meta["synthetic"] is False, "these images are not from the synthetic catalogs"


def test_eight_images_are_enough(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    lines = (small_catalog / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "few").mkdir()
    for line in lines:
        name = json.loads(line)["file_name"]
        (tmp_path / "few" / name).write_bytes((small_catalog / name).read_bytes())
    (tmp_path / "few" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = TrainingConfig(steps=2, warmup_steps=1, fit="pad")
    result = train(tmp_path / "few", random_checkpoint, tmp_path / "tuned", config, device="cpu")
    assert result.pairs == 8
    tuned = load_checkpoint(result.path)
    assert tuned.fit == "pad" and tuned.meta["fit"] == "pad", "later users must make images square in the same way"


def test_the_same_seed_gives_the_same_weights(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        train(small_catalog, random_checkpoint, tmp_path / name, TrainingConfig(**FEW, seed=seed), device="cpu")
    a, b, c = (tensors(tmp_path / name, "unet") for name in "abc")
    assert equal(a, b) and not equal(a, c)


def test_training_clip_alone_leaves_the_unet_unchanged(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    train(small_catalog, random_checkpoint, tmp_path / "clip", TrainingConfig(**FEW, lambda_is=0))
    assert equal(tensors(tmp_path / "clip", "unet"), tensors(random_checkpoint, "unet"))
    assert not equal(tensors(tmp_path / "clip", "clip"), tensors(random_checkpoint, "clip"))


class BaseOfRun:
    """Keeps the base that a run tunes, to disturb it from a callback: `train(…, on_start=base)`."""

    checkpoint: Checkpoint

    def __call__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint


@pytest.mark.parametrize("at", [1, 4])
def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, at: int
) -> None:
    class Poison(BaseOfRun):
        """Puts a NaN into the UNet before step `at`."""

        def __call__(self, checkpoint: Checkpoint) -> None:
            super().__call__(checkpoint)
            self.after_step(0)

        def after_step(self, step: int) -> None:
            if step == at - 1:
                self.checkpoint.unet.conv_out.bias.data.fill_(float("nan"))

    poison, out = Poison(), tmp_path / "tuned"
    config = TrainingConfig(**FEW | {"steps": 8}, save_every=2)
    with pytest.raises(TrainingError, match=rf"Step {at} is not finite \(itc .*, is nan") as caught:
        train(
            *(small_catalog, random_checkpoint, out, config),
            on_start=poison,
            on_step=lambda report: poison.after_step(report.step),
        )
    if at == 1:
        assert "No checkpoint had been saved" in str(caught.value) and not out.exists()
    else:
        assert "checkpoint of step 2 is kept" in str(caught.value)
        kept = load_checkpoint(out)
        assert kept.meta["step"] == 2
        assert all(tensor.isfinite().all() for tensor in kept.unet.state_dict().values())


def test_error_of_a_device_without_memory_states_what_helps(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    base = BaseOfRun()

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def on_step(report: StepReport) -> None:
        if report.step == 2:
            base.checkpoint.unet.register_forward_pre_hook(out_of_memory)

    config = TrainingConfig(**FEW, save_every=1)
    expected = r"cpu has too little memory for step 3\. The checkpoint of step 2 is kept .* Use --micro-batch"
    with pytest.raises(TrainingError, match=expected):
        train(
            *(small_catalog, random_checkpoint, tmp_path / "run", config),
            device="cpu",
            on_start=base,
            on_step=on_step,
        )
    assert load_checkpoint(tmp_path / "run").meta["step"] == 2


MEMORY = """
import resource, numpy as np
from unidiff_sdk.training.runtime.allocator import keep_freed_memory

def step():  # twelve times 20 MB, the size of activations
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    rows = [np.full(20 << 20, 1, np.uint8) for _ in range(12)]
    del rows
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

with keep_freed_memory():
    faults, held = [step() for _ in range(3)], resident()
print(faults, held - resident())
assert faults[0] > 100 * max(faults[1:], default=0), faults
assert held - resident() > 100 << 20
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is managed by another allocator")
def test_freed_memory_is_kept_for_the_next_step_and_returned_at_the_end() -> None:
    subprocess.run([sys.executable, "-c", MEMORY], check=True)


def test_second_interrupt_within_a_step_keeps_the_last_checkpoint(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    """Interrupted twice in step 3, after the weights were updated and before their average is."""
    updates: list[int] = []

    def interrupt_twice(*_: object) -> None:
        updates.append(1)
        if len(updates) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    config = TrainingConfig(**FEW, save_every=1)
    hook = register_optimizer_step_post_hook(interrupt_twice)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(small_catalog, random_checkpoint, tmp_path / "tuned", config)
    finally:
        hook.remove()
    assert load_checkpoint(tmp_path / "tuned").meta["step"] == 2
    train(small_catalog, random_checkpoint, tmp_path / "tuned", config, resume=True)
    train(small_catalog, random_checkpoint, tmp_path / "straight", config)
    assert equal(tensors(tmp_path / "tuned", "unet"), tensors(tmp_path / "straight", "unet"))


def test_pipeline_that_is_not_a_checkpoint_is_not_replaced(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "downloaded").mkdir()
    (tmp_path / "downloaded" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
        train(small_catalog, random_checkpoint, tmp_path / "downloaded", TrainingConfig(**FEW))
    assert (tmp_path / "downloaded" / "model_index.json").read_text() == "{}"


def test_contrastive_batch_of_one_pair_is_refused() -> None:
    with pytest.raises(OptionError, match="needs at least two pairs in a batch"):
        TrainingConfig(batch_size=1)
    TrainingConfig(batch_size=1, contrastive_batch=2)
    TrainingConfig(batch_size=1, lambda_itc=0.0)


def test_rows_without_the_group_column_are_grouped_by_caption() -> None:
    payloads = [{"sku": "7"}, {"sku": 7}, {}, {"sku": None}, {"other": 1}, {"sku": "None"}]
    pairs = SimpleNamespace(captions=["a", "b", "A red hat", "a red hat.", "boots", "c"], payloads=payloads)
    keys = group_keys(pairs, ("sku",))
    assert keys[0] == keys[1] and keys[2] == keys[3]
    assert len({keys[0], keys[2], keys[4], keys[5]}) == 4


def test_interrupt_saves_the_steps_done(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(report: StepReport) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small_catalog, random_checkpoint, tmp_path / "tuned", TrainingConfig(**FEW), on_step=interrupt)
    assert load_checkpoint(tmp_path / "tuned").meta["step"] == 2


def test_invalid_requests_are_refused_before_training(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        train(small_catalog, random_checkpoint, tmp_path)
    with pytest.raises(TrainingError, match="base itself"):
        train(small_catalog, random_checkpoint, random_checkpoint)
    with pytest.raises(DataError, match="no such folder"):
        train(tmp_path / "nowhere", random_checkpoint, tmp_path / "out")
    one = tmp_path / "one"
    one.mkdir()
    (one / "0.png").write_bytes((small_catalog / "0.png").read_bytes())
    (one / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "alone"}), encoding="utf-8")
    with pytest.raises(TrainingError, match="too few valid pairs: 1"):
        train(one, random_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finished_checkpoint_is_replaced_only_on_request(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(random_checkpoint, tmp_path / "out"))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    config = TrainingConfig(**(FEW | {"steps": 1}))
    with pytest.raises(CheckpointError, match=r"already holds a checkpoint.*--overwrite"):
        train(small_catalog, random_checkpoint, out, config, device="cpu")
    with pytest.raises(CheckpointError, match=r"already holds a checkpoint.*--overwrite"):
        distill(random_checkpoint, small_catalog, out, device="cpu")
    with pytest.raises(OptionError, match="exclude each other"):
        train(small_catalog, random_checkpoint, out, config, device="cpu", resume=True, overwrite=True)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    train(small_catalog, random_checkpoint, out, config, device="cpu", overwrite=True)
    assert load_checkpoint(out).meta["step"] == 1


def test_averaged_weights_follow_the_closed_form() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema = Ema(model, decay=0.5)
    expected = 0.0
    for update, value in enumerate((1.0, 2.0, 3.0), start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    assert ema.weights["weight"].item() == pytest.approx(expected)
    with ema.applied(model):
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 3.0


def test_learning_rate_warms_up_and_decays() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10)
    factors = [learning_rate_factor(step, config) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0 and factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0) and factors[10:] == sorted(factors[10:], reverse=True)
