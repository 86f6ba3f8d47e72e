"""Which files of a base are loaded, and what is added to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from unidiff_sdk._internal.files import checked_path
from unidiff_sdk._internal.json_values import number_within
from unidiff_sdk.errors import CheckpointError, OptionError

from .peft_adapters import adapter_folders

__all__ = ["RECORDED", "BaseOptions", "Lora", "TextualInversion", "is_single_file", "require_safetensors"]

RECORDED = ("loras", "textual_inversions", "vae")  # fields of a checkpoint's metadata on what was added to its base

VARIANT = re.compile(r"[A-Za-z0-9_-]{1,40}")
LARGEST_WEIGHT = 10.0
SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class Lora(NamedTuple):
    """A LoRA file or adapter folder of peft, and the weight of its change: 1 adds it as trained."""

    file: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> Lora:
        """Read FILE or FILE:WEIGHT. Raises OptionError for a weight that is zero or beyond ±10."""
        file, colon, weight = os.fspath(text).rpartition(":")
        if not colon or os.path.exists(text) or not _is_number(weight):
            return cls(Path(text))
        name = f"The weight of the LoRA {file}"
        value = number_within(name, float(weight), -LARGEST_WEIGHT, LARGEST_WEIGHT, OptionError)
        if value == 0:
            raise OptionError(f"{name} is 0, which has no effect. Leave the LoRA out.")
        return cls(Path(file), value)


class TextualInversion(NamedTuple):
    """A file with the vectors of a token, and the name of the token. None: the name in the file, or the file's."""

    file: Path
    token: str | None = None

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> TextualInversion:
        """Read FILE or FILE:TOKEN. Raises OptionError for a token that is empty or has white space."""
        file, colon, token = os.fspath(text).rpartition(":")
        if not colon or os.path.exists(text):
            return cls(Path(text))
        if not token or token.split() != [token]:
            raise OptionError(f"The token of the textual inversion {file} is {token!r:.60}. Name one without spaces.")
        return cls(Path(file), token)


@dataclass(frozen=True)
class BaseOptions:
    """Options of loading a base.

    Attributes:
        variant: Variant of the weight files, such as "fp16". Default: the main files, or the only variant of a folder
            that has no main file.
        loras: LoRA files to merge into the UNet and the text encoder, in this order.
        vae: VAE to use instead of the base's: a diffusers folder, or a safetensors file.
        base_config: Folder with the configuration of a base in a single file: a diffusers pipeline, whose weights are
            not read. Default: that of Stable Diffusion 1.5.
        textual_inversions: Tokens to add to the tokenizer and the text encoder of the pipeline.
    """

    variant: str | None = None
    loras: tuple[Lora, ...] = ()
    vae: Path | None = None
    base_config: Path | None = None
    textual_inversions: tuple[TextualInversion, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        variant: str | None = None,
        lora: Iterable[str | Path] = (),
        vae: str | Path | None = None,
        base_config: str | Path | None = None,
        textual_inversion: Iterable[str | Path] = (),
    ) -> BaseOptions:
        """Check the values that a caller passes. Raises OptionError or CheckpointError for one that is not accepted."""
        if variant is not None and not (isinstance(variant, str) and VARIANT.fullmatch(variant)):
            raise OptionError(f"variant is {variant!r:.60}; it must be the middle of a file name, such as fp16.")
        loras = tuple(Lora.parse(name) for name in _names(lora))
        inversions = tuple(TextualInversion.parse(name) for name in _names(textual_inversion))
        for lora_file in loras:
            if lora_file.file.is_dir():
                adapter_folders(lora_file.file)
            else:
                require_safetensors(lora_file.file, "LoRA")
        for inversion in inversions:
            require_safetensors(inversion.file, "textual inversion")
        if vae is not None:
            vae = checked_path(vae, CheckpointError)
            if not vae.is_dir():
                require_safetensors(vae, "VAE")
        if base_config is not None:
            base_config = checked_path(base_config, CheckpointError)
            if not base_config.is_dir():
                raise CheckpointError(f"There is no folder {base_config} with the configuration of a pipeline.")
        return cls(variant, loras, vae, base_config, inversions)

    def check_for(self, base: str | Path) -> None:
        """Raise OptionError for an option that has no meaning for this kind of base."""
        if self.variant is not None and is_single_file(base):
            raise OptionError(f"{base} is a single file, so it has no variant {self.variant!r}. Leave the variant out.")
        if self.base_config is not None and not is_single_file(base):
            raise OptionError(f"{base} is not a single file: it has its own configuration. Leave base_config out.")

    def recorded(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata of a base, with what is added to it."""
        loras = [{"name": lora.file.name, "weight": lora.weight} for lora in self.loras]
        tokens = [{"name": each.file.name, "token": each.token} for each in self.textual_inversions]
        return {
            **meta,
            **({"loras": [*meta.get("loras", []), *loras]} if loras else {}),
            **({"textual_inversions": [*meta.get("textual_inversions", []), *tokens]} if tokens else {}),
            **({"vae": self.vae.name} if self.vae else {}),
        }


def is_single_file(base: str | Path) -> bool:
    """Whether a base is named as a file, and not as a folder, a model of the hub or "tiny"."""
    if str(base).startswith("hf:") or os.path.isdir(base):
        return False
    return Path(base).suffix in (SAFETENSORS, *PICKLES) or os.path.isfile(base)


def require_safetensors(file: Path, kind: str) -> Path:
    """Return the path of an existing safetensors file. Raises CheckpointError for another kind of file."""
    path = checked_path(file, CheckpointError)
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"The {kind} {file} is a pickle, which can run code when it is read. Only {SAFETENSORS} files are read. "
            "Convert it on a machine that you trust, or download the safetensors version."
        )
    if not path.is_file():
        raise CheckpointError(f"There is no {kind} file {file}. Name a {SAFETENSORS} file.")
    if path.suffix != SAFETENSORS:
        raise CheckpointError(f"The {kind} {file} is not a {SAFETENSORS} file. Other formats are not read.")
    return path


def _names(given: Iterable[str | Path]) -> list[str | Path]:
    return [given] if isinstance(given, str | Path) else list(given)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
