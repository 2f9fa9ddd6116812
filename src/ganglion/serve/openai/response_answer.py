"""Response answer: generated text as the items and typed events of `/v1/responses`.

Made by `responses`. An answer is a row of items: a message for text, a function_call for each call; one is open at a time.
"""

import secrets
from collections.abc import Mapping
from typing import Any

from ganglion.generation import FinishReason, GenerateRequest, TextDelta, Usage
from ganglion.serve.openai.catalog import Chosen
from ganglion.serve.openai.logprobs import LogprobWriter
from ganglion.serve.openai.run import Item
from ganglion.serve.openai.tool_text import CallBegun, CallGrown, Content, Part
from ganglion.serve.openai.tools import ToolPlan

Event = dict[str, Any]
IN_PROGRESS, COMPLETED, INCOMPLETE, FAILED = "in_progress", "completed", "incomplete", "failed"


class ResponseAnswer:
    """One response as it grows. Every event has the next `sequence_number`."""

    def __init__(
        self,
        chosen: Chosen,
        request: GenerateRequest,
        *,
        tools: ToolPlan,
        told: Mapping[str, Any],
        created_s: int,
    ) -> None:
        self.answer_id = _new_id("resp")
        self._head = {
            "id": self.answer_id, "object": "response", "created_at": created_s, "model": chosen.spec.name,
        }  # fmt: skip
        self._told, self._writer = dict(told), LogprobWriter(chosen.tokenizer)
        self._parser, self._max_calls = tools.parser(), tools.max_calls
        self._has_logprobs = request.sampling.num_logprobs is not None
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the last of the items, while it grows
        self._usage: Usage | None = None
        self._is_cut = self._is_begun = False
        self._num_events = self._num_calls = 0

    def add(self, item: Item) -> list[Event]:
        """The events of one more piece."""
        generated, events = item[1], self._begin()
        if isinstance(generated, Usage):
            self._usage = generated
        elif isinstance(generated, TextDelta):
            logprobs = self._writer.chat(generated.logprobs) if self._has_logprobs else []
            for part in self._parser.feed(generated.text):
                events += self._take(part, logprobs)
                logprobs = []  # told once, with the first text after them
            if generated.finish is not None:
                for part in self._parser.end():
                    events += self._take(part, [])
                self._is_cut = generated.finish is FinishReason.LENGTH
                events += self._close_item(INCOMPLETE if self._is_cut else COMPLETED)
        return events

    def close(self) -> list[Event]:
        """The whole response once more."""
        kind = "response.incomplete" if self._is_cut else "response.completed"
        return [*self._begin(), self._event(kind, response=self.whole())]

    def fail(self, error: Mapping[str, Any]) -> list[Event]:
        """The response as far as it came, and why it ended."""
        events = [*self._begin(), *self._close_item(INCOMPLETE)]
        told = {"code": "server_error", "message": error["message"]}
        response = self._body(FAILED) | {"error": told}
        return [*events, self._event("response.failed", response=response)]

    def whole(self) -> dict[str, Any]:
        """The response with all its items."""
        return self._body(INCOMPLETE if self._is_cut else COMPLETED)

    def _begin(self) -> list[Event]:
        if self._is_begun:
            return []
        self._is_begun = True
        body = self._body(IN_PROGRESS)
        return [
            self._event("response.created", response=body),
            self._event("response.in_progress", response=body),
        ]

    def _take(self, part: Part, logprobs: list[dict[str, Any]]) -> list[Event]:
        if isinstance(part, Content):
            return self._take_text(part.text, logprobs)
        events: list[Event] = []
        if isinstance(part, CallBegun):
            events += self._close_item(COMPLETED)
            self._num_calls += 1
        if self._max_calls is not None and self._num_calls > self._max_calls:
            return events
        if isinstance(part, CallBegun):
            call = {"type": "function_call", "id": _new_id("fc"), "call_id": _new_id("call")}
            return events + self._open_item(call | {"name": part.name, "arguments": ""})
        assert isinstance(part, CallGrown), part
        assert self._open is not None, "arguments of no call"
        self._open["arguments"] += part.arguments
        return [self._item_event("response.function_call_arguments.delta", delta=part.arguments)]

    def _take_text(self, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open["type"] != "message":
            events += self._close_item(COMPLETED)
            part = self._new_part()
            message = {"type": "message", "id": _new_id("msg"), "role": "assistant"}
            events += self._open_item(message | {"content": []})
            events.append(
                self._item_event("response.content_part.added", content_index=0, part=part)
            )
            assert self._open is not None, "it was opened"
            self._open["content"] = [self._new_part()]
        assert self._open is not None, "it was opened"
        part = self._open["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        kind = "response.output_text.delta"
        events.append(self._item_event(kind, content_index=0, delta=text, logprobs=logprobs))
        return events

    def _open_item(self, item: dict[str, Any]) -> list[Event]:
        self._open = item | {"status": IN_PROGRESS}
        self._items.append(self._open)
        shown = dict(self._open)
        index = len(self._items) - 1
        return [self._event("response.output_item.added", output_index=index, item=shown)]

    def _close_item(self, status: str) -> list[Event]:
        item = self._open
        if item is None:
            return []
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            text, logprobs = part["text"], part["logprobs"]
            done = [
                self._item_event(
                    "response.output_text.done", content_index=0, text=text, logprobs=logprobs
                ),
                self._item_event("response.content_part.done", content_index=0, part=part),
            ]
        else:
            kind = "response.function_call_arguments.done"
            done = [self._item_event(kind, name=item["name"], arguments=item["arguments"])]
        index = len(self._items) - 1
        self._open = None
        return [*done, self._event("response.output_item.done", output_index=index, item=item)]

    def _new_part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}

    def _item_event(self, kind: str, **fields: Any) -> Event:
        assert self._open is not None, f"{kind} of no item"
        index = len(self._items) - 1
        return self._event(kind, item_id=self._open["id"], output_index=index, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        number = self._num_events
        self._num_events += 1
        return {"type": kind, "sequence_number": number, **fields}

    def _body(self, status: str) -> dict[str, Any]:
        reason = {"reason": "max_output_tokens"} if status == INCOMPLETE else None
        return (
            self._head
            | self._told
            | {
                "status": status,
                "error": None,
                "incomplete_details": reason,
                "output": [dict(item) for item in self._items],
                "usage": None if self._usage is None else _usage_body(self._usage),
            }
        )


def _usage_body(usage: Usage) -> dict[str, Any]:
    """Tokens as responses count them. All that was computed of a prompt stays in pages for a while."""
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.num_cached_tokens,
            "cache_write_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        },
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
    }


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"
