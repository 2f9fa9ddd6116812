"""A stage for tests of the edge: observations that the fake policy takes, and bare websockets."""

import numpy as np
from websockets.sync.client import ClientConnection, connect

from ganglion import wire
from ganglion.serve.fake import fake_spec

SPEC = fake_spec(size=16)
CORNER, GRIPPER, STATE = SPEC.views[0].key, SPEC.views[1].key, SPEC.state_key
WAIT_S = 10.0


def observation(**changes):
    fields = {
        CORNER: np.full((16, 16, 3), 7, np.uint8),
        GRIPPER: np.zeros((16, 16, 3), np.uint8),
        STATE: np.zeros(4, np.float32),
        "prompt": "open the drawer",
    }
    fields.update(changes)
    return {key: value for key, value in fields.items() if value is not ...}


def bare(server, path: str = "/", **options) -> ClientConnection:
    """A websocket without any of our client's code. Use with `with`."""
    return connect(
        server.ws_url + path,
        compression=None,
        proxy=None,
        ping_interval=None,
        open_timeout=WAIT_S,
        close_timeout=WAIT_S,
        max_size=None,
        **options,
    )


def read(socket: ClientConnection):
    """The next message: a decoded map, or text."""
    message = socket.recv(timeout=WAIT_S)
    return message if isinstance(message, str) else wire.decode(message)


def ask(socket: ClientConnection, fields):
    """Send one request, read one message."""
    socket.send(wire.encode(fields))
    return read(socket)
