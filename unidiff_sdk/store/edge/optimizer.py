"""Building a shard's search index in a process of its own: `python -m unidiff_sdk.store.edge.optimizer FOLDER`.

The engine holds Python's global lock while it builds, for half a minute at 100,000 vectors; in the process that
searches, every thread and every event loop would stand still for as long.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

from unidiff_sdk.errors import StoreError

__all__ = ["optimize_in_subprocess"]

_NICENESS = 10  # searches go first
_PR_SET_PDEATHSIG = 1


def optimize_in_subprocess(shard: Path) -> None:
    """Merge the segments of a shard that nobody has open, and build its index. Raises StoreError if that fails."""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(shard), str(os.getpid())],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise StoreError(
            f"The search index of {shard.parent} was not built: {reason}. Nothing is lost; searches scan instead."
        )


def _main(shard: str, parent: int) -> None:
    # If the parent is killed there is nobody to use the result. Signals come through while the engine holds the lock.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.nice(_NICENESS)
    import qdrant_edge as edge

    opened = edge.EdgeShard.load(shard)
    opened.optimize()
    # Whoever opens a shard does its last operation again, with the global lock held: 500 large vectors took 60 ms. So
    # the last one does nothing.
    opened.update(edge.UpdateOperation.delete_points([str(uuid.UUID(int=0))]))
    opened.flush()
    opened.close()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
