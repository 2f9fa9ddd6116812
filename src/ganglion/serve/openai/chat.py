"""Chat: `/v1/chat/completions`: a conversation in, the assistant's next messages out, with tools and structured output.

Called by `routes`. Knows the field names of that interface and the shapes of its answers.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ganglion.errors import UnsupportedFieldError
from ganglion.generation import (
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    TextDelta,
    Usage,
)
from ganglion.serve.openai.answer import Prepared, StreamOptions, sum_usage, usage_body
from ganglion.serve.openai.catalog import Catalog, Chosen
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.grammar import read_format, read_structure
from ganglion.serve.openai.logprobs import LogprobWriter
from ganglion.serve.openai.messages import pictures_of, read_messages, tool_call
from ganglion.serve.openai.run import Item
from ganglion.serve.openai.sampling import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    read_sampling,
    read_tenant,
    room_for,
)
from ganglion.serve.openai.tool_text import CallBegun, CallGrown, Content, TextParser
from ganglion.serve.openai.tools import CHAT_SHAPE, ToolPlan, read_tools

UNSUPPORTED = {
    "functions": "it is the old form of tools",
    "function_call": "it is the old form of tool_choice",
    "audio": "text only",
    "store": "nothing is stored",
    "reasoning_effort": "models here do not take it",
    "verbosity": "models here do not take it",
    "web_search_options": "nothing is searched",
    "chat_template": "templates are the model's own",
    "chat_template_kwargs": "templates take messages and tools only",
    "continue_final_message": "the assistant always begins a message of its own",
    "documents": "put them into a message",
    "echo": "use /v1/completions",
    "add_special_tokens": "templates write their own",
}
ID_PREFIX = "chatcmpl-"


class ChatReader:
    """Makes a checked request of a body."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def read(self, body: object, created_s: int) -> Prepared:
        """Raises FieldError, UnsupportedFieldError, ApiError."""
        fields = Fields(body)
        fields.refuse(UNSUPPORTED)
        _check_modalities(fields)
        chosen = self._catalog.choose(fields)
        messages = read_messages(fields)
        pictures = pictures_of(messages, chosen.spec)
        tools = read_tools(fields, CHAT_SHAPE, chosen.spec.family)
        grammar = choose_grammar(fields, tools, read_format(fields))
        stream = StreamOptions.read(fields)
        prompt = chosen.tokenizer.chat(messages, tools=tools.shown)
        max_tokens = room_for(
            fields, ("max_completion_tokens", "max_tokens"), chosen.spec,
            num_prompt=len(prompt), param="messages",
        )  # fmt: skip
        sampling = read_sampling(
            fields, chosen.spec, max_tokens=max_tokens, grammar=grammar,
            num_logprobs=_read_logprobs(fields),
        )  # fmt: skip
        num_choices = fields.integer("n", 1, MAX_CHOICES) or 1
        request = GenerateRequest(
            model=chosen.spec.name,
            prompt=prompt,
            sampling=sampling,
            num_choices=num_choices,
            tenant=read_tenant(fields),
            pictures=pictures,
        )
        answer = ChatAnswer(chosen, request, tools=tools, stream=stream, created_s=created_s)
        return Prepared(
            answer_id=answer.answer_id,
            requests=(request,),
            answer=answer,
            is_streamed=stream.is_on,
            unknown=fields.unknown(),
        )


def choose_grammar(fields: Fields, tools: ToolPlan, form: Grammar | None) -> Grammar | None:
    """What binds: forced calls, or the format of the answer (here also vLLM's `structured_outputs`), or either."""
    structure = read_structure(fields)
    if structure is not None and form is not None:
        raise fields.wrong("structured_outputs", "nothing beside a format of the answer")
    form = form or structure
    if form is None or tools.grammar is not None:  # forced calls leave no content to be formatted
        return tools.grammar
    if tools.beside is None:
        return form
    if form.kind is not GrammarKind.JSON_SCHEMA:
        raise UnsupportedFieldError(
            fields.at("structured_outputs"),
            why="beside tools that may be called, an answer can be bound to JSON only",
            next_step="give a JSON Schema, or set tool_choice to 'none'",
        )
    return tools.beside(form)


class ChatAnswer:
    """Choices as `chat.completion` or `chat.completion.chunk` objects."""

    def __init__(
        self,
        chosen: Chosen,
        request: GenerateRequest,
        *,
        tools: ToolPlan,
        stream: StreamOptions,
        created_s: int,
    ) -> None:
        self.answer_id = ID_PREFIX + secrets.token_hex(16)
        self._stream, self._writer = stream, LogprobWriter(chosen.tokenizer)
        self._has_logprobs = request.sampling.num_logprobs is not None
        self._head = {"id": self.answer_id, "created": created_s, "model": chosen.spec.name}
        self._choices = [
            ChatChoice(tools.parser(), tools.max_calls) for _ in range(request.num_choices)
        ]
        self._usages: list[Usage] = []

    def add(self, item: Item) -> list[dict[str, Any]]:
        """A chunk for each new piece."""
        generated = item[1]
        if isinstance(generated, Usage):
            self._usages.append(generated)
            return []
        if not isinstance(generated, TextDelta):
            return []
        choice = self._choices[generated.choice]
        is_first = not choice.is_begun
        changes = choice.take(generated)
        logprobs = None
        if self._has_logprobs:
            content = self._writer.chat(generated.logprobs)
            choice.logprobs += content
            logprobs = {"content": content, "refusal": None} if content else None
        if is_first:
            first = changes.pop(0) if changes and "content" in changes[0] else {"content": ""}
            changes.insert(0, {"role": "assistant"} | first)
        if not changes and (logprobs is not None or generated.finish is not None):
            changes = [{}]
        chunks = [self._chunk(generated.choice, change) for change in changes]
        if chunks:
            last = chunks[-1]["choices"][0]
            last["logprobs"] = logprobs
            last["finish_reason"] = choice.finish
        return chunks

    def close(self) -> list[dict[str, Any]]:
        """The usage, where it was asked for."""
        if not self._stream.has_usage:
            return []
        usage = usage_body(sum_usage(self._usages))
        return [self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage}]

    def fail(self, error: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One event that openai's client raises."""
        return [{"error": dict(error)}]

    def whole(self) -> dict[str, Any]:
        """All choices, in order."""
        return self._head | {
            "object": "chat.completion",
            "choices": [self._body(*pair) for pair in enumerate(self._choices)],
            "usage": usage_body(sum_usage(self._usages)),
        }

    def _chunk(self, index: int, change: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": change, "logprobs": None, "finish_reason": None}
        usage = {"usage": None} if self._stream.has_usage else {}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]} | usage

    def _body(self, index: int, choice: "ChatChoice") -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
        if choice.calls:
            message["content"] = choice.content or None
            message["tool_calls"] = [
                tool_call(call.call_id, call.name, call.arguments) for call in choice.calls
            ]
        logprobs = {"content": choice.logprobs, "refusal": None} if self._has_logprobs else None
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop,  # as in vLLM: the stop string or token that ended it
        }


@dataclass(slots=True)
class ChatCall:
    """One tool call as far as it has come."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True, eq=False)
class ChatChoice:
    """One message as far as it has come."""

    parser: TextParser
    max_calls: int | None
    content: str = ""
    calls: list[ChatCall] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    stop: str | int | None = None
    num_calls: int = 0  # with those beyond `max_calls`, which are dropped
    is_begun: bool = False

    def take(self, delta: TextDelta) -> list[dict[str, Any]]:
        """What `delta` changes, as the `delta` objects of chunks."""
        self.is_begun = True
        parts = self.parser.feed(delta.text)
        if delta.finish is not None:
            parts += self.parser.end()
        changes = [change for part in parts if (change := self._change(part)) is not None]
        if delta.finish is not None:
            is_call = bool(self.calls) and delta.finish is FinishReason.STOP
            self.finish = "tool_calls" if is_call else str(delta.finish)
            self.stop = delta.stop
        return changes

    def _change(self, part: Content | CallBegun | CallGrown) -> dict[str, Any] | None:
        if isinstance(part, Content):
            self.content += part.text
            return {"content": part.text}
        self.num_calls += isinstance(part, CallBegun)
        if self.max_calls is not None and self.num_calls > self.max_calls:
            return None
        if isinstance(part, CallBegun):
            call = ChatCall(f"call_{secrets.token_hex(12)}", part.name)
            self.calls.append(call)
            body = tool_call(call.call_id, call.name, "")
        else:
            self.calls[-1].arguments += part.arguments
            body = {"function": {"arguments": part.arguments}}
        return {"tool_calls": [{"index": len(self.calls) - 1} | body]}


def _check_modalities(fields: Fields) -> None:
    if fields.raw("modalities") not in (None, ["text"]):
        raise UnsupportedFieldError("modalities", why="text only", next_step="leave modalities out")


def _read_logprobs(fields: Fields) -> int | None:
    num_top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    is_on = bool(fields.flag("logprobs"))
    if num_top is not None and not is_on:
        raise fields.wrong("top_logprobs", "nothing, as `logprobs` is not true")
    return (num_top or 0) if is_on else None
