"""Refusal: how the edge says no before a request is served, over HTTP or in a websocket's handshake.

Called by the guards (`keys`, `limits`) and by `app`. Knows nothing of the reasons. Clients of OpenAI's interface read errors
as JSON of a shape of their own, so on its paths they get that.
"""

from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

OPENAI_PATHS = (
    "/v1/chat/", "/v1/completions", "/v1/responses", "/v1/models", "/tokenize", "/detokenize",
)  # fmt: skip


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of this name, b"" when there is none."""
    return next((value for key, value in scope["headers"] if key == name), b"")


async def refuse(scope: Scope, receive: Receive, send: Send, *, status: int, text: str) -> None:
    """Answer with `status` and one line of text; a websocket is refused before it opens."""
    if scope["type"] == "http":
        response: Response = PlainTextResponse(text, status_code=status)
        if scope["path"].startswith(OPENAI_PATHS):
            response = JSONResponse(_openai_error(status, text), status_code=status)
        await response(scope, receive, send)
        return
    await receive()  # websocket.connect
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    start = {"type": "websocket.http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "websocket.http.response.body", "body": body})


def _openai_error(status: int, text: str) -> dict[str, dict[str, str | None]]:
    is_key = status == 401
    kind = "authentication_error" if is_key else "permission_error"
    code = "invalid_api_key" if is_key else "forbidden"
    return {"error": {"message": text.strip(), "type": kind, "param": None, "code": code}}
