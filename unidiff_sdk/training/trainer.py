"""The training loop: catalogue and base in, tuned checkpoint out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from unidiff_sdk.datasets.reader import BadRow, Row
from unidiff_sdk.datasets.synthetic import CATALOGUES
from unidiff_sdk.errors import TrainingError
from unidiff_sdk.training.checkpoint import Checkpoint, load_checkpoint, require_replaceable, save_checkpoint
from unidiff_sdk.training.config import TrainingConfig
from unidiff_sdk.training.data import Batches, Pairs, group_keys, load_pairs, tokenise
from unidiff_sdk.training.losses import clamp_logit_scale
from unidiff_sdk.training.model import JointModel, joint_losses

__all__ = ["Ema", "StepReport", "Trained", "pick_device", "train"]


@dataclass(frozen=True)
class StepReport:
    """What one step did. losses: each term's plain value, without its λ."""

    step: int  # from 1
    steps: int
    losses: dict[str, float]
    learning_rate: float
    seconds: float  # of this step
    pairs: int


@dataclass(frozen=True)
class Trained:
    """The outcome of a run: where the checkpoint lies, and what was used of the data."""

    path: Path
    steps: int
    pairs: int
    bad: list[BadRow]
    losses: dict[str, float]  # of the last step
    seconds: float


def train(
    data: str | Path,
    base: str | Path,
    out: str | Path,
    config: TrainingConfig | None = None,
    *,
    device: str = "auto",
    strict: bool = False,
    on_rows: Callable[[Iterable[Row]], Iterable[Row]] = iter,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> Trained:
    """Fine-tune CLIP and Stable Diffusion of the checkpoint `base` together on the catalogue folder `data`.

    Writes the averaged weights to `out` every `config.save_every` steps, at the end, and when interrupted (then raises
    KeyboardInterrupt on). base: a folder or "tiny". device: "auto", "cpu", "cuda". strict: the first bad row stops the
    run instead of being passed over. on_rows: wraps the rows while they are read; on_step: called after each step.

    Raises DataError, CheckpointError, OptionError for what it is given, TrainingError where a loss is not finite; the
    last good checkpoint then remains.
    """
    config = config or TrainingConfig()
    started = time.perf_counter()
    out = Path(out)

    # 1. what is trained, and on what
    require_replaceable(out)
    checkpoint = load_checkpoint(base)
    if out.exists() and out.samefile(checkpoint.path):
        raise TrainingError(f"{out} is the base itself: name another folder for the result")
    pairs = load_pairs(data, checkpoint, strict=strict, fit=config.fit, progress=on_rows)
    if len(pairs) < 2:
        raise TrainingError(f"{data} holds a single usable pair: a contrast needs at least two")
    groups = group_keys(pairs, config.group)

    # 2. the model; every picture goes through the VAE once, here
    torch.manual_seed(config.seed)
    model = JointModel(checkpoint, config.precision).to(pick_device(device)).train()
    model.vae.eval()
    input_ids = tokenise(checkpoint.tokenizer, pairs.captions)
    empty_ids = tokenise(checkpoint.tokenizer, [""]).to(model.alpha_bar.device)
    batches = Batches(model, pairs, input_ids, groups, size=config.batch_size, flip=config.flip)

    # 3. the optimiser, and the averaged weights that are saved
    optimiser = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _learning_rate_factor(step, config))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema = Ema(model, config.ema_decay)

    def save(step: int) -> None:
        meta = _meta(checkpoint, pairs, config, name=out.name, data=Path(data).name, step=step, losses=values)
        with ema.applied(model):
            _save(out, checkpoint, meta)

    # 4. the loop; noise and order are drawn apart, so that runs with other losses see the same batches
    order, noise = (torch.Generator().manual_seed(2 * config.seed + k) for k in (0, 1))
    stream = batches.stream(order)
    values: dict[str, float] = {}
    done, saved = 0, 0
    try:
        for step in range(1, config.steps + 1):
            tick = time.perf_counter()
            batch = next(stream)
            terms = joint_losses(
                model, batch, config, empty_ids=empty_ids, generator=noise, step=step - 1, ema=ema.weights
            )
            loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(trainable, config.gradient_clip))
            values = {name: value.item() for name, (_, value) in terms.items()}
            _require_finite(step, values, norm, out if saved else None, saved)
            rate = float(schedule.get_last_lr()[0])
            optimiser.step()
            schedule.step()
            clamp_logit_scale(model.clip.logit_scale)
            ema.update(model)
            done = step
            on_step(StepReport(step, config.steps, values, rate, time.perf_counter() - tick, len(batch)))
            if step % config.save_every == 0 and step < config.steps:
                save(step)
                saved = step
    except KeyboardInterrupt:
        if done:
            save(done)
        raise

    # 5. the result
    save(config.steps)
    return Trained(out, config.steps, len(pairs), pairs.bad, values, time.perf_counter() - started)


class Ema:
    """The exponential moving average of a model's trainable parameters, named as in the model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """w̄ ← d·w̄ + (1-d)·w; d grows from 0.18 towards `decay`, so that a short run does not average in its base."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged = list(self.weights.values())
        current = [p.detach() for p in model.parameters() if p.requires_grad]
        torch._foreach_lerp_(averaged, current, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The averaged weights in the model's place, for as long as the block lasts."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        current = {name: p.data for name, p in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.weights[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = current[name]


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises TrainingError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("no CUDA device is available to this PyTorch; use --device cpu")
    return torch.device(name)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Linear from 1/warmup to 1, then half a cosine down to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _require_finite(step: int, losses: dict[str, float], norm: float, saved_at: Path | None, saved: int) -> None:
    if math.isfinite(norm) and all(map(math.isfinite, losses.values())):
        return
    figures = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
    kept = f"the checkpoint of step {saved} is kept at {saved_at}" if saved_at else "nothing had been saved yet"
    raise TrainingError(
        f"step {step} is not finite ({figures}; gradient norm {norm:.3g}), so training stopped; {kept}. "
        "Lower the learning rate, or look for broken pictures"
    )


def _save(out: Path, checkpoint: Checkpoint, meta: dict[str, Any]) -> None:
    save_checkpoint(
        out,
        unet=checkpoint.unet,
        vae=checkpoint.vae,
        clip=checkpoint.clip,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer,
        scheduler=checkpoint.scheduler,
        image_processor=checkpoint.image_processor,
        meta=meta,
    )


def _meta(
    base: Checkpoint,
    pairs: Pairs,
    config: TrainingConfig,
    *,
    name: str,
    data: str,
    step: int,
    losses: dict[str, float],
) -> dict[str, Any]:
    drawn = all(payload.get("catalogue") in CATALOGUES for payload in pairs.payloads)
    return {
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": base.meta.get("name", base.path.name),
        # True where the model has seen nothing but the synthetic catalogues: searching photographs then warns.
        "synthetic": bool(base.meta.get("synthetic")) and drawn,
        "fit": config.fit or base.fit,
        "step": step,
        "config": asdict(config),
        "losses": losses,
        "data": {
            "name": data,
            "pairs": len(pairs),
            "bad_rows": len(pairs.bad),
            "sha256": pairs.fingerprint(),
        },
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
