"""Client: a robot's end of the wire, blocking (`Client`) and asyncio (`AsyncClient`). All that a robot installs.

Called by robots' control loops. Knows the protocol (docs/protocol.md), neither torch nor the server's code.

    with Client("ws://127.0.0.1:8000", robot_id="arm-1") as client:
        reply = client.infer({"observation.images.corner": image, ...}, prompt="open the drawer")
        reply.actions    # float32 [horizon, action_dim]; reply.seq says which observation they rest on

Every call has a timeout. A reply is only ever handed out for a request that is still wanted: what answers a request that
timed out, was reset or was sent on an earlier connection is dropped. This client is not a safety function: a robot needs a
fallback of its own for the time without valid actions.
"""

from ganglion.client.asynchronous import AsyncClient
from ganglion.client.blocking import Client
from ganglion.client.conversation import Answer, Hints, Outgoing, Reply
from ganglion.errors import (
    ConnectionLostError,
    ReplyError,
    ReplyTimeoutError,
    UnauthorizedError,
)

__all__ = [
    "Answer",
    "AsyncClient",
    "Client",
    "ConnectionLostError",
    "Hints",
    "Outgoing",
    "Reply",
    "ReplyError",
    "ReplyTimeoutError",
    "UnauthorizedError",
]
