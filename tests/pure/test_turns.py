"""Turns: robots' deadlines bound each step of language models, a share of the time bounds all of them."""

from hypothesis import given
from hypothesis import strategies as st

from ganglion.pipeline.turns import Turns


def make(share: float = 0.5, floor: float = 0.0) -> Turns:
    return Turns(step_us=20_000, slice_us=5_000, share=share, floor=floor)


def test_without_robots_the_whole_budget() -> None:
    assert make().budget_us(has_robots=False, slack_us=None) == 20_000


def test_beside_idle_robots_a_slice() -> None:
    assert make().budget_us(has_robots=True, slack_us=None) == 5_000


def test_robots_work_needs_slack_and_its_share_of_the_time() -> None:
    turns = make()
    assert turns.budget_us(has_robots=True, slack_us=100_000) is None  # robots have had nothing yet
    turns.observe_robots(6_000)
    assert turns.budget_us(has_robots=True, slack_us=100_000) == 5_000
    assert turns.budget_us(has_robots=True, slack_us=4_000) is None
    assert turns.budget_us(has_robots=True, slack_us=-1) is None
    turns.observe_turn(5_000, budget_us=5_000, has_robot_work=True)
    assert turns.budget_us(has_robots=True, slack_us=100_000) is None


def test_a_turn_that_took_long_is_expected_to_take_long() -> None:
    turns = make()
    turns.observe_turn(30_000, budget_us=5_000, has_robot_work=False)
    turns.observe_robots(100_000)
    assert turns.budget_us(has_robots=True, slack_us=29_000) is None
    assert turns.budget_us(has_robots=True, slack_us=31_000) == 5_000
    for _ in range(20):
        turns.observe_turn(4_000, budget_us=5_000, has_robot_work=False)
    assert turns.turn_us < 5_000


def test_late_robots_leave_a_floor() -> None:
    turns = make(floor=0.1)
    turns.observe_robots(40_000)
    assert turns.budget_us(has_robots=True, slack_us=-1) is None
    turns.observe_robots(6_000)
    assert turns.budget_us(has_robots=True, slack_us=-1) == 5_000
    turns.observe_turn(5_000, budget_us=5_000, has_robot_work=True)
    assert turns.budget_us(has_robots=True, slack_us=-1) is None


def test_no_share_is_no_turn_while_robots_have_work() -> None:
    turns = make(share=0.0)
    turns.observe_robots(10_000_000)
    assert turns.budget_us(has_robots=True, slack_us=10_000_000) is None
    assert turns.budget_us(has_robots=True, slack_us=None) == 5_000


@given(
    st.floats(0.05, 0.9),
    st.lists(st.tuples(st.integers(100, 30_000), st.integers(100, 20_000)), min_size=40),
)
def test_the_share_of_the_time_is_kept(share: float, times: list[tuple[int, int]]) -> None:
    """Whatever steps take: language models' time over all, but for the one turn that took longer than expected."""
    turns = make(share)
    robots_us = language_us = 0
    for robot_us, turn_us in times:
        robots_us += robot_us
        turns.observe_robots(robot_us)
        budget_us = turns.budget_us(has_robots=True, slack_us=10_000_000)
        if budget_us is not None:
            language_us += turn_us
            turns.observe_turn(turn_us, budget_us=budget_us, has_robot_work=True)
    assert language_us <= robots_us * share / (1 - share) + 20_000
