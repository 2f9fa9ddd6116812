"""A goal that goes out: seen, then not, on the ticks that the seed says; everything else is Meta-World's."""

import numpy as np
import pytest

from ganglion.errors import FieldError
from ganglion.robots.hidden import VISIBLE_TICKS, HiddenGoal
from ganglion.robots.metaworld import CORNER_KEY, STATE_KEY
from ganglion.robots.world import Viewable, World
from ganglion.train.demonstrations import Expert
from ganglion.train.temporal_data import TemporalCollectConfig, record_hidden

HOLD = np.zeros(4, np.float32)


def greenest(view: np.ndarray) -> int:
    """Pixels of the marker's pure green."""
    red, green, blue = (view[..., at].astype(int) for at in range(3))
    return int(((green > 90) & (green > red + 60) & (green > blue + 60)).sum())


def test_the_marker_goes_out_at_its_tick_and_comes_back_with_the_next_episode() -> None:
    world = HiddenGoal(task="push")
    try:
        assert isinstance(world, World)
        assert isinstance(world, Viewable)
        lengths = set()
        for seed in (3, 4, 5):
            world.reset(seed)
            first = greenest(world.observe()[CORNER_KEY])
            assert first > 3
            lengths.add(world.num_visible_ticks)
            while world.is_goal_visible:
                world.apply(HOLD)
            assert VISIBLE_TICKS[0] <= world.num_ticks <= VISIBLE_TICKS[1]
            assert greenest(world.observe()[CORNER_KEY]) == 0
            assert greenest(world.browser_view(160)) == 0
        assert len(lengths) > 1
        world.reset(3)
        again = world.num_visible_ticks
        world.reset(3)
        assert world.num_visible_ticks == again
    finally:
        world.close()


def test_only_the_picture_differs_from_the_open_world() -> None:
    world = HiddenGoal(task="pick-place")
    try:
        for _ in range(2):
            world.reset(11)
            for _ in range(VISIBLE_TICKS[1]):
                world.apply(HOLD)
            hidden, state = world.observe()[CORNER_KEY], world.observe()[STATE_KEY]
            snapshot = world.inner.snapshot()
            world.reset(11)
            world.observe()
            world.inner.restore(snapshot)
            assert np.array_equal(world.observe()[CORNER_KEY], hidden)
            assert np.array_equal(world.observe()[STATE_KEY], state)
    finally:
        world.close()


def test_a_goal_that_is_part_of_the_scene_cannot_be_hidden() -> None:
    with pytest.raises(FieldError, match="push, pick-place"):
        HiddenGoal(task="door-close")


def test_an_episode_is_recorded_whole_and_in_order() -> None:
    world, config = HiddenGoal(task="push"), TemporalCollectConfig()
    try:
        expert = Expert(task="push", scene="push")
        tries = (record_hidden(world, expert, config, seed) for seed in range(4_000, 4_006))
        rows = next(rows for rows in tries if rows is not None)  # noise makes the expert fail
    finally:
        world.close()
    assert [int(row["tick"]) for row in rows] == list(range(0, 3 * len(rows), 3))
    visible = [bool(row["is_goal_visible"]) for row in rows]
    assert visible == sorted(visible, reverse=True)
    assert visible[0]
    assert not visible[-1]
    assert rows[0]["chunk"].shape == (48, 4)
