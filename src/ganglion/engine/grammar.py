"""Grammars: which tokens may come next, so that a choice matches a JSON Schema, a regular expression or a Lark grammar.

`GrammarCompiler` is made once per model and called by the pipeline when a request comes; its matchers are asked by
engine.sampler on the loop's thread. Knows tokens' bytes; not logits, requests or the chat API. The parsing is
llguidance's (github.com/guidance-ai/llguidance, extra `chat`): Earley's algorithm over lexemes that are derivatives of regular
expressions, so a mask takes microseconds and nothing is computed per grammar ahead of time.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ganglion.errors import FieldError, MissingDependencyError
from ganglion.generation import Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_CACHED_GRAMMARS = 64
MAX_REASON_CHARS = 400
# Work is bounded by counts, which are the same on every machine. On one core: at most 40 ms for the lexer of a grammar, about as much for
# one mask, and some 100 MiB for the states of a lexer.
MAX_LEXER_WORK = 1_000_000
MAX_MASK_LEXER_WORK = 200_000
MAX_MASK_ITEMS = 50_000
MAX_LEXER_STATES = 50_000
MAX_SYMBOLS = 200_000
KIND_NAMES = {
    GrammarKind.JSON_SCHEMA: "JSON Schema",
    GrammarKind.REGEX: "regular expression",
    GrammarKind.LARK: "Lark grammar",
}
# A model that is unsure may write blanks for ever; this many are enough to indent what people indent.
JSON_BLANKS = r"[\x20\x0A\x0D\x09]{1,32}"


class GrammarMatcher:
    """One choice's place in its grammar. Used by one thread at a time."""

    def __init__(self, matcher: "LLMatcher", kind: GrammarKind, num_token_ids: int) -> None:
        self._matcher, self._kind = matcher, kind
        self._own_bits = np.zeros(-(-num_token_ids // 32), np.int32)

    @property
    def is_done(self) -> bool:
        """The text matches and nothing but the end can follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def is_accepting(self) -> bool:
        """The text so far matches, though more may follow."""
        return self._matcher.is_accepting()

    def fill(self, bits: npt.NDArray[np.int32]) -> None:
        """Set bit i of `bits`, 32 tokens a word, where token i may come next; clear all others.

        Raises FieldError where the grammar takes more work than a mask may.
        """
        own = self._own_bits
        self._matcher.unsafe_compute_mask_ptr(own.ctypes.data, own.nbytes)
        self._check()
        shared = min(len(own), len(bits))
        bits[:shared] = own[:shared]
        bits[shared:] = 0

    def advance(self, token_id: int) -> None:
        """A token that the mask allowed was drawn. Past the grammar's end only the model's own end is, which is free.

        Raises FieldError as `fill` does, and for a token that does not fit.
        """
        if not self.is_done and not self._matcher.consume_token(token_id):
            self._check()

    def num_fitting(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may come next. The place in the grammar stays."""
        return self._matcher.validate_tokens(list(token_ids))

    def fork(self) -> "GrammarMatcher":
        """A second choice that starts from this place."""
        return GrammarMatcher(self._matcher.deep_copy(), self._kind, 32 * len(self._own_bits))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._kind, self._matcher.get_error())


class CompiledGrammar:
    """A grammar that may be started any number of times, from any thread."""

    def __init__(self, matcher: "LLMatcher", kind: GrammarKind, num_token_ids: int) -> None:
        self._first = GrammarMatcher(matcher, kind, num_token_ids)
        self._lock = threading.Lock()

    def matcher(self) -> GrammarMatcher:
        """At the start of the grammar, for one choice."""
        with self._lock:
            return self._first.fork()


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the latest. Thread-safe.

    `token_bytes`: what each token id stands for. Tokens of `eos_ids` end a text; those and `special_ids` are never part of one, whatever their bytes. Of several tokens with the same bytes only the last is ever allowed (SentencePiece: the
    common token, not the byte).
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        eos_ids: Sequence[int],
        special_ids: Collection[int] = (),
    ) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise MissingDependencyError(
                "grammars need the package llguidance, which is not installed",
                next_step="pip install 'ganglion[chat]'",
            ) from error
        assert eos_ids, "a grammar can only end with a token that ends the text"
        self._llguidance = llguidance
        self._num_token_ids = len(token_bytes)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(token_bytes, eos_ids, {*special_ids, *eos_ids})),
            eos_token=list(eos_ids),
        )
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=MAX_LEXER_WORK,
            step_lexer_fuel=MAX_MASK_LEXER_WORK,
            step_max_items=MAX_MASK_ITEMS,
            max_lexer_states=MAX_LEXER_STATES,
            max_grammar_size=MAX_SYMBOLS,
            verbose_errors=False,
        )
        self._compiled: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Ready to be matched. Raises FieldError, named by the kind, with the compiler's own words.

        Takes about a millisecond; up to a second for 64 KiB of schema, without holding up other threads.
        """
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
        matcher = self._llguidance.LLMatcher(
            self._tokenizer, self._source(grammar), log_level=0, limits=self._limits
        )
        if matcher.is_error():
            raise _refused(grammar.kind, matcher.get_error())
        compiled = CompiledGrammar(matcher, grammar.kind, self._num_token_ids)
        self._check_start(grammar, compiled.matcher())
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return compiled

    def _source(self, grammar: Grammar) -> str:
        """The grammar in llguidance's own form."""
        matcher = self._llguidance.LLMatcher
        try:
            num_bytes = len(grammar.text.encode())
        except UnicodeEncodeError as error:
            raise _refused(grammar.kind, f"half a character at {error.start}") from None
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise FieldError(
                grammar.kind.value,
                expected=f"at most {MAX_GRAMMAR_BYTES} bytes",
                got=f"{num_bytes}",
                next_step="send a smaller grammar: replace what repeats by $defs or rules",
            )
        if grammar.kind is GrammarKind.REGEX:
            return matcher.grammar_from_regex(grammar.text)
        if grammar.kind is GrammarKind.LARK:
            return matcher.grammar_from_lark(grammar.text)
        try:
            schema = json.loads(grammar.text)
        except RecursionError:
            raise _refused(grammar.kind, "nested too deep") from None
        except json.JSONDecodeError as error:
            raise _refused(grammar.kind, f"not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise _refused(grammar.kind, "a schema is an object")
        text = '{"type": "object"}' if schema == {} else grammar.text
        try:
            return matcher.grammar_from_json_schema(
                text, defaults={"whitespace_pattern": JSON_BLANKS}
            )
        except ValueError as error:
            raise _refused(grammar.kind, str(error)) from None

    def _check_start(self, grammar: Grammar, matcher: GrammarMatcher) -> None:
        """A grammar that no text matches shows it at the first mask."""
        bits = np.zeros(-(-self._num_token_ids // 32), np.int32)
        try:
            matcher.fill(bits)
        except FieldError as error:
            if "NoExtension" not in error.got:
                raise
            bits[:] = 0
        if not bits.any():
            raise _refused(grammar.kind, "no text matches it")


class _Tokens:
    """The tokenizer as llguidance asks for it. It splits forced text only to guess at what may be forced next."""

    bos_token_id = None

    def __init__(
        self, token_bytes: Sequence[bytes], eos_ids: Sequence[int], special_ids: Collection[int]
    ) -> None:
        self.tokens = list(token_bytes)
        self.eos_token_id = eos_ids[0]
        self.special_token_ids = sorted(special_ids)
        self._id_of = {
            token: i for i, token in enumerate(token_bytes) if token and i not in special_ids
        }
        self._longest = max(map(len, self._id_of), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Longest tokens first; bytes that no token stands for are left out."""
        rest = text.encode() if isinstance(text, str) else text
        token_ids = []
        start = 0
        while start < len(rest):
            for end in range(min(len(rest), start + self._longest), start, -1):
                if (token_id := self._id_of.get(rest[start:end])) is not None:
                    token_ids.append(token_id)
                    break
            else:
                end = start + 1
            start = end
        return token_ids


def _refused(kind: GrammarKind, reason: str) -> FieldError:
    short = reason.replace("<non-verbose/>", "").strip()
    if len(short) > MAX_REASON_CHARS:
        short = f"{short[:MAX_REASON_CHARS]}..."
    return FieldError(
        kind.value,
        expected=f"a {KIND_NAMES[kind]} that this server can match",
        got=f"one that llguidance refuses: {short}",
        next_step="mend or simplify it; what is supported: github.com/guidance-ai/llguidance",
    )
