"""FakeLanguageService: a LanguageService whose model repeats what it is told: bytes for tokens, a thread and no weights.

Used by tests of the edge and by whoever writes a client without a model at hand. Its answers are a function of the request
alone. A chat is answered with the user's last message, a plain prompt with itself, a grammar of JSON with the smallest value
of its schema; `say` scripts the next answer. Tokens come one a step, as from an engine.
"""

import json
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from ganglion.clock import Clock, RealClock
from ganglion.errors import CancelledError, FieldError, GanglionError, OverloadedError
from ganglion.generation import (
    ChatMessage,
    Embedded,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    LanguageSpec,
    PromptScored,
    TextDelta,
    TokenLogprob,
    Usage,
)
from ganglion.service import Generated, ModelState, OnGenerated, Residence
from ganglion.types import RequestId

BEGIN, END, NUM_TOKENS = 256, 257, 258
ROLES = ("system", "user", "assistant", "tool")
WIDTH = 8  # of vectors
PAGE_TOKENS = 16  # prompts are remembered in pages of so many tokens
RETRY_AFTER_S = 0.5
MAX_REMEMBERED = 1_024


def fake_language_spec(name: str = "echo", *, max_tokens: int = 4_096) -> LanguageSpec:
    """A model of bytes that repeats."""
    return LanguageSpec(
        name=name, family="fake", version=f"{name}-1", vocab_size=NUM_TOKENS, max_tokens=max_tokens,
        num_layers=0, width=WIDTH, eos_ids=(END,), dtype="uint8",
    )  # fmt: skip


class ByteTokenizer:
    """A token is a byte of UTF-8; BEGIN and END have no text."""

    def encode(self, text: str) -> tuple[int, ...]:
        """BEGIN and the bytes."""
        return (BEGIN, *text.encode())

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """The bytes."""
        return tuple(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the bytes."""
        return bytes(token for token in token_ids if token < BEGIN).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The byte."""
        return bytes((token_id,)) if token_id < BEGIN else b""

    def chat(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """One block a message, tools first."""
        lines = [f"<|tools|>{json.dumps(list(tools))}\n"] if tools else []
        for index, message in enumerate(messages):
            if message.role not in ROLES:
                path = f"messages[{index}].role"
                raise FieldError(path, expected=" | ".join(ROLES), got=message.role)
            lines.append(f"<|{message.role}|>{message.content}\n")
            lines += [f"<|call|>{json.dumps(dict(call))}\n" for call in message.tool_calls]
        return self.encode("".join(lines) + "<|assistant|>")


@dataclass(slots=True, eq=False)
class _Running:
    request_id: RequestId
    on_generated: OnGenerated
    items: Iterator[Generated]
    error: GanglionError | None = None


class FakeLanguageService:
    """Repeats. `with FakeLanguageService() as language: ...`; all requests advance by one token each `step_s`."""

    def __init__(
        self,
        specs: Sequence[LanguageSpec] = (),
        *,
        step_s: float = 0.0,
        max_waiting: int = 256,
        clock: Clock | None = None,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs or (fake_language_spec(),)}
        self._tokenizer = ByteTokenizer()
        self._step_s, self._max_waiting = step_s, max_waiting
        self._clock = clock or RealClock()
        self._changed = threading.Condition()
        self._running: OrderedDict[RequestId, _Running] = OrderedDict()
        self._script = deque[str | GanglionError]()
        self._remembered: deque[tuple[str, str, tuple[int, ...]]] = deque(maxlen=MAX_REMEMBERED)
        self._num_requests = 0
        self._is_stopping = self._is_blocked = False
        self._thread = threading.Thread(target=self._run, name="fake-language", daemon=True)
        self.received: deque[GenerateRequest] = deque(maxlen=MAX_REMEMBERED)
        self.cancelled: deque[RequestId] = deque(maxlen=MAX_REMEMBERED)

    # --- script ------------------------------------------------------------------------------------------------

    def say(self, *answers: str | GanglionError) -> None:
        """The next requests are answered with these texts, or end in these errors, whatever they ask."""
        with self._changed:
            self._script.extend(answers)

    def block(self) -> None:
        """Act like an engine in a step that does not end, until `unblock`."""
        with self._changed:
            self._is_blocked = True

    def unblock(self) -> None:
        """End what `block` began."""
        with self._changed:
            self._is_blocked = False
            self._changed.notify_all()

    def fail(self, error: GanglionError) -> None:
        """All requests under way end in `error`, where they are."""
        with self._changed:
            for running in self._running.values():
                running.error = error
            self._changed.notify_all()

    @property
    def num_running(self) -> int:
        """Requests under way."""
        with self._changed:
            return len(self._running)

    # --- LanguageService ---------------------------------------------------------------------------------------

    def language_models(self) -> tuple[LanguageSpec, ...]:
        """The specs it was made with."""
        return tuple(self._specs.values())

    def tokenizer(self, model: str) -> ByteTokenizer:
        """The same for all models."""
        self._spec(model)
        return self._tokenizer

    def residence(self, model: str) -> Residence:
        """Always in memory, and takes none."""
        self._spec(model)
        return Residence(state=ModelState.LOADED, stay="pinned", weight_bytes=0)

    def generate(self, request: GenerateRequest, on_generated: OnGenerated) -> RequestId:
        """Queue one prompt."""
        spec = self._spec(request.model)
        num_tokens = len(request.prompt)
        num_tokens += 0 if request.pooling else request.sampling.max_tokens
        if not request.prompt or num_tokens > spec.max_tokens:
            raise FieldError(
                "prompt",
                expected=f"1..{spec.max_tokens} tokens with the answer",
                got=str(num_tokens),
            )
        with self._changed:
            if len(self._running) >= self._max_waiting:
                raise OverloadedError(
                    "requests", limit=self._max_waiting, retry_after_s=RETRY_AFTER_S
                )
            answer = self._script.popleft() if self._script else _answer(request, self._tokenizer)
            self._num_requests += 1
            request_id = RequestId(self._num_requests)
            items = self._items(request_id, request, answer)
            self._running[request_id] = _Running(request_id, on_generated, items)
            self.received.append(request)
            self._changed.notify_all()
            return request_id

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request before its next token."""
        with self._changed:
            if (running := self._running.get(request_id)) is not None:
                running.error = CancelledError(f"request {request_id} was cancelled")
                self.cancelled.append(request_id)
                self._changed.notify_all()

    # --- life --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join()

    # --- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._is_stopping or self._has_work()):
                    self._changed.wait()
                if self._is_stopping:
                    for running in self._running.values():
                        running.error = running.error or CancelledError("the service is stopping")
                step = [
                    running
                    for running in self._running.values()
                    if running.error is not None or not self._is_blocked
                ]
                if self._is_stopping and not step:
                    return
            for running in step:
                self._advance(running)
            if self._step_s:
                self._clock.sleep_until(self._clock.now_s() + self._step_s)

    def _has_work(self) -> bool:
        is_ended = any(running.error is not None for running in self._running.values())
        return is_ended or bool(self._running and not self._is_blocked)

    def _advance(self, running: _Running) -> None:
        item = running.error or next(running.items)
        if isinstance(item, Usage | GanglionError):
            with self._changed:
                del self._running[running.request_id]
        running.on_generated(item)

    # --- what it says ------------------------------------------------------------------------------------------

    def _spec(self, model: str) -> LanguageSpec:
        if (spec := self._specs.get(model)) is None:
            raise FieldError("model", expected=" | ".join(self._specs), got=model)
        return spec

    def _items(
        self, request_id: RequestId, request: GenerateRequest, answer: str | GanglionError
    ) -> Iterator[Generated]:
        if isinstance(answer, GanglionError):
            yield answer
            return
        num_cached = self._num_cached(request)
        if request.pooling is not None:
            vector = np.bincount(np.array(request.prompt) % WIDTH, minlength=WIDTH)
            yield Embedded(request_id=request_id, vector=vector.astype(np.float32))
            yield Usage(
                num_prompt_tokens=len(request.prompt),
                num_cached_tokens=num_cached,
                num_completion_tokens=0,
            )
            return
        if (num_top := request.num_prompt_logprobs) is not None:
            scores = tuple(fake_logprob(token, num_top) for token in request.prompt[1:])
            yield PromptScored(request_id=request_id, logprobs=(None, *scores))
        choices = [_Choice(request, index, answer) for index in range(request.num_choices)]
        while any(not choice.is_over for choice in choices):
            for choice in choices:
                if not choice.is_over:
                    yield choice.advance()
        yield Usage(
            num_prompt_tokens=len(request.prompt),
            num_cached_tokens=num_cached,
            num_completion_tokens=sum(choice.num_tokens for choice in choices),
        )

    def _num_cached(self, request: GenerateRequest) -> int:
        longest = 0
        for tenant, model, prompt in self._remembered:
            if (tenant, model) == (request.tenant, request.model):
                pairs = zip(prompt, request.prompt[:-1], strict=False)
                common = next(
                    (i for i, (a, b) in enumerate(pairs) if a != b),
                    min(len(prompt), len(request.prompt) - 1),
                )
                longest = max(longest, common // PAGE_TOKENS * PAGE_TOKENS)
        self._remembered.append((request.tenant, request.model, request.prompt))
        return longest


class _Choice:
    """One continuation: choice 0 says the text, choice i the text and its number."""

    def __init__(self, request: GenerateRequest, index: int, text: str) -> None:
        sampling = request.sampling
        text = text if index == 0 or sampling.grammar is not None else f"{text} ({index})"
        self._index, self._sampling = index, sampling
        self._stop: str | int | None = None
        self._finish = FinishReason.STOP
        found = [(place, stop) for stop in sampling.stop if (place := text.find(stop)) >= 0]
        if found:
            place, self._stop = min(found)
            text = text[:place]
        tokens = list(text.encode())
        if self._stop is None and not sampling.is_eos_ignored:
            self._stop = END
        if sampling.is_eos_ignored and not found:
            tokens = (tokens or [ord(".")]) * (sampling.max_tokens // max(1, len(tokens)) + 1)
        ids = [place for place, token in enumerate(tokens) if token in sampling.stop_token_ids]
        if ids:
            self._stop, tokens = tokens[ids[0]], tokens[: ids[0]]
        if len(tokens) >= sampling.max_tokens:
            tokens, self._stop = tokens[: sampling.max_tokens], None
            self._finish = FinishReason.LENGTH
        self._tokens = deque(tokens)
        self._held = b""
        self.num_tokens, self.is_over = len(tokens), False

    def advance(self) -> TextDelta:
        """The next token, with the text that it completes; the end comes with the last one."""
        token_ids = (self._tokens.popleft(),) if self._tokens else ()
        self._held += bytes(token_ids)
        self.is_over = not self._tokens
        text = ""
        try:
            text, self._held = self._held.decode(), b""
        except UnicodeDecodeError:
            if self.is_over:
                text = self._held.decode(errors="replace")
        num_top = self._sampling.num_logprobs
        logprobs = () if num_top is None else tuple(fake_logprob(t, num_top) for t in token_ids)
        return TextDelta(
            choice=self._index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish=self._finish if self.is_over else None,
            stop=self._stop if self.is_over else None,
        )


def fake_logprob(token_id: int, num_top: int) -> TokenLogprob:
    """The token itself is the likeliest; the bytes after it follow."""
    top = tuple(((token_id + i) % NUM_TOKENS, -0.25 - i) for i in range(num_top))
    return TokenLogprob(token_id=token_id, logprob=-0.25, top=top)


def _answer(request: GenerateRequest, tokenizer: ByteTokenizer) -> str:
    if request.sampling.grammar is not None:
        return _conforming(request.sampling.grammar)
    text = tokenizer.decode(request.prompt)
    if not text.endswith("<|assistant|>"):
        return text
    last = text.rpartition("<|user|>")[2]
    return last.partition("\n<|")[0]


def _conforming(grammar: Grammar) -> str:
    if grammar.kind is not GrammarKind.JSON_SCHEMA:
        raise FieldError(
            "grammar", expected="a JSON Schema: the fake knows no other", got=grammar.kind
        )
    schema = json.loads(grammar.text)
    return json.dumps(_smallest(schema or {"type": "object"}, schema), ensure_ascii=False)


def _smallest(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """The value of a schema that takes least thought."""
    if "$ref" in schema:
        target: Any = root
        for step in schema["$ref"].removeprefix("#").strip("/").split("/"):
            target = target[int(step)] if isinstance(target, list) else target[step]
        return _smallest(target, root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            return _smallest(schema[name][0], root)
    kind = schema.get("type", "object")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            required = schema.get("required", [])
            return {
                name: _smallest(inner, root)
                for name, inner in schema.get("properties", {}).items()
                if name in required
            }
        case "array":
            return [_smallest(schema.get("items", {}), root)] * schema.get("minItems", 0)
        case "string":
            return "text"[: schema.get("maxLength", 4)].ljust(schema.get("minLength", 0), ".")
        case "boolean":
            return True
        case "null":
            return None
        case _:
            return schema.get("minimum", 0)
