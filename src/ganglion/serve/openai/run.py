"""Run: the generations of one HTTP request, from the service's threads to the event loop, and their end when nobody reads.

Called by `serve.openai.endpoint`. Knows the LanguageService seam; nothing of HTTP and nothing of what the items become.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Sequence

from ganglion.errors import GanglionError
from ganglion.generation import Embedded, GenerateRequest, PromptScored, TextDelta, Usage
from ganglion.service import Generated, LanguageService, OnGenerated
from ganglion.types import RequestId

MAX_UNREAD = 8_192  # items: a client so far behind is cut off, since the engine waits for nobody

Item = tuple[int, PromptScored | Embedded | TextDelta | Usage]


class Run:
    """Several generations under way at once. Item (i, x) is of request i. Use: start, read until it is None, cancel."""

    def __init__(self, language: LanguageService) -> None:
        self._language = language
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._unread: deque[Item] = deque()
        self._error: GanglionError | None = None
        self._num_open = 0
        self._lock = threading.Lock()  # over what `start` and `cancel` share, from two threads
        self._request_ids: list[RequestId] = []
        self._backlog: deque[tuple[int, GenerateRequest]] = deque()
        self._is_cancelled = False
        self._is_overrun = asyncio.Event()
        self.usages: list[Usage] = []  # of those that ended

    def start(self, requests: Sequence[GenerateRequest], *, at_once: int | None = None) -> None:
        """Queue all of them, or so many at once. From any thread.

        What the service raises ends those that are queued already.
        """
        self._num_open = len(requests)
        self._backlog.extend(enumerate(requests))
        for _ in range(min(len(requests), at_once or len(requests))):
            self._start_next()

    def _start_next(self) -> None:
        with self._lock:
            if self._is_cancelled or not self._backlog:
                return
            source, request = self._backlog.popleft()
            request_id = self._language.generate(request, self._listener(source))
            self._request_ids.append(request_id)

    async def read(self) -> list[Item] | None:
        """All that came since the last call, at least one item; None after the last. Raises what ended a generation."""
        await self.wait()
        if not self._unread:
            if self._error is not None:
                raise self._error
            return None
        items = list(self._unread)
        self._unread.clear()
        return items

    async def wait(self) -> None:
        """Return when there is something to read, be it the end or an error."""
        while not (self._unread or self._error is not None or self._num_open == 0):
            self._changed.clear()
            await self._changed.wait()

    async def overrun(self) -> None:
        """Return when so much is unread that nobody can be reading."""
        await self._is_overrun.wait()

    def cancel(self) -> None:
        """End what is still open, at once. From any thread, any number of times."""
        with self._lock:
            self._is_cancelled = True
            request_ids, self._request_ids = self._request_ids, []
        for request_id in request_ids:
            self._language.cancel(request_id)

    def _go_on(self) -> None:
        """One has ended: the next one's turn."""
        try:
            self._start_next()
        except GanglionError as error:
            self._error = self._error or error
            self.cancel()

    def _listener(self, source: int) -> OnGenerated:
        def on_generated(generated: Generated) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._take, source, generated)

        return on_generated

    def _take(self, source: int, generated: Generated) -> None:
        if isinstance(generated, GanglionError):
            self._num_open -= 1
            self._error = self._error or generated
            self.cancel()
        else:
            if isinstance(generated, Usage):
                self._num_open -= 1
                self.usages.append(generated)
                self._go_on()
            self._unread.append((source, generated))
            if len(self._unread) > MAX_UNREAD:
                self._is_overrun.set()
        self._changed.set()
