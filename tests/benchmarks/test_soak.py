"""The soak test: its limits, its mutations, its record and its page."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("the soak test reads /proc", allow_module_level=True)

pytest.importorskip("onnx", reason="needs the export extra")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from soak import results
from soak.corpus import copy_sparse, images, items, tar_shard
from soak.mixed import slope_per_minute
from soak.mutators import mutate_json, mutate_png, mutate_tar, mutate_value
from soak.sections import SECTIONS, Record, Tally
from soak.workers import ACCEPTED, FAILED, REFUSED, Limits, Outcome, call, run_cases

from unidiff_sdk import StoreError

LIMITS = Limits(seconds=2.0, cpu_seconds=0.5, memory=64 << 20)


def refuse() -> None:
    raise StoreError("no")


def spin() -> None:
    started = time.process_time()
    while time.process_time() - started < 0.7:
        pass


def allocate() -> None:
    bytearray(os.urandom(1)) * (100 << 20)


def crash() -> None:
    faulthandler.disable()  # pytest's, which would print the crash
    ctypes.string_at(0)


ACTS: list[Callable[[], object]] = [
    lambda: None,
    refuse,
    lambda: {}["key"],
    crash,
    lambda: None,
    spin,
    allocate,
    lambda: time.sleep(60),
    lambda: os._exit(0),
    lambda: None,
]


def test_run_cases_reports_every_case_and_survives_crashes_and_hangs(tmp_path: Path) -> None:
    outcomes = list(run_cases(range(len(ACTS)), lambda: lambda case: ACTS[case](), LIMITS, tmp_path / "log"))
    assert [outcome.case for outcome in outcomes] == list(range(len(ACTS)))
    kinds = [outcome.kind for outcome in outcomes]
    assert kinds == [ACCEPTED, REFUSED, FAILED, FAILED, ACCEPTED, FAILED, FAILED, FAILED, FAILED, ACCEPTED]
    expected = {
        2: "KeyError: 'key'",
        3: "SIGSEGV",
        5: "s of CPU time",
        6: "MiB of memory",
        7: "still running",
        8: "exit code 0",
    }
    for case, text in expected.items():
        assert text in outcomes[case].detail
    assert outcomes[6].memory >= 90 << 20


def test_call_reports_a_killed_child(tmp_path: Path) -> None:
    outcome = call(7, lambda: os.kill(os.getpid(), signal.SIGKILL), 10, tmp_path / "log")
    assert (outcome.case, outcome.kind) == (7, FAILED)
    assert "code -9" in outcome.detail


def test_mutated_png_has_valid_checksums_unless_bytes_were_mutated() -> None:
    valid, files = 0, images("PNG")
    for seed in range(200):
        mutated = mutate_png(Random(seed), files[0], files)
        assert mutated == mutate_png(Random(seed), files[0], files), "a case is repeatable"
        valid += mutated != files[0] and has_valid_checksums(mutated)
    assert valid > 100


def has_valid_checksums(png: bytes) -> bool:
    position = 8
    while position + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, position)
        end = position + 8 + length
        if end + 4 > len(png) or zlib.crc32(png[position + 4 : end]) != struct.unpack_from(">I", png, end)[0]:
            return False
        position = end + 4
    return position == len(png)


def test_mutated_tar_header_has_a_valid_checksum() -> None:
    shard = tar_shard(items(1))
    valid = 0
    for seed in range(200):
        mutated = mutate_tar(Random(seed), shard, [shard])
        header = mutated[:512]
        changed = len(mutated) == len(shard) and header != shard[:512]
        recorded = header[148:154].strip(b"\0 ")
        expected = b"%06o" % sum(header[:148] + b" " * 8 + header[156:])
        valid += changed and recorded == expected
    assert valid > 20


def test_mutated_json_changes_the_value_and_not_its_source() -> None:
    source = {"a": [1, {"b": "text"}], "c": True}
    before = json.dumps(source)
    changed = sum(mutate_value(Random(seed), source) != source for seed in range(100))
    assert changed > 80 and json.dumps(source) == before
    assert len({mutate_json(Random(seed), before.encode()) for seed in range(100)}) > 80


def test_sparse_copy_has_equal_content_and_holes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    with (source / "deep" / "file").open("wb") as file:
        file.write(b"head")
        file.seek(10 << 20)
        file.write(b"tail")
        file.truncate(20 << 20)
    copy_sparse(source, tmp_path / "copy")
    copy = tmp_path / "copy" / "deep" / "file"
    assert copy.read_bytes() == (source / "deep" / "file").read_bytes()
    assert copy.stat().st_blocks * 512 < 1 << 20


def test_record_adds_up_after_a_cut_line(tmp_path: Path) -> None:
    record = Record(tmp_path, "mutate-png")
    for first in (0, 10):
        tally = Tally(seconds=1.0)
        for case in range(first, first + 10):
            tally.add(Outcome(case, FAILED if case == 13 else REFUSED, "ImageError: damaged", 0.1 * case, case))
        record.append(tally)
    with record.file.open("a", encoding="utf-8") as file:
        file.write('{"done": 5, "acc')
    total = record.read()
    assert (total.done, total.accepted, total.failed, dict(total.refused)) == (20, 0, 1, {"ImageError": 19})
    assert (total.failures[0]["case"], total.seconds, total.memory) == (13, 2.0, 19)


def test_slope_ignores_a_peak() -> None:
    rising = [(second, 1000.0 * second) for second in range(60)]
    assert slope_per_minute(rising) == pytest.approx(60_000)
    flat = [(second, 10**9 if second == 30 else 5) for second in range(60)]
    assert slope_per_minute(flat) == 0


def test_page_is_the_one_of_the_results() -> None:
    result = json.loads(results.RESULTS.read_text(encoding="utf-8"))
    assert results.PAGE.read_text(encoding="utf-8") == "\n".join(results.page(result)) + "\n"
    assert result["sections"].keys() == SECTIONS.keys()
    whole = result["sections"]["mutate-onnx"]
    assert whole["done"] == whole["accepted"] + sum(whole["refused"].values()) + whole["failed"]
