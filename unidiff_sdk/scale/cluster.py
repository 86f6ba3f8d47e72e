"""Ray: connect to a cluster or start it on this machine, and report its errors in one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from unidiff_sdk._internal.text import shorten
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import ProviderError, StoreError, UniDiffError

__all__ = ["processes_per_machine", "ray_data", "require_ray"]

_REASON_LENGTH = 300


def processes_per_machine(workers: int) -> int:
    """How many of the processes can be on one machine of the running cluster, each of which takes a core."""
    import ray

    cores = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=workers)
    return max(1, min(workers, int(cores)))


def require_ray() -> None:
    """Raise ProviderError if Ray is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use otherwise
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ProviderError(f"Ray is not installed ({error}): pip install 'unidiff-sdk[ray]'") from error


@contextmanager
def ray_data(cores: int, gpus: float) -> Iterator[Any]:
    """The module `ray.data`. The cluster is the one of RAY_ADDRESS or of the caller, or else this machine.

    Args:
        cores, gpus: what the job needs.

    Raises:
        ProviderError: Ray is not installed.
        StoreError: Ray failed.
    """
    require_ray()
    import ray

    is_ours = not ray.is_initialized()
    try:
        if is_ours:
            is_local = not os.environ.get("RAY_ADDRESS")
            # "local": not a cluster that someone else has started on this machine
            here: dict[str, Any] = {"address": "local", "num_cpus": cores + 1} if is_local else {}
            ray.init(
                include_dashboard=False, log_to_driver=False, logging_level="error", configure_logging=False, **here
            )
        for name in ("ray.data", "ray._private.worker"):
            logging.getLogger(name).setLevel(logging.ERROR)
        _check_room(ray.cluster_resources(), cores, gpus)
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


def _check_room(found: Mapping[str, float], cores: int, gpus: float) -> None:
    """Report a cluster that is too small: Ray waits for more machines, without a message."""
    if found.get("CPU", 0) < cores or found.get("GPU", 0) < gpus:
        warn(
            f"The job needs {cores} cores and {gpus:g} GPUs, and the cluster has {found.get('CPU', 0):g} cores and "
            f"{found.get('GPU', 0):g} GPUs. It waits until machines join the cluster. Otherwise end it, and give fewer "
            "workers."
        )
