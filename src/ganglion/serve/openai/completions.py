"""Completions: `/v1/completions`: texts or token ids in, their continuations out, with echo and logprobs.

Called by `routes`. Knows the field names of that interface and the shapes of its answers.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ganglion.errors import FieldError
from ganglion.generation import GenerateRequest, LanguageSpec, PromptScored, TextDelta, Usage
from ganglion.serve.openai.answer import Prepared, StreamOptions, sum_usage, usage_body
from ganglion.serve.openai.catalog import Catalog, Chosen
from ganglion.serve.openai.fields import Fields
from ganglion.serve.openai.grammar import read_structure
from ganglion.serve.openai.logprobs import LogprobWriter
from ganglion.serve.openai.run import Item
from ganglion.serve.openai.sampling import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    read_sampling,
    read_tenant,
    read_token,
    room_for,
)
from ganglion.serve.openai.tokens import encode
from ganglion.wire import describe

MAX_PROMPTS = 128
DEFAULT_TOKENS = 16  # OpenAI's
UNSUPPORTED = {"suffix": "nothing is filled in between", "prompt_embeds": "tokens only"}
ID_PREFIX = "cmpl-"


class CompletionReader:
    """Makes a checked request of a body."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def read(self, body: object, created_s: int) -> Prepared:
        """Raises FieldError, UnsupportedFieldError, ApiError."""
        fields = Fields(body)
        fields.refuse(UNSUPPORTED)
        chosen = self._catalog.choose(fields)
        prompts = _read_prompts(fields, chosen)
        num_choices = fields.integer("n", 1, MAX_CHOICES) or 1
        if len(prompts) * num_choices > MAX_PROMPTS:
            raise fields.wrong("n", f"at most {MAX_PROMPTS} choices of all prompts together")
        if (fields.integer("best_of", 1, MAX_CHOICES) or num_choices) != num_choices:
            raise fields.wrong("best_of", "the same as n: nothing is chosen among them")
        is_echo = bool(fields.flag("echo"))
        num_logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
        stream = StreamOptions.read(fields)
        requests = []
        for prompt in prompts:
            max_tokens = room_for(
                fields, ("max_tokens",), chosen.spec, num_prompt=len(prompt), param="prompt",
                low=0, default=min(DEFAULT_TOKENS, max(1, chosen.spec.max_tokens - len(prompt))),
            )  # fmt: skip
            sampling = read_sampling(
                fields, chosen.spec, max_tokens=max(max_tokens, 1),
                grammar=read_structure(fields), num_logprobs=num_logprobs,
            )  # fmt: skip
            requests.append(
                GenerateRequest(
                    model=chosen.spec.name,
                    prompt=prompt,
                    sampling=sampling,
                    num_choices=num_choices,
                    tenant=read_tenant(fields),
                    num_prompt_logprobs=num_logprobs if is_echo else None,
                )
            )
        has_text = fields.raw("max_tokens") != 0
        answer = CompletionAnswer(
            chosen, requests, echoes=_echo_texts(fields, chosen, prompts) if is_echo else None,
            has_text=has_text, stream=stream, created_s=created_s,
        )  # fmt: skip
        return Prepared(
            answer_id=answer.answer_id,
            requests=tuple(requests),
            answer=answer,
            is_streamed=stream.is_on,
            unknown=fields.unknown(),
        )


class CompletionAnswer:
    """Continuations as `text_completion` objects. Choice c of prompt p has index p x n + c."""

    def __init__(
        self,
        chosen: Chosen,
        requests: list[GenerateRequest],
        *,
        echoes: list[str] | None,
        has_text: bool,
        stream: StreamOptions,
        created_s: int,
    ) -> None:
        self.answer_id = ID_PREFIX + secrets.token_hex(16)
        self._requests, self._echoes = requests, echoes
        self._has_text, self._stream = has_text, stream
        self._writer = LogprobWriter(chosen.tokenizer)
        self._head = {
            "id": self.answer_id,
            "object": "text_completion",
            "created": created_s,
            "model": chosen.spec.name,
        }
        self._choices = [_Choice() for request in requests for _ in range(request.num_choices)]
        self._usages: list[Usage] = []

    def add(self, item: Item) -> list[dict[str, Any]]:
        """A chunk for each new piece of text."""
        source, generated = item
        first = source * self._requests[0].num_choices
        if isinstance(generated, Usage):
            self._usages.append(generated)
            return []
        if isinstance(generated, PromptScored):
            for index in range(first, first + self._requests[source].num_choices):
                self._choices[index].scored = generated
            return []
        assert isinstance(generated, TextDelta), "nothing else was asked for"
        return [self._chunk(source, first + generated.choice, generated)]

    def close(self) -> list[dict[str, Any]]:
        """The usage, where it was asked for."""
        if not self._stream.has_usage:
            return []
        return [self._head | {"choices": [], "usage": usage_body(self._usage())}]

    def fail(self, error: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One event that openai's client raises."""
        return [{"error": dict(error)}]

    def whole(self) -> dict[str, Any]:
        """All choices, in order."""
        choices = [choice.body(index) for index, choice in enumerate(self._choices)]
        return self._head | {"choices": choices, "usage": usage_body(self._usage())}

    def _chunk(self, source: int, index: int, delta: TextDelta) -> dict[str, Any]:
        choice, request = self._choices[index], self._requests[source]
        text, logprobs = "", None
        if not choice.is_begun and self._echoes is not None:
            text = self._echoes[source]
            if choice.scored is not None:
                scored = choice.scored.logprobs
                logprobs = self._writer.completion(scored, request.prompt, 0)
            choice.offset = len(text)
        choice.is_begun = True
        if self._has_text:
            text += delta.text
            if request.sampling.num_logprobs is not None and delta.token_ids:
                new = self._writer.completion(delta.logprobs, delta.token_ids, choice.offset)
                logprobs = _joined(logprobs, new)
                choice.offset += self._writer.num_characters(delta.token_ids)
        choice.text += text
        choice.logprobs = _joined(choice.logprobs, logprobs)
        if delta.finish is not None:
            choice.finish = str(delta.finish) if self._has_text else "length"
            choice.stop = delta.stop
        body = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}
        usage = {"usage": None} if self._stream.has_usage else {}
        return self._head | {"choices": [body]} | usage

    def _usage(self) -> Usage:
        usage = sum_usage(self._usages)
        if self._has_text:
            return usage
        return Usage(
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_completion_tokens=0,
        )


@dataclass(slots=True, eq=False)
class _Choice:
    """One continuation as far as it has come."""

    text: str = ""
    logprobs: dict[str, Any] | None = None
    offset: int = 0  # of the next token in the text
    finish: str | None = None
    stop: str | int | None = None
    scored: PromptScored | None = None
    is_begun: bool = False

    def body(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "text": self.text,
            "logprobs": self.logprobs,
            "finish_reason": self.finish,
            "stop_reason": self.stop,  # as in vLLM: the stop string or token that ended it
        }


def _joined(old: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, Any] | None:
    if old is None or new is None:
        return old or new
    return {name: old[name] + new[name] for name in old}


def _read_prompts(fields: Fields, chosen: Chosen) -> list[tuple[int, ...]]:
    """A string, a list of strings, a list of token ids, or a list of those lists."""
    value, spec = fields.raw("prompt"), chosen.spec
    fields.flag("add_special_tokens")  # of texts; token ids are taken as they are
    expected = f"a string, token ids, or a list of at most {MAX_PROMPTS} of either"
    if isinstance(value, str):
        return [_encoded(value, "prompt", fields, chosen)]
    if not isinstance(value, list) or not value:
        raise fields.wrong("prompt", expected)
    if isinstance(value[0], int | float):
        return [_read_ids(value, "prompt", spec)]
    if len(value) > MAX_PROMPTS:
        raise fields.wrong("prompt", expected)
    prompts = []
    for index, item in enumerate(value):
        path = f"prompt[{index}]"
        if isinstance(item, str):
            prompts.append(_encoded(item, path, fields, chosen))
        elif isinstance(item, list):
            prompts.append(_read_ids(item, path, spec))
        else:
            raise FieldError(path, expected="a string or token ids", got=describe(item))
    return prompts


def _encoded(text: str, path: str, fields: Fields, chosen: Chosen) -> tuple[int, ...]:
    token_ids = encode(text, fields, chosen)
    if not token_ids:
        raise FieldError(path, expected="a prompt of at least one token", got="none")
    return token_ids


def _read_ids(value: list[Any], path: str, spec: LanguageSpec) -> tuple[int, ...]:
    if not value:
        raise FieldError(path, expected="at least one token id", got="an empty list")
    return tuple(read_token(item, f"{path}[{index}]", spec) for index, item in enumerate(value))


def _echo_texts(fields: Fields, chosen: Chosen, prompts: list[tuple[int, ...]]) -> list[str]:
    value = fields.raw("prompt")
    texts = [value] if isinstance(value, str) else value
    return [
        text if isinstance(text, str) else chosen.tokenizer.decode(prompt)
        for text, prompt in zip(texts[: len(prompts)], prompts, strict=True)
    ]
