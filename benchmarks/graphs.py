"""The graphs of the built-in bundle at several batch sizes: ONNX Runtime next to eager PyTorch with equal weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from harness import Benchmark, options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BATCHES = (1, 2, 4, 8, 16)


@click.command()
@options
def main(**chosen: Any) -> None:
    """Time one call of every graph at every batch."""
    bench = Benchmark(__file__, "How long does one call of each graph of the built-in model take?", **chosen)
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from unidiff_sdk import Bundle
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    torch.set_num_threads(bench.threads)
    bundle, checkpoint = Bundle.open("tiny", threads=bench.threads), load_checkpoint("tiny")
    inputs, modules = _inputs(checkpoint, bundle), _modules(checkpoint)
    for graph, act in modules.items():
        session = bundle.session(graph)
        for batch in BATCHES:
            case = f"{graph}, batch {batch}"
            if not bench.wants(case):
                continue
            feed = inputs[graph](batch)
            tensors = [torch.from_numpy(array) for array in feed.values()]
            with torch.inference_mode():
                with FlopCounterMode(display=False) as counter:
                    expected = act(*tensors)
                name = "text_embeds" if "text_embeds" in session.outputs else next(iter(session.outputs))
                error = float(np.abs(session.run(feed, [name])[name] - expected.numpy()).max())
                bench.row(
                    case,
                    ours={"UniDiff, ONNX Runtime fp32": lambda: session.run(feed)},  # noqa: B023
                    peers={"PyTorch, eager fp32": lambda: act(*tensors)},  # noqa: B023
                    parameters={"graph": graph, "batch": batch},
                    figures={"UniDiff, ONNX Runtime fp32": {"max_abs_error": float(f"{error:.2g}")}},
                    items=batch,
                    flop=counter.get_total_flops(),
                    rounds=max(bench.rounds, 21),
                )
    bench.finish()


def _inputs(checkpoint: Any, bundle: Any) -> dict[str, Callable[[int], dict[str, NDArray[np.generic]]]]:
    import numpy as np

    unet, rng = checkpoint.unet.config, np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    def latents(n: int) -> NDArray[np.float32]:
        return normal(n, unet.in_channels, unet.sample_size, unet.sample_size)

    return {
        "text_encoder": lambda n: {"input_ids": rng.integers(0, len(checkpoint.tokenizer), (n, bundle.max_tokens))},
        "image_encoder": lambda n: {"pixel_values": normal(n, 3, bundle.image_size, bundle.image_size)},
        "unet": lambda n: {
            "sample": latents(n),
            "timestep": np.full(n, 500, np.float32),
            "encoder_hidden_states": normal(n, bundle.max_tokens, unet.cross_attention_dim),
        },
        "vae_decoder": lambda n: {"latent_sample": latents(n)},
        "vae_encoder": lambda n: {"sample": normal(n, 3, checkpoint.image_size, checkpoint.image_size)},
    }


def _modules(checkpoint: Any) -> dict[str, Callable[..., Any]]:
    clip, unet, vae = checkpoint.clip, checkpoint.unet, checkpoint.vae

    return {
        "text_encoder": lambda ids: clip.text_projection(clip.text_model(ids).pooler_output),
        "image_encoder": lambda pixels: clip.visual_projection(clip.vision_model(pixels).pooler_output),
        "unet": lambda z, t, states: unet(z, t, states).sample,
        "vae_decoder": lambda z: vae.decode(z).sample,
        "vae_encoder": lambda pixels: vae.encode(pixels).latent_dist.mode(),
    }


if __name__ == "__main__":
    main()
