"""`python -m unidiff_sdk` is the same as `unidiff`."""

from __future__ import annotations

from unidiff_sdk.cli.main import main

if __name__ == "__main__":
    main(prog_name="unidiff")
