"""RSC by score consistency: the scores, the parts that each side trains, and the choice of candidates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

import torch.nn.functional as F  # noqa: E402
from diffusers import DDPMScheduler  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from support.training_step import prepare_step  # noqa: E402

from unidiff_sdk.errors import OptionError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.captions import tokenize  # noqa: E402
from unidiff_sdk.training.objective import losses  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.objective.score_consistency import (  # noqa: E402
    GENERATOR_TEMPERATURE,
    ScoreInputs,
    choose_candidates,
    encoder_logits,
    generator_logits,
)

OFF = {"lambda_itc": 0.0, "lambda_is": 0.0}
STEP = 10_000  # after the warm-up


def test_generator_scores_are_those_of_diffusers(random_checkpoint: Path) -> None:
    """Each score by one image, one caption and one timestep at a time, with diffusers' scheduler and UNet."""
    checkpoint = load_checkpoint(random_checkpoint)
    model = JointModel(checkpoint).eval()
    config = TrainingConfig(rsc_timesteps=2)
    latents = torch.randn(2, 3, 4, 16, 16)
    captions = tokenize(checkpoint.tokenizer, ["a red dress", "green boots"])
    empty = tokenize(checkpoint.tokenizer, [""])
    inputs = ScoreInputs.sample(torch.Generator().manual_seed(3), 2, (4, 16, 16), torch.arange(1000), config)
    with torch.no_grad():
        ours = generator_logits(model, latents, captions, empty, inputs) * GENERATOR_TEMPERATURE

    scheduler = DDPMScheduler.from_config(checkpoint.scheduler.config)

    def error(image: torch.Tensor, ids: torch.Tensor, row: int) -> float:
        errors = []
        for t, noise in zip(inputs.t[row], inputs.noise[row], strict=True):
            noisy = scheduler.add_noise(image[None], noise[None], t[None])
            states = checkpoint.text_encoder(ids[None]).last_hidden_state
            output = checkpoint.unet(noisy, t, encoder_hidden_states=states).sample
            target = noise[None] if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(
                image[None], noise[None], t[None]
            )  # fmt: skip
            errors.append(F.mse_loss(output, target).item())
        return sum(errors) / len(errors)

    with torch.no_grad():
        for row in range(2):
            for column in range(3):
                without = error(latents[row, column], empty[0], row)
                expected = (without - error(latents[row, column], captions[row], row)) / without
                assert ours[row, column].item() == pytest.approx(expected, abs=2e-5)


def test_timesteps_have_high_noise() -> None:
    config = TrainingConfig(rsc_timesteps=3)
    t = ScoreInputs.sample(torch.Generator().manual_seed(0), 500, (1, 2, 2), torch.arange(1000), config).t
    assert t.shape == (500, 3) and t.min() >= 650 and t.max() < 950 and len(t.unique()) > 200


@pytest.mark.parametrize(
    ("term", "reached"),
    [
        ("lambda_rsc_encoder", {"clip.text_", "clip.vis"}),
        ("lambda_rsc_generator", {"unet.", "clip.text_model."}),
    ],
)
def test_each_side_trains_its_parts_only(
    small_catalog: Path, random_checkpoint: Path, term: str, reached: set[str]
) -> None:
    config = TrainingConfig(**(OFF | {term: 1.0}), batch_size=6)
    prepared = prepare_step(random_checkpoint, small_catalog, config)
    _, values = prepared.backpropagate(STEP)
    assert values.keys() == {term.removeprefix("lambda_")} and next(iter(values.values())) > 0
    # The text encoder shares its layers with CLIP's text tower, so both names are the same parameters.
    with_gradient = {
        name for name, p in prepared.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    shared = {name.replace("text_encoder.", "clip.text_model.") for name in with_gradient}
    for name in shared:
        assert any(name.startswith(prefix) for prefix in reached), name
    for prefix in reached:
        assert any(name.startswith(prefix) for name in shared), prefix
    assert "clip.logit_scale" not in with_gradient


def test_the_values_are_the_divergences_of_the_scores(small_catalog: Path, random_checkpoint: Path) -> None:
    """Both terms from scores computed outside the step, by torch's own distributions."""
    config = TrainingConfig(**OFF, lambda_rsc_encoder=1.0, lambda_rsc_generator=1.0, batch_size=6, rsc_captions=4)
    prepared = prepare_step(random_checkpoint, small_catalog, config)
    model, batches = prepared.model, prepared.batches
    batch = batches.load(batches.indices(STEP), 6)
    from unidiff_sdk.training.runtime.randomness import Purpose, seeded_generator

    with torch.no_grad():
        u, v = model.f(batch.clip_pixels), model.text_embeds(model.clip.text_model(batch.input_ids).pooler_output)
        candidates = choose_candidates(u, v, batch.groups, config, 6)
        s = encoder_logits(u, v, candidates, model.clip.logit_scale)
        inputs = ScoreInputs.sample(
            seeded_generator(batches.seed, Purpose.SCORE, STEP), 4, model.latent_shape, model.timesteps, config
        )
        g = generator_logits(model, batch.latents[candidates], batch.input_ids[:4], prepared.empty_ids, inputs)
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (s, g))
    _, values = prepared.backpropagate(STEP)
    assert values["rsc_encoder"] == pytest.approx(torch.distributions.kl_divergence(q, p).mean().item(), rel=1e-4)
    assert values["rsc_generator"] == pytest.approx(torch.distributions.kl_divergence(p, q).mean().item(), rel=1e-4)


def test_following_the_gradient_brings_the_rankings_together(small_catalog: Path, random_checkpoint: Path) -> None:
    config = TrainingConfig(**OFF, lambda_rsc_encoder=1.0, lambda_rsc_generator=1.0, batch_size=6)
    prepared = prepare_step(random_checkpoint, small_catalog, config)
    trainable = [p for p in prepared.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-3)
    totals = []
    for _ in range(12):
        optimizer.zero_grad()
        totals.append(sum(prepared.backpropagate(STEP)[1].values()))
        optimizer.step()
    assert totals[-1] < 0.5 * totals[0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_candidates_are_the_nearest_of_other_meaning(data: st.DataObject) -> None:
    """Compared with a sort by hand."""
    m = data.draw(st.integers(2, 12), label="pairs")
    samples = data.draw(st.integers(1, m), label="samples")
    groups = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=m, max_size=m), label="groups"))
    config = TrainingConfig(
        rsc_captions=data.draw(st.integers(1, 12), label="captions"),
        rsc_candidates=data.draw(st.integers(2, 6), label="candidates"),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    u, v = (F.normalize(torch.randn(m, 8, generator=generator), dim=1) for _ in range(2))
    found = choose_candidates(u, v, groups, config, samples)
    captions = min(config.rsc_captions, samples)
    others = [[j for j in range(samples) if groups[j] != groups[i]] for i in range(captions)]
    count = min(config.rsc_candidates - 1, min(map(len, others)))
    expected = [[i, *sorted(others[i], key=lambda j: -float(v[i] @ u[j]))[:count]] for i in range(captions)]
    assert found.tolist() == expected


@given(
    st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.floats(-20, 20), min_size=3, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_score_consistency_is_the_divergence(student: list[list[float]], teacher: list[float]) -> None:
    """Compared with the sum over candidates in plain Python."""

    def softmax(row: list[float]) -> list[float]:
        exponentials = [math.exp(x - max(row)) for x in row]
        return [e / sum(exponentials) for e in exponentials]

    p = softmax(teacher)
    expected = sum(
        sum(a * math.log(a / max(b, 1e-300)) for a, b in zip(p, softmax(row), strict=True) if a > 0) for row in student
    ) / len(student)
    value = losses.score_consistency(torch.tensor(student), torch.tensor([teacher] * len(student)))
    assert value.item() == pytest.approx(expected, abs=1e-4)


def test_equal_rankings_and_single_candidates_cost_nothing() -> None:
    logits = torch.randn(3, 4)
    assert losses.score_consistency(logits, logits + 2.0).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.score_consistency(torch.randn(3, 1), torch.randn(3, 1)).item() == 0.0
    assert losses.score_consistency(torch.zeros(0, 4), torch.zeros(0, 4)).item() == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rsc_candidates": 1}, "rsc_candidates is 1, but must be at least 2"),
        ({"rsc_captions": 0}, "rsc_captions is 0, but must be above 0"),
        ({"rsc_timesteps": 0}, "rsc_timesteps is 0"),
        ({"lambda_rsc_encoder": -0.1}, "lambda_rsc_encoder is -0.1"),
        ({"hard_negatives": -1}, "hard_negatives is -1"),
        ({"hard_negatives": 8, "batch_size": 8}, "a batch of 8 holds a pair and at most 7 negatives"),
        ({"hard_negatives": 2, "lambda_itc": 0.0}, "hard_negatives has no effect"),
    ],
)
def test_values_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainingConfig(**values)
