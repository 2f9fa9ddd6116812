"""Broken input over real sockets: whatever one peer sends, the server lives and every other robot is served."""

import contextlib
import random
import socket
import threading

import pytest
from websockets.exceptions import ConnectionClosed

from ganglion import wire
from ganglion.client import Client
from ganglion.errors import GanglionError
from ganglion.serve.app import ServerThread
from ganglion.serve.fake import FakeService
from tests.e2e.edge_stage import SPEC, WAIT_S, bare, observation, read

FULL = observation(
    robot_id="arm", session_id="fuzz", seq=3, obs_time_ns=5, control_hz=20.0, deadline_ms=1e3, seed=1
)  # fmt: skip
PLAIN = observation()


@pytest.fixture
def server():
    with FakeService(SPEC) as service, ServerThread(service) as thread:
        yield thread


class Witness:
    """A well-behaved robot that is served all the while; `num_replies` at the end, or what went wrong."""

    def __init__(self, server):
        self._client = Client(server.ws_url, robot_id="witness")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.num_replies, self.error = 0, None

    def _run(self):
        while not self._is_over.wait(0.01):
            try:
                self._client.infer(observation())
            except GanglionError as error:
                self.error = error
                return
            self.num_replies += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *details):
        self._is_over.set()
        self._thread.join()
        self._client.close()


def mutate(frame: bytes, rng: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.randint(1, 3)):
        at = rng.choice((rng.randrange(len(data) + 1), rng.randrange(min(len(data), 80) + 1)))
        match rng.randrange(6):
            case 0:
                del data[at : at + rng.randint(1, 16)]
            case 1:
                data = data[:at]
            case 2:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            case _ if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def test_mutated_frames_are_answered_or_closed_and_the_others_live_on(server):
    rng = random.Random(3)
    frames = [wire.encode(FULL), wire.encode(PLAIN), wire.encode({"endpoint": "reset", "seq": 4})]
    codes, num_answers, num_sent = {}, 0, 0
    with Witness(server) as witness:
        while num_sent < 3_000:
            try:
                with bare(server) as peer:
                    read(peer)
                    while num_sent < 3_000:
                        num_sent += 1
                        peer.send(mutate(rng.choice(frames), rng))
                        peer.recv(timeout=WAIT_S)  # one answer each, or the close
                        num_answers += 1
            except ConnectionClosed as closed:
                code = closed.rcvd.code if closed.rcvd is not None else None
                codes[code] = codes.get(code, 0) + 1
    assert witness.error is None
    assert witness.num_replies > 10
    assert codes.keys() == {1002}
    assert num_answers + codes[1002] == num_sent
    assert num_answers > 500


def test_broken_bytes_on_the_socket_harm_nobody_else(server):
    rng = random.Random(5)
    handshake = (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    payload = wire.encode(PLAIN)
    masked = b"\x82\xfe" + len(payload).to_bytes(2, "big") + b"\0\0\0\0" + payload
    with Witness(server) as witness:
        for attempt in range(600):
            raw = (
                mutate(handshake + masked, rng) if attempt % 2 else handshake + mutate(masked, rng)
            )
            with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as sock:
                sock.sendall(raw)
                sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(65536):
                        pass
    assert witness.error is None
    assert witness.num_replies > 10


def test_peers_that_vanish_in_the_middle_leave_nothing_behind():
    rng = random.Random(9)
    frame = wire.encode(PLAIN)
    with FakeService(SPEC, infer_s=0.002) as service, ServerThread(service) as server:
        with Witness(server) as witness:
            for _ in range(200):
                with bare(server) as peer:
                    read(peer)
                    for _ in range(rng.randint(0, 3)):
                        peer.send(frame)
                    if rng.random() < 0.5:
                        peer.socket.shutdown(socket.SHUT_RDWR)
        assert witness.error is None
        pause = threading.Event()
        for _ in range(500):
            if not service.stats().sessions:
                break
            pause.wait(0.01)
        stats = service.stats()
    assert stats.sessions == ()
    assert stats.num_requests == stats.num_results + stats.num_errors + stats.num_cancelled
