"""The Service seam: the one door between the edge (sockets) and everything else.

Implemented by `pipeline.local` (in process) and by `FakeService` (tests of the edge). The edge knows nothing behind it.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from ganglion.errors import GanglionError
from ganglion.spec import PolicySpec
from ganglion.types import ActionChunk, Command, Observation, RequestId, ServiceStats

Outcome = ActionChunk | GanglionError
OnDone = Callable[[Outcome], None]


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
