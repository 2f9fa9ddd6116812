"""Robots: the server's end of the side channel, `/v1/robots/side`. The contract is hub's docstring.

Mounted by `dashboard.routes`. Decodes, checks sizes and closes with the right code; what a message
means is the hub's.
"""

import asyncio
import contextlib
import logging
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from ganglion.errors import GanglionError, WireError
from ganglion.serve.dashboard.orders import error_body
from ganglion.serve.hub import Hub, Robot
from ganglion.serve.side import MAX_MESSAGE_BYTES, Impair, Watch
from ganglion.wire import WireLimits, encode, unpack

logger = logging.getLogger(__name__)

LIMITS = WireLimits(max_frame_bytes=MAX_MESSAGE_BYTES, max_depth=4)
MAX_CLOSE_REASON = 120  # bytes; a control frame holds 123


class _CloseError(Exception):
    """This connection ends now."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class SideChannel:
    """All robots' side connections of one server."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def serve(self, socket: WebSocket) -> None:
        """One robot, from its handshake to its end."""
        await socket.accept()
        try:
            await self._converse(socket)
        except _CloseError as end:
            reason = end.reason.encode("ascii", "replace")[:MAX_CLOSE_REASON].decode()
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it left first
                await socket.close(end.code, reason)
        except WebSocketDisconnect:
            pass

    async def _converse(self, socket: WebSocket) -> None:
        hello = await _next_message(socket)
        wishes = _Wishes()
        try:
            robot = self._hub.join(hello, tell=wishes.tell, take_over=wishes.take_over)
        except GanglionError as error:
            await socket.send_bytes(encode({"error": error_body(error)}))
            raise _CloseError(1008, str(error)) from error
        logger.info("robot %s: side channel open", robot.hello.robot_id)
        parts = [
            asyncio.create_task(self._receive(socket, robot)),
            asyncio.create_task(wishes.send(socket)),
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            self._hub.leave(robot)
            logger.info("robot %s: side channel closed", robot.hello.robot_id)

    async def _receive(self, socket: WebSocket, robot: Robot) -> None:
        while True:
            message = await _next_message(socket)
            try:
                self._hub.receive(robot, message)
            except GanglionError as error:
                await socket.send_bytes(encode({"error": error_body(error)}))


class _Wishes:
    """The newest things to tell one robot, one of each kind; newer ones replace them."""

    def __init__(self) -> None:
        self._wishes: dict[type, Watch | Impair] = {}
        self._is_replaced = False
        self._news = asyncio.Event()

    def tell(self, wish: Watch | Impair) -> None:
        self._wishes[type(wish)] = wish
        self._news.set()

    def take_over(self) -> None:
        self._is_replaced = True
        self._news.set()

    async def send(self, socket: WebSocket) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._is_replaced:
                raise _CloseError(1008, "a newer connection of this robot took over")
            wishes, self._wishes = self._wishes, {}
            for wish in wishes.values():
                await socket.send_bytes(encode(wish.message()))


async def _next_message(socket: WebSocket) -> dict[str, Any]:
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    frame = message.get("bytes")
    if frame is None:
        raise _CloseError(1003, "messages are binary msgpack maps")
    if len(frame) > MAX_MESSAGE_BYTES:
        raise _CloseError(1009, f"at most {MAX_MESSAGE_BYTES} bytes, got {len(frame)}")
    try:
        return unpack(frame, LIMITS)
    except WireError as error:
        raise _CloseError(1002, str(error)) from error
