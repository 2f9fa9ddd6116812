"""Tools: the functions that a model may call, and how far it is forced to, read from `tools` and `tool_choice`.

Called by `chat` and `responses`, whose shapes differ by one level. Knows grammars of calls and parsers of calls, nothing of
messages.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ganglion.errors import FieldError, UnsupportedFieldError
from ganglion.generation import Grammar
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.grammar import (
    NAME,
    NO_ARGUMENTS,
    answer_or_calls,
    calls_grammar,
    schema_grammar,
)
from ganglion.serve.openai.tool_text import (
    ForcedCalls,
    NamedCall,
    PlainText,
    TextParser,
    dialect_of,
)

MAX_TOOLS = 128
MODES = ("auto", "none", "required")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One function: its name, the JSON Schema of its arguments, and itself as the chat interface writes it."""

    name: str
    schema: Mapping[str, Any]
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """What the template is shown, what the text must match, and who reads it."""

    shown: tuple[Mapping[str, Any], ...]
    grammar: Grammar | None
    parser: Callable[[], TextParser]
    max_calls: int | None  # of one choice; None: any number
    beside: Callable[[Grammar], Grammar] | None = None  # "auto": the format of an answer, or calls


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolShape:
    """Where an interface keeps a function: chat under `function`, responses in the tool itself."""

    is_nested: bool

    def inner(self, fields: Fields) -> Fields:
        """The object that holds the name."""
        if not self.is_nested:
            return fields
        inner = fields.child("function")
        if inner is None:
            raise fields.wrong("function", "an object with a name")
        return inner


CHAT_SHAPE = ToolShape(is_nested=True)
RESPONSES_SHAPE = ToolShape(is_nested=False)


def read_tools(fields: Fields, shape: ToolShape, family: str) -> ToolPlan:
    """`tools`, `tool_choice` and `parallel_tool_calls` together."""
    tools = _read_list(fields, shape)
    is_parallel = fields.flag("parallel_tool_calls") is not False
    mode, names = _read_choice(fields, shape, tools)
    if names is not None:
        tools = [tool for tool in tools if tool.name in names]
    if mode == "none" or not tools:
        return ToolPlan(shown=(), grammar=None, parser=PlainText, max_calls=0)
    shown = tuple(tool.body for tool in tools)
    pairs = [(tool.name, tool.schema) for tool in tools]
    if mode == "auto":
        dialect = dialect_of(family)
        return ToolPlan(
            shown=shown,
            grammar=None,
            parser=lambda: dialect.parser([name for name, _ in pairs]),
            max_calls=None if is_parallel else 1,
            beside=lambda form: answer_or_calls(
                form, pairs, dialect.style, is_parallel=is_parallel
            ),
        )
    if mode == "named":
        tool = tools[0]
        return ToolPlan(
            shown=shown,
            grammar=schema_grammar(tool.schema, "tools"),
            parser=lambda: NamedCall(tool.name),
            max_calls=1,
        )
    grammar = calls_grammar(pairs, is_list=is_parallel)
    return ToolPlan(shown=shown, grammar=grammar, parser=ForcedCalls, max_calls=None)


def _read_list(fields: Fields, shape: ToolShape) -> list[Tool]:
    tools = []
    for item in fields.children("tools", high=MAX_TOOLS):
        kind = item.text("type", max_length=64)
        if kind != "function":
            if kind is None:
                raise item.wrong("type", "'function'")
            raise UnsupportedFieldError(
                item.at("type"), why=f"{kind!r} is no function", next_step="send functions only"
            )
        tools.append(_read_tool(shape.inner(item)))
    names = [tool.name for tool in tools]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise FieldError(fields.at("tools"), expected="names that differ", got=f"{twice!r} twice")
    return tools


def _read_tool(fields: Fields) -> Tool:
    name = fields.text("name")
    if name is None or not NAME.fullmatch(name):
        raise fields.wrong("name", "1..64 letters, digits, '_', '-' or '.'")
    description = fields.text("description")
    fields.flag("strict")  # what a grammar forces always matches its schema
    parameters = fields.child("parameters")
    schema = NO_ARGUMENTS
    if parameters is not None:
        if parameters.raw("type") not in (None, "object"):
            raise parameters.wrong("type", "'object': arguments have names")
        schema = {"type": "object"} | fields.raw("parameters")
    function = {"name": name, "parameters": schema}
    if description is not None:
        function = {"name": name, "description": description, "parameters": schema}
    return Tool(name=name, schema=schema, body={"type": "function", "function": function})


def _read_choice(
    fields: Fields, shape: ToolShape, tools: list[Tool]
) -> "tuple[str, frozenset[str] | None]":
    """The mode ("auto", "none", "required" or "named") and, where they are named, which tools."""
    value = fields.raw("tool_choice")
    if value is None:
        return "auto", None
    if isinstance(value, str):
        mode = fields.choice("tool_choice", MODES)
        assert mode is not None, "it is there"
        if mode == "required" and not tools:
            raise fields.wrong("tool_choice", "'auto' or 'none', as there are no tools")
        return mode, None
    choice = fields.child("tool_choice")
    assert choice is not None, "it is there"
    match choice.choice("type", ("function", "allowed_tools")):
        case "function":
            return "named", frozenset({_read_name(shape.inner(choice), tools)})
        case "allowed_tools":
            inner = choice.child("allowed_tools") if shape.is_nested else choice
            if inner is None:
                raise choice.wrong("allowed_tools", "an object with mode and tools")
            mode = inner.choice("mode", ("auto", "required"))
            rows = inner.children("tools", low=1, high=MAX_TOOLS)
            names = frozenset(_read_name(shape.inner(row), tools) for row in rows)
            if mode is None or not names:
                raise inner.wrong("mode", "'auto' | 'required', and tools beside it")
            return mode, names
        case _:
            raise choice.wrong("type", "'function' | 'allowed_tools'")


def _read_name(fields: Fields, tools: list[Tool]) -> str:
    name = fields.text("name", max_length=64)
    if name is None or all(tool.name != name for tool in tools):
        raise fields.wrong("name", "the name of one of the tools")
    return name
