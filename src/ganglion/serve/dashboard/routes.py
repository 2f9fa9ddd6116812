"""Routes: where the page, its parts, its feed and the robots' side channel are found.

Called once by `serve.app`, which checks Host, Origin and key before any of them. Reads the page's
files once; knows nothing of what is in them.
"""

from hashlib import sha256
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from ganglion.clock import Clock
from ganglion.serve.dashboard.feed import Feed
from ganglion.serve.dashboard.robots import SideChannel
from ganglion.serve.hub import Hub
from ganglion.service import LanguageService, Service
from ganglion.spec import PolicySpec

FEED_PATH = "/v1/dashboard"
SIDE_PATH = "/v1/robots/side"
PAGE = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def dashboard_routes(
    *,
    hub: Hub,
    service: Service,
    policy: PolicySpec | None,
    language: LanguageService | None,
    clock: Clock,
) -> list[BaseRoute]:
    """`/` and `/dashboard/*` (the page), FEED_PATH and, where robots can come, SIDE_PATH (websockets).

    `policy`, `language`: None where the server has none.
    """
    parts = {
        item.name: _Part(item.name, item.read_bytes())
        for item in resources.files(__package__).joinpath("static").iterdir()
        if _suffix(item.name) in MEDIA_TYPES
    }

    async def page(request: Request) -> Response:
        return parts[PAGE].reply(request)

    async def part(request: Request) -> Response:
        found = parts.get(request.path_params["name"])
        if found is None:
            return Response("no such part of the dashboard", 404, media_type="text/plain")
        return found.reply(request)

    feed = Feed(hub=hub, service=service, policy=policy, language=language, clock=clock)
    routes: list[BaseRoute] = [
        Route("/", page),
        Route("/dashboard/{name}", part),
        WebSocketRoute(FEED_PATH, feed.serve),
    ]
    if policy is not None:
        routes.append(WebSocketRoute(SIDE_PATH, SideChannel(hub).serve))
    return routes


class _Part:
    """One file of the page, in memory."""

    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._headers = {
            **HEADERS,
            "Content-Type": MEDIA_TYPES[_suffix(name)],
            "ETag": f'"{sha256(content).hexdigest()[:16]}"',
        }

    def reply(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)


def _suffix(name: str) -> str:
    return name[name.rfind(".") :]
