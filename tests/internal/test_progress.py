"""The text of the progress bar."""

from __future__ import annotations

import re
import time

import pytest

from unidiff_sdk._internal.progress import progress_bar


def test_progress_bar_shows_count_rate_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("Indexing", shown=True) as advance:
        for done in (0, 1000, 2000, 3000):
            advance(done, 3000)
            time.sleep(0.05)
    shown = capsys.readouterr().err
    assert "Indexing" in shown and "3000/3000" in shown and re.search(r"\d:\d\d:\d\d", shown)
    rate = re.search(r"([\d,]+)/s", shown)
    assert rate and 0 < int(rate[1].replace(",", "")) <= 20_000  # a thousand in 50 ms, or in more on a busy machine


def test_hidden_progress_bar_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("Indexing", shown=False) as advance:
        advance(1, 2)
    with progress_bar("Indexing", shown=True):
        pass  # what is refused before the first step is said in one line
    assert capsys.readouterr().err.strip() == ""


def test_progress_bar_without_an_update_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="early"), progress_bar("Indexing", shown=True):
        raise ValueError("early")
    assert capsys.readouterr().err == ""
