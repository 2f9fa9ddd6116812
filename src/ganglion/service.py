"""The Service seam: the one door between the edge (sockets) and everything else.

Implemented by `pipeline.local` (in process) and by `FakeService` (tests of the edge). The edge knows nothing behind it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from ganglion.errors import GanglionError
from ganglion.generation import (
    ChatMessage,
    Embedded,
    GenerateRequest,
    LanguageSpec,
    PromptScored,
    TextDelta,
    Usage,
)
from ganglion.spec import PolicySpec
from ganglion.types import ActionChunk, Command, Observation, RequestId, ServiceStats

Outcome = ActionChunk | GanglionError
OnDone = Callable[[Outcome], None]
Generated = PromptScored | Embedded | TextDelta | Usage | GanglionError
OnGenerated = Callable[[Generated], None]


@runtime_checkable
class Service(Protocol):
    """Takes checked observations, answers each exactly once.

    Thread-safe. `on_done` is called once per submitted request, from a thread of the service, and must return at once
    (an asyncio edge passes `loop.call_soon_threadsafe`).
    """

    @property
    def spec(self) -> PolicySpec:
        """The served policy."""
        ...

    def submit(self, observation: Observation, on_done: OnDone) -> RequestId:
        """Queue one observation; newest wins within a session. Never blocks.

        Raises SessionConflictError when another robot owns the session, OverloadedError when max_sessions is reached.
        """
        ...

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request between two engine steps; its outcome is then CancelledError. Unknown ids are ignored."""
        ...

    def control(self, command: Command) -> None:
        """Reset, close or re-instruct a session.

        Raises SessionConflictError for a session of another robot, FieldError for one that does not exist.
        """
        ...

    def stats(self) -> ServiceStats:
        """The newest picture, made between two steps. Never waits for a step."""
        ...


class TextTokenizer(Protocol):
    """Text to token ids and back, of one model. Thread-safe; takes microseconds to milliseconds, so an edge may call it."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of `text`, with the special tokens that the model puts in front of a plain prompt."""
        ...

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Ids of `text` alone: what a template wrote has its special tokens in it."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are no character yet become U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for."""
        ...

    def chat(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Ids of a conversation up to where the assistant speaks next, by the model's template.

        Raises FieldError where the template refuses the messages.
        """
        ...


class ModelState(StrEnum):
    """Where the weights of a language model are."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Residence:
    """A language model in memory, or not. `stay`: "pinned", "on demand" or "for 600 s" without a request."""

    state: ModelState
    stay: str
    weight_bytes: int


@runtime_checkable
class LanguageService(Protocol):
    """Takes prompts, answers each with deltas. Thread-safe; `on_generated` as `OnDone` of `Service`, but called often."""

    def language_models(self) -> tuple[LanguageSpec, ...]:
        """Those that a request may name."""
        ...

    def tokenizer(self, model: str) -> TextTokenizer:
        """Of one of them. Raises FieldError for any other name."""
        ...

    def residence(self, model: str) -> Residence:
        """Is it in memory? Raises FieldError for an unknown name."""
        ...

    def generate(self, request: GenerateRequest, on_generated: OnGenerated) -> RequestId:
        """Queue one prompt; its model is loaded first where it is not. Ends with exactly one Usage, after all its
        deltas, or one GanglionError: ModelUnavailableError where there is no room for the model.

        Raises FieldError for an unknown model, a prompt of no or too many tokens, or a grammar that does not compile;
        OverloadedError when too many wait.
        """
        ...

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request between two engine steps; its end is then CancelledError. Unknown ids are ignored."""
        ...
