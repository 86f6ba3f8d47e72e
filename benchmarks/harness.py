"""The harness of all benchmarks: UniDiff and its peers take turns, and one JSON file holds the results.

A benchmark is a script that answers one question. It imports heavy packages inside `main`, after the harness has set
the number of threads:

    from harness import Benchmark, options

    @click.command()
    @options
    def main(**chosen):
        bench = Benchmark(__file__, "How long does one call of the UNet take?", **chosen)
        for batch in (1, 2):
            name = f"tiny, batch {batch}"
            if bench.wants(name):  # not measured yet, and not excluded by --only
                bench.row(
                    name,
                    ours={"UniDiff fp32": lambda: session.run(feed)},
                    peers={"diffusers, eager": lambda: unet(**tensors), "optimum": Worker([python, "peer.py"])},
                    parameters={"batch": batch, "latent": 16},
                    items=batch,
                    flop=flop,
                )
        bench.finish()

A second run continues after the last row that the same code measured on the same machine. `--again` measures all rows
again.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from _host import host
from provenance import ROOT, code_of

RESULTS = ROOT / "benchmarks" / "results"
ROUNDS, WARM_UP = 7, 1
LEAST_ROUNDS = 3
# The names of figures, and which direction is better. Time is measured; all other figures are passed to `row`.
FIGURES = {
    "accuracy": "higher",
    "attributes_right": "higher",
    "build_s": "lower",
    "clip_score": "higher",
    "cmmd": "lower",
    "cosine": "higher",
    "disk_mib": "lower",
    "kid": "lower",
    "longest_search_ms": "lower",
    "longest_tick_ms": "lower",
    "max_abs_error": "lower",
    "overhead": "lower",
    "p50_ms": "lower",
    "ms_per_gated_sample": "lower",
    "p99_ms": "lower",
    "peak_gpu_mib": "lower",
    "peak_mib": "lower",
    "psnr_db": "higher",
    "r@1": "higher",
    "recall@1": "higher",
    "recall@10": "higher",
    "rss_mib": "lower",
}

Contestant = Callable[[], object]


class Seconds(float):
    """The duration of a call that a contestant has measured itself, e.g. in another process or with GPU events."""


# The peak memory of a process includes the memory of its parent at the fork. This parent has little.
LAUNCHER = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak_kib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}))
sys.exit(code)
"""


class Process:
    """A contestant that starts a new process for each call; it reports the lifetime and the peak memory.

    The process may store bytecode, as an installed package has it: otherwise each start compiles this package again.

    Attributes:
        log: what the last process wrote to standard error.
    """

    def __init__(self, argv: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
        self.argv, self.peak_mib, self.log = [str(part) for part in argv], 0.0, ""
        self.env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **(env or {})}

    def __call__(self) -> Seconds:
        done = subprocess.run(
            [sys.executable, "-c", LAUNCHER, *self.argv], env=self.env, capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(self.argv)} failed:\n{done.stderr}")
        self.log = done.stderr
        answer = json.loads(done.stdout)
        self.peak_mib = max(self.peak_mib, answer["peak_kib"] / 1024)
        return Seconds(answer["seconds"])

    def figures(self) -> dict[str, float]:
        """Return the peak memory over all calls."""
        return {"peak_mib": round(self.peak_mib, 1)}


class Worker:
    """A contestant in a separate process, and possibly a separate environment, that performs one call per request.

    Its script ends in `_worker.serve(act)`. The worker times the call itself, so messages do not count.
    """

    def __init__(self, argv: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
        self.argv = [str(part) for part in argv]
        paths = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]))
        self.child = subprocess.Popen(
            self.argv,
            env={**os.environ, "PYTHONPATH": paths, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.versions: dict[str, str] = self._answer()["versions"]

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self.argv)} ended with {self.child.wait()} instead of answering; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _request(self, command: str) -> dict[str, Any]:
        assert self.child.stdin is not None
        self.child.stdin.write(command + "\n")
        return self._answer()

    def __call__(self) -> Seconds:
        return Seconds(self._request("call")["seconds"])

    def figures(self) -> dict[str, float]:
        """Return the figures that the worker reports, and the peak memory of its process."""
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        return {**({"peak_mib": round(int(peak[1]) / 1024, 1)} if peak else {}), **self._request("figures")}

    def close(self) -> None:
        """End the process."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()


def measure(
    contestants: Mapping[str, Contestant],
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
    budget_s: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each contestant in each round. Every contestant runs in every round.

    The order is another random one in each round, so that no contestant always finds the caches that the same other one
    left, or competes with what its threads still do. The first `warm_up` rounds do not count. After `budget_s` seconds,
    no round beyond the third starts.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    ends = time.monotonic() + budget_s if budget_s else float("inf")
    for number in range(-warm_up, rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > ends:
            break
        gc.collect()
        for name in random.Random(number).sample(names, len(names)):
            before = clock()
            returned = contestants[name]()
            seconds = float(returned) if isinstance(returned, Seconds) else clock() - before
            if number >= 0:
                samples[name].append(seconds)
    return samples


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return the median, the quartiles, the extremes and the number of the samples."""
    ordered = sorted(samples)
    q1, middle, q3 = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    figures = {"median": middle, "q1": q1, "q3": q3, "min": ordered[0], "max": ordered[-1]}
    return {name: float(f"{value:.5g}") for name, value in figures.items()} | {"rounds": len(ordered)}


def peaks(threads: int) -> dict[str, float]:
    """Return the peak rates of this machine: fp32 GEMM in GFLOP/s and memory copies in GB/s.

    The GEMM rate is the larger of NumPy's and, if installed, PyTorch's for 2048 x 2048 matrices. A copy counts bytes
    read and written.
    """
    code = f"""
import json, time, numpy as np
def best(act, n=7): return min((act(), time.perf_counter() - t)[1] for t in (time.perf_counter() for _ in range(n)))
a = np.random.default_rng(0).random((2048, 2048), dtype=np.float32); gemm = [best(lambda: a @ a)]
big = np.ones(1 << 26, dtype=np.float32); target = np.empty_like(big); copy = [best(lambda: np.copyto(target, big))]
try:
    import torch
except ImportError:
    pass
else:
    torch.set_num_threads({threads}); b = torch.from_numpy(a); gemm.append(best(lambda: b @ b))
    c, d = torch.from_numpy(big), torch.from_numpy(target); copy.append(best(lambda: d.copy_(c)))
print(json.dumps({{"gemm_gflop_s": 2e-9 * 2048**3 / min(gemm), "copy_gb_s": 2e-9 * big.nbytes / min(copy)}}))
"""
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    return {name: round(value, 1) for name, value in json.loads(done.stdout).items()}


def peer_python(name: str) -> Path:
    """Return the interpreter of a peer's environment, created on first use from `benchmarks/peers/NAME.txt`.

    `UNIDIFF_PEER_NAME=/path/to/python` selects an existing interpreter instead.
    """
    if given := os.environ.get(f"UNIDIFF_PEER_{name.upper()}"):
        return Path(given)
    requirements, folder = ROOT / "benchmarks" / "peers" / f"{name}.txt", ROOT / f".venv-peer-{name}"
    python, stamp = folder / "bin" / "python", folder / ".ready"
    wanted = requirements.read_text(encoding="utf-8")
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        click.echo(f"Installing {requirements.relative_to(ROOT)} into {folder.name} (once)…", err=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every benchmark to a click command; `Benchmark` accepts them as keyword arguments."""
    cores = len(os.sched_getaffinity(0))
    for option in (
        click.option("--out", type=click.Path(path_type=Path), help="Default: benchmarks/results/NAME.json."),
        click.option("--only", help="Measure only the rows whose name contains this text, and keep the others."),
        click.option("--rounds", default=ROUNDS, show_default=True, help="Measured rounds."),
        click.option("--threads", default=cores, show_default=True, help="Threads of every contestant."),
        click.option("--again", is_flag=True, help="Measure again what this code has measured on this machine."),
    ):
        command = option(command)
    return command


class Benchmark:
    """The rows of one benchmark; each row is written to the JSON file as soon as it is measured.

    Args:
        script: the benchmark's `__file__`; its stem names the result.
        question: one line, with a question mark.
        device: "cpu", or the name of a GPU. Other devices have their own section on the page.
        depends: scripts that the benchmark starts as processes; their code counts as measured code, too.
        measure_peaks: returns the peak rates of the machine for a number of threads.
    """

    def __init__(
        self,
        script: str,
        question: str,
        *,
        out: Path | None,
        only: str | None,
        rounds: int,
        threads: int,
        again: bool,
        device: str = "cpu",
        depends: Sequence[Path] = (),
        measure_peaks: Callable[[int], dict[str, float]] = peaks,
    ) -> None:
        require_this_code()
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[variable] = str(threads)
        self.script, self.only, self.rounds, self.threads = Path(script).resolve(), only, rounds, threads
        self.again = again or only is not None  # whoever names a row wants it measured
        self.out = out or RESULTS / f"{self.script.stem}.json"
        scripts = [str(Path(file).resolve().relative_to(ROOT)) for file in depends]
        here = {
            "benchmark": self.script.stem,
            "question": question,
            "device": device,
            "threads": threads,
            "depends": scripts,
            **host(),
        }
        self.code = code_of(self.script.stem, scripts)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.out.is_file():
            before = json.loads(self.out.read_text(encoding="utf-8"))
            if differing := [key for key in ("cpu", "device", "threads", "versions") if before.get(key) != here[key]]:
                if only:
                    sys.exit(
                        f"{self.out} was measured with another {' and '.join(differing)}. Pass --out to write another "
                        "file, or omit --only to measure all rows."
                    )
            else:
                self.rows = {row["case"]: row for row in before["rows"]}
        self.report = {**here, "peaks": measure_peaks(threads) if device == "cpu" else {}, "complete": False}
        self._measured: set[str] = set()

    def wants(self, case: str) -> bool:
        """Return whether to measure this row now. Call it before any expensive setup."""
        if self.only is not None and self.only not in case:
            return False
        return self.again or self.rows.get(case, {}).get("code") != self.code

    def row(
        self,
        case: str,
        *,
        ours: Mapping[str, Contestant],
        peers: Mapping[str, Contestant],
        parameters: Mapping[str, Any] | None = None,
        figures: Mapping[str, Mapping[str, float]] | None = None,
        items: int | None = None,
        flop: float | Mapping[str, float] | None = None,
        moved_bytes: float | Mapping[str, float] | None = None,
        rounds: int | None = None,
        warm_up: int = WARM_UP,
        budget_s: float | None = None,
        note: str | None = None,
    ) -> None:
        """Measure one row and write it to the file.

        Args:
            case: the stable name of the row, which `--only` matches.
            ours, peers: the contestants by the name that the table shows. If one has a method `figures`, its result is
                added to the row after the last round.
            parameters: numbers and strings that the plots group by: batch, latent, steps, model, precision, ...
            figures: for each contestant, figures besides the time; their names are those of `FIGURES`.
            items: number of images, queries or pairs in one call; the table shows items per second.
            flop, moved_bytes: floating-point operations (2 per multiply-add) and bytes of one call, for the share of
                the machine's peak: one number, or one for each contestant.
            rounds: measured rounds. Default: the value of `--rounds`.
            warm_up: rounds before the measured ones.
            budget_s: after this many seconds, no round beyond the third starts.
            note: one sentence for the page about differences between the contestants.
        """
        figures = dict(figures or {})
        for name in (unknown for measured in figures.values() for unknown in measured if unknown not in FIGURES):
            raise ValueError(f"{name!r} is not in harness.FIGURES. Add it there, with the direction that is better.")
        contestants = {**ours, **peers}
        samples = measure(contestants, rounds or self.rounds, warm_up, budget_s)
        measured = {}
        for name, act in contestants.items():
            known = {**getattr(act, "figures", dict)(), **figures.get(name, {})}
            measured[name] = {"seconds": spread(samples[name]), "ours": name in ours, "figures": known}
            if isinstance(act, Worker):
                measured[name]["versions"] = act.versions
            for key, amount in (("flop", flop), ("bytes", moved_bytes)):
                if value := amount.get(name) if isinstance(amount, Mapping) else amount:
                    measured[name][key] = value
        ratios = {
            our: {peer: spread([a / b for a, b in zip(samples[our], samples[peer], strict=True)]) for peer in peers}
            for our in ours
        }
        self.rows[case] = {
            "case": case,
            "parameters": dict(parameters or {}),
            "measured": measured,
            "ratios": ratios,
            "command": self.command(case),
            "code": self.code,
            "peaks": self.report["peaks"],
            "date": host()["date"],
            "load_1min": host()["load_1min"],
            **({"items": items} if items else {}),
            **({"note": note} if note else {}),
        }
        self._measured.add(case)
        self.write()
        medians = [f"{name} {figure['seconds']['median']:.4g} s" for name, figure in measured.items()]
        click.echo(f"{self.script.stem}: {case}: {', '.join(medians)}", err=True)

    def command(self, case: str) -> str:
        """Return the command that measures this row again."""
        return f'python {self.script.relative_to(ROOT)} --only "{case}" --threads {self.threads}'

    def write(self) -> None:
        """Write the rows so far. The file is replaced atomically."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.report, "rows": list(self.rows.values())}, indent=1, ensure_ascii=False)
        sibling = self.out.with_suffix(".json.part")
        sibling.write_text(text + "\n", encoding="utf-8")
        sibling.replace(self.out)

    def finish(self) -> None:
        """Mark the result as complete, and drop rows that this code no longer measures."""
        if self.only is None:
            self.rows = {case: row for case, row in self.rows.items() if row["code"] == self.code}
            self.report["complete"] = True
        self.write()
        click.echo(f"{self.out}: {len(self.rows)} rows, {len(self._measured)} measured now", err=True)


def fresh(script: Path, results: Path = RESULTS) -> bool:
    """Return whether a benchmark's file is complete: all rows by this code, on this machine, with these versions."""
    file = results / f"{script.stem}.json"
    if not file.is_file():
        return False
    result, here = json.loads(file.read_text(encoding="utf-8")), host()
    code = code_of(script.stem, result.get("depends", ()))
    same_machine = all(result.get(key) == here[key] for key in ("cpu", "cores", "versions"))
    return bool(result.get("complete")) and same_machine and all(row["code"] == code for row in result["rows"])


def require_this_code(root: Path = ROOT) -> None:
    """Exit if Python would import the package from outside `root`: rows carry the digest of the code in `root`."""
    found = find_spec("unidiff_sdk")
    if found is None or not Path(str(found.origin)).is_relative_to(root):
        sys.exit(
            f"Nothing was measured: unidiff_sdk would be imported from {found and found.origin}, not from {root}. "
            f"Set PYTHONPATH={root}, or install the package from there."
        )
