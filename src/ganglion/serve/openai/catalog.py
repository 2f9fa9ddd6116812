"""Catalog: which models a request may name, and how they are listed.

Called by the readers of requests and by `routes`. Knows LanguageService's specs and tokenizers.
"""

from dataclasses import dataclass
from typing import Any

from ganglion.generation import LanguageSpec
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.refusal import ApiError
from ganglion.service import LanguageService, Residence, TextTokenizer

MAX_NAME_LENGTH = 256
MAX_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One model and its tokenizer."""

    spec: LanguageSpec
    tokenizer: TextTokenizer


class Catalog:
    """The language models of one service."""

    def __init__(self, language: LanguageService) -> None:
        self._language = language

    def choose(self, fields: Fields) -> Chosen:
        """The model of a request's field `model`; without it, the only one that is no adapter. Raises ApiError 404, FieldError."""
        name = fields.text("model", max_length=MAX_NAME_LENGTH)
        specs = self._language.language_models()
        models = [spec.name for spec in specs if not spec.parent]
        if name is None and len(models) == 1:
            (name,) = models
        if name is None:
            raise fields.wrong("model", "the name of a model", next_step=self._names())
        spec = self.find(name)
        return Chosen(spec=spec, tokenizer=self._language.tokenizer(spec.name))

    def find(self, name: str) -> LanguageSpec:
        """The model of this name. Raises ApiError 404."""
        for spec in self._language.language_models():
            if spec.name == name:
                return spec
        raise ApiError(
            404,
            f"The model {name[:MAX_NAME_LENGTH]!r} does not exist here",
            code="model_not_found",
            param="model",
            next_step=self._names(),
        )

    def specs(self) -> tuple[LanguageSpec, ...]:
        """All of them."""
        return self._language.language_models()

    def body(self, spec: LanguageSpec, created_s: int) -> dict[str, Any]:
        """One of them as `/v1/models` lists it."""
        return _body(spec, self._language.residence(spec.name), created_s)

    def _names(self) -> str:
        names = [spec.name for spec in self._language.language_models()]
        if not names:
            return "start the server with a language model"
        rest = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
        return f"name one of: {', '.join(names[:MAX_SHOWN])}{rest} (GET /v1/models)"


def _body(spec: LanguageSpec, residence: Residence, created_s: int) -> dict[str, Any]:
    """A language model as OpenAI lists it; `max_model_len` and `parent` as vLLM does, the rest is ours."""
    return {
        "id": spec.name,
        "object": "model",
        "created": created_s,
        "owned_by": "ganglion",
        "parent": spec.parent or None,  # of an adapter: its model
        "kind": "language",
        "max_model_len": spec.max_tokens,
        "family": spec.family,
        "version": spec.version,
        "vocab_size": spec.vocab_size,
        "dtype": spec.dtype,
        "input_modalities": ["text", "image"] if spec.has_vision else ["text"],
        "state": residence.state,
        "stay": residence.stay,
        "weight_bytes": residence.weight_bytes,
    }
