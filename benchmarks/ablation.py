"""`make ablation`: measure the gain of each term of the joint objective. All runs are declared here in advance.

Each arm is tuned on 200 and on 1,000 pairs of a catalog that its base has never seen. For a synthetic catalog, the base
is trained on the other two until it generates them reliably (`bases.py`); for the real one (Debian's tuxpaint stamps),
it is the built-in base. Two settings per arm are tried on the validation pairs of one catalog with one seed and 200
pairs. The better one is frozen and run with three seeds on the test pairs of all catalogs. Retrieval is measured on
pairs that no arm was tuned on, by the encoder alone and re-ranked by the generator; generation by the frozen judge.

Runs can be resumed: each writes a file into WORK, RESULT is rewritten from all files after each run, and runs that
RESULT holds are skipped. Several processes may share WORK: each run is done by one of them. `quality.py` writes the
page.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from _host import host
from bases import STEPS, SYNTHETIC, base_without, measured_base

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "quality" / "ablation.json"
DEVELOPMENT, REAL = "ecommerce-product", "tuxpaint-stamps"
DOMAINS = (*SYNTHETIC, REAL)
SEEDS = (0, 1, 2)
SIZES = (200, 1000)  # pairs that an arm is tuned on
GALLERY, PROMPTS, PER_PROMPT = 300, 60, 2
RETAINED = 200  # products of each catalog that the base was trained on
COMMON = {"steps": 160, "batch_size": 32, "save_every": 10_000, "precision": "bf16"}
RERANK = {"candidates": 4, "timesteps": (650, 850), "weight": 1.5}
SAMPLER, SAMPLER_STEPS, GUIDANCE = "dpm++2m", 10, 5.0

# The differences from the defaults. Separate tuning, today's practice, is "CLIP alone" for retrieval and "SD alone"
# (the UNet without its text encoder) for generation, with one checkpoint each. "SD and text" shows the effect of
# synthesis alone when it trains the text tower as well, as it does in every joint arm.
ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "CLIP alone": {"lambda_is": 0.0},
    "CLIP alone, hard negatives": {"lambda_is": 0.0},
    "SD alone": {"lambda_itc": 0.0, "lock_text": True, "lock_image": True},
    "SD and text": {"lambda_itc": 0.0, "lock_image": True},
    "ITC + IS": {},
    "ITC + IS, hard negatives": {},
    "ITC + IS, hard negatives, WiSE-FT": {},
    "RSC encoder": {},
    "RSC generator": {},
    "RSC encoder and generator": {},
    "RSC reward": {},
}
# The two settings per arm; one where the settings of other arms decide. Arms with hard negatives keep the learning rate
# chosen for the arm without them. The larger weights of RSC are those that generated worse in trials with 5 hard
# negatives.
RATES = [{"learning_rate": rate} for rate in (2e-4, 4e-4)]
SETTINGS: dict[str, list[dict[str, float]]] = {
    "base": [{}],
    "CLIP alone": RATES,
    "SD alone": RATES,
    "SD and text": RATES,
    "ITC + IS": RATES,
    "CLIP alone, hard negatives": [{"hard_negatives": k} for k in (3, 5)],
    "ITC + IS, hard negatives": [{"hard_negatives": k} for k in (3, 5)],
    "ITC + IS, hard negatives, WiSE-FT": [{}],
    "RSC encoder": [{"lambda_rsc_encoder": weight} for weight in (0.02, 0.1)],
    "RSC generator": [{"lambda_rsc_generator": weight} for weight in (0.01, 0.05)],
    "RSC encoder and generator": [{}],
    "RSC reward": [{"lambda_rsc_reward": weight} for weight in (0.002, 0.01)],
}
INHERITED = {  # the arm whose chosen settings an arm starts from
    "CLIP alone, hard negatives": "CLIP alone",
    "ITC + IS, hard negatives": "ITC + IS",
    "ITC + IS, hard negatives, WiSE-FT": "ITC + IS, hard negatives",
    **dict.fromkeys([arm for arm in ARMS if arm.startswith("RSC")], "ITC + IS, hard negatives"),
}
COMBINED = {"RSC encoder and generator": ("RSC encoder", "RSC generator")}  # the arms whose chosen settings an arm has
# The share of the change of all weights that an arm keeps. It is fixed, because validation pairs of the new catalog
# cannot show what is forgotten.
INTERPOLATED = {"ITC + IS, hard negatives, WiSE-FT": 0.5}
# The figures that decide for arms that tune one half; all others use both.
HALVES = {
    "CLIP alone": ("r@1",),
    "CLIP alone, hard negatives": ("r@1",),
    "SD alone": ("all_right",),
    "SD and text": ("all_right",),
}


@dataclass(frozen=True)
class Run:
    """One tuning run and its evaluation. phase: "development" (validation pairs) or "test". pairs: to tune on."""

    phase: str
    domain: str
    pairs: int
    arm: str
    setting: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        text = f"{self.phase} {self.domain} {self.pairs} {self.arm} {self.setting} {self.seed}".lower()
        return "-".join("".join(c if c.isalnum() else " " for c in text).split()) + ".json"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "runs" / "ablation", show_default=True)
@click.option("--result", type=click.Path(path_type=Path), default=RESULT, show_default=True)
@click.option("--minutes", type=float, help="Start no run after this time. Run again to continue.")
@click.option(
    "--domain", "domains", multiple=True, type=click.Choice(DOMAINS), help="Test only on these domains. Default: all."
)
@click.option("--threads", type=int, help="Threads of PyTorch. Default: one per core.")
def main(
    work: Path,
    result: Path,
    minutes: float | None,
    domains: tuple[str, ...],
    threads: int | None,
) -> None:
    """Run all declared runs that have no result, then write the result."""
    if threads:
        import torch

        torch.set_num_threads(threads)
    restore(work, result)
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    for run in pending(work, domains or DOMAINS):
        if time.monotonic() > deadline:
            sys.exit("Out of time. Run `make ablation` again to continue.")
        with reserved(work / run.name, wait=False) as mine:
            if not mine or (work / run.name).exists():
                continue
            click.echo(f"{run.name.removesuffix('.json')}", err=True)
            _write(work / run.name, {"run": asdict(run)} | perform(run, work))
        collect(work, result)
    collect(work, result)


# --- declared runs ---------------------------------------------------------------------------------------------------


def development_runs() -> Iterator[Run]:
    """Yield the search for settings. An arm comes after the arm that it inherits from."""
    for arm, settings in SETTINGS.items():
        if len(settings) > 1:
            for setting in range(len(settings)):
                yield Run("development", DEVELOPMENT, SIZES[0], arm, setting, 0)


def test_runs(work: Path, domains: Sequence[str]) -> Iterator[Run]:
    """Yield the runs with the chosen settings; all arms of one size, seed and domain before the next."""
    chosen = {arm: best_setting(work, arm) for arm in ARMS}
    for pairs in SIZES:
        for seed in SEEDS:
            for domain in domains:
                if pairs in sizes_of(domain):
                    yield from (
                        Run("test", domain, pairs, arm, chosen[arm], seed)
                        for arm in ARMS
                        if arm != "base" or (seed, pairs) == (0, SIZES[0])
                    )


def sizes_of(domain: str) -> tuple[int, ...]:
    """Return the numbers of pairs that are tuned on. The stamps have too few for the second."""
    return SIZES[:1] if domain == REAL else SIZES


def pending(work: Path, domains: Sequence[str]) -> Iterator[Run]:
    """Yield the runs whose inputs are there. Waits until the search for settings is complete."""
    while waiting := [run for run in development_runs() if not (work / run.name).exists()]:
        yield from (run for run in waiting if is_developed(work, INHERITED.get(run.arm)))
        time.sleep(1)  # another process may hold the last ones
    yield from test_runs(work, domains)


def is_developed(work: Path, arm: str | None) -> bool:
    """Return whether the settings of an arm, and of all that it inherits from, are chosen."""
    while arm is not None:
        if not all((work / run.name).exists() for run in development_runs() if run.arm == arm):
            return False
        arm = INHERITED.get(arm)
    return True


@contextmanager
def reserved(file: Path, *, wait: bool) -> Iterator[bool]:
    """Reserve a file for this process within the block. False if another process has it and `wait` is off."""
    lock_file = file.parent / "locks" / f"{file.name}.lock"
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def best_setting(work: Path, arm: str) -> int:
    """Return the setting with the best score on the validation pairs; ties go to the first."""
    if len(SETTINGS[arm]) == 1:
        return 0
    tried = [json.loads((work / run.name).read_text("utf-8")) for run in development_runs() if run.arm == arm]
    return int(np.argmax([score(arm, one["figures"]) for one in tried]))


def score(arm: str, figures: Mapping[str, float]) -> float:
    """Return the development score: the mean of R@1 and `all_right`, or the one figure of an arm's half."""
    return float(np.mean([figures[half] for half in HALVES.get(arm, ("r@1", "all_right"))]))


def options(run: Run, work: Path) -> dict[str, Any]:
    """Return the training configuration of a run."""
    return COMMON | inherited(run.arm, work) | {"seed": run.seed} | SETTINGS[run.arm][run.setting]


def inherited(arm: str, work: Path) -> dict[str, Any]:
    """Return the options of an arm without its own settings."""
    origin = INHERITED.get(arm)
    if origin is None:
        return ARMS[arm]
    chosen = inherited(origin, work) | SETTINGS[origin][best_setting(work, origin)]
    for part in COMBINED.get(arm, ()):
        chosen |= SETTINGS[part][best_setting(work, part)]
    return chosen | ARMS[arm]


# --- one run ---------------------------------------------------------------------------------------------------------


def perform(run: Run, work: Path) -> dict[str, Any]:
    """Tune and measure: `figures` by name, and `columns` with the result of each query and each image."""
    from unidiff_sdk.training.config import TrainingConfig
    from unidiff_sdk.training.loop.trainer import train

    base, data = base_of(run.domain, work), data_of(run.domain, work, run.pairs)
    tuned, checkpoint, seconds = base, work / f"checkpoint.{os.getpid()}", 0.0
    if run.arm != "base":
        shutil.rmtree(checkpoint, ignore_errors=True)
        config = TrainingConfig(**options(run, work))
        latents = work / "latents" if config.trains_generator else None
        trained = train(data["train"], base, checkpoint, config, latents=latents)
        tuned, seconds = checkpoint, trained.seconds
    measured = measure(tuned, base, run, work)
    measured["figures"]["seconds"] = seconds
    if run.domain != REAL:
        measured["base_steps"] = STEPS
    if run.arm != "base":
        measured["options"] = options(run, work)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return measured


def measure(tuned: str | Path, base: str | Path, run: Run, work: Path) -> dict[str, Any]:
    """Measure retrieval, generation, collapse and forgetting of a checkpoint. Development leaves out forgetting."""
    from unidiff_sdk.generation.samplers import make_table
    from unidiff_sdk.inference.manifest import RerankDefaults
    from unidiff_sdk.inference.schedule import Schedule
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
    from unidiff_sdk.training.data.pairs import load_pairs
    from unidiff_sdk.training.evaluation import metrics, retrieval
    from unidiff_sdk.training.evaluation.judge import Judge
    from unidiff_sdk.training.evaluation.reranking import reranked_order
    from unidiff_sdk.training.evaluation.sampling import generate_images
    from unidiff_sdk.training.objective.joint_model import JointModel

    loaded = load_checkpoint(tuned)
    model = JointModel(loaded).eval()
    if run.arm in INTERPOLATED:
        _interpolate(model, JointModel(load_checkpoint(base)), INTERPOLATED[run.arm])
    data = data_of(run.domain, work, run.pairs)
    pairs = load_pairs(data["val" if run.phase == "development" else "test"], loaded)
    train_pairs = load_pairs(data["train"], loaded)
    attributes = retrieval.synthetic_attributes(pairs)
    keys = retrieval.meaning_keys(pairs, attributes)

    # 1. Retrieval and collapse of the embeddings
    u, v = retrieval.embed_pairs(model, loaded, pairs)
    relevant = retrieval.equal_keys(keys)
    hits = [metrics.first_relevant_rank(scores, relevant) == 1 for scores in ((u @ v.T).T, u @ v.T)]
    with half_precision():
        order = reranked_order(model, loaded, pairs, u, v, RerankDefaults(**RERANK))
    first = relevant[np.arange(len(order)), order[:, 0]]
    columns: dict[str, Any] = {
        "hit": np.concatenate(hits).astype(int).tolist(),
        "search": hits[0].astype(int).tolist(),
        "reranked": first.astype(int).tolist(),
    }
    figures = {
        "r@1": float(np.mean(columns["hit"])),
        "search_r@1": float(np.mean(columns["search"])),
        "reranked_r@1": float(np.mean(columns["reranked"])),
        "image_effective_rank": metrics.effective_rank(u),
        "text_effective_rank": metrics.effective_rank(v),
    }

    # 2. Generation: noise depends only on the position of an image, so all arms and seeds start from the same noise
    rows = [row for row in retrieval.distinct_rows(keys, PROMPTS) for _ in range(PER_PROMPT)]
    table = make_table(SAMPLER, Schedule.from_config(loaded.scheduler.config), SAMPLER_STEPS)
    captions = [pairs.captions[row] for row in rows]
    with half_precision():
        images = generate_images(model, loaded, captions, table=table, guidance=GUIDANCE, seed=0)
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

    if run.phase == "development":
        return {"figures": figures, "columns": columns}

    # 3. Forgetting: retrieval on the catalogs that the base was trained on
    base_catalogs = [name for name in SYNTHETIC if name != run.domain]
    retained = []
    for name in base_catalogs:
        base_pairs = load_pairs(data_of(name, work, SIZES[0])["test"], loaded, limit=RETAINED)
        base_keys = retrieval.meaning_keys(base_pairs, retrieval.synthetic_attributes(base_pairs))
        directions = retrieval.retrieval_figures(*retrieval.embed_pairs(model, loaded, base_pairs), base_keys)
        retained.append(np.mean([direction["R@1"] for direction in directions.values()]))
    figures["retained_r@1"] = float(np.mean(retained))
    return {"figures": figures, "columns": columns}


def _interpolate(tuned: Any, base: Any, share: float) -> None:
    """Move the weights of `tuned` towards those of `base`, so that `share` of their difference is left."""
    from unidiff_sdk.training.config import Component
    from unidiff_sdk.training.loop.wise_ft import interpolate
    from unidiff_sdk.training.objective.tuning import component_of

    weights = {name: weight for name, weight in tuned.named_parameters() if component_of(name) is not None}
    interpolate(weights, dict(base.named_parameters()), weights, dict.fromkeys(Component, share))


@contextmanager
def half_precision() -> Iterator[None]:
    """Run the UNet as in training: the same first image as in float32 for 100 of 100 captions, in 2/3 of the time."""
    import torch

    from unidiff_sdk.training.runtime.attention import ShortAttentionInFloat32

    with torch.autocast("cpu", torch.bfloat16), ShortAttentionInFloat32():
        yield


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
    """Return a base that has never seen the domain."""
    if domain == REAL:
        return "tiny"
    with reserved(work / "bases" / domain, wait=True):
        return base_without(domain, work)


def data_of(domain: str, work: Path, pairs: int) -> dict[str, Path]:
    """Return the folders of a domain: "train", "val" and "test", which share no product."""
    folder = work / "data" / domain
    if domain == REAL:
        with reserved(folder, wait=True):
            return _real(folder, pairs)
    from unidiff_sdk.datasets.synthetic import write_catalog

    parts = {f"train-{pairs}": ("train", pairs), "val": ("val", GALLERY), "test": ("test", GALLERY)}
    with reserved(folder, wait=True):
        for part, (split, n) in parts.items():
            if not (folder / part / "metadata.jsonl").exists():
                shutil.rmtree(folder / part, ignore_errors=True)
                write_catalog(domain, folder / part, n=n, seed=1, split=split)
    return {part.split("-")[0]: folder / part for part in parts}


def _real(folder: Path, pairs: int) -> dict[str, Path]:
    """Return the stamps as `make real` splits them, with some random pairs of its training part."""
    if not (folder / "train" / "metadata.jsonl").exists():
        sys.path.insert(0, str(ROOT / "examples"))
        from real_images import convert, download

        whole = folder.with_name(f"{folder.name}.whole")
        shutil.rmtree(whole, ignore_errors=True)
        convert(download(), whole)
        shutil.copytree(whole / "test", folder / "test", dirs_exist_ok=True)
        shutil.copytree(whole / "train", folder / "train", dirs_exist_ok=True)
        lines = (whole / "train" / "metadata.jsonl").read_text("utf-8").splitlines()
        first = sorted(np.random.default_rng(0).permutation(len(lines))[:pairs].tolist())
        chosen = "\n".join(lines[row] for row in first) + "\n"
        (folder / "train" / "metadata.jsonl").write_text(chosen, encoding="utf-8")
    return {"train": folder / "train", "val": folder / "test", "test": folder / "test"}


# --- the result ------------------------------------------------------------------------------------------------------


def collect(work: Path, result: Path) -> None:
    """Write all runs so far into one file, with the machine and the declaration."""
    with reserved(work / "result", wait=True):
        _collect(work, result)


def _collect(work: Path, result: Path) -> None:
    # Runs from bases that are not in `work` are kept as they are, see `restore`
    contents = {Run(**one["run"]).name: one for one in runs_of(result)}
    contents |= {file.name: json.loads(file.read_text("utf-8")) for file in work.glob("*.json")}
    runs = [contents[name] for name in sorted(contents)]
    declaration = {
        **{"domains": DOMAINS, "arms": ARMS, "settings": SETTINGS, "inherited": INHERITED},
        **{"seeds": SEEDS, "sizes": SIZES, "common": COMMON, "rerank": RERANK, "gallery": GALLERY},
        **{"sampler": SAMPLER, "sampler_steps": SAMPLER_STEPS, "guidance": GUIDANCE},
        **{"prompts": PROMPTS, "per_prompt": PER_PROMPT, "base_steps": STEPS},
    }
    measured = {name: shares for name in SYNTHETIC if (shares := measured_base(name, work))}
    bases = (json.loads(result.read_text("utf-8"))["bases"] if result.exists() else {}) | measured
    tuned = len(SEEDS) * (len(ARMS) - 1) * sum(len(sizes_of(domain)) for domain in DOMAINS)
    complete = len(runs) == len(list(development_runs())) + tuned + len(DOMAINS)
    result.parent.mkdir(parents=True, exist_ok=True)
    for sheet in sorted((work / "sheets").glob("*.webp")):
        (result.parent / "sheets").mkdir(exist_ok=True)
        shutil.copy(sheet, result.parent / "sheets")
    _write(result, {**host(), "declared": declaration, "bases": bases, "complete": complete, "runs": runs})


def restore(work: Path, result: Path) -> None:
    """Write the files of runs that only RESULT holds, e.g. on another machine.

    Test runs from a base that is not in `work` are left out: all arms must start from the same base, and one that is
    trained again differs.
    """
    for content in runs_of(result):
        run = Run(**content["run"])
        has_base = run.domain == REAL or (work / "bases" / run.domain).exists()
        if (run.phase == "development" or has_base) and not (work / run.name).exists():
            _write(work / run.name, content)


def runs_of(result: Path) -> list[dict[str, Any]]:
    """Return the runs that a result file holds."""
    runs: list[dict[str, Any]] = json.loads(result.read_text("utf-8"))["runs"] if result.exists() else []
    return runs


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, file)


if __name__ == "__main__":
    main()
