"""The state that a rolled execution sends against the one that Meta-World's arm really has some ticks later."""

import numpy as np
import pytest

from ganglion.robots.catalog import METAWORLD_ARM
from ganglion.robots.execution import roll
from ganglion.robots.metaworld import STATE_DIM, MetaWorld


@pytest.fixture
def world():
    arm = MetaWorld(task="push")
    arm.reset(3)
    yield arm
    arm.close()


def state_of(world: MetaWorld) -> np.ndarray:
    return world.privileged_obs[:STATE_DIM].astype(np.float32)


@pytest.mark.parametrize("num_ticks", [1, 4, 8])
def test_a_moving_hand_is_where_it_was_rolled_to(world, num_ticks):
    action = np.array([0.8, -0.5, 0.3, 0.0], np.float32)
    for _ in range(8):  # the hand follows its target with a lag of some ticks
        world.apply(action)
    before = state_of(world)
    rolled = roll(before, np.repeat(action[None], num_ticks, 0), METAWORLD_ARM)
    for _ in range(num_ticks):
        world.apply(action)
    after = state_of(world)
    error_m = np.abs(after - rolled)[:3].max()
    assert error_m < 0.002 * num_ticks
    assert error_m < 0.4 * np.abs(after - before)[:3].max(), "much nearer than the state it had"


def test_a_closing_gripper_is_about_where_it_was_rolled_to(world):
    action = np.array([0.0, 0.0, 0.0, 1.0], np.float32)
    for _ in range(4):
        world.apply(action)
    before = state_of(world)
    for _ in range(5):
        world.apply(action)
    rolled = roll(before, np.repeat(action[None], 5, 0), METAWORLD_ARM)
    assert rolled[3] == pytest.approx(state_of(world)[3], abs=0.1)
