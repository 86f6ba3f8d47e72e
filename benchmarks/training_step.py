"""A joint training step next to the two plain steps that it replaces; the gain of cached latents; the cost of RSC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
from harness import Benchmark, options

if TYPE_CHECKING:
    from torch import Tensor

    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
    from unidiff_sdk.training.objective.joint_model import JointModel

BUDGET_S = 40  # per row
OURS, PLAIN = "UniDiff, ITC + IS", "transformers' CLIP step + diffusers' train_text_to_image step"
SCORES, REWARD = f"{OURS} + RSC encoder and generator", f"{OURS} + RSC reward"
Step = Callable[[], object]
Contestants = Callable[[], tuple[dict[str, Step], dict[str, Step]]]


@click.command()
@options
def main(**chosen: Any) -> None:
    """Time whole optimizer steps on the same pairs."""
    bench = Benchmark(__file__, "What does a joint training step cost?", **chosen)
    import torch

    from unidiff_sdk.training.runtime.allocator import keep_freed_memory

    torch.set_num_threads(bench.threads)
    with keep_freed_memory():  # as in a run of UniDiff, and for the peers as well
        _measure(bench)
    bench.finish()


def _measure(bench: Benchmark) -> None:
    for name, make, batch in (("tiny", _tiny, 64), ("mid-size", _mid_size, 4)):
        parameters = {"model": name, "batch": batch}
        for case, contestants, note in _cases(make, batch):
            case = f"{name}, {case}"
            if not bench.wants(case):
                continue
            ours, peers = contestants()
            flop = {who: _flop(step) for who, step in (ours | peers).items()}
            bench.row(
                case,
                ours=ours,
                peers=peers,
                parameters=parameters,
                items=batch,
                flop=flop,
                budget_s=BUDGET_S,
                note=note,
            )


def _cases(make: Callable[[], Checkpoint], batch: int) -> Iterator[tuple[str, Contestants, str | None]]:
    """Yield each row's name, a function that sets up its contestants (ours, peers), and a note on their differences."""
    differences = (
        "All parameters are trained except the VAE's and, in diffusers' step as in its script, the text encoder's. "
        "Only UniDiff averages weights. fp32, AdamW, clipped gradients. Memory that a step frees is kept for the next "
        "in both, as in a UniDiff run."
    )
    for case, encode in (("latents cached", False), ("latents encoded in every step", True)):
        yield (
            case,
            lambda encode=encode: (
                {OURS: _ours(make(), batch, encode=encode)},
                {PLAIN: _plain(make(), batch, encode=encode)},
            ),
            differences,
        )
    yield (
        "gain of cached latents",
        lambda: (
            {f"{OURS}, latents cached": _ours(make(), batch)},
            {f"{OURS}, encoded in every step": _ours(make(), batch, encode=True)},
        ),
        None,
    )
    yield (
        "bf16",
        lambda: (
            {OURS: _attending_in_float32(_ours(make(), batch, precision="bf16"))},
            {"the same, attention in bf16": _ours(make(), batch, precision="bf16")},
        ),
        None,
    )
    yield (
        "cost of RSC",
        lambda: (
            {
                SCORES: _ours(make(), batch, lambda_rsc_encoder=0.02, lambda_rsc_generator=0.01),
                REWARD: _ours(make(), batch, lambda_rsc_reward=0.01),
            },
            {OURS: _ours(make(), batch)},
        ),
        "RSC encoder and generator rank up to 4 images for each of up to 8 captions. RSC reward generates 4 images in "
        "6 steps.",
    )


def _flop(step: Step) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


# --- the models ------------------------------------------------------------------------------------------------------


def _tiny() -> Checkpoint:
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    return load_checkpoint("tiny")


def _mid_size() -> Checkpoint:
    """Return random weights: a UNet of 79 M parameters for 256 px, SD's VAE at half width, a CLIP of 29 M at 224 px."""
    from dataclasses import replace

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel

    from unidiff_sdk.training.checkpoints.checkpoint import ImageProcessor

    torch.manual_seed(0)
    tiny = _tiny()
    width, tiny_text = 384, tiny.clip.config.text_config
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 8, "num_attention_heads": 6}
    text = {name: getattr(tiny_text, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"max_position_embeddings": tiny_text.max_position_embeddings}
    vision = {"image_size": 224, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(projection_dim=256, text_config=tower | text, vision_config=tower | vision))
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(96, 192, 384, 384),
        cross_attention_dim=width,
        attention_head_dim=6,
    )
    vae = AutoencoderKL(
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=256,
    )
    processor = ImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    return replace(tiny, unet=unet, vae=vae.eval(), clip=clip, text_encoder=clip.text_model, image_processor=processor)


# --- the steps -------------------------------------------------------------------------------------------------------


def _images(n: int, size: int) -> Tensor:
    import torch

    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def _token_ids(n: int, checkpoint: Checkpoint) -> Tensor:
    from unidiff_sdk.datasets.synthetic import products
    from unidiff_sdk.training.data.captions import tokenize

    return tokenize(checkpoint.tokenizer, [str(product.row()["text"]) for product in products("fashion-woman", n)])


class _Pairs:
    """Always the same batch, decoded in memory; its latents, too, unless each step encodes them."""

    def __init__(self, model: JointModel, checkpoint: Checkpoint, batch: int, *, encode: bool) -> None:
        import torch

        self.model, self.size, self.seed, self.encode = model, batch, 0, encode
        self.images = _images(batch, checkpoint.image_size)
        self.clip_pixels = model.to_clip(_images(batch, model.clip_size))
        self.input_ids = _token_ids(batch, checkpoint)
        self.groups = torch.arange(batch)
        self.latents = torch.cat([model.encode(image) for image in self.images.split(1)])

    def indices(self, step: int) -> Any:
        import torch

        from unidiff_sdk.training.data.batches import BatchIndices

        return BatchIndices(torch.arange(self.size), torch.zeros(self.size, dtype=torch.bool))

    def refresh_negatives(self, step: int, processes: Any, *, together: bool) -> None:
        """There are no hard negatives."""

    def latent_shape(self, indices: Any) -> tuple[int, ...]:
        return self.model.latent_shape

    def load(self, indices: Any, samples: int) -> Any:
        from unidiff_sdk.training.objective.batch import Batch

        rows = indices.rows
        latents = self.model.encode(self.images[rows]) if self.encode else self.latents[rows]
        return Batch(self.clip_pixels[rows], latents[:samples], self.input_ids[rows], self.groups[rows])

    def load_latents(self, indices: Any) -> Tensor:
        return self.latents[indices.rows]

    def load_sizes(self, indices: Any) -> Tensor:
        from unidiff_sdk.training.objective.batch import whole_image_sizes

        height, width = self.images.shape[-2:]
        return whole_image_sizes(len(indices.rows), height, width, self.model.device)


def _ours(checkpoint: Checkpoint, batch: int, *, encode: bool = False, **settings: Any) -> Step:
    """Return UniDiff's step: losses, gradients, clipping, AdamW, averaged weights."""
    import torch

    from unidiff_sdk.training.config import TrainingConfig
    from unidiff_sdk.training.data.captions import tokenize
    from unidiff_sdk.training.loop.learner import Learner
    from unidiff_sdk.training.objective.joint_model import JointModel
    from unidiff_sdk.training.objective.tuning import set_trainable
    from unidiff_sdk.training.runtime.processes import Processes

    config = TrainingConfig(**{"batch_size": batch, "learning_rate": 1e-5, **settings})
    model = JointModel(checkpoint, config.precision).train()
    model.vae.eval()
    set_trainable(model, config)
    pairs = _Pairs(model, checkpoint, batch, encode=encode)
    learner = Learner(model, config, Processes(0, 1, torch.device("cpu")))
    empty = tokenize(checkpoint.tokenizer, [""])
    return lambda: learner.step(200, pairs, empty)  # type: ignore[arg-type]


def _attending_in_float32(step: Step) -> Step:
    """Return the step as a run of UniDiff computes it in half precision on a CPU."""
    from unidiff_sdk.training.runtime.attention import ShortAttentionInFloat32

    def within() -> object:
        with ShortAttentionInFloat32():
            return step()

    return within


def _plain(checkpoint: Checkpoint, batch: int, *, encode: bool) -> Step:
    """Return a step that tunes CLIP with its own loss and the UNet like diffusers' script, with two optimizers."""
    from copy import deepcopy

    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    from unidiff_sdk.training.objective.joint_model import JointModel

    pairs = _Pairs(JointModel(checkpoint), checkpoint, batch, encode=False)
    clip, unet, vae = checkpoint.clip.train(), checkpoint.unet.train(), checkpoint.vae.eval()
    text_encoder = deepcopy(checkpoint.text_encoder).requires_grad_(False)
    scheduler = DDPMScheduler.from_config(checkpoint.scheduler.config)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-5) for model in (clip, unet)]

    def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        # 1. CLIP
        ids = pairs.input_ids
        update(clip, optimizers[0], clip(input_ids=ids, pixel_values=pairs.clip_pixels, return_loss=True).loss)

        # 2. examples/text_to_image/train_text_to_image.py, with --snr_gamma 5
        with torch.no_grad():
            latents = pairs.latents
            if encode:
                latents = vae.encode(pairs.images * 2 - 1).latent_dist.sample() * vae.config.scaling_factor
            states = text_encoder(ids).last_hidden_state
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
        output = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, states).sample
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        snr = compute_snr(scheduler, timesteps)
        weight = torch.minimum(snr, 5.0 * torch.ones_like(snr))
        weight = weight / (snr if scheduler.config.prediction_type == "epsilon" else snr + 1)
        loss = F.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3)) * weight
        update(unet, optimizers[1], loss.mean())

    return step


if __name__ == "__main__":
    main()
