"""What a camera of Meta-World shows: the same with and without what lies beside its view, in the size that is wanted."""

from itertools import combinations

import numpy as np
import pytest

from ganglion.robots import metaworld
from ganglion.robots.catalog import open_arm
from ganglion.robots.frustum import drop_unseen
from ganglion.robots.metaworld import CORNER_KEY, GRIPPER_KEY, MetaWorld

# Mesa's EGL says goodbye with an error that means nothing
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("task", ["push", "faucet-open", "window-close"])
def test_dropping_what_no_camera_sees_changes_no_pixel(task, monkeypatch):
    world = MetaWorld(task=task)
    random = np.random.default_rng(0)
    num_dropped = []

    def drop_counted(*args):
        num_dropped.append(drop_unseen(*args))

    for seed in range(2):
        world.reset(seed)
        for _ in range(4):
            for _ in range(15):
                world.apply(random.uniform(-1, 1, 4).astype(np.float32))
            monkeypatch.setattr(metaworld, "drop_unseen", drop_counted)
            fast = world.observe()
            monkeypatch.setattr(metaworld, "drop_unseen", lambda *args: 0)
            whole = world.observe()
            for key in (CORNER_KEY, GRIPPER_KEY):
                np.testing.assert_array_equal(fast[key], whole[key])
    world.close()
    assert min(num_dropped) > 3, "nothing to compare"


@pytest.mark.parametrize(
    ("wanted", "side_px"),
    [([64, 64, 3], 64), ([80, 80, 3], 80), ([64, 80, 3], 80), ([9999, 9999, 3], 80)],
)
def test_views_come_in_the_size_that_the_policy_wants_if_that_can_be(wanted, side_px):
    arm = open_arm("metaworld:push", views={CORNER_KEY: wanted, GRIPPER_KEY: wanted})
    arm.world.reset(0)
    assert arm.world.observe()[GRIPPER_KEY].shape == (side_px, side_px, 3)
    arm.world.close()


def test_no_seed_is_used_for_two_purposes():
    purposes = (
        metaworld.TRAINING_SEEDS,
        metaworld.VALIDATION_SEEDS,
        metaworld.UNSEEN_SEEDS,
        metaworld.DEMO_SEEDS,
    )
    for one, other in combinations(purposes, 2):
        assert not set(one) & set(other)
