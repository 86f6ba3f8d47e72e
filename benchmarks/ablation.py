"""`make ablation`: measure the gain of each term of the joint objective. All runs are declared here in advance.

Each arm is tuned on 200 pairs of a catalog that its base has never seen. For a synthetic catalog, the base is trained
on the other two; for the real one (Debian's tuxpaint stamps), it is the built-in base. Three settings per arm are tried
on the validation pairs of one catalog with one seed. The best is frozen and run once, with three seeds, on the test
pairs of all catalogs. Retrieval is measured on pairs that no arm was tuned on, generation by the frozen judge.

Runs can be resumed: each writes a file into WORK, RESULT is rewritten from all files after each run, and runs that
RESULT holds are skipped. After the search for settings, several processes may share WORK, each with its own `--domain`
options and its own RESULT. `quality.py` writes the page.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from _host import host

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "quality" / "ablation.json"
DEVELOPMENT, REAL = "ecommerce-product", "tuxpaint-stamps"
SYNTHETIC = ("ecommerce-product", "fashion-man", "fashion-woman")
DOMAINS = (*SYNTHETIC, REAL)
SEEDS = (0, 1, 2)
PAIRS, GALLERY, PROMPTS, PER_PROMPT = 200, 300, 60, 2
BASE_STEPS = {"clip": 900, "unet": 1500}  # of the bases trained here
RETAINED = 200  # products of each catalog that the base was trained on
COMMON = {"steps": 250, "batch_size": 32, "save_every": 10_000}
DECODED = {"rsc_samples": 8}  # for the arms with a term that decodes estimates

# The differences from the defaults. Separate tuning, today's practice, is "CLIP alone" for retrieval and "SD alone"
# (the UNet without its text encoder) for generation, with one checkpoint each. "SD and text" shows the effect of
# synthesis alone when it trains the text tower as well, as it does in every joint arm.
ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "CLIP alone": {"lambda_is": 0.0, "lambda_rsc": 0.0},
    "SD alone": {"lambda_itc": 0.0, "lambda_rsc": 0.0, "lock_text": True, "lock_image": True},
    "SD and text": {"lambda_itc": 0.0, "lambda_rsc": 0.0, "lock_image": True},
    "ITC + IS": {"lambda_rsc": 0.0},
    "ITC + IS + RSC pixel": {},
    "ITC + IS + RSC feature": {"lambda_rsc": 0.0},
    "ITC + IS + RSC both": {},
}
# The search: three settings per arm. The RSC weights are searched at the learning rate chosen for ITC + IS.
RATES = [{"learning_rate": rate} for rate in (1e-4, 2e-4, 4e-4)]
SETTINGS: dict[str, list[dict[str, float]]] = {
    "base": [{}],
    "CLIP alone": RATES,
    "SD alone": RATES,
    "SD and text": RATES,
    "ITC + IS": RATES,
    "ITC + IS + RSC pixel": [{"lambda_rsc": weight} for weight in (0.03, 0.1, 0.3)],
    "ITC + IS + RSC feature": [{"lambda_rsc_feature": weight} for weight in (0.01, 0.03, 0.1)],
    "ITC + IS + RSC both": [
        {"lambda_rsc": weight, "lambda_rsc_feature": weight / 3, "lambda_rsc_generated": weight / 3}
        for weight in (0.03, 0.1, 0.3)
    ],
}


# The figures that decide for arms that tune one half; all others use both.
HALVES = {"CLIP alone": ("r@1",), "SD alone": ("all_right",), "SD and text": ("all_right",)}


@dataclass(frozen=True)
class Run:
    """One tuning run and its evaluation. phase: "development" (validation pairs) or "test"."""

    phase: str
    domain: str
    arm: str
    setting: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        text = f"{self.phase} {self.domain} {self.arm} {self.setting} {self.seed}".lower()
        return "-".join("".join(c if c.isalnum() else " " for c in text).split()) + ".json"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "runs" / "ablation", show_default=True)
@click.option("--result", type=click.Path(path_type=Path), default=RESULT, show_default=True)
@click.option("--minutes", type=float, help="Stop after the run that exceeds this time. Run again to continue.")
@click.option(
    "--domain", "domains", multiple=True, type=click.Choice(DOMAINS), help="Run only these domains. Default: all."
)
def main(work: Path, result: Path, minutes: float | None, domains: tuple[str, ...]) -> None:
    """Run all declared runs that have no result, then write the result."""
    restore(work, result)
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    for run in declared(work):
        if domains and run.domain not in domains and run.phase == "test":
            continue
        if (work / run.name).exists():
            continue
        if time.monotonic() > deadline:
            sys.exit("Out of time. Run `make ablation` again to continue.")
        click.echo(f"{run.phase}: {run.domain}, {run.arm}, setting {run.setting}, seed {run.seed}", err=True)
        measured = perform(run, work)
        _write(work / run.name, {"run": asdict(run)} | measured)
        collect(work, result)
    collect(work, result)


# --- declared runs ---------------------------------------------------------------------------------------------------


def declared(work: Path) -> Iterator[Run]:
    """Yield every run in order; test runs follow once the settings are chosen."""
    for arm, settings in SETTINGS.items():
        for setting in range(len(settings)):
            yield Run("development", DEVELOPMENT, arm, setting, 0)
    chosen = {arm: best_setting(work, arm) for arm in ARMS}
    for seed in SEEDS:
        for domain in DOMAINS:
            yield from (Run("test", domain, arm, chosen[arm], seed) for arm in ARMS if arm != "base" or seed == 0)


def best_setting(work: Path, arm: str) -> int:
    """Return the setting with the best score on the validation pairs; ties go to the first."""
    tried = [
        json.loads((work / Run("development", DEVELOPMENT, arm, setting, 0).name).read_text("utf-8"))
        for setting in range(len(SETTINGS[arm]))
    ]
    return int(np.argmax([score(arm, one["figures"]) for one in tried]))


def score(arm: str, figures: Mapping[str, float]) -> float:
    """Return the development score: the mean of R@1 and `all_right`, or the one figure of an arm's half."""
    return float(np.mean([figures[half] for half in HALVES.get(arm, ("r@1", "all_right"))]))


def options(run: Run, work: Path) -> dict[str, Any]:
    """Return the training configuration of a run."""
    from unidiff_sdk.training.config import TrainingConfig

    chosen = COMMON | ARMS[run.arm] | {"seed": run.seed}
    if "RSC" in run.arm:
        chosen |= RATES[best_setting(work, "ITC + IS")]
    chosen |= SETTINGS[run.arm][run.setting]
    return chosen | (DECODED if TrainingConfig(**chosen).decodes else {})


# --- one run ---------------------------------------------------------------------------------------------------------


def perform(run: Run, work: Path) -> dict[str, Any]:
    """Tune and measure: `figures` by name, and `columns` with the result of each query and each image."""
    from unidiff_sdk.training.config import TrainingConfig
    from unidiff_sdk.training.loop.trainer import train

    base, data = base_of(run.domain, work), data_of(run.domain, work)
    tuned, checkpoint, seconds = base, work / f"checkpoint.{os.getpid()}", 0.0
    if run.arm != "base":
        shutil.rmtree(checkpoint, ignore_errors=True)
        config = TrainingConfig(**options(run, work))
        latents = work / "latents" if config.trains_generator else None
        trained = train(data["train"], base, checkpoint, config, latents=latents)
        tuned, seconds = checkpoint, trained.seconds
    measured = measure(tuned, base, run, work)
    measured["figures"]["seconds"] = seconds
    if run.arm != "base":
        measured["options"] = options(run, work)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return measured


def measure(tuned: str | Path, base: str | Path, run: Run, work: Path) -> dict[str, Any]:
    """Measure retrieval, generation, collapse and forgetting of a checkpoint."""
    from unidiff_sdk.generation.samplers import make_table
    from unidiff_sdk.inference.schedule import Schedule
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
    from unidiff_sdk.training.data.pairs import load_pairs
    from unidiff_sdk.training.evaluation import metrics, retrieval
    from unidiff_sdk.training.evaluation.judge import Judge
    from unidiff_sdk.training.evaluation.sampling import generate_images
    from unidiff_sdk.training.objective.joint_model import JointModel

    loaded = load_checkpoint(tuned)
    model = JointModel(loaded).eval()
    data = data_of(run.domain, work)
    pairs = load_pairs(data["val" if run.phase == "development" else "test"], loaded)
    train_pairs = load_pairs(data["train"], loaded)
    attributes = retrieval.synthetic_attributes(pairs)
    keys = retrieval.meaning_keys(pairs, attributes)

    # 1. Retrieval and collapse of the embeddings
    u, v = retrieval.embed_pairs(model, loaded, pairs)
    relevant = retrieval.equal_keys(keys)
    hits = [metrics.first_relevant_rank(scores, relevant) == 1 for scores in ((u @ v.T).T, u @ v.T)]
    columns: dict[str, Any] = {"hit": np.concatenate(hits).astype(int).tolist()}
    figures = {
        "r@1": float(np.mean(columns["hit"])),
        "image_effective_rank": metrics.effective_rank(u),
        "text_effective_rank": metrics.effective_rank(v),
    }

    # 2. Generation: noise depends only on the position of an image, so all arms and seeds start from the same noise
    rows = [row for row in retrieval.distinct_rows(keys, PROMPTS) for _ in range(PER_PROMPT)]
    table = make_table("dpm++2m", Schedule.from_config(loaded.scheduler.config), 20)
    captions = [pairs.captions[row] for row in rows]
    images = generate_images(model, loaded, captions, table=table, guidance=5.0, seed=0)
    judge = Judge.load()
    real, training = (judge.features(_arrays(one.images)) for one in (pairs, train_pairs))
    generated = judge.features(images)
    half = np.random.default_rng(0).permutation(len(real))
    halves = real[half[: len(half) // 2]], real[half[len(half) // 2 :]]
    figures |= {
        "kid": metrics.kid(generated, real),
        "kid_floor": metrics.kid(*halves),
        "cmmd": metrics.cmmd(generated, real),
        "cmmd_floor": metrics.cmmd(*halves),
        "diversity": metrics.per_prompt_diversity(generated, rows),
        "nearest_training_image": float(metrics.nearest_neighbor_similarity(generated, training)[0].mean()),
        "nearest_training_image_of_real": float(metrics.nearest_neighbor_similarity(real, training)[0].mean()),
    }
    if attributes:
        answers = judge.attributes(images)
        right = np.array([[answers[name][i] == value for name, value in attributes[row].items() if name in answers]
                          for i, row in enumerate(rows)])  # fmt: skip
        columns["all_right"] = right.all(axis=1).astype(int).tolist()
        figures |= {"all_right": float(right.all(axis=1).mean()), "attributes_right": float(right.mean())}
    if run.phase == "test" and run.seed == 0:
        _sheet(images[: PER_PROMPT * 10 : PER_PROMPT], work / "sheets" / f"{run.name[:-5]}.webp")

    # 3. Forgetting: retrieval on the catalogs that the base was trained on
    base_catalogs = [name for name in SYNTHETIC if name != run.domain]
    retained = []
    for name in base_catalogs:
        base_pairs = load_pairs(data_of(name, work)["test"], loaded, limit=RETAINED)
        base_keys = retrieval.meaning_keys(base_pairs, retrieval.synthetic_attributes(base_pairs))
        directions = retrieval.retrieval_figures(*retrieval.embed_pairs(model, loaded, base_pairs), base_keys)
        retained.append(np.mean([direction["R@1"] for direction in directions.values()]))
    figures["retained_r@1"] = float(np.mean(retained))
    return {"figures": figures, "columns": columns}


def _arrays(images: Any) -> Iterator[Any]:
    for chunk in images.split(64):
        yield from chunk.permute(0, 2, 3, 1).numpy()


def _sheet(images: list[Any], file: Path) -> None:
    """Write images side by side."""
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(images, axis=1)).save(file, quality=85, method=6)


# --- bases and data, written once ------------------------------------------------------------------------------------


def base_of(domain: str, work: Path) -> str | Path:
    """Return a base that has never seen the domain: the built-in one, or one trained on the other synthetic catalogs.

    The latter shares the tokenizer and the VAE with the built-in base, whose VAE has seen images of all three catalogs.
    Its CLIP and UNet are trained from scratch, for fewer steps.
    """
    if domain == REAL:
        return "tiny"
    folder = work / "bases" / domain
    if not folder.exists():
        from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
        from unidiff_sdk.training.recipes import tiny

        built_in = load_checkpoint("tiny")
        tiny.train_base(
            folder.with_name(f"{domain}.work"),
            folder,
            name=f"tiny without {domain}",
            catalogs=[name for name in SYNTHETIC if name != domain],
            vae=built_in.vae.eval(),
            tokenizer=built_in.tokenizer,
            stages={name: replace(tiny.RECIPE[name], steps=steps) for name, steps in BASE_STEPS.items()},
        )
    return folder


def data_of(domain: str, work: Path) -> dict[str, Path]:
    """Return the folders of a domain: "train", "val" and "test", which share no product."""
    folder = work / "data" / domain
    splits = {"train": ("train", PAIRS), "val": ("val", GALLERY), "test": ("test", GALLERY)}
    if domain == REAL:
        return _real(folder)
    from unidiff_sdk.datasets.synthetic import write_catalog

    for part, (split, n) in splits.items():
        if not (folder / part / "metadata.jsonl").exists():
            shutil.rmtree(folder / part, ignore_errors=True)
            write_catalog(domain, folder / part, n=n, seed=1, split=split)
    return {part: folder / part for part in splits}


def _real(folder: Path) -> dict[str, Path]:
    """Return the stamps as `make real` splits them, with 200 random pairs of its training part."""
    if not (folder / "train" / "metadata.jsonl").exists():
        sys.path.insert(0, str(ROOT / "examples"))
        from real_images import convert, download

        whole = folder.with_name(f"{folder.name}.whole")
        shutil.rmtree(whole, ignore_errors=True)
        convert(download(), whole)
        shutil.copytree(whole / "test", folder / "test", dirs_exist_ok=True)
        shutil.copytree(whole / "train", folder / "train", dirs_exist_ok=True)
        lines = (whole / "train" / "metadata.jsonl").read_text("utf-8").splitlines()
        first = sorted(np.random.default_rng(0).permutation(len(lines))[:PAIRS].tolist())
        chosen = "\n".join(lines[row] for row in first) + "\n"
        (folder / "train" / "metadata.jsonl").write_text(chosen, encoding="utf-8")
    return {"train": folder / "train", "val": folder / "test", "test": folder / "test"}


# --- the result ------------------------------------------------------------------------------------------------------


def collect(work: Path, result: Path) -> None:
    """Write all runs so far into one file, with the machine and the declaration."""
    runs = [json.loads(file.read_text("utf-8")) for file in sorted(work.glob("*.json"))]
    declaration = {"domains": DOMAINS, "arms": ARMS, "settings": SETTINGS, "seeds": SEEDS, "common": COMMON}
    sizes = {"pairs": PAIRS, "gallery": GALLERY, "prompts": PROMPTS, "per_prompt": PER_PROMPT, "base_steps": BASE_STEPS}
    complete = len(runs) == sum(map(len, SETTINGS.values())) + len(DOMAINS) * (1 + len(SEEDS) * (len(ARMS) - 1))
    result.parent.mkdir(parents=True, exist_ok=True)
    for sheet in sorted((work / "sheets").glob("*.webp")):
        (result.parent / "sheets").mkdir(exist_ok=True)
        shutil.copy(sheet, result.parent / "sheets")
    _write(result, {**host(), "declared": declaration | sizes, "complete": complete, "runs": runs})


def restore(work: Path, result: Path) -> None:
    """Write the files of runs that only RESULT holds, e.g. on another machine."""
    if result.exists():
        for run in json.loads(result.read_text("utf-8"))["runs"]:
            file = work / Run(**run["run"]).name
            if not file.exists():
                _write(file, run)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, file)


if __name__ == "__main__":
    main()
