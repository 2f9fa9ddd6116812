"""Tool calls in a model's text: found whole however the text is cut, and never broken ones."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.serve.openai.tool_text import (
    CallBegun,
    Content,
    ForcedCalls,
    LeadingCalls,
    NamedCall,
    PlainText,
    TaggedCalls,
    ValueScanner,
    dialect_of,
)

NAMES = ["move_arm", "stop"]
ARGUMENTS = {"arm": "left", "text": 'a "}" \\ {[', "deep": [{"x": {}}]}
CALL = json.dumps({"name": "move_arm", "arguments": ARGUMENTS})
STOP = json.dumps({"name": "stop", "arguments": {}})


def folded(parts):
    """("text", content) and (name, parsed arguments), in order."""
    told = []
    for part in parts:
        if isinstance(part, Content):
            if told and told[-1][0] == "text":
                told[-1][1] += part.text
            else:
                told.append(["text", part.text])
        elif isinstance(part, CallBegun):
            told.append([part.name, ""])
        else:
            told[-1][1] += part.arguments
    return [(name, text if name == "text" else json.loads(text)) for name, text in told]


def read(parser, text, cuts=()):
    parts, start = [], 0
    for cut in [*sorted(cuts), len(text)]:
        parts += parser.feed(text[start:cut])
        start = cut
    return folded(parts + parser.end())


def tagged():
    return TaggedCalls(NAMES)


def llama():
    return LeadingCalls(NAMES, "<|python_tag|>")


def mistral():
    return LeadingCalls(NAMES, "[TOOL_CALLS]")


TEXT = st.text(alphabet='"\\{}[],: a\n', max_size=12)
MOVE, HALT = ("move_arm", ARGUMENTS), ("stop", {})
CASES = [
    (PlainText, "hello", [("text", "hello")]),
    (PlainText, f"<tool_call>{STOP}</tool_call>", [("text", f"<tool_call>{STOP}</tool_call>")]),
    (lambda: NamedCall("move_arm"), json.dumps(ARGUMENTS), [MOVE]),
    (ForcedCalls, CALL, [MOVE]),
    (ForcedCalls, f" [ {CALL} ,\n {STOP} ] ", [MOVE, HALT]),
    (ForcedCalls, json.dumps([json.loads(CALL)] * 3, indent=2), [MOVE] * 3),
    (tagged, "just text, 1 < 2 <tool", [("text", "just text, 1 < 2 <tool")]),
    (tagged, "ends with blanks \n\n", [("text", "ends with blanks \n\n")]),
    (tagged, f"\n<tool_call>\n{CALL}\n</tool_call>\n", [MOVE]),
    (tagged, f"Ok.\n<tool_call>{CALL}</tool_call>\n<tool_call>{STOP}</tool_call>", [("text", "Ok."), MOVE, HALT]),
    (tagged, f"<tool_call>{CALL}</tool_call> then", [MOVE, ("text", " then")]),
    (tagged, f"<tool_call>{CALL}", [MOVE]),  # the end of the text closes it
    (tagged, '<tool_call>{"name": "move_arm", "argu', [("text", '<tool_call>{"name": "move_arm", "argu')]),
    (tagged, "<tool_call>{nonsense}</tool_call>!", [("text", "<tool_call>{nonsense}</tool_call>!")]),
    (tagged, '<tool_call>{"name": "x", "arguments": [1]}</tool_call>', [("text", '<tool_call>{"name": "x", "arguments": [1]}</tool_call>')]),
    (tagged, '<tool_call>{"name": "stop", "arguments": "{}"}</tool_call>', [HALT]),  # JSON within JSON
    (tagged, '<tool_call>{"name": "stop"}</tool_call>', [HALT]),
    (llama, json.dumps({"name": "move_arm", "parameters": ARGUMENTS}), [MOVE]),
    (llama, json.dumps({"type": "function", "name": "stop", "parameters": {}}), [HALT]),
    (llama, f"<|python_tag|>{CALL}; {STOP}", [MOVE, HALT]),
    (llama, "Hello there", [("text", "Hello there")]),
    (llama, "<b>bold</b>", [("text", "<b>bold</b>")]),
    (llama, '{"name": "unknown", "parameters": {}}', [("text", '{"name": "unknown", "parameters": {}}')]),
    (llama, '{"answer": 42}', [("text", '{"answer": 42}')]),
    (llama, '{"name": "stop", "parameters": {', [("text", '{"name": "stop", "parameters": {')]),
    (llama, f"{STOP} and more", [("text", f"{STOP} and more")]),
    (mistral, f"[TOOL_CALLS] [{CALL}, {STOP}]", [MOVE, HALT]),
    (mistral, f"[{CALL}]", [MOVE]),
    (mistral, f"[TOOL_CALLS]move_arm{json.dumps(ARGUMENTS)}", [MOVE]),
    (mistral, "[TOOL_CALLS]stop[ARGS]{}[TOOL_CALLS]move_arm[ARGS]" + json.dumps(ARGUMENTS), [HALT, MOVE]),
    (mistral, "[1] is a footnote", [("text", "[1] is a footnote")]),
    (mistral, "[TOOL_CALLS] nonsense", [("text", " nonsense")]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "text", "expected"), CASES)
def test_whole_and_by_character(make, text, expected):
    assert read(make(), text) == expected
    assert read(make(), text, range(1, len(text))) == expected


@given(data=st.data())
def test_however_the_text_is_cut(data):
    make, text, expected = data.draw(st.sampled_from(CASES))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert read(make(), text, cuts) == expected


@given(
    text=st.text(alphabet='<>/tool_ca{}[]"name: \\,', max_size=80),
    cuts=st.lists(st.integers(0, 80)),
)
def test_no_text_is_lost_where_there_are_no_calls(text, cuts):
    cuts = [min(cut, len(text)) for cut in cuts]
    for make in (tagged, llama, mistral, PlainText):
        told = read(make(), text, cuts)
        if all(name == "text" for name, _ in told):
            assert "".join(value for _, value in told) == text


@given(
    value=st.recursive(
        TEXT | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)
    )
)
def test_the_scanner_finds_the_end(value):
    text = json.dumps([value])
    scanner = ValueScanner()
    ends = [scanner.feed(char) for char in text]
    assert ends == [None] * (len(text) - 1) + [1]
    assert ValueScanner().feed(text + "]}") == len(text)


def test_text_streams_at_once_where_it_cannot_be_a_call():
    for make in (tagged, llama, mistral):
        parser = make()
        assert folded(parser.feed("Hello")) == [("text", "Hello")]


def test_lists_that_are_no_calls_stream_too():
    parser = mistral()
    assert folded(parser.feed("[1] is a footnote")) == [("text", "[1] is a footnote")]
    parser = llama()
    assert parser.feed('{ "ans') == []
    assert folded(parser.feed('wer": 4')) == [("text", '{ "answer": 4')]


def test_families():
    assert isinstance(dialect_of("llama").parser(NAMES), LeadingCalls)
    assert isinstance(dialect_of("qwen3_moe").parser(NAMES), TaggedCalls)
    assert isinstance(dialect_of("something new").parser(NAMES), TaggedCalls)
