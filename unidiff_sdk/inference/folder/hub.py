"""Folders on the model hub, by names such as `hf:org/name` or `hf:org/name@revision`.

huggingface_hub downloads them into its cache, once. Without a network, what the cache holds is used. Its environment
variables apply: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from unidiff_sdk.errors import BundleError, UniDiffError
from unidiff_sdk.inference.manifest import MANIFEST, Manifest

from .signature import SIGNATURE

__all__ = ["HUB_PREFIX", "HubName", "cached_name", "download_bundle", "download_files", "is_hub_name", "upload_bundle"]

HUB_PREFIX = "hf:"
MODEL_CARD = "README.md"
NAME = re.compile(rf"{HUB_PREFIX}(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w][\w./-]*))?")
CACHED = re.compile(r"/models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


class HubName(NamedTuple):
    """A repository of the hub, and its revision; None for the newest one."""

    id: str
    revision: str | None

    @classmethod
    def parse(cls, name: str, error: type[UniDiffError] = BundleError) -> HubName:
        """Read "hf:org/name" or "hf:org/name@revision". Raises `error` for another form."""
        found = NAME.fullmatch(name)
        if found is None:
            raise error(
                f"{name} is not the name of a model on the hub. Write {HUB_PREFIX}org/name or "
                f"{HUB_PREFIX}org/name@revision."
            )
        return cls(found["id"], found["revision"])


def is_hub_name(source: str | PathLike[str]) -> bool:
    """Whether a bundle or model is named on the hub."""
    return str(source).startswith(HUB_PREFIX)


def cached_name(folder: Path) -> str | None:
    """The name on the hub of a folder in the hub's cache: "hf:org/name@commit". None for another folder."""
    found = CACHED.search(folder.as_posix())
    return f"{HUB_PREFIX}{found['org']}/{found['name']}@{found['commit']}" if found else None


def download_files(
    name: str, patterns: list[str], ignored: list[str] | None = None, error: type[UniDiffError] = BundleError
) -> Path:
    """The folder of a repository's files in the cache, downloaded if they are not there.

    Args:
        name: "hf:org/name", optionally with "@revision".
        patterns, ignored: shell patterns of the files to download, and of those not to.
        error: the class of the error that is raised.

    Raises:
        error: the name has another form, or neither the hub nor the cache provides it.
    """
    repository = HubName.parse(name, error)
    with _hub_errors(f"The hub did not provide {name}", "or use a local folder", error):
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                repository.id, revision=repository.revision, allow_patterns=patterns, ignore_patterns=ignored
            )
        )


def download_bundle(name: str) -> Path:
    """The folder of a bundle on the hub in the cache. Only the files that its manifest lists are downloaded.

    Raises:
        BundleError: as `download_files`; or the repository holds no bundle.
    """
    extra = [MANIFEST, SIGNATURE, MODEL_CARD]
    folder = download_files(name, extra)
    if not (folder / MANIFEST).is_file():
        raise BundleError(
            f"{name} is not a bundle: it has no {MANIFEST}. A model of transformers or diffusers becomes one by "
            f"unidiff-export, such as: unidiff-export --clip {name} -o BUNDLE"
        )
    files = map(glob.escape, Manifest.read(folder).files)
    commit = f"{HUB_PREFIX}{HubName.parse(name).id}@{folder.name}"  # the files of this manifest, not of a newer one
    return download_files(commit, [*extra, *files])


def upload_bundle(folder: Path, files: Iterable[str], repository: str, *, private: bool, token: str | None) -> str:
    """Upload the files of a bundle into a repository of models, which is created if it does not exist.

    Args:
        folder: the folder of the bundle.
        files: the relative paths that its manifest lists.
        repository: "org/name".
        private: whether a new repository is private.
        token: of the hub. None: the one that `hf auth login` stored, or HF_TOKEN.

    Returns:
        "hf:org/name@commit", which `Bundle.open` opens.

    Raises:
        BundleError: the hub refuses it.
    """
    name = HubName.parse(f"{HUB_PREFIX}{repository.removeprefix(HUB_PREFIX)}")
    if name.revision is not None:
        raise BundleError(f"{repository} names a revision, but a bundle is uploaded as a new one. Leave it out.")
    with _hub_errors(f"The hub did not accept {folder} as {name.id}", "and sign in with: hf auth login", BundleError):
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(name.id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name.id,
            folder_path=folder,
            allow_patterns=[MANIFEST, SIGNATURE, MODEL_CARD, *map(glob.escape, files)],
            commit_message="Upload a bundle of UniDiff SDK",
        )
    return f"{HUB_PREFIX}{name.id}@{commit.oid}"


@contextmanager
def _hub_errors(what: str, advice: str, error: type[UniDiffError]) -> Iterator[None]:
    """Convert the errors of the hub's client and of the network, which are of many kinds."""
    try:
        yield
    except UniDiffError:
        raise
    except Exception as reason:
        first_line = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        raise error(f"{what}: {first_line}. Check the name and the network, {advice}.") from reason
