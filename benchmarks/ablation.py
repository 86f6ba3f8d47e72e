"""`make ablation`: what does each term of the joint objective earn? Declared here before anything is run.

Each arm is tuned on 200 pairs of a catalog that its base has never seen: for the synthetic ones by a base trained
on the other two, for the real one (Debian's tuxpaint stamps) by the built-in base. Three settings an arm are tried on
the validation pairs of one catalog, with one seed; the best is frozen and run once, with three seeds, on the test
pairs of all. Retrieval is measured on captions and pictures that no arm was tuned on, generation by the frozen judge.

Resumable: each run leaves a file in WORK, RESULT is written anew from all files after each, and what RESULT holds is
not run again. Once the search is over, several processes may share WORK, each with `--domain`s and a RESULT of its own.
`quality.py` makes the page of it.
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
BASE_STEPS = {"clip": 900, "unet": 1500}  # of the bases made here
FORGETTING = 200  # products of each catalog that the base knows
COMMON = {"steps": 250, "batch_size": 32, "rsc_samples": 8, "save_every": 10_000}

# What differs from the defaults. Tuning apart, as is done today, is "CLIP alone" for retrieval and "SD alone" (the
# UNet, not its text encoder) for generation, each with a checkpoint of its own. "SD and text" tells what synthesis
# alone does where it teaches the text tower too, as it does in every joint arm.
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
# The search: three settings each. What RSC adds is searched at the learning rate that ITC + IS was given.
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


# What arms that tune one half are chosen by; the others by both.
HALVES = {"CLIP alone": ("r@1",), "SD alone": ("all_right",), "SD and text": ("all_right",)}


@dataclass(frozen=True)
class Run:
    """One tuning and what came of it. phase: "development" (validation pairs) or "test"."""

    phase: str
    domain: str
    arm: str
    setting: int
    seed: int

    @property
    def name(self) -> str:
        """The file that it leaves."""
        words = f"{self.phase} {self.domain} {self.arm} {self.setting} {self.seed}".lower()
        return "-".join("".join(c if c.isalnum() else " " for c in words).split()) + ".json"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "runs" / "ablation", show_default=True)
@click.option("--result", type=click.Path(path_type=Path), default=RESULT, show_default=True)
@click.option("--minutes", type=float, help="Stop after the run that passes this time; go on another day.")
@click.option("--domain", "domains", multiple=True, type=click.Choice(DOMAINS), help="Only these; default: all.")
def main(work: Path, result: Path, minutes: float | None, domains: tuple[str, ...]) -> None:
    """Run what has not been run, then write the result."""
    recall(work, result)
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    for run in declared(work):
        if domains and run.domain not in domains and run.phase == "test":
            continue
        if (work / run.name).exists():
            continue
        if time.monotonic() > deadline:
            sys.exit("time is up: `make ablation` goes on from here")
        click.echo(f"{run.phase}: {run.domain}, {run.arm}, setting {run.setting}, seed {run.seed}", err=True)
        measured = perform(run, work)
        _write(work / run.name, {"run": asdict(run)} | measured)
        collect(work, result)
    collect(work, result)


# --- what is run -----------------------------------------------------------------------------------------------------


def declared(work: Path) -> Iterator[Run]:
    """Every run in its order; those of the test only once their arm's setting is chosen."""
    for arm, settings in SETTINGS.items():
        for setting in range(len(settings)):
            yield Run("development", DEVELOPMENT, arm, setting, 0)
    chosen = {arm: best_setting(work, arm) for arm in ARMS}
    for seed in SEEDS:
        for domain in DOMAINS:
            yield from (Run("test", domain, arm, chosen[arm], seed) for arm in ARMS if arm != "base" or seed == 0)


def best_setting(work: Path, arm: str) -> int:
    """The setting with the best score on the validation pairs; ties go to the first."""
    tried = [
        json.loads((work / Run("development", DEVELOPMENT, arm, setting, 0).name).read_text("utf-8"))
        for setting in range(len(SETTINGS[arm]))
    ]
    return int(np.argmax([score(arm, one["figures"]) for one in tried]))


def score(arm: str, figures: Mapping[str, float]) -> float:
    """What development looks at: mean R@1, and all attributes right; of arms that tune one half, that half alone."""
    return float(np.mean([figures[half] for half in HALVES.get(arm, ("r@1", "all_right"))]))


def options(run: Run, work: Path) -> dict[str, Any]:
    """The training configuration of a run."""
    chosen = COMMON | ARMS[run.arm] | {"seed": run.seed}
    if "RSC" in run.arm:
        chosen |= RATES[best_setting(work, "ITC + IS")]
    return chosen | SETTINGS[run.arm][run.setting]


# --- one run ---------------------------------------------------------------------------------------------------------


def perform(run: Run, work: Path) -> dict[str, Any]:
    """Tune and measure: `figures` by name, `columns` of what each query and each picture got."""
    from unidiff_sdk.training.config import TrainingConfig
    from unidiff_sdk.training.loop.trainer import train

    base, data = base_of(run.domain, work), data_of(run.domain, work)
    tuned, checkpoint, seconds = base, work / f"checkpoint.{os.getpid()}", 0.0
    if run.arm != "base":
        shutil.rmtree(checkpoint, ignore_errors=True)
        trained = train(data["train"], base, checkpoint, TrainingConfig(**options(run, work)), latents=work / "latents")
        tuned, seconds = checkpoint, trained.seconds
    measured = measure(tuned, base, run, work)
    measured["figures"]["seconds"] = seconds
    if run.arm != "base":
        measured["options"] = options(run, work)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return measured


def measure(tuned: str | Path, base: str | Path, run: Run, work: Path) -> dict[str, Any]:
    """Retrieval, generation, collapse and forgetting of a checkpoint, by the measures of `unidiff_sdk.training`."""
    from unidiff_sdk.generation.samplers import make_table
    from unidiff_sdk.inference.schedule import Schedule
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
    from unidiff_sdk.training.data.batches import load_pairs
    from unidiff_sdk.training.evaluation import evaluate, metrics
    from unidiff_sdk.training.evaluation.judge import Judge
    from unidiff_sdk.training.objective.joint_model import JointModel

    loaded = load_checkpoint(tuned)
    model = JointModel(loaded).eval()
    data = data_of(run.domain, work)
    pairs = load_pairs(data["val" if run.phase == "development" else "test"], loaded)
    train_pairs = load_pairs(data["train"], loaded)
    attributes = evaluate.synthetic_attributes(pairs)
    keys = evaluate.meanings(pairs, attributes)

    # 1. retrieval and what becomes of the embeddings
    u, v = evaluate.embed(model, loaded, pairs)
    relevant = evaluate.equal_keys(keys)
    hits = [metrics.first_relevant_rank(scores, relevant) == 1 for scores in ((u @ v.T).T, u @ v.T)]
    columns: dict[str, Any] = {"hit": np.concatenate(hits).astype(int).tolist()}
    figures = {
        "r@1": float(np.mean(columns["hit"])),
        "image_effective_rank": metrics.effective_rank(u),
        "text_effective_rank": metrics.effective_rank(v),
    }

    # 2. generation: noise depends on the picture's place alone, so all arms and seeds draw from the same
    rows = [row for row in evaluate.differing(keys, PROMPTS) for _ in range(PER_PROMPT)]
    table = make_table("dpm++2m", Schedule.from_config(loaded.scheduler.config), 20)
    captions = [pairs.captions[row] for row in rows]
    pictures = evaluate.generate(model, loaded, captions, table=table, guidance=5.0, seed=0)
    judge = Judge.load()
    real, seen = (judge.features(_arrays(one.images)) for one in (pairs, train_pairs))
    made = judge.features(pictures)
    half = np.random.default_rng(0).permutation(len(real))
    halves = real[half[: len(half) // 2]], real[half[len(half) // 2 :]]
    figures |= {
        "kid": metrics.kid(made, real),
        "kid_floor": metrics.kid(*halves),
        "cmmd": metrics.cmmd(made, real),
        "cmmd_floor": metrics.cmmd(*halves),
        "diversity": metrics.per_prompt_diversity(made, rows),
        "nearest_training_picture": float(metrics.nearest_neighbor_similarity(made, seen)[0].mean()),
        "nearest_training_picture_of_real": float(metrics.nearest_neighbor_similarity(real, seen)[0].mean()),
    }
    if attributes:
        answers = judge.attributes(pictures)
        right = np.array([[answers[name][i] == value for name, value in attributes[row].items() if name in answers]
                          for i, row in enumerate(rows)])  # fmt: skip
        columns["all_right"] = right.all(axis=1).astype(int).tolist()
        figures |= {"all_right": float(right.all(axis=1).mean()), "attributes_right": float(right.mean())}
    if run.phase == "test" and run.seed == 0:
        _sheet(pictures[: PER_PROMPT * 10 : PER_PROMPT], work / "sheets" / f"{run.name[:-5]}.webp")

    # 3. forgetting, on what the base knows
    known = [name for name in SYNTHETIC if name != run.domain]
    drop = []
    for name in known:
        kept = load_pairs(data_of(name, work)["test"], loaded, limit=FORGETTING)
        kept_keys = evaluate.meanings(kept, evaluate.synthetic_attributes(kept))
        ways = evaluate.retrieval(*evaluate.embed(model, loaded, kept), kept_keys)
        drop.append(np.mean([way["R@1"] for way in ways.values()]))
    figures["r@1_of_known"] = float(np.mean(drop))
    return {"figures": figures, "columns": columns}


def _arrays(pictures: Any) -> Iterator[Any]:
    for chunk in pictures.split(64):
        yield from chunk.permute(0, 2, 3, 1).numpy()


def _sheet(pictures: list[Any], file: Path) -> None:
    """The first picture of each of the first ten prompts, by their index, in one row."""
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(pictures, axis=1)).save(file, quality=85, method=6)


# --- bases and data, made once ---------------------------------------------------------------------------------------


def base_of(domain: str, work: Path) -> str | Path:
    """A base that has never seen the domain: the built-in one, or one trained on the other synthetic catalogs.

    Of the built-in base these take the tokenizer and the VAE, which has seen pictures of all three; CLIP and UNet are
    trained from nothing, for fewer steps.
    """
    if domain == REAL:
        return "tiny"
    folder = work / "bases" / domain
    if not folder.exists():
        from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
        from unidiff_sdk.training.recipes import tiny

        known = load_checkpoint("tiny")
        tiny.train_base(
            folder.with_name(f"{domain}.work"),
            folder,
            name=f"tiny without {domain}",
            catalogs=[name for name in SYNTHETIC if name != domain],
            vae=known.vae.eval(),
            tokenizer=known.tokenizer,
            stages={name: replace(tiny.RECIPE[name], steps=steps) for name, steps in BASE_STEPS.items()},
        )
    return folder


def data_of(domain: str, work: Path) -> dict[str, Path]:
    """Folders of a domain: "train", "val" and "test", which share no product."""
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
    """The stamps as `make real` splits them, the first 200 of its training part (shuffled) to train on."""
    if not (folder / "train" / "metadata.jsonl").exists():
        sys.path.insert(0, str(ROOT / "examples"))
        from real_pictures import convert, downloaded

        whole = folder.with_name(f"{folder.name}.whole")
        shutil.rmtree(whole, ignore_errors=True)
        convert(downloaded(), whole)
        shutil.copytree(whole / "test", folder / "test", dirs_exist_ok=True)
        shutil.copytree(whole / "train", folder / "train", dirs_exist_ok=True)
        lines = (whole / "train" / "metadata.jsonl").read_text("utf-8").splitlines()
        first = sorted(np.random.default_rng(0).permutation(len(lines))[:PAIRS].tolist())
        chosen = "\n".join(lines[row] for row in first) + "\n"
        (folder / "train" / "metadata.jsonl").write_text(chosen, encoding="utf-8")
    return {"train": folder / "train", "val": folder / "test", "test": folder / "test"}


# --- the result ------------------------------------------------------------------------------------------------------


def collect(work: Path, result: Path) -> None:
    """All runs so far in one file, with the machine and what was declared."""
    runs = [json.loads(file.read_text("utf-8")) for file in sorted(work.glob("*.json"))]
    declaration = {"domains": DOMAINS, "arms": ARMS, "settings": SETTINGS, "seeds": SEEDS, "common": COMMON}
    sizes = {"pairs": PAIRS, "gallery": GALLERY, "prompts": PROMPTS, "per_prompt": PER_PROMPT, "base_steps": BASE_STEPS}
    complete = len(runs) == sum(map(len, SETTINGS.values())) + len(DOMAINS) * (1 + len(SEEDS) * (len(ARMS) - 1))
    result.parent.mkdir(parents=True, exist_ok=True)
    for sheet in sorted((work / "sheets").glob("*.webp")):
        (result.parent / "sheets").mkdir(exist_ok=True)
        shutil.copy(sheet, result.parent / "sheets")
    _write(result, {**host(), "declared": declaration | sizes, "complete": complete, "runs": runs})


def recall(work: Path, result: Path) -> None:
    """The files of runs that only RESULT knows, on a machine where they were not made."""
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
