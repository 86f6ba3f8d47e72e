"""Prompts to the token states that condition the UNet."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.warnings import warn
from unidiff_sdk._internal.weak_method import weak_method
from unidiff_sdk.errors import OptionError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Conditioner"]

Float32 = NDArray[np.float32]

_CACHED_PROMPTS = 256
_MOST_CHUNKS = 8


class Conditioner:
    """The text encoder in front of a bundle's UNet; remembers the last prompts. May be shared between threads."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._windows = lru_cache(maxsize=_CACHED_PROMPTS)(weak_method(self._tokens))
        self._encoded = lru_cache(maxsize=_CACHED_PROMPTS)(weak_method(self._encode))

    def states(self, prompt: str, long_prompts: str = "truncate") -> Float32:
        """Token states of a prompt: float32[tokens, width], not to be written to.

        Args:
            prompt: any text.
            long_prompts: what happens past `bundle.prompt_tokens` tokens: "truncate" leaves the rest out, with a
                warning; "chunk" encodes it in windows of that many and puts their states one after the other.

        Raises:
            OptionError: the prompt is too long even for that.
        """
        windows = self._windows(prompt)
        if len(windows) > 1 and long_prompts == "truncate":
            kept = self._bundle.prompt_tokens
            warn(
                f"the prompt is longer than {kept} tokens; the rest is ignored (long_prompts='chunk' would keep it): "
                f"{prompt!r:.200}"
            )
            windows = windows[:1]
        if len(windows) > _MOST_CHUNKS:
            raise OptionError(
                f"the prompt takes {len(windows)} windows of {self._bundle.prompt_tokens} tokens; "
                f"at most {_MOST_CHUNKS} can be chunked: {prompt!r:.80}"
            )
        return self._encoded(windows)

    def pair(self, prompt: str, negative_prompt: str, long_prompts: str) -> tuple[Float32, Float32]:
        """The states of both, of one length: the shorter one is filled up with those of the empty prompt."""
        pair = [self.states(text, long_prompts) for text in (prompt, negative_prompt)]
        longest, empty = max(map(len, pair)), self.states("")
        if len(pair[0]) == len(pair[1]):
            return pair[0], pair[1]
        first, second = (np.concatenate([p, *[empty] * ((longest - len(p)) // len(empty))]) for p in pair)
        return first, second

    def _tokens(self, prompt: str) -> tuple[tuple[int, ...], ...]:
        encoding = self._tokenizer.encode(prompt)
        return tuple(tuple(part.ids) for part in (encoding, *encoding.overflowing))

    def _encode(self, windows: tuple[tuple[int, ...], ...]) -> Float32:
        inputs = {"input_ids": np.array(windows, np.int64)}
        states: Float32 = self._bundle.session("text_encoder").run(inputs, ["last_hidden_state"])["last_hidden_state"]
        states = states.reshape(-1, states.shape[-1])
        states.flags.writeable = False  # shared by all who ask for the same prompt
        return states

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._bundle.path / "tokenizer", self._bundle.prompt_tokens)
