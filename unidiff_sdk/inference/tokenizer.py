"""CLIP's tokenizer from its vocabulary and merges, for folders of transformers 4, which have no tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from unidiff_sdk._internal.files import read_regular_file
from unidiff_sdk._internal.json_values import MAX_DOCUMENT, read_json
from unidiff_sdk.errors import BundleError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["clip_tokenizer", "tokenizer_errors"]

START, END = "<|startoftext|>", "<|endoftext|>"
# The words that bytes are merged in (Radford et al. 2021, arXiv:2103.00020; openai/CLIP, simple_tokenizer).
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@contextmanager
def tokenizer_errors(folder: Path | str) -> Iterator[None]:
    """Convert the errors of the tokenizers library to BundleErrors: plain Exceptions, and panics, which are none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # KeyboardInterrupt, SystemExit
        raise BundleError(f"{folder}: the tokenizer cannot be read ({error}); export the bundle again") from error


def clip_tokenizer(vocabulary: Path, merges: Path) -> Tokenizer:
    """A lower-casing byte-level BPE that adds a start and an end token to each text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    ids: dict[str, int] = read_json(vocabulary, error=BundleError)
    lines = read_regular_file(merges, MAX_DOCUMENT, BundleError).decode("utf-8").splitlines()
    pairs = [(first, second) for first, second in (line.split() for line in lines if line[:9] != "#version:" and line)]
    tokenizer = Tokenizer(models.BPE(ids, pairs, unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.RobertaProcessing((END, ids[END]), (START, ids[START]), False, False)
    tokenizer.add_special_tokens([START, END])
    return tokenizer
