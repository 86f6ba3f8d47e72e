"""Say, before anything is downloaded, whether pip is about to take a CUDA build of torch for the test environment.

Run by the environment's own interpreter: ``python .ci/torch_build.py constraints.txt``. It resolves torch alone and
reads the wheel's metadata, which takes a second or two; a CUDA build is one that requires NVIDIA's packages.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

NOTICE = """\
NOTE: pip is about to install a CUDA build of torch {version}: several GB that the tests do not use.
      To avoid it, press Ctrl-C and give pip the CPU build of the same version first, either by the wheel index
      that pytorch.org names for "CPU":   PIP_EXTRA_INDEX_URL=<that index> make test
      or by a folder that holds the wheel: PIP_FIND_LINKS=<folder> make test
"""


def cuda_build(constraints: str) -> str | None:
    """The version of torch that pip would install if that is a CUDA build, else None."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    done = subprocess.run(
        [*command, "--report", "-", "-c", constraints, "torch"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:  # no network or no wheel: the install itself will say so, better than this can
        return None
    torch = json.loads(done.stdout)["install"][0]["metadata"]
    wants_cuda = any(need.startswith(("nvidia-", "cuda-")) for need in torch.get("requires_dist", []))
    return torch["version"] if wants_cuda else None


if __name__ == "__main__":
    version = None if importlib.util.find_spec("torch") else cuda_build(sys.argv[1])
    if version:
        print(NOTICE.format(version=version), file=sys.stderr, flush=True)
