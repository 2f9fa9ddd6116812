"""The engine loop: the one thread that owns requests, sessions and the ledger. Everyone else posts messages.

Called by `pipeline.local`. Knows neither what a message means nor what a step does.
"""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

MessageT = TypeVar("MessageT")


class EngineLoop(Generic[MessageT]):
    """Handles every posted message in order, then steps while there is work, then waits for the next message.

    `handle(message)`; `step()` returns whether there is more to do; `on_defect(error)` after anything that they raised.
    """

    def __init__(
        self,
        *,
        open_: Callable[[], None],
        handle: Callable[[MessageT], None],
        step: Callable[[], bool],
        on_defect: Callable[[Exception], None],
        close: Callable[[], None],
    ) -> None:
        self._open, self._handle, self._step = open_, handle, step
        self._on_defect, self._close = on_defect, close
        self._mailbox: queue.SimpleQueue[MessageT | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._is_here = False  # the caller's thread takes the turns

    def post(self, message: MessageT) -> None:
        """Queue a message; thread-safe, never blocks."""
        self._mailbox.put(message)

    def start(self) -> None:
        """Start the thread; `open_` runs on it first."""
        self._thread.start()

    def start_here(self) -> None:
        """Instead of `start`: the calling thread runs `open_`, and each `turn`. For simulated time."""
        self._is_here = True
        self._guard(self._open)

    def turn(self) -> bool:
        """After `start_here`: handle what was posted, then step once; is there more to do?"""
        if not self._drain(has_work=True):
            return False
        has_work = bool(self._guard(self._step))
        return has_work or not self._mailbox.empty()

    def stop(self) -> None:
        """Handle what was posted before, run `close` on the thread, and join it."""
        self._mailbox.put(None)
        if self._thread.is_alive():
            self._thread.join()
        elif self._is_here:
            self._drain(has_work=True)
            self._guard(self._close)

    def _run(self) -> None:
        self._guard(self._open)
        has_work = False
        while self._drain(has_work=has_work):
            has_work = self._guard(self._step) or False
        self._guard(self._close)

    def _drain(self, *, has_work: bool) -> bool:
        """Handle all posted messages, waiting for one when idle; False when asked to stop."""
        while True:
            try:
                message = self._mailbox.get(block=not has_work)
            except queue.Empty:
                return True
            if message is None:
                return False
            self._guard(lambda: self._handle(message))  # noqa: B023 - called before the next turn
            has_work = True

    def _guard(self, call: Callable[[], bool | None]) -> bool | None:
        try:
            return call()
        except Exception as error:
            logger.exception("engine loop")
            self._on_defect(error)
            return None
