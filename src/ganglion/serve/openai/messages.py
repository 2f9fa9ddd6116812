"""Messages: a conversation as the chat interface writes it, checked, as plain ChatMessages.

Called by `chat`; `responses` makes the same of its items. Knows roles and parts of content: text, and pictures as the
files that they are.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ganglion.errors import FieldError, UnsupportedFieldError
from ganglion.generation import ChatMessage, LanguageSpec, Picture
from ganglion.serve.openai.fields import Fields
from ganglion.units import MIB

MAX_MESSAGES = 2_048
MAX_PARTS = 256
MAX_CALLS = 128
MAX_ID_LENGTH = 256
# "developer" is OpenAI's newer word for "system"; templates know the older one.
ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
MAX_PICTURES = 32
MAX_PICTURE_BYTES = 8 * MIB
DATA_URL = re.compile(r"data:image/(png|jpe?g|webp);base64,", re.IGNORECASE)
SEEING_ROLES = ("user", "tool")
DETAILS = (
    "auto",
    "low",
    "high",
    "original",
)  # only "low" is read differently: one look at the whole
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True, slots=True)
class Content:
    """All text of a message, and its parts in their order where there are pictures among them."""

    text: str
    parts: tuple[str | Picture, ...] = ()


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


def read_content(fields: Fields, name: str) -> Content | None:
    """A string, or parts; None when absent. Raises UnsupportedFieldError for sound, files and pictures elsewhere."""
    value = fields.raw(name)
    if value is None:
        return None
    if isinstance(value, str):
        return Content(value)
    if not isinstance(value, list):
        raise fields.wrong(name, "a string or a list of parts")
    parts = tuple(_read_part(part) for part in fields.children(name, high=MAX_PARTS))
    text = "".join(part for part in parts if isinstance(part, str))
    return Content(text, () if all(isinstance(part, str) for part in parts) else parts)


def pictures_of(messages: Sequence[ChatMessage], spec: LanguageSpec) -> tuple[Picture, ...]:
    """All pictures of a conversation, for a model that takes them. Raises UnsupportedFieldError, FieldError."""
    found: list[Picture] = []
    for message in messages:
        for part in message.parts:
            if not isinstance(part, Picture):
                continue
            if not spec.has_vision:
                raise UnsupportedFieldError(
                    part.field,
                    why=f"{spec.name} takes text only",
                    next_step="ask a model that takes pictures (GET /v1/models)",
                )
            if message.role not in SEEING_ROLES:
                raise UnsupportedFieldError(
                    part.field,
                    why=f"a picture in a message of role {message.role!r}",
                    next_step="put it into a message of the user",
                )
            found.append(part)
    if len(found) > MAX_PICTURES:
        raise FieldError(
            found[MAX_PICTURES].field,
            expected=f"at most {MAX_PICTURES} pictures in a request",
            got=f"{len(found)}",
        )
    return tuple(found)


def _read_part(part: Fields) -> str | Picture:
    kind = part.text("type", max_length=64)
    if kind is None:
        raise part.wrong("type", "'text'")
    if kind == "image_url":
        inner = part.child("image_url")
        if inner is None:
            raise part.wrong("image_url", "an object with url")
        return _read_picture(inner, "url")
    if kind == "input_image":
        part.refuse({"file_id": "nothing is stored: send a data: URL"})
        return _read_picture(part, "image_url")
    if kind not in TEXT_PARTS:
        raise UnsupportedFieldError(
            part.at("type"),
            why=f"{kind[:40]!r} is neither text nor a picture",
            next_step="send text and pictures only",
        )
    text = part.text(TEXT_PARTS[kind])
    if text is None:
        raise part.wrong(TEXT_PARTS[kind], "a string")
    return text


def _read_picture(fields: Fields, name: str) -> Picture:
    """The file in a data: URL. Whether it is a picture is seen where it is opened."""
    url = fields.text(name)
    expected = "a data: URL: data:image/png;base64,... (or jpeg, webp)"
    if url is None:
        raise fields.wrong(name, expected)
    if url[:8].lower().startswith(("http://", "https://")):
        raise UnsupportedFieldError(
            fields.at(name),
            why="nothing is fetched from the network",
            next_step="send the picture itself, as data:image/png;base64,...",
        )
    head = DATA_URL.match(url)
    if head is None:
        raise FieldError(fields.at(name), expected=expected, got=repr(url[:40]))
    if (len(url) - head.end()) // 4 * 3 > MAX_PICTURE_BYTES:
        raise FieldError(
            fields.at(name),
            expected=f"a picture of at most {MAX_PICTURE_BYTES} bytes",
            got=f"{(len(url) - head.end()) // 4 * 3}",
        )
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise FieldError(
            fields.at(name), expected="base64 after the comma", got=str(error)[:100]
        ) from None
    detail = fields.choice("detail", DETAILS)
    return Picture(data=data, field=fields.at(name), is_coarse=detail == "low")


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
        refusal = fields.text("refusal")
        if refusal and (content is None or not (content.text or content.parts)):
            content = Content(refusal)
    calls = _read_calls(fields) if role == "assistant" else ()
    if role == "assistant" and content is None and not calls:
        raise fields.wrong("content", "a string, or tool_calls beside it")
    call_id = fields.text("tool_call_id", max_length=MAX_ID_LENGTH)
    if role == "tool" and call_id is None:
        raise fields.wrong("tool_call_id", "the id of the call that this answers")
    return ChatMessage(
        role=role,
        content="" if content is None else content.text,
        parts=() if content is None else content.parts,
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
