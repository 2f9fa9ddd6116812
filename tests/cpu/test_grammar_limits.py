"""Grammars: what cannot be matched is refused in the compiler's words, and nothing takes for ever."""

import threading
from collections.abc import Callable

import pytest
import torch

from ganglion.engine.grammar import MAX_GRAMMAR_BYTES, GrammarCompiler
from ganglion.engine.sampler import Sampled, Sampler, SamplerState
from ganglion.errors import FieldError, GanglionError
from ganglion.generation import Grammar, GrammarKind, Sampling
from tests.cpu.grammar_stage import (
    EOS,
    SPEC,
    TEXT,
    TOKENS,
    VOCAB,
    WHOLE,
    lark,
    make_compiler,
    regex,
    schema,
)

SAMPLER = Sampler(SPEC)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return make_compiler()


def doubling(step: Callable[[str], object], depth: int) -> dict[str, object]:
    """A schema of which each definition names the next one twice."""
    names = [{"$ref": f"#/$defs/x{i + 1}"} for i in range(depth)]
    defs = {f"x{i}": step(name["$ref"]) for i, name in enumerate(names)}
    return {"$defs": {**defs, f"x{depth}": TEXT}, "$ref": "#/$defs/x0"}


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (
            schema(
                doubling(
                    lambda to: {
                        "allOf": [
                            {"properties": {"x": {"$ref": to}}},
                            {"properties": {"x": {"$ref": to}, "y": {"$ref": to}}},
                        ]
                    },
                    20,
                )
            ),
            "too large",
        ),
        (
            schema(
                doubling(
                    lambda to: {
                        "allOf": [
                            {"anyOf": [{"$ref": to}, {"type": "object", "required": [key]}]}
                            for key in "xy"
                        ]
                    },
                    20,
                )
            ),
            "too large",
        ),
        (schema({"allOf": [{"minimum": i} for i in range(2000)]}), "too large"),
        (schema({"type": "nope"}), "Invalid type: nope"),
        (schema({"type": "string", "pattern": "("}), "regex parse error"),
        (schema({"$ref": "http://example.com/schema"}), "not present"),
        (schema({"$ref": "#/$defs/gone"}), "gone"),
        (schema({"$ref": "#"}), "no text matches"),
        (schema({"not": {"type": "string"}}), "not"),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema({"type": "array", "minItems": 5, "maxItems": 2}), "minItems (5)"),
        (schema(False), "an object"),
        (schema([]), "an object"),
        (schema(None), "an object"),
        (Grammar(kind=GrammarKind.JSON_SCHEMA, text="{"), "not JSON"),
        (Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"const": NaN}'), "expected value"),
        (
            Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"items":' * 300 + "{}" + "}" * 300),
            "recursion",
        ),
        (Grammar(kind=GrammarKind.JSON_SCHEMA, text="[" * 60_000), "nested too deep"),
        (Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"const": "\ud800"}'), "half a character"),
        (Grammar(kind=GrammarKind.JSON_SCHEMA, text=" " * (MAX_GRAMMAR_BYTES + 1)), "65537"),
        (regex("("), "unclosed group"),
        (regex("(?=x)y"), "look-around"),
        (regex("(" * 30_000 + ")" * 30_000), "invalid regex"),
        (lark("start: nothing"), "unknown name"),
        (lark("begin"), "Expected token"),
        (lark("start: " + "(" * 30_000), "nested"),
    ],
    ids=lambda value: value.text[:30] if isinstance(value, Grammar) else None,
)
def test_what_cannot_be_matched_is_refused_in_the_compilers_words(
    compiler: GrammarCompiler, grammar: Grammar, says: str
) -> None:
    with pytest.raises(FieldError) as caught:
        compiler.compile(grammar)
    assert says in str(caught.value)
    assert caught.value.field == grammar.kind.value
    assert len(str(caught.value)) < 700
    assert caught.value.advice


@pytest.mark.parametrize(
    "grammar",
    [
        regex("(a|b|ab){1000}{1000}c"),
        regex("(.*a.{200}){3}"),
        schema({"type": "string", "maxLength": 10**9}),
        schema({"type": "array", "items": WHOLE, "minItems": 10**6, "maxItems": 10**7}),
        schema({"type": "string", "pattern": "^(a?){300}a{300}$"}),
        schema({"enum": [f"choice {i}" for i in range(3000)]}),
        schema({"allOf": [{"$ref": "#/$defs/x"}] * 200, "$defs": {"x": {"maximum": 3}}}),
        lark("start: start start | /a+/ | /a*b/"),
        lark("start: /(.*a.{40})&(.*b.{38}.*)/"),
        lark("start: /~(.*a.{30})/"),
    ],
    ids=lambda grammar: grammar.text[:30],
)
def test_costly_grammars_are_matched_or_refused_but_never_hang(
    compiler: GrammarCompiler, grammar: Grammar
) -> None:
    """Each of 150 tokens is drawn, or one FieldError ends the choice."""
    finished = threading.Event()

    def run() -> None:
        try:
            state = SamplerState(
                Sampling(seed=1), prompt_ids=(), grammar=compiler.compile(grammar).matcher()
            )
        except FieldError:
            finished.set()
            return
        generator = torch.Generator().manual_seed(1)
        while state.num_tokens < 150 and not state.is_done:
            logits = torch.randn(1, VOCAB, generator=generator)
            logits[0, [ord("a"), ord("b")]] += 4.0
            (got,) = SAMPLER.sample(logits, [state])
            if isinstance(got, GanglionError):
                assert isinstance(got, FieldError)
                break
        finished.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20.0)
    assert finished.is_set()


def test_a_grammar_past_its_limits_ends_its_own_row_only(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ganglion.engine.grammar.MAX_MASK_LEXER_WORK", 300)
    narrow = GrammarCompiler(TOKENS, (EOS,))
    compiled = narrow.compile(regex("x(.*a.{25}b|.*c.{20}d)"))
    row = SamplerState(Sampling(temperature=0.0), prompt_ids=(), grammar=compiled.matcher())
    free = SamplerState(Sampling(temperature=0.0), prompt_ids=())
    logits = torch.zeros(2, VOCAB)
    logits[:, ord("a")] = 1.0
    errors = []
    for _ in range(60):
        first, second = SAMPLER.sample(logits, [row, free])
        assert isinstance(second, Sampled)
        if isinstance(first, GanglionError):
            errors.append(first)
    assert errors
    assert all(isinstance(error, FieldError) for error in errors)
