"""The inputs of one step: a batch of pairs, what conditions the UNet on them, and random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unidiff_sdk.training.config import TrainingConfig

__all__ = ["Batch", "Conditions", "RandomInputs", "whole_image_sizes"]


@dataclass(frozen=True)
class Conditions:
    """What conditions the UNet, for n samples: token states, and for Stable Diffusion XL a pooled embedding and sizes.

    The transformer of Stable Diffusion 3 takes token states and a pooled embedding.

    Attributes:
        states: float[n, tokens, width], τ(y).
        pooled: float[n, p], pooled embedding of the captions by the second text encoder of Stable Diffusion XL, or by
            both CLIP text encoders of Stable Diffusion 3.
        sizes: float[n, 6], its sizes in pixels: height and width of the original image, top and left of the crop,
            height and width of the crop. None: those of a whole image of the sample's own size.
    """

    states: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditions:
        """Apply a function to states, pooled embedding and sizes."""
        fields = (self.states, self.pooled, self.sizes)
        mapped: list[Any] = [None if each is None else function(each) for each in fields]
        return Conditions(*mapped)

    def repeated(self, n: int) -> Conditions:
        """Each row n times in a row."""
        return self.map(lambda each: each[:, None].expand(len(each), n, *each.shape[1:]).flatten(0, 1))

    def rows(self) -> list[Conditions]:
        """The conditions of each sample, n = 1."""
        return [self.map(lambda each, row=row: each[row : row + 1]) for row in range(len(self))]  # type: ignore[misc]

    @classmethod
    def joined(cls, rows: Sequence[Conditions]) -> Conditions:
        """The conditions of all samples of `rows`, which hold the same kinds."""
        fields = zip(*((each.states, each.pooled, each.sizes) for each in rows), strict=True)
        columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in fields]
        return cls(*columns)

    def with_sizes(self, sizes: Tensor | None) -> Conditions:
        """The same captions for images of other sizes, float[n, 6]."""
        return Conditions(self.states, self.pooled, sizes)


def whole_image_sizes(n: int, height: int, width: int, device: torch.device) -> Tensor:
    """The sizes of n whole images, in pixels, as generation uses them: float[n, 6]."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=device).expand(n, 6)


@dataclass(frozen=True)
class Batch:
    """m image-caption pairs as model inputs. The first n ≤ m of them also pass through the UNet.

    Attributes:
        clip_pixels: float[m, 3, s, s], normalized for CLIP.
        latents: float[n, c, h, w], scaled as the UNet expects them.
        input_ids: int64[m, tokens], captions for the UNet's text encoders, see `prompt_ids`.
        groups: int64[m]. Pairs with equal values have the same meaning.
        clip_ids: int64[m, tokens], captions for CLIP's text tower, if it has another tokenizer.
        sizes: float[n, 6], the sizes that condition Stable Diffusion XL, see `Conditions`.
        base_embeddings: "u" and "v", float[m, d]: embeddings by the base's CLIP, for feature distillation.
    """

    clip_pixels: Tensor
    latents: Tensor
    input_ids: Tensor
    groups: Tensor
    clip_ids: Tensor | None = None
    sizes: Tensor | None = None
    base_embeddings: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class RandomInputs:
    """Random numbers for the n samples of a step that pass through the UNet. On the CPU.

    An instance may describe some of the step's samples. The counts are always those of the whole step, because a
    term's mean is over them.

    Attributes:
        t: int64[n], noise levels, counted from the least noise. For a UNet these are its timesteps, for a transformer
            indices of `JointModel.timesteps`.
        noise: float[n, c, h, w], standard normal.
        dropped: bool[n], samples whose caption is replaced by the empty one.
        samples: Number of samples in the whole step.
        pairs: Number of pairs in the whole step.
    """

    t: Tensor
    noise: Tensor
    dropped: Tensor
    samples: int
    pairs: int

    @classmethod
    def sample(
        cls,
        generator: torch.Generator,
        samples: int,
        shape: tuple[int, ...],
        levels: int,
        config: TrainingConfig,
        *,
        pairs: int,
        logit_normal: bool = False,
    ) -> RandomInputs:
        """Sample the numbers of a whole step.

        Args:
            samples: n.
            shape: (c, h, w) of the latents.
            levels: Number of noise levels.
            pairs: Number of pairs in the step.
            logit_normal: Sample the place of t in the schedule as sigmoid(x) with a standard normal x, as Stable
                Diffusion 3 was trained (Esser et al. 2024, section 3.1), instead of uniformly.
        """
        if logit_normal:
            t = (torch.randn(samples, generator=generator).sigmoid() * levels).long()
        else:
            t = torch.randint(0, levels, (samples,), generator=generator)
        noise = torch.randn((samples, *shape), generator=generator)
        dropped = torch.rand(samples, generator=generator) < config.caption_dropout
        return cls(t, noise, dropped, samples, pairs)

    @classmethod
    def none(cls, pairs: int) -> RandomInputs:
        """The numbers of a step in which no sample passes through a UNet."""
        nothing = torch.zeros(0, dtype=torch.bool)
        return cls(nothing.long(), nothing.float(), nothing, 0, pairs)

    def select(self, indices: Tensor) -> RandomInputs:
        """The numbers of some samples. indices: int64[k]."""
        return RandomInputs(self.t[indices], self.noise[indices], self.dropped[indices], self.samples, self.pairs)
