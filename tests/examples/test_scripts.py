"""The example scripts run, and their pages and tables say what happened."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from unidiff_sdk.datasets.reader import read_catalog

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder, with the folder of the examples on the path as when one of them is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def flow(examples: Path) -> ModuleType:
    import _flow

    return _flow


def test_quickstart_prints_three_hits_and_writes_an_image(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "boots.png" in lines[-1]
    assert (examples / "boots.png").is_file()


@pytest.mark.slow
def test_demo_writes_one_page_without_loose_ends(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import demo

    monkeypatch.setattr(demo, "TEXTS", 5)
    for name in [name for name in sys.modules if name.split(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)  # another test may have imported it; the demo asserts that it did not
    result = CliRunner().invoke(demo.main, ["--n", "20"])
    assert result.exit_code == 0, result.output
    page = (examples / "demo" / "index.html").read_text(encoding="utf-8")
    assert "search by a new text" in page and "median of 5 distinct texts" in page
    prose = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert "`" not in prose, "a backtick of Markdown stands in the page"
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page needs a file next to it"


def test_demo_measures_with_distinct_texts(examples: Path) -> None:
    import demo

    texts = demo.distinct_texts(2 * demo.TEXTS)
    assert len(set(texts)) == len(texts) == 2 * demo.TEXTS


def test_before_and_after_states_which_way_a_figure_went(flow: ModuleType) -> None:
    def figures(recall: float, rank: float, kid: float | None = None) -> dict[str, object]:
        return {
            "retrieval": {"text_to_image": {"R@1": recall, "median_rank": rank}},
            "generation": {} if kid is None else {"kid": kid},
        }

    lines = flow.before_and_after(figures(0.5, 3, kid=0.1), figures(0.75, 4))
    assert lines == [
        ("", "before", "after", ""),
        ("text → image, R@1", "0.5", "0.75", "better"),
        ("text → image, median rank", "3", "4", "worse"),
    ]


def test_clear_refuses_a_folder_that_no_example_wrote(flow: ModuleType, examples: Path) -> None:
    out = examples / "out"
    flow.clear(out)
    (out / "result.txt").write_text("x", encoding="utf-8")
    flow.clear(out)
    assert [file.name for file in out.iterdir()] == [flow.MARK]
    foreign = examples / "mine"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(click.UsageError, match="other files"):
        flow.clear(foreign)
    assert (foreign / "notes.txt").is_file()


def test_real_images_converts_stamps_to_two_splits_without_a_common_caption(examples: Path) -> None:
    import real_images

    stamps = examples / "stamps" / "animals" / "birds"
    stamps.mkdir(parents=True)
    for number in range(40):
        Image.new("RGBA", (300, 100), (number, 0, 0, 128)).save(stamps / f"{number:02}.png")
        (stamps / f"{number:02}.txt").write_text(f"Bird {number // 2}.\nfr.utf8=Oiseau.\n", encoding="utf-8")
    (stamps / "broken.png").write_bytes(b"no image")
    (stamps / "broken.txt").write_text("Broken.\n", encoding="utf-8")
    Image.new("RGB", (9, 9)).save(stamps / "no-caption.png")

    counts = real_images.convert(examples / "stamps", examples / "out")
    rows = {split: list(read_catalog(examples / "out" / split)) for split in counts}
    assert sum(counts.values()) == 40 and {split: len(found) for split, found in rows.items()} == counts
    captions = {split: {row.text for row in found} for split, found in rows.items()}
    assert captions["train"] | captions["test"] == {f"Bird {number}." for number in range(20)}
    assert not captions["train"] & captions["test"]
    assert rows["train"][0].payload["category"] == "animals" and rows["train"][0].payload["kind"] == "birds"
    with Image.open(rows["train"][0].image()) as image:
        assert image.size == (256, 256)
