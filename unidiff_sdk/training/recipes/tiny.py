"""The recipe of the tiny base: tokenizer, VAE, CLIP and UNet, each trained from nothing on the synthetic catalogs.

    python -m unidiff_sdk.training.recipes.tiny WORK -o CHECKPOINT        (make tiny)

Stages run in order and each leaves its result in WORK, so that an interrupted recipe goes on where it stopped:
pictures -> tokenizer -> vae -> clip -> latents -> unet. The VAE comes first: it is the ceiling of all that follows.
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
from unidiff_sdk.training.checkpoints.checkpoint import save_checkpoint
from unidiff_sdk.training.data.batches import recorded
from unidiff_sdk.training.objective import losses

from . import tiny_models as tiny


@dataclass(frozen=True)
class Stage:
    """How long and how fast one part is trained; the seconds a step are those of two 2023 server cores."""

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
BRIEF_SHARE = 0.4  # people ask in few words
CAPTION_DROPOUT = 0.1  # so that the unconditional direction of guidance is trained too
MIN_SNR_GAMMA = 5.0
EMA_DECAY = 0.999


def training_products(catalogs: Sequence[str] = tuple(CATALOGS)) -> list[Product]:
    """The products that a base is trained on: the train splits of these catalogs."""
    return [p for name in catalogs for p in products(name, PER_CATALOG, SEED, "train")]


def _pixels(product: Product) -> NDArray[np.uint8]:
    return np.asarray(render(product, tiny.IMAGE_SIZE))


def render_all(chosen: list[Product], file: Path) -> NDArray[np.uint8]:
    """Draw every product once, uint8[n, 64, 64, 3], cached in `file`."""
    if not file.exists():
        with ProcessPoolExecutor() as pool:
            drawn = pool.map(_pixels, chosen, chunksize=64)
            pictures = np.stack(list(track(drawn, "drawing", total=len(chosen))))
        np.save(file, pictures)
    return np.load(file, mmap_mode="r")


def batches(n: int, stage: Stage, seed: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Indices of each step's batch: epoch after epoch, each in its own seeded order."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for step in range(stage.steps):
        if len(order) < stage.batch:
            order = rng.permutation(n)
        batch, order = order[: stage.batch], order[stage.batch :]
        yield step, np.sort(batch)


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    progress = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


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
    """Train `model` with AdamW in bf16 autocast; resumes from WORK, where the state is written every 500 steps."""
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
        loss = loss_of(index)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss became {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if after:
            after()
        mean = loss.item() if step == first else 0.99 * mean + 0.01 * loss.item()
        if (step + 1) % 100 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            print(f"{name} {step + 1}/{stage.steps}  loss {mean:.5f}  {pace:.3f} s a step", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == stage.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
    model.eval()


def autocast() -> torch.autocast:
    """bf16 where it is safe: half the time of fp32 on processors that have it."""
    return torch.autocast("cpu", torch.bfloat16)


def to_unit(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8[n, h, w, 3] in 0..255 -> float32[n, 3, h, w] in -1..1."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def train_vae(pictures: NDArray[np.uint8], work: Path, stage: Stage) -> AutoencoderKL:
    """Squared error, for PSNR is what it is judged by, and a whisper of KL that keeps the latents near unit scale."""
    torch.manual_seed(SEED)
    vae = tiny.build_vae()

    def loss_of(index: NDArray[np.int64]) -> Tensor:
        x = to_unit(pictures[index])
        with autocast():
            posterior = vae.encode(x).latent_dist
            restored = vae.decode(posterior.sample()).sample
        return F.mse_loss(restored.float(), x) + 1e-5 * posterior.kl().float().mean() / 1024

    fit("vae", vae, stage, len(pictures), loss_of, work=work)
    return vae


@dataclass(frozen=True)
class Texts:
    """Two texts a picture: row i of n is picture i's caption, row n + i the few words that one would type to find it.

    shown: int64[n, columns], the attributes of each picture as numbers. told: int64[2n, columns], the same for each
    text, -1 where it does not tell.
    """

    words: list[str]
    shown: Tensor
    told: Tensor

    @classmethod
    def of_products(cls, chosen: list[Product]) -> Texts:
        """The texts of these products; every column of every catalog is a column here."""
        columns = sorted({column for product in chosen for column in product.attributes})
        numbers: dict[str | None, int] = {}
        rows = [[numbers.setdefault(p.attributes.get(c), len(numbers)) for c in columns] for p in chosen]
        briefs = [brief_caption(product) for product in chosen]
        masks = torch.tensor([[column in told for column in columns] for _, told in briefs])
        shown = torch.tensor(rows)
        words = [product.caption for product in chosen] + [text for text, _ in briefs]
        return cls(words, shown, torch.cat([shown, shown.where(masks, -1)]))

    def of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each picture one of its two texts, at random."""
        brief = torch.rand(len(index)).numpy() < BRIEF_SHARE
        return index + len(self.shown) * brief


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """int64[n, 32], padded and truncated as the pipelines do."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_clip(
    tokenizer: CLIPTokenizer, pictures: NDArray[np.uint8], texts: Texts, work: Path, stage: Stage
) -> CLIPModel:
    """Symmetric InfoNCE on captions and on few words, in which all that suit one another are positives."""
    torch.manual_seed(SEED)
    clip = tiny.build_clip(tokenizer)
    ids, told = tokens(tokenizer, texts.words), texts.told
    mean, std = (torch.tensor(v)[:, None, None] for v in (tiny.CLIP_MEAN, tiny.CLIP_STD))

    def loss_of(index: NDArray[np.int64]) -> Tensor:
        x = to_unit(pictures[index])
        shift = torch.randint(-3, 4, (2,)).tolist()
        x = torch.roll(F.pad(x, (3, 3, 3, 3), mode="replicate"), shift, (2, 3))[:, :, 3:-3, 3:-3]
        with autocast():
            chosen = texts.of(index)
            out = clip(input_ids=ids[chosen], pixel_values=((x + 1) / 2 - mean) / std)
        # Words suit every picture that is equal in what they tell of (-1: they do not tell).
        asked = told[chosen][None, :, :]
        positives = ((texts.shown[index][:, None, :] == asked) | (asked < 0)).all(-1).float()
        return losses.itc(out.image_embeds.float(), out.text_embeds.float(), clip.logit_scale, positives)

    fit(
        "clip", clip, stage, len(pictures), loss_of, work=work, weight_decay=0.05,
        after=lambda: losses.clamp_logit_scale(clip.logit_scale),
    )  # fmt: skip
    return clip


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pictures: NDArray[np.uint8], file: Path) -> Tensor:
    """The mean latents of all pictures, unscaled, float32[n, 4, 16, 16], cached in `file`."""
    if not file.exists():
        starts = range(0, len(pictures), 100)
        with autocast():
            parts = [vae.encode(to_unit(pictures[i : i + 100])).latent_dist.mode().float() for i in starts]
        np.save(file, torch.cat(parts).numpy())
    return torch.from_numpy(np.load(file))


@torch.no_grad()
def encode_texts(clip: CLIPModel, ids: Tensor) -> Tensor:
    """The text tower's token states that condition the UNet, bf16[n, 32, 128]."""
    return torch.cat([clip.text_model(input_ids=part).last_hidden_state.bfloat16() for part in ids.split(250)])


def train_unet(
    clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Texts, latents: Tensor, work: Path, stage: Stage
) -> nn.Module:
    """The denoising loss on unit-scale latents, min-SNR weighted; the text tower rests. Returns averaged weights."""
    torch.manual_seed(SEED)
    unet = tiny.build_unet()
    average = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    scheduler = tiny.build_scheduler()
    alphas, prediction_type = scheduler.alphas_cumprod, scheduler.config.prediction_type
    states = encode_texts(clip, tokens(tokenizer, texts.words))
    nothing = encode_texts(clip, tokens(tokenizer, [""]))[0]

    def loss_of(index: NDArray[np.int64]) -> Tensor:
        z = latents[index]
        t = torch.randint(0, len(alphas), (len(z),))
        noise, alpha_bar = torch.randn_like(z), alphas[t]
        condition = torch.where(torch.rand(len(z), 1, 1) < CAPTION_DROPOUT, nothing, states[texts.of(index)])
        with autocast():
            output = unet(losses.add_noise(z, noise, alpha_bar), t, condition).sample.float()
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
) -> None:
    """Go through all stages in `work` and write the checkpoint `output`, in half precision.

    catalogs: whose products it sees. vae, tokenizer: trained ones, default: trained here. stages: how long each part
    is trained; default: RECIPE.
    """
    work.mkdir(parents=True, exist_ok=True)
    chosen = training_products(catalogs)
    pictures = render_all(chosen, work / "pictures.npy")
    texts = Texts.of_products(chosen)
    tokenizer = tokenizer or tiny.train_tokenizer(texts.words)
    stages = stages or RECIPE

    ours = vae or train_vae(pictures, work, stages["vae"])
    clip = train_clip(tokenizer, pictures, texts, work, stages["clip"])
    latents = encode_latents(ours, pictures, work / "latents.npy")
    if vae is None:
        ours.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    unet = train_unet(clip, tokenizer, texts, latents * ours.config.scaling_factor, work, stages["unet"])

    meta = {
        "name": name,
        "synthetic": True,
        "captions": recorded([product.caption for product in chosen]),
        "sampler": {"name": "dpm++2m", "steps": 12, "guidance_scale": 5.0},
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
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The checkpoint folder to write.")
def main(work: Path, output: Path) -> None:
    """Train the tiny base from nothing in WORK, in about two hours on two cores; an interrupted run goes on."""
    train_base(work, output)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
