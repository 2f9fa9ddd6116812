"""Seeded motion: smooth, inside its box, never faster than it says; jumps are far and at seeded ticks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.errors import FieldError
from ganglion.robots.catalog import check_world
from ganglion.robots.metaworld import RATE_HZ, TASKS
from ganglion.robots.moving import FIRST_JUMP_TICKS, JUMP_TICKS, MOVERS, Drift, Jumps

BOXES = sorted({(mover.low, mover.high) for movers in MOVERS.values() for mover in movers})


@given(
    box=st.sampled_from(BOXES),
    seed=st.integers(0, 2**32),
    speed_m_s=st.floats(0.01, 1.0),
)
def test_a_drift_stays_in_its_box_and_under_its_speed(
    box: tuple[tuple[float, ...], tuple[float, ...]], seed: int, speed_m_s: float
) -> None:
    low, high = np.array(box[0]), np.array(box[1])
    rng = np.random.default_rng(seed)
    start = rng.uniform(low, high)
    drift = Drift(low, high, start, speed_m_s, rng)
    places = np.stack([drift.at(tick) for tick in range(500)])
    np.testing.assert_allclose(places[0], start, atol=1e-7)
    assert (places >= low - 1e-9).all()
    assert (places <= high + 1e-9).all()
    steps_m = np.diff(places, axis=0)
    assert np.linalg.norm(steps_m, axis=1).max() <= speed_m_s / RATE_HZ + 1e-9
    # smooth: no step differs from the one before by more than a fraction of the fastest
    turn = np.linalg.norm(np.diff(steps_m, axis=0), axis=1).max()
    narrowest_m = min(width for width in high - low if width > 0)
    assert turn <= 2 * (speed_m_s / RATE_HZ) ** 2 / narrowest_m + 1e-9


@given(box=st.sampled_from(BOXES), seed=st.integers(0, 2**32))
def test_jumps_are_far_and_in_the_box(
    box: tuple[tuple[float, ...], tuple[float, ...]], seed: int
) -> None:
    low, high = np.array(box[0]), np.array(box[1])
    rng = np.random.default_rng(seed)
    place = rng.uniform(low, high)
    jumps = Jumps(low, high, place, rng)
    assert FIRST_JUMP_TICKS[0] <= jumps.due_tick < FIRST_JUMP_TICKS[1]
    for _ in range(10):
        assert ((low <= jumps.place) & (jumps.place <= high)).all()
        assert np.linalg.norm(jumps.place - place) >= (high - low).max() / 2
        place, tick = jumps.place, jumps.due_tick
        jumps.done(tick)
        assert JUMP_TICKS[0] <= jumps.due_tick - tick < JUMP_TICKS[1]


def test_what_moves_is_in_the_table_of_tasks() -> None:
    assert set(MOVERS) <= set(TASKS)
    for movers in MOVERS.values():
        for mover in movers:
            assert len(mover.low) == len(mover.high), mover
            assert all(low <= high for low, high in zip(mover.low, mover.high, strict=True)), mover


@pytest.mark.parametrize("world", ["metaworld-moving", "metaworld-jumping"])
def test_the_catalog_knows_the_moving_worlds(world: str) -> None:
    for task in MOVERS:
        check_world(f"{world}:{task}")
    with pytest.raises(FieldError, match="task: expected one of"):
        check_world(f"{world}:juggle")
    with pytest.raises(FieldError, match="task: expected one of"):
        check_world(world)
