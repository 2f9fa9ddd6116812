"""Grammars: whatever the logits say, the text matches, and the end comes where it may."""

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ganglion.engine.grammar import (
    MAX_CACHED_GRAMMARS,
    GrammarCompiler,
    GrammarMatcher,
)
from ganglion.engine.sampler import Sampled, Sampler, SamplerState
from ganglion.generation import Grammar, Sampling
from tests.cpu.grammar_stage import (
    EMPTY,
    EOS,
    NUMBER,
    OTHER_EOS,
    SPEC,
    SPECIAL,
    TEXT,
    TOKENS,
    VOCAB,
    WHOLE,
    WORDS,
    item,
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


def write(
    matcher: GrammarMatcher, seed: int, *, max_tokens: int = 3000, **rules: Any
) -> tuple[str, SamplerState]:
    """What a model of random logits writes, which likes to close what it opened."""
    generator = torch.Generator().manual_seed(seed)
    closing = torch.zeros(VOCAB)
    closing[[ord(c) for c in '"}]']] = 5.0
    state = SamplerState(Sampling(seed=seed, **rules), prompt_ids=(1, 2), grammar=matcher)
    text = b""
    while not state.is_done and state.num_tokens < max_tokens:
        logits = 2.0 * torch.randn(1, VOCAB, generator=generator) + closing
        (drawn,) = SAMPLER.sample(logits, [state])
        assert isinstance(drawn, Sampled), drawn
        if drawn.token_id in SPEC.eos_ids:
            break
        assert drawn.token_id not in (SPECIAL, EMPTY)
        text += TOKENS[drawn.token_id]
    assert state.num_tokens < max_tokens, text[:200]
    return text.decode(), state


def has(keys: set[str], **kinds: type) -> Callable[[Any], bool]:
    """An object with these keys and no others, some of these types."""
    return lambda v: set(v) == keys and all(type(v[k]) is kind for k, kind in kinds.items())


def is_tree(value: Any) -> bool:
    return (
        set(value) == {"value", "children"}
        and type(value["value"]) is int
        and all(map(is_tree, value["children"]))
    )


SCHEMAS: dict[str, tuple[object, Callable[[Any], bool]]] = {
    "any object": ({}, lambda v: isinstance(v, dict)),
    "flat": (item(a=WHOLE, b=TEXT), has({"a", "b"}, a=int, b=str)),
    "nested": (
        item(pose=item(xyz={"type": "array", "items": NUMBER, "minItems": 3, "maxItems": 3})),
        lambda v: len(v["pose"]["xyz"]) == 3,
    ),
    "enum": (
        {"enum": ["red", "größe", "日本", "🤖", 7, None]},
        lambda v: v in ("red", "größe", "日本", "🤖", 7, None),
    ),
    "const": (item(kind={"const": "move_to"}), lambda v: v == {"kind": "move_to"}),
    "array of enums": (
        {"type": "array", "items": {"enum": ["up", "down"]}, "minItems": 2, "maxItems": 5},
        lambda v: 2 <= len(v) <= 5 and set(v) <= {"up", "down"},
    ),
    "$ref": (
        {"$defs": {"p": item(x=WHOLE)}, **item(a={"$ref": "#/$defs/p"}, b={"$ref": "#/$defs/p"})},
        lambda v: type(v["a"]["x"]) is int and type(v["b"]["x"]) is int,
    ),
    "recursive $ref": (
        {
            "$defs": {
                "t": item(
                    value=WHOLE,
                    children={"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2},
                )
            },
            "$ref": "#/$defs/t",
        },
        is_tree,
    ),
    "anyOf": (
        {"anyOf": [WHOLE, {"type": "null"}, TEXT]},
        lambda v: v is None or type(v) in (int, str),
    ),
    "list of types": ({"type": ["boolean", "null"]}, lambda v: v in (True, False, None)),
    "bounds": ({"type": "integer", "minimum": -3, "maximum": 12}, lambda v: -3 <= v <= 12),
    "open bounds": (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        lambda v: 0 < v < 1,
    ),
    "length": ({"type": "string", "minLength": 3, "maxLength": 6}, lambda v: 3 <= len(v) <= 6),
    "pattern": (
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        lambda v: re.fullmatch("[A-Z]{2}-[0-9]{3}", v) is not None,
    ),
    "format": (
        {"type": "string", "format": "date"},
        lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v) is not None,
    ),
    "optional keys": (
        {
            "type": "object",
            "properties": {"a": WHOLE, "b": TEXT},
            "required": ["b"],
            "additionalProperties": False,
        },
        lambda v: "b" in v and set(v) <= {"a", "b"},
    ),
    "map": (
        {"type": "object", "additionalProperties": {"type": "boolean"}},
        lambda v: all(type(x) is bool for x in v.values()),
    ),
    "unicode keys": (
        item(**{"größe": WHOLE, "名前": TEXT, 'a"b\\': NUMBER}),
        has({"größe", "名前", 'a"b\\'}),
    ),
    "tuple": (
        {"type": "array", "prefixItems": [WHOLE, TEXT], "items": False, "minItems": 2},
        lambda v: [type(x) for x in v] == [int, str],
    ),
    "allOf": (
        {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 8}]},
        lambda v: 5 <= v <= 8,
    ),
    "oneOf tool calls": (
        {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {
                "anyOf": [
                    item(name={"const": "grasp"}, arguments=item(force=NUMBER)),
                    item(name={"const": "look"}, arguments=item(at=TEXT, zoom={"enum": [1, 2]})),
                ]
            },
        },
        lambda v: all(
            set(call["arguments"]) == {"grasp": {"force"}, "look": {"at", "zoom"}}[call["name"]]
            for call in v
        ),
    ),
    "booleans": (
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        lambda v: len(v) <= 3,
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_logits_write_what_the_schema_says(compiler: GrammarCompiler, name: str) -> None:
    wanted, is_right = SCHEMAS[name]
    compiled = compiler.compile(schema(wanted))
    for seed in range(6):
        rules = {"top_k": 40, "temperature": 1.5} if seed % 2 else {"temperature": 0.0}
        text, _ = write(compiled.matcher(), seed, **rules)
        assert is_right(json.loads(text)), text


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (regex(r"[a-f0-9]{8}(-[a-f0-9]{4}){2}"), r"[a-f0-9]{8}(-[a-f0-9]{4}){2}"),
        (regex("(ja|nein|日本)"), "ja|nein|日本"),
        (
            lark('start: "move " AXIS ("+"|"-") /[0-9]{1,3}/\nAXIS: "x"|"y"|"z"'),
            r"move [xyz][+-]\d{1,3}",
        ),
        (lark('start: "a" start "b" | ""'), "a*b*"),
        (regex(""), ""),
    ],
)
def test_regular_expressions_and_lark(
    compiler: GrammarCompiler, grammar: Grammar, pattern: str
) -> None:
    compiled = compiler.compile(grammar)
    for seed in range(8):
        text, _ = write(compiled.matcher(), seed)
        assert re.fullmatch(pattern, text), text
        assert text.count("a") == text.count("b") or not pattern.startswith("a*")


def test_a_batch_mixes_rows_with_and_without_grammars(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(schema({"enum": ["red", "blue"]}))
    states = [
        SamplerState(
            Sampling(temperature=0.0),
            prompt_ids=(),
            grammar=compiled.matcher() if row % 2 else None,
        )
        for row in range(6)
    ]
    logits = torch.zeros(6, VOCAB)
    logits[:, 5] = 9.0
    got = [one.token_id for one in SAMPLER.sample(logits, states) if isinstance(one, Sampled)]
    assert got == [5, WORDS.index('"') + 256] * 3  # of two tokens with the same bytes the later one


def test_choices_of_one_request_go_their_own_ways(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(schema(item(a=TEXT)))
    texts = [write(compiled.matcher(), seed)[0] for seed in range(4)]
    assert len(set(texts)) == 4
    half = compiled.matcher()
    for token in b'{"a"':
        half.advance(token)
    fork = half.fork()
    for token in b': "x"}':
        fork.advance(token)
    assert (half.is_done, fork.is_done) == (False, True)
    assert half.num_fitting(list(b': "yz"}x')) == 7


def test_the_end_may_come_where_the_text_matches_and_must_where_nothing_follows(
    compiler: GrammarCompiler,
) -> None:
    bits = np.zeros(-(-VOCAB // 32), np.int32)

    def allowed(matcher: GrammarMatcher) -> set[int]:
        matcher.fill(bits)
        return set(np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0].tolist())

    matcher = compiler.compile(regex("ab*")).matcher()
    assert allowed(matcher) == {ord("a")}
    matcher.advance(ord("a"))
    assert allowed(matcher) == {ord("b"), EOS, OTHER_EOS}
    assert (matcher.is_accepting, matcher.is_done) == (True, False)
    closed = compiler.compile(regex("ab")).matcher()
    for token in b"ab":
        closed.advance(token)
    assert closed.is_done
    assert allowed(closed) == {EOS, OTHER_EOS}
    closed.advance(OTHER_EOS)
    closed.advance(EOS)  # a choice that ignores the model's end draws on
    assert closed.is_done


def test_a_complete_grammar_ends_before_the_minimum_length(compiler: GrammarCompiler) -> None:
    for max_tokens in (40, 60):
        text, state = write(
            compiler.compile(regex("ab")).matcher(), 0, max_tokens=max_tokens, min_tokens=30
        )
        assert (text, state.is_done) == ("ab", True)
    # The end is forbidden while there is another way on.
    text, state = write(compiler.compile(regex("ab*")).matcher(), 0, min_tokens=10)
    assert len(text) >= 10


def test_blanks_come_to_an_end(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(schema({})).matcher()
    matcher.advance(ord("{"))
    state = SamplerState(Sampling(temperature=0.0), prompt_ids=(), grammar=matcher)
    logits = torch.zeros(1, VOCAB)
    logits[0, ord("\n")] = 100.0
    got = [SAMPLER.sample(logits, [state])[0] for _ in range(40)]
    tokens = [one.token_id for one in got if isinstance(one, Sampled)]
    assert 0 < tokens.count(ord("\n")) <= 33


def test_compiled_grammars_are_kept_and_the_oldest_forgotten(compiler: GrammarCompiler) -> None:
    first = compiler.compile(regex("kept"))
    assert compiler.compile(regex("kept")) is first
    for i in range(MAX_CACHED_GRAMMARS):
        compiler.compile(regex(f"other{i}"))
    assert compiler.compile(regex("kept")) is not first


def test_threads_compile_and_start_at_once(compiler: GrammarCompiler) -> None:
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            for i in range(5):
                text, _ = write(compiler.compile(schema(item(a={"enum": [i]}))).matcher(), seed)
                assert json.loads(text) == {"a": i}
        except BaseException as error:  # noqa: BLE001  what a thread dies of would be lost
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert failures == []
