"""Ray: connect to a cluster or start it on this machine, and report its errors in one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unidiff_sdk._internal.text import shorten
from unidiff_sdk.errors import ProviderError, StoreError, UniDiffError

__all__ = ["processes_per_machine", "ray_data"]

_REASON_LENGTH = 300


def processes_per_machine(workers: int) -> int:
    """How many of the processes can be on one machine of the running cluster, each of which takes a core."""
    import ray

    cores = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=workers)
    return max(1, min(workers, int(cores)))


@contextmanager
def ray_data(workers: int) -> Iterator[Any]:
    """The module `ray.data`. The cluster is the one of RAY_ADDRESS or of the caller, or else this machine.

    Args:
        workers: the processes that this machine must have room for.

    Raises:
        ProviderError: Ray is not installed.
        StoreError: Ray failed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use otherwise
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ProviderError(f"Ray is not installed ({error}): pip install 'unidiff-sdk[ray]'") from error
    is_ours = not ray.is_initialized()
    try:
        if is_ours:
            here: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers + 2}
            ray.init(
                include_dashboard=False, log_to_driver=False, logging_level="error", configure_logging=False, **here
            )
        for name in ("ray.data", "ray._private.worker"):
            logging.getLogger(name).setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        yield ray.data
    except UniDiffError:
        raise
    except Exception as error:  # Ray has no common base class of its errors
        reason = shorten((str(error).strip() or type(error).__name__).splitlines()[-1], _REASON_LENGTH)
        raise StoreError(f"Ray failed ({type(error).__name__}: {reason}). Run again with --resume.") from error
    finally:
        if is_ours and ray.is_initialized():
            ray.shutdown()
