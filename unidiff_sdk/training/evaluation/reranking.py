"""Re-ranked retrieval with the PyTorch model, as `search(rerank=)` does it with a bundle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidiff_sdk.inference.manifest import RerankDefaults
from unidiff_sdk.retrieval.reranking.denoising_error import DenoisingError, Row
from unidiff_sdk.retrieval.reranking.reranker import combined_scores, gains_of
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.data.captions import prompt_ids
from unidiff_sdk.training.data.latents import encode_latents
from unidiff_sdk.training.data.pairs import Pairs
from unidiff_sdk.training.objective.batch import Conditions
from unidiff_sdk.training.objective.joint_model import JointModel

from .retrieval import CHUNK, Embeddings

__all__ = ["reranked_order"]

Float32 = NDArray[np.float32]


@torch.no_grad()
def reranked_order(
    model: JointModel, checkpoint: Checkpoint, pairs: Pairs, u: Embeddings, v: Embeddings, settings: RerankDefaults
) -> NDArray[np.int64]:
    """Find the best images of each caption and re-rank them: int64[n, candidates], best first.

    Args:
        pairs: n pairs.
        u: float32[n, d], image embeddings.
        v: float32[n, d], caption embeddings.
        settings: Timesteps, number of candidates, weight and noise seed.
    """
    scores, times = v @ u.T, settings.timesteps
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, : settings.candidates]
    latents = encode_latents(model, pairs.images).numpy()
    empty = model.unconditional(prompt_ids(checkpoint, [""]).to(model.device)).map(Tensor.cpu)
    ids = prompt_ids(checkpoint, pairs.captions).to(model.device)
    prompts = [row for chunk in ids.split(CHUNK) for row in model.encode_prompts(chunk).map(Tensor.cpu).rows()]
    error = DenoisingError(_Unet(model), checkpoint.schedule, settings.noise_seed)
    unconditional = error.measure([Row(image, t, empty) for image in latents for t in times])
    rows = [
        Row(latents[i], t, text) for text, items in zip(prompts, nearest, strict=True) for i in items for t in times
    ]
    gains = gains_of(
        unconditional.reshape(len(latents), len(times))[nearest],
        error.measure(rows).reshape(*nearest.shape, len(times)),
    )
    combined = combined_scores(np.take_along_axis(scores, nearest, axis=1), gains, settings.weight)
    return np.take_along_axis(nearest, np.argsort(-combined, axis=1, kind="stable"), axis=1)


class _Unet:
    """The model's UNet as a `NoisePredictor`."""

    def __init__(self, model: JointModel) -> None:
        self._model = model

    def predict(
        self, samples: Sequence[Float32], timesteps: Sequence[int], conditions: Sequence[Conditions]
    ) -> Float32:
        device = self._model.device
        z_t, t = (torch.from_numpy(np.stack(each)).to(device) for each in (samples, timesteps))
        output = self._model.predict(z_t, t, Conditions.joined(conditions).map(lambda each: each.to(device)))
        return np.asarray(output.float().cpu().numpy())
