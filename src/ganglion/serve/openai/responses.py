"""Responses: `/v1/responses` without state: text or items in, the model's items out.

Called by `routes`. Knows the field names of that interface; `response_answer` knows the shapes of its answers. Nothing is
stored, so a conversation is sent whole each time.
"""

from typing import Any

from ganglion.errors import FieldError, UnsupportedFieldError
from ganglion.generation import ChatMessage, GenerateRequest, Grammar
from ganglion.serve.openai.answer import Prepared, StreamOptions
from ganglion.serve.openai.catalog import Catalog
from ganglion.serve.openai.chat import choose_grammar
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.grammar import ANY_OBJECT, read_schema
from ganglion.serve.openai.messages import (
    MAX_ID_LENGTH,
    MAX_MESSAGES,
    pictures_of,
    read_content,
    read_role,
    tool_call,
)
from ganglion.serve.openai.response_answer import ResponseAnswer
from ganglion.serve.openai.sampling import MAX_LOGPROBS, read_sampling, read_tenant, room_for
from ganglion.serve.openai.tools import RESPONSES_SHAPE, read_tools

UNSUPPORTED = {
    "previous_response_id": "nothing is stored: send the whole conversation",
    "conversation": "nothing is stored: send the whole conversation",
    "store": "nothing is stored",
    "background": "answers come while the client waits",
    "prompt": "prompt templates are not kept here",
    "reasoning": "models here do not take it",
    "max_tool_calls": "functions are called by the client",
    "context_management": "nothing is stored",
    "moderation": "nothing is moderated",
    "add_special_tokens": "templates write their own",
}
LOGPROBS = "message.output_text.logprobs"
# Asked for by agents as a matter of course; models here have none of it, so leaving it out is the true answer.
INCLUDES = (LOGPROBS, "reasoning.encrypted_content")
MAX_INCLUDES = 16


class ResponseReader:
    """Makes a checked request of a body."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def read(self, body: object, created_s: int) -> Prepared:
        """Raises FieldError, UnsupportedFieldError, ApiError."""
        fields = Fields(body)
        fields.refuse(UNSUPPORTED)
        if fields.choice("truncation", ("disabled", "auto")) == "auto":
            raise UnsupportedFieldError(
                "truncation", why="a prompt is never cut", next_step="shorten the input"
            )
        chosen = self._catalog.choose(fields)
        messages = _read_instructions(fields) + _read_input(fields)
        pictures = pictures_of(messages, chosen.spec)
        tools = read_tools(fields, RESPONSES_SHAPE, chosen.spec.family)
        grammar = choose_grammar(fields, tools, _read_format(fields))
        prompt = chosen.tokenizer.chat(messages, tools=tools.shown)
        max_tokens = room_for(
            fields, ("max_output_tokens",), chosen.spec, num_prompt=len(prompt), param="input"
        )
        sampling = read_sampling(
            fields, chosen.spec, max_tokens=max_tokens, grammar=grammar,
            num_logprobs=_read_logprobs(fields),
        )  # fmt: skip
        request = GenerateRequest(
            model=chosen.spec.name,
            prompt=prompt,
            sampling=sampling,
            tenant=read_tenant(fields),
            pictures=pictures,
        )
        answer = ResponseAnswer(
            chosen, request, tools=tools, told=_told(fields, request), created_s=created_s
        )
        return Prepared(
            answer_id=answer.answer_id,
            requests=(request,),
            answer=answer,
            is_streamed=StreamOptions.read(fields).is_on,
            unknown=fields.unknown(),
            has_done_mark=False,
        )


def _read_instructions(fields: Fields) -> tuple[ChatMessage, ...]:
    text = fields.text("instructions")
    return () if text is None else (ChatMessage(role="system", content=text),)


def _read_input(fields: Fields) -> tuple[ChatMessage, ...]:
    value = fields.raw("input")
    if isinstance(value, str):
        return (ChatMessage(role="user", content=value),)
    items = fields.children("input", low=1, high=MAX_MESSAGES)
    if not items:
        raise fields.wrong("input", f"a string or a list of 1..{MAX_MESSAGES} items")
    messages: list[ChatMessage] = []
    for item in items:
        message = _read_item(item)
        if message is None:
            continue
        last = messages[-1] if messages else None
        if last is not None and message.tool_calls and last.role == "assistant":
            # What the model wrote as one message comes back as items: text, call, call.
            messages[-1] = ChatMessage(
                role="assistant",
                content=last.content,
                parts=last.parts,
                tool_calls=(*last.tool_calls, *message.tool_calls),
            )
        else:
            messages.append(message)
    return tuple(messages)


def _read_item(item: Fields) -> ChatMessage | None:
    """A message, a call, or what a call gave; None for what models here do not read: the reasoning of others."""
    match item.text("type", max_length=64):
        case None | "message":
            content = read_content(item, "content")
            if content is None:
                raise item.wrong("content", "a string or a list of parts")
            return ChatMessage(role=read_role(item), content=content.text, parts=content.parts)
        case "function_call":
            call_id, name = _text(item, "call_id"), _text(item, "name")
            arguments = item.text("arguments")
            if arguments is None:
                raise item.wrong("arguments", "a string")
            if arguments.strip():
                item.json_text("arguments")  # templates show it as an object
            call = tool_call(call_id, name, arguments)
            return ChatMessage(role="assistant", content="", tool_calls=(call,))
        case "function_call_output":
            output = read_content(item, "output")
            if output is None:
                raise item.wrong("output", "a string or a list of parts")
            return ChatMessage(
                role="tool",
                content=output.text,
                parts=output.parts,
                tool_call_id=_text(item, "call_id"),
            )
        case "reasoning":
            return None
        case kind:
            raise UnsupportedFieldError(
                item.at("type"),
                why=f"{kind[:40]!r} is no message and no function",
                next_step="send message, function_call and function_call_output items",
            )


def _text(item: Fields, name: str) -> str:
    value = item.text(name, max_length=MAX_ID_LENGTH)
    if not value:
        raise item.wrong(name, "a string")
    return value


def _read_format(fields: Fields) -> Grammar | None:
    text = fields.child("text")
    if text is None:
        return None
    text.refuse({"verbosity": "models here do not take it"})
    form = text.child("format")
    if form is None:
        return None
    match form.choice("type", ("text", "json_object", "json_schema")):
        case "json_schema":
            return read_schema(form)
        case "json_object":
            return ANY_OBJECT
        case "text":
            return None
        case _:
            raise form.wrong("type", "'text' | 'json_object' | 'json_schema'")


def _read_logprobs(fields: Fields) -> int | None:
    num_top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    includes = fields.rows("include", high=MAX_INCLUDES) or []
    for index, name in enumerate(includes):
        if name not in INCLUDES:
            raise FieldError(
                f"include[{index}]",
                expected=" | ".join(map(repr, INCLUDES)),
                got=repr(name)[:60],
            )
    return (num_top or 0) if LOGPROBS in includes or num_top else None


def _told(fields: Fields, request: GenerateRequest) -> dict[str, Any]:
    """What a response says of its request."""
    text = fields.raw("text") or {}
    return {
        "instructions": fields.raw("instructions"),
        "max_output_tokens": fields.raw("max_output_tokens"),
        "metadata": fields.raw("metadata") or {},
        "parallel_tool_calls": fields.raw("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": request.sampling.temperature,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": fields.raw("tool_choice") or "auto",
        "tools": fields.raw("tools") or [],
        "top_logprobs": request.sampling.num_logprobs or 0,
        "top_p": request.sampling.top_p,
        "truncation": "disabled",
    }
