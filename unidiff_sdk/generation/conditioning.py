"""Prompts to the token states that condition the UNet."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.lifetimes import weak_method
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import OptionError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import cut_text, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Conditioner"]

Float32 = NDArray[np.float32]

CACHED_PROMPTS = 256
MAX_WINDOWS = 8


class Conditioner:
    """The text encoder of a bundle's UNet. Caches the last prompts. May be shared between threads."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._windows = lru_cache(maxsize=CACHED_PROMPTS)(weak_method(self._tokenize))
        self._encoded = lru_cache(maxsize=CACHED_PROMPTS)(weak_method(self._encode))

    def states(self, prompt: str, long_prompts: str = "truncate") -> Float32:
        """The token states of a prompt: float32[tokens, width], read-only.

        Args:
            prompt: any text.
            long_prompts: for a prompt longer than `bundle.prompt_tokens` tokens: "truncate" ignores the rest, with a
                warning; "chunk" encodes it in windows of that length and concatenates their states.

        Raises:
            OptionError: the prompt is too long even for windows.
        """
        windows = self._windows(prompt)
        if len(windows) > 1 and long_prompts == "truncate":
            warn(
                f"the prompt is longer than {self._bundle.prompt_tokens} tokens, so its end is ignored "
                "(long_prompts='chunk' keeps it)"
            )
            windows = windows[:1]
        if len(windows) > MAX_WINDOWS:
            raise OptionError(
                f"the prompt takes {len(windows)} windows of {self._bundle.prompt_tokens} tokens; give one of at most "
                f"{MAX_WINDOWS} windows"
            )
        return self._encoded(windows)

    def pair(self, prompt: str, negative_prompt: str, long_prompts: str) -> tuple[Float32, Float32]:
        """The states of both, of the same length: the shorter ones are padded with those of the empty prompt."""
        states, negative = (self.states(text, long_prompts) for text in (prompt, negative_prompt))
        if len(states) == len(negative):
            return states, negative
        longest = max(len(states), len(negative))
        return self._padded(states, longest), self._padded(negative, longest)

    def _padded(self, states: Float32, length: int) -> Float32:
        empty = self.states("")
        return np.concatenate([states, *[empty] * ((length - len(states)) // len(empty))])

    def _tokenize(self, prompt: str) -> tuple[tuple[int, ...], ...]:
        """Token ids, in windows of `bundle.prompt_tokens`."""
        most = (MAX_WINDOWS + 1) * self._bundle.prompt_tokens  # one window too many, so that longer prompts are refused
        encoding = self._tokenizer.encode(cut_text(prompt, most))
        return tuple(tuple(window.ids) for window in (encoding, *encoding.overflowing))

    def _encode(self, windows: tuple[tuple[int, ...], ...]) -> Float32:
        feeds = {"input_ids": np.array(windows, np.int64)}
        states: Float32 = self._bundle.session("text_encoder").run(feeds, ["last_hidden_state"])["last_hidden_state"]
        states = states.reshape(-1, states.shape[-1])
        states.flags.writeable = False  # shared by all that use the same prompt
        return states

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._bundle.files.part("tokenizer"), self._bundle.prompt_tokens)
