"""Sessions: newest observation wins, operators re-instruct, nothing is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.errors import FieldError, SupersededError
from ganglion.pipeline.session import Session, Submission
from ganglion.types import Observation, RequestId, RobotId, SessionId


def submission(
    seq: int, prompt: str = "open the drawer", *, executed_until: int | None = None
) -> Submission:
    return Submission(
        request_id=RequestId(seq),
        observation=Observation(
            session_id=SessionId("s"),
            robot_id=RobotId("r"),
            seq=seq,
            images={},
            state=np.zeros(4, dtype=np.float32),
            prompt=prompt,
            executed_until=executed_until,
        ),
        on_done=lambda outcome: None,
        submitted_s=0.0,
        deadline_s=1.0,
        is_deadline_strict=False,
    )


def session() -> Session:
    return Session(session_id=SessionId("s"), robot_id=RobotId("r"))


def test_newest_wins() -> None:
    robot = session()
    assert robot.offer(submission(0)) is None
    first = robot.take()
    assert first is not None
    assert first.observation.seq == 0
    assert robot.offer(submission(1)) is None
    displaced = robot.offer(submission(2))
    assert displaced is not None
    assert displaced.observation.seq == 1
    newest = robot.take()
    assert newest is not None
    assert newest.observation.seq == 2
    assert robot.num_superseded == 1
    assert [item.observation.seq for item in robot.in_flight.values()] == [0, 2]
    assert robot.take() is None, "nothing waits"


def test_an_older_observation_is_refused_by_number() -> None:
    robot = session()
    robot.offer(submission(5))
    with pytest.raises(SupersededError, match="observation 5 was superseded by observation 5"):
        robot.offer(submission(5))


def test_control_ticks_only_go_forward_until_a_reset() -> None:
    robot = session()
    for seq, tick in ((0, 10), (1, None), (2, 10), (3, 12)):
        robot.offer(submission(seq, executed_until=tick))
    with pytest.raises(FieldError, match="executed_until: expected at least 12") as error:
        robot.offer(submission(4, executed_until=11))
    assert "reset" in error.value.advice
    assert robot.newest_seq == 3, "a refused observation supersedes nothing"
    assert robot.waiting is not None
    assert robot.waiting.observation.seq == 3
    robot.drain()
    assert robot.offer(submission(0, executed_until=0)) is None


def test_the_operator_re_instructs_from_the_next_observation_on() -> None:
    robot = session()
    robot.prompt_override = "close the drawer"
    robot.offer(submission(0))
    taken = robot.take()
    assert taken is not None
    assert taken.observation.prompt == "close the drawer"
    assert robot.prompt == "close the drawer"


@given(st.lists(st.one_of(st.integers(0, 30), st.just("launch")), max_size=60))
def test_every_observation_is_accounted_for(events: list[int | str]) -> None:
    """Each offered observation is refused, displaced, taken or still waiting: exactly one of them."""
    robot, offered, refused, displaced, taken = session(), 0, 0, 0, 0
    for event in events:
        if event == "launch":
            taken += robot.take() is not None
        else:
            offered += 1
            try:
                displaced += robot.offer(submission(int(event))) is not None
            except SupersededError:
                refused += 1
    assert offered == refused + displaced + taken + (robot.waiting is not None)
    assert robot.num_superseded == refused + displaced


def test_chunk_rate_forgets_the_past() -> None:
    robot = session()
    for at in range(10):
        robot.count_chunk(at * 0.1, 5.0)
    assert robot.chunk_hz(0.9) == pytest.approx(10.0)
    assert robot.chunk_hz(10.0) == 0.0
