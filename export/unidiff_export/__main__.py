"""`python -m unidiff_export` is the same as `unidiff-export`."""

from __future__ import annotations

from unidiff_export.cli import main

if __name__ == "__main__":
    main(prog_name="unidiff-export")
