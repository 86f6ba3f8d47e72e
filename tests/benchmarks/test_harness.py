"""The harness: who is measured when, what is kept of it, and that an interrupted benchmark goes on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import harness
from _host import processor
from harness import Benchmark, Process, Seconds, Worker, measure, spread

CHOSEN = {"only": None, "rounds": 3, "threads": 1, "again": False}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "peaks", lambda threads: {"gemm_gflop_s": 100.0, "copy_gb_s": 10.0})
    # A benchmark sets its threads for the whole process; other tests are to have their own.
    monkeypatch.setattr(harness.os, "environ", dict(os.environ))


def a_benchmark(out: Path, **chosen: object) -> Benchmark:
    return Benchmark(str(harness.ROOT / "benchmarks" / "ci.py"), "How long?", out=out, **(CHOSEN | chosen))


def test_everybody_is_measured_in_every_round_and_nobody_always_goes_first():
    order: list[str] = []
    samples = measure({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3, warm_up=1)
    rounds = [order[start : start + 3] for start in range(0, 12, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {turn[0] for turn in rounds} == {"a", "b", "c"}
    assert {name: len(column) for name, column in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_warm_up_does_not_count():
    durations = iter([9.0, 1.0, 2.0])
    assert measure({"a": lambda: Seconds(next(durations))}, rounds=2, warm_up=1) == {"a": [1.0, 2.0]}


def test_a_budget_leaves_three_rounds(monkeypatch: pytest.MonkeyPatch):
    assert len(measure({"a": lambda: None}, rounds=50, budget_s=1e-9)["a"]) == 3


def test_the_spread_is_that_of_the_statistics_module():
    samples = [0.5, 0.1, 0.4, 0.2, 0.3, 9.0]
    q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    expected = {"median": statistics.median(samples), "q1": q1, "q3": q3, "min": 0.1, "max": 9.0, "rounds": 6}
    assert spread(samples) == pytest.approx(expected)
    assert spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0, "max": 2.0, "rounds": 1}


def test_a_ratio_is_taken_within_each_round(tmp_path: Path):
    ours, theirs = iter([1.0, 1.0, 3.0, 10.0]), iter([1.0, 2.0, 4.0, 40.0])  # the machine slows down for both
    bench = a_benchmark(tmp_path / "r.json")
    bench.row("x", ours={"us": lambda: Seconds(next(ours))}, peers={"them": lambda: Seconds(next(theirs))})
    assert bench.rows["x"]["ratios"]["us"]["them"]["median"] == 0.5


def test_an_interrupted_benchmark_goes_on_after_its_last_row(tmp_path: Path):
    out = tmp_path / "r.json"
    first = a_benchmark(out)
    first.row("one", ours={"us": lambda: None}, peers={})
    assert json.loads(out.read_text())["complete"] is False

    second = a_benchmark(out)
    assert not second.wants("one") and second.wants("two")
    second.row("two", ours={"us": lambda: None}, peers={})
    second.finish()
    stored = json.loads(out.read_text())
    assert stored["complete"] is True and [row["case"] for row in stored["rows"]] == ["one", "two"]
    assert stored["rows"][0]["command"] == 'python benchmarks/ci.py --only "one" --threads 1'


def test_only_measures_its_rows_again_and_keeps_the_others(tmp_path: Path):
    out = tmp_path / "r.json"
    first = a_benchmark(out)
    for case in ("one", "two"):
        first.row(case, ours={"us": lambda: None}, peers={})
    chosen = a_benchmark(out, only="two")
    assert chosen.wants("two") and not chosen.wants("one")
    assert set(chosen.rows) == {"one", "two"}


def test_rows_of_other_code_or_another_machine_are_measured_anew(tmp_path: Path):
    out = tmp_path / "r.json"
    a_benchmark(out).row("one", ours={"us": lambda: None}, peers={})
    stored = json.loads(out.read_text())
    other_code = stored | {"rows": [stored["rows"][0] | {"code": "0"}]}
    for other in (other_code, stored | {"cpu": "another"}, stored | {"threads": 64}, stored | {"versions": {}}):
        out.write_text(json.dumps(other))
        assert a_benchmark(out).wants("one")


def test_one_row_is_never_written_among_those_of_another_machine(tmp_path: Path):
    out = tmp_path / "r.json"
    a_benchmark(out).row("one", ours={"us": lambda: None}, peers={})
    out.write_text(json.dumps(json.loads(out.read_text()) | {"cpu": "another"}))
    with pytest.raises(SystemExit, match="measured with another cpu: give --out"):
        a_benchmark(out, only="one")


def test_a_peers_environment_can_be_one_that_is_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNIDIFF_PEER_OPTIMUM", "/elsewhere/bin/python")
    assert harness.peer_python("optimum") == Path("/elsewhere/bin/python")


def test_a_figure_needs_a_name_that_the_page_knows(tmp_path: Path):
    bench = a_benchmark(tmp_path / "r.json")
    with pytest.raises(ValueError, match=r"'goodness' is not in harness\.FIGURES"):
        bench.row("x", ours={"us": lambda: None}, peers={}, figures={"us": {"goodness": 1.0}})


def test_a_fresh_process_tells_its_time_and_memory():
    process = Process([sys.executable, "-c", "x = bytearray(64 << 20); import time; time.sleep(0.05)"])
    assert 0.05 <= process() < 10
    assert 64 < process.figures()["peak_mib"] < 256


def test_a_process_that_fails_is_named_with_what_it_said():
    with pytest.raises(SystemExit, match="no such thing"):
        Process([sys.executable, "-c", "raise RuntimeError('no such thing')"])()


def test_a_worker_answers_call_by_call_whatever_its_libraries_print(tmp_path: Path):
    script = tmp_path / "peer.py"
    script.write_text(
        "import time\nfrom _worker import serve\n"
        "def act():\n    print('chatter on stdout')\n    time.sleep(0.02)\n"
        "serve(act, figures=lambda: {'psnr_db': 40.0})\n"
    )
    worker = Worker([sys.executable, script])
    assert 0.02 <= worker() < 5
    figures = worker.figures()
    assert figures["psnr_db"] == 40.0 and figures["peak_mib"] > 1
    assert "numpy" in worker.versions
    worker.close()
    assert worker.child.returncode == 0


def test_a_worker_that_dies_is_named(tmp_path: Path):
    script = tmp_path / "peer.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match=r"peer\.py ended with 3 instead of answering"):
        Worker([sys.executable, script])


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx2 fma\n", "AMD EPYC, AVX2"),
        ("model name\t: AMD EPYC\nflags\t\t: avx2 avx512f avx512_vnni\n", "AMD EPYC, AVX-512 VNNI"),
        ("model name\t: Old\nflags\t\t: sse2\n", "Old"),
        ("Features\t: asimd\n", platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_processors_of_one_name_are_told_apart_by_their_arithmetic(told: str | None, name: str, tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    if told is not None:
        cpuinfo.write_text(f"processor\t: 0\n{told}\n{told}")
    assert processor(cpuinfo) == name
