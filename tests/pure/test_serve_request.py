import random
from dataclasses import replace

import numpy as np
import pytest

from ganglion import wire
from ganglion.errors import FieldError, GanglionError, UnsupportedFieldError
from ganglion.serve.fake import fake_spec
from ganglion.serve.request import (
    UNSUPPORTED_FIELDS,
    InferRequest,
    RequestReader,
    ResetRequest,
    Sender,
)
from ganglion.types import Execution, RobotId, SessionId
from ganglion.wire import WireLimits

SPEC = fake_spec(size=8)
CORNER, GRIPPER, STATE = SPEC.views[0].key, SPEC.views[1].key, SPEC.state_key
SENDER = Sender(robot_id=RobotId("robot-x"), session_id=SessionId("s-x"))
READER = RequestReader(SPEC, WireLimits())
FLOW = RequestReader(
    replace(SPEC, max_prefix=3, num_flow_steps=5, action_high=(0.1,) * 4), WireLimits()
)


def message(**changes):
    fields = {
        CORNER: np.full((8, 8, 3), 7, np.uint8),
        GRIPPER: np.zeros((8, 8, 3), np.uint8),
        STATE: np.array([0.0, 1.0, 2.0, 3.0], np.float32),
        "prompt": "open the drawer",
    }
    fields.update(changes)
    return {key: value for key, value in fields.items() if value is not ...}


def read(fields, seq=3, reader=READER):
    return reader.read(wire.unpack(wire.encode(fields)), sender=SENDER, seq=seq)


def refused(fields, reader=READER) -> FieldError:
    with pytest.raises(FieldError) as error:
        read(fields, reader=reader)
    return error.value


def test_a_plain_openpi_request_becomes_an_observation():
    request = read(message())
    assert isinstance(request, InferRequest)
    seen = request.observation
    assert (seen.robot_id, seen.session_id, seen.seq) == ("robot-x", "s-x", 3)
    assert seen.images[CORNER].shape == (8, 8, 3)
    assert int(seen.images[CORNER][0, 0, 0]) == 7
    assert not seen.images[CORNER].flags.writeable
    assert seen.state.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert seen.prompt == "open the drawer"
    assert (seen.obs_time_ns, seen.control_hz, seen.deadline_ms, seen.seed) == (None,) * 4


def test_the_superset_is_read():
    seen = read(
        message(
            robot_id="arm-1",
            session_id="arm-1/7",
            obs_time_ns=5,
            control_hz=20,
            deadline_ms=99.5,
            seed=4,
        )
    ).observation
    assert (seen.robot_id, seen.session_id) == ("arm-1", "arm-1/7")
    assert (seen.obs_time_ns, seen.control_hz, seen.deadline_ms, seen.seed) == (5, 20.0, 99.5, 4)


def test_a_float64_state_is_taken_as_float32():
    assert read(message(**{STATE: np.ones(4)})).observation.state.dtype == np.float32


def test_nil_means_absent():
    seen = read(message(seed=None, control_hz=None, robot_id=None, endpoint=None)).observation
    assert (seen.seed, seen.control_hz, seen.robot_id) == (None, None, "robot-x")


def test_reset_needs_no_observation():
    request = read({"endpoint": "reset", "session_id": "s", "robot_id": "r"})
    assert request == ResetRequest(session_id=SessionId("s"), robot_id=RobotId("r"))


@pytest.mark.parametrize(
    ("changes", "field", "expected", "got"),
    [
        ({CORNER: np.zeros((8, 9, 3), np.uint8)}, CORNER, "uint8 [8, 8, 3]", "uint8 [8, 9, 3]"),
        ({CORNER: np.zeros((3, 8, 8), np.uint8)}, CORNER, "uint8 [8, 8, 3]", "uint8 [3, 8, 8]"),
        ({CORNER: np.zeros((8, 8, 3), np.float32)}, CORNER, "uint8", "float32 [8, 8, 3]"),
        ({CORNER: "image.png"}, CORNER, "an array", "text of 9 characters"),
        ({GRIPPER: ...}, GRIPPER, "uint8 [8, 8, 3]", "nothing"),
        ({STATE: np.zeros(5, np.float32)}, STATE, "float32 or float64 [4]", "float32 [5]"),
        ({STATE: np.zeros((1, 4), np.float32)}, STATE, "float64 [4]", "float32 [1, 4]"),
        ({STATE: np.zeros(4, np.int64)}, STATE, "float32 or float64", "int64 [4]"),
        ({STATE: np.array([0, 0, np.nan, 0])}, STATE, "finite", "nan at index 2"),
        ({STATE: np.array([0, np.inf, 0, 0], np.float32)}, STATE, "finite", "inf at index 1"),
        (
            {STATE: np.array([1e300, 0, 0, 0])},
            STATE,
            "finite numbers within float32",
            "1e+300 at index 0",
        ),
        ({STATE: [0, 0, 0, 0]}, STATE, "an array", "a list of 4 items"),
        ({STATE: ...}, STATE, "float32 [4]", "nothing"),
        ({"prompt": ...}, "prompt", "the instruction as text", "nothing"),
        ({"prompt": b"push"}, "prompt", "text", "4 bytes"),
        ({"prompt": "x" * 100_000}, "prompt", "at most 2048 bytes", "100000 bytes"),
        ({"prompt": "\u00e9" * 1025}, "prompt", "at most 2048 bytes", "2050 bytes"),
        ({"seq": -1}, "seq", "an integer in 0..2**63-1", "int -1"),
        ({"seq": 1.0}, "seq", "an integer", "float 1.0"),
        ({"seq": True}, "seq", "an integer", "bool True"),
        ({"seq": 2**63}, "seq", "an integer", "int 9223372036854775808"),
        ({"seed": "7"}, "seed", "an integer", "text"),
        ({"obs_time_ns": -5}, "obs_time_ns", "an integer", "int -5"),
        ({"control_hz": 0}, "control_hz", "above 0", "int 0"),
        ({"control_hz": float("nan")}, "control_hz", "above 0", "float nan"),
        ({"deadline_ms": float("inf")}, "deadline_ms", "above 0", "float inf"),
        ({"deadline_ms": "soon"}, "deadline_ms", "above 0", "text"),
        ({"robot_id": ""}, "robot_id", "printable ASCII", "text of 0"),
        ({"robot_id": "a\nb"}, "robot_id", "printable ASCII", r"a\nb"),
        ({"session_id": "x" * 129}, "session_id", "1..128", "text of 129"),
        ({"session_id": 5}, "session_id", "1..128", "int 5"),
        ({"endpoint": "kill"}, "endpoint", '"infer" or "reset"', "kill"),
        ({"endpoint": 0}, "endpoint", '"infer" or "reset"', "int 0"),
    ],
)
def test_a_bad_field_is_named_with_expected_and_got(changes, field, expected, got):
    fields = message(**changes)
    if field == "seq":
        with pytest.raises(FieldError) as caught:
            READER.read_seq(wire.unpack(wire.encode(fields)))
        error = caught.value
    else:
        error = refused(fields)
    assert error.field == field
    assert expected in error.expected
    assert got in error.got
    assert len(str(error)) < 400


def test_a_missing_view_says_what_came_instead():
    error = refused(message(**{CORNER: ..., "observation/image": np.zeros((8, 8, 3), np.uint8)}))
    assert "observation/image" in error.got


def test_an_old_robot_executes_naively_and_commits_nothing():
    seen = read(message()).observation
    assert seen.execution is Execution.NAIVE
    assert (seen.executed_until, seen.action_prefix, seen.inference_delay_hint) == (None,) * 3


@pytest.mark.parametrize("execution", list(Execution))
def test_a_flow_policy_that_takes_prefixes_serves_every_execution(execution):
    seen = read(message(execution=execution.value), reader=FLOW).observation
    assert seen.execution is execution


@pytest.mark.parametrize("execution", ["rtc", "rtc-identity", "prefix"])
def test_an_execution_that_the_policy_cannot_do_is_refused_by_name(execution):
    assert execution not in SPEC.metadata()["executions"]
    with pytest.raises(UnsupportedFieldError, match=execution) as error:
        read(message(execution=execution))
    assert error.value.field == "execution"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_runs_anyway_is_read(dtype):
    prefix = np.array([[0.1, -1.0, 0.0, 0.05]] * 3, np.float32).astype(dtype)
    fields = message(action_prefix=prefix, executed_until=2**40, inference_delay_hint=50)
    seen = read(fields, reader=FLOW).observation
    assert seen.action_prefix.dtype == np.float32
    assert np.array_equal(seen.action_prefix, prefix.astype(np.float32))
    assert (seen.executed_until, seen.inference_delay_hint) == (2**40, 50)


def test_no_rows_are_no_prefix():
    fields = message(action_prefix=np.zeros((0, 4), np.float32))
    assert read(fields, reader=FLOW).observation.action_prefix is None


def test_a_prefix_for_a_policy_that_cannot_continue_one_is_refused():
    with pytest.raises(UnsupportedFieldError, match="cannot continue") as error:
        read(message(action_prefix=np.zeros((1, 4), np.float32)))
    assert error.value.field == "action_prefix"


@pytest.mark.parametrize(
    ("changes", "field", "expected", "got"),
    [
        ({"execution": "fast"}, "execution", "sync, naive, blend", "fast"),
        ({"execution": 3}, "execution", "one of", "int 3"),
        ({"execution": ["rtc"]}, "execution", "one of", "a list of 1"),
        ({"executed_until": -1}, "executed_until", "0..2**63-1", "int -1"),
        ({"executed_until": 1.5}, "executed_until", "an integer", "float 1.5"),
        ({"executed_until": 2**63}, "executed_until", "an integer", "int 9223"),
        ({"inference_delay_hint": -3}, "inference_delay_hint", "0..50", "int -3"),
        ({"inference_delay_hint": 51}, "inference_delay_hint", "0..50", "int 51"),
        ({"inference_delay_hint": True}, "inference_delay_hint", "0..50", "bool True"),
        ({"action_prefix": np.zeros((4, 4))}, "action_prefix", "at most 3 rows", "4 rows"),
        ({"action_prefix": np.zeros((2, 5))}, "action_prefix", "[rows, 4]", "float64 [2, 5]"),
        ({"action_prefix": np.zeros(4)}, "action_prefix", "[rows, 4]", "float64 [4]"),
        ({"action_prefix": np.zeros(())}, "action_prefix", "[rows, 4]", "float64 []"),
        ({"action_prefix": np.zeros((1, 4), np.int32)}, "action_prefix", "float32", "int32"),
        ({"action_prefix": [[0.0] * 4]}, "action_prefix", "an array", "a list"),
        ({"action_prefix": np.full((2, 4), np.nan)}, "action_prefix", "finite", "nan at row 0"),
        ({"action_prefix": np.eye(3, 4) * 0.2}, "action_prefix", "[-1.0, 0.1]", "at row 0"),
        ({"action_prefix": np.full((1, 4), -1e300)}, "action_prefix", "[-1.0, 0.1]", "-1e+300"),
    ],
)  # fmt: skip
def test_a_bad_word_about_the_execution_is_named(changes, field, expected, got):
    error = refused(message(**changes), reader=FLOW)
    assert error.field == field
    assert expected in error.expected
    assert got in error.got


def test_an_empty_instruction_is_an_instruction():
    assert read(message(prompt="")).observation.prompt == ""


@pytest.mark.parametrize("field", sorted(UNSUPPORTED_FIELDS))
def test_known_but_unsupported_fields_are_refused_by_name(field):
    with pytest.raises(UnsupportedFieldError, match=field) as error:
        read(message(**{field: 1}))
    assert error.value.field == field


def test_unknown_keys_are_reported_not_refused():
    fields = message(**{"observation/joint_position": np.zeros(7), "reset_pose": [1, 2]})
    unknown = READER.unknown_keys(wire.unpack(wire.encode(fields)))
    assert unknown == {"observation/joint_position", "reset_pose"}
    assert isinstance(read(fields), InferRequest)


def test_an_unknown_keys_broken_array_does_not_matter():
    fields = wire.unpack(wire.encode(message(extra=np.zeros(2))))
    fields["extra"][b"dtype"] = "|O"
    assert isinstance(READER.read(fields, sender=SENDER, seq=0), InferRequest)


def mutate(frame: bytes, rng: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0:
                del data[at : at + rng.randint(1, 16)]
            case 1:
                data = data[:at]
            case 2:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            case 3:
                data[at:at] = data[max(0, at - 20) : at]
            case 4 if data:
                data[at % len(data)] = rng.choice(
                    b"\x00\x7f\x80\x90\xa0\xc0\xc1\xc4\xc6\xd9\xdc\xdd\xde\xdf\xff"
                )
            case _ if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def test_20000_mutated_frames_are_served_or_refused_with_a_reason():
    rng = random.Random(11)
    spec = fake_spec(
        size=2, max_prefix=2
    )  # small views: most mutations hit the structure, not pixels
    reader = RequestReader(spec, WireLimits())
    small = {
        CORNER: np.zeros((2, 2, 3), np.uint8),
        GRIPPER: np.zeros((2, 2, 3), np.uint8),
        STATE: np.zeros(4, np.float32),
        "prompt": "push",
        "robot_id": "arm-1",
        "session_id": "s-1",
        "seq": 9,
        "obs_time_ns": 1 << 40,
        "control_hz": 20.0,
        "deadline_ms": 200.0,
        "seed": 3,
        "endpoint": "infer",
        "execution": "prefix",
        "executed_until": 77,
        "action_prefix": np.zeros((2, 4), np.float32),
        "inference_delay_hint": 2,
    }
    frame = wire.encode(small)
    outcomes = dict.fromkeys(("observation", "reset", "refused"), 0)
    for _ in range(20_000):
        try:
            fields = wire.unpack(mutate(frame, rng))
            seq = reader.read_seq(fields)
            reader.unknown_keys(fields)
            request = reader.read(fields, sender=SENDER, seq=seq or 0)
        except GanglionError as error:
            outcomes["refused"] += bool(str(error))
            continue
        if isinstance(request, InferRequest):
            assert np.isfinite(request.observation.state).all()
            assert request.observation.images[CORNER].shape == (2, 2, 3)
            prefix = request.observation.action_prefix
            assert prefix is None or np.abs(prefix).max() <= 1.0
            outcomes["observation"] += 1
        else:
            outcomes["reset"] += 1
    assert outcomes["refused"] > 8_000
    assert outcomes["observation"] > 1_000
