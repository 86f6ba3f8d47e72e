"""RSC by reward: the rollout, the parameters that it trains, and its gradient."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

import torch.nn.functional as F  # noqa: E402
from diffusers import DPMSolverMultistepScheduler  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from support.training_step import prepare_step  # noqa: E402

from unidiff_sdk.errors import OptionError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.captions import tokenize  # noqa: E402
from unidiff_sdk.training.objective import losses  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.objective.reward import CROPS, RewardInputs, crop, reward_loss, rollout  # noqa: E402

ONLY_REWARD = {"lambda_itc": 0.0, "lambda_is": 0.0, "lambda_rsc": 0.0, "lambda_rsc_reward": 1.0}
STEP = 10_000  # after the warm-up
CAPTIONS = ["a red dress", "green boots"]


def test_the_rollout_is_that_of_diffusers(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    model = JointModel(checkpoint).eval()
    config = TrainingConfig(**ONLY_REWARD, reward_steps=4, reward_guidance=3.0)
    ids, empty = tokenize(checkpoint.tokenizer, CAPTIONS), tokenize(checkpoint.tokenizer, [""])
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ours = rollout(model, ids, empty, noise, config)

    scheduler = DPMSolverMultistepScheduler.from_config(
        {"prediction_type": model.prediction_type, "timestep_spacing": "linspace"},
        trained_betas=(1 - model.alpha_bar / F.pad(model.alpha_bar[:-1], (1, 0), value=1.0)).tolist(),
    )
    scheduler.set_timesteps(config.reward_steps)
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        conditional, unconditional = (checkpoint.text_encoder(each).last_hidden_state for each in (ids, empty))
        for t in scheduler.timesteps:
            with_text = checkpoint.unet(x, t, conditional).sample
            without = checkpoint.unet(x, t, unconditional.expand_as(conditional)).sample
            x = scheduler.step(without + config.reward_guidance * (with_text - without), t, x).prev_sample
    torch.testing.assert_close(ours.detach(), x, atol=2e-4, rtol=2e-4)
    assert ours.requires_grad


def test_it_trains_the_unet_only(small_catalog: Path, random_checkpoint: Path) -> None:
    prepared = prepare_step(random_checkpoint, small_catalog, TrainingConfig(**ONLY_REWARD, batch_size=6))
    _, values = prepared.backpropagate(STEP)
    assert values.keys() == {"rsc_reward"} and values["rsc_reward"] > 0
    reached = {name for name, p in prepared.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached and all(name.startswith("unet.") for name in reached)


@pytest.mark.parametrize(("steps", "last"), [(1, 1), (3, 3)])
def test_the_gradient_is_that_of_finite_differences(random_checkpoint: Path, steps: int, last: int) -> None:
    """Along the gradient itself, where the whole rollout has gradients."""
    model, arguments = _loss_arguments(random_checkpoint, reward_steps=steps, reward_last_steps=last, reward_guidance=1)
    parameters = list(model.unet.parameters())
    reward_loss(*arguments).backward()
    direction = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    norm = torch.sqrt(sum(d.square().sum() for d in direction))
    assert norm > 0
    epsilon = 1e-2

    @torch.no_grad()
    def loss_at(distance: float) -> float:
        for p, d in zip(parameters, direction, strict=True):
            p += distance * d / norm
        value = reward_loss(*arguments).item()
        for p, d in zip(parameters, direction, strict=True):
            p -= distance * d / norm
        return value

    slope = (loss_at(epsilon) - loss_at(-epsilon)) / (2 * epsilon)
    assert slope == pytest.approx(norm.item(), rel=0.05)


def test_earlier_steps_are_constants(random_checkpoint: Path) -> None:
    """The gradient through the last step, with the latents before it computed by a rollout without gradients."""
    model, arguments = _loss_arguments(random_checkpoint, reward_steps=3, reward_last_steps=1)
    calls: list[torch.Tensor] = []
    hook = model.unet.register_forward_hook(lambda *call: calls.append(call[-1].sample))
    reward_loss(*arguments).backward()
    hook.remove()
    # Each step calls the UNet with and without a caption.
    assert [output.requires_grad for output in calls] == [False, False, False, False, True, False]


def test_following_the_gradient_raises_the_reward(small_catalog: Path, random_checkpoint: Path) -> None:
    prepared = prepare_step(random_checkpoint, small_catalog, TrainingConfig(**ONLY_REWARD, batch_size=6))
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


def test_crops_keep_constant_images_and_the_largest_is_the_image() -> None:
    numbers = RewardInputs.sample(torch.Generator().manual_seed(0), 3, (4, 8, 8)).crops
    constant = torch.tensor([0.1, 0.5, 0.9])[:, None, None, None].expand(3, 3, 16, 16)
    torch.testing.assert_close(crop(constant, numbers), constant.repeat_interleave(CROPS, dim=0))
    images = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(crop(images, torch.ones(3, 1, 3)), images)
    assert not torch.allclose(crop(images, torch.zeros(3, 1, 3)), images, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_steps": 2, "reward_last_steps": 3}, "only 2 reward_steps"),
        ({"reward_guidance": 0.5}, "at least 1"),
        ({"reward_guidance": float("nan")}, "reward_guidance"),
        ({"reward_captions": 0}, "reward_captions"),
        ({"lock_unet": True}, "lock_unet"),
        ({"lambda_rsc_reward": -1.0}, "lambda_rsc_reward"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainingConfig(**(ONLY_REWARD | options))


def test_its_options_have_no_effect_without_it() -> None:
    config = TrainingConfig(reward_steps=4)
    assert config.without_effect(prior=False, validation=False) == "reward_steps has no effect: lambda_rsc_reward is 0."


def _loss_arguments(base: Path, **options: object) -> tuple[JointModel, tuple]:
    checkpoint = load_checkpoint(base)
    model = JointModel(checkpoint).eval()
    config = TrainingConfig(**ONLY_REWARD, **options)
    ids, empty = tokenize(checkpoint.tokenizer, CAPTIONS), tokenize(checkpoint.tokenizer, [""])
    with torch.no_grad():
        v = model.text_embeds(model.clip.text_model(ids).pooler_output)
    inputs = RewardInputs.sample(torch.Generator().manual_seed(2), 2, (4, 16, 16))
    return model, (model, ids, empty, v, torch.eye(2), inputs, config)
