"""Deadlines by buffer exhaustion, wait ratio, what is given up, and how many requests are worth having under way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.engine.outlook import Outlook
from ganglion.errors import DeadlineMissedError, SupersededError
from ganglion.pipeline.admission import Admission
from ganglion.pipeline.session import Session, Submission
from ganglion.pipeline.supply import Supply
from ganglion.pipeline.triage import Triage
from ganglion.spec import PolicySpec, Stage
from ganglion.types import Observation, RequestId, RobotId, SessionId, SpanKind

SPEC = PolicySpec(
    name="m",
    family="plain",
    version="1",
    views=(),
    state_key="state",
    state_dim=1,
    action_dim=1,
    horizon=48,
    num_flow_steps=5,
    control_hz=20.0,
    action_low=(-1.0,),
    action_high=(1.0,),
)


def seen(
    seq: int,
    *,
    session: str = "a",
    tick: int | None = None,
    hz: float | None = 20.0,
    deadline_ms: float | None = 250.0,
) -> Observation:
    return Observation(
        session_id=SessionId(session),
        robot_id=RobotId(session),
        seq=seq,
        images={},
        state=np.zeros(1, np.float32),
        prompt="",
        control_hz=hz,
        deadline_ms=deadline_ms,
        executed_until=tick,
    )


def submission(observation: Observation, at_s: float) -> Submission:
    return Submission(
        request_id=RequestId(observation.seq),
        observation=observation,
        on_done=lambda _: None,
        submitted_s=at_s,
        deadline_s=at_s + (observation.deadline_ms or 250.0) * 1e-3,
        is_deadline_strict=observation.deadline_ms is not None,
    )


def test_a_robot_runs_dry_when_its_rows_end_or_its_observation_is_too_old() -> None:
    supply = Supply()
    first = seen(0, deadline_ms=None)
    supply.receive(first, 10.0)
    assert supply.dry_s() is None
    supply.receive(seen(1, deadline_ms=None), 10.05)
    assert supply.deadline_s(10.3) == 10.0, "it waits since then"
    supply.send(first, num_rows=8, now_s=10.1)
    assert supply.dry_s() == pytest.approx(10.4), "8 rows at 20 Hz from the observation on"
    aged = Supply()
    aged.receive(seen(0), 10.0)
    aged.send(seen(0), num_rows=8, now_s=10.1)
    assert aged.dry_s() == pytest.approx(10.25), "a robot that wants at most 250 ms"


def test_the_robots_own_count_of_ticks_goes_before_the_time() -> None:
    supply = Supply()
    first = seen(0, tick=100, deadline_ms=None)
    supply.receive(first, 10.0)
    supply.send(first, num_rows=8, now_s=10.1)
    supply.receive(seen(1, tick=102, deadline_ms=None), 10.2)
    assert supply.dry_s() == pytest.approx(10.2 + 6 / 20), "it slipped two ticks"


def test_a_later_chunk_moves_the_deadline_and_an_older_one_does_not() -> None:
    supply = Supply()
    for seq in range(3):
        supply.receive(seen(seq), 10.0 + 0.1 * seq)
    supply.send(seen(1), num_rows=48, now_s=10.25)
    dry_s = supply.dry_s()
    supply.send(seen(0), num_rows=48, now_s=10.26)
    assert supply.dry_s() == dry_s == pytest.approx(10.35)
    assert supply.is_overtaken(0)
    assert not supply.is_overtaken(1)


def test_wait_ratio_counts_time_dry_and_asking() -> None:
    supply = Supply()
    for round_ in range(6):
        start_s = 10.0 + 0.5 * round_
        supply.receive(seen(round_), start_s)
        supply.send(seen(round_), num_rows=48, now_s=start_s + 0.05)
    # of every half second: 50 ms asking while dry, 200 ms executing, 250 ms dry and silent
    assert supply.wait_ratio(12.8) == pytest.approx(0.25, rel=0.1)
    idle = Supply()
    idle.receive(seen(0), 0.0)
    idle.send(seen(0), num_rows=48, now_s=0.0)
    assert idle.wait_ratio(0.2) == 0.0


@given(
    st.lists(
        st.tuples(st.floats(0.001, 0.5), st.booleans(), st.integers(0, 3), st.booleans()),
        max_size=40,
    )
)
def test_supply_stays_sane(events: list[tuple[float, bool, int, bool]]) -> None:
    """Whatever comes in whatever order: ratios are finite and not negative, the newest sent number never falls."""
    supply, now_s, newest = Supply(), 0.0, -1
    known: list[Observation] = []
    for wait_s, is_asking, back, has_tick in events:
        now_s += wait_s
        if is_asking or not known:
            known.append(seen(len(known), tick=len(known) * 3 if has_tick else None))
            supply.receive(known[-1], now_s)
        else:
            supply.send(known[max(0, len(known) - 1 - back)], num_rows=5, now_s=now_s)
            assert supply.newest_sent_seq is not None
            assert supply.newest_sent_seq >= newest
            newest = supply.newest_sent_seq
        assert 0.0 <= supply.wait_ratio(now_s) < float("inf")


def test_the_robot_that_runs_dry_first_goes_in_first() -> None:
    triage = Triage(SPEC)
    sessions = []
    for at, name in enumerate("abc"):
        first = submission(seen(0, session=name), 10.0 - 0.01 * at)
        triage.receive(first)
        triage.send(first.observation, num_rows=48, now_s=10.05)
        session = Session(session_id=SessionId(name), robot_id=RobotId(name))
        session.offer(submission(seen(1, session=name), 10.1))
        sessions.append(session)
    assert [s.session_id for s in triage.in_order(sessions, 10.1)] == ["c", "b", "a"]


def outlook(observation: Observation, *, left_ms: float, may_see_newer: bool = False) -> Outlook:
    return Outlook(
        request_id=RequestId(observation.seq),
        seen=observation,
        may_see_newer=may_see_newer,
        left_us=round(left_ms * 1e3),
        full_us=20_000,
    )


def test_hopeless_work_is_given_up_once_and_only_for_something_better() -> None:
    triage = Triage(SPEC)
    old, new = submission(seen(0), 10.0), submission(seen(1), 10.2)
    triage.receive(old)
    triage.receive(new)
    under_way = [outlook(old.observation, left_ms=100)]
    assert not triage.given_up(under_way, {}, 10.2), "late is better than nothing"
    assert not triage.given_up(
        [outlook(old.observation, left_ms=40)], {SessionId("a"): new}, 10.2
    ), "it will be in time"
    ((request_id, reason),) = triage.given_up(under_way, {SessionId("a"): new}, 10.2)
    assert request_id == RequestId(0)
    assert isinstance(reason, DeadlineMissedError)
    newer = submission(seen(2), 10.4)
    triage.receive(newer)
    again = [outlook(new.observation, left_ms=200)]
    assert not triage.given_up(again, {SessionId("a"): newer}, 10.4), (
        "never twice without a chunk between"
    )


def test_superseded_work_is_given_up_unless_it_will_read_what_is_newer() -> None:
    triage = Triage(SPEC)
    old, new = submission(seen(0), 10.0), submission(seen(1), 10.1)
    triage.receive(old)
    triage.receive(new)
    triage.send(new.observation, num_rows=48, now_s=10.15)
    late = [outlook(old.observation, left_ms=1, may_see_newer=True)]
    assert not triage.given_up(late, {}, 10.16)
    ((_, reason),) = triage.given_up([outlook(old.observation, left_ms=1)], {}, 10.16)
    assert isinstance(reason, SupersededError)


class Table:
    """Microseconds of a unit: `base` for a piece and `each` for a row of it."""

    def __init__(self, base: int, each: int) -> None:
        self._base, self._each = base, each

    def estimate_us(self, model: str, stage: str, *, num_rows: int, num_units: int) -> int:
        return (self._base + self._each * num_rows) * num_units

    def observe(
        self, model: str, stage: str, *, num_rows: int, num_units: int, run_us: float
    ) -> None:
        raise AssertionError("admission only asks")


STAGE = Stage(
    name="denoise",
    kind=SpanKind.DENOISE,
    num_units=5,
    reads=(),
    layout="state",
    num_pages=1,
    num_slots=1,
    is_shared=False,
    is_divisible=True,
)


@pytest.mark.parametrize(
    ("base", "each", "max_age_ms", "expected"),
    [
        (0, 100, 250.0, 4),
        (200, 100, 250.0, 16),
        (10_000, 1, 250.0, 64),
        (200, 100, 10.0, 4),  # eight rows take 5 ms of the 4 that they may
        (10_000, 1, 10.0, 1),  # nothing is in time
    ],
)
def test_requests_under_way_end_where_batching_does(
    base: int, each: int, max_age_ms: float, expected: int
) -> None:
    admission = Admission(
        Table(base, each),
        model="m",
        stages=(STAGE,),
        max_rows=64,
        num_lanes=1,
        max_age_ms=max_age_ms,
    )
    assert admission.limit(5) == expected


def test_pressure_counts_from_the_first_observation_without_an_answer() -> None:
    supply = Supply()
    supply.receive(seen(0), 10.0)
    supply.send(seen(0), num_rows=48, now_s=10.02)
    supply.receive(seen(1), 10.15)
    assert supply.pressure(seen(1), 10.2) == pytest.approx(0.5), "dry at 10.25"
    supply.receive(seen(2), 10.3)
    assert supply.pressure(seen(2), 10.31) == pytest.approx(1.6), "number 1 waited in vain"
    asking_when_dry = Supply()
    asking_when_dry.receive(seen(0), 10.0)
    asking_when_dry.send(seen(0), num_rows=4, now_s=10.02)
    asking_when_dry.receive(seen(1), 10.2)
    assert asking_when_dry.pressure(seen(1), 10.225) == pytest.approx(0.1)
