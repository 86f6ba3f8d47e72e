"""Prompts to what conditions the denoiser: token states; with two text encoders also pooled embeddings and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.lifetimes import weak_method
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import OptionError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import cut_text, load_tokenizer
from unidiff_sdk.inference.engines.adapters import Loras
from unidiff_sdk.inference.tokenizer import expand_tokens

from .denoising import Conditions

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Conditioner"]

Float32 = NDArray[np.float32]
Windows = tuple[tuple[int, ...], ...]
"""Token ids, in windows of `bundle.prompt_tokens`."""

CACHED_PROMPTS = 256
MAX_WINDOWS = 8


STATES, POOLED, SIZES = "encoder_hidden_states", "text_embeds", "time_ids"  # inputs of the UNet
THIRD = "text_encoder_3"  # the graph of a third text encoder; in conditions its states, until they are completed
JOINTLY_POOLED = "pooled_projections"  # input of the transformer


class Conditioner:
    """The text encoders of a bundle's denoiser. Caches the last prompts. May be shared between threads."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._xl, self._joint = bundle.manifest.conditioning, bundle.manifest.joint_conditioning
        self._windows = lru_cache(maxsize=CACHED_PROMPTS)(weak_method(self._tokenize))
        self._encoded = lru_cache(maxsize=CACHED_PROMPTS)(weak_method(self._encode))
        self._third_states = lru_cache(maxsize=CACHED_PROMPTS)(weak_method(self._encode_third))

    @property
    def graphs(self) -> tuple[str, ...]:
        """The text encoders."""
        third = (THIRD,) if self._bundle.has_graph(THIRD) else ()
        return *self._bundle.manifest.text_states, *third

    def conditions(self, prompt: str, long_prompts: str = "truncate", loras: Loras = ()) -> Conditions:
        """The conditions of a prompt, which `completed` adds to. The arrays are read-only.

        Args:
            prompt: any text.
            long_prompts: for a prompt longer than `bundle.prompt_tokens` tokens: "truncate" ignores the rest, with a
                warning; "chunk" encodes it in windows of that length and concatenates their states. The pooled
                embedding is that of the first window.
            loras: the LoRAs that change the text encoders.

        Raises:
            OptionError: the prompt is too long even for windows.
        """
        windows = self._windows(prompt)
        count = max(map(len, windows))
        if count > 1 and long_prompts == "truncate":
            warn(
                f"the prompt is longer than {self._bundle.prompt_tokens} tokens, so its end is ignored "
                "(long_prompts='chunk' keeps it)"
            )
            windows = tuple(each[:1] for each in windows)
        elif count > MAX_WINDOWS:
            raise OptionError(
                f"the prompt takes {count} windows of {self._bundle.prompt_tokens} tokens; give one of at most "
                f"{MAX_WINDOWS} windows"
            )
        if not self._bundle.has_graph(THIRD):
            return self._encoded(windows, loras)
        return {**self._encoded(windows, loras), THIRD: self._third_states(prompt)}

    def negative_conditions(self, prompt: str, long_prompts: str = "truncate", loras: Loras = ()) -> Conditions:
        """The same of what guidance leads away from: zeros for an empty prompt if the model was trained so."""
        conditions = self.conditions(prompt, long_prompts, loras)
        if prompt or self._xl is None or not self._xl.zero_negative:
            return conditions
        return {name: np.zeros_like(array) for name, array in conditions.items()}

    def pair(
        self, prompt: str, negative_prompt: str, long_prompts: str, loras: Loras = ()
    ) -> tuple[Conditions, Conditions]:
        """The conditions of both, with states of the same length: the shorter ones are padded with the empty prompt's.

        Zeros are padded with zeros.
        """
        conditions = self.conditions(prompt, long_prompts, loras)
        negative = self.negative_conditions(negative_prompt, long_prompts, loras)
        if len(conditions[STATES]) == len(negative[STATES]):
            return conditions, negative
        longest = max(len(conditions[STATES]), len(negative[STATES]))
        empty = self.conditions("", loras=loras)
        empty_negative = empty if negative_prompt else self.negative_conditions("", loras=loras)
        return self._padded(conditions, empty, longest), self._padded(negative, empty_negative, longest)

    def completed(self, conditions: Conditions, width: int, height: int) -> Conditions:
        """Conditions with what does not depend on the prompt.

        Stable Diffusion XL takes the sizes of the image, in pixels: as if it had been trained on whole, at this size.
        That of Stable Diffusion 3 takes the states of the third text encoder after those of the others; zeros without
        one, as in diffusers.
        """
        if self._joint is not None:
            others = dict(conditions)
            third = others.pop(THIRD, None)
            if third is None:
                third = np.zeros((self._joint.third_tokens, self._joint.width), np.float32)
            return {**others, STATES: np.concatenate([conditions[STATES], third])}
        if self._xl is None:
            return conditions
        return {**conditions, SIZES: np.array([height, width, 0, 0, height, width], np.float32)}

    def _padded(self, conditions: Conditions, empty: Conditions, length: int) -> Conditions:
        states, window = conditions[STATES], empty[STATES]
        missing = (length - len(states)) // len(window)
        return {**conditions, STATES: np.concatenate([states, *[window] * missing])}

    def _tokenize(self, prompt: str) -> tuple[Windows, ...]:
        """Token ids for each text encoder."""
        most = (MAX_WINDOWS + 1) * self._bundle.prompt_tokens  # one window too many, so that longer prompts are refused
        text = cut_text(prompt, most)
        encodings = [tokenizer.encode(expand_tokens(text, added)) for tokenizer, added in self._tokenizers]
        return tuple(tuple(tuple(each.ids) for each in (whole, *whole.overflowing)) for whole in encodings)

    def _encode(self, windows: tuple[Windows, ...], loras: Loras) -> Conditions:
        if len(windows) == 1:
            (states,) = self._run("text_encoder", windows[0], ["last_hidden_state"], loras)
            return _shared({STATES: states.reshape(-1, states.shape[-1])})
        count = max(map(len, windows))  # other tokenizers may need more windows
        ids = [(*each, *self._windows("")[i] * (count - len(each))) for i, each in enumerate(windows)]
        first, second = self._bundle.manifest.text_states.values()
        larger, pooled = self._run("text_encoder_2", ids[1], [second, POOLED], loras)
        if self._joint is None:
            (large,) = self._run("text_encoder", ids[0], [first], loras)
            states = np.concatenate([large, larger], axis=-1, dtype=np.float32)
            return _shared({STATES: states.reshape(-1, states.shape[-1]), POOLED: pooled[0]})
        large, first_pooled = self._run("text_encoder", ids[0], [first, POOLED], loras)
        padding = np.zeros((*large.shape[:2], self._joint.width - large.shape[-1] - larger.shape[-1]), np.float32)
        states = np.concatenate([large, larger, padding], axis=-1)
        pooled = np.concatenate([first_pooled[0], pooled[0]])
        return _shared({STATES: states.reshape(-1, states.shape[-1]), JOINTLY_POOLED: pooled})

    def _encode_third(self, prompt: str) -> Float32:
        """The states of the third text encoder. It reads the whole prompt at once, as far as its length allows."""
        assert self._joint is not None
        encoding = self._third_tokenizer.encode(cut_text(prompt, 2 * self._joint.third_tokens))
        if encoding.overflowing:
            warn(
                f"the prompt is longer than the {self._joint.third_tokens} tokens of the third text encoder, which "
                "ignores its end"
            )
        (states,) = self._run(THIRD, (tuple(encoding.ids),), ["last_hidden_state"], ())
        return _shared({THIRD: states[0]})[THIRD]

    def _run(self, graph: str, ids: Windows, outputs: Sequence[str], loras: Loras) -> list[Float32]:
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": np.array(ids, np.int64),
            **self._bundle.adapters.inputs(graph, loras),
        }
        results = self._bundle.session(graph).run(feeds, outputs)
        return [results[name] for name in outputs]

    @cached_property
    def _third_tokenizer(self) -> Tokenizer:
        assert self._joint is not None
        return load_tokenizer(self._bundle.files.part("tokenizer_3"), self._joint.third_tokens)

    @cached_property
    def _tokenizers(self) -> list[tuple[Tokenizer, tuple[str, ...]]]:
        """The tokenizer of each text encoder, and the tokens that were added to it."""
        folders = [graph.replace("text_encoder", "tokenizer") for graph in self._bundle.manifest.text_states]
        parts = [load_tokenizer(self._bundle.files.part(folder), self._bundle.prompt_tokens) for folder in folders]
        return [(each, tuple(token.content for token in each.get_added_tokens_decoder().values())) for each in parts]


def _shared(conditions: dict[str, Float32]) -> Conditions:
    """Conditions whose arrays cannot be changed, as all that use the same prompt share them."""
    for array in conditions.values():
        array.flags.writeable = False
    return conditions
