"""Progress: a bar on a terminal, and lines without one."""

from __future__ import annotations

import re
import time

import pytest

from unidiff_sdk._internal import progress
from unidiff_sdk._internal.progress import ProgressLines, count_line, progress_bar


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rich take stderr for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("terminal")
def test_progress_bar_shows_count_rate_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("Indexing", shown=True) as advance:
        for done in (0, 1000, 2000, 3000):
            advance(done, 3000)
            time.sleep(0.05)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "Indexing" in shown and "3000/3000" in shown and re.search(r"\d:\d\d:\d\d", shown)
    rate = re.findall(r"([\d,]+)/s", shown)[-1]
    assert 0 < int(rate.replace(",", "")) <= 20_000  # a thousand in 50 ms, or in more on a busy machine


def test_without_a_terminal_progress_is_a_line_per_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.1)
    with progress_bar("Indexing", shown=True) as advance:
        for done in range(1, 36):
            advance(done, 100)
            time.sleep(0.01)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 5
    assert all(re.fullmatch(r"Indexing: \d+ of 100 in 0:00:0\d, [\d.,]+/s, 0:\d\d:\d\d left", line) for line in lines)


def test_lines_are_30_seconds_apart_and_end_with_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert progress.LINE_INTERVAL == 30
    with progress_bar("Indexing", shown=True) as advance:
        advance(1, 2)
    with pytest.raises(ValueError, match="stop"), ProgressLines("\x1b[2J", 0.02):
        time.sleep(0.1)
        raise ValueError("stop")
    printed = capsys.readouterr().err.splitlines()
    assert printed and set(printed) == {r"\x1b[2J"}
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_count_line_estimates_the_time_left() -> None:
    assert count_line("Indexing", 1200, 5000, 30) == "Indexing: 1,200 of 5,000 in 0:00:30, 40/s, 0:01:35 left"
    assert count_line("Indexing", 0, 5000, 30) == "Indexing: 0 of 5,000 in 0:00:30"


def test_hidden_progress_bar_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("Indexing", shown=False) as advance:
        advance(1, 2)
    with progress_bar("Indexing", shown=True):
        pass  # what is refused before the first step is said in one line
    assert capsys.readouterr().err.strip() == ""


@pytest.mark.usefixtures("terminal")
def test_progress_bar_without_an_update_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="early"), progress_bar("Indexing", shown=True):
        raise ValueError("early")
    assert capsys.readouterr().err == ""
