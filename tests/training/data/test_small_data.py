"""Against the dangers of small data: a leash to the base, pairs of its own world, and more data than memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

import torch.nn.functional as F  # noqa: E402
from diffusers import DDIMScheduler  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPModel  # noqa: E402

from unidiff_sdk.errors import DataError, OptionError, TrainingError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import Prior, TrainingConfig  # noqa: E402
from unidiff_sdk.training.data import dataset_rows as row_storage  # noqa: E402
from unidiff_sdk.training.data.batches import Batches, group_keys, load_pairs, tokenize  # noqa: E402
from unidiff_sdk.training.data.dataset_rows import empty_rows  # noqa: E402
from unidiff_sdk.training.data.latents import encode_latents  # noqa: E402
from unidiff_sdk.training.evaluation.validation import draw  # noqa: E402
from unidiff_sdk.training.loop.gradients import backpropagate  # noqa: E402
from unidiff_sdk.training.loop.prior_preservation import draw_prior  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.objective.joint_model import Draws, JointModel  # noqa: E402
from unidiff_sdk.training.objective.tuning import choose_trainable  # noqa: E402
from unidiff_sdk.training.runtime.processes import Processes  # noqa: E402
from unidiff_sdk.training.runtime.randomness import Purpose, generator, seed_of  # noqa: E402

ALONE = Processes(0, 1, torch.device("cpu"))
FEW = {"steps": 3, "batch_size": 5, "warmup_steps": 0, "learning_rate": 3e-3, "lambda_rsc": 0.0}
PLAIN = {"lambda_rsc": 0.0, "caption_dropout": 0.0, "min_snr_gamma": 0.0}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return JointModel(load_checkpoint(path)).state_dict()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pairs of another world than the catalog's."""
    folder = tmp_path_factory.mktemp("world")
    rows = []
    for number in range(7):
        Image.effect_noise((40, 40), 20 + 10 * number).convert("RGB").save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"noise, {number} of seven"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def batches_of(model: JointModel, checkpoint, folder: Path, config: TrainingConfig, size: int, seed: int) -> Batches:
    pairs = load_pairs(folder, checkpoint)
    ids = tokenize(checkpoint.tokenizer, pairs.captions)
    leash = config.lambda_leash > 0
    return Batches(model, pairs, ids, group_keys(pairs), size=size, flip=config.flip, seed=seed, leash=leash)


def step(base: Path, data: Path, world: Path | None, disturbed: bool = False, **settings: object):
    """The gradients and values of one step, and (model, batches, those of the prior) that they are of."""
    config = TrainingConfig(**settings)
    checkpoint = load_checkpoint(base)
    model = JointModel(checkpoint).train()
    choose_trainable(model, config)
    batches = batches_of(model, checkpoint, data, config, config.batch_size, config.seed)
    prior = world and batches_of(model, checkpoint, world, config, config.prior_batch, seed_of(0, Purpose.PRIOR))
    if disturbed:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.clip.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    empty = tokenize(checkpoint.tokenizer, [""])
    values = backpropagate(
        model, batches, config, step=0, empty_ids=empty, teacher=None, processes=ALONE, prior=prior or None
    )
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, values, (model, batches, prior)


# --- the leash -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_the_leash_is_the_distance_of_transformers_own_embeddings(
    small_catalog: Path, random_checkpoint: Path, flip: bool
) -> None:
    settings = {**PLAIN, "lambda_leash": 0.3, "batch_size": 9, "flip": flip}
    _, values, (model, batches, _) = step(random_checkpoint, small_catalog, None, disturbed=True, **settings)
    choice = batches.choose(0)
    assert choice.mirror.any() == flip
    batch = batches.load(choice, 9)
    base = CLIPModel.from_pretrained(random_checkpoint / "clip").eval()
    with torch.no_grad():
        a, b = (clip(input_ids=batch.input_ids, pixel_values=batch.clip_pixels) for clip in (base, model.clip))
    picture = 1 - F.cosine_similarity(a.image_embeds, b.image_embeds).mean()
    text = 1 - F.cosine_similarity(a.text_embeds, b.text_embeds).mean()
    assert values["leash"] == pytest.approx(float(picture + text) / 2, rel=1e-3) and values["leash"] > 1e-3


def test_at_the_base_the_leash_is_slack(small_catalog: Path, random_checkpoint: Path) -> None:
    _, values, _ = step(random_checkpoint, small_catalog, None, **PLAIN, lambda_leash=1.0, batch_size=9)
    assert values["leash"] == pytest.approx(0, abs=1e-6)


def test_the_leash_pulls_the_towers_and_nothing_else(small_catalog: Path, random_checkpoint: Path) -> None:
    """The difference that it makes to a step's gradients; parts of the batch make the same."""
    settings = {**PLAIN, "batch_size": 9}
    without, _, _ = step(random_checkpoint, small_catalog, None, disturbed=True, **settings)
    with_it, _, _ = step(random_checkpoint, small_catalog, None, disturbed=True, **settings, lambda_leash=2.0)
    parts, _, _ = step(
        random_checkpoint, small_catalog, None, disturbed=True, **settings, lambda_leash=2.0, micro_batch=4
    )
    pulled = {name for name in with_it if not torch.allclose(with_it[name], without[name], atol=1e-6)}
    towers = ("clip.text_model", "clip.vision_model", "clip.text_projection", "clip.visual_projection", "text_encoder")
    assert {prefix for prefix in towers for name in pulled if name.startswith(prefix)} >= set(towers[:4])
    assert all(name.startswith((*towers, "f.")) for name in pulled)
    for name in with_it:
        torch.testing.assert_close(parts[name], with_it[name], atol=1e-5, rtol=1e-4, msg=name)


def test_without_a_contrast_the_leash_holds_the_text_tower(small_catalog: Path, random_checkpoint: Path) -> None:
    settings = {**PLAIN, "batch_size": 9, "lambda_itc": 0.0, "lambda_leash": 1.0, "micro_batch": 4}
    gradients, values, _ = step(random_checkpoint, small_catalog, None, disturbed=True, **settings)
    assert set(values) == {"is", "leash"} and gradients["clip.text_projection.weight"].abs().sum() > 0
    assert not any(name.startswith("clip.vis") for name in gradients)


def test_on_the_leash_embeddings_stay_nearer_to_the_base(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    drift = {}
    for name, leash in {"free": 0.0, "leashed": 30.0}.items():
        config = TrainingConfig(**(FEW | {"steps": 8, "lambda_leash": leash}), ema_decay=0.0)
        out = train(small_catalog, random_checkpoint, tmp_path / name, config, device="cpu").path
        ids = torch.tensor(load_checkpoint(out).tokenizer(["a red dress", "a blue dress"]).input_ids)
        base, tuned = (CLIPModel.from_pretrained(path / "clip") for path in (random_checkpoint, out))
        with torch.no_grad():
            a, b = (clip.get_text_features(input_ids=ids) for clip in (base, tuned))
        a, b = (getattr(answer, "pooler_output", answer) for answer in (a, b))
        drift[name] = 1 - float(F.cosine_similarity(a, b).mean())
    assert drift["leashed"] < 0.5 * drift["free"]


# --- prior preservation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [0, 2])
def test_the_prior_adds_the_denoising_gradient_of_its_pairs(
    small_catalog: Path, random_checkpoint: Path, world: Path, micro: int
) -> None:
    """DreamBooth's sum, the prior's part by diffusers' own scheduler and a plain mean squared error."""
    settings = {**PLAIN, "batch_size": 5, "prior_batch": 4, "lambda_prior": 0.7, "lambda_is": 1.5, "micro_batch": micro}
    alone, _, _ = step(random_checkpoint, small_catalog, None, **settings)
    both, values, (_, _, prior) = step(random_checkpoint, small_catalog, world, **settings)

    checkpoint = load_checkpoint(random_checkpoint)
    scheduler = DDIMScheduler.from_config(checkpoint.scheduler.config)
    batch = prior.load(prior.choose(0), 4)
    random = generator(prior.seed, Purpose.NOISE, 0)
    draws = Draws.of(random, 4, prior.latent_shape, 1000, TrainingConfig(**settings), pairs=4)
    noisy = scheduler.add_noise(batch.latents, draws.noise, draws.t)
    answer = checkpoint.unet(noisy, draws.t, checkpoint.text_encoder(batch.input_ids).last_hidden_state).sample
    loss = F.mse_loss(answer, draws.noise)
    loss.backward()
    assert values["prior"] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in checkpoint.unet.named_parameters():
        expected = alone[f"unet.{name}"] + 0.7 * 1.5 * parameter.grad
        torch.testing.assert_close(both[f"unet.{name}"], expected, atol=1e-5, rtol=1e-3, msg=name)
    text = {name: p.grad for name, p in checkpoint.clip.named_parameters() if p.grad is not None}
    assert text and all(name.startswith("text_model.") for name in text)
    for name, gradient in text.items():
        expected = alone[f"clip.{name}"] + 0.7 * 1.5 * gradient
        torch.testing.assert_close(both[f"clip.{name}"], expected, atol=1e-5, rtol=1e-3, msg=name)


def test_the_leash_holds_also_on_the_prior(small_catalog: Path, random_checkpoint: Path, world: Path) -> None:
    settings = {**PLAIN, "batch_size": 5, "prior_batch": 7, "lambda_leash": 0.5, "lambda_is": 0.0}
    _, values, (model, _, prior) = step(random_checkpoint, small_catalog, world, disturbed=True, **settings)
    batch = prior.load(prior.choose(0), 7)
    base = CLIPModel.from_pretrained(random_checkpoint / "clip").eval()
    with torch.no_grad():
        a, b = (clip(input_ids=batch.input_ids, pixel_values=batch.clip_pixels) for clip in (base, model.clip))
    expected = (
        1
        - (
            F.cosine_similarity(a.image_embeds, b.image_embeds) + F.cosine_similarity(a.text_embeds, b.text_embeds)
        ).mean()
        / 2
    )
    assert set(values) == {"itc", "leash", "prior_leash"} and values["prior_leash"] == pytest.approx(
        float(expected), rel=1e-3
    )


def test_a_run_with_all_of_it_resumes_bit_for_bit(
    small_catalog: Path, random_checkpoint: Path, world: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(**FEW, lambda_leash=0.5, prior_batch=3, flip=True)

    def interrupt(report) -> None:
        assert {"leash", "prior", "prior_leash"} <= set(report.losses)
        if report.step == 2:
            raise KeyboardInterrupt

    def run(name: str, folder: Path = world, **more: object):
        prior = Prior(folder)
        return train(small_catalog, random_checkpoint, tmp_path / name, config, device="cpu", prior=prior, **more)

    with pytest.raises(KeyboardInterrupt):
        run("parts", on_step=interrupt)
    with pytest.raises(TrainingError, match="has prior"):
        run("parts", small_catalog, resume=True)
    run("parts", resume=True)
    run("whole")
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    train(small_catalog, random_checkpoint, tmp_path / "without", replace(config, lambda_leash=0.0), device="cpu")
    assert not equal(weights(tmp_path / "without"), weights(tmp_path / "whole"))


def test_the_base_draws_its_own_world(random_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    model = JointModel(checkpoint).train()
    prior = Prior(tmp_path / "drawn", ("a coat", "a mug"), pairs=20)
    draw_prior(prior, model, checkpoint, seed=3)
    assert model.training
    pairs = load_pairs(prior.folder, checkpoint)
    assert pairs.captions == 10 * ["a coat", "a mug"] and not pairs.bad
    model.eval()
    expected = draw(model, checkpoint, 8 * ["a coat", "a mug"], seed=seed_of(3, Purpose.PRIOR, 0))
    for number, picture in enumerate(expected):
        assert (torch.from_numpy(picture) == pairs.images[:][number].permute(1, 2, 0)).all()

    before = {file.name: file.read_bytes() for file in prior.folder.iterdir()}
    metadata = prior.folder / "metadata.jsonl"
    metadata.write_text("\n".join(metadata.read_text().splitlines()[:16]) + "\n")  # as after an interruption
    draw_prior(prior, model, checkpoint, seed=3)
    assert {file.name: file.read_bytes() for file in prior.folder.iterdir()} == before
    draw_prior(replace(prior, pairs=5), model, checkpoint, seed=4)
    assert {file.name: file.read_bytes() for file in prior.folder.iterdir()} == before, "enough is there"


def test_a_prior_that_cannot_be(small_catalog: Path, random_checkpoint: Path, world: Path, tmp_path: Path) -> None:
    def run(prior: Prior, **settings: object) -> None:
        config = TrainingConfig(**(FEW | settings))
        train(small_catalog, random_checkpoint, tmp_path / "run", config, device="cpu", prior=prior)

    with pytest.raises(OptionError, match="at least one pair"):
        Prior(world, pairs=0)
    with pytest.raises(OptionError, match="no weight"):
        run(Prior(world), lambda_prior=0.0)
    with pytest.raises(OptionError, match="no weight"):
        run(Prior(world), lambda_is=0.0)
    with pytest.raises(DataError, match="no such folder"):
        run(Prior(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be kept"):
        run(Prior(tmp_path / "file", ("a coat",), pairs=1))


# --- more data than memory -------------------------------------------------------------------------------------------


def test_latents_that_do_not_fit_in_memory_are_the_same(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    model, images = JointModel(checkpoint), load_pairs(small_catalog, checkpoint).images
    kept = encode_latents(model, images, scratch=tmp_path)
    config = TrainingConfig(**FEW, lambda_leash=0.5, flip=True)
    train(small_catalog, random_checkpoint, tmp_path / "kept", config, device="cpu")
    monkeypatch.setattr(row_storage, "MEMORY", 0)
    paged = encode_latents(model, images, scratch=tmp_path / "new folder")
    assert torch.equal(paged, kept) and list((tmp_path / "new folder").iterdir()) == []
    train(small_catalog, random_checkpoint, tmp_path / "paged", config, device="cpu")
    assert equal(weights(tmp_path / "paged"), weights(tmp_path / "kept"))


def test_a_disk_that_is_too_small_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_storage, "MEMORY", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DataError, match=r"0\.0 GB, which are too many for memory, cannot lie in"):
            empty_rows(1 << 20, (4,), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BEYOND = """
import re, resource, sys, torch
from pathlib import Path
from unidiff_sdk.training import rows

data = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (data + (64 << 20), resource.RLIM_INFINITY))  # 64 MiB more than now
shape = (1 << 20, (64,))  # 256 MiB
try:
    rows.empty_rows(*shape, Path(sys.argv[1]))
except RuntimeError:
    rows.MEMORY = 128 << 20
    paged = rows.empty_rows(*shape, Path(sys.argv[1]))
    paged[::4096] = torch.arange(256.0)[:, None]
    assert paged[4096 * 255].eq(255).all() and paged.shape == (1 << 20, 64)
    print("more than memory")
"""


def test_more_rows_than_the_process_may_hold(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BEYOND, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "more than memory\n", done.stderr
    assert list(tmp_path.iterdir()) == []
