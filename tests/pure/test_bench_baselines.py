"""The robots of the baselines follow their own rules."""

from pathlib import Path

import numpy as np
import pytest

from ganglion.bench.baselines.lerobot import NEW_SHARE, OLD_SHARE, LeRobotQueue
from ganglion.bench.baselines.sense_act import SenseActQueue
from ganglion.bench.replay import FleetReport, ReplayConfig, RobotReport, Scheme, Tape
from ganglion.types import Float32Array

TICK_S = 0.05


def chunk(value: float, rows: int = 8) -> Float32Array:
    return np.full((rows, 1), value, np.float32)


def test_lerobot_asks_at_half_a_chunk_and_averages_the_overlap() -> None:
    queue = LeRobotQueue(chunk_rows=4, max_age_s=0.25)
    assert queue.tick(0.0) == (1, True), "nothing to execute"
    assert queue.tick(TICK_S) == (1, False), "one observation at a time"
    queue.offer(chunk(1.0), 0.0, 0.06)
    assert queue.num_left == 4, "of 8 rows it asks for 4"
    assert queue.tick(2 * TICK_S) == (0, False)
    assert queue.tick(3 * TICK_S) == (0, True), "two of four left"
    # the newest executed timestep is 1, so rows 0.. of the answer are for 1..: row 0 comes too late
    queue.offer(chunk(2.0), 3 * TICK_S, 0.16)
    blended = OLD_SHARE * 1.0 + NEW_SHARE * 2.0
    for timestep, value in ((2, blended), (3, blended), (4, 2.0)):
        action = queue.action(timestep)
        assert action is not None
        assert action[0] == pytest.approx(value)
    assert queue.num_left == 3


def test_lerobot_counts_actions_of_old_observations() -> None:
    queue = LeRobotQueue(chunk_rows=4, max_age_s=0.25)
    queue.tick(0.0)
    queue.offer(chunk(1.0), 0.0, 0.2)
    assert queue.tick(0.25)[0] == 0
    assert queue.tick(0.3)[0] == 1
    queue.lose()


def test_sense_act_stands_still_while_it_waits() -> None:
    queue = SenseActQueue(num_rows=3, max_age_s=0.25)
    assert queue.tick(0.0) == (0, True)
    assert queue.offer(chunk(1.0), 0.0, 0.04) == 0, "within the tick it asked in"
    assert queue.tick(0.05) == (0, False)
    assert queue.tick(0.10) == (0, False)
    assert queue.tick(0.15) == (0, True), "three rows are done"
    assert queue.tick(0.20) == (1, False), "the tick of the question ended without an action"
    assert queue.offer(chunk(1.0), 0.15, 0.22) == 0
    assert queue.tick(0.25) == (0, False)
    assert queue.num_late_ticks == 3


def test_sense_act_asks_again_after_an_error() -> None:
    queue = SenseActQueue(num_rows=3, max_age_s=0.25)
    queue.tick(0.0)
    queue.lose()
    assert queue.tick(0.05) == (1, True)


def test_no_two_frames_of_a_replay_are_equal_and_the_tape_has_no_cut() -> None:
    images = {"view": np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)}
    states = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    tape = Tape(images, states, ["a", "b"])
    seen = set()
    for robot in range(4):
        for at in range(12):
            frame, prompt = tape.frame(robot, at, "state")
            assert prompt == "ab"[robot % 2]
            seen.add(frame["view"].tobytes())
    assert len(seen) == 48
    places = [tape.frame(0, at, "state")[0]["state"][0] for at in range(7)]
    assert places == [0, 2, 4, 4, 2, 0, 0]


def test_a_fleets_figures() -> None:
    config = ReplayConfig(url="", tape=Path(), scheme=Scheme.NEWEST, num_robots=2, interval_ticks=3)
    good, bad = RobotReport(num_ticks=100), RobotReport(num_ticks=100, num_misses=20, waited_s=1.0)
    report = FleetReport(config=config, robots=(good, bad))
    assert report.miss_rate == pytest.approx(0.1)
    assert report.wait_ratios == pytest.approx([0.0, 0.25])
