"""Side: what an arm shows people: telemetry, and its scene while somebody looks. Never actions, never in the loop's way.
People may make its link worse and better again: `{"type": "impair", "delay_ms", "jitter_ms", "loss"}`.

Owned by `robots.runner`, fed by `robots.loop`. Everything goes through a thread of its own; the newest replaces what was
not sent yet. The messages are written down in the server's `serve/hub.py`. Optional: the arm is controlled the same without.
"""

import io
import logging
import random
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from ganglion import wire
from ganglion.clock import Clock, RealClock
from ganglion.errors import FieldError, MissingDependencyError, WireError
from ganglion.robots.impairment import Impairment
from ganglion.types import UInt8Array

logger = logging.getLogger(__name__)

PATH = "/v1/robots/side"
VIEW_PX = 224
JPEG_QUALITY = 70
WATCHED_HZ, UNWATCHED_HZ = 10.0, 1.0  # of telemetry
MAX_VIEW_HZ = 10.0
MAX_QUEUE_ROWS = 64
WAIT_S = 0.1  # between looks at what the server says
TIMEOUT_S = 2.0
FIRST_PAUSE_S, MAX_PAUSE_S = 0.2, 5.0
POLICY_VIOLATION = 1008


class SideChannel:
    """One robot's side channel. The loop's thread offers, a thread of its own sends."""

    def __init__(
        self,
        url: str,
        *,
        hello: dict[str, Any],
        impairment: Impairment,
        on_impair: Callable[[Impairment], None],
        api_key: str | None = None,
    ) -> None:
        """`impairment`: of the link now. `on_impair`: called on the channel's own thread."""
        self._url = urlunsplit(urlsplit(url)._replace(path=PATH, query=""))
        self._headers = {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        self._hello, self._impairment, self._on_impair = hello, impairment, on_impair
        self._clock: Clock = RealClock()
        self._save_jpeg = _jpeg_encoder()
        self._changed = threading.Condition()
        self._telemetry: dict[str, Any] | None = None
        self._view: UInt8Array | None = None
        self._is_watched, self._max_view_hz = False, MAX_VIEW_HZ
        self._is_closed = threading.Event()
        self._next_telemetry_s = self._next_view_s = 0.0
        self._thread = threading.Thread(target=self._run, name="side", daemon=True)
        self._thread.start()

    def wants_telemetry(self) -> bool:
        """Is it time for the next one? The loop's thread."""
        return self._clock.now_s() >= self._next_telemetry_s

    def offer_telemetry(self, body: dict[str, Any]) -> None:
        """Send this when there is time. Replaces what was not sent yet."""
        rate_hz = WATCHED_HZ if self._is_watched else UNWATCHED_HZ
        self._next_telemetry_s = self._clock.now_s() + 1 / rate_hz
        with self._changed:
            self._telemetry = body
            self._changed.notify()

    def wants_view(self) -> bool:
        """Does somebody look, and is it time for the next view? The loop's thread."""
        return self._is_watched and self._clock.now_s() >= self._next_view_s

    def offer_view(self, pixels: UInt8Array) -> None:
        """Send these pixels as a JPEG. Replaces what was not sent yet."""
        self._next_view_s = self._clock.now_s() + 1 / min(MAX_VIEW_HZ, self._max_view_hz)
        with self._changed:
            self._view = pixels
            self._changed.notify()

    def close(self) -> None:
        """End the thread and the connection."""
        self._is_closed.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._is_closed.is_set():
            try:
                with connect(
                    self._url,
                    additional_headers=self._headers,
                    compression=None,
                    open_timeout=TIMEOUT_S,
                    close_timeout=TIMEOUT_S,
                    ping_interval=None,
                    proxy=None,
                ) as socket:
                    pause_s = FIRST_PAUSE_S
                    self._converse(socket)
            except InvalidStatus as error:
                logger.warning(
                    "side channel: %s answered %d", self._url, error.response.status_code
                )
                if error.response.status_code in (401, 403, 404):
                    return
            except ConnectionClosed as error:
                if error.rcvd is not None and error.rcvd.code == POLICY_VIOLATION:
                    logger.warning("side channel: the server closed it: %s", error.rcvd.reason)
                    return
            except (OSError, TimeoutError, InvalidHandshake, WireError) as error:
                logger.info("side channel: %s; trying again", error)
            finally:
                self._is_watched = False
            self._is_closed.wait(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def _converse(self, socket: ClientConnection) -> None:
        hello = {**self._hello, "impair": self._impairment.to_json()}
        socket.send(wire.encode({"hello": hello}))
        while not self._is_closed.is_set():
            with self._changed:
                if self._telemetry is None and self._view is None:
                    self._changed.wait(WAIT_S)
                telemetry, self._telemetry = self._telemetry, None
                view, self._view = self._view, None
            if telemetry is not None:
                socket.send(wire.encode({"telemetry": telemetry}))
            if view is not None:
                socket.send(wire.encode({"jpeg": self._save_jpeg(view)}))
            self._listen(socket)

    def _listen(self, socket: ClientConnection) -> None:
        while True:
            try:
                frame = socket.recv(timeout=0)
            except TimeoutError:
                return
            message = wire.unpack(frame) if isinstance(frame, bytes) else {}
            if "watch" in message:
                self._max_view_hz = max(0.1, float(message.get("max_view_hz", MAX_VIEW_HZ)))
                self._is_watched = bool(message["watch"])
            elif message.get("type") == "impair":
                self._impair(message)
            elif "error" in message:
                logger.warning("side channel: refused: %s", message["error"])

    def _impair(self, message: dict[str, Any]) -> None:
        try:
            impairment = Impairment.from_json(message)
        except FieldError as error:
            logger.warning("side channel: %s", error)
        else:
            logger.info("side channel: the link becomes %s", impairment)
            self._impairment = impairment
            self._on_impair(impairment)


def _jpeg_encoder() -> Any:
    try:
        from PIL import Image  # late: only robots that people watch need it
    except ImportError as error:
        raise MissingDependencyError(
            f"views for people need pillow: {error}", next_step="pip install 'ganglion[sim]'"
        ) from error

    def save(pixels: UInt8Array) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=JPEG_QUALITY)
        return file.getvalue()

    return save
