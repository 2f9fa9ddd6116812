"""Grammars that requests make, by the real compiler: what they allow is what the parsers of calls read."""

import json

import pytest

from ganglion.engine.grammar import GrammarCompiler
from ganglion.errors import FieldError
from ganglion.generation import Grammar
from ganglion.serve.openai.chat import choose_grammar
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.grammar import read_format, read_structure
from ganglion.serve.openai.tool_text import CallBegun, CallGrown, Content
from ganglion.serve.openai.tools import CHAT_SHAPE, read_tools

END = 256
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "move_arm",
            "parameters": {
                "type": "object",
                "properties": {"to": {"$ref": "#/$defs/Point"}, "via": {"type": "array", "items": {"$ref": "#/$defs/Point"}}},
                "required": ["to"],
                "additionalProperties": False,
                "$defs": {"Point": POINT},
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]  # fmt: skip
MOVE = {"name": "move_arm", "arguments": {"to": {"x": 3}, "via": [{"x": 1}]}}
STOP = {"name": "stop", "arguments": {}}


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler([bytes((byte,)) for byte in range(256)] + [b""], [END])


def fits(compiler: GrammarCompiler, grammar: Grammar | None, text: str) -> bool:
    """May the whole text be written, and may it end there?"""
    assert grammar is not None
    matcher = compiler.compile(grammar).matcher()
    data = text.encode()
    return matcher.num_fitting(data) == len(data) and fits_end(matcher, data)


def fits_end(matcher, data: bytes) -> bool:
    for byte in data:
        matcher.advance(byte)
    return matcher.is_done or matcher.is_accepting


def plan(**fields):
    return read_tools(Fields({"tools": TOOLS} | fields), CHAT_SHAPE, "qwen3")


def test_required_calls_are_a_list_with_references_that_moved_along(compiler):
    grammar = plan(tool_choice="required").grammar
    assert fits(compiler, grammar, json.dumps([MOVE]))
    assert fits(compiler, grammar, json.dumps([STOP, MOVE, STOP]))
    assert not fits(compiler, grammar, "[]")
    assert not fits(compiler, grammar, json.dumps([dict(reversed(STOP.items()))]))  # name first
    assert not fits(compiler, grammar, json.dumps([MOVE | {"name": "jump"}]))
    assert not fits(compiler, grammar, json.dumps([{"name": "move_arm", "arguments": {"to": {"y": 3}}}]))  # fmt: skip
    assert not fits(compiler, grammar, json.dumps([STOP | {"arguments": {"x": 1}}]))


def test_one_required_call(compiler):
    grammar = plan(tool_choice="required", parallel_tool_calls=False).grammar
    assert fits(compiler, grammar, json.dumps(MOVE))
    assert not fits(compiler, grammar, json.dumps([MOVE]))


def test_a_named_call_is_its_arguments(compiler):
    named = {"type": "function", "function": {"name": "move_arm"}}
    grammar = plan(tool_choice=named).grammar
    assert fits(compiler, grammar, json.dumps(MOVE["arguments"]))
    assert not fits(compiler, grammar, json.dumps(MOVE))
    nothing = plan(tool_choice={"type": "function", "function": {"name": "stop"}}).grammar
    assert fits(compiler, nothing, "{}")
    assert not fits(compiler, nothing, '{"x": 1}')


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({}, {"any": [1]}, []),
        ({"properties": {"x": {"type": "integer"}}, "required": ["x"]}, {"x": 1}, 1),
        ({"$ref": "#/$defs/Node", "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}, "additionalProperties": False}}}, {"next": {"next": {}}}, {"next": 1}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_parallel", [True, False])
def test_arguments_are_always_an_object(compiler, parameters, good, bad, is_parallel):
    tool = {"type": "function", "function": {"name": "t", "parameters": parameters}}
    grammar = plan(tools=[tool], tool_choice="required", parallel_tool_calls=is_parallel).grammar
    call = {"name": "t", "arguments": good}
    assert fits(compiler, grammar, json.dumps([call] if is_parallel else call))
    call["arguments"] = bad
    assert not fits(compiler, grammar, json.dumps([call] if is_parallel else call))


def test_allowed_tools_narrow_the_choice(compiler):
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "stop"}}]}
    narrowed = plan(tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert [tool["function"]["name"] for tool in narrowed.shown] == ["stop"]
    assert fits(compiler, narrowed.grammar, json.dumps([STOP]))
    assert not fits(compiler, narrowed.grammar, json.dumps([MOVE]))


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": [1, null]}', "[1]"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": POINT}}}, '{"x": 1}', '{"x": "1"}'),
        ({"structured_outputs": {"json": POINT}}, '{"x": 1}', "{}"),
        ({"structured_outputs": {"json": json.dumps(POINT)}}, '{"x": 1}', "{}"),
        ({"structured_outputs": {"choice": ["left", "right (2)"]}}, "right (2)", "middle"),
        ({"structured_outputs": {"choice": ["a b-c", "#1 & ~2"]}}, "#1 & ~2", "a"),
        ({"structured_outputs": {"regex": "[0-9]{2,3}"}}, "42", "4"),
        ({"structured_outputs": {"grammar": 'start: "a" "b"+'}}, "abb", "a"),
    ],
)  # fmt: skip
def test_formats(compiler, fields, good, bad):
    read = Fields(fields)
    grammar = read_format(read) or read_structure(read)
    assert fits(compiler, grammar, good)
    assert not fits(compiler, grammar, bad)


@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral"])
def test_an_answer_of_a_format_or_calls(compiler, family, is_parallel):
    """Whatever is written is either, and the family's parser tells which."""
    schema = {"$ref": "#/$defs/Point", "$defs": {"Point": POINT}}
    body = {
        "tools": TOOLS,
        "parallel_tool_calls": is_parallel,
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}},
    }
    fields = Fields(body)
    tools = read_tools(fields, CHAT_SHAPE, family)
    grammar = choose_grammar(fields, tools, read_format(fields))
    if family == "qwen3":
        text = f"<tool_call>\n{json.dumps(MOVE)}\n</tool_call>"
        several = f"{text}\n<tool_call>{json.dumps(STOP)}</tool_call>"
    elif family == "llama":
        text = json.dumps({"name": "move_arm", "parameters": MOVE["arguments"]})
        several = None
    else:
        text, several = json.dumps([MOVE]), json.dumps([MOVE, STOP])
    assert fits(compiler, grammar, '{"x": 3}')
    assert fits(compiler, grammar, text)
    assert not fits(compiler, grammar, '{"y": 3}')
    assert not fits(compiler, grammar, "hello")
    parser = tools.parser()
    begun, grown = parser.feed(text) + parser.end()
    assert begun == CallBegun("move_arm")
    assert isinstance(grown, CallGrown)
    assert json.loads(grown.arguments) == MOVE["arguments"]
    parser = tools.parser()
    assert parser.feed('{"x": 3}') + parser.end() == [Content('{"x": 3}')]
    if several is not None and is_parallel:
        assert fits(compiler, grammar, several)


def test_a_schema_that_cannot_be_matched_is_refused(compiler):
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": {"type": "nonsense"}}}
    grammar = read_format(Fields({"response_format": form}))
    assert grammar is not None
    with pytest.raises(FieldError):
        compiler.compile(grammar)
