"""What the soak test writes: a table for the terminal, results.json, and a page of the documentation."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from .sections import MIXED_SECONDS, SECTIONS, Record, Tally

__all__ = ["PAGE", "RESULTS", "page", "result_of", "table", "write"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "soak" / "results.json", ROOT / "docs" / "results" / "soak.md"

# Folders of one machine and one run, in tracebacks and messages.
_LOCAL = re.compile(rf"{re.escape(str(ROOT))}/|/[^\s'\"]*/(?:site-packages|unidiff-soak-\d+)/")

_GROUPS = {
    "kill-": (
        "Killed processes",
        "Each trial kills the operation with SIGKILL once or twice, at random times of its measured duration. Then "
        "another process opens what is left. Everything acknowledged must be stored, a search must find every item, "
        "the operation must complete when it is started again, and `Catalog.check(repair=True)` must leave no file "
        "that nothing uses. Training must end with the weights of an uninterrupted run, bit for bit. For "
        "`unidiff-export`, the graphs are traced before the "
        "trials, since tracing writes nothing.",
    ),
    "mutate-": (
        "Mutated inputs",
        "Each input is a valid file or argument with flipped, removed, repeated, spliced or changed parts. Most "
        "mutations know the format and keep its checksums valid. An input must be accepted, or refused with a "
        "`UniDiffError`. Every other error, a crash, more than 1 GiB of additional memory or more than 5 s of CPU time "
        "is a failure (20 s for a training checkpoint).",
    ),
    "disk-": (
        "Full disks",
        "Each trial runs the operation on a file system of random size. It must succeed or raise a `UniDiffError`. "
        "With enough room again, everything acknowledged must be stored, and the operation must complete.",
    ),
    "server": (
        "Misbehaving servers",
        "Each trial makes 12 calls to a server that answers late, twice, partly, wrongly or not at all. A call must "
        "succeed or raise a `UniDiffError`. What was acknowledged must be stored when the server behaves again.",
    ),
}


def result_of(state: Path, planned: Mapping[str, int], seed: int, *, short: bool) -> dict[str, Any]:
    """The result of all sections as JSON values.

    Args:
        state: the folder of the records.
        planned: the number of trials of each section.
        short: whether these are few.
    """
    from _host import host

    sections = {}
    for name, trials in planned.items():
        tally = Record(state, name).read()
        sections[name] = {
            "title": SECTIONS[name].title,
            "planned": trials,
            "done": tally.done,
            "accepted": tally.accepted,
            "refused": dict(sorted(tally.refused.items())),
            "failed": tally.failed,
            "failures": groups_of(tally),
            "seconds": round(tally.seconds, 1),
            "largest_cpu_seconds": round(tally.cpu_seconds, 2),
            "largest_memory": tally.memory,
            **({"mixed": tally.result} if tally.result else {}),
        }
    return {"commit": _commit(), "seed": seed, "short": short, "host": host(), "sections": sections}


def groups_of(tally: Tally) -> list[dict[str, Any]]:
    """The failures by the last line of their details, most frequent first."""
    groups: dict[str, dict[str, Any]] = {}
    for failure in tally.failures:
        detail = _LOCAL.sub("", failure["detail"]).strip()
        reason = (detail.splitlines() or ["no output"])[-1][:200]
        group = groups.setdefault(reason, {"reason": reason, "cases": [], "detail": detail})
        group["cases"].append(failure["case"])
    return sorted(groups.values(), key=lambda group: -len(group["cases"]))


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(result: Mapping[str, Any]) -> Table:
    """The table for the terminal."""
    shown = Table("section", "trials", "succeeded", "refused", "failed", "each", "memory", box=None)
    for name, section in result["sections"].items():
        each = section["seconds"] / section["done"] if section["done"] else 0.0
        failed = f"[red]{section['failed']}[/red]" if section["failed"] else "0"
        trials = f"{section['done']:,} of {section['planned']:,}" + (" s" if name == "mixed" else "")
        refused = sum(section["refused"].values())
        memory = f"{section['largest_memory'] >> 20} MiB" if section["largest_memory"] else ""
        duration = "" if name == "mixed" else f"{1000 * each:.0f} ms"
        shown.add_row(name, trials, f"{section['accepted']:,}", f"{refused:,}", failed, duration, memory)
    return shown


def write(result: Mapping[str, Any], results: Path = RESULTS, page_file: Path = PAGE) -> None:
    """Write results.json and the page."""
    results.write_text(_LOCAL.sub("", json.dumps(result, indent=1, ensure_ascii=False)) + "\n", encoding="utf-8")
    page_file.write_text("\n".join(page(result)) + "\n", encoding="utf-8")


def page(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the page."""
    host, sections = result["host"], result["sections"]
    failed = sum(section["failed"] for section in sections.values())
    yield "# Soak test"
    yield ""
    yield "Generated by `benchmarks/soak` from `benchmarks/soak/results.json`; `make soak` measures it."
    yield ""
    if result["short"]:
        yield "This was a short run, with few trials of each section."
        yield ""
    yield f"Measured on {host['date'][:10]} at commit {result['commit']}, with {host['cores']} cores of {host['cpu']}, "
    yield f"Python {host['python']}, seed {result['seed']}. Failures in all sections: {failed:,}."
    if "mixed" in sections and sections["mixed"].get("mixed"):
        yield from _mixed(sections["mixed"])
    for prefix, (title, text) in _GROUPS.items():
        rows = {name: section for name, section in sections.items() if name.startswith(prefix)}
        if rows:
            yield from ("", f"## {title}", "", text, "")
            yield from _rows(rows, prefix)
    yield from _failures(sections)


def _mixed(section: Mapping[str, Any]) -> Iterator[str]:
    mixed = section["mixed"]
    memory = mixed["memory"]
    calls = sum(mixed["calls"].values())
    yield from ("", "## Concurrency", "")
    yield f"{mixed['threads']} threads and {mixed['tasks']} tasks of an event loop called one catalog for "
    yield f"{mixed['seconds']:.0f} s: {calls:,} calls, while another thread reindexed, optimized, exported and pruned "
    yield "it. "
    yield f"All {mixed['items']:,} acknowledged items were compared at the end. Failures: {section['failed']:,}."
    yield ""
    if section["done"] < MIXED_SECONDS:
        yield "The run was too short to measure the slope of the memory."
        return
    yield f"Private memory after the warm-up: {memory['after_warm_up'] / 2**20:.0f} MiB, at the end "
    yield f"{memory['last'] / 2**20:.0f} MiB. It grows by {memory['slope_per_minute'] / 2**20:.2f} MiB a minute, or "
    yield f"{memory['growth_per_call']:,} bytes a call; at most {memory['limit_per_call']:,} are allowed."
    yield ""
    yield "| Call | Number |"
    yield "|---|---|"
    yield from (f"| {name} | {count:,} |" for name, count in mixed["calls"].items())


def _rows(rows: Mapping[str, Any], prefix: str) -> Iterator[str]:
    if prefix == "kill-":
        yield "| Operation | Trials | Failed | Time for each |"
        yield "|---|---|---|---|"
        for name, section in rows.items():
            each = section["seconds"] / max(1, section["done"])
            yield f"| {name.removeprefix(prefix)} | {section['done']:,} | {section['failed']:,} | {each:.2f} s |"
        return
    yield "| Input | Trials | Succeeded | Refused | Failed | Largest CPU time | Largest memory |"
    yield "|---|---|---|---|---|---|---|"
    for name, section in rows.items():
        refused = sum(section["refused"].values())
        cpu = f"{section['largest_cpu_seconds']:.2f} s" if section["largest_cpu_seconds"] else "–"
        memory = f"{section['largest_memory'] >> 20} MiB" if section["largest_memory"] else "–"
        yield (
            f"| {name.removeprefix(prefix) or name} | {section['done']:,} | {section['accepted']:,} | {refused:,} | "
            f"{section['failed']:,} | {cpu} | {memory} |"
        )


def _failures(sections: Mapping[str, Any]) -> Iterator[str]:
    failed = {name: section for name, section in sections.items() if section["failed"]}
    if not failed:
        return
    yield from ("", "## Failures", "", "| Section | Cases | The end of the traceback |", "|---|---|---|")
    for name, section in failed.items():
        for group in section["failures"][:10]:
            reason = group["reason"].replace("|", "\\|").replace("`", "'")
            cases = ", ".join(map(str, group["cases"][:3]))
            yield f"| {name} | {len(group['cases']):,} (such as {cases}) | `{reason}` |"
