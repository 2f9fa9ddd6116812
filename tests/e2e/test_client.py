import asyncio
import socket
import threading

import numpy as np
import pytest
from websockets.sync.server import serve

from ganglion import wire
from ganglion.client import (
    AsyncClient,
    Client,
    ConnectionLostError,
    Reply,
    ReplyError,
    ReplyTimeoutError,
    UnauthorizedError,
)
from ganglion.clock import RealClock
from ganglion.config import ServeConfig
from ganglion.errors import ErrorCode, FieldError, WireError
from ganglion.robots.link import Link, Sent
from ganglion.serve.app import ServerThread
from ganglion.serve.fake import FakeService
from ganglion.types import OverridePrompt
from tests.e2e.edge_stage import CORNER, SPEC, STATE, observation


@pytest.fixture
def service():
    with FakeService(SPEC) as fake:
        yield fake


@pytest.fixture
def server(service):
    with ServerThread(service) as thread:
        yield thread


@pytest.fixture
def client(server):
    with Client(server.ws_url, robot_id="arm", session_id="s") as robot:
        yield robot


def run(main):
    return asyncio.run(main)


# --- blocking ----------------------------------------------------------------------------------------------------


def test_infer(client, service):
    assert client.metadata["policy"] == "fake"
    reply = client.infer(observation(), deadline_ms=5000, control_hz=20, seed=7, obs_time_ns=9)
    assert np.array_equal(reply.actions, service.fake_actions(0))
    assert not reply.actions.flags.writeable
    assert (reply.seq, reply.obs_time_ns, reply.session_id) == (0, 9, "s")
    assert (reply.prompt, reply.is_prompt_overridden) == ("open the drawer", False)
    assert reply.is_deadline_met
    assert (reply.model_version, reply.batch_size, reply.context_version) == ("fake-1", 1, 0)
    assert reply.round_trip_ms >= reply.server_ms >= reply.timing.infer_ms >= 0
    seen = service.received[-1]
    assert (seen.robot_id, seen.session_id, seen.seq) == ("arm", "s", 0)
    assert (seen.deadline_ms, seen.control_hz, seen.seed, seen.obs_time_ns) == (5000, 20, 7, 9)


def test_seq_and_time_count_by_themselves(client, service):
    assert [client.infer(observation()).seq for _ in range(3)] == [0, 1, 2]
    assert client.infer(observation(), seq=10).seq == 10
    assert client.infer(observation()).seq == 11
    times = [seen.obs_time_ns for seen in service.received]
    assert times == sorted(times)
    with pytest.raises(FieldError, match="more than the last one, 11"):
        client.infer(observation(), seq=11)


def test_the_instruction_is_an_argument_or_part_of_the_observation(client, service):
    assert client.infer(observation(prompt=...), prompt="push").prompt == "push"
    assert client.infer(observation(prompt="pull")).prompt == "pull"
    service.control(OverridePrompt(session_id="s", prompt="stop"))
    reply = client.infer(observation())
    assert (reply.prompt, reply.is_prompt_overridden) == ("stop", True)


def test_request_and_poll(client, service):
    service.block()
    first = client.request(observation())
    assert client.poll() is None
    assert client.poll(timeout_s=0.02) is None
    second = client.request(observation())
    superseded = client.poll(timeout_s=5)
    service.unblock()
    chunk = client.poll(timeout_s=5)
    assert isinstance(superseded, ReplyError)
    assert (superseded.seq, superseded.code) == (first, "superseded")
    assert isinstance(chunk, Reply)
    assert chunk.seq == second
    assert client.poll() is None


def test_a_refusal_names_the_field(client):
    with pytest.raises(ReplyError) as refused:
        client.infer(observation(**{CORNER: np.zeros((3, 16, 16), np.uint8)}))
    error = refused.value
    assert (error.code, error.field) == ("invalid_field", CORNER)
    assert (error.expected, error.got) == ("uint8 [16, 16, 3]", "uint8 [3, 16, 16]")
    assert error.advice
    assert len(error.error_id) == 8
    assert client.infer(observation()).seq == 1


def test_a_late_answer_is_never_the_answer_to_the_next_request(client, service):
    service.block()
    with pytest.raises(ReplyTimeoutError, match="request 0"):
        client.infer(observation(), timeout_s=0.05)
    service.unblock()
    for seq in range(1, 20):
        assert client.infer(observation()).seq == seq
    assert client.poll(timeout_s=0.05) is None


def test_answers_to_what_was_asked_before_a_reset_are_dropped(client, service):
    service.block()
    client.request(observation())
    unblock = threading.Timer(0.05, service.unblock)
    unblock.start()
    client.reset()
    unblock.join()
    assert client.poll(timeout_s=0.1) is None
    reply = client.infer(observation())
    assert (reply.seq, reply.context_version) == (2, 1)


def test_infer_leaves_other_answers_for_poll(client, service):
    asked = client.request(observation())
    while not service.stats().num_results:
        threading.Event().wait(0.001)
    assert client.infer(observation()).seq == asked + 1
    assert client.poll(timeout_s=1).seq == asked


def test_another_robots_session_is_refused(client, server):
    client.infer(observation())
    with Client(server.ws_url, robot_id="thief", session_id="s") as thief:
        with pytest.raises(ReplyError, match="belongs to robot 'arm'"):
            thief.infer(observation())
        with pytest.raises(ReplyError, match="belongs to robot 'arm'"):
            thief.reset()
    assert client.infer(observation()).seq == 1


def test_reconnect_keeps_session_and_numbers(client, service):
    service.block()
    client.request(observation())
    client.reconnect()
    service.unblock()
    assert client.infer(observation()).seq == 1
    assert client.poll(timeout_s=0.05) is None
    assert client.session_id == "s"


def test_a_server_that_stops_is_a_lost_connection_and_can_be_found_again(service):
    with ServerThread(service) as first:
        client = Client(first.ws_url, robot_id="arm", timeout_s=2)
        client.infer(observation())
    with pytest.raises(ConnectionLostError, match="1012"):
        client.infer(observation())
    assert not client.is_connected
    with pytest.raises(ConnectionLostError, match="not connected"):
        client.poll()
    with pytest.raises(ConnectionLostError, match="cannot connect"):
        client.reconnect()
    with ServerThread(service, config=ServeConfig(port=first.port)):
        client.reconnect()
        assert client.infer(observation()).seq == 2
        client.close()
    assert not client.is_connected


def test_nobody_there():
    with pytest.raises(ConnectionLostError, match=r"cannot connect to ws://127\.0\.0\.1:1"):
        Client("ws://127.0.0.1:1", robot_id="arm")


def test_a_listener_that_says_nothing_times_out():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectionLostError, match="timed out"):
            Client(url, robot_id="arm", timeout_s=0.2)


def test_the_key(service):
    with ServerThread(service, config=ServeConfig(port=0, api_key="k")) as server:
        for wrong in (None, "wrong"):
            with pytest.raises(UnauthorizedError, match="refused the key"):
                Client(server.ws_url, robot_id="arm", api_key=wrong)
        with Client(server.ws_url, robot_id="arm", api_key="k") as client:
            assert client.infer(observation()).seq == 0


@pytest.fixture
def scripted():
    """A server that sends what a test tells it to: (first message, answers)."""
    opened = []

    def start(first, *answers):
        def talk(peer):
            peer.send(first)
            for answer in answers:
                peer.recv()
                peer.send(answer)
            for _ in peer:
                pass

        server = serve(talk, "127.0.0.1", 0, compression=None)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        opened.append((server, thread))
        return f"ws://127.0.0.1:{server.socket.getsockname()[1]}"

    yield start
    for server, thread in opened:
        server.shutdown()
        thread.join()


OURS = wire.encode({"protocol": "ganglion/1"})


@pytest.mark.parametrize(
    ("first", "why"),
    [(wire.encode({}), "plain openpi"), ("hello", "is text"), (b"\xc1", "not one msgpack value")],
)
def test_a_server_of_another_kind_is_named(scripted, first, why):
    with pytest.raises(WireError, match=why):
        Client(scripted(first), robot_id="arm", timeout_s=2)


@pytest.mark.parametrize(
    ("answer", "error", "why"),
    [
        (b"\xc1", ReplyError, "not one msgpack value"),
        (wire.encode({"obs_seq": 0}), ReplyError, "got nothing"),
        (wire.encode({"obs_seq": 0, "actions": np.zeros((3, 4))}), ReplyError, "got float64"),
        (wire.encode({"obs_seq": 0, "actions": np.zeros((3, 4), np.float32)}), ReplyError, "lacks"),
        (wire.encode({"obs_seq": 0, "error": "no"}), ReplyError, "not a map"),
        (wire.encode({"obs_seq": 0, "status": "reset successful"}), WireError, "no chunk"),
        (wire.encode({"obs_seq": 0, "error": {"code": "new", "message": "m"}}), ReplyError, "m"),
        ("Traceback (most recent call last)", ReplyError, "Traceback"),
    ],
)
def test_a_broken_answer_is_an_error_not_a_chunk(scripted, answer, error, why):
    url = scripted(OURS, answer)
    with Client(url, robot_id="arm", timeout_s=2) as client, pytest.raises(error, match=why):
        client.infer({STATE: np.zeros(4)}, prompt="")


def test_a_broken_answer_is_an_error_of_a_robots_link_which_lives_on(scripted):
    broken = (b"\xc1", wire.encode({"obs_seq": 1, "actions": np.zeros((3, 4))}))
    link = Link(
        scripted(OURS, *broken, wire.encode({"obs_seq": 2, "error": {"code": "overloaded"}})),
        robot_id="arm",
    )
    link.open(timeout_s=2)
    for code in (ErrorCode.MALFORMED_FRAME, ErrorCode.MALFORMED_FRAME, ErrorCode.OVERLOADED):
        assert link.send({STATE: np.zeros(4)}, sent=Sent(tick=0, obs_s=0.0), prompt="")
        answer = link.poll(2.0)
        assert isinstance(answer, ReplyError)
        assert answer.code is code
        assert link.num_in_flight == 0
    assert link.num_reconnects == 0
    link.close()


def test_a_broken_answer_fails_an_async_call_at_once(scripted):
    async def main():
        async with AsyncClient(scripted(OURS, b"\xc1"), robot_id="arm", timeout_s=30) as client:
            with pytest.raises(ReplyError, match="not one msgpack value"):
                await client.infer({STATE: np.zeros(4)}, prompt="")
            assert client.is_connected

    asyncio.run(main())


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "127.0.0.1:8000", "localhost", "ws://", "ws://host:port"]
)
def test_an_address_that_is_none_is_named(url):
    with pytest.raises(FieldError, match="expected ws://HOST:PORT") as caught:
        Client(url, robot_id="arm", timeout_s=2)
    assert url in str(caught.value)
    assert caught.value.advice


def test_a_server_that_stops_reading_is_a_lost_connection_not_a_hang():
    is_over = threading.Event()

    def talk(peer):
        peer.send(OURS)
        is_over.wait()

    def fill(client, image):
        for _ in range(100):
            client.request({"view": image})

    image = np.zeros((512, 512, 3), np.uint8)
    with serve(talk, "127.0.0.1", 0, compression=None, max_queue=1, close_timeout=0.1) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        client = Client(url, robot_id="arm", timeout_s=0.3)
        with pytest.raises(ConnectionLostError):
            fill(client, image)
        clock = RealClock()
        start_s = clock.now_s()
        client.close()
        assert clock.now_s() - start_s < 2
        is_over.set()
        server.shutdown()
        thread.join()


def test_answers_nobody_asked_for_are_dropped(scripted):
    stray = wire.encode({"obs_seq": 99, "actions": np.zeros((3, 4), np.float32)})
    with Client(scripted(OURS, stray, stray), robot_id="arm", timeout_s=2) as client:
        client.request({})
        assert client.poll(timeout_s=0.1) is None


# --- asyncio -----------------------------------------------------------------------------------------------------


def test_async_infer_poll_reset(server, service):
    async def main():
        async with AsyncClient(server.ws_url, robot_id="arm", session_id="s") as client:
            assert client.metadata["policy"] == "fake"
            reply = await client.infer(observation(), seed=3)
            assert np.array_equal(reply.actions, service.fake_actions(0))
            asked = await client.request(observation())
            assert (await client.poll(timeout_s=5)).seq == asked
            assert await client.poll() is None
            await client.reset()
            assert (await client.infer(observation())).context_version == 1
            with pytest.raises(ReplyError, match="prompt"):
                await client.infer(observation(prompt=3))
        assert not client.is_connected
        with pytest.raises(ConnectionLostError, match="not connected"):
            await client.infer(observation())

    run(main())


def test_async_calls_may_overlap(server, service):
    async def main():
        async with AsyncClient(server.ws_url, robot_id="arm") as client:
            service.block()
            calls = [asyncio.create_task(client.infer(observation())) for _ in range(4)]
            while len(service.received) < 4:
                await asyncio.sleep(0.001)
            service.unblock()
            return await asyncio.gather(*calls, return_exceptions=True)

    *old, newest = run(main())
    assert newest.seq == 3
    assert [error.code for error in old] == ["superseded"] * 3


def test_async_late_answers_are_dropped(server, service):
    async def main():
        async with AsyncClient(server.ws_url, robot_id="arm") as client:
            service.block()
            with pytest.raises(ReplyTimeoutError):
                await client.infer(observation(), timeout_s=0.05)
            service.unblock()
            assert (await client.infer(observation())).seq == 1
            assert await client.poll(timeout_s=0.05) is None

    run(main())


def test_async_loss_fails_the_waiting_call(service):
    async def main(server):
        client = AsyncClient(server.ws_url, robot_id="arm", timeout_s=3)
        await client.reconnect()
        service.block()
        call = asyncio.create_task(client.infer(observation()))
        while not service.received:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(server.stop)
        with pytest.raises(ConnectionLostError, match="1012"):
            await call
        with pytest.raises(ConnectionLostError, match="not connected"):
            await client.poll()
        await client.close()

    with ServerThread(service) as server:
        run(main(server))
    service.unblock()


def test_async_nobody_there():
    async def main():
        await AsyncClient("ws://127.0.0.1:1", robot_id="arm").reconnect()

    with pytest.raises(ConnectionLostError, match="cannot connect"):
        run(main())
