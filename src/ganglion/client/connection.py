"""Connection: what both clients say when a server cannot be reached, leaves or is late; the key's header.

Called by `client.blocking` and `client.asynchronous`. Knows no requests.
"""

import contextlib
from collections.abc import Iterator

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from ganglion.errors import ConnectionLostError, FieldError, ReplyTimeoutError, UnauthorizedError

DEFAULT_TIMEOUT_S = 5.0
MAX_UNREAD = 64  # answers that nobody polled; the oldest go


def headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Api-Key {api_key}"}


@contextlib.contextmanager
def connection_errors(url: str) -> Iterator[None]:
    try:
        yield
    except InvalidStatus as error:
        response = error.response
        text = response.body.decode(errors="replace").strip()[:200] if response.body else ""
        if response.status_code == 401:
            raise UnauthorizedError(
                f"{url} refused the key: {text}", next_step="pass api_key=..."
            ) from error
        raise ConnectionLostError(f"{url} answered {response.status_code}: {text}") from error
    except (InvalidURI, ValueError) as error:  # ValueError: of a port or a host that is none
        raise FieldError(
            "url",
            expected="ws://HOST:PORT or wss://HOST:PORT",
            got=f"{url!r} ({error})",
            next_step="give the websocket address that the server prints when it starts",
        ) from error
    except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed) as error:
        raise ConnectionLostError(
            f"cannot connect to {url}: {error}",
            next_step="start the server (`ganglion serve`), or check the address",
        ) from error


def lost(url: str, error: Exception) -> ConnectionLostError:
    return ConnectionLostError(
        f"lost the connection to {url}: {error}", next_step="call reconnect()"
    )


def late(seq: int, wait_s: float) -> ReplyTimeoutError:
    return ReplyTimeoutError(
        f"no answer to request {seq} within {wait_s:g} s; it will be dropped when it comes",
        next_step="hold the robot; raise timeout_s when the policy is that slow",
    )
