"""The losses compared with independent formulas: open_clip's, the papers', and closed forms."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

import torch.nn.functional as F  # noqa: E402
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler  # noqa: E402
from diffusers.training_utils import compute_snr  # noqa: E402

from unidiff_sdk.training.objective import losses  # noqa: E402


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def scheduler(prediction_type: str = "epsilon", zero_snr: bool = False) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
    )


# --- ITC -------------------------------------------------------------------------------------------------------------


def open_clip_loss(image_features: torch.Tensor, text_features: torch.Tensor, scale: float) -> torch.Tensor:
    """As in open_clip's ClipLoss.forward, on one process."""
    logits_per_image = scale * image_features @ text_features.T
    logits_per_text = scale * text_features @ image_features.T
    labels = torch.arange(len(image_features))
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def test_itc_of_different_pairs_is_the_loss_of_open_clip() -> None:
    u, v, scale = unit(7, 5), unit(7, 5, seed=1), torch.tensor(2.3)
    expected = open_clip_loss(u, v, math.exp(2.3))
    torch.testing.assert_close(losses.itc(u, v, scale), expected)
    groups = torch.arange(7) * 3
    torch.testing.assert_close(losses.itc(u, v, scale, losses.same_meaning(groups, groups)), expected)


def test_sigmoid_itc_is_the_loss_of_transformers() -> None:
    """Of SiglipModel, with its own scale and bias; the towers only pass embeddings on."""
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tower | {"image_size": 8, "patch_size": 4}
    model = SiglipModel(SiglipConfig(text_config=tower | {"vocab_size": 9}, vision_config=vision)).eval()
    ids, pixels = (
        torch.arange(15).reshape(5, 3) % 9,
        torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    output = model(input_ids=ids, pixel_values=pixels, return_loss=True)
    ours = losses.sigmoid_itc(output.image_embeds, output.text_embeds, model.logit_scale, model.logit_bias)
    torch.testing.assert_close(ours, output.loss)


def test_sigmoid_itc_counts_pairs_of_equal_meaning_as_positives() -> None:
    """Closed form: with orthogonal embeddings, every logit is the bias, but for those of the diagonal."""
    u, scale, bias = torch.eye(3), torch.tensor(math.log(2.0)), torch.tensor(-1.0)
    groups = torch.tensor([4, 4, 7])
    loss = losses.sigmoid_itc(u, u, scale, bias, losses.same_meaning(groups, groups))

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    # 3 on the diagonal with logit 2 - 1, 2 other positives with logit -1, and 4 negatives with logit -1
    assert loss.item() == pytest.approx(-(3 * log_sigmoid(1) + 2 * log_sigmoid(-1) + 4 * log_sigmoid(1)) / 3)


def test_itc_divides_the_target_among_pairs_of_equal_meaning() -> None:
    u, v, scale = unit(4, 6), unit(4, 6, seed=1), torch.tensor(1.0)
    groups = torch.tensor([5, 5, 8, 9])
    logits = math.e * u @ v.T
    target = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2  # torch's own soft targets
    torch.testing.assert_close(losses.itc(u, v, scale, losses.same_meaning(groups, groups)), expected)


def test_equal_pairs_do_not_repel_each_other() -> None:
    """Two equal pairs are at the optimum as positives. As false negatives they would have a gradient."""
    u = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]), dim=1).requires_grad_()
    groups = torch.tensor([0, 0, 1])
    losses.itc(u, u.detach(), torch.tensor(4.6), losses.same_meaning(groups, groups)).backward()
    assert u.grad is not None and u.grad.abs().max() < 1e-4


def test_itc_of_one_repeated_embedding_is_log_n() -> None:
    same = unit(1, 8).expand(6, 8)
    torch.testing.assert_close(losses.itc(same, same, torch.tensor(3.0)), torch.tensor(math.log(6.0)))


def test_temperature_is_learned_and_clamped() -> None:
    logit_scale = torch.nn.Parameter(torch.tensor(4.0))
    losses.itc(unit(4, 8), unit(4, 8, seed=1), logit_scale).backward()
    assert logit_scale.grad is not None and logit_scale.grad != 0
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.5, 2.5)):
        with torch.no_grad():
            logit_scale.fill_(value)
        losses.clamp_logit_scale(logit_scale)
        assert logit_scale.item() == pytest.approx(expected)


def test_feature_distillation_is_the_mean_cosine_distance() -> None:
    u, base = unit(5, 6), unit(5, 6, seed=1)
    torch.testing.assert_close(losses.feature_distillation(u, base), (1 - F.cosine_similarity(u, base)).mean())
    assert losses.feature_distillation(u, u) == pytest.approx(0.0, abs=1e-6)
    assert losses.feature_distillation(u, -u) == pytest.approx(2.0, abs=1e-6)


# --- IS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_target_equal_those_of_diffusers(prediction_type: str) -> None:
    reference = scheduler(prediction_type)
    z, noise = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    t = torch.tensor([0, 17, 400, 700, 999])
    alpha_bar = reference.alphas_cumprod[t]
    z_t = losses.add_noise(z, noise, alpha_bar, prediction_type)
    torch.testing.assert_close(z_t, reference.add_noise(z, noise, t))
    target = losses.diffusion_target(z, noise, alpha_bar, prediction_type)
    expected = noise if prediction_type == "epsilon" else reference.get_velocity(z, noise, t)
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_equals_the_scheduler_of_diffusers(shift: float) -> None:
    """From the most noise (ᾱ = 0) to the least."""
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    levels = torch.tensor([0, 17, 400, 700, 999])
    z, noise = torch.randn(2, 5, 4, 3, 3)
    sigma, t = reference.sigmas[levels], reference.timesteps[levels]
    alpha_bar = 1 - sigma
    z_t = losses.add_noise(z, noise, alpha_bar, "flow")
    torch.testing.assert_close(z_t, reference.scale_noise(z, t, noise), atol=1e-6, rtol=0)
    torch.testing.assert_close(losses.diffusion_target(z, noise, alpha_bar, "flow"), noise - z)
    assert losses.min_snr_weight(alpha_bar, 5.0, "flow").eq(1).all()


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_is_the_closed_form(gamma: float) -> None:
    reference = scheduler()
    t = torch.arange(0, 1000, 7)
    snr = compute_snr(reference, t)
    alpha_bar = reference.alphas_cumprod[t]
    clipped = torch.minimum(snr, torch.full_like(snr, gamma))
    torch.testing.assert_close(losses.min_snr_weight(alpha_bar, gamma, "epsilon"), clipped / snr)
    torch.testing.assert_close(losses.min_snr_weight(alpha_bar, gamma, "v_prediction"), clipped / (snr + 1))
    assert losses.min_snr_weight(alpha_bar, 0.0, "epsilon").eq(1).all()


def test_min_snr_weight_is_finite_at_zero_terminal_snr() -> None:
    alpha_bar = scheduler(zero_snr=True).alphas_cumprod[[0, 500, 999]]
    for prediction_type in ("epsilon", "v_prediction"):
        assert losses.min_snr_weight(alpha_bar, 5.0, prediction_type).isfinite().all()


def test_synthesis_weights_samples_not_elements() -> None:
    output, target = torch.zeros(2, 1, 2, 2), torch.stack([torch.ones(1, 2, 2), 2 * torch.ones(1, 2, 2)])
    assert losses.synthesis(output, target, torch.tensor([1.0, 0.25])) == pytest.approx((1.0 + 0.25 * 4.0) / 2)


# --- RSC -------------------------------------------------------------------------------------------------------------


def test_linear_warmup() -> None:
    assert [losses.linear_warmup(step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert losses.linear_warmup(0, 0) == 1.0


def test_gradient_only_through_input_leaves_the_tower_without_gradient() -> None:
    """Also while another graph with the same weights waits for its backward pass."""
    tower, pixels = torch.nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    tower.bias.requires_grad = False
    plain = tower(pixels.detach())
    answer = losses.gradient_only_through_input(tower, pixels)
    torch.testing.assert_close(answer, plain)
    answer.sum().backward()
    torch.testing.assert_close(pixels.grad, tower.weight.sum(dim=0).expand(4, 3))
    assert tower.weight.grad is None
    plain.sum().backward()
    torch.testing.assert_close(tower.weight.grad, pixels.detach().sum(dim=0).expand(2, 3))
    assert tower.weight.requires_grad and not tower.bias.requires_grad
