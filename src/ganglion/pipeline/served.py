"""ServedLanguage: one language model as requests may name it: limits, tokenizer, grammars. Checks what is asked of it.

Made by `cli` or a test, used by `pipeline.language` from any thread. Knows no pages and no engine.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from ganglion.engine.grammar import GrammarCompiler, GrammarMatcher
from ganglion.engine.sampler import check_sampling
from ganglion.errors import FieldError, UnsupportedFieldError
from ganglion.generation import GenerateRequest, LanguageSpec, Picture, PromptImage
from ganglion.layout import PageLayout
from ganglion.models.language import KvGroup, LanguageModel, StateGroup
from ganglion.models.lora_load import AdapterSet
from ganglion.models.vision import page_layouts
from ganglion.pipeline.residency import Stay
from ganglion.service import TextTokenizer

PINNED = Stay()


class ShowingTokenizer(TextTokenizer, Protocol):
    """A tokenizer that also says what a reader sees of a token."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that stand for no text."""
        ...

    def shown_bytes(self, token_id: int) -> bytes:
        """Bytes of the text; none for a special token."""
        ...

    def images(self, prompt: Sequence[int], pictures: Sequence[Picture]) -> tuple[PromptImage, ...]:
        """The pictures for which a prompt has room, as the model reads them; takes up to a second for each.

        Raises FieldError for a picture that is damaged or too many for the prompt; UnsupportedFieldError where the model is blind.
        """
        ...


@runtime_checkable
class LanguageSource(Protocol):
    """A checked model whose weights may not be read yet: what is known from its config and headers."""

    @property
    def spec(self) -> LanguageSpec:
        """Of the model."""
        ...

    @property
    def groups(self) -> tuple[KvGroup | StateGroup, ...]:
        """Of the model: the pool is made with their layouts."""
        ...

    @property
    def layouts(self) -> tuple[PageLayout, ...]:
        """All that the model keeps in pages: those of its groups, and features of pictures."""
        ...

    @property
    def weight_bytes(self) -> int:
        """What the model takes once it is loaded, besides pages."""
        ...

    def load(self) -> LanguageModel:
        """The model, ready to run, its weights in memory; another one with each call. Takes seconds to minutes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InMemory:
    """The source of a model that somebody has loaded already."""

    model: LanguageModel
    weight_bytes: int = 0

    @property
    def spec(self) -> LanguageSpec:
        """As LanguageSource.spec."""
        return self.model.spec

    @property
    def groups(self) -> tuple[KvGroup | StateGroup, ...]:
        """As LanguageSource.groups."""
        return self.model.groups

    @property
    def layouts(self) -> tuple[PageLayout, ...]:
        """As LanguageSource.layouts."""
        return page_layouts(self.model)

    def load(self) -> LanguageModel:
        """The same one with each call."""
        return self.model


class ServedLanguage:
    """A model and its tokenizer. `max_tokens`: of one request, prompt and answer; 0: as many as the model can."""

    def __init__(
        self,
        model: LanguageModel | LanguageSource,
        tokenizer: ShowingTokenizer,
        *,
        max_tokens: int = 0,
        stay: Stay = PINNED,
        adapters: AdapterSet | None = None,
    ) -> None:
        """`model`: one in memory stays there; one that may go needs a source to come from.

        `adapters`: requests name them like models.
        """
        self.source: LanguageSource
        if isinstance(model, LanguageModel):
            assert stay.is_pinned, "a model that may go needs a source to come from"
            self.source = InMemory(model=model)
        else:
            self.source = model
        self.tokenizer, self.stay, self.adapters = tokenizer, stay, adapters
        most = self.source.spec.max_tokens
        self.spec: LanguageSpec = replace(
            self.source.spec, max_tokens=min(max_tokens or most, most)
        )
        self._lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None

    @property
    def specs(self) -> tuple[LanguageSpec, ...]:
        """What requests may name: the model, then its adapters."""
        adapters = {} if self.adapters is None else self.adapters.adapters
        return (
            self.spec,
            *(
                replace(
                    self.spec,
                    name=name,
                    parent=self.spec.name,
                    version=f"{self.spec.version}+{adapter.version}",
                )
                for name, adapter in adapters.items()
            ),
        )

    @property
    def layouts(self) -> tuple[PageLayout, ...]:
        """All that the model and its adapters keep in pages."""
        own = self.source.layouts
        return own if self.adapters is None else (*own, self.adapters.layout)

    def checked(self, request: GenerateRequest) -> GenerateRequest:
        """The request, with `max_tokens` no larger than there is room for. Raises FieldError for what cannot be run."""
        spec, num_tokens = self.spec, len(request.prompt)
        if request.model != spec.name:  # it is an adapter's
            request = replace(request, model=spec.name, adapter=request.model)
        if not num_tokens:
            raise FieldError("prompt", expected="at least one token", got="none")
        is_generating = request.pooling is None
        most = spec.max_tokens - is_generating
        if num_tokens > most:
            raise FieldError(
                "prompt",
                expected=f"at most {most} tokens" + ", so that one can follow" * is_generating,
                got=f"{num_tokens} tokens",
                next_step="shorten the prompt, or raise chat.max_tokens if it is below the model's own",
            )
        wrong = next((index for index in request.prompt if not 0 <= index < spec.vocab_size), None)
        if wrong is not None:
            raise FieldError(
                "prompt", expected=f"token ids in 0..{spec.vocab_size - 1}", got=str(wrong)
            )
        if not is_generating:
            return request
        if request.pictures:
            images = self.tokenizer.images(request.prompt, request.pictures)
            request = replace(request, pictures=(), images=images)
        room = spec.max_tokens - num_tokens
        if request.sampling.max_tokens > room:
            request = replace(request, sampling=replace(request.sampling, max_tokens=room))
        check_sampling(request.sampling, spec)
        return request

    def matchers(self, request: GenerateRequest) -> tuple[GrammarMatcher, ...]:
        """One per choice, at the start of the request's grammar; none without one. Raises FieldError for a bad grammar."""
        grammar = request.sampling.grammar
        if grammar is None:
            return ()
        compiled = self._grammars().compile(grammar)
        return tuple(compiled.matcher() for _ in range(request.num_choices))

    def _grammars(self) -> GrammarCompiler:
        """Made for the first grammar: it reads the whole vocabulary."""
        spec = self.spec
        if not spec.eos_ids:
            raise UnsupportedFieldError(
                "response_format", why=f"{spec.name} has no token that ends a text"
            )
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(
                    [self.tokenizer.token_bytes(index) for index in range(spec.vocab_size)],
                    spec.eos_ids,
                    self.tokenizer.special_ids,
                )
            return self._compiler
