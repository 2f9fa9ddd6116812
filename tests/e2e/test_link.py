"""A robot's link over a real socket: delay, jitter and loss on purpose, and what a chunk rests on."""

import threading

import numpy as np
import pytest

from ganglion.client import ReplyError
from ganglion.clock import RealClock
from ganglion.errors import ErrorCode
from ganglion.robots.episode import EpisodePlan
from ganglion.robots.fleet import FleetConfig, run_fleet, shared_episodes
from ganglion.robots.impairment import Impairment
from ganglion.robots.link import LOST_S, MAX_IN_FLIGHT, Answered, Link, Sent
from ganglion.robots.loop import LoopConfig, Pace
from ganglion.robots.queue import QueueConfig
from ganglion.serve.app import ServerThread
from ganglion.serve.fake import FakeService
from ganglion.types import Execution
from tests.e2e.edge_stage import SPEC, observation
from tests.e2e.test_fleet import SPEC as PUSHT_SPEC

CLOCK = RealClock()


@pytest.fixture
def service():
    with FakeService(SPEC) as fake:
        yield fake


@pytest.fixture
def server(service):
    with ServerThread(service) as thread:
        yield thread


@pytest.fixture
def link(server):
    robot = Link(server.ws_url, robot_id="arm")
    robot.open(timeout_s=5.0)
    yield robot
    robot.close()


def send(link: Link, tick: int) -> bool:
    sent = Sent(tick=tick, obs_s=CLOCK.now_s())
    return link.send(observation(prompt=...), sent=sent, prompt="push", executed_until=tick)


def answers(link: Link, num_answers: int, limit_s: float = 10.0) -> list:
    end_s, found = CLOCK.now_s() + limit_s, []
    while len(found) < num_answers and CLOCK.now_s() < end_s:
        answer = link.poll(0.05)
        if answer is not None:
            found.append(answer)
    return found


def test_a_clear_link_adds_nothing(link):
    assert send(link, 4)
    assert link.oldest_tick == 4
    (answer,) = answers(link, 1)
    assert isinstance(answer, Answered)
    assert answer.sent is answer.context
    assert answer.sent.tick == 4
    assert answer.round_trip_ms < 1_000
    assert (link.oldest_tick, link.num_in_flight) == (None, 0)


def test_delay_holds_messages_back_and_may_change_while_they_are_under_way(link, service):
    link.impair(Impairment(delay_ms=2_000.0))
    start_s = CLOCK.now_s()
    assert send(link, 1)
    assert link.poll(0.1) is None
    assert not service.received, "still on its way there"
    link.impair(Impairment())
    (answer,) = answers(link, 1)
    assert CLOCK.now_s() - start_s >= 1.0
    assert answer.round_trip_ms >= 1_000
    assert send(link, 2)
    (answer,) = answers(link, 1)
    assert answer.round_trip_ms < 1_000


def test_jitter_reorders_and_the_newest_wins(link):
    link.impair(Impairment(jitter_ms=300.0))
    for tick in range(8):
        assert send(link, tick)
    found = answers(link, 8)
    errors = [answer for answer in found if isinstance(answer, ReplyError)]
    assert len(found) == 8, "every observation is answered once"
    assert {error.code for error in errors} == {ErrorCode.SUPERSEDED}, "one overtook another"
    assert link.num_in_flight == 0


def test_what_is_lost_counts_as_under_way_until_it_is_given_up(link, service):
    link.impair(Impairment(loss=1.0))
    assert [send(link, tick) for tick in range(MAX_IN_FLIGHT + 1)] == [True] * 8 + [False]
    start_s = CLOCK.now_s()
    while link.num_in_flight:
        assert link.poll(0.05) is None
        assert CLOCK.now_s() - start_s < LOST_S + 1.0
    assert not service.received
    link.impair(Impairment())
    assert send(link, 9)
    assert isinstance(answers(link, 1)[0], Answered)
    assert link.num_reconnects == 0, "a bad road is no lost connection"


def test_lost_answers_are_given_up_too(link, service):
    service.block()
    assert send(link, 1)
    while not service.received:
        assert link.poll(0.01) is None
    link.impair(Impairment(loss=1.0))
    service.unblock()
    assert answers(link, 1, limit_s=0.3) == []
    assert link.num_in_flight == 1
    assert answers(link, 1, limit_s=LOST_S) == []
    assert link.num_in_flight == 0


def test_a_reset_forgets_what_is_held_back(link):
    link.impair(Impairment(delay_ms=300.0))
    send(link, 1)
    link.reset()
    assert link.num_in_flight == 0
    assert link.poll(0.5) is None


def test_a_lockstep_link_never_holds_anything_back(server):
    link = Link(server.ws_url, robot_id="arm", is_real_time=False)
    link.open(timeout_s=5.0)
    link.impair(Impairment(delay_ms=2_000.0, loss=1.0))
    send(link, 1)
    assert len(answers(link, 1, limit_s=1.5)) == 1
    link.close()


def test_impairing_from_another_thread_while_the_loop_polls(link):
    is_over = threading.Event()

    def operate():
        rng = np.random.default_rng(0)
        while not is_over.is_set():
            link.impair(Impairment(delay_ms=rng.uniform(0, 20), jitter_ms=rng.uniform(0, 20)))

    thread = threading.Thread(target=operate)
    thread.start()
    num_chunks = 0
    for tick in range(40):
        send(link, tick)
        num_chunks += sum(isinstance(answer, Answered) for answer in answers(link, 1, 0.5))
    is_over.set()
    thread.join()
    assert num_chunks > 20


@pytest.mark.parametrize(
    "execution", [Execution.SYNC, Execution.BLEND, Execution.ROLLED, Execution.NAIVE]
)
def test_a_robot_process_executes_as_it_is_told_over_a_bad_link(execution):
    """Real arms in lockstep: config and impairment reach the process, and every tick is accounted for."""
    pytest.importorskip("gym_pusht")
    config = LoopConfig(
        pace=Pace.LOCKSTEP, execution=execution, delay_ticks=6, max_ticks=40,
        queue=QueueConfig(safe_stop_s=5.0, max_age_s=2.0),
    )  # fmt: skip
    with FakeService(PUSHT_SPEC) as service, ServerThread(service) as thread:
        result = run_fleet(
            FleetConfig(
                url=thread.ws_url,
                robots=("a",),
                loop=config,
                impairment=Impairment(jitter_ms=100.0, loss=0.1),
            ),
            shared_episodes([EpisodePlan(world="pusht", seed=1)]),
        )
        (episode,) = result.episodes
        received = list(service.received)
    assert episode.execution == execution.value
    assert {seen.execution for seen in received} == {execution}
    assert episode.num_ticks == 40
    assert (episode.num_holds > 10) == (execution is Execution.SYNC)
    ticks = [seen.executed_until for seen in received if seen.executed_until is not None]
    assert ticks == sorted(ticks)
    assert len(ticks) == (0 if execution is Execution.SYNC else len(received))
