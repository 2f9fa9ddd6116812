"""Lanes: each on its own cores, whoever starts them."""

import os
import threading

import pytest

from ganglion.engine.lane import Lanes

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores that threads can be bound to",
)


def seen_by(lanes: Lanes) -> dict[int, set[int]]:
    """Lane -> the cores that it may run on."""
    seen: dict[int, set[int]] = {}

    def note(lane: int) -> None:
        seen[lane] = os.sched_getaffinity(0)

    def drive() -> None:
        lanes.open()
        lanes.run([(lane, lambda lane=lane: note(lane)) for lane in range(len(lanes))])  # type: ignore[misc]
        lanes.close()

    thread = threading.Thread(target=drive)
    thread.start()
    thread.join()
    return seen


def test_a_lane_a_core() -> None:
    """The first lane's thread starts the others: they must not inherit its core."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    assert seen_by(Lanes(((first,), (second,)))) == {0: {first}, 1: {second}}


def test_cores_out_of_reach_are_left_out() -> None:
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    assert seen_by(Lanes(((core, 4096), (4096,)))) == {0: {core}, 1: allowed}


def test_an_unpinned_lane_runs_anywhere() -> None:
    assert seen_by(Lanes(((),)))[0] == os.sched_getaffinity(0)
