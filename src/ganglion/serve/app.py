"""App: puts the edge together and runs it: robots' sockets, health, dashboard, OpenAI's interface, guards, one event loop.

Called by `cli`, `bench` and tests. Knows the Service and LanguageService seams and nothing behind them.
"""

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, cast

import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from ganglion.clock import Clock, RealClock
from ganglion.config import ServeConfig
from ganglion.errors import ConfigError, InternalError
from ganglion.metrics import Metrics
from ganglion.serve.dashboard.routes import dashboard_routes
from ganglion.serve.health import health_routes
from ganglion.serve.hub import Hub
from ganglion.serve.keys import KeyGuard
from ganglion.serve.limits import HostGuard, check_exposure, impatient_h11
from ganglion.serve.openai.routes import missing_routes, openai_routes
from ganglion.serve.refusal import refuse
from ganglion.serve.robot import RobotEndpoint
from ganglion.service import LanguageService, Service
from ganglion.units import KIB

logger = logging.getLogger(__name__)

# A busy robot answers pings late (rendering holds its threads); a dead one is found within these two together.
SWITCH_INTERVAL_S = 0.0005
PING_INTERVAL_S, PING_TIMEOUT_S = 10.0, 30.0
MAX_HEADER_BYTES = 16 * KIB
MAX_HTTP_CONNECTIONS = 64
STOP_TIMEOUT_S = 3
LAST_WORD_S = 1.0  # after that, in which a reader learns why its stream ends
START_TIMEOUT_S = 30.0
LISTEN_BACKLOG = 256
DEAD_PEER_S = 40


def build_app(
    *,
    service: Service,
    config: ServeConfig,
    clock: Clock,
    metrics: Metrics,
    language: LanguageService | None = None,
    is_language_only: bool = False,
) -> ASGIApp:
    """The whole edge as one ASGI application. Raises ConfigError when it would be open to the world.

    `is_language_only`: the service has no policy, so there is no door for robots, and the dashboard shows none.
    """
    check_exposure(config)
    policy = None if is_language_only else service.spec
    routes: list[BaseRoute] = []
    if language is not None:
        routes += openai_routes(language, policy=policy)
    routes += health_routes(service, metrics)
    robots: RobotEndpoint | None = None
    hub = Hub(clock, max_robots=config.max_connections)
    routes += dashboard_routes(
        hub=hub, service=service, policy=policy, language=language, clock=clock
    )
    if policy is not None:
        robots = RobotEndpoint(service, config=config, clock=clock, metrics=metrics)
    if language is None:
        routes += missing_routes("serve a language model too: ganglion serve chat=MODEL")
    app: ASGIApp = _Edge(routes, robots)
    if config.api_key is not None:
        app = KeyGuard(app, api_key=config.api_key, metrics=metrics)
    return HostGuard(app, config=config, metrics=metrics)


class _Edge:
    """HTTP and the dashboard's websockets by route; any other websocket is a robot's, as in openpi."""

    def __init__(self, routes: list[BaseRoute], robots: RobotEndpoint | None) -> None:
        self._pages, self._robots = Starlette(routes=routes), robots
        self._page_sockets = {route.path for route in routes if isinstance(route, WebSocketRoute)}
        # "/" is the dashboard's page over HTTP and openpi's usual address as a websocket.
        self._http_only = {route.path for route in routes if isinstance(route, Route)} - {"/"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and scope["path"] not in self._page_sockets:
            if scope["path"] in self._http_only:
                text = f"{scope['path']} is not a websocket; robots use /\n"
                await refuse(scope, receive, send, status=404, text=text)
            elif self._robots is None:
                text = "this server has language models only, no policy for robots\n"
                await refuse(scope, receive, send, status=404, text=text)
            else:
                await self._robots(scope, receive, send)
            return
        await self._pages(scope, receive, send)


@dataclass(slots=True)
class Server:
    """A bound, not yet serving edge. `serve` blocks; `stop` may be called from any thread."""

    _uvicorn: uvicorn.Server
    _socket: socket.socket
    host: str
    port: int

    @classmethod
    def bind(
        cls,
        service: Service,
        *,
        config: ServeConfig,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        language: LanguageService | None = None,
        is_language_only: bool = False,
    ) -> Self:
        """Bind the address (port 0: a free one). Raises ConfigError when it is taken or not allowed."""
        app = build_app(
            service=service,
            config=config,
            clock=clock or RealClock(),
            metrics=metrics or Metrics(),
            language=language,
            is_language_only=is_language_only,
        )
        sock = _bind(config)
        server = _Uvicorn(
            uvicorn.Config(
                app,
                http=cast(type[asyncio.Protocol], impatient_h11),
                ws="websockets-sansio",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ws_max_size=config.max_frame_bytes,
                ws_ping_interval=PING_INTERVAL_S,
                ws_ping_timeout=PING_TIMEOUT_S,
                ws_per_message_deflate=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                limit_concurrency=2 * config.max_connections + MAX_HTTP_CONNECTIONS,
                timeout_graceful_shutdown=STOP_TIMEOUT_S,
            )
        )
        return cls(server, sock, config.host, sock.getsockname()[1])

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://{self._authority}"

    @property
    def ws_url(self) -> str:
        """Where a robot finds it."""
        return f"ws://{self._authority}"

    @property
    def is_serving(self) -> bool:
        """Does it answer?"""
        return self._uvicorn.started

    def serve(self) -> None:
        """Serve until `stop`, or in the main thread until Ctrl-C or SIGTERM, which is raised again at the end.

        Asks the interpreter to pass its lock on ten times more often than usual: the engine's thread lives in the same
        process, and a robot's frame must not wait 5 ms for it.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._uvicorn.run(sockets=[self._socket])

    def stop(self) -> None:
        """Close the sockets (1012 to robots) and let `serve` return."""
        self._uvicorn.should_exit = True

    @property
    def _authority(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


class ServerThread:
    """An edge in a thread of its own. `with ServerThread(service) as server: connect(server.ws_url)`"""

    def __init__(
        self,
        service: Service,
        *,
        config: ServeConfig | None = None,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        language: LanguageService | None = None,
        is_language_only: bool = False,
    ) -> None:
        config = config or ServeConfig(port=0)
        self._server = Server.bind(
            service,
            config=config,
            clock=clock,
            metrics=metrics,
            language=language,
            is_language_only=is_language_only,
        )
        self._thread = threading.Thread(target=self._server.serve, name="edge", daemon=True)

    @property
    def port(self) -> int:
        """The bound port."""
        return self._server.port

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return self._server.url

    @property
    def ws_url(self) -> str:
        """Where a robot finds it."""
        return self._server.ws_url

    def start(self) -> None:
        """Serve; returns when connections are answered."""
        self._thread.start()
        pause = threading.Event()
        clock = RealClock()
        limit_s = clock.now_s() + START_TIMEOUT_S
        while not self._server.is_serving:
            if not self._thread.is_alive() or clock.now_s() > limit_s:
                raise InternalError("the server's thread did not start; its log says why")
            pause.wait(0.005)

    def stop(self) -> None:
        """Close every connection and end the thread."""
        self._server.stop()
        self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def run(
    service: Service,
    *,
    config: ServeConfig,
    clock: Clock | None = None,
    metrics: Metrics | None = None,
    on_bound: Callable[[Server], None] | None = None,
    language: LanguageService | None = None,
) -> None:
    """Serve in this thread until it is told to stop. `on_bound` learns the address before the first connection."""
    server = Server.bind(service, config=config, clock=clock, metrics=metrics, language=language)
    if on_bound is not None:
        on_bound(server)
    server.serve()


class _Uvicorn(uvicorn.Server):
    """One who never reads does not keep it from stopping."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        tasks = list(self.server_state.tasks)  # cancelled by now: some have a last word
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORD_S)
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()


def _notice_dead_peers(sock: socket.socket) -> None:
    """A peer that vanished without a word (power, cable) is noticed within DEAD_PEER_S, so that its generation ends.

    Accepted sockets inherit it. Robots are pinged besides.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        probe_s = DEAD_PEER_S // 4
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _bind(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # The protocol by name: asyncio turns Nagle's delay off only on sockets that say TCP.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _notice_dead_peers(sock)
    try:
        sock.bind((config.host, config.port))
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}",
            next_step="choose another serve.port (0 takes a free one) or serve.host",
        ) from error
    return sock
