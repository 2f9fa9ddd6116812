"""Answer: what one checked request will run, and who makes a body or events of what comes back.

Made by the readers of requests, used by `endpoint`. Knows neither sockets nor the service.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from ganglion.generation import GenerateRequest, Usage
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.run import Item


class Answer(Protocol):
    """Makes of generated items what a client reads: bodies of server-sent events, or one whole body."""

    def add(self, item: Item) -> list[dict[str, Any]]:
        """The events of one more item."""
        ...

    def close(self) -> list[dict[str, Any]]:
        """The events after the last item."""
        ...

    def fail(self, error: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The events instead of what is missing; `error` is OpenAI's `{"message", "type", "param", "code"}`."""
        ...

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed, after the last item."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A checked request: what to generate and who makes an answer of it."""

    answer_id: str
    requests: tuple[GenerateRequest, ...]
    answer: Answer
    is_streamed: bool
    unknown: set[str]  # names of fields that mean nothing here
    has_done_mark: bool = True  # the stream ends with "data: [DONE]"
    num_at_once: int | None = None  # requests in the engine; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """Does the answer stream, and does the stream end with its usage?"""

    is_on: bool
    has_usage: bool

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """`stream` and `stream_options.include_usage`."""
        is_on = bool(fields.flag("stream"))
        options = fields.child("stream_options")
        if options is None:
            return cls(is_on=is_on, has_usage=False)
        if not is_on:
            raise fields.wrong("stream_options", "nothing, as `stream` is not true")
        options.flag("include_obfuscation")  # padding against eavesdroppers: there is none here
        return cls(is_on=is_on, has_usage=bool(options.flag("include_usage")))


def usage_body(usage: Usage) -> dict[str, Any]:
    """Tokens as chat and completions count them."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


def sum_usage(usages: list[Usage]) -> Usage:
    """Of several requests together."""
    return Usage(
        num_prompt_tokens=sum(usage.num_prompt_tokens for usage in usages),
        num_cached_tokens=sum(usage.num_cached_tokens for usage in usages),
        num_completion_tokens=sum(usage.num_completion_tokens for usage in usages),
    )
