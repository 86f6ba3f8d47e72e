"""The text encoders of Stable Diffusion XL and 3 as modules: all hidden states of a text tower, as in optimum.

The denoiser is conditioned on the second-to-last hidden states, which have not passed the final norm. The other ones
are outputs too, because optimum's pipelines expect them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

HIDDEN = "hidden_states."  # start of the names of outputs without a norm, whose values can be large
CONDITIONING = -2  # the hidden states that condition the denoiser, from the end


class HiddenStates(nn.Module):
    """Token ids to the last hidden states, all hidden states before, and with a projection also to the embedding.

    Args:
        tower: a CLIP text tower.
        projection: of the pooled state.
        pooled_first: whether the embedding is the first output, as in CLIPTextModelWithProjection.
    """

    def __init__(self, tower: Any, projection: nn.Module | None = None, *, pooled_first: bool = False) -> None:
        super().__init__()
        self.tower, self.projection, self.pooled_first = tower, projection, pooled_first

    @classmethod
    def of_second(cls, text_encoder: CLIPTextModelWithProjection) -> HiddenStates:
        """The module of a second text encoder, or of one of Stable Diffusion 3."""
        return cls(text_encoder.text_model, text_encoder.text_projection, pooled_first=True)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the results."""
        hidden = [f"{HIDDEN}{i}" for i in range(self.tower.config.num_hidden_layers)]
        return self._ordered("last_hidden_state", hidden, "text_embeds")

    @property
    def conditioning(self) -> str:
        """The name of the output that conditions the UNet."""
        return f"{HIDDEN}{self.tower.config.num_hidden_layers + 1 + CONDITIONING}"

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        states = self.tower(input_ids=input_ids, output_hidden_states=True)
        hidden = [each.float() for each in states.hidden_states[:-1]]
        embeds = None if self.projection is None else self.projection(states.pooler_output).float()
        return self._ordered(states.last_hidden_state.float(), hidden, embeds)

    def _ordered(self, last: Any, hidden: list[Any], embeds: Any) -> tuple[Any, ...]:
        if self.projection is None:
            return last, *hidden
        return (embeds, last, *hidden) if self.pooled_first else (last, *hidden, embeds)


class ThirdTextEncoder(nn.Module):
    """Token ids to the last hidden states of the T5 of Stable Diffusion 3. Padding is not masked, as in diffusers."""

    def __init__(self, model: T5EncoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state.float()
