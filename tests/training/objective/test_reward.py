"""RSC by reward: the rollout, the parameters that it trains, and its gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

import torch.nn.functional as F  # noqa: E402
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from support.training_step import prepare_step  # noqa: E402

from unidiff_sdk.errors import OptionError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.captions import tokenize  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.objective import losses  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.objective.reward import (  # noqa: E402
    MARGIN,
    SMALLEST_VIEW,
    VIEWS,
    RewardInputs,
    augment,
    reward_loss,
    reward_table,
    rollout,
)
from unidiff_sdk.training.runtime.callbacks import StepReport  # noqa: E402

ONLY_REWARD = {"lambda_itc": 0.0, "lambda_is": 0.0, "lambda_rsc_reward": 1.0}
STEP = 10_000  # after the warm-up
CAPTIONS = ["a red dress", "green boots"]


@pytest.mark.parametrize(
    ("sampler", "scheduler_class"), [("ddim", DDIMScheduler), ("dpm++2m", DPMSolverMultistepScheduler)]
)
def test_the_rollout_is_that_of_diffusers(random_checkpoint: Path, sampler: str, scheduler_class: type) -> None:
    """With the base's own sampler, timestep spacing and guidance scale."""
    checkpoint = load_checkpoint(random_checkpoint)
    checkpoint.scheduler.register_to_config(timestep_spacing="trailing")
    checkpoint.meta["sampler"] = {"name": sampler, "steps": 20, "guidance_scale": 3.0}
    model = JointModel(checkpoint).eval()
    config = TrainingConfig(**ONLY_REWARD, rsc_reward_steps=4)
    ids, empty = tokenize(checkpoint.tokenizer, CAPTIONS), tokenize(checkpoint.tokenizer, [""])
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ours = rollout(model, reward_table(model, config), ids, empty, noise[:, None], config)

    scheduler = scheduler_class.from_config(checkpoint.scheduler.config)
    scheduler.set_timesteps(config.rsc_reward_steps)
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        conditional, unconditional = (checkpoint.text_encoder(each).last_hidden_state for each in (ids, empty))
        for t in scheduler.timesteps:
            with_text = checkpoint.unet(x, t, conditional).sample
            without = checkpoint.unet(x, t, unconditional.expand_as(conditional)).sample
            x = scheduler.step(without + 3.0 * (with_text - without), t, x).prev_sample
    torch.testing.assert_close(ours.detach(), x, atol=2e-4, rtol=2e-4)
    assert ours.requires_grad


@pytest.mark.parametrize("lora", [0, 2])
def test_it_trains_the_unet_and_nothing_else(small_catalog: Path, random_checkpoint: Path, lora: int) -> None:
    """Next to trainable towers. Adapters start as zero changes, of which only the second matrix has a gradient."""
    config = TrainingConfig(**ONLY_REWARD | {"lambda_itc": 1.0}, batch_size=6, lora_unet=lora)
    prepared = prepare_step(random_checkpoint, small_catalog, config)
    with_reward, values = prepared.backpropagate(STEP)
    reward_only = prepare_step(random_checkpoint, small_catalog, replace(config, lambda_itc=0.0))
    found, alone = reward_only.backpropagate(STEP)
    assert alone.keys() == {"rsc_reward"} and 0 < alone["rsc_reward"] == pytest.approx(values["rsc_reward"], rel=1e-5)
    reached = {name for name, gradient in found.items() if gradient.abs().sum() > 0}
    wanted = {name for name, p in prepared.model.named_parameters() if name.startswith("unet.") and p.requires_grad}
    assert reached == {name for name in wanted if not lora or ".lora_B." in name}
    for name in reached:
        torch.testing.assert_close(found[name], with_reward[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("steps", "last"), [(1, 1), (3, 3)])
def test_the_gradient_is_that_of_finite_differences(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, steps: int, last: int
) -> None:
    """In double precision, along two weights, where the whole rollout has gradients."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the losses compute in this precision
    options = {"rsc_reward_steps": steps, "rsc_reward_last": last, "rsc_reward_guidance": 1.0}
    model, arguments = _loss_arguments(random_checkpoint, precision=torch.float64, **options)
    reward_loss(*arguments).backward()
    for weight in (model.unet.conv_out.weight, model.unet.mid_block.resnets[0].conv1.weight):
        largest = int(weight.grad.abs().argmax())
        slope = weight.grad.flatten()[largest].item()
        epsilon, values = 1e-4, []
        for sign in (1, -1):
            with torch.no_grad():
                weight.view(-1)[largest] += sign * epsilon
                values.append(reward_loss(*arguments).item())
                weight.view(-1)[largest] -= sign * epsilon
        assert slope != 0 and (values[0] - values[1]) / (2 * epsilon) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_the_gradient_is_that_of_a_plain_loop(random_checkpoint: Path, last: int) -> None:
    """By diffusers' scheduler, transformers' CLIP and torch's cross-entropy, with the earlier steps as constants."""
    model, arguments = _loss_arguments(
        random_checkpoint, rsc_reward_steps=3, rsc_reward_last=last, rsc_reward_guidance=4.0
    )
    value = reward_loss(*arguments)
    value.backward()
    ours = {name: p.grad.clone() for name, p in model.unet.named_parameters() if p.grad is not None}

    checkpoint = load_checkpoint(random_checkpoint)
    _, _, ids, empty, v, _, inputs, _ = arguments
    scheduler = DDIMScheduler.from_config(checkpoint.scheduler.config)
    scheduler.set_timesteps(3)
    with torch.no_grad():
        conditional, unconditional = (checkpoint.text_encoder(each).last_hidden_state for each in (ids, empty))
    x = inputs.noise[:, 0]
    for number, t in enumerate(scheduler.timesteps):
        with_text = checkpoint.unet(x, t, conditional).sample
        without = checkpoint.unet(x, t, unconditional.expand_as(conditional)).sample.detach()
        x = scheduler.step(without + 4.0 * (with_text - without), t, x).prev_sample
        if number < 3 - last:
            x = x.detach()
    pixels = checkpoint.vae.decode(x / checkpoint.vae.config.scaling_factor).sample / 2 + 0.5
    views = augment(pixels.clamp(0, 1), inputs.views, flip=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in checkpoint.normalization)
    hidden = checkpoint.clip.vision_model((views - mean) / std).pooler_output
    u = F.normalize(checkpoint.clip.visual_projection(hidden), dim=1)
    logits = checkpoint.clip.logit_scale.exp() * u @ v.T
    expected = F.cross_entropy(logits, torch.arange(2).repeat_interleave(VIEWS))
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = {name: p.grad for name, p in checkpoint.unet.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5 * float(largest), rtol=1e-4)


def test_earlier_steps_are_constants(random_checkpoint: Path) -> None:
    model, arguments = _loss_arguments(
        random_checkpoint, rsc_reward_steps=3, rsc_reward_last=1, rsc_reward_guidance=5.0
    )
    calls: list[torch.Tensor] = []
    hook = model.unet.register_forward_hook(lambda *call: calls.append(call[-1].sample))
    reward_loss(*arguments).backward()
    hook.remove()
    # Each step calls the UNet with and without a caption.
    assert [output.requires_grad for output in calls] == [False, False, False, False, True, False]


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"checkpoint_activations": True}], ids=["bf16", "checkpointing"]
)
def test_half_precision_and_checkpointing_give_almost_the_same_gradient(
    small_catalog: Path, random_checkpoint: Path, options: dict
) -> None:
    settings = ONLY_REWARD | {"batch_size": 6, "rsc_reward_steps": 3, "rsc_reward_last": 2}
    plain, _ = prepare_step(random_checkpoint, small_catalog, TrainingConfig(**settings)).backpropagate(STEP)
    found, _ = prepare_step(random_checkpoint, small_catalog, TrainingConfig(**settings | options)).backpropagate(STEP)
    assert found.keys() == plain.keys()
    a, b = (torch.cat([gradients[name].flatten() for name in plain]) for gradients in (plain, found))
    assert F.cosine_similarity(a, b, dim=0) > (0.99 if options.get("precision") else 1 - 1e-5)


def test_following_the_gradient_raises_the_reward(small_catalog: Path, random_checkpoint: Path) -> None:
    config = TrainingConfig(**ONLY_REWARD, batch_size=6, rsc_reward_steps=2)
    prepared = prepare_step(random_checkpoint, small_catalog, config)
    optimizer = torch.optim.Adam([p for p in prepared.model.parameters() if p.requires_grad], lr=1e-3)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        values.append(prepared.backpropagate(STEP)[1]["rsc_reward"])
        optimizer.step()
    assert values[-1] < 0.9 * values[0]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_likelihood_is_that_of_the_softmax(data: st.DataObject) -> None:
    n, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    u, v = (F.normalize(torch.randn(k, 8, generator=generator), dim=1) for k in (n, m))
    positives = (torch.rand(n, m, generator=generator) < 0.5).float()
    positives[:, data.draw(st.integers(0, m - 1))] = 1
    probabilities = (10 * u @ v.T).softmax(dim=1)
    expected = -torch.stack(
        [row[chosen.bool()].sum().log() for row, chosen in zip(probabilities, positives, strict=True)]
    ).mean()
    found = losses.caption_likelihood(u, v, torch.tensor(10.0).log(), positives)
    torch.testing.assert_close(found, expected)


def test_views_keep_constant_images_and_the_largest_is_the_image() -> None:
    numbers = torch.rand(3, VIEWS, 4, generator=torch.Generator().manual_seed(0))
    constant = torch.tensor([0.1, 0.5, 0.9])[:, None, None, None].expand(3, 3, 16, 16)
    torch.testing.assert_close(augment(constant, numbers, flip=True), constant.repeat_interleave(VIEWS, dim=0))
    images = torch.rand(3, 3, 16, 16)
    whole = torch.tensor([1.0, 0.5, 0.5, 0.0]).expand(3, 1, 4)
    torch.testing.assert_close(augment(images, whole, flip=True), images)


def test_views_are_cropped_shifted_and_mirrored() -> None:
    """Compared with slices and flips of an image of 40 px, where every edge of a view falls between two pixels."""
    images = torch.rand(1, 3, 40, 40)
    shift = round(40 * MARGIN)
    left_top = torch.tensor(
        [[[1.0, 0.0, 0.0, 0.0]]]
    )  # the whole size, as far beyond the left and upper edge as it goes
    shifted = F.pad(images, (shift, 0, shift, 0), mode="replicate")[..., :40, :40]
    torch.testing.assert_close(augment(images, left_top, flip=False), shifted)
    mirrored = torch.tensor([[[1.0, 0.5, 0.5, 0.5]]])
    torch.testing.assert_close(augment(images, mirrored, flip=True), images.flip(-1))
    torch.testing.assert_close(augment(images, mirrored, flip=False), images)
    inner = round(40 * (1 - SMALLEST_VIEW) / 2)
    middle = F.interpolate(images[..., inner:-inner, inner:-inner], (40, 40), mode="bilinear")
    cropped = augment(images, torch.tensor([[[0.0, 0.5, 0.5, 0.0]]]), flip=False)
    torch.testing.assert_close(cropped[..., 2:-2, 2:-2], middle[..., 2:-2, 2:-2])  # the crop's own edges differ


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rsc_reward_steps": 2, "rsc_reward_last": 3}, "only 2 denoising steps"),
        ({"rsc_reward_guidance": 0.5}, "at least 1"),
        ({"rsc_reward_guidance": float("nan")}, "rsc_reward_guidance"),
        ({"rsc_reward_captions": 0}, "rsc_reward_captions"),
        ({"batch_size": 1}, "lambda_rsc_reward compares the captions of a batch"),
        ({"lock_unet": True}, "lock_unet"),
        ({"lambda_rsc_reward": -1.0}, "lambda_rsc_reward"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainingConfig(**(ONLY_REWARD | options))


def test_settings_without_effect_are_named() -> None:
    def reason(**options: object) -> str | None:
        return TrainingConfig(**options).without_effect(prior=False, validation=False)

    assert reason(rsc_reward_steps=4) == "rsc_reward_steps has no effect: lambda_rsc_reward is 0."
    assert reason(**ONLY_REWARD, lora_text=4).startswith("lora_text has no effect")
    assert reason(**ONLY_REWARD, group=("brand",), contrastive_batch=128, hard_negatives=3) is None


def test_steps_that_the_sampler_does_not_support_are_refused_before_training(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(**ONLY_REWARD, steps=1, batch_size=4, rsc_reward_steps=2000)
    with pytest.raises(OptionError, match="steps is 2000"):
        train(small_catalog, random_checkpoint, tmp_path / "out", config, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_ends_with_the_same_weights(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    config = TrainingConfig(
        **ONLY_REWARD | {"lambda_itc": 1.0}, steps=3, batch_size=4, save_every=1, warmup_steps=1, rsc_warmup_steps=1
    )
    config = replace(config, rsc_reward_steps=2)
    train(small_catalog, random_checkpoint, tmp_path / "whole", config, device="cpu")

    def interrupt(report: StepReport) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small_catalog, random_checkpoint, tmp_path / "parts", config, device="cpu", on_step=interrupt)
    train(small_catalog, random_checkpoint, tmp_path / "parts", config, device="cpu", resume=True)
    a, b = (load_checkpoint(tmp_path / name).unet.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    start = load_checkpoint(random_checkpoint).unet.state_dict()
    assert any(not torch.equal(a[name], start[name]) for name in a)


def _loss_arguments(
    base: Path, *, precision: torch.dtype = torch.float32, **options: object
) -> tuple[JointModel, tuple]:
    checkpoint = load_checkpoint(base)
    model = JointModel(checkpoint).eval().to(precision)
    config = TrainingConfig(**ONLY_REWARD, **options)
    ids, empty = tokenize(checkpoint.tokenizer, CAPTIONS), tokenize(checkpoint.tokenizer, [""])
    with torch.no_grad():
        v = model.text_embeds(model.clip.text_model(ids).pooler_output)
    table = reward_table(model, config)
    inputs = RewardInputs.sample(torch.Generator().manual_seed(2), 2, (4, 16, 16), table)
    inputs = RewardInputs(inputs.noise.to(precision), inputs.views)
    return model, (model, table, ids, empty, v, torch.eye(2), inputs, config)
