"""Refusal: how the edge says no before a request is served, over HTTP or in a websocket's handshake.

Called by the guards (`keys`, `limits`) and by `app`. Knows nothing of the reasons.
"""

from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of this name, b"" when there is none."""
    return next((value for key, value in scope["headers"] if key == name), b"")


async def refuse(scope: Scope, receive: Receive, send: Send, *, status: int, text: str) -> None:
    """Answer with `status` and one line of text; a websocket is refused before it opens."""
    if scope["type"] == "http":
        await PlainTextResponse(text, status_code=status)(scope, receive, send)
        return
    await receive()  # websocket.connect
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    start = {"type": "websocket.http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "websocket.http.response.body", "body": body})
