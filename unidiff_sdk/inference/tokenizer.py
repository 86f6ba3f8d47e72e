"""CLIP's tokenizer from its vocabulary and merges, for folders of transformers 4, which have no tokenizer.json."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from unidiff_sdk.errors import BundleError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["clip_tokenizer", "expand_tokens", "tokenizer_errors"]

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


def clip_tokenizer(ids: Mapping[str, int], merges: str) -> Tokenizer:
    """A lower-casing byte-level BPE that adds a start and an end token to each text.

    Args:
        ids: the content of vocab.json.
        merges: the content of merges.txt.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    lines = [line.split() for line in merges.splitlines() if line[:9] != "#version:" and line]
    pairs = [(first, second) for first, second in lines]
    tokenizer = Tokenizer(models.BPE(dict(ids), pairs, unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.RobertaProcessing((END, ids[END]), (START, ids[START]), False, False)
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def expand_tokens(text: str, added: Collection[str]) -> str:
    """Write out the tokens of a text that stand for several vectors, as textual inversion adds them.

    Where a token "<shoe>" has the vectors "<shoe>", "<shoe>_1" and "<shoe>_2", as diffusers names them, "<shoe>"
    becomes "<shoe> <shoe>_1 <shoe>_2". Upper and lower case are the same, as in CLIP's vocabulary.

    Args:
        text: a prompt.
        added: the tokens that were added to a tokenizer.
    """
    for token in added:
        vectors = [token]
        while f"{token}_{len(vectors)}" in added:
            vectors.append(f"{token}_{len(vectors)}")
        if len(vectors) > 1:
            others = "|".join(str(i) for i in range(1, len(vectors)))  # a vector that is named on its own stays
            pattern = re.compile(rf"{re.escape(token)}(?!_(?:{others}))", re.IGNORECASE)
            text = pattern.sub(" ".join(vectors).replace("\\", r"\\"), text)
    return text
