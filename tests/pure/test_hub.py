"""The hub and the messages of the side channel: checked, bounded, newest wins, forgotten."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.side_messages import Ears, hello, telemetry

from ganglion.clock import SimulatedClock
from ganglion.errors import FieldError, OverloadedError, SessionConflictError
from ganglion.serve.hub import MAX_LOGGED_KEYS, TOTAL_VIEW_HZ, Hub, Robot
from ganglion.serve.side import (
    MAX_JPEG_BYTES,
    MAX_QUEUE_ROWS,
    Impair,
    parse_impair,
    parse_telemetry,
)
from ganglion.types import SessionId

AS_IT_IS = {"delay_ms": 0.0, "jitter_ms": 0.0, "loss": 0.0}
JPEG = b"\xff\xd8\xff" + b"pixels" + b"\xff\xd9"


def join(hub: Hub, ears: Ears | None = None, **changes: Any) -> Robot:
    ears = ears or Ears()
    return hub.join(hello(**changes), tell=ears.tell, take_over=ears.take_over)


def test_keeps_the_newest_telemetry_of_each_robot() -> None:
    clock = SimulatedClock(5.0)
    hub = Hub(clock)
    robot = join(hub)
    hub.receive(robot, telemetry())
    clock.advance(0.5)
    hub.receive(robot, telemetry(tick=8, obs_age_ms=None, reply_prompt="close it"))
    assert hub.speaker(SessionId("s-1")) is robot
    assert robot.telemetry is not None
    assert (robot.telemetry.tick, robot.telemetry.obs_age_ms) == (8, None)
    assert robot.telemetry.reply_prompt == "close it"
    assert robot.telemetry.queue == ((0.1, -0.2), (0.3, 0.4))
    assert robot.telemetry_s == 5.5


def test_a_robot_is_told_at_its_hello_and_at_every_change_only() -> None:
    hub, ears = Hub(SimulatedClock()), Ears()
    join(hub, ears)
    assert [watch.message() for watch in ears.watches] == [{"watch": False, "max_view_hz": 10.0}]
    hub.add_watcher()
    hub.add_watcher()
    hub.remove_watcher()
    assert [watch.is_watched for watch in ears.watches] == [False, True]
    hub.remove_watcher()
    assert [watch.is_watched for watch in ears.watches] == [False, True, False]


def test_many_robots_share_the_views_and_get_them_back() -> None:
    hub, ears = Hub(SimulatedClock()), Ears()
    join(hub, ears)
    hub.add_watcher()
    others = [join(hub, robot_id=f"arm-{at}", session_id=f"s-{at}") for at in range(2, 21)]
    assert ears.watches[-1].max_view_hz == pytest.approx(TOTAL_VIEW_HZ / 20)
    for robot in others:
        hub.leave(robot)
    assert ears.watches[-1].max_view_hz == 10.0


def test_views_are_kept_only_while_watched_and_not_too_often() -> None:
    clock = SimulatedClock(1.0)
    hub = Hub(clock)
    robot = join(hub)
    hub.receive(robot, {"jpeg": JPEG})
    assert (robot.jpeg, hub.num_dropped_views) == (None, 1)
    hub.add_watcher()
    for _ in range(100):  # a robot that sends 1000 a second
        hub.receive(robot, {"jpeg": JPEG})
        clock.advance(0.001)
    assert robot.jpeg == JPEG
    assert robot.jpeg_version == 2
    hub.remove_watcher()
    assert robot.jpeg is None


def test_a_robot_that_leaves_is_forgotten() -> None:
    hub = Hub(SimulatedClock())
    robot = join(hub)
    hub.leave(robot)
    assert hub.robots == ()
    hub.leave(robot)  # twice does no harm


def test_another_robot_cannot_speak_for_a_session() -> None:
    hub = Hub(SimulatedClock())
    robot = join(hub)
    with pytest.raises(SessionConflictError, match="belongs to robot 'arm-1'"):
        join(hub, robot_id="arm-2")
    assert hub.robots == (robot,)


def test_a_newer_connection_of_the_same_robot_takes_over() -> None:
    hub, ears = Hub(SimulatedClock()), Ears()
    old = join(hub, ears)
    new = join(hub)
    assert ears.num_take_overs == 1
    hub.leave(old)  # its socket closes later
    assert hub.robots == (new,)


def test_the_number_of_robots_is_bounded() -> None:
    hub = Hub(SimulatedClock(), max_robots=2)
    join(hub)
    join(hub, robot_id="arm-2", session_id="s-2")
    with pytest.raises(OverloadedError, match="side channel is full \\(2\\)"):
        join(hub, robot_id="arm-3", session_id="s-3")
    join(hub, robot_id="arm-2", session_id="s-2")  # one of the two comes back


def test_unknown_keys_are_counted_and_remembered_in_bounds() -> None:
    hub = Hub(SimulatedClock())
    robot = join(hub, colour="red")
    for at in range(200):
        hub.receive(robot, telemetry(**{f"extra_{at}": 1}))
    assert hub.num_unknown_keys == 201
    assert len(hub._logged_keys) == MAX_LOGGED_KEYS


def test_a_robot_that_can_is_asked_to_disturb_its_link() -> None:
    hub, ears = Hub(SimulatedClock()), Ears()
    robot = join(hub, ears, impair=AS_IT_IS)
    assert robot.impair == Impair()
    hub.impair(SessionId("s-1"), Impair(delay_ms=200.0, jitter_ms=50.0, loss=0.1))
    assert [impair.message() for impair in ears.impairs] == [
        {"type": "impair", "delay_ms": 200.0, "jitter_ms": 50.0, "loss": 0.1}
    ]
    assert robot.impair == ears.impairs[-1]


def test_what_a_link_is_like_is_the_robots_own_word() -> None:
    hub = Hub(SimulatedClock())
    join(hub, impair=AS_IT_IS)
    hub.impair(SessionId("s-1"), Impair(loss=0.5))
    assert join(hub, impair={**AS_IT_IS, "delay_ms": 80}).impair == Impair(delay_ms=80.0)


@pytest.mark.parametrize(
    "changes", [{}, {"impair": None}, {"session_id": "other", "impair": {**AS_IT_IS}}]
)
def test_a_robot_that_cannot_disturb_its_link_is_not_asked(changes: dict[str, Any]) -> None:
    hub, ears = Hub(SimulatedClock()), Ears()
    join(hub, ears, **changes)
    with pytest.raises(FieldError, match="disturb its own link"):
        hub.impair(SessionId("s-1"), Impair(delay_ms=1.0))
    assert ears.impairs == []


@pytest.mark.parametrize(
    "changes",
    [
        {"delay_ms": -1.0}, {"delay_ms": 2001.0}, {"jitter_ms": float("nan")}, {"loss": 1.1},
        {"loss": None}, {"loss": "all"}, {"delay_ms": True},
    ],
)  # fmt: skip
def test_an_impossible_link_is_refused_by_field(changes: dict[str, Any]) -> None:
    with pytest.raises(FieldError) as caught:
        parse_impair({"delay_ms": 0.0, "jitter_ms": 0.0, "loss": 0.0, **changes})
    assert caught.value.field == f"impair.{next(iter(changes))}"


BAD_TELEMETRY = [
    ({"tick": -1}, "telemetry.tick"),
    ({"tick": True}, "telemetry.tick"),
    ({"tick": 2**60}, "telemetry.tick"),
    ({"tick": 1.5}, "telemetry.tick"),
    ({"rate_hz": float("nan")}, "telemetry.rate_hz"),
    ({"rate_hz": float("inf")}, "telemetry.rate_hz"),
    ({"rate_hz": None}, "telemetry.rate_hz"),
    ({"rate_hz": 10**400}, "telemetry.rate_hz"),
    ({"obs_age_ms": -1.0}, "telemetry.obs_age_ms"),
    ({"queue": [[0.0]] * (MAX_QUEUE_ROWS + 1)}, "telemetry.queue"),
    ({"queue": [[0.0], [0.0, 1.0]]}, "telemetry.queue"),
    ({"queue": [[float("nan")]]}, "telemetry.queue"),
    ({"queue": [[]]}, "telemetry.queue"),
    ({"queue": ["ab"]}, "telemetry.queue"),
    ({"queue": "ab"}, "telemetry.queue"),
    ({"is_success": 1}, "telemetry.is_success"),
    ({"reply_prompt": "x" * 5000}, "telemetry.reply_prompt"),
    ({"task": b"drawer"}, "telemetry.task"),
]


@pytest.mark.parametrize(("changes", "field"), BAD_TELEMETRY)
def test_bad_telemetry_names_its_field_and_changes_nothing(
    changes: dict[str, Any], field: str
) -> None:
    hub = Hub(SimulatedClock())
    robot = join(hub)
    hub.receive(robot, telemetry())
    before = robot.telemetry
    with pytest.raises(FieldError) as caught:
        hub.receive(robot, telemetry(**changes))
    assert caught.value.field.startswith(field)
    assert robot.telemetry is before


@pytest.mark.parametrize("field", sorted(telemetry()["telemetry"].keys() - {"obs_age_ms"}))
def test_missing_telemetry_is_refused_by_name(field: str) -> None:
    message = telemetry()
    del message["telemetry"][field]
    with pytest.raises(FieldError) as caught:
        parse_telemetry(message)
    assert caught.value.field == f"telemetry.{field}"


@pytest.mark.parametrize(
    ("jpeg", "why"),
    [
        ("text", "expected bytes"),
        (b"GIF89a", "FF D8 FF"),
        (JPEG[:-1], "FF D8 FF"),
        (b"\xff\xd8\xff" + bytes(MAX_JPEG_BYTES) + b"\xff\xd9", f"at most {MAX_JPEG_BYTES}"),
    ],
)
def test_what_is_no_jpeg_is_refused(jpeg: object, why: str) -> None:
    hub = Hub(SimulatedClock())
    hub.add_watcher()
    robot = join(hub)
    with pytest.raises(FieldError, match=why):
        hub.receive(robot, {"jpeg": jpeg})
    assert robot.jpeg is None


@pytest.mark.parametrize(
    "message",
    [{}, {"telemetry": {}, "jpeg": JPEG}, {"hello": 3}, {"control": {}}, hello()],
    ids=["empty", "two kinds", "no map", "unknown", "second hello"],
)
def test_a_message_of_the_wrong_kind_is_refused(message: dict[str, Any]) -> None:
    hub = Hub(SimulatedClock())
    robot = join(hub)
    with pytest.raises(FieldError):
        hub.receive(robot, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"session_id": ""}, {"robot_id": "r" * 129}, {"robot_id": 4}, {"control_hz": 0.0},
        {"control_hz": 1001.0}, {"impair": True}, {"impair": {}},
        {"impair": {"delay_ms": 1.0, "jitter_ms": 0.0, "loss": 3.0}}, {"world": "w" * 65}, {"prompt": None},
    ],
)  # fmt: skip
def test_a_bad_hello_admits_nobody(changes: dict[str, Any]) -> None:
    hub = Hub(SimulatedClock())
    with pytest.raises(FieldError):
        join(hub, **changes)
    assert hub.robots == ()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["tick", "queue", "hello", "telemetry", "jpeg"]), inner),
    max_leaves=12,
)  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(["hello", "telemetry", "jpeg", "x"]), PLAIN, max_size=3)
    | st.dictionaries(st.sampled_from(sorted(telemetry()["telemetry"])), PLAIN).map(
        lambda changes: telemetry(**changes)
    )
)
def test_no_message_does_anything_but_be_kept_or_refused(message: dict[str, Any]) -> None:
    hub = Hub(SimulatedClock())
    hub.add_watcher()
    robot = join(hub)
    is_refused = False
    try:
        hub.receive(robot, message)
    except FieldError:
        is_refused = True
    assert is_refused == (robot.telemetry is None and robot.jpeg is None)
