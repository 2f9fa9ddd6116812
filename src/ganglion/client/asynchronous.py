"""Asyncio client: one robot's connection on an event loop; calls may overlap.

Called by robots' programs that are asyncio already.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, Unpack

from websockets.asyncio import client as websockets
from websockets.exceptions import ConnectionClosed

from ganglion import wire
from ganglion.client.connection import (
    DEFAULT_TIMEOUT_S,
    MAX_UNREAD,
    connection_errors,
    headers,
    late,
    lost,
)
from ganglion.client.conversation import (
    Answer,
    Conversation,
    Hints,
    Outgoing,
    Reply,
    ResetDone,
    read_metadata,
)
from ganglion.clock import Clock, RealClock
from ganglion.errors import ConnectionLostError, GanglionError, ReplyError, WireError


class AsyncClient:
    """The same for asyncio: `async with AsyncClient(url, robot_id=...) as client`. Calls may overlap."""

    def __init__(
        self,
        url: str,
        *,
        robot_id: str,
        session_id: str | None = None,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        clock: Clock | None = None,
    ) -> None:
        self._url, self._headers, self._timeout_s = url, headers(api_key), timeout_s
        self._talk = Conversation(
            robot_id=robot_id, session_id=session_id, clock=clock or RealClock()
        )
        self._unread: asyncio.Queue[Answer] = asyncio.Queue(maxsize=MAX_UNREAD)
        self._waiting: dict[int, asyncio.Future[Answer | ResetDone]] = {}
        self._socket: websockets.ClientConnection | None = None
        self._open = contextlib.AsyncExitStack()
        self._reader: asyncio.Task[None] | None = None
        self.metadata: Mapping[str, Any] = {}

    @property
    def session_id(self) -> str:
        """The session on the server; the same after `reconnect`."""
        return self._talk.session_id

    @property
    def is_connected(self) -> bool:
        """False before `reconnect`, after `close`, and once the connection is lost."""
        return self._socket is not None

    async def infer(
        self,
        observation: Mapping[str, Any],
        *,
        prompt: str | None = None,
        timeout_s: float | None = None,
        **hints: Unpack[Hints],
    ) -> Reply:
        """Send one observation and wait for its chunk. Raises as `Client.infer`."""
        out = self._talk.observe(observation, prompt=prompt, **hints)
        answer = await self._exchange(out, timeout_s)
        if not isinstance(answer, Reply):
            raise WireError(f"the server answered request {out.seq} with no chunk")
        return answer

    async def request(
        self,
        observation: Mapping[str, Any],
        *,
        prompt: str | None = None,
        **hints: Unpack[Hints],
    ) -> int:
        """Send one observation without waiting for its answer, which `poll` brings."""
        out = self._talk.observe(observation, prompt=prompt, **hints)
        await self._send(out)
        return out.seq

    async def poll(self, *, timeout_s: float = 0.0) -> Answer | None:
        """The next answer to a `request`, None when there is none within `timeout_s`. Raises ConnectionLostError."""
        if self._unread.empty() and self._socket is None:
            raise ConnectionLostError(f"not connected to {self._url}", next_step="call reconnect()")
        if timeout_s <= 0:
            return None if self._unread.empty() else self._unread.get_nowait()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self._unread.get(), timeout_s)
        return None

    async def reset(self, *, timeout_s: float | None = None) -> None:
        """Forget the session's context on the server, and all answers that are still to come."""
        self._drop_answers(ConnectionLostError("the session was reset"))
        await self._exchange(self._talk.reset(), timeout_s)

    async def reconnect(self) -> None:
        """Connect, or connect again to the same session. Raises ConnectionLostError."""
        await self.close()
        try:
            with connection_errors(self._url):
                self._socket = await self._open.enter_async_context(
                    websockets.connect(
                        self._url,
                        additional_headers=self._headers,
                        compression=None,
                        open_timeout=self._timeout_s,
                        close_timeout=self._timeout_s,
                        ping_interval=None,  # the server pings
                        max_size=wire.DEFAULT_LIMITS.max_frame_bytes,
                        proxy=None,
                    )
                )
                first = await asyncio.wait_for(self._socket.recv(), self._timeout_s)
            self.metadata = read_metadata(first)
        except GanglionError:
            await self.close()
            raise
        self._reader = asyncio.create_task(self._read(self._socket))

    async def close(self) -> None:
        """Leave; the server closes the session. A closed client can `reconnect`."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            self._reader = None
        self._socket = None
        self._drop_answers(ConnectionLostError(f"the connection to {self._url} was closed"))
        await self._open.aclose()

    async def __aenter__(self) -> Self:
        await self.reconnect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _exchange(self, out: Outgoing, timeout_s: float | None) -> Answer | ResetDone:
        wait_s = self._timeout_s if timeout_s is None else timeout_s
        waiting = asyncio.get_running_loop().create_future()
        self._waiting[out.seq] = waiting
        try:
            async with asyncio.timeout(wait_s):
                await self._send(out)
                answer: Answer | ResetDone = await waiting
        except TimeoutError:
            raise late(out.seq, wait_s) from None
        finally:
            self._waiting.pop(out.seq, None)
            self._talk.forget(out.seq)
        if isinstance(answer, ReplyError):
            raise answer
        return answer

    async def _send(self, out: Outgoing) -> None:
        if self._socket is None:
            self._talk.forget(out.seq)
            raise ConnectionLostError(f"not connected to {self._url}", next_step="call reconnect()")
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._socket.send(out.frame)
        except (ConnectionClosed, OSError) as error:
            raise lost(self._url, error) from error

    async def _read(self, live: websockets.ClientConnection) -> None:
        try:
            while True:
                self._deliver(self._talk.receive(await live.recv()))
        except (ConnectionClosed, OSError, GanglionError) as error:
            self._socket = None
            self._drop_answers(lost(self._url, error))

    def _deliver(self, answer: Answer | ResetDone | None) -> None:
        if answer is None:
            return
        # which request an error without a number answers is unknown: the oldest
        seq = next(iter(self._waiting), None) if answer.seq is None else answer.seq
        waiting = None if seq is None else self._waiting.get(seq)
        if waiting is not None:
            if not waiting.done():
                waiting.set_result(answer)
        elif isinstance(answer, Reply | ReplyError):
            if self._unread.full():
                self._unread.get_nowait()
            self._unread.put_nowait(answer)

    def _drop_answers(self, error: ConnectionLostError) -> None:
        self._talk.forget()
        while not self._unread.empty():
            self._unread.get_nowait()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
        self._waiting.clear()
