"""What the tests of grammars share: a small vocabulary with traps in it, and short ways to write grammars."""

import json
from typing import Any

from ganglion.engine.grammar import GrammarCompiler
from ganglion.generation import Grammar, GrammarKind, LanguageSpec

WORDS = (
    '"',
    '":',
    '", "',
    "},",
    "[{",
    "true",
    "name",
    " 12",
    "größe",
    "日本",
    "}}",
    "\n  ",
    "null",
    "a.b",
)
EOS, OTHER_EOS, SPECIAL, EMPTY = (len(WORDS) + 256 + i for i in range(4))
TOKENS = [
    *(bytes([i]) for i in range(256)),
    *(word.encode() for word in WORDS),
    b"<eos>",
    b"<end of turn>",
    b"name",  # a special token whose bytes are also those of a common one
    b"",
]
VOCAB = len(TOKENS) + 60  # models pad their vocabularies
SPEC = LanguageSpec(
    name="toy",
    family="llama",
    version="0",
    vocab_size=VOCAB,
    max_tokens=4096,
    num_layers=1,
    width=1,
    eos_ids=(EOS, OTHER_EOS),
    dtype="float32",
)


def make_compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENS, (EOS, OTHER_EOS), special_ids={SPECIAL})


def schema(value: object) -> Grammar:
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(value, ensure_ascii=False))


def regex(text: str) -> Grammar:
    return Grammar(kind=GrammarKind.REGEX, text=text)


def lark(text: str) -> Grammar:
    return Grammar(kind=GrammarKind.LARK, text=text)


def item(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
