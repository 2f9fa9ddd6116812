"""100,000 random schedules of drop, duplicate, reorder, delay and restart: what an arm may never do.

A robot's real queue and a server's real sessions, a made-up network between them, simulated time. Every row says which slot
it is for and which observation and request it came from, so that what was executed can be judged by itself.
"""

import heapq
import itertools
import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from ganglion.clock import SimulatedClock
from ganglion.errors import SupersededError
from ganglion.pipeline.session import Session, Submission
from ganglion.robots.queue import (
    ActionKind,
    ActionQueue,
    Chunk,
    Embodiment,
    Mode,
    QueueConfig,
    Verdict,
)
from ganglion.types import Observation, RequestId, RobotId, SessionId

PERIOD_S = 0.05
NUM_TICKS = 10
NUM_SCHEDULES = 100_000
STATE = np.zeros(4, np.float32)
ARM = Embodiment(kind=ActionKind.DELTA, action_low=(-1.0,) * 4, action_high=(1e9,) * 4)
MAX_AGE_S = 0.3
CONFIG = QueueConfig(max_age_s=MAX_AGE_S)
BLENDING = QueueConfig(max_age_s=MAX_AGE_S, old_share=0.3)
SLOTS = np.arange(200, dtype=np.float32)
SYNC, NAIVE, BLEND, ROLLED = range(4)  # where rows are placed, which is all that differs here


def rows(first_tick: int, num_rows: int, obs_tick: int, request: int) -> np.ndarray:
    actions = np.empty((num_rows, 4), np.float32)
    actions[:, 0] = SLOTS[first_tick : first_tick + num_rows]
    actions[:, 1], actions[:, 2], actions[:, 3] = obs_tick, request, 1.0
    return actions


@dataclass(slots=True)
class Schedule:
    """One robot, one server, and what happens between them."""

    rng: random.Random
    mode: int = field(init=False)
    max_delay_s: float = field(init=False)
    loss: float = field(init=False)
    twice: float = field(init=False)
    num_rows: int = field(init=False)
    queue: ActionQueue = field(init=False)
    session: Session = field(init=False)
    clock: SimulatedClock = field(init=False, default_factory=SimulatedClock)
    events: list = field(init=False, default_factory=list)
    numbers: itertools.count = field(init=False, default_factory=itertools.count)
    sent: dict = field(init=False, default_factory=dict)  # seq -> (tick, time, first tick)
    perceived: int = -1  # the newest observation in the session's public context
    version: int = 0
    seq: int = -1
    epoch: int = 0  # of the server; what an earlier one computed is lost
    first_tick: int = 0  # of the robot's episode
    newest: Chunk | None = None  # of the chunks that the queue took

    def __post_init__(self) -> None:
        draw = self.rng.random
        self.mode = int(draw() * 4)
        self.max_delay_s = (0.02, 0.12, 0.4)[int(draw() * 3)]
        self.loss, self.twice = draw() ** 3, draw() ** 2
        self.num_rows = (2, 4, 12)[int(draw() * 3)]
        self.queue = ActionQueue(ARM, BLENDING if self.mode == BLEND else CONFIG)
        self.session = new_session()

    # --- the network -------------------------------------------------------------------------------------------

    def travel(self, kind: str, load: object, now_s: float) -> None:
        draw = self.rng.random
        for _ in range(1 + (draw() < self.twice)):
            if draw() >= self.loss:
                at_s = now_s + draw() * self.max_delay_s
                heapq.heappush(self.events, (at_s, next(self.numbers), kind, load, self.epoch))

    def observe(self, tick: int, now_s: float) -> None:
        self.seq += 1
        first_tick = tick + int(self.rng.random() * 4) if self.mode == ROLLED else tick
        self.sent[self.seq] = (tick, now_s, first_tick)
        self.travel("observation", (self.seq, tick), now_s)

    def run_until(self, end_s: float) -> None:
        while self.events and self.events[0][0] <= end_s:
            now_s, _, kind, load, epoch = heapq.heappop(self.events)
            if kind == "observation":
                self.serve(load, now_s)
            elif kind == "chunk":
                self.arrive(load, now_s)
            elif epoch == self.epoch:
                self.finish(load, now_s)

    # --- the server --------------------------------------------------------------------------------------------

    def serve(self, load: tuple[int, int], now_s: float) -> None:
        seq, tick = load
        submission = Submission(
            request_id=RequestId(seq),
            observation=Observation(
                session_id=SessionId("s"), robot_id=RobotId("r"), seq=seq, images={}, state=STATE,
                prompt="", executed_until=tick,
            ),
            on_done=print,
            submitted_s=now_s,
            deadline_s=now_s,
            is_deadline_strict=False,
        )  # fmt: skip
        newest = self.session.newest_seq
        try:
            self.session.offer(submission)
        except SupersededError:
            assert seq <= newest
        else:
            assert seq > newest, "an observation older than the newest was taken"
            self.launch(now_s)

    def launch(self, now_s: float) -> None:
        if len(self.session.in_flight) < 3 and (taken := self.session.take()) is not None:
            seq = taken.observation.seq
            done_s = now_s + self.rng.random() * 0.08  # they overtake each other
            heapq.heappush(self.events, (done_s, next(self.numbers), "done", seq, self.epoch))

    def finish(self, seq: int, now_s: float) -> None:
        if self.session.in_flight.pop(RequestId(seq), None) is None:
            return  # the session was reset meanwhile
        self.perceived = max(self.perceived, seq)
        context_seq = max(seq, self.perceived)  # the newest version when it left
        self.travel("chunk", (seq, context_seq, self.version), now_s)
        self.launch(now_s)

    def restart_server(self) -> None:
        """Another process: no session, nothing in flight, perhaps another policy. The link notices."""
        self.epoch += 1
        self.session, self.perceived = new_session(), -1
        self.version += self.rng.random() < 0.5
        self.queue.fence()

    # --- the robot ---------------------------------------------------------------------------------------------

    def arrive(self, load: tuple[int, int, int], now_s: float) -> None:
        seq, context_seq, version = load
        tick, obs_s, first_tick = self.sent[context_seq]
        num_rows = self.num_rows
        if self.mode == SYNC:
            first_tick, num_rows = self.queue.next_tick, min(3, num_rows)
        chunk = Chunk(
            actions=rows(first_tick, num_rows, tick, seq),
            obs_tick=tick,
            obs_s=obs_s,
            version=str(version),
            request=seq,
            first_tick=first_tick,
        )
        if self.queue.mode is Mode.SAFE_STOP and self.queue.is_good(chunk, now_s=now_s):
            self.queue.resume()
        verdict = self.queue.offer(chunk, now_s=now_s)
        if verdict is Verdict.ACCEPTED:
            assert now_s - obs_s <= MAX_AGE_S, "a stale observation's chunk was taken"
            self.newest = chunk
        elif verdict is Verdict.LATE and self.newest and chunk.version != self.newest.version:
            self.newest = None  # another policy's plan

    def restart_robot(self) -> None:
        """A new episode: the session is reset; what is under way still arrives."""
        self.queue.restart()
        self.newest = None
        self.session.drain()
        self.perceived = -1
        self.first_tick = self.queue.next_tick

    def run(self) -> tuple[int, int]:
        """Executed actions and held ticks of one schedule."""
        draw, last_slot, last, num_run, num_held = self.rng.random, -1, (-1, -1), 0, 0
        every = 1 + int(draw() * 3)
        for tick in range(NUM_TICKS):
            self.clock.sleep_until(tick * PERIOD_S)
            now_s = self.clock.now_s()
            self.run_until(now_s)
            luck = draw()
            if luck < 0.02:
                self.restart_robot()
            elif luck < 0.05:
                self.restart_server()
            if tick % every == 0:
                self.observe(tick, now_s)
            command = self.queue.step(tick, now_s=now_s)
            newest = self.newest = None if command.mode is Mode.SAFE_STOP else self.newest
            if newest is not None and newest.start_tick <= tick < newest.end_tick:
                assert command.obs_tick == newest.obs_tick, "the newest observation wins"
            if command.obs_tick is None:
                num_held += 1
                assert not command.action[:3].any(), "holding is standing still"
                continue
            slot, obs_tick, request, _ = command.action.tolist()
            num_run += 1
            assert slot == tick > last_slot, "each slot at its tick, each tick once"
            assert command.obs_tick >= last[0], "an older observation after a newer one"
            assert command.obs_tick >= self.first_tick, "an observation of the episode before"
            if self.mode != BLEND:  # which averages what is told here
                assert obs_tick == command.obs_tick
                assert (obs_tick, request) >= last, "an earlier request after a later one"
                last = (obs_tick, request)
            else:
                last = (command.obs_tick, -1)
            last_slot = tick
        return num_run, num_held


def new_session() -> Session:
    return Session(session_id=SessionId("s"), robot_id=RobotId("r"))


@pytest.mark.parametrize("part", range(4))
def test_no_schedule_executes_a_stale_observation_or_goes_back(part):
    rng = random.Random(part)
    totals = np.zeros(2, np.int64)
    for _ in range(NUM_SCHEDULES // 4):
        totals += Schedule(rng).run()
    num_run, num_held = totals
    # the schedules are no mere silence
    assert num_run > 0.2 * totals.sum()
    assert num_held > 0.1 * totals.sum()
