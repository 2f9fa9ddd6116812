"""The action queue: every rule once, then 10,000 random networks against what must never happen."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.robots.queue import (
    ActionKind,
    ActionQueue,
    Chunk,
    Embodiment,
    Mode,
    QueueConfig,
    Verdict,
)

PERIOD_S = 0.05
DELTA = Embodiment(
    kind=ActionKind.DELTA, action_low=(-9e6, -9e6), action_high=(9e6, 9e6), kept_dims=(1,)
)
POSITION = Embodiment(kind=ActionKind.POSITION, action_low=(0.0, 0.0), action_high=(512.0, 512.0))


def actions_of(obs_tick: int, num_rows: int = 10) -> np.ndarray:
    """Row i says which observation and which row it is."""
    rows = [[obs_tick * 100 + row, 1.0] for row in range(num_rows)]
    return np.array(rows, np.float32)


def chunk_of(obs_tick: int, num_rows: int = 10, *, version: str = "v1", **changes) -> Chunk:
    fields = {
        "actions": actions_of(obs_tick, num_rows),
        "obs_tick": obs_tick,
        "obs_s": obs_tick * PERIOD_S,
        "version": version,
    }
    return Chunk(**{**fields, **changes})


class Arm:
    """A queue and the time that belongs to its ticks."""

    def __init__(self, embodiment: Embodiment = DELTA, config: QueueConfig | None = None) -> None:
        self.queue, self.tick = ActionQueue(embodiment, config), 0

    def offer(self, chunk: Chunk) -> Verdict:
        return self.queue.offer(chunk, now_s=self.tick * PERIOD_S)

    def step(self, measured=None):
        command = self.queue.step(self.tick, now_s=self.tick * PERIOD_S, measured=measured)
        self.tick += 1
        return command

    def steps(self, num_ticks: int):
        return [self.step() for _ in range(num_ticks)]


def test_each_slot_runs_at_its_own_tick():
    arm = Arm()
    assert arm.offer(chunk_of(0)) is Verdict.ACCEPTED
    assert [command.action[0] for command in arm.steps(3)] == [0, 1, 2]
    assert arm.queue.slots()[:, 0].tolist() == [3, 4, 5, 6, 7, 8, 9]


def test_late_chunk_keeps_only_slots_still_to_come():
    arm = Arm()
    arm.offer(chunk_of(0))
    arm.steps(5)
    assert arm.offer(chunk_of(2)) is Verdict.ACCEPTED
    assert arm.step().action[0] == 203


def test_holds_in_the_tick_at_which_it_runs_dry_and_keeps_the_gripper():
    arm = Arm()
    arm.offer(chunk_of(0, 2))
    first, second, held = arm.steps(3)
    assert (first.mode, second.mode, held.mode) == (Mode.RUN, Mode.RUN, Mode.HOLD)
    assert held.action.tolist() == [0.0, 1.0]
    assert held.is_miss
    assert held.obs_tick is None
    assert arm.queue.counts.holds == 1


def test_position_arm_holds_where_it_was_when_it_ran_dry():
    arm = Arm(POSITION)
    arm.offer(chunk_of(0, 1, actions=np.array([[10.0, 20.0]], np.float32)))
    arm.step(np.array([1.0, 1.0]))
    held = [arm.step(np.array([at, 600.0])).action.tolist() for at in (5.0, 6.0)]
    assert held == [[5.0, 512.0], [5.0, 512.0]]


def test_idle_arm_holds_and_never_safe_stops():
    arm = Arm()
    assert {command.mode for command in arm.steps(100)} == {Mode.IDLE}
    assert arm.queue.counts.holds == arm.queue.counts.misses == 100


def test_safe_stop_is_latched_until_resume():
    arm = Arm()
    arm.offer(chunk_of(0, 50))
    modes = [command.mode for command in arm.steps(12)]
    assert modes == [Mode.RUN] * 10 + [Mode.SAFE_STOP] * 2  # 500 ms = 10 ticks
    assert arm.offer(chunk_of(12)) is Verdict.STOPPED
    assert arm.step().mode is Mode.SAFE_STOP
    arm.queue.restart()
    assert arm.queue.mode is Mode.SAFE_STOP
    arm.queue.resume()
    assert arm.offer(chunk_of(12)) is Verdict.OUTDATED  # seen before the stop was left
    assert arm.offer(chunk_of(13)) is Verdict.ACCEPTED
    assert arm.step().action[0] == 1300
    assert arm.queue.counts.safe_stops == 1


@pytest.mark.parametrize(
    "actions",
    [
        np.array([[0.0, np.nan]], np.float32),
        np.array([[0.0, np.inf]], np.float32),
        np.array([[0.0, 9.1e6]], np.float32),
        np.zeros((3, 3), np.float32),
        np.zeros((0, 2), np.float32),
        np.zeros(2, np.float32),
        np.zeros((3, 2), np.float64),
    ],
)
def test_bad_chunk_is_refused_whole_and_the_third_in_a_row_ends_the_plan(actions):
    arm = Arm()
    arm.offer(chunk_of(0, 50))
    for tick in (1, 2):
        arm.step()
        assert arm.offer(chunk_of(tick, actions=actions)) is Verdict.REFUSED
    assert arm.step().mode is Mode.RUN
    assert arm.offer(chunk_of(3, actions=actions)) is Verdict.REFUSED
    assert arm.step().mode is Mode.HOLD
    assert arm.offer(chunk_of(4)) is Verdict.ACCEPTED
    assert arm.step().mode is Mode.RUN
    assert arm.queue.counts.refused == 3


def test_duplicates_and_older_observations_change_nothing():
    arm = Arm()
    arm.steps(3)
    assert arm.offer(chunk_of(2)) is Verdict.ACCEPTED
    assert arm.offer(chunk_of(2)) is Verdict.OUTDATED
    assert arm.offer(chunk_of(1)) is Verdict.OUTDATED
    assert arm.step().action[0] == 201


def test_chunk_of_too_old_an_observation_is_dropped():
    arm = Arm()
    arm.steps(21)
    assert arm.offer(chunk_of(0, 50)) is Verdict.LATE  # 1.05 s old
    assert arm.offer(chunk_of(1, 50)) is Verdict.ACCEPTED  # 1.0 s old


def test_a_chunk_whose_slots_have_all_gone_by_is_late():
    arm = Arm()
    arm.steps(5)
    assert arm.offer(chunk_of(0, 5)) is Verdict.LATE
    assert arm.step().mode is Mode.IDLE


def test_another_policy_ends_the_old_plan():
    arm = Arm()
    arm.offer(chunk_of(0, 50))
    arm.steps(6)
    assert arm.offer(chunk_of(1, 3, version="v2")) is Verdict.LATE
    assert arm.step().mode is Mode.HOLD


def test_of_two_chunks_of_one_observation_the_later_request_wins():
    arm = Arm()
    assert arm.offer(chunk_of(0, request=3)) is Verdict.ACCEPTED
    later = actions_of(0) + np.array([50.0, 0.0], np.float32)
    assert arm.offer(chunk_of(0, actions=later, request=5)) is Verdict.ACCEPTED
    assert arm.offer(chunk_of(0, request=5)) is Verdict.OUTDATED
    assert arm.offer(chunk_of(0, request=4)) is Verdict.OUTDATED
    assert arm.step().action[0] == 50
    assert arm.offer(chunk_of(1, request=4)) is Verdict.ACCEPTED, "a newer observation goes first"


def test_a_chunk_for_a_later_start_lets_the_plan_run_until_then():
    arm = Arm()
    arm.offer(chunk_of(0))
    arm.steps(2)
    assert arm.offer(chunk_of(2, first_tick=5)) is Verdict.ACCEPTED
    assert arm.queue.slots()[:, 0].tolist() == [2, 3, 4, *range(200, 210)]
    commands = arm.steps(5)
    assert [command.action[0] for command in commands] == [2, 3, 4, 200, 201]
    assert [command.obs_tick for command in commands] == [0, 0, 0, 2, 2]


def test_a_newer_chunk_with_an_earlier_start_replaces_one_that_has_not_begun():
    arm = Arm()
    arm.offer(chunk_of(0))
    arm.step()
    arm.offer(chunk_of(0, first_tick=6, request=1))
    arm.offer(chunk_of(1, first_tick=4))
    assert [command.action[0] for command in arm.steps(6)] == [1, 2, 3, 100, 101, 102]


def test_a_gap_before_a_later_start_is_held_and_is_the_end_of_what_is_planned():
    arm = Arm()
    arm.offer(chunk_of(0, 2))
    arm.step()
    arm.offer(chunk_of(1, first_tick=4))
    assert arm.queue.slots()[:, 0].tolist() == [1]
    modes = [command.mode for command in arm.steps(4)]
    assert modes == [Mode.RUN, Mode.HOLD, Mode.HOLD, Mode.RUN]
    assert arm.queue.counts.holds == 2


@pytest.mark.parametrize("first_tick", [None, 4])
def test_overlapping_rows_are_averaged_the_others_are_the_new_ones(first_tick):
    arm = Arm(config=QueueConfig(old_share=0.3))
    old = np.array([[10.0, 1.0]] * 8, np.float32)
    new = np.array([[20.0, 0.0]] * 8, np.float32)
    arm.offer(chunk_of(0, actions=old))
    arm.steps(3)
    arm.offer(chunk_of(2, actions=new, first_tick=first_tick))
    start = 2 if first_tick is None else first_tick
    rows = arm.queue.slots()
    mixed = slice(max(0, start - 3), 5)  # ticks from the later start to 7, the old chunk's last
    assert rows[mixed] == pytest.approx(np.array([[17.0, 0.3]] * len(rows[mixed])), abs=1e-5)
    assert rows[5:].tolist() == [[20.0, 0.0]] * (start + 8 - 8)
    assert rows[: mixed.start].tolist() == [[10.0, 1.0]] * mixed.start
    assert new[0].tolist() == [20.0, 0.0], "the chunk itself stays as it came"


def test_averages_of_what_is_in_bounds_are_in_bounds():
    arm = Arm(POSITION, QueueConfig(old_share=0.3))
    rng = np.random.default_rng(0)
    for tick in range(200):
        values = rng.choice([0.0, 512.0, 0.1, 511.9], (4, 2)).astype(np.float32)
        assert arm.offer(chunk_of(tick, actions=values)) is Verdict.ACCEPTED
        action = arm.step().action
        assert (action >= 0).all()
        assert (action <= 512).all()


def test_fence_wants_an_observation_of_its_own_side():
    arm = Arm()
    arm.offer(chunk_of(0, 50))
    arm.steps(3)
    arm.queue.fence()
    assert arm.offer(chunk_of(2)) is Verdict.OUTDATED
    assert arm.step().action[0] == 3  # runs on meanwhile
    assert arm.offer(chunk_of(3)) is Verdict.ACCEPTED


def test_restart_forgets_the_episode_before():
    arm = Arm()
    arm.offer(chunk_of(0, 50))
    arm.steps(2)
    arm.queue.restart()
    command = arm.step()
    assert command.mode is Mode.IDLE
    assert command.action.tolist() == [0.0, 0.0]
    assert arm.offer(chunk_of(1)) is Verdict.OUTDATED


def test_old_actions_run_but_count_as_misses():
    arm = Arm()
    arm.offer(chunk_of(0, 50))
    commands = arm.steps(8)
    assert [command.is_miss for command in commands] == [False] * 6 + [True] * 2  # 250 ms: tick 5
    assert arm.queue.counts.misses == 2
    assert arm.queue.counts.holds == 0


def test_overruns_are_ticks_and_misses():
    arm = Arm()
    arm.queue.count_overrun(3)
    assert (arm.queue.counts.ticks, arm.queue.counts.misses) == (3, 3)


BAD_ACTIONS = np.array([[np.nan, 0.0]] * 10, np.float32)


class Network:
    """Drops, duplicates, delays (and so reorders) the chunks of one schedule; breaks some; restarts the server."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.drop, self.twice, self.bad = (self.random.random() ** 3 for _ in range(3))
        self.max_delay_s = self.random.choice((0.04, 0.2, 1.5))
        self.num_rows = self.random.choice((1, 4, 12, 50))
        self.replan_ticks = self.random.randint(1, 6)
        self.on_air: list[tuple[float, int, Chunk]] = []
        self.version = 0

    def observe(self, tick: int) -> None:
        if self.random.random() < 0.02:
            self.version += 1
        for _ in range(1 + (self.random.random() < self.twice)):
            if self.random.random() < self.drop:
                continue
            chunk = chunk_of(tick, self.num_rows, version=f"v{self.version}")
            if self.random.random() < self.bad * 0.5:
                chunk = chunk_of(tick, actions=BAD_ACTIONS, version=chunk.version)
            arrival_s = tick * PERIOD_S + self.random.uniform(0.0, self.max_delay_s)
            self.on_air.append((arrival_s, len(self.on_air), chunk))
        self.on_air.sort()

    def arrived(self, now_s: float) -> list[tuple[float, Chunk]]:
        ready = [(at_s, chunk) for at_s, _, chunk in self.on_air if at_s < now_s]
        self.on_air = [item for item in self.on_air if item[0] >= now_s]
        return ready


@settings(max_examples=500, deadline=None, database=None)
@given(seed=st.integers(0, 2**48))
def test_no_network_makes_the_arm_do_what_nobody_planned(seed):
    check_network(seed)


@pytest.mark.slow
@settings(max_examples=12_000, deadline=None, database=None)
@given(seed=st.integers(0, 2**48))
def test_nor_do_twelve_thousand_of_them(seed):
    check_network(seed)


def check_network(seed: int) -> None:
    network, queue = Network(seed), ActionQueue(DELTA)
    current: Chunk | None = None  # the plan, as an observer of verdicts would keep it
    fresh_s, last_obs_tick, num_bad, is_stopped, has_run = 0.0, -1, 0, False, False
    for tick in range(40):
        now_s = tick * PERIOD_S
        for at_s, chunk in network.arrived(now_s):
            verdict = queue.offer(chunk, now_s=at_s)
            is_good = chunk.actions is not BAD_ACTIONS
            assert verdict is not Verdict.ACCEPTED or is_good
            assert verdict is not Verdict.ACCEPTED or at_s - chunk.obs_s <= 1.0
            assert verdict is not Verdict.ACCEPTED or not is_stopped
            if verdict is Verdict.ACCEPTED:
                assert chunk.obs_tick > last_obs_tick
                current, fresh_s, has_run, num_bad = chunk, at_s, True, 0
            elif verdict is Verdict.REFUSED:
                num_bad += 1
                current = None if num_bad >= 3 else current
            elif verdict is Verdict.LATE and current and chunk.version != current.version:
                current = None
        if tick % network.replan_ticks == 0:
            network.observe(tick)
        was_stopped = is_stopped
        command = queue.step(tick, now_s=now_s)
        assert not was_stopped or command.mode is Mode.SAFE_STOP, "latched"
        must_stop = has_run and now_s - fresh_s >= 0.5
        assert (command.mode is Mode.SAFE_STOP) == (must_stop or was_stopped)
        is_stopped = command.mode is Mode.SAFE_STOP
        has_slot = current is not None and tick < current.obs_tick + len(current.actions)
        assert (command.obs_tick is not None) == (has_slot and not is_stopped)
        if command.obs_tick is None:
            assert command.is_miss
            assert command.action[0] == 0.0, "holding is standing still"
        else:
            assert command.mode is Mode.RUN
            assert current is not None
            assert command.obs_tick == current.obs_tick >= last_obs_tick
            assert command.action[0] == current.obs_tick * 100 + tick - current.obs_tick
            assert command.is_miss == (now_s - current.obs_s > 0.25)
            last_obs_tick = command.obs_tick
    counts = queue.counts
    assert counts.ticks == 40
    assert counts.holds <= counts.misses <= 40
