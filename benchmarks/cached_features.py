"""Cached deep features (DeepCache) compared with what costs nothing: fewer steps of the same sampler.

`deep_cache.py` splits the UNet of the built-in model into two graphs, with which the runtime generates. The captions
describe combinations of attributes that training has not shown. The frozen judge reads the attributes of the images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from harness import ROOT, Benchmark, options

if TYPE_CHECKING:
    from unidiff_sdk.generation.generator import Generator

CAPTIONS, SEEDS = 40, (0, 1)  # captions of each catalog
IMAGES_PER_CALL = 8  # so that all images of a request share each call of the UNet


class Setting(NamedTuple):
    """A number of guided steps, and the interval and depth of cached features. An interval of 1 caches none."""

    steps: int
    interval: int = 1
    depth: int = 0

    def __str__(self) -> str:
        cached = f", deep features every {self.interval} steps, depth {self.depth}" if self.interval > 1 else ""
        return f"{self.steps} steps{cached}"


PLAIN = [Setting(steps) for steps in (25, 16, 12, 10, 8)]
CACHED = [Setting(25, interval, depth) for interval in (2, 3, 5) for depth in (0, 1)]
CACHED += [Setting(steps, 2) for steps in (12, 8)]


@click.command()
@options
@click.option(
    "--work", type=click.Path(path_type=Path), default=ROOT / ".cache" / "deep-cache", help="Folder for the graphs."
)
def main(work: Path, **chosen: Any) -> None:
    """Generate with and without cached features, and let the judge read the images."""
    bench = Benchmark(__file__, "Do cached deep features save more than fewer steps do?", **chosen)
    import torch

    torch.set_num_threads(bench.threads)  # of the judge
    generators = {setting: generator(setting, work, bench.threads) for setting in (*PLAIN, *CACHED)}
    bench.row(
        "tiny, 1 image",
        ours={str(setting): one_image(each, setting.steps) for setting, each in generators.items()},
        peers={},
        parameters={"images": 1},
        figures={str(setting): quality(each, setting.steps) for setting, each in generators.items()},
        flop={str(setting): flop(setting) for setting in generators},
        items=1,
        note=f"Quality over {3 * CAPTIONS} captions and the seeds {', '.join(map(str, SEEDS))}: attributes_right is "
        f"the mean over the attributes, accuracy the share of images with all attributes right. {bounds()}",
    )
    bench.finish()


def generator(setting: Setting, work: Path, threads: int) -> Generator:
    """Return a generator with the built-in model whose UNet caches as set."""
    from deep_cache import CachedSession, write_graphs

    from unidiff_sdk import Bundle
    from unidiff_sdk.generation.generator import Generator
    from unidiff_sdk.inference.sessions import create_session
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    bundle = Bundle.open("tiny", threads=threads)
    if setting.interval == 1:
        return Generator(bundle)
    folder = work / f"{bundle.fingerprint[:12]}-depth{setting.depth}"
    files = write_graphs(load_checkpoint("tiny"), setting.depth, folder)

    def create(file: Path, **engine: Any) -> Any:
        if file.parent.name != "unet":
            return create_session(file, **engine)
        return CachedSession(*(create_session(file, threads=threads) for file in files), setting.interval)

    return Generator(Bundle(bundle.path, bundle.manifest, threads=threads, session_factory=create))


def one_image(generator: Generator, steps: int) -> Callable[[], object]:
    return lambda: generator.generate("a long slim green coat with navy checks", steps=steps, seed=0)


def quality(generator: Generator, steps: int) -> dict[str, float]:
    """Return the shares of right attributes, and of images with all attributes right."""
    from unidiff_sdk.datasets.synthetic import CATALOGS, products
    from unidiff_sdk.training.evaluation.judge import Judge, attribute_accuracy

    wanted = [p for name in CATALOGS for p in products(name, CAPTIONS, seed=5, split="test-unseen")]
    requests = [wanted[i : i + IMAGES_PER_CALL] for i in range(0, len(wanted), IMAGES_PER_CALL)]
    images = [
        image
        for seed in SEEDS
        for request in requests
        for image in generator.generate([product.caption for product in request], steps=steps, seed=seed)
    ]
    attributes = [product.attributes for product in wanted] * len(SEEDS)
    shares = attribute_accuracy(Judge.load().attributes(images), attributes)
    accuracy = shares.pop("all")
    return {"accuracy": round(accuracy, 4), "attributes_right": round(sum(shares.values()) / len(shares), 4)}


def flop(setting: Setting) -> int:
    """Return the operations of the UNet for one guided image."""
    from deep_cache import count_work

    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint("tiny")
    unet, tokens = checkpoint.unet.config, checkpoint.text_encoder.config.max_position_embeddings
    work = count_work(unet, unet.sample_size, tokens, setting.depth)
    complete = -(-setting.steps // setting.interval)
    return 2 * 2 * (complete * work.complete + (setting.steps - complete) * work.shallow)


def bounds() -> str:
    """Return what the two methods can save at most with Stable Diffusion 1.5 at 512 px, by multiply-adds."""
    from deep_cache import count_work
    from sd15 import UNET

    works = [count_work(UNET, 64, 77, depth) for depth in (0, 1, 2)]
    shallow = ", ".join(f"{work.shallow / work.complete:.1%} at depth {depth}" for depth, work in enumerate(works))
    return (
        "By multiply-adds, a call of Stable Diffusion 1.5's UNet with cached features at 512 px is this share of a "
        f"complete call: {shallow}. Its self-attention, which token merging shortens, is "
        f"{works[0].self_attention / works[0].complete:.1%}."
    )


if __name__ == "__main__":
    main()
