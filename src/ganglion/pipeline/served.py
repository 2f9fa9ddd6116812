"""ServedLanguage: one language model as requests may name it: limits, tokenizer, grammars. Checks what is asked of it.

Made by `cli` or a test, used by `pipeline.language` from any thread. Knows no pages and no engine.
"""

import threading
from dataclasses import replace
from typing import Protocol

from ganglion.engine.grammar import GrammarCompiler, GrammarMatcher
from ganglion.engine.sampler import check_sampling
from ganglion.errors import FieldError, UnsupportedFieldError
from ganglion.generation import GenerateRequest, LanguageSpec
from ganglion.models.language import LanguageModel
from ganglion.service import TextTokenizer


class ShowingTokenizer(TextTokenizer, Protocol):
    """A tokenizer that also says what a reader sees of a token."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that stand for no text."""
        ...

    def shown_bytes(self, token_id: int) -> bytes:
        """Bytes of the text; none for a special token."""
        ...


class ServedLanguage:
    """A model and its tokenizer. `max_tokens`: of one request, prompt and answer; 0: as many as the model can."""

    def __init__(
        self, model: LanguageModel, tokenizer: ShowingTokenizer, *, max_tokens: int = 0
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        most = model.spec.max_tokens
        self.spec: LanguageSpec = replace(model.spec, max_tokens=min(max_tokens or most, most))
        self._lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None

    def checked(self, request: GenerateRequest) -> GenerateRequest:
        """The request, with `max_tokens` no larger than there is room for. Raises FieldError for what cannot be run."""
        spec, num_tokens = self.spec, len(request.prompt)
        if not num_tokens:
            raise FieldError("prompt", expected="at least one token", got="none")
        if num_tokens >= spec.max_tokens:
            raise FieldError(
                "prompt",
                expected=f"at most {spec.max_tokens - 1} tokens, so that one can follow",
                got=f"{num_tokens} tokens",
                next_step="shorten the prompt, or raise chat.max_tokens if it is below the model's own",
            )
        wrong = next((index for index in request.prompt if not 0 <= index < spec.vocab_size), None)
        if wrong is not None:
            raise FieldError(
                "prompt", expected=f"token ids in 0..{spec.vocab_size - 1}", got=str(wrong)
            )
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
