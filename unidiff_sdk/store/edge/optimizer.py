"""Building the search index of a shard in a child process: `python -m unidiff_sdk.store.edge.optimizer FOLDER PARENT`.

The engine holds Python's global interpreter lock (GIL) while it builds, for half a minute at 100,000 vectors. In the
process that searches, that would stop every thread and every event loop.
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

_NICENESS = 10  # searches have priority
_PR_SET_PDEATHSIG = 1


def optimize_in_subprocess(shard: Path) -> None:
    """Merge the segments of a shard that is not open anywhere, and build its index. Returns when it is built.

    Raises:
        StoreError: the child process failed.
    """
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
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if done.returncode == -signal.SIGBUS:
            reason = "the disk is full"
        raise StoreError(
            f"The search index of {shard.parent} was not built: {reason}. No data is lost, and searches scan all "
            "vectors instead. Call optimize() again."
        )


def _main(shard: str, parent: int) -> None:
    # End with the parent: nobody else uses the result. The signal arrives even while the engine holds the GIL.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.nice(_NICENESS)
    import qdrant_edge as edge

    opened = edge.EdgeShard.load(shard)
    opened.optimize()
    # Loading a shard replays its last operation with the GIL held: 60 ms for 500 large vectors. Deleting an id that
    # does not exist makes the last operation a cheap one.
    opened.update(edge.UpdateOperation.delete_points([str(uuid.UUID(int=0))]))
    opened.flush()
    opened.close()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
