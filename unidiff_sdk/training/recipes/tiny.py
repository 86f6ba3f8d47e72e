"""The recipe of the tiny base: tokenizer, VAE, CLIP and UNet, each trained from scratch on the synthetic catalogs.

    python -m unidiff_sdk.training.recipes.tiny WORK -o CHECKPOINT        (make tiny)

Stages run in order, and each saves its result in WORK, so that an interrupted recipe resumes:
images -> tokenizer -> vae -> clip -> latents -> unet. The VAE comes first because its quality bounds that of the UNet.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from unidiff_sdk.datasets.synthetic import CATALOGS, Product, brief_caption, products, render
from unidiff_sdk.training.checkpoints.saving import save_checkpoint
from unidiff_sdk.training.data.captions import representative_captions
from unidiff_sdk.training.objective import losses
from unidiff_sdk.training.runtime.allocator import keep_freed_memory
from unidiff_sdk.training.runtime.attention import ShortAttentionInFloat32

from . import tiny_models as tiny


@dataclass(frozen=True)
class Stage:
    """Training settings of one part.

    Attributes:
        steps: Optimizer steps.
        batch: Images per step.
        lr: Peak learning rate.
        warmup: Steps of linear warm-up.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 200


PER_CATALOG = 10_000
SEED = 0
VAE = Stage(steps=5000, batch=8, lr=1.5e-3)
CLIP = Stage(steps=1700, batch=128, lr=1e-3)
UNET = Stage(steps=9000, batch=32, lr=1e-3)
RECIPE = {"vae": VAE, "clip": CLIP, "unet": UNET}
BRIEF_SHARE = 0.4  # of the texts are short, as typed queries are
CAPTION_DROPOUT = 0.1  # trains the unconditional direction of guidance
MIN_SNR_GAMMA = 5.0
EMA_DECAY = 0.999


def training_products(catalogs: Sequence[str] = tuple(CATALOGS), per_catalog: int = PER_CATALOG) -> list[Product]:
    """The products that a base is trained on: `per_catalog` of the train split of each catalog."""
    return [p for name in catalogs for p in products(name, per_catalog, SEED, "train")]


def _pixels(product: Product) -> NDArray[np.uint8]:
    return np.asarray(render(product, tiny.IMAGE_SIZE))


def render_all(chosen: list[Product], file: Path) -> NDArray[np.uint8]:
    """Render every product once: uint8[n, 64, 64, 3], cached in `file`."""
    if not file.exists():
        with ProcessPoolExecutor() as pool:
            rendered = pool.map(_pixels, chosen, chunksize=64)
            images = np.stack(list(track(rendered, "Rendering", total=len(chosen))))
        np.save(file, images)
    return np.load(file, mmap_mode="r")


def batches(n: int, stage: Stage, seed: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(step, indices of its batch): epoch after epoch, each in its own seeded order."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for step in range(stage.steps):
        if len(order) < stage.batch:
            order = rng.permutation(n)
        batch, order = order[: stage.batch], order[stage.batch :]
        yield step, np.sort(batch)


def learning_rate(step: int, stage: Stage) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to 1 % of the peak."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    progress = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@keep_freed_memory()
def fit(
    name: str,
    model: nn.Module,
    stage: Stage,
    n: int,
    loss_of: Callable[[NDArray[np.int64]], Tensor],
    *,
    work: Path,
    weight_decay: float = 0.0,
    after: Callable[[], None] | None = None,
) -> None:
    """Train `model` with AdamW. Resumes from `work`, where the state is saved every 500 steps.

    Args:
        name: Name of the stage, for its state file and its log lines.
        n: Number of images.
        loss_of: Computes the loss of a batch, given its indices.
        after: Called after each optimizer step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    state_file = work / f"{name}.state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    model.train()
    started, mean = time.monotonic(), 0.0
    for step, index in batches(n, stage, SEED):
        if step < first:
            continue
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        torch.manual_seed(SEED * 1_000_003 + step)
        with ShortAttentionInFloat32():
            loss = loss_of(index)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss of {name} is {loss.item()} at step {step}.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if after:
            after()
        mean = loss.item() if step == first else 0.99 * mean + 0.01 * loss.item()
        if (step + 1) % 100 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            print(f"{name} {step + 1}/{stage.steps}  loss {mean:.5f}  {pace:.3f} s/step", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == stage.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
    model.eval()


def autocast() -> torch.autocast:
    """bf16 for forward passes: half the time of fp32 on processors that support it."""
    return torch.autocast("cpu", torch.bfloat16)


def to_unit(images: NDArray[np.uint8]) -> Tensor:
    """uint8[n, h, w, 3] -> float32[n, 3, h, w] in [-1, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def train_vae(images: NDArray[np.uint8], work: Path, stage: Stage) -> AutoencoderKL:
    """Train the VAE: squared error, because its metric is PSNR, and a small KL term for latents near unit scale."""
    torch.manual_seed(SEED)
    vae = tiny.build_vae()

    def loss_of(index: NDArray[np.int64]) -> Tensor:
        x = to_unit(images[index])
        with autocast():
            posterior = vae.encode(x).latent_dist
            restored = vae.decode(posterior.sample()).sample
        return F.mse_loss(restored.float(), x) + 1e-5 * posterior.kl().float().mean() / 1024

    fit("vae", vae, stage, len(images), loss_of, work=work)
    return vae


@dataclass(frozen=True)
class Texts:
    """Two texts per image: row i of n is the caption of image i, row n + i a short query for it.

    Attributes:
        texts: 2n texts.
        image_attributes: int64[n, columns], the attributes of each image as numbers.
        text_attributes: int64[2n, columns], the attributes that each text names. -1: not named.
    """

    texts: list[str]
    image_attributes: Tensor
    text_attributes: Tensor

    @classmethod
    def of_products(cls, chosen: list[Product]) -> Texts:
        """The texts of products. The columns are the union of the catalogs' columns."""
        columns = sorted({column for product in chosen for column in product.attributes})
        numbers: dict[str | None, int] = {}
        rows = [[numbers.setdefault(p.attributes.get(c), len(numbers)) for c in columns] for p in chosen]
        briefs = [brief_caption(product) for product in chosen]
        named = torch.tensor([[column in attributes for column in columns] for _, attributes in briefs])
        attributes = torch.tensor(rows)
        texts = [product.caption for product in chosen] + [text for text, _ in briefs]
        return cls(texts, attributes, torch.cat([attributes, attributes.where(named, -1)]))

    def sample(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """One of the two texts of each image, at random."""
        brief = torch.rand(len(index)).numpy() < BRIEF_SHARE
        return index + len(self.image_attributes) * brief


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, int64[n, 32], padded and truncated as in the diffusers pipeline."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_clip(
    tokenizer: CLIPTokenizer, images: NDArray[np.uint8], texts: Texts, work: Path, stage: Stage
) -> CLIPModel:
    """Train CLIP: symmetric InfoNCE on captions and short queries. All matching images and texts are positives."""
    torch.manual_seed(SEED)
    clip = tiny.build_clip(tokenizer)
    ids = tokens(tokenizer, texts.texts)
    mean, std = (torch.tensor(v)[:, None, None] for v in (tiny.CLIP_MEAN, tiny.CLIP_STD))

    def loss_of(index: NDArray[np.int64]) -> Tensor:
        x = to_unit(images[index])
        shift = torch.randint(-3, 4, (2,)).tolist()
        x = torch.roll(F.pad(x, (3, 3, 3, 3), mode="replicate"), shift, (2, 3))[:, :, 3:-3, 3:-3]
        with autocast():
            chosen = texts.sample(index)
            out = clip(input_ids=ids[chosen], pixel_values=((x + 1) / 2 - mean) / std)
        # A text matches every image with the attributes that it names (-1: not named).
        named = texts.text_attributes[chosen][None, :, :]
        positives = ((texts.image_attributes[index][:, None, :] == named) | (named < 0)).all(-1).float()
        return losses.itc(out.image_embeds.float(), out.text_embeds.float(), clip.logit_scale, positives)

    fit(
        "clip", clip, stage, len(images), loss_of, work=work, weight_decay=0.05,
        after=lambda: losses.clamp_logit_scale(clip.logit_scale),
    )  # fmt: skip
    return clip


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: NDArray[np.uint8], file: Path) -> Tensor:
    """Mean latents of all images, unscaled: float32[n, 4, 16, 16], cached in `file`."""
    if not file.exists():
        starts = range(0, len(images), 100)
        with autocast():
            parts = [vae.encode(to_unit(images[i : i + 100])).latent_dist.mode().float() for i in starts]
        np.save(file, torch.cat(parts).numpy())
    return torch.from_numpy(np.load(file))


@torch.no_grad()
def encode_texts(clip: CLIPModel, ids: Tensor) -> Tensor:
    """Token states of the text tower, which condition the UNet: bf16[n, 32, 128]."""
    return torch.cat([clip.text_model(input_ids=part).last_hidden_state.bfloat16() for part in ids.split(250)])


def train_unet(
    clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Texts, latents: Tensor, work: Path, stage: Stage
) -> nn.Module:
    """Train the UNet: min-SNR weighted denoising loss on unit-scale latents, text tower frozen. Returns the EMA."""
    torch.manual_seed(SEED)
    unet = tiny.build_unet()
    average = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    scheduler = tiny.build_scheduler()
    alphas, prediction_type = scheduler.alphas_cumprod, scheduler.config.prediction_type
    states = encode_texts(clip, tokens(tokenizer, texts.texts))
    empty = encode_texts(clip, tokens(tokenizer, [""]))[0]

    def loss_of(index: NDArray[np.int64]) -> Tensor:
        z = latents[index]
        t = torch.randint(0, len(alphas), (len(z),))
        noise, alpha_bar = torch.randn_like(z), alphas[t]
        condition = torch.where(torch.rand(len(z), 1, 1) < CAPTION_DROPOUT, empty, states[texts.sample(index)])
        with autocast():
            output = unet(losses.add_noise(z, noise, alpha_bar, prediction_type), t, condition).sample.float()
        target = losses.diffusion_target(z, noise, alpha_bar, prediction_type)
        return losses.synthesis(output, target, losses.min_snr_weight(alpha_bar, MIN_SNR_GAMMA, prediction_type))

    both = nn.ModuleDict({"unet": unet, "average": average})
    for parameter in average.parameters():
        parameter.requires_grad_(False)
    fit("unet", both, stage, len(latents), loss_of, work=work, after=lambda: average.update_parameters(unet))
    return average.module


def train_base(
    work: Path,
    output: Path,
    *,
    name: str = "tiny",
    catalogs: Sequence[str] = tuple(CATALOGS),
    vae: AutoencoderKL | None = None,
    tokenizer: CLIPTokenizer | None = None,
    stages: Mapping[str, Stage] | None = None,
    per_catalog: int = PER_CATALOG,
) -> None:
    """Run all stages in `work` and save the checkpoint `output`, in half precision.

    Args:
        work: Folder for the results of the stages. Created if missing.
        output: Checkpoint folder.
        name: Name of the checkpoint.
        catalogs: Catalogs to train on.
        vae: A trained VAE. Default: trained here.
        tokenizer: A trained tokenizer. Default: trained here.
        stages: Settings of each stage. Default: `RECIPE`.
        per_catalog: Products per catalog.
    """
    work.mkdir(parents=True, exist_ok=True)
    chosen = training_products(catalogs, per_catalog)
    images = render_all(chosen, work / "images.npy")
    texts = Texts.of_products(chosen)
    tokenizer = tokenizer or tiny.train_tokenizer(texts.texts)
    stages = stages or RECIPE

    ours = vae or train_vae(images, work, stages["vae"])
    clip = train_clip(tokenizer, images, texts, work, stages["clip"])
    latents = encode_latents(ours, images, work / "latents.npy")
    if vae is None:
        ours.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    unet = train_unet(clip, tokenizer, texts, latents * ours.config.scaling_factor, work, stages["unet"])

    meta = {
        "name": name,
        "synthetic": True,
        "captions": representative_captions([product.caption for product in chosen]),
        "sampler": {"name": "dpm++2m", "steps": 12, "guidance_scale": 5.0},
        "data": {"name": f"synthetic catalogs {', '.join(catalogs)}", "pairs": len(chosen)},
        "recipe": {part: asdict(stage) for part, stage in stages.items()},
    }
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict(), strict=False)
    save_checkpoint(
        output,
        unet=unet,
        vae=ours,
        clip=clip,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=tiny.build_scheduler(),
        image_processor=tiny.build_image_processor(),
        meta=meta,
        dtype=torch.float16,
    )


@click.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Checkpoint folder to write.")
def main(work: Path, output: Path) -> None:
    """Train the tiny base from scratch in WORK: about two hours on two cores. An interrupted run resumes."""
    train_base(work, output)
    click.echo(f"Wrote {output}.")


if __name__ == "__main__":
    main()
