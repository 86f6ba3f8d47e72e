"""The harness: order of the rounds, stored rows, and resumed benchmarks."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from _host import computes_bf16, processor
from harness import Benchmark, Process, Seconds, Worker, measure, peer_python, require_this_code, spread
from provenance import ROOT

OPTIONS = {"only": None, "rounds": 3, "threads": 1, "again": False}


@pytest.fixture(autouse=True)
def restored_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark sets these variables for the whole process; restore them for other tests."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, os.environ.get(variable, "1"))


def new_benchmark(out: Path, **options: object) -> Benchmark:
    script = str(ROOT / "benchmarks" / "ci.py")
    return Benchmark(script, "How long?", out=out, measure_peaks=lambda threads: {}, **(OPTIONS | options))


def test_measure_runs_every_contestant_in_every_round_after_each_other_one():
    order: list[str] = []
    samples = measure({name: lambda name=name: order.append(name) for name in "abc"}, rounds=40, warm_up=1)
    rounds = [order[start : start + 3] for start in range(0, 3 * 41, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {name: len(column) for name, column in samples.items()} == {"a": 40, "b": 40, "c": 40}
    followed = Counter(pair for turn in rounds for pair in itertools.pairwise(turn))
    assert len(followed) == 6 and min(followed.values()) >= 5


def test_measure_drops_the_warm_up_rounds():
    durations = iter([9.0, 1.0, 2.0])
    assert measure({"a": lambda: Seconds(next(durations))}, rounds=2, warm_up=1) == {"a": [1.0, 2.0]}


def test_measure_stops_after_three_rounds_beyond_its_budget():
    assert len(measure({"a": lambda: None}, rounds=50, budget_s=1e-9)["a"]) == 3


def test_spread_agrees_with_the_statistics_module():
    samples = [0.5, 0.1, 0.4, 0.2, 0.3, 9.0]
    q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    expected = {"median": statistics.median(samples), "q1": q1, "q3": q3, "min": 0.1, "max": 9.0, "rounds": 6}
    assert spread(samples) == pytest.approx(expected)
    assert spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0, "max": 2.0, "rounds": 1}


def test_row_computes_ratios_within_each_round(tmp_path: Path):
    ours, theirs = iter([1.0, 1.0, 3.0, 10.0]), iter([1.0, 2.0, 4.0, 40.0])  # the machine slows down both
    bench = new_benchmark(tmp_path / "r.json")
    bench.row("x", ours={"us": lambda: Seconds(next(ours))}, peers={"them": lambda: Seconds(next(theirs))})
    assert bench.rows["x"]["ratios"]["us"]["them"]["median"] == 0.5


def test_interrupted_benchmark_continues_after_its_last_row(tmp_path: Path):
    out = tmp_path / "r.json"
    first = new_benchmark(out)
    first.row("one", ours={"us": lambda: None}, peers={})
    assert json.loads(out.read_text())["complete"] is False

    second = new_benchmark(out)
    assert not second.wants("one") and second.wants("two")
    second.row("two", ours={"us": lambda: None}, peers={})
    second.finish()
    stored = json.loads(out.read_text())
    assert stored["complete"] is True and [row["case"] for row in stored["rows"]] == ["one", "two"]
    assert stored["rows"][0]["command"] == 'python benchmarks/ci.py --only "one" --threads 1'


def test_only_option_measures_matching_rows_and_keeps_the_others(tmp_path: Path):
    out = tmp_path / "r.json"
    first = new_benchmark(out)
    for case in ("one", "two"):
        first.row(case, ours={"us": lambda: None}, peers={})
    second = new_benchmark(out, only="two")
    assert second.wants("two") and not second.wants("one")
    assert set(second.rows) == {"one", "two"}


def test_rows_of_other_code_or_another_machine_are_measured_again(tmp_path: Path):
    out = tmp_path / "r.json"
    new_benchmark(out).row("one", ours={"us": lambda: None}, peers={})
    stored = json.loads(out.read_text())
    other_code = stored | {"rows": [stored["rows"][0] | {"code": "0"}]}
    for other in (other_code, stored | {"cpu": "another"}, stored | {"threads": 64}, stored | {"versions": {}}):
        out.write_text(json.dumps(other))
        assert new_benchmark(out).wants("one")


def test_only_option_is_refused_for_results_of_another_machine(tmp_path: Path):
    out = tmp_path / "r.json"
    new_benchmark(out).row("one", ours={"us": lambda: None}, peers={})
    out.write_text(json.dumps(json.loads(out.read_text()) | {"cpu": "another"}))
    with pytest.raises(SystemExit, match=r"measured with another cpu\. Pass --out"):
        new_benchmark(out, only="one")


def test_peer_python_can_be_an_existing_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNIDIFF_PEER_OPTIMUM", "/elsewhere/bin/python")
    assert peer_python("optimum") == Path("/elsewhere/bin/python")


def test_row_refuses_unknown_figures(tmp_path: Path):
    bench = new_benchmark(tmp_path / "r.json")
    with pytest.raises(ValueError, match=r"'goodness' is not in harness\.FIGURES"):
        bench.row("x", ours={"us": lambda: None}, peers={}, figures={"us": {"goodness": 1.0}})


def test_process_reports_time_and_peak_memory():
    process = Process([sys.executable, "-c", "x = bytearray(64 << 20); import time; time.sleep(0.05)"])
    assert 0.05 <= process() < 10
    assert 64 < process.figures()["peak_mib"] < 256


def test_process_keeps_what_it_wrote_to_standard_error():
    process = Process([sys.executable, "-c", "import sys; print('validated', file=sys.stderr)"])
    process()
    assert process.log == "validated\n"


def test_failed_process_is_reported_with_its_error():
    with pytest.raises(SystemExit, match="no such thing"):
        Process([sys.executable, "-c", "raise RuntimeError('no such thing')"])()


def test_worker_answers_despite_output_on_stdout(tmp_path: Path):
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


def test_worker_that_exits_is_reported(tmp_path: Path):
    script = tmp_path / "peer.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match=r"peer\.py ended with 3 instead of answering"):
        Worker([sys.executable, script])


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx2 fma\n", "AMD EPYC, AVX2"),
        ("model name\t: AMD EPYC\nflags\t\t: avx2 avx512f avx512_vnni\n", "AMD EPYC, AVX-512 VNNI"),
        ("model name\t: Old\nflags\t\t: sse2\n", "Old"),
        ("Features\t: asimd\n", platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_processor_adds_the_widest_arithmetic_to_the_name(cpuinfo: str | None, name: str, tmp_path: Path):
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(f"processor\t: 0\n{cpuinfo}\n{cpuinfo}")
    assert processor(file) == name


@pytest.mark.parametrize(
    ("flags", "computes"), [("avx512f avx512_bf16", True), ("amx_bf16", True), ("avx512_vnni", False), (None, False)]
)
def test_whether_the_processor_computes_in_bfloat16(flags: str | None, computes: bool, tmp_path: Path):
    file = tmp_path / "cpuinfo"
    if flags:
        file.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    assert computes_bf16(file) is computes


def test_code_from_another_folder_is_not_measured(tmp_path: Path):
    require_this_code()
    with pytest.raises(
        SystemExit, match=rf"unidiff_sdk would be imported from .*, not from {tmp_path}\. Set PYTHONPATH"
    ):
        require_this_code(tmp_path)


def test_benchmark_exits_before_it_measures_code_from_another_folder(tmp_path: Path):
    (tmp_path / "unidiff_sdk").mkdir()
    (tmp_path / "unidiff_sdk" / "__init__.py").touch()
    out = tmp_path / "result.json"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "graphs.py", "--out", out],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not out.exists()
    assert f"Nothing was measured: unidiff_sdk would be imported from {tmp_path}" in done.stderr
