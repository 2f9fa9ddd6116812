"""Tool text: tells the content of an answer from its tool calls, while it is being written.

Called by `chat` and `responses`, one parser a choice. Knows how families of models write calls, nothing of HTTP. Calls that a
grammar forced are passed on as they grow; calls that a model wrote by itself only when they are whole and valid, so that a
client never sees broken arguments: what is no valid call is content.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The next call begins; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallGrown:
    """More of the arguments of the call that began last, as JSON text."""

    arguments: str


Part = Content | CallBegun | CallGrown


class TextParser(Protocol):
    """Takes the text of one choice piece by piece."""

    def feed(self, text: str) -> list[Part]:
        """What can be told by now."""
        ...

    def end(self) -> list[Part]:
        """The rest, when the choice has ended."""
        ...


class PlainText:
    """No tools: all is content."""

    def feed(self, text: str) -> list[Part]:
        """The text itself."""
        return [Content(text)] if text else []

    def end(self) -> list[Part]:
        """Nothing is held back."""
        return []


class NamedCall:
    """A grammar makes the text the arguments of one tool."""

    def __init__(self, name: str) -> None:
        self._name, self._is_begun = name, False

    def feed(self, text: str) -> list[Part]:
        """All text is arguments."""
        if not text:
            return []
        begun: list[Part] = [] if self._is_begun else [CallBegun(self._name)]
        self._is_begun = True
        return [*begun, CallGrown(text)]

    def end(self) -> list[Part]:
        """Nothing is held back."""
        return []


class ForcedCalls:
    """A grammar makes the text one call, or a list of calls: `{"name": ..., "arguments": {...}}` in this order."""

    _HEAD = re.compile(
        r'[\s,\[]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)'
    )

    def __init__(self) -> None:
        self._held, self._scanner = "", ValueScanner()
        self._is_inside = False

    def feed(self, text: str) -> list[Part]:
        """Arguments are passed on as they grow."""
        self._held += text
        parts: list[Part] = []
        while True:
            if self._is_inside:
                end = self._scanner.feed(self._held)
                grown = self._held if end is None else self._held[:end]
                if grown:
                    parts.append(CallGrown(grown))
                if end is None:
                    self._held = ""
                    return parts
                self._held, self._is_inside = self._held[end:].lstrip().removeprefix("}"), False
            head = self._HEAD.match(self._held.lstrip().removeprefix("}"))
            if head is None:
                return parts
            parts.append(CallBegun(json.loads(head[1])))
            self._held = self._held.lstrip().removeprefix("}")[head.end() :]
            self._is_inside, self._scanner = True, ValueScanner()

    def end(self) -> list[Part]:
        """Brackets are left over, or a call cut short before its arguments."""
        return []


class TaggedCalls:
    """Hermes and Qwen: content, and calls as JSON between `<tool_call>` and `</tool_call>`."""

    _OPEN, _CLOSE = OPEN_TAG, CLOSE_TAG

    def __init__(self, names: Collection[str]) -> None:
        self._held, self._blank = "", ""  # `_blank`: whitespace, which a call would swallow
        self._is_inside = self._has_called = False

    def feed(self, text: str) -> list[Part]:
        """Content up to what may begin a tag, calls when they are whole."""
        self._held += text
        parts: list[Part] = []
        while True:
            tag = self._CLOSE if self._is_inside else self._OPEN
            before, found, after = self._held.partition(tag)
            if not found:
                if not self._is_inside:
                    num_kept = _overlap(self._held, tag)
                    cut = len(self._held) - num_kept
                    parts += self._content(self._held[:cut])
                    self._held = self._held[cut:]
                return parts
            parts += self._call(before, tag) if self._is_inside else self._content(before)
            self._held, self._is_inside = after, not self._is_inside

    def end(self) -> list[Part]:
        """A call without its closing tag counts when it is whole."""
        parts = self._call(self._held, "") if self._is_inside else self._content(self._held)
        if not self._has_called and self._blank:
            parts.append(Content(self._blank))
        self._held = self._blank = ""
        return parts

    def _content(self, text: str) -> list[Part]:
        text = self._blank + text
        solid = text.rstrip()
        self._blank = text[len(solid) :]
        return [Content(solid)] if solid else []

    def _call(self, text: str, close: str) -> list[Part]:
        call = read_call(_json_or_none(text))
        if call is None:
            return self._content(self._OPEN + text + close)
        self._blank, self._has_called = "", True
        return [CallBegun(call.name), CallGrown(call.arguments)]


class LeadingCalls:
    """Llama 3 and Mistral: the whole answer is calls, as JSON, with or without a marker in front of it.

    Without the marker (it is a special token, which has no text everywhere) only calls of known tools are taken for calls.
    """

    _FIRST_KEY = re.compile(r'[\s\[]*\{\s*"((?:[^"\\]|\\.)*)"')
    _UNTIL_KEY = re.compile(r'[\s\[]*(?:\{\s*(?:"(?:[^"\\]|\\.)*\\?)?)?')
    _KEYS = frozenset({"name", "type", "function", "parameters", "arguments", "id"})
    _NAMED = re.compile(r"\s*([a-zA-Z0-9_.-]{1,64})\s*(?:\[ARGS\])?\s*(?=\{)")  # newer Mistral

    def __init__(self, names: Collection[str], marker: str) -> None:
        self._names, self._marker = frozenset(names), marker
        self._held, self._is_content, self._is_marked = "", False, False

    def feed(self, text: str) -> list[Part]:
        """Content is passed on as soon as it cannot be a call."""
        if self._is_content:
            return [Content(text)] if text else []
        self._held += text
        if self._is_marked or not self._held.strip():
            return []
        before, found, after = self._held.partition(self._marker)
        if found:
            self._held, self._is_marked = after, True
            return [Content(before)] if before.strip() else []
        stripped = self._held.lstrip()
        if self._marker.startswith(stripped[: len(self._marker)]):
            return []
        first_key = self._FIRST_KEY.match(stripped)
        if self._UNTIL_KEY.fullmatch(stripped) or (first_key and first_key[1] in self._KEYS):
            return []
        self._is_content = True
        held, self._held = self._held, ""
        return [Content(held)]

    def end(self) -> list[Part]:
        """Calls, where all of the text is calls."""
        held, self._held = self._held, ""
        calls = self._calls(held)
        if not calls or not (self._is_marked or all(call.name in self._names for call in calls)):
            return [Content(held)] if held else []
        return [part for c in calls for part in (CallBegun(c.name), CallGrown(c.arguments))]

    def _calls(self, text: str) -> "list[Call]":
        decoder, calls, place = json.JSONDecoder(), list[Call](), 0
        while rest := text[place:].lstrip(" \t\r\n;,"):
            place = len(text) - len(rest)
            if rest.startswith(self._marker):
                place += len(self._marker)
                continue
            named = self._NAMED.match(rest) if self._is_marked else None
            try:
                value, end = decoder.raw_decode(rest, named.end() if named else 0)
            except (ValueError, RecursionError):
                return []
            if named:
                value = {"name": named[1], "arguments": value}
            read = [read_call(item) for item in (value if isinstance(value, list) else [value])]
            if None in read:
                return []
            calls += [call for call in read if call is not None]
            place += end
        return calls


@dataclass(frozen=True, slots=True)
class Call:
    """One whole call: `arguments` is the JSON text of an object."""

    name: str
    arguments: str


class ValueScanner:
    """Finds where a JSON object or list ends, in pieces of text."""

    def __init__(self) -> None:
        self._depth, self._is_string, self._is_escaped = 0, False, False

    def feed(self, text: str) -> int | None:
        """How much of `text` belongs to the value; None: all, and more is to come."""
        for index, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_string:
                self._is_escaped = char == "\\"
                self._is_string = char != '"'
            elif char == '"':
                self._is_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
        return None


def read_call(value: object) -> Call | None:
    """A call in any of the forms that models write; None when it is none."""
    if not isinstance(value, dict):
        return None
    function = value.get("function")
    if isinstance(function, dict):
        return read_call(function)
    name = value.get("name", function)
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json_or_none(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _json_or_none(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


class CallStyle(StrEnum):
    """How a family's calls look, for who writes a grammar of them."""

    TAGGED = "tagged"  # <tool_call>{"name", "arguments"}</tool_call>, one after the other
    OBJECT = "object"  # {"name", "parameters"}
    LIST = "list"  # [{"name", "arguments"}, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a family writes calls by itself, and who reads them; `parser` is given the names of the tools."""

    style: CallStyle
    parser: Callable[[Collection[str]], TextParser]


HERMES = Dialect(style=CallStyle.TAGGED, parser=TaggedCalls)
LLAMA = Dialect(style=CallStyle.OBJECT, parser=lambda names: LeadingCalls(names, "<|python_tag|>"))
MISTRAL = Dialect(style=CallStyle.LIST, parser=lambda names: LeadingCalls(names, "[TOOL_CALLS]"))
DIALECTS: dict[str, Dialect] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MISTRAL,
    "ministral": MISTRAL,
}


def dialect_of(family: str) -> Dialect:
    """A family's own way; Hermes' where it is not known, which most templates follow."""
    return DIALECTS.get(family, HERMES)
