"""Pooling: a prompt's hidden states, as they are computed, to one vector. Made and fed by `engine.language`.

Knows neither pages nor requests. Chunks of a prompt come in order; a prompt that gave its pages back begins anew.
"""

import torch
from torch import Tensor

from ganglion.errors import UnsupportedFieldError
from ganglion.generation import Pooling
from ganglion.models.language import EmbeddingModel, LanguageModel
from ganglion.types import Float32Array


class Pool:
    """Of one prompt. Raises UnsupportedFieldError for a model whose hidden states are its own."""

    def __init__(self, model: LanguageModel, pooling: Pooling) -> None:
        if not isinstance(model, EmbeddingModel):
            raise UnsupportedFieldError(
                "input", why=f"{model.spec.name} ({model.spec.family}) gives no hidden states away"
            )
        self._model, self._pooling = model, pooling
        self._sum = torch.zeros(model.spec.width)
        self._num_tokens = 0

    def add(self, start: int, hidden: Tensor) -> None:
        """Hidden states [token, width] of the prompt's tokens from `start` on, that went through all layers."""
        if self._pooling is Pooling.LAST:
            hidden = hidden[-1:]
            self._sum, self._num_tokens = torch.zeros_like(self._sum), 0
        elif start == 0:
            self._sum, self._num_tokens = torch.zeros_like(self._sum), 0
        self._sum += self._model.normed(hidden).float().sum(0).cpu()
        self._num_tokens += len(hidden)

    def vector(self) -> Float32Array:
        """[width], once all tokens are there."""
        vector: Float32Array = (self._sum / self._num_tokens).numpy()
        return vector
