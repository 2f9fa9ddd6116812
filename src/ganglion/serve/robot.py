"""Robot sockets: openpi's websocket protocol, and our superset of it, over the Service.

Called by `serve.app` for every websocket that is not the dashboard's. Runs on the event loop and never waits for a model:
requests go to `Service.submit`, outcomes come back through `call_soon_threadsafe`. Knows the protocol's order and its
errors; `serve.request` knows what a request must look like, `serve.reply` what an answer does.

One connection: the server speaks first (metadata). A request without `seq` is openpi's: the next one is not started
before it is answered, and an error is a text message. Requests with `seq` may overlap; every answer carries `obs_seq`.
"""

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Receive, Scope, Send

from ganglion import __version__, wire
from ganglion.clock import Clock
from ganglion.config import ServeConfig
from ganglion.errors import (
    ErrorCode,
    FieldError,
    GanglionError,
    InternalError,
    OverloadedError,
    WireError,
)
from ganglion.metrics import Metrics
from ganglion.serve import reply
from ganglion.serve.refusal import refuse
from ganglion.serve.request import InferRequest, RequestReader, ResetRequest, Sender
from ganglion.service import Outcome, Service
from ganglion.types import (
    ActionChunk,
    CloseSession,
    Observation,
    RequestId,
    ResetSession,
    RobotId,
    SessionId,
)
from ganglion.wire import WireLimits

logger = logging.getLogger(__name__)

PROTOCOL = "ganglion/1"
MAX_IN_FLIGHT = 16  # requests of one connection inside the service
MAX_UNSENT = 32  # replies waiting for a slow peer; then its requests are not read either
MAX_LOGGED_KEYS = 64
CLOSE_MALFORMED, CLOSE_TEXT = 1002, 1003

# Ordinary ends of a robot that sends often are no news; defects are. The rest is information.
LOG_LEVELS = {
    ErrorCode.SUPERSEDED: logging.DEBUG,
    ErrorCode.CANCELLED: logging.DEBUG,
    ErrorCode.INTERNAL: logging.ERROR,
}


@dataclass(slots=True, eq=False)
class _Pending:
    """One request inside the service."""

    seq: int | None
    robot_id: RobotId
    received_s: float
    notes: tuple[str, ...]  # for its reply
    request_id: RequestId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    """One websocket message to send. `pending`: whose answer it is; `infer_ms`: its time inside the service."""

    event: dict[str, Any]
    received_s: float | None = None
    infer_ms: float = 0.0


class RobotEndpoint:
    """All robots' connections: an ASGI websocket application. Its state belongs to the event loop's thread."""

    def __init__(
        self, service: Service, *, config: ServeConfig, clock: Clock, metrics: Metrics
    ) -> None:
        self.service, self.clock, self.metrics = service, clock, metrics
        self.limits = WireLimits(max_frame_bytes=config.max_frame_bytes)
        self.reader = RequestReader(service.spec, self.limits)
        self.checker = reply.ActionChecker(service.spec)
        self._max_connections = config.max_connections
        self._num_connections = 0
        self._owners: dict[SessionId, _Connection] = {}
        self._logged_keys: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, from handshake to its last cancelled request."""
        if self._num_connections >= self._max_connections:
            self.metrics.refused_requests.inc(reason="limit")
            text = f"all {self._max_connections} connections are in use; retry later\n"
            await refuse(scope, receive, send, status=503, text=text)
            return
        connection = _Connection(self, receive, send)
        self._num_connections += 1
        self.metrics.connections.set(self._num_connections, channel="robot")
        try:
            await connection.run()
        finally:
            self._num_connections -= 1
            self.metrics.connections.set(self._num_connections, channel="robot")

    def adopt(self, session_id: SessionId, connection: "_Connection") -> None:
        """The connection that used a session last is the one whose end closes it."""
        self._owners[session_id] = connection

    def abandon(self, session_id: SessionId, robot_id: RobotId, connection: "_Connection") -> None:
        """Close a session when its connection ends, unless the robot is already back on another one."""
        if self._owners.get(session_id) is not connection:
            return
        del self._owners[session_id]
        with contextlib.suppress(GanglionError):  # the service may have closed it already
            self.service.control(CloseSession(session_id=session_id, robot_id=robot_id))

    def note_unknown_keys(self, keys: set[str]) -> None:
        """Count keys that no policy here reads; log each once, up to a bound."""
        for key in keys:
            self.metrics.ignored_keys.inc(key=key[:64])
            if key not in self._logged_keys and len(self._logged_keys) < MAX_LOGGED_KEYS:
                self._logged_keys.add(key)
                logger.info("ignored observation key %r: the policy does not read it", key[:64])


@dataclass(slots=True, eq=False)
class _Connection:
    """One robot's socket: a reader (this coroutine) and a writer task, joined by a queue of messages."""

    _endpoint: RobotEndpoint
    _receive: Receive
    _send: Send
    _sender: Sender = field(init=False)
    _encoder: wire.Encoder = field(init=False, default_factory=wire.Encoder)
    _loop: asyncio.AbstractEventLoop = field(init=False, default_factory=asyncio.get_running_loop)
    _pending: set[_Pending] = field(init=False, default_factory=set)
    _sessions: dict[SessionId, RobotId] = field(init=False, default_factory=dict)
    _clocks: dict[SessionId, tuple[int, int]] = field(init=False, default_factory=dict)
    _unsent: deque[_Message] = field(init=False, default_factory=deque)
    _has_unsent: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _progress: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _num_frames: int = field(init=False, default=0)
    _prev_total_ms: float | None = field(init=False, default=None)
    _is_open: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        name = secrets.token_hex(8)
        self._sender = Sender(robot_id=RobotId(f"robot-{name}"), session_id=SessionId(f"s-{name}"))

    async def run(self) -> None:
        """Serve until either side closes; then cancel what is in flight and close the sessions."""
        if (await self._receive())["type"] != "websocket.connect":
            return
        await self._send({"type": "websocket.accept"})
        metadata = self._endpoint.service.spec.metadata() | {
            "protocol": PROTOCOL,
            "server": f"ganglion {__version__}",
            "session_id": self._sender.session_id,
            "max_frame_bytes": self._endpoint.limits.max_frame_bytes,
        }
        await self._send({"type": "websocket.send", "bytes": self._encoder.encode(metadata)})
        writer = asyncio.create_task(self._write())
        try:
            if (goodbye := await self._read()) is not None and not writer.done():
                self._post(_Message(event=goodbye))
                await writer
        finally:
            self._is_open = False
            writer.cancel()
            self._let_go()
            await asyncio.gather(writer, return_exceptions=True)

    # --- reading -----------------------------------------------------------------------------------------------

    async def _read(self) -> dict[str, Any] | None:
        """Take frames until the peer leaves (None) or must go (the close event)."""
        endpoint = self._endpoint
        while True:
            event = await self._receive()
            if event["type"] == "websocket.disconnect":
                if event.get("code") == 1009:
                    endpoint.metrics.refused_frames.inc(reason="oversized")
                elif event.get("code") == CLOSE_MALFORMED:
                    endpoint.metrics.refused_frames.inc(reason="truncated")
                return None
            received_s = endpoint.clock.now_s()
            frame = event.get("bytes")
            if frame is None:
                endpoint.metrics.refused_frames.inc(reason="text")
                return _close(CLOSE_TEXT, "requests are binary messages: msgpack maps")
            try:
                message = wire.unpack(frame, endpoint.limits)
            except WireError as error:
                endpoint.metrics.refused_frames.inc(reason=error.code)
                return _close(CLOSE_MALFORMED, str(error))
            await self._take(message, received_s)
            while len(self._unsent) > MAX_UNSENT:
                await self._wait_for_progress()

    async def _take(self, message: Mapping[str, Any], received_s: float) -> None:
        endpoint = self._endpoint
        seq = None
        try:
            seq = endpoint.reader.read_seq(message)
            while seq is None and self._pending:
                await self._wait_for_progress()
            self._num_frames += 1
            if unknown := endpoint.reader.unknown_keys(message):
                endpoint.note_unknown_keys(unknown)
            number = self._num_frames if seq is None else seq
            request = endpoint.reader.read(message, sender=self._sender, seq=number)
            if isinstance(request, ResetRequest):
                self._reset(request, seq)
            else:
                self._submit(request, seq, received_s)
        except GanglionError as error:
            endpoint.metrics.refused_frames.inc(reason=error.code)
            self._post_error(error, seq, message.get("robot_id"))
        except Exception:
            logger.exception("defect while taking a request")
            self._post_error(InternalError("see the traceback above"), seq, message.get("robot_id"))
        endpoint.metrics.frames.inc(dialect="openpi" if seq is None else "ganglion")

    def _submit(self, request: InferRequest, seq: int | None, received_s: float) -> None:
        if len(self._pending) >= MAX_IN_FLIGHT:
            raise OverloadedError(
                "this connection's requests in flight", limit=MAX_IN_FLIGHT, retry_after_s=0.1
            )
        observation = request.observation
        pending = _Pending(seq, observation.robot_id, received_s, self._notes(observation))
        loop = self._loop

        def on_done(outcome: Outcome) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(self._finish, pending, outcome)

        pending.request_id = self._endpoint.service.submit(observation, on_done)
        self._pending.add(pending)
        self._hold(observation.session_id, observation.robot_id)

    def _reset(self, request: ResetRequest, seq: int | None) -> None:
        command = ResetSession(session_id=request.session_id, robot_id=request.robot_id)
        with contextlib.suppress(FieldError):  # not open yet: there is nothing to forget
            self._endpoint.service.control(command)
            self._hold(request.session_id, request.robot_id)
        self._clocks.pop(request.session_id, None)
        body = reply.reset_map(request.session_id, seq)
        self._post(_binary(self._encoder.encode(body)))

    def _notes(self, observation: Observation) -> tuple[str, ...]:
        """What is ignored of a request. A robot's clock is echoed only: observations are ordered by their numbers."""
        seq, now_ns = observation.seq, observation.obs_time_ns
        before_seq, before_ns = self._clocks.get(observation.session_id, (-1, 0))
        if now_ns is None or seq <= before_seq:  # overtaken on its way: no jump
            return ()
        self._clocks[observation.session_id] = (seq, now_ns)
        if now_ns >= before_ns:
            return ()
        self._endpoint.metrics.clock_jumps.inc()
        return (
            f"obs_time_ns ran back by {(before_ns - now_ns) * 1e-6:.3f} ms: ignored, "
            "observations are ordered by seq",
        )

    def _hold(self, session_id: SessionId, robot_id: RobotId) -> None:
        self._sessions[session_id] = robot_id
        self._endpoint.adopt(session_id, self)

    def _let_go(self) -> None:
        for pending in self._pending:
            if pending.request_id is not None:
                self._endpoint.service.cancel(pending.request_id)
        for session_id, robot_id in self._sessions.items():
            self._endpoint.abandon(session_id, robot_id, self)

    # --- writing -----------------------------------------------------------------------------------------------

    def _finish(self, pending: _Pending, outcome: Outcome) -> None:
        self._pending.discard(pending)
        self._progress.set()
        if not self._is_open:
            return
        try:
            if isinstance(outcome, ActionChunk):
                self._endpoint.checker.check(outcome)
                self._post_chunk(pending, outcome)
            else:
                self._post_error(outcome, pending.seq, pending.robot_id)
        except GanglionError as error:
            self._post_error(error, pending.seq, pending.robot_id)
        except Exception:
            logger.exception("defect while answering a request")
            defect = InternalError("see the traceback above")
            self._post_error(defect, pending.seq, pending.robot_id)

    def _post_chunk(self, pending: _Pending, chunk: ActionChunk) -> None:
        service_ms = (self._endpoint.clock.now_s() - pending.received_s) * 1e3
        body = reply.chunk_map(
            chunk,
            service_ms=service_ms,
            prev_total_ms=self._prev_total_ms,
            notes=pending.notes,
        )
        event = {"type": "websocket.send", "bytes": self._encoder.encode(body)}
        infer_ms = chunk.timing.infer_ms
        self._post(_Message(event=event, received_s=pending.received_s, infer_ms=infer_ms))

    def _post_error(self, error: GanglionError, seq: int | None, robot_id: object) -> None:
        error_id = secrets.token_hex(4)
        level = LOG_LEVELS.get(error.code, logging.INFO)
        who = str(self._sender.robot_id if robot_id is None else robot_id)[:128]
        logger.log(level, "error %s %s for robot %r: %s", error_id, error.code, who, error)
        if seq is None:
            text = reply.error_text(error, error_id)
            self._post(_Message(event={"type": "websocket.send", "text": text}))
        else:
            body = reply.error_map(error, error_id, seq)
            self._post(_binary(self._encoder.encode(body)))

    def _post(self, message: _Message) -> None:
        self._unsent.append(message)
        self._has_unsent.set()

    async def _write(self) -> None:
        clock, unsent = self._endpoint.clock, self._unsent
        with contextlib.suppress(OSError):  # the peer is gone; the reader hears of it too
            while True:
                if not unsent:
                    self._has_unsent.clear()
                    await self._has_unsent.wait()
                message = unsent[0]
                await self._send(message.event)
                unsent.popleft()
                self._progress.set()
                if message.received_s is not None:
                    total_ms = (clock.now_s() - message.received_s) * 1e3
                    self._prev_total_ms = total_ms
                    overhead_s = max(0.0, total_ms - message.infer_ms) * 1e-3
                    self._endpoint.metrics.overhead_seconds.observe(overhead_s)
                if message.event["type"] == "websocket.close":
                    return
        self._is_open = False
        unsent.clear()
        self._progress.set()

    async def _wait_for_progress(self) -> None:
        """Until an outcome came or a message left."""
        self._progress.clear()
        await self._progress.wait()


def _binary(frame: bytes) -> _Message:
    return _Message(event={"type": "websocket.send", "bytes": frame})


def _close(code: int, reason: str) -> dict[str, Any]:
    cut = reason.encode()[:120].decode(errors="ignore")  # a close frame holds 123 bytes of reason
    return {"type": "websocket.close", "code": code, "reason": cut}
