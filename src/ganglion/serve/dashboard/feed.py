"""Feed: the websocket between the server and each browser that looks. Newest wins, nothing queues.

Mounted by `dashboard.routes`. One painter task serves all browsers and runs only while there are
any; each browser is sent the newest picture when its socket is free, so a slow one skips pictures
instead of growing a queue. Knows neither what the page draws nor how robots connect.

Server -> page: text = JSON, {"kind": "hello" | "state" | "answer", ...}; binary = 4 bytes, the card
number big-endian, then a JPEG. Page -> server: see `dashboard.orders`.
"""

import asyncio
import contextlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from ganglion import __version__
from ganglion.clock import Clock
from ganglion.serve.dashboard.orders import MAX_ORDER_BYTES, obey
from ganglion.serve.dashboard.picture import Painter, Picture
from ganglion.serve.hub import Hub
from ganglion.service import LanguageService, Residence, Service
from ganglion.spec import PolicySpec
from ganglion.types import SessionId

PICTURE_PERIOD_S = 0.1
MAX_BROWSERS = 16
_CARD = struct.Struct(">I")


@dataclass(slots=True)
class Seen:
    """What one browser has been sent."""

    last_step: int = -1
    last_turn: int = -1
    pool_version: int = -1
    jpeg_versions: dict[SessionId, int] = field(default_factory=dict)


class Feed:
    """All browsers of one server."""

    def __init__(
        self,
        *,
        hub: Hub,
        service: Service,
        policy: PolicySpec | None,
        language: LanguageService | None,
        clock: Clock,
    ) -> None:
        self._hub, self._service, self._clock = hub, service, clock
        self._policy, self._language = policy, language
        self._start_s = clock.now_s()
        self._painter = Painter(hub)
        self._task: asyncio.Task[None] | None = None
        self._picture: Picture | None = None
        self._fresh = asyncio.Event()
        self._num_browsers = 0

    async def serve(self, socket: WebSocket) -> None:
        """One browser, from its handshake to its end."""
        await socket.accept()
        if self._num_browsers >= MAX_BROWSERS:
            await socket.close(1013, f"{MAX_BROWSERS} browsers look already; close one")
            return
        self._enter()
        parts = [
            asyncio.create_task(self._send(socket)),
            asyncio.create_task(self._receive(socket)),
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                with contextlib.suppress(WebSocketDisconnect):
                    part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            self._leave()

    def _enter(self) -> None:
        self._num_browsers += 1
        self._hub.add_watcher()
        if self._task is None:
            self._task = asyncio.create_task(self._paint())

    def _leave(self) -> None:
        self._num_browsers -= 1
        self._hub.remove_watcher()
        if self._num_browsers == 0 and self._task is not None:
            self._task.cancel()
            self._task, self._picture = None, None

    async def _paint(self) -> None:
        while True:
            self._picture = self._painter.paint(
                self._service.stats(),
                now_s=self._clock.now_s(),
                start_s=self._start_s,
                residences=self._residences(),
            )
            fresh, self._fresh = self._fresh, asyncio.Event()
            fresh.set()
            await asyncio.sleep(PICTURE_PERIOD_S)

    async def _send(self, socket: WebSocket) -> None:
        await socket.send_text(self._hello())
        seen = Seen()
        while True:
            fresh = self._fresh
            if self._picture is not None:
                await self._send_picture(socket, self._picture, seen)
            await fresh.wait()

    async def _send_picture(self, socket: WebSocket, picture: Picture, seen: Seen) -> None:
        await socket.send_text(
            picture.text(
                last_step=seen.last_step, last_turn=seen.last_turn, pool_version=seen.pool_version
            )
        )
        seen.last_step, seen.last_turn = picture.last_step, picture.last_turn
        seen.pool_version = picture.pool_version
        seen.jpeg_versions = {
            session_id: version
            for session_id, version in seen.jpeg_versions.items()
            if session_id in picture.views
        }
        for session_id, card in picture.views.items():
            robot = self._hub.speaker(session_id)
            if robot is None or robot.jpeg is None:
                continue
            if seen.jpeg_versions.get(session_id) != robot.jpeg_version:
                seen.jpeg_versions[session_id] = robot.jpeg_version
                await socket.send_bytes(_CARD.pack(card) + robot.jpeg)

    async def _receive(self, socket: WebSocket) -> None:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:
                await socket.close(1003, "orders are JSON text")
                return
            if len(text) > MAX_ORDER_BYTES:
                await socket.close(1009, f"an order has at most {MAX_ORDER_BYTES} characters")
                return
            await socket.send_text(obey(text, self._service, self._hub, self._policy))

    def _residences(self) -> dict[str, Residence]:
        if self._language is None:
            return {}
        names = [spec.name for spec in self._language.language_models()]
        return {name: self._language.residence(name) for name in names}

    def _hello(self) -> str:
        models = () if self._language is None else self._language.language_models()
        return json.dumps(
            {
                "kind": "hello",
                "version": __version__,
                "policy": None if self._policy is None else _policy(self._policy),
                "models": [
                    {
                        "name": spec.name,
                        "family": spec.family,
                        "version": spec.version,
                        "max_tokens": spec.max_tokens,
                    }
                    for spec in models
                ],
            }
        )


def _policy(spec: PolicySpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "family": spec.family,
        "version": spec.version,
        "horizon": spec.horizon,
        "action_dim": spec.action_dim,
        "num_flow_steps": spec.num_flow_steps,
        "control_hz": spec.control_hz,
        "action_low": spec.action_low,
        "action_high": spec.action_high,
        "max_prompt_bytes": spec.max_prompt_bytes,
    }
