"""The moving worlds: seeded motion that no action changes, success against what is there now, jumps that are told."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ganglion.robots.catalog import open_arm
from ganglion.robots.metaworld import CORNER_KEY
from ganglion.robots.moving import MOVERS, MOVING_TASKS, Kind, Motion, MovingMetaWorld, Place
from ganglion.robots.world import Viewable, World
from ganglion.train.demonstrations import Expert
from ganglion.types import Float32Array

# Mesa's EGL says goodbye with an error that means nothing
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

REST = np.zeros(4, np.float32)
QUICK = ("button-press-topdown", "push")  # a body; a goal and a puck. The others are `slow`
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MOVERS]
Open = Callable[..., MovingMetaWorld]


@pytest.fixture(scope="module")
def opened() -> Iterator[Open]:
    """One world of each kind for all tests: opening takes longer than an episode."""
    worlds: dict[tuple[str, Motion], MovingMetaWorld] = {}

    def open_world(task: str, motion: Motion = Motion.DRIFT) -> MovingMetaWorld:
        if (task, motion) not in worlds:
            worlds[task, motion] = MovingMetaWorld(task=task, motion=motion)
        return worlds[task, motion]

    yield open_world
    for world in worlds.values():
        world.close()


def track(
    world: MovingMetaWorld, seed: int, actions: list[Float32Array]
) -> list[tuple[Place, ...]]:
    """Where every mover is after each action."""
    world.reset(seed)
    places = []
    for action in actions:
        world.apply(action)
        places.append(world.places)
    return places


def wild(num_ticks: int) -> list[Float32Array]:
    """Actions that swing the arm high above everything."""
    rng = np.random.default_rng(3)
    actions = rng.uniform(-1, 1, (num_ticks, 4)).astype(np.float32)
    actions[:, 2] = 1.0
    return list(actions)


@pytest.mark.parametrize("motion", list(Motion))
@pytest.mark.parametrize("task", ALL)
def test_motion_follows_from_the_seed_alone(opened: Open, task: str, motion: Motion) -> None:
    world = opened(task, motion)
    calm = track(world, 4, [REST] * 60)
    np.testing.assert_array_equal(calm, track(world, 4, [REST] * 60))
    swung = track(world, 4, wild(60))
    free = [at for at, mover in enumerate(MOVERS[task]) if mover.kind is not Kind.PUCK]
    if motion is Motion.DRIFT:  # no action changes it, unless it moves the puck
        np.testing.assert_allclose(
            [[places[at] for at in free] for places in calm],
            [[places[at] for at in free] for places in swung],
            atol=1e-12,
        )
    assert not np.allclose(calm[-1], track(world, 5, [REST] * 60)[-1])


def test_two_worlds_of_one_seed_move_alike(opened: Open) -> None:
    other = MovingMetaWorld(task="push")
    calm = track(opened("push"), 4, [REST] * 60)
    np.testing.assert_array_equal(calm, track(other, 4, [REST] * 60))
    other.close()


@pytest.mark.parametrize("motion", list(Motion))
@pytest.mark.parametrize("task", ALL)
def test_motion_alone_solves_nothing_and_stays_where_training_was(
    opened: Open, task: str, motion: Motion
) -> None:
    world = opened(task, motion)
    for seed in range(3):
        for places in track(world, seed, [REST] * 250):
            for mover, place in zip(MOVERS[task], places, strict=True):
                size = len(mover.low)
                slack_m = 1e-3 if mover.kind is Kind.PUCK else 1e-6  # a puck settles
                assert (place[:size] >= np.array(mover.low) - slack_m).all(), (mover, place)
                assert (place[:size] <= np.array(mover.high) + slack_m).all(), (mover, place)
        assert not world.success, (task, seed)


@pytest.mark.parametrize("task", ALL)
def test_targets_move_with_the_body_that_they_are_on(opened: Open, task: str) -> None:
    if MOVERS[task][0].kind is not Kind.BODY:
        return
    world = opened(task)
    world.reset(2)
    env: Any = world.inner.env
    body, *_ = world.places
    target = np.array(env._target_pos)
    for _ in range(60):
        world.apply(REST)
    moved, *_ = world.places
    assert np.linalg.norm(moved - body) > 0.01
    np.testing.assert_allclose(env._target_pos - moved, target - body, atol=1e-9)
    model_body = env.data.body(MOVERS[task][0].name).xpos  # of the physics, not only of the model
    np.testing.assert_allclose(model_body, moved, atol=1e-9)


@pytest.mark.parametrize("task", ["push", pytest.param("pick-place", marks=pytest.mark.slow)])
def test_success_is_judged_against_the_goal_where_it_is_now(opened: Open, task: str) -> None:
    world = opened(task)
    for is_now in (False, True):
        world.reset(3)
        before = world.places[0]
        while np.linalg.norm(world.places[0] - before) < 0.1:
            world.apply(REST)
        puck = world.inner.env.data.joint("objjoint")
        puck.qpos[:3] = world.places[0] if is_now else before
        puck.qvel[:] = 0.0
        world.apply(REST)
        assert world.success == is_now


def test_a_belt_carries_the_puck_until_the_arm_has_it_or_it_is_off(opened: Open) -> None:
    world, expert = opened("push"), Expert(task="push", scene="push")
    world.reset(0)
    puck = MOVERS["push"][1]
    fastest_m = puck.speed_m_s / world.rate_hz
    steps_m = _puck_steps(world, [REST] * 10)[2:]  # after it has settled
    assert (steps_m > 0).all()
    assert (steps_m < fastest_m + 1e-5).all()
    num_held = 0
    while not world.success:
        world.apply(expert.action(world.inner))
        is_held = not world._scene.is_free(puck)
        expected = world.places[1]
        num_held += is_held
        if is_held:
            world._drift(puck, world._paths[1], world.num_ticks + 1)  # type: ignore[arg-type]
            np.testing.assert_array_equal(world.places[1], expected)
    assert num_held > 5
    world.reset(0)
    world.inner.env.data.joint(puck.name).qpos[1] = puck.high[1] + 0.05
    assert _puck_steps(world, [REST] * 12)[4:].max() < 1e-4


def _puck_steps(world: MovingMetaWorld, actions: list[Float32Array]) -> Float32Array:
    places = [world.places[-1]]
    for action in actions:
        world.apply(action)
        places.append(world.places[-1])
    return np.linalg.norm(np.diff(places, axis=0), axis=1).astype(np.float32)


@pytest.mark.parametrize("task", [param for param in ALL if param.values[0] in MOVING_TASKS])
def test_the_scripted_expert_solves_what_drifts(opened: Open, task: str) -> None:
    world, expert = opened(task), Expert(task=task, scene=task)
    num_solved = 0
    for seed in range(20_000, 20_020):
        world.reset(seed)
        while not world.success and world.num_ticks < 250:
            world.apply(expert.action(world.inner))
        num_solved += world.success
    assert num_solved >= 19, f"{num_solved} of 20"


@pytest.mark.parametrize("task", ALL)
def test_a_jump_is_told_and_seen_and_spares_the_arm(opened: Open, task: str) -> None:
    world, expert = opened(task, Motion.JUMP), Expert(task=task, scene=task)
    num_jumps = 0
    for seed in range(3):
        world.reset(seed)
        assert world.last_jump_tick is None
        for _ in range(120):
            before, jump_tick = world.places, world.last_jump_tick
            picture = world.observe()[CORNER_KEY] if num_jumps == 0 else None
            world.apply(expert.action(world.inner))
            hand = world.inner.privileged_obs
            assert np.isfinite(hand).all()
            assert np.linalg.norm(hand[:3] - hand[18:21]) < 0.05  # nothing throws the arm
            if world.last_jump_tick == jump_tick:
                continue
            num_jumps += 1
            assert world.last_jump_tick == world.num_ticks
            steps_m = [
                np.linalg.norm(new - old) / max(np.subtract(mover.high, mover.low))
                for mover, new, old in zip(MOVERS[task], world.places, before, strict=True)
            ]
            assert max(steps_m) > 0.4
            if picture is not None:
                changed = np.abs(world.observe()[CORNER_KEY].astype(int) - picture).max(axis=2)
                assert (changed > 30).sum() >= 4
        assert num_jumps >= seed + 1


def test_they_are_worlds_of_the_catalog() -> None:
    for name, motion in (("metaworld-moving", Motion.DRIFT), ("metaworld-jumping", Motion.JUMP)):
        arm = open_arm(f"{name}:push")
        assert isinstance(arm.world, World)
        assert isinstance(arm.world, Viewable)
        assert isinstance(arm.world, MovingMetaWorld)
        assert arm.world.motion is motion
        assert (arm.world_name, arm.task) == (name, "push")
        arm.world.reset(0)
        assert arm.view is not None
        assert arm.view(96).shape == (96, 96, 3)
        arm.world.close()


@pytest.mark.parametrize("motion", list(Motion))
def test_a_snapshot_brings_the_motion_back(motion: Motion, opened: Open) -> None:
    world = opened("push", motion)
    world.reset(10_003)
    actions = np.random.default_rng(0).uniform(-1, 1, (70, 4)).astype(np.float32)
    for action in actions[:5]:
        world.apply(action)
    snapshot = world.snapshot()
    ends = []
    for _ in range(2):
        for action in actions[5:]:
            world.advance(action)
        ends.append((np.stack(world.places), world.privileged_obs.copy(), world.num_ticks))
        world.restore(snapshot)
    assert world.num_ticks == 5
    np.testing.assert_allclose(ends[0][0], ends[1][0], atol=1e-6)
    np.testing.assert_allclose(ends[0][1], ends[1][1], atol=1e-6)
    assert ends[0][2] == ends[1][2] == 70
    # a look ahead sees what an episode that goes there sees
    for action in actions[5:]:
        world.apply(action)
    np.testing.assert_allclose(np.stack(world.places), ends[0][0], atol=1e-6)
    np.testing.assert_allclose(world.privileged_obs[:7], ends[0][1][:7], atol=1e-6)
