"""openpi baseline: openpi's websocket policy server, written again from its protocol and its server's behaviour.

Run by `bench wire` as a process of its own. Faithful where it costs time: websockets' asyncio server without compression,
arrays by msgpack hooks without checks, the policy called inside the connection's coroutine, `server_timing` added to the
policy's own map. (Physical-Intelligence/openpi at 15a9616, src/openpi/serving/websocket_policy_server.py; no code taken.)
"""

import asyncio
import http
import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from ganglion.clock import Clock, RealClock

logger = logging.getLogger(__name__)

PolicyFunction = Callable[[Mapping[str, Any]], dict[str, Any]]
OnListening = Callable[[int], None]


class OpenpiServer:
    """Serves one policy, one request at a time for each connection, all on one event loop."""

    def __init__(
        self, policy: PolicyFunction, *, metadata: Mapping[str, Any], clock: Clock | None = None
    ) -> None:
        self._policy, self._metadata = policy, dict(metadata)
        self._clock = clock or RealClock()

    def serve_forever(self, host: str, port: int, on_listening: OnListening) -> None:
        """Block; `on_listening` learns the port."""
        asyncio.run(self._serve(host, port, on_listening))

    async def _serve(self, host: str, port: int, on_listening: OnListening) -> None:
        async with serve(
            self._converse, host, port, compression=None, max_size=None, process_request=_health
        ) as server:
            on_listening(server.sockets[0].getsockname()[1])
            await server.serve_forever()

    async def _converse(self, peer: ServerConnection) -> None:
        packer = msgpack.Packer(default=_pack)
        await peer.send(packer.pack(self._metadata))
        previous_s: float | None = None
        while True:
            try:
                start_s = self._clock.now_s()
                observation = msgpack.unpackb(await peer.recv(), object_hook=_unpack)
                infer_start_s = self._clock.now_s()
                answer = self._policy(observation)
                infer_s = self._clock.now_s() - infer_start_s
                timing = {"infer_ms": infer_s * 1e3}
                if previous_s is not None:
                    timing["prev_total_ms"] = previous_s * 1e3
                answer["server_timing"] = timing
                await peer.send(packer.pack(answer))
                previous_s = self._clock.now_s() - start_s
            except ConnectionClosed:
                return
            except Exception:
                logger.exception("the policy failed")
                await peer.send(traceback.format_exc())
                await peer.close(1011, "the previous message says why")
                raise


def _health(connection: ServerConnection, request: Request) -> Response | None:
    if request.path == "/healthz":
        return connection.respond(http.HTTPStatus.OK, "OK\n")
    return None


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "VOc":
        raise ValueError(f"dtype {value.dtype} cannot travel")
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return value


def _unpack(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return np.ndarray(
            buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"]
        )
    if b"__npgeneric__" in value:
        return np.dtype(value[b"dtype"]).type(value[b"data"])
    return value
