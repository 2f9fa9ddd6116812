"""The Meta-World world: same seed same scene, starts that tell nothing, snapshots that come back, views on demand."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from ganglion.errors import FieldError
from ganglion.robots.metaworld import (
    CORNER_KEY,
    GRIPPER_KEY,
    STATE_KEY,
    TASKS,
    MetaWorld,
    Start,
)
from ganglion.robots.world import Viewable, World
from ganglion.train.demonstrations import (
    HORIZON,
    CollectConfig,
    Expert,
    expert_chunk,
    record_episode,
)

# Mesa's EGL says goodbye with an error that means nothing
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def drawer() -> Iterator[MetaWorld]:
    world = MetaWorld(task="drawer-open")
    yield world
    world.close()


def test_it_is_a_world_that_people_can_watch(drawer: MetaWorld) -> None:
    assert isinstance(drawer, World)
    assert isinstance(drawer, Viewable)
    drawer.reset(0)
    assert drawer.browser_view(96).shape == (96, 96, 3)
    assert drawer.prompt == "open the drawer"
    assert drawer.rate_hz == 80.0


def test_views_and_state_have_the_promised_form(drawer: MetaWorld) -> None:
    drawer.reset(0)
    seen = drawer.observe()
    assert set(seen) == {CORNER_KEY, GRIPPER_KEY, STATE_KEY}
    for key in (CORNER_KEY, GRIPPER_KEY):
        assert seen[key].shape == (80, 80, 3)
        assert seen[key].dtype == np.uint8
        assert seen[key].std() > 10  # a picture, not a blank
    assert seen[STATE_KEY].shape == (4,)
    assert seen[STATE_KEY].dtype == np.float32


def test_the_corner_view_is_upright(drawer: MetaWorld) -> None:
    """The sky above the table is black: it must be at the top."""
    drawer.reset(0)
    picture = drawer.browser_view(96)
    assert picture[:8].mean() < picture[-8:].mean()


def test_the_same_seed_is_the_same_episode() -> None:
    pictures, states = [], []
    for _ in range(2):
        world = MetaWorld(task="push")
        world.reset(7)
        for _ in range(5):
            world.apply(np.array([0.5, 0.2, -0.3, 1.0], np.float32))
        pictures.append(world.observe()[CORNER_KEY])
        states.append(world.privileged_obs)
        world.reset(8)
        assert not np.array_equal(world.privileged_obs, states[-1])
        world.close()
    assert np.array_equal(*states)
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.joint is not None])
def test_half_open_starts_are_solved_for_neither_task(task: str) -> None:
    opposite = TASKS[task].opposite
    assert opposite is not None
    for name in (task, opposite):
        world = MetaWorld(task=name)
        for seed in (1, 3, 5):
            world.reset_to(seed, Start.HALF_OPEN)
            world.apply(np.zeros(4, np.float32))
            assert not world.success, (name, seed)
        world.close()


def test_a_done_start_is_the_other_end_of_the_joint(drawer: MetaWorld) -> None:
    drawer.reset_to(1, Start.DONE)
    assert float(drawer.env.data.joint("goal_slidey").qpos[0]) == TASKS["drawer-open"].joint_done
    assert TASKS["drawer-close"].joint_done == 0.0


def test_odd_seeds_start_half_open(drawer: MetaWorld) -> None:
    slides = []
    for seed in range(6):
        drawer.reset(seed)
        slides.append(float(drawer.env.data.joint("goal_slidey").qpos[0]))
    assert all(abs(slide) < 0.01 for slide in slides[::2])
    assert all(-0.125 <= slide <= -0.065 for slide in slides[1::2])


def test_goals_are_hidden_where_they_would_tell_the_task(drawer: MetaWorld) -> None:
    for name in ("drawer-open", "drawer-close", "window-open", "window-close"):
        assert not TASKS[name].is_goal_visible
    sites = [drawer.env.model.site(index) for index in range(drawer.env.model.nsite)]
    assert [float(site.rgba[3]) for site in sites if site.name == "goal"] == [0.0]


def test_push_and_pick_place_look_alike() -> None:
    colours = []
    for name in ("push", "pick-place"):
        world = MetaWorld(task=name)
        model = world.env.model
        sites = [model.site(index) for index in range(model.nsite)]
        colours.append([tuple(site.rgba) for site in sites if site.name == "goal"])
        world.close()
    assert colours[0] == colours[1]


def test_unknown_tasks_and_starts_are_named() -> None:
    with pytest.raises(FieldError, match=r"task: expected one of .*drawer-open.*, got 'fly'"):
        MetaWorld(task="fly")
    world = MetaWorld(task="faucet-open")
    with pytest.raises(FieldError, match="start: expected undone for faucet-open, got half_open"):
        world.reset_to(0, Start.HALF_OPEN)
    world.close()


def test_looking_ahead_leaves_no_trace_and_comes_true(drawer: MetaWorld) -> None:
    expert = Expert(task="drawer-open", scene="drawer-open")
    drawer.reset(3)
    for _ in range(10):
        drawer.apply(expert.action(drawer))
    before = drawer.observe()
    chunk = expert_chunk(drawer, expert)
    after = drawer.observe()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert drawer.num_ticks == 10
    lived = []
    for _ in range(HORIZON):
        lived.append(expert.action(drawer))
        drawer.apply(lived[-1])
    assert np.array_equal(chunk, np.stack(lived))


@pytest.mark.parametrize(
    ("task", "scene"),
    [("drawer-close", "drawer-close"), ("push", "pick-place"), ("pick-place", "push")],
)
def test_an_episode_is_recorded_past_success(task: str, scene: str) -> None:
    config = CollectConfig(noise_sigmas=(0.0,))
    world, expert = MetaWorld(task=scene), Expert(task=task, scene=scene)
    rows = record_episode(world, expert, config, seed=0)
    assert rows is not None
    assert expert.is_done(world)
    assert [int(row["tick"]) for row in rows] == list(
        range(int(rows[0]["tick"]), int(rows[-1]["tick"]) + 1, config.ticks_per_sample)
    )
    assert all(row["chunk"].shape == (HORIZON, 4) for row in rows)
    assert all(np.abs(row["chunk"]).max() <= 1.0 for row in rows)
    if task == "pick-place":  # carried out in the air, where the scene's own goal is not
        assert not world.success
    world.close()


def test_robots_know_no_torch() -> None:
    code = "import sys, ganglion.robots.metaworld; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
