"""What `unidiff index` and `unidiff bulk index` print at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unidiff_sdk.cli.console import echo, echo_json
from unidiff_sdk.datasets.reader import group_by_reason
from unidiff_sdk.errors import DataError

from .terminal import counted, print_table

if TYPE_CHECKING:
    from unidiff_sdk.catalog.results import AddReport

__all__ = ["print_add_report"]

SHOWN_PROBLEMS = 20


def print_add_report(report: AddReport, source: object, catalog: object, items: int, as_json: bool) -> None:
    """Print a report, with a table of the invalid rows. Raises DataError if most rows are invalid."""
    if as_json:
        failed = [{"line": row.line, "file_name": row.file_name, "reason": row.reason} for row in report.failed]
        counts: dict[str, float] = {"added": report.added, "skipped": report.skipped, "removed": report.removed}
        counts |= {"items": items, "seconds": report.seconds}
        echo_json(counts | {"failed": failed})
    else:
        if report.failed:
            groups = group_by_reason(report.failed)
            print_table(
                ["rows", "first line", "file", "problem"],
                ([count, row.line, row.file_name, row.reason] for row, count in groups[:SHOWN_PROBLEMS]),
            )
            if len(groups) > SHOWN_PROBLEMS:
                echo(f"… and {counted(len(groups) - SHOWN_PROBLEMS, 'other problem')}. --json lists all rows.")
        echo(f"{report}. {catalog} has {counted(items, 'item')}.")
    valid = report.added + report.skipped
    if len(report.failed) > valid:
        has = "has no valid row" if not valid else f"has only {counted(valid, 'valid row')}"
        raise DataError(f"{source} {has}: {counted(len(report.failed), 'row')} invalid. Fix the problems listed above.")
