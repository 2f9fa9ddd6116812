"""Grammar: what the text of an answer must match, read from `response_format`, `structured_outputs` and tools.

Called by the readers of requests. Writes grammars as data; whoever serves compiles them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ganglion.errors import FieldError
from ganglion.generation import Grammar, GrammarKind
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.tool_text import CLOSE_TAG, OPEN_TAG, CallStyle
from ganglion.wire import describe

MAX_GRAMMAR_LENGTH = 65_536  # characters
MAX_ALTERNATIVES = 256
MAX_CALLS = 32
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")  # of a schema or a tool
ANY_OBJECT = Grammar(kind=GrammarKind.JSON_SCHEMA, text="{}")
BLANKS = r"[\x20\x0A\x0D\x09]{1,32}"  # a model that is unsure may write blanks for ever
TAGGED_CALLS = """start: answer | calls
answer: %json {answer}
calls: call{many}
call: {open} BLANKS? one BLANKS? {close} BLANKS?
one: %json {call}
BLANKS: /{blanks}/
"""
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def read_format(fields: Fields, name: str = "response_format") -> Grammar | None:
    """Chat's `response_format`: text, json_object, or json_schema with its schema inside `json_schema`."""
    form = fields.child(name)
    if form is None:
        return None
    match form.choice("type", ("text", "json_object", "json_schema")):
        case "json_schema":
            inner = form.child("json_schema")
            if inner is None:
                raise form.wrong("json_schema", "an object with name and schema")
            return read_schema(inner)
        case "json_object":
            return ANY_OBJECT
        case "text":
            return None
        case _:
            raise form.wrong("type", "'text' | 'json_object' | 'json_schema'")


def read_schema(fields: Fields) -> Grammar:
    """`name`, `schema` (absent: any object), `description`, `strict`. A schema always binds here, strict or not."""
    name = fields.text("name")
    if name is None or not NAME.fullmatch(name):
        raise fields.wrong("name", "1..64 letters, digits, '_', '-' or '.'")
    fields.text("description")
    fields.flag("strict")
    schema = fields.raw("schema")
    return ANY_OBJECT if schema is None else schema_grammar(schema, fields.at("schema"))


def read_structure(fields: Fields) -> Grammar | None:
    """vLLM's `structured_outputs`: one of json, regex, choice, grammar (Lark)."""
    inner = fields.child("structured_outputs")
    if inner is None:
        return None
    found = [name for name in ("json", "regex", "choice", "grammar") if inner.raw(name) is not None]
    if len(found) != 1:
        raise fields.wrong("structured_outputs", "exactly one of json, regex, choice, grammar")
    match found[0]:
        case "json":
            value = inner.raw("json")
            schema = inner.json_text("json") if isinstance(value, str) else value
            return schema_grammar(schema, inner.at("json"))
        case "choice":
            rows = inner.rows("choice", low=1, high=MAX_ALTERNATIVES) or []
            if not all(isinstance(row, str) and row for row in rows):
                raise inner.wrong("choice", "a list of texts")
            text = "|".join(f"({re.escape(row)})" for row in rows)
            return _bounded(GrammarKind.REGEX, text, inner.at("choice"))
        case "regex":
            return _bounded(GrammarKind.REGEX, inner.text("regex") or "", inner.at("regex"))
        case _:
            return _bounded(GrammarKind.LARK, inner.text("grammar") or "", inner.at("grammar"))


def schema_grammar(schema: object, path: str) -> Grammar:
    """A JSON Schema as a grammar. Raises FieldError when it is no object, or too long."""
    if not isinstance(schema, dict):
        raise FieldError(path, expected="a JSON Schema: an object", got=describe(schema))
    if not schema:
        return ANY_OBJECT
    return _bounded(GrammarKind.JSON_SCHEMA, _json(schema), path)


Pairs = Sequence[tuple[str, Mapping[str, Any]]]  # (name, schema of the arguments) of tools


def calls_grammar(tools: Pairs, *, is_list: bool) -> Grammar:
    """One call, or a list of at least one, as `{"name", "arguments"}`."""
    schema = _list_schema(tools, "#") if is_list else _one_schema(tools, "#")
    return _bounded(GrammarKind.JSON_SCHEMA, _json(schema), "tools")


def answer_or_calls(form: Grammar, tools: Pairs, style: CallStyle, *, is_parallel: bool) -> Grammar:
    """An answer of a format, or calls as the model's family writes them. `form` is a JSON Schema."""
    answer = json.loads(form.text) or {"type": "object"}
    if style is CallStyle.TAGGED:
        blanks = {"x-guidance": {"whitespace_pattern": BLANKS}}
        text = TAGGED_CALLS.format(
            answer=_json(answer | blanks), call=_json(_one_schema(tools, "#") | blanks),
            open=_json(OPEN_TAG), close=_json(CLOSE_TAG), many="+" if is_parallel else "", blanks=BLANKS,
        )  # fmt: skip
        return _bounded(GrammarKind.LARK, text, "tools")
    if style is CallStyle.LIST:
        calls = _list_schema(tools, "#/anyOf/1")
    else:
        calls = _one_schema(tools, "#/anyOf/1", arguments="parameters")
    whole = {"anyOf": [_moved(answer, "#/anyOf/0"), calls]}
    return _bounded(GrammarKind.JSON_SCHEMA, _json(whole), "tools")


def _list_schema(tools: Pairs, place: str) -> dict[str, Any]:
    one = _one_schema(tools, f"{place}/items")
    return {"type": "array", "minItems": 1, "maxItems": MAX_CALLS, "items": one}


def _one_schema(tools: Pairs, place: str, *, arguments: str = "arguments") -> dict[str, Any]:
    """A call of any of the tools; the schema itself stands at `place`."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                arguments: _moved(schema, f"{place}/anyOf/{index}/properties/{arguments}"),
            },
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for index, (name, schema) in enumerate(tools)
    ]
    return {"anyOf": calls}


def _moved(schema: Any, place: str) -> Any:
    """The same schema where it is no document of its own any more: its references begin at `place`."""
    if isinstance(schema, dict):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _bounded(kind: GrammarKind, text: str, path: str) -> Grammar:
    if not 0 < len(text) <= MAX_GRAMMAR_LENGTH:
        expected = f"1..{MAX_GRAMMAR_LENGTH} characters of grammar"
        raise FieldError(path, expected=expected, got=f"{len(text)}")
    return Grammar(kind=kind, text=text, path=path)
