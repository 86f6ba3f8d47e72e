"""Warn, before anything is downloaded, if pip is about to install a CUDA build of torch.

The environment's own interpreter runs it: `python .ci/torch_build.py constraints.txt`. It resolves torch alone and
reads the metadata of the wheel, which takes a second or two. A CUDA build is one that requires NVIDIA's packages.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

NOTICE = """\
NOTE: pip is about to install a CUDA build of torch {version}: several GB that the tests do not use.
      To avoid it, press Ctrl-C and point pip to the CPU build of the same version. Use the wheel index that
      pytorch.org names for "CPU":       PIP_EXTRA_INDEX_URL=<index> make test
      or a folder that holds the wheel:  PIP_FIND_LINKS=<folder> make test
"""


def cuda_build(constraints: str) -> str | None:
    """The version of torch that pip would install if it is a CUDA build, else None."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    done = subprocess.run(
        [*command, "--report", "-", "-c", constraints, "torch"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:  # no network or no wheel: the installation reports it better
        return None
    torch = json.loads(done.stdout)["install"][0]["metadata"]
    is_cuda = any(need.startswith(("nvidia-", "cuda-")) for need in torch.get("requires_dist", []))
    return torch["version"] if is_cuda else None


if __name__ == "__main__":
    version = None if importlib.util.find_spec("torch") else cuda_build(sys.argv[1])
    if version:
        print(NOTICE.format(version=version), file=sys.stderr, flush=True)
