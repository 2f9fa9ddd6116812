import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode

from ganglion import wire
from ganglion.clock import RealClock
from ganglion.config import ServeConfig
from ganglion.errors import InternalError, UnsafeActionError
from ganglion.metrics import Metrics
from ganglion.serve.app import ServerThread
from ganglion.serve.fake import FakeService
from ganglion.types import ActionChunk, CloseSession, OverridePrompt, ResetSession, Timing
from tests.e2e.edge_stage import CORNER, GRIPPER, SPEC, STATE, WAIT_S, ask, bare, observation, read


@pytest.fixture
def service():
    with FakeService(SPEC) as fake:
        yield fake


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def server(service, metrics):
    config = ServeConfig(port=0, max_frame_bytes=64 * 1024, max_connections=4)
    with ServerThread(service, config=config, metrics=metrics) as thread:
        yield thread


def wait_until(condition):
    clock = RealClock()
    limit_s = clock.now_s() + WAIT_S
    while not condition():
        assert clock.now_s() < limit_s, "it never happened"
        clock.sleep_until(clock.now_s() + 0.005)


def sample(metrics, line_start):
    lines = metrics.render().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(line_start))


def close_code(socket) -> int:
    with pytest.raises(ConnectionClosed) as closed:
        socket.recv(timeout=WAIT_S)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code


# --- openpi's half -----------------------------------------------------------------------------------------------


def test_the_server_speaks_first(server):
    with bare(server) as socket:
        metadata = read(socket)
    assert metadata["policy"] == "fake"
    assert metadata["views"] == {CORNER: [16, 16, 3], GRIPPER: [16, 16, 3]}
    assert metadata["state"] == {STATE: [4]}
    assert metadata["protocol"] == "ganglion/1"


@pytest.mark.parametrize("path", ["/", "/any/path", "/v1/realtime/robot/openpi"])
def test_a_plain_request_is_answered_as_openpi_answers(server, service, path):
    with bare(server, path) as socket:
        read(socket)
        first, second = ask(socket, observation()), ask(socket, observation())
    assert first["actions"].dtype == np.float32
    assert np.array_equal(first["actions"], service.fake_actions(1))
    assert np.array_equal(second["actions"], service.fake_actions(2))
    assert first["server_timing"].keys() == {"infer_ms"}
    assert second["server_timing"].keys() == {"infer_ms", "prev_total_ms"}
    assert first["policy_timing"].keys() == {"infer_ms"}
    arrays = [key for key, value in first.items() if isinstance(value, np.ndarray)]
    assert arrays == ["actions"]


def test_plain_requests_sent_at_once_are_answered_one_by_one(server, service):
    with bare(server) as socket:
        read(socket)
        service.block()
        for _ in range(3):
            socket.send(wire.encode(observation()))
        wait_until(lambda: len(service.received) == 1)
        service.unblock()
        assert [read(socket)["obs_seq"] for _ in range(3)] == [1, 2, 3]


def test_a_plain_error_is_text_and_the_connection_lives_on(server):
    with bare(server) as socket:
        read(socket)
        text = ask(socket, observation(**{CORNER: ...}))
        assert isinstance(text, str)
        assert CORNER in text
        assert "uint8 [16, 16, 3]" in text
        assert ask(socket, observation())["obs_seq"] == 2


# --- our half ----------------------------------------------------------------------------------------------------


def test_the_reply_carries_what_the_request_named(server):
    fields = observation(
        robot_id="arm",
        session_id="s",
        seq=41,
        obs_time_ns=12,
        control_hz=20.0,
        deadline_ms=5e3,
        seed=1,
    )
    with bare(server) as socket:
        read(socket)
        reply = ask(socket, fields)
    assert (reply["obs_seq"], reply["obs_time_ns"], reply["session_id"]) == (41, 12, "s")
    assert reply["prompt"] == "open the drawer"
    assert reply["prompt_overridden"] is False
    assert reply["deadline_met"] is True
    assert reply["model_version"] == "fake-1"
    assert (reply["context_version"], reply["batch_size"]) == (0, 1)
    assert reply["timing"].keys() == {
        "queue_ms", "perceive_ms", "generate_ms", "wait_ms", "infer_ms",
    }  # fmt: skip


def test_requests_with_seq_overlap_and_the_newest_wins(server, service):
    with bare(server) as socket:
        read(socket)
        service.block()
        for seq in (10, 11, 12):
            socket.send(wire.encode(observation(seq=seq)))
        wait_until(lambda: len(service.received) == 3)
        service.unblock()
        answers = {answer["obs_seq"]: answer for answer in (read(socket) for _ in range(3))}
    assert answers[12]["actions"].shape == (50, 4)
    assert answers[10]["error"]["code"] == answers[11]["error"]["code"] == "superseded"


def test_an_operators_instruction_is_told_to_the_robot(server, service):
    with bare(server) as socket:
        read(socket)
        ask(socket, observation(session_id="s", seq=1))
        service.control(OverridePrompt(session_id="s", prompt="close it"))
        reply = ask(socket, observation(session_id="s", seq=2))
    assert (reply["prompt"], reply["prompt_overridden"]) == ("close it", True)


def test_every_connection_has_a_session_of_its_own(server, service):
    with bare(server) as one, bare(server) as two:
        read(one), read(two)
        assert ask(one, observation())["session_id"] != ask(two, observation())["session_id"]


def test_reset(server, service):
    with bare(server) as socket:
        read(socket)
        fields = {"endpoint": "reset", "session_id": "s", "robot_id": "arm", "seq": 1}
        expected = {"status": "reset successful", "session_id": "s", "obs_seq": 1}
        assert ask(socket, fields) == expected  # before the first observation: nothing to forget
        ask(socket, observation(session_id="s", robot_id="arm", seq=2))
        assert ask(socket, fields | {"seq": 3})["obs_seq"] == 3
        assert (
            ask(socket, observation(session_id="s", robot_id="arm", seq=4))["context_version"] == 1
        )
    assert ResetSession(session_id="s", robot_id="arm") in service.commands


def test_too_many_requests_in_flight_are_refused(server, service):
    with bare(server) as socket:
        read(socket)
        service.block()
        for seq in range(17):
            socket.send(wire.encode(observation(session_id=f"s{seq}", seq=seq)))
        error = read(socket)
        assert (error["obs_seq"], error["error"]["code"]) == (16, "overloaded")
        service.unblock()
        assert {read(socket)["obs_seq"] for _ in range(16)} == set(range(16))


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("wrong shape", {CORNER: np.zeros((16, 17, 3), np.uint8)}, CORNER),
        ("wrong dtype", {CORNER: np.zeros((16, 16, 3), np.float32)}, CORNER),
        ("missing view", {GRIPPER: ...}, GRIPPER),
        ("NaN", {STATE: np.array([0, 0, np.nan, 0], np.float32)}, STATE),
        ("an instruction of 50 kB", {"prompt": "x" * 50_000}, "prompt"),
        ("forbidden dtype", {STATE: {b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": [4]}},
         f"{STATE}.dtype"),
        ("wrong byte count", {STATE: {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [4]}},
         f"{STATE}.data"),
        ("unsupported field", {"action_prefix": np.zeros((3, 4), np.float32)}, "action_prefix"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_the_connection_lives_on(server, name, changes, field):
    with bare(server) as socket:
        read(socket)
        error = ask(socket, observation(seq=1, **changes))
        assert error["obs_seq"] == 1
        assert error["error"]["field"] == field
        assert error["error"].keys() == {
            "code", "message", "field", "expected", "got", "next_step", "error_id",
        }  # fmt: skip
        if name != "unsupported field":
            assert error["error"]["expected"]
            assert error["error"]["got"]
        assert ask(socket, observation(seq=2))["obs_seq"] == 2


def test_another_robot_cannot_reset_or_use_a_session(server):
    with bare(server) as owner, bare(server) as thief:
        read(owner), read(thief)
        ask(owner, observation(robot_id="arm-1", session_id="s", seq=0))
        stolen = {"endpoint": "reset", "robot_id": "arm-2", "session_id": "s", "seq": 5}
        assert ask(thief, stolen)["error"]["code"] == "session_conflict"
        used = ask(thief, observation(robot_id="arm-2", session_id="s", seq=6))
        assert used["error"]["code"] == "session_conflict"
        assert "arm-1" in used["error"]["message"]
        plain = ask(thief, observation(robot_id="arm-2", session_id="s"))
        assert plain.startswith("session_conflict: ")
        assert ask(owner, observation(robot_id="arm-1", session_id="s", seq=1))["obs_seq"] == 1
    # the thief's end did not close the owner's session


def test_the_thiefs_goodbye_leaves_the_session_open(server, service):
    with bare(server) as owner:
        read(owner)
        ask(owner, observation(robot_id="arm-1", session_id="s", seq=0))
        with bare(server) as thief:
            read(thief)
            ask(thief, observation(robot_id="arm-2", session_id="s", seq=0))
        ask(owner, observation(robot_id="arm-1", session_id="s", seq=1))
        assert not [c for c in service.commands if isinstance(c, CloseSession)]


def test_an_oversized_frame_closes_with_1009(server, metrics):
    with bare(server) as socket:
        read(socket)
        socket.send(b"\x00" * (64 * 1024 + 1))
        assert close_code(socket) == 1009
    wait_until(lambda: sample(metrics, 'ganglion_refused_frames_total{reason="oversized"}') == 1)


def test_a_text_frame_closes_with_1003(server, metrics):
    with bare(server) as socket:
        read(socket)
        socket.send("hello")
        assert close_code(socket) == 1003
    assert sample(metrics, 'ganglion_refused_frames_total{reason="text"}') == 1


@pytest.mark.parametrize(
    "frame", [wire.encode(observation())[:-20], b"", b"\xc1", b"\x93\x01\x02\x03"]
)
def test_half_a_message_closes_with_1002(server, frame):
    with bare(server) as socket:
        read(socket)
        socket.send(frame)
        assert close_code(socket) == 1002


def test_broken_framing_closes_with_1002(server):
    with bare(server) as socket:
        read(socket)
        with socket.send_context():  # a fragment, then a new message instead of its end
            socket.protocol.send_binary(b"half", fin=False)
        with socket.send_context():
            frame = Frame(Opcode.BINARY, b"another")
            socket.protocol.writes.append(frame.serialize(mask=True))
        assert close_code(socket) == 1002


def test_answers_before_a_goodbye_still_arrive(server, service):
    with bare(server) as socket:
        read(socket)
        socket.send(wire.encode(observation(seq=1, prompt=5)))
        socket.send("text")
        assert read(socket)["error"]["field"] == "prompt"
        assert close_code(socket) == 1003


def test_unknown_keys_are_ignored_counted_and_logged_once(server, metrics, caplog):
    caplog.set_level("INFO", logger="ganglion.serve.robot")
    with bare(server) as socket:
        read(socket)
        for seq in range(3):
            reply = ask(socket, observation(seq=seq, **{"observation/joint": np.zeros(7)}))
            assert reply["obs_seq"] == seq
    counted = sample(metrics, 'ganglion_ignored_keys_total{key="observation/joint"}')
    assert counted == 3
    assert caplog.text.count("observation/joint") == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1.5])
def test_an_unsafe_action_never_leaves_the_server(server, service, bad):
    actions = np.zeros((50, 4), np.float32)
    actions[7, 2] = bad
    timing = Timing(queue_ms=0, perceive_ms=0, generate_ms=0, wait_ms=0, infer_ms=0)
    chunk = ActionChunk(
        session_id="s", obs_seq=1, context_seq=1, obs_time_ns=None, actions=actions, prompt="", is_prompt_overridden=False,
        model_version="x", context_version=0, batch_size=1, is_deadline_met=True, timing=timing,
    )  # fmt: skip
    service.answer_next([chunk, UnsafeActionError("action 7 is not finite")])
    with bare(server) as socket:
        read(socket)
        error = ask(socket, observation(seq=1))["error"]
        assert error["code"] == "unsafe_action"
        assert "action 7, dimension 2" in error["message"]
        assert ask(socket, observation(seq=2))["error"]["code"] == "unsafe_action"


def test_a_defect_is_told_by_id_only(server, service, caplog):
    service.answer_next([InternalError("/secret/path.py line 7: 0xdeadbeef")])
    with bare(server) as socket:
        read(socket)
        error = ask(socket, observation(seq=1))["error"]
    assert error["code"] == "internal"
    assert "secret" not in str(error)
    assert "0x" not in str(error)
    assert error["error_id"] in caplog.text
    assert "/secret/path.py" in caplog.text


# --- leaving -----------------------------------------------------------------------------------------------------


def test_a_robot_that_leaves_is_cancelled_and_closed(server, service):
    with bare(server) as socket:
        read(socket)
        service.block()
        socket.send(wire.encode(observation(session_id="s", robot_id="arm", seq=1)))
        wait_until(lambda: len(service.received) == 1)
    wait_until(lambda: CloseSession(session_id="s", robot_id="arm") in service.commands)
    wait_until(lambda: service.stats().num_cancelled == 1)
    assert service.stats().sessions == ()


def test_a_cut_connection_is_noticed_while_a_request_is_in_flight(server, service):
    with bare(server) as socket:
        read(socket)
        service.block()
        socket.send(wire.encode(observation()))
        wait_until(lambda: len(service.received) == 1)
        socket.socket.close()
        wait_until(lambda: service.stats().sessions == ())


def test_a_robot_that_is_back_already_keeps_its_session(server, service):
    fields = {"robot_id": "arm", "session_id": "s"}
    with bare(server) as old:
        read(old)
        ask(old, observation(seq=1, **fields))
        with bare(server) as new:
            read(new)
            ask(new, observation(seq=2, **fields))
            old.close()
            ask(new, observation(seq=3, **fields))
            assert not [c for c in service.commands if isinstance(c, CloseSession)]
    wait_until(lambda: CloseSession(session_id="s", robot_id="arm") in service.commands)


def test_connections_are_bounded(server, metrics):
    sockets = [bare(server) for _ in range(4)]
    with sockets[0], sockets[1], sockets[2], sockets[3]:
        for socket in sockets:
            read(socket)
        with pytest.raises(InvalidStatus) as refused, bare(server):
            pass
        assert refused.value.response.status_code == 503
    wait_until(lambda: sample(metrics, 'ganglion_connections{channel="robot"}') == 0)
    with bare(server) as socket:
        assert read(socket)["policy"] == "fake"


def test_a_stopping_server_says_goodbye_with_1012(service):
    with ServerThread(service) as server, bare(server) as socket:
        read(socket)
        ask(socket, observation())
        server.stop()
        assert close_code(socket) == 1012
