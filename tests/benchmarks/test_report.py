"""The page of the benchmarks from invented results, the performance gate, and fresh results in `make bench`."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import ci
import report
import run_all
from harness import Benchmark, Seconds, fresh
from provenance import ROOT, code_of


def seconds(median: float) -> dict[str, float]:
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "min": median, "max": median, "rounds": 7}


def a_row(case: str, ours: float, theirs: float, **more: Any) -> dict[str, Any]:
    measured = {
        "UniDiff": {"seconds": seconds(ours), "ours": True, "figures": {"peak_mib": 100.0}, "flop": 50e9},
        "peer": {"seconds": seconds(theirs), "ours": False, "figures": {"peak_mib": 200.0}},
    }
    row = {"case": case, "parameters": {}, "measured": measured, "load_1min": 0.0, "date": "2026-01-02"}
    row |= {
        "ratios": {"UniDiff": {"peer": seconds(ours / theirs)}},
        "command": f'python benchmarks/x.py --only "{case}"',
    }
    return row | more


def a_result(name: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    rows = [{"code": code_of(name), **row} for row in rows]
    result = {"benchmark": name, "question": f"How long is {name}?", "device": "cpu", "cpu": "Some CPU", "cores": 2}
    result |= {"threads": 2, "date": "2026-01-02T03:04:05", "versions": {"numpy": "2"}, "complete": True, "rows": rows}
    return result | {"peaks": {"gemm_gflop_s": 200.0, "copy_gb_s": 20.0}} | more


def written(tmp_path: Path, *results: dict[str, Any]) -> str:
    folder = tmp_path / "results"
    for number, result in enumerate(results):
        file = folder / ("gpu" if result["device"] != "cpu" else "") / f"{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result), encoding="utf-8")
    done = CliRunner().invoke(report.main, ["--results", str(folder), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    return (tmp_path / "RESULTS.md").read_text(encoding="utf-8")


def test_table_shows_a_row_with_its_peer_and_its_command(tmp_path: Path) -> None:
    text = written(tmp_path, a_result("unet", [a_row("batch 2", 0.5, 1.0, items=2, note="Not quite alike.")]))
    line = next(line for line in text.splitlines() if "**UniDiff**" in line)
    # 2 items in half a second; 50 GFLOP in half a second are half of 200 GFLOP/s.
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "batch 2",
        "**UniDiff**",
        "500 ms",
        "450 ms to 550 ms",
        "4",
        "50%",
        "100",
        "peer: 0.50",
        '`python benchmarks/x.py --only "batch 2"`',
    ]
    slower = a_row("batch 2", 0.5, 1.0, peaks={"gemm_gflop_s": 125.0, "copy_gb_s": 10.0})
    assert "| 80% |" in written(tmp_path, a_result("unet", [slower])), "a row relates to the peak measured with it"
    heads = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(heads) == 1, "every line of the table has the same number of cells"
    assert "- batch 2: Not quite alike." in text and "In no row that is measured here." in text


def test_rows_of_earlier_code_are_counted_and_marked(tmp_path: Path) -> None:
    rows = [a_row("batch 1", 0.5, 1.0), a_row("batch 2", 0.5, 1.0, code="0123456789abcdef"), a_row("batch 4", 0.5, 1.0)]
    removed = a_result("gone", [a_row("once", 0.5, 1.0, code="0123456789abcdef")])
    text = written(tmp_path, a_result("graphs", rows), removed)
    assert "**2 of 4 rows were measured with the code in this repository.**" in text
    cases = [line.split("|")[1].strip() for line in text.splitlines() if "**UniDiff**" in line]
    assert cases == ["once †", "batch 1", "batch 2 †", "batch 4"]


def leads(text: str) -> list[list[str]]:
    """The cells of the table "Where a peer is ahead"."""
    lines = text.partition("## Where a peer is ahead")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


def test_peer_table_lists_the_largest_leads_first(tmp_path: Path) -> None:
    rows = [a_row("fast", 0.5, 1.0), a_row("slow", 3.0, 1.0), a_row("near", 1.05, 1.0), a_row("even", 1.001, 1.0)]
    rows[0]["measured"]["peer"]["figures"]["recall@10"] = 0.99
    rows[0]["measured"]["UniDiff"]["figures"]["recall@10"] = 0.9
    # A smaller lead in another figure of the same row gives no second line.
    rows[1]["measured"]["UniDiff"]["figures"]["peak_mib"] = 300.0
    assert leads(written(tmp_path, a_result("search", rows))) == [
        ["`search`: slow", "peer", "3.00 (time)"],
        ["`search`: fast", "peer", "1.10 (recall@10)"],
        ["`search`: near", "peer", "1.05 (time)"],
    ]


def test_peer_table_names_the_contestant_where_there_are_several(tmp_path: Path) -> None:
    row = a_row("unet", 2.0, 1.0)
    row["measured"]["UniDiff int8"] = row["measured"]["UniDiff"]
    row["ratios"]["UniDiff int8"] = {"peer": seconds(0.5)}
    gpu = a_result("gpu", [a_row("unet", 4.0, 1.0)], device="Some GPU", peaks={})
    assert leads(written(tmp_path, a_result("unet", [row]), gpu)) == [
        ["`gpu`: unet, Some GPU", "peer", "4.00 (time)"],
        ["`unet`: unet (UniDiff)", "peer", "2.00 (time)"],
    ]


def test_peer_table_has_at_most_twenty_rows_and_counts_the_others(tmp_path: Path) -> None:
    rows = [a_row(f"case {number}", 1.0 + number, 1.0) for number in range(1, 24)]
    text = written(tmp_path, a_result("search", rows))
    assert [ratio for _, _, ratio in leads(text)] == [f"{number}.00 (time)" for number in range(24, 4, -1)]
    assert "\n3 more, with smaller ratios, are in the tables below." in text
    rows = rows[:20]
    assert " more, with smaller ratios" not in written(tmp_path, a_result("search", rows))


def test_peer_table_leaves_out_figures_without_a_ratio_and_baselines_of_our_own(tmp_path: Path) -> None:
    row = a_row("build", 0.5, 1.0)
    row["measured"]["UniDiff"]["figures"]["build_s"], row["measured"]["peer"]["figures"]["build_s"] = 20.0, 0.0
    cost = a_row("cost", 2.0, 1.0)
    cost["measured"]["UniDiff, without"] = cost["measured"].pop("peer")
    cost["ratios"]["UniDiff"] = {"UniDiff, without": seconds(2.0)}
    assert "In no row that is measured here." in written(tmp_path, a_result("search", [row, cost]))


def test_other_devices_have_their_own_section_after_the_cpu(tmp_path: Path) -> None:
    gpu = a_result("unet", [a_row("batch 2", 0.1, 0.2)], device="Some GPU", peaks={}, complete=False)
    text = written(tmp_path, gpu, a_result("unet", [a_row("batch 2", 0.5, 1.0)]))
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == ["## Where a peer is ahead", "## Some CPU, 2 cores", "## Some GPU (Some CPU, 2 cores)"]
    assert text.index("**Incomplete") > text.index(heads[2])


def test_plots_show_what_varies_and_old_plots_are_deleted(tmp_path: Path) -> None:
    rows = [
        a_row(f"{model}, batch {batch}", 0.1 * batch, 0.2 * batch, parameters={"model": model, "batch": batch})
        for model in ("tiny", "sd15")
        for batch in (1, 2, 4)
    ]
    search = []
    for ef, recall in ((16, 0.8), (64, 0.95), (256, 1.0)):
        row = a_row(f"ef {ef}", 0.001 * ef, 0.002 * ef, parameters={"ef": ef, "data": "clustered"})
        row["measured"]["UniDiff"]["figures"]["recall@10"] = recall
        search.append(row)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "gone.svg").write_text("<svg/>")
    text = written(tmp_path, a_result("unet", rows), a_result("search", search))
    plots = {file.name: ElementTree.parse(file).getroot() for file in (tmp_path / "plots").iterdir()}
    assert set(plots) == {"unet-batch-tiny.svg", "unet-batch-sd15.svg", "search-recall-10-clustered.svg"}
    assert all(f"(plots/{name})" in text for name in plots)
    circles = plots["search-recall-10-clustered.svg"].findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 3
    labels = [text.text for text in plots["search-recall-10-clustered.svg"].iter("{http://www.w3.org/2000/svg}text")]
    assert "1" in labels and not {"1.05", "1.1", "1.2"} & set(labels), "the axis of recall ends at 1"


def test_plot_joins_the_efforts_of_one_engine(tmp_path: Path) -> None:
    row = a_row("embeddings", 0.5, 1.0, parameters={"kind": "embeddings"})
    for ef in (32, 128, 512):
        row["measured"][f"FAISS, ef {ef}"] = {"seconds": seconds(0.01 * ef), "ours": False, "figures": {}}
        row["measured"][f"FAISS, ef {ef}"]["figures"]["recall@10"] = 0.9
        row["ratios"]["UniDiff"][f"FAISS, ef {ef}"] = seconds(0.5)
    row["measured"]["UniDiff"]["figures"]["recall@10"] = 1.0
    written(tmp_path, a_result("search", [row]))
    (plot,) = (tmp_path / "plots").iterdir()
    texts = [text.text for text in ElementTree.parse(plot).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("FAISS") == 1 and not [text for text in texts if "ef" in (text or "")]


def test_page_without_results_says_so(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert "Nothing has been measured yet." in written(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"), [(12.3456, "12.3 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (0, "0 µs")]
)
def test_durations_have_three_digits(value: float, text: str) -> None:
    assert report.duration(value) == text


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "failed", "measured"),
    [
        ([0.50], [], 1),
        ([0.88], [], 1),  # the bound is 0.8, with the margin 0.88
        ([0.89, 0.80], [], 2),  # noise: the second measurement passes
        ([0.89, 0.89], ["a"], 2),
        ([math.nan, math.nan], ["a"], 2),
    ],
)
def test_gate_fails_a_case_that_exceeds_its_bound_twice(ratios: list[float], failed: list[str], measured: int) -> None:
    answers = iter(ratios)
    calls: list[str] = []

    def ratio(name: str) -> float:
        calls.append(name)
        return next(answers)

    assert ci.over({"a": 0.8}, 0.1, ratio) == failed
    assert len(calls) == measured


def test_gate_repeats_measurements_after_all_first_ones() -> None:
    calls: list[str] = []
    ci.over({"a": 0.1, "b": 9.0}, 0.0, lambda name: calls.append(name) or 1.0)
    assert calls == ["a", "b", "a"]


def test_gate_takes_the_median_ratio_of_the_rounds() -> None:
    ours, theirs = iter([9.0, 1.0, 3.0, 8.0]), iter([1.0, 2.0, 4.0, 80.0])  # the first round warms up
    case = (lambda: Seconds(next(ours)), lambda: Seconds(next(theirs)), 3)
    assert ci.ratio_of("a", case) == 0.5


def test_every_bound_has_a_case_and_is_below_one() -> None:
    gate = json.loads(ci.BOUNDS.read_text(encoding="utf-8"))
    assert 0 < gate["margin"] <= 0.2 and all(0 < bound < 1 for bound in gate["bounds"].values())
    source = Path(ci.__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in source for name in gate["bounds"])


# --- make bench ------------------------------------------------------------------------------------------------------


def test_complete_result_of_the_same_code_is_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, os.environ.get(variable, "1"))  # restores what the benchmark sets
    script, out = ROOT / "benchmarks" / "cold_start.py", tmp_path / "cold_start.json"
    assert not fresh(script, tmp_path)
    options = {"only": None, "rounds": 1, "threads": 1, "again": False, "measure_peaks": lambda threads: {}}
    bench = Benchmark(str(script), "How long?", out=out, **options)
    bench.row("a", ours={"us": lambda: None}, peers={})
    assert not fresh(script, tmp_path), "rows may be missing"
    bench.finish()
    assert fresh(script, tmp_path)
    stored = json.loads(out.read_text())
    stored["rows"][0]["code"] = "older"
    out.write_text(json.dumps(stored))
    assert not fresh(script, tmp_path)


OVERTIME = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep({seconds})
"""


@pytest.mark.parametrize(("seconds", "status"), [(60, None), (0, 0)])
def test_processes_of_a_benchmark_end_with_it(
    capfd: pytest.CaptureFixture[str], seconds: float, status: int | None
) -> None:
    assert run_all.run([sys.executable, "-c", OVERTIME.format(seconds=seconds)], 3.0) == status
    child = Path("/proc", capfd.readouterr().out.strip(), "stat")
    gone_by = time.monotonic() + 10
    while child.exists() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < gone_by, "the process still runs"
        time.sleep(0.05)


def test_benchmarks_are_found_and_fit_into_ninety_minutes() -> None:
    names = [script.stem for script in run_all.scripts()]
    assert {"cold_start", "search", "indexing", "optimizing"} <= set(names) and "million" not in names
    assert not {"ci", "harness", "report", "run_all"} & set(names)
    assert sum(run_all.BUDGETS.get(name, run_all.BUDGET) for name in names) <= 90 * 60
