"""Keys: who may come in when the server has an API key. ASGI middleware around everything but the probes.

Called by `serve.app`. Robots send the key as a header (`Authorization: Api-Key KEY` or `Bearer KEY`). A browser opens any
page once with `?key=KEY`, gets it back as an HttpOnly cookie and is redirected to the page without the key.
"""

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ganglion.metrics import Metrics
from ganglion.serve.refusal import header, refuse

COOKIE = "ganglion_key"
OPEN_PATHS = frozenset({"/livez", "/healthz"})  # probes that tell nothing and start nothing


class KeyGuard:
    """Lets a request through when it carries the key. Compares in constant time."""

    def __init__(self, app: ASGIApp, *, api_key: str, metrics: Metrics) -> None:
        self._app, self._key, self._metrics = app, api_key.encode(), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        is_http = scope["type"] == "http"
        if is_http and scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        if is_http and scope["method"] == "GET" and (target := self._sign_in_target(scope)):
            redirect = RedirectResponse(target, status_code=303)
            redirect.set_cookie(COOKIE, self._key.decode(), httponly=True, samesite="strict")
            await redirect(scope, receive, send)
            return
        if not (self._has_key_header(scope) or self._has_key_cookie(scope)):
            self._metrics.refused_requests.inc(reason="key")
            text = "this server needs its API key: send the header 'Authorization: Api-Key KEY'\n"
            await refuse(scope, receive, send, status=401, text=text)
            return
        await self._app(scope, receive, send)

    def _has_key_header(self, scope: Scope) -> bool:
        scheme, _, key = header(scope, b"authorization").partition(b" ")
        return scheme.lower() in (b"api-key", b"bearer") and self._is_key(key.strip())

    def _has_key_cookie(self, scope: Scope) -> bool:
        try:
            cookies = SimpleCookie(header(scope, b"cookie").decode("latin-1"))
        except CookieError:
            return False
        return COOKIE in cookies and self._is_key(cookies[COOKIE].value.encode())

    def _sign_in_target(self, scope: Scope) -> str | None:
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        if not any(name == "key" and self._is_key(value.encode()) for name, value in query):
            return None
        rest = urlencode([(name, value) for name, value in query if name != "key"])
        path = "/" + scope["path"].lstrip("/\\")  # never "//host": the redirect stays here
        return f"{path}?{rest}" if rest else path

    def _is_key(self, key: bytes) -> bool:
        return hmac.compare_digest(key, self._key)
