"""Messages: a conversation as the chat interface writes it, checked, as plain ChatMessages.

Called by `chat`; `responses` makes the same of its items. Knows roles and parts of content; text only.
"""

from collections.abc import Mapping
from typing import Any

from ganglion.errors import UnsupportedFieldError
from ganglion.generation import ChatMessage
from ganglion.serve.openai.fields import Fields

MAX_MESSAGES = 2_048
MAX_PARTS = 256
MAX_CALLS = 128
MAX_ID_LENGTH = 256
# "developer" is OpenAI's newer word for "system"; templates know the older one.
ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def read_messages(fields: Fields) -> tuple[ChatMessage, ...]:
    """`messages`, at least one."""
    rows = fields.children("messages", low=1, high=MAX_MESSAGES)
    if not rows:
        raise fields.wrong("messages", f"a list of 1..{MAX_MESSAGES} messages")
    return tuple(_read_message(row) for row in rows)


def read_role(fields: Fields) -> str:
    """The role, in the words that templates know."""
    role = fields.choice("role", ROLES)
    if role is None:
        raise fields.wrong("role", " | ".join(repr(word) for word in ROLES))
    return ROLES[role]


def read_content(fields: Fields, name: str) -> str | None:
    """A string, or parts of text joined; None when absent. Raises UnsupportedFieldError for pictures and sound."""
    value = fields.raw(name)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fields.wrong(name, "a string or a list of parts")
    texts = []
    for part in fields.children(name, high=MAX_PARTS):
        kind = part.text("type", max_length=64)
        if kind not in TEXT_PARTS:
            if kind is None:
                raise part.wrong("type", "'text'")
            raise UnsupportedFieldError(
                part.at("type"), why=f"{kind[:40]!r} is no text", next_step="send text parts only"
            )
        text = part.text(TEXT_PARTS[kind])
        if text is None:
            raise part.wrong(TEXT_PARTS[kind], "a string")
        texts.append(text)
    return "".join(texts)


def tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call as the chat interface writes it."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def _read_message(fields: Fields) -> ChatMessage:
    role = read_role(fields)
    content = read_content(fields, "content")
    if role != "assistant":
        if content is None:
            raise fields.wrong("content", "a string or a list of parts")
    else:
        fields.refuse({"audio": "text only", "function_call": "use tool_calls"})
        content = content or fields.text("refusal")
    calls = _read_calls(fields) if role == "assistant" else ()
    if role == "assistant" and content is None and not calls:
        raise fields.wrong("content", "a string, or tool_calls beside it")
    call_id = fields.text("tool_call_id", max_length=MAX_ID_LENGTH)
    if role == "tool" and call_id is None:
        raise fields.wrong("tool_call_id", "the id of the call that this answers")
    return ChatMessage(
        role=role,
        content=content or "",
        name=fields.text("name", max_length=MAX_ID_LENGTH),
        tool_call_id=call_id,
        tool_calls=calls,
    )


def _read_calls(fields: Fields) -> tuple[Mapping[str, object], ...]:
    calls = []
    for call in fields.children("tool_calls", high=MAX_CALLS):
        call.choice("type", ("function",))
        function = call.child("function")
        if function is None:
            raise call.wrong("function", "an object with name and arguments")
        name, arguments = (
            function.text("name", max_length=MAX_ID_LENGTH),
            function.text("arguments"),
        )
        if name is None or arguments is None:
            raise function.wrong("name" if name is None else "arguments", "a string")
        if arguments.strip():
            function.json_text("arguments")  # templates show it as an object
        call_id = call.text("id", max_length=MAX_ID_LENGTH) or ""
        calls.append(tool_call(call_id, name, arguments))
    return tuple(calls)
