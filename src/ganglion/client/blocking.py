"""Blocking client: one robot's connection, used from one thread. A thread of its own reads the socket.

Called by robots' control loops.
"""

import contextlib
import socket
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

from websockets.exceptions import ConnectionClosed
from websockets.sync import client as websockets

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


class Client:
    """A blocking connection of one robot. Use it from one thread; the socket is read by a thread of its own."""

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
        self._clock = clock or RealClock()
        self._talk = Conversation(robot_id=robot_id, session_id=session_id, clock=self._clock)
        self._unread: deque[Answer] = deque(maxlen=MAX_UNREAD)
        self._socket: websockets.ClientConnection | None = None
        self._open = contextlib.ExitStack()
        self.metadata: Mapping[str, Any] = {}
        self.reconnect()

    @property
    def session_id(self) -> str:
        """The session on the server; the same after `reconnect`."""
        return self._talk.session_id

    @property
    def is_connected(self) -> bool:
        """False after `close` and once a call has found the connection lost."""
        return self._socket is not None

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        prompt: str | None = None,
        timeout_s: float | None = None,
        **hints: Unpack[Hints],
    ) -> Reply:
        """Send one observation and wait for its chunk.

        Raises ReplyError (the server refuses or dropped it), ReplyTimeoutError, ConnectionLostError.
        """
        wanted = self.request(observation, prompt=prompt, **hints)
        answer = self._wait_for(wanted, timeout_s)
        if not isinstance(answer, Reply):
            raise WireError(f"the server answered request {wanted} with no chunk")
        return answer

    def request(
        self,
        observation: Mapping[str, Any],
        *,
        prompt: str | None = None,
        **hints: Unpack[Hints],
    ) -> int:
        """Send one observation without waiting; returns its sequence number. `poll` brings the answer.

        `observation`: the arrays that `metadata` names ("views", "state"); may hold "prompt". `seq` counts up by itself;
        `obs_time_ns` is now by itself.
        """
        out = self.prepare(observation, prompt=prompt, **hints)
        self.send(out)
        return out.seq

    def prepare(
        self,
        observation: Mapping[str, Any],
        *,
        prompt: str | None = None,
        **hints: Unpack[Hints],
    ) -> Outgoing:
        """The frame of a request, numbered now, for `send` to send now or later."""
        return self._talk.observe(observation, prompt=prompt, **hints)

    def send(self, out: Outgoing) -> None:
        """Send what `prepare` made. Raises ConnectionLostError."""
        with self._losing_connection() as live:
            live.send(out.frame)

    def poll(self, *, timeout_s: float = 0.0) -> Answer | None:
        """The next answer in order of arrival, None when there is none within `timeout_s`. Errors are returned.

        Raises ConnectionLostError.
        """
        if self._unread:
            return self._unread.popleft()
        deadline_s = self._clock.now_s() + timeout_s
        while True:
            try:
                answer = self._receive(max(0.0, deadline_s - self._clock.now_s()))
            except TimeoutError:
                return None
            if isinstance(answer, Reply | ReplyError):
                return answer

    def reset(self, *, timeout_s: float | None = None) -> None:
        """Forget the session's context on the server, and all answers that are still to come."""
        self._unread.clear()
        out = self._talk.reset()
        self.send(out)
        self._wait_for(out.seq, timeout_s)

    def reconnect(self) -> None:
        """Connect again, to the same session. Requests sent before will never be answered.

        Raises ConnectionLostError when the server cannot be reached within the timeout: wait a little, then try again.
        """
        self.close()
        try:
            with connection_errors(self._url):
                self._socket = self._open.enter_context(
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
                _limit_sends(self._socket.socket, self._timeout_s)
                first = self._socket.recv(timeout=self._timeout_s)
            self.metadata = read_metadata(first)
        except GanglionError:
            self.close()
            raise

    def close(self) -> None:
        """Leave; the server closes the session. A closed client can `reconnect`."""
        self._talk.forget()
        self._unread.clear()
        self._socket = None
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wait_for(self, seq: int, timeout_s: float | None) -> Answer | ResetDone:
        wait_s = self._timeout_s if timeout_s is None else timeout_s
        deadline_s = self._clock.now_s() + wait_s
        while True:
            try:
                answer = self._receive(max(0.0, deadline_s - self._clock.now_s()))
            except TimeoutError:
                self._talk.forget(seq)
                raise late(seq, wait_s) from None
            if answer is None:
                continue
            if answer.seq != seq and not (isinstance(answer, ReplyError) and answer.seq is None):
                if isinstance(answer, Reply | ReplyError):
                    self._unread.append(answer)
                continue
            if isinstance(answer, ReplyError):
                raise answer
            return answer

    def _receive(self, timeout_s: float) -> Answer | ResetDone | None:
        """The next message. Raises TimeoutError."""
        with self._losing_connection() as live:
            return self._talk.receive(live.recv(timeout=timeout_s))

    @contextlib.contextmanager
    def _losing_connection(self) -> Iterator[websockets.ClientConnection]:
        if self._socket is None:
            raise ConnectionLostError(f"not connected to {self._url}", next_step="call reconnect()")
        try:
            yield self._socket
        except TimeoutError:
            raise
        except (ConnectionClosed, OSError) as error:
            self._socket = None
            self._talk.forget()
            raise lost(self._url, error) from error


def _limit_sends(sock: socket.socket, timeout_s: float) -> None:
    """Let a send into a full buffer fail after `timeout_s`; without it a blocking send waits for ever."""
    whole_s = int(timeout_s)
    limit = struct.pack("ll", whole_s, int((timeout_s - whole_s) * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
