"""Limits: from where the edge may be addressed, and how many sockets it holds. ASGI middleware around everything.

Called by `serve.app`. A web page of somebody else must neither read this server through a name of its own that points
here (DNS rebinding) nor make the browser send it anything (CSRF): Host must be a name we know or a plain IP address, and
Origin, when there is one, must be this very server. Robots send no Origin, so they may use any name for the machine.
"""

import asyncio
import ipaddress
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ganglion.config import ServeConfig
from ganglion.errors import ConfigError
from ganglion.metrics import Metrics
from ganglion.serve.refusal import header, refuse

REQUEST_TIMEOUT_S = 10.0  # from accepting a connection to its first whole request


def check_exposure(config: ServeConfig) -> None:
    """Raises ConfigError when the server would listen beyond this machine without a key."""
    if config.api_key is not None and not config.api_key.strip():
        raise ConfigError(
            "serve.api_key is empty", next_step="set a long random text, or leave it out"
        )
    if config.api_key is None and not is_loopback(config.host):
        raise ConfigError(
            f"serve.host = {config.host!r} is reachable from other machines, and serve.api_key is not set",
            next_step="set serve.api_key, or bind 127.0.0.1 and tunnel (ssh -L 8000:127.0.0.1:8000)",
        )


def is_loopback(host: str) -> bool:
    """Does `host` name this machine only?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HostGuard:
    """Refuses foreign Host and Origin headers with 403."""

    def __init__(self, app: ASGIApp, *, config: ServeConfig, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._names = {"localhost", config.host.lower(), *(n.lower() for n in config.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        host, origin = header(scope, b"host"), header(scope, b"origin")
        is_robot = scope["type"] == "websocket" and not origin
        if not is_robot and not self._is_known(host):
            self._metrics.refused_requests.inc(reason="host")
            text = "unknown Host header: add the name to serve.allowed_hosts\n"
            await refuse(scope, receive, send, status=403, text=text)
        elif origin and not self._is_same_origin(origin, host):
            self._metrics.refused_requests.inc(reason="origin")
            text = "pages of another origin may not use this server\n"
            await refuse(scope, receive, send, status=403, text=text)
        else:
            await self._app(scope, receive, send)

    def _is_known(self, host: bytes) -> bool:
        name = _host_name(host.decode("latin-1").lower())
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _is_same_origin(self, origin: bytes, host: bytes) -> bool:
        scheme, separator, authority = origin.lower().partition(b"://")
        return scheme in (b"http", b"https") and bool(separator) and authority == host.lower()


def _host_name(host: str) -> str:
    """Host header without its port: "[::1]:8000" -> "::1"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def impatient_h11(**settings: Any) -> asyncio.Protocol:
    """uvicorn's h11 protocol, but a peer that does not finish its first request in time is cut off.

    `settings` are uvicorn's, passed on as they are.
    """
    protocol = H11Protocol(**settings)
    loop = asyncio.get_running_loop()
    loop.call_later(REQUEST_TIMEOUT_S, _close_when_silent, protocol)
    return protocol


def _close_when_silent(protocol: H11Protocol) -> None:
    has_request = protocol.scope is not None
    if not has_request and protocol.transport is not None and not protocol.transport.is_closing():
        protocol.transport.close()
