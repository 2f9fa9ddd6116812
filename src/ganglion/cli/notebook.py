"""Engine: a policy, language models or both in this process, without a server: for notebooks and scripts.

    with ganglion.Engine(chat="tiny-moe", memory="2GiB") as engine:
        print(engine.complete("def f(x):"))

The same service as behind `ganglion serve`, made when the block begins; its memory is back when it ends.
"""

import asyncio
import contextlib
import gc
import itertools
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch

from ganglion.cli.server import make_service
from ganglion.clock import RealClock
from ganglion.config import Config, load
from ganglion.errors import FieldError, GanglionError
from ganglion.generation import (
    ChatMessage,
    Embedded,
    GenerateRequest,
    Pooling,
    Sampling,
    TextDelta,
    Usage,
)
from ganglion.metrics import Metrics
from ganglion.models.weights import give_back_freed
from ganglion.pipeline.language import LanguageFront
from ganglion.pipeline.local import LocalService
from ganglion.plan.auto import auto_values
from ganglion.plan.hardware import read_hardware
from ganglion.service import Generated, Outcome
from ganglion.spec import PolicySpec
from ganglion.types import (
    ActionChunk,
    CloseSession,
    Float32Array,
    Observation,
    RobotId,
    SessionId,
    UInt8Array,
)

T = TypeVar("T")
ROBOT = RobotId("notebook")
Prompt = str | Sequence[Mapping[str, str]]


class Engine:
    """Answers prompts and observations, from any thread, several at a time. Use it as a context manager."""

    def __init__(
        self,
        *,
        policy: str = "",
        chat: str | Sequence[str] = (),
        memory: str | int | None = None,
        dtype: str = "auto",
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        """`policy`, `chat`: as in `ganglion serve policy=... chat=...`; `adapters`: name -> LoRA folder. `memory`: weights and pages together, "2GiB".

        Raises ConfigError and CheckpointError as `ganglion serve` does, the latter when the block begins.
        """
        chats = (chat,) if isinstance(chat, str) else tuple(chat)
        if not policy and not chats:
            raise FieldError("Engine", expected="a policy, a chat or both", got="neither")
        flags: dict[str, tuple[str, Any]] = {
            "policy.path": ("policy", policy),
            "chat.models": ("chat", chats),
            "engine.dtype": ("dtype", dtype),
        }
        if adapters:
            texts = tuple(f"{name}={folder}" for name, folder in adapters.items())
            flags["chat.adapters"] = ("adapters", texts)
        if memory is not None:
            flags["memory.budget_bytes"] = ("memory", memory)
        hardware = read_hardware()
        budget_bytes = load(flags=flags, autos=auto_values(hardware)).config.memory.budget_bytes
        autos = auto_values(
            hardware, has_policy=bool(policy), has_chat=bool(chats), budget_bytes=budget_bytes
        )
        self._config: Config = load(flags=flags, autos=autos).config
        self._service: LocalService | None = None
        self._seqs = itertools.count(1)
        self._num_threads = torch.get_num_threads()

    def __enter__(self) -> Self:
        """Load, start and calibrate."""
        torch.set_num_threads(1)  # the engine's threads set their own
        service = make_service(
            self._config, clock=RealClock(), metrics=Metrics(), on_stage=lambda text: None
        )
        try:
            service.start()
        except BaseException:
            torch.set_num_threads(self._num_threads)
            raise
        self._service = service
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End what is open; weights and pages are given back."""
        service, self._service = self._service, None
        assert service is not None, "left without having been entered"
        service.close()
        del service
        torch.set_num_threads(self._num_threads)
        gc.collect()  # the parts of a service hold each other
        give_back_freed()

    # --- language models -----------------------------------------------------------------------------------------

    def complete(self, prompt: str, **options: Any) -> str:
        """How a text goes on. `options`: `model`, and any field of `Sampling`: max_tokens=64, temperature=0.0, ..."""
        return "".join(self.stream(prompt, **options))

    def chat(self, messages: Prompt, **options: Any) -> str:
        """The next message of a conversation: a text, or messages with "role" and "content". `options`: as `complete`."""
        return "".join(self.stream(_messages(messages), **options))

    async def complete_async(self, prompt: str, **options: Any) -> str:
        """As `complete`, for an event loop."""
        return await asyncio.wrap_future(self._text(prompt, options))

    async def chat_async(self, messages: Prompt, **options: Any) -> str:
        """As `chat`, for an event loop."""
        return await asyncio.wrap_future(self._text(_messages(messages), options))

    def stream(
        self, prompt: Prompt | Sequence[ChatMessage], *, model: str | None = None, **sampling: Any
    ) -> Iterator[str]:
        """The answer's text as it comes; a text is continued, messages are answered. Leaving early cancels the rest."""
        items: queue.SimpleQueue[Generated] = queue.SimpleQueue()
        front = self._language()
        request_id = front.generate(self._request(front, prompt, model, sampling), items.put)
        try:
            while not isinstance(item := items.get(), Usage):
                if isinstance(item, GanglionError):
                    raise item
                if isinstance(item, TextDelta):
                    yield item.text
        finally:
            front.cancel(request_id)

    def embed(
        self, texts: Sequence[str], *, model: str | None = None, pooling: Pooling = Pooling.LAST
    ) -> Float32Array:
        """One vector of length 1 for each text: [text, width]."""
        front = self._language()
        name = self._model(front, model)
        futures = []
        for text in texts:
            request = GenerateRequest(
                model=name,
                prompt=front.tokenizer(name).encode(text),
                sampling=Sampling(temperature=0.0),
                pooling=pooling,
            )
            futures.append(_vector(front, request))
        vectors = np.stack([future.result() for future in futures])
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        units: Float32Array = (vectors / np.where(lengths == 0.0, 1.0, lengths)).astype(np.float32)
        return units

    # --- the policy ----------------------------------------------------------------------------------------------

    @property
    def policy(self) -> PolicySpec:
        """What the policy wants to see, and what it gives."""
        return self._running().spec

    def act(
        self,
        images: Mapping[str, UInt8Array],
        state: Float32Array,
        prompt: str,
        *,
        session: str = "notebook",
    ) -> ActionChunk:
        """The next actions of one robot; `session` tells several apart. Raises what ended it (DeadlineMissedError, ...)."""
        return self._chunk(images, state, prompt, session).result()

    async def act_async(
        self,
        images: Mapping[str, UInt8Array],
        state: Float32Array,
        prompt: str,
        *,
        session: str = "notebook",
    ) -> ActionChunk:
        """As `act`, for an event loop."""
        return await asyncio.wrap_future(self._chunk(images, state, prompt, session))

    def reset(self, session: str = "notebook") -> None:
        """Forget what this robot has seen."""
        self._running().control(CloseSession(session_id=SessionId(session), robot_id=ROBOT))

    # --- parts ---------------------------------------------------------------------------------------------------

    def _running(self) -> LocalService:
        if self._service is None:
            raise GanglionError(
                "the engine does not run", next_step="use it as: with Engine(...) as engine: ..."
            )
        return self._service

    def _language(self) -> LanguageFront:
        front = self._running().language
        if front is None:
            raise FieldError("chat", expected="a language model", got="none in this engine")
        return front

    def _model(self, front: LanguageFront, model: str | None) -> str:
        names = [spec.name for spec in front.language_models() if not spec.parent]
        if model is None and len(names) > 1:
            raise FieldError("model", expected=f"one of {', '.join(names)}", got="none")
        return model or names[0]

    def _request(
        self,
        front: LanguageFront,
        prompt: Prompt | Sequence[ChatMessage],
        model: str | None,
        sampling: Mapping[str, Any],
    ) -> GenerateRequest:
        name = self._model(front, model)
        tokenizer = front.tokenizer(name)
        if isinstance(prompt, str):
            tokens = tokenizer.encode(prompt)
        else:
            tokens = tokenizer.chat([_message(each) for each in prompt])
        return GenerateRequest(
            model=name, prompt=tokens, sampling=Sampling(**{"max_tokens": 256, **sampling})
        )

    def _text(
        self, prompt: Prompt | Sequence[ChatMessage], options: dict[str, Any]
    ) -> "Future[str]":
        front = self._language()
        model = options.pop("model", None)
        parts: list[str] = []

        def taken(item: Generated) -> str | None:
            if isinstance(item, TextDelta):
                parts.append(item.text)
            return "".join(parts) if isinstance(item, Usage) else None

        return _future(front, self._request(front, prompt, model, options), taken)

    def _chunk(
        self, images: Mapping[str, UInt8Array], state: Float32Array, prompt: str, session: str
    ) -> "Future[ActionChunk]":
        future: Future[ActionChunk] = Future()

        def on_done(outcome: Outcome) -> None:
            with contextlib.suppress(InvalidStateError):  # whoever asked has left
                if isinstance(outcome, GanglionError):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

        service = self._running()
        service.submit(
            checked_observation(service.spec, images, state, prompt, session, next(self._seqs)),
            on_done,
        )
        return future


def checked_observation(
    spec: PolicySpec,
    images: Mapping[str, UInt8Array],
    state: Float32Array,
    prompt: str,
    session: str,
    seq: int,
) -> Observation:
    """What the policy can take. Raises FieldError naming what does not fit."""
    for view in spec.views:
        image = images.get(view.key)
        shape = (view.height, view.width, 3)
        if image is None or image.shape != shape or image.dtype != np.uint8:
            got = "nothing" if image is None else f"{image.dtype} {list(image.shape)}"
            raise FieldError(f"images[{view.key!r}]", expected=f"uint8 {list(shape)}", got=got)
    if state.shape != (spec.state_dim,) or not np.isfinite(state).all():
        expected = f"{spec.state_dim} finite numbers"
        raise FieldError("state", expected=expected, got=f"{state.dtype} {list(state.shape)}")
    return Observation(
        session_id=SessionId(session),
        robot_id=ROBOT,
        seq=seq,
        images={view.key: images[view.key] for view in spec.views},
        state=state.astype(np.float32),
        prompt=prompt,
    )


def _messages(messages: Prompt) -> Sequence[ChatMessage]:
    if isinstance(messages, str):
        return [ChatMessage(role="user", content=messages)]
    return [_message(each) for each in messages]


def _message(message: Mapping[str, str] | ChatMessage) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    unknown = sorted(message.keys() - {"role", "content"})
    if unknown or "role" not in message or "content" not in message:
        raise FieldError("messages", expected='"role" and "content"', got=str(sorted(message)))
    return ChatMessage(role=message["role"], content=message["content"])


def _vector(front: LanguageFront, request: GenerateRequest) -> "Future[Float32Array]":
    vectors: list[Float32Array] = []

    def taken(item: Generated) -> Float32Array | None:
        if isinstance(item, Embedded):
            vectors.append(item.vector)
        return vectors[0] if isinstance(item, Usage) else None

    return _future(front, request, taken)


def _future(
    front: LanguageFront, request: GenerateRequest, taken: Callable[[Generated], T | None]
) -> "Future[T]":
    """Done with the first thing that `taken` makes of the items, or with their error. Cancelling it cancels the request."""
    future: Future[T] = Future()

    def on_generated(item: Generated) -> None:
        result = taken(item)
        with contextlib.suppress(InvalidStateError):  # whoever asked has left
            if isinstance(item, GanglionError):
                future.set_exception(item)
            elif result is not None:
                future.set_result(result)

    request_id = front.generate(request, on_generated)
    future.add_done_callback(lambda done: front.cancel(request_id) if done.cancelled() else None)
    return future
